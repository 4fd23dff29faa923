"""Names of models as TransformerLens has them -> repositories of the hub.

`repo: pythia-70m` in a paper.yaml is EleutherAI/pythia-70m. Importing TransformerLens takes 15
seconds, so its list stands in tl_names.json; a test holds the two equal, and

    python -m pipeline aliases        writes tl_names.json anew

after a new release. Names without an owner that TransformerLens lists as repositories (gpt2) are
the hub's own old names, which it still answers to.
"""

import argparse
import importlib.util
import json
import runpy
from functools import cache
from pathlib import Path

from pipeline.errors import command, nearest

FILE = Path(__file__).with_name("tl_names.json")


def of_transformer_lens() -> dict[str, str]:
    """Every name that the installed TransformerLens knows a model by -> its repository, sorted.

    Its list is a file of plain names, which is read without importing the package.
    """
    package = importlib.util.find_spec("transformer_lens").origin
    listed = runpy.run_path(str(Path(package).with_name("supported_models.py")))
    out = {repo: repo for repo in listed["OFFICIAL_MODEL_NAMES"] if "/" not in repo}
    for repo, names in listed["MODEL_ALIASES"].items():
        out |= dict.fromkeys(names, repo)
    return dict(sorted(out.items()))


@cache
def known() -> dict[str, str]:
    """Name -> repository."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def repository(name: str) -> str:
    """The repository, owner/name, of a name of TransformerLens or the hub.

    Raises:
        ValueError: a name without an owner that TransformerLens does not know.
    """
    found = known().get(name, name)
    if name and "/" not in name and name not in known():
        raise ValueError(
            f"repo '{name}' is no model that TransformerLens knows by name"
            f"{nearest(name, known())}; write owner/name, as on its page on the hub"
        )
    return found


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m pipeline aliases",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    with command("aliases"):
        text = json.dumps(of_transformer_lens(), indent=0, ensure_ascii=False)
        FILE.write_text(text + "\n", encoding="utf-8")
        print(FILE)
