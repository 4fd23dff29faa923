"""How far a stage is: a bar on a terminal, lines in a log."""

import io
import logging
import re
import sys

from pipeline.job import cli


class Screen(io.StringIO):
    """stderr as a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_and_lines_above_it(monkeypatch, caplog):
    caplog.set_level("INFO", "retrace")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(screen)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [handler])
    progress = cli.Progress("sae", 100, "rows")
    progress.at(40)
    cli.log.info("in between")
    progress.bar.refresh()
    progress.at(100)
    drawn = re.split(r"[\r\n]", screen.getvalue())
    assert "in between" in drawn  # on a line of its own
    assert any("sae:  40%" in part and "rows/s" in part for part in drawn)
    assert drawn[-1].strip() == "" and root.handlers == [handler]


def test_a_log_has_lines(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level("INFO", "retrace"):
        progress = cli.Progress("sae", 100, "rows")
        progress.at(40)  # within five seconds of the start
        progress.at(100)
    assert len(caplog.messages) == 1 and progress.bar is None
    assert re.fullmatch(r"sae 100 %  [\d,]+ rows/s, 0:00 left", caplog.messages[0])
