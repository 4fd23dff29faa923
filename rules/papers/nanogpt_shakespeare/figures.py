"""The figure of the nanoGPT paper that is no core kind: what its models write."""

from typing import Any

from pipeline.figures.parts import Drawn, as_lines, side_by_side


def samples(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What each arm writes, and held-out text, side by side; the reader chooses the sample.

    Options: characters of each text (default 500), width of a column in characters (default 40).
    """
    frame = tables["language/samples"].copy()
    by_model = frame["writer"] == "model"
    order = sorted(frame["arm"].unique(), reverse=True)  # untrained, trained
    frame["writer"] = frame["arm"].where(by_model, frame["writer"])
    frame = frame[by_model | (frame["arm"] == order[0])]
    rank = lambda c: c.map([*order, "held out"].index)  # noqa: E731
    frame = frame.sort_values("writer", key=rank, kind="stable")
    n, width = options.get("characters", 500), options.get("width", 40)
    shown = {
        f"sample {i + 1}": [as_lines(text[:n].strip("\n"), width) for text in rows["text"]]
        for i, rows in frame.groupby("sample")
    }
    return side_by_side(list(frame["writer"].unique()), shown, width), frame
