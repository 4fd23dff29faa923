"""Figures as pictures and pages as PDF: what the browser draws, and what is told without one."""

import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import warm

from pipeline.errors import RetraceError
from pipeline.sharing import slide

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, slide.NAMES)), None)
drawn = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (a Debian package)")
BASE = Path("results/laptop/made_up")


@pytest.fixture
def figure(made_up) -> Path:
    return made_up[0] / BASE / "figures/pareto.html"


def call(*args: object) -> subprocess.CompletedProcess:
    command = [warm.python(), "-m", "pipeline", "slide", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.workflow
@drawn
def test_an_svg_is_whole_on_white_with_the_title_and_no_menu(figure, tmp_path):
    out = tmp_path / "pareto.svg"
    done = call(figure, "--out", out)
    assert done.returncode == 0 and done.stdout.strip() == str(out), done.stderr
    root = ET.parse(out).getroot()
    assert (root.get("width"), root.get("height")) == ("960", "540")
    said = "".join(root.itertext())
    title = re.search(r"<h1>(.*?)</h1>", figure.read_text())[1]
    assert title in said and "explained variance" in said
    assert "script" not in out.read_text() and "updatemenu" not in out.read_text()


@pytest.mark.workflow
@drawn
def test_a_png_has_the_pixels_of_a_slide(figure, tmp_path):
    assert call(figure, "--out", tmp_path / "pareto.png").returncode == 0
    content = (tmp_path / "pareto.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1920, 1080)


@pytest.mark.workflow
@drawn
def test_a_report_prints_to_pdf(made_up, tmp_path):
    out = tmp_path / "report.pdf"
    assert call(made_up[0] / BASE / "report.html", "--out", out).returncode == 0
    content = out.read_bytes()
    assert content[:5] == b"%PDF-" and len(re.findall(rb"/Type\s*/Page\b", content)) > 2


def test_the_layout_has_title_and_room_and_loses_its_controls(figure):
    plot = slide.laid_out(figure.read_text())
    layout = plot["layout"]
    assert layout["title"]["text"] and layout["margin"]["t"] > slide.HEADING
    assert layout["font"]["size"] == slide.LETTERS and "updatemenus" not in layout
    assert plot["data"]


@pytest.mark.workflow
@pytest.mark.parametrize("source, out, said", [
    ("figures/pareto.html", "x.gif", "name a .svg or .png of a figure, or a .pdf of a page"),
    ("figures/none.html", "x.svg", "figures/none.html: does not exist; run snakemake"),
    ("report.html", "x.svg", "report.html: is not one figure"),
    ("claims.csv", "x.png", "claims.csv: is not one figure"),
    ("figures/pareto.html", "none/x.svg", "no Chromium found (nowhere); install it"),
])  # fmt: skip
def test_faults_are_one_sentence(made_up, tmp_path, source, out, said):
    done = call(made_up[0] / BASE / source, "--out", tmp_path / out, "--browser", "nowhere")
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / out).exists()


def test_a_browser_that_draws_nothing_is_told(figure, tmp_path):
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\nexit 0\n")
    mute.chmod(0o755)
    for out in ("x.svg", "x.pdf"):
        with pytest.raises(RetraceError, match=f"{mute}: (drew|printed) nothing"):
            slide.make(figure, tmp_path / out, str(mute))


def test_a_browser_that_hangs_is_told(figure, tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(slide, "PATIENCE", 1)
    with pytest.raises(RetraceError, match="no answer within 1 s"):
        slide.make(figure, tmp_path / "x.png", str(slow))
