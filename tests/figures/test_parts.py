"""Parts of figures: cases that a reader chooses between, and looks of the values of a column."""

import pandas as pd

from pipeline.figures.parts import ALWAYS, Panels, by_case, line, points, styled

ROWS = pd.DataFrame({"kind": ["b", "a", "b", "c"], "x": [1, 2, 3, 4]})


def test_values_come_in_the_order_of_their_looks_and_without_those_that_have_no_rows():
    found = list(styled(ROWS, "kind", {"a": ("A", 0), "none": ("N", 1), "b": ("B", 2)}))
    assert [(value, look) for _, value, look in found] == [("a", ("A", 0)), ("b", ("B", 2))]
    assert [rows["x"].tolist() for rows, *_ in found] == [[2], [1, 3]]


def test_every_case_is_drawn_and_the_first_is_seen():
    cases = [("low", ROWS[:2]), ("high", ROWS[2:])]
    panels = Panels(["left", "right"])
    panels.add(0, line([0], [0]))
    drawn = lambda rows: ((i, points(rows["x"], rows["x"], "both")) for i in (0, 1))  # noqa: E731
    assert by_case(panels, iter(cases), drawn) is panels
    assert panels.cases == [ALWAYS, 0, 0, 1, 1]
    assert [trace.visible for trace in panels.figure.data] == [None, True, True, False, False]
    (menu,) = panels.figure.layout.updatemenus
    assert [button.label for button in menu.buttons] == ["low", "high"]
    assert menu.buttons[1].args[0]["visible"] == [True, False, False, True, True]


def test_one_case_needs_no_list():
    panels = by_case(Panels(), [("all", ROWS)], lambda rows: [(0, points(rows["x"], rows["x"]))])
    assert not panels.figure.layout.updatemenus and panels.figure.data[0].visible


def test_a_case_changes_the_layout_and_the_first_does_so_at_the_start():
    panels = Panels()
    for case, y in enumerate((1, 2)):
        panels.add(0, line([0], [y]), case=case)
    titles = [{"yaxis.title.text": "loss"}, {"yaxis.title.text": "accuracy"}]
    panels.choose(["loss", "accuracy"], titles)
    assert panels.figure.layout.yaxis.title.text == "loss"
    (menu,) = panels.figure.layout.updatemenus
    assert [button.args[1] for button in menu.buttons] == titles


def test_both_axes_of_one_panel():
    panels = Panels(["left", "right"])
    panels.axis(1, {"title": {"text": "x"}}, {"type": "log"})
    layout = panels.figure.layout
    assert (layout.xaxis2.title.text, layout.yaxis2.type) == ("x", "log")
    assert layout.xaxis.title.text is None and layout.yaxis.type is None
