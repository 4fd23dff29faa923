"""`python -m pipeline`: every command, what there is, and old spellings."""

import re
import subprocess
from pathlib import Path

import pytest
import warm

from pipeline.claims import scalars
from pipeline.errors import RetraceError
from pipeline.job import commands
from pipeline.papers import listing

ROOT = Path(__file__).parents[2]


def door(*args: str, module: str = "pipeline") -> subprocess.CompletedProcess:
    command = [warm.python(), "-m", module, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.workflow
def test_it_lists_every_command_with_a_sentence():
    done = door()
    assert done.returncode == 0
    for name in commands.MODULES:
        assert re.search(rf"^  {name} +\S.{{20,}}", done.stdout, re.M), name


@pytest.mark.workflow
@pytest.mark.parametrize(
    "args, said",
    [
        (["sea"], "error: no command 'sea'"),
        (["list", "metric"], "error: no list of 'metric' (did you mean 'metrics'?)"),
        (
            ["show", "delta_los"],
            "error: nothing is called 'delta_los' (did you mean 'delta_loss'?)",
        ),
        (["show"], "error: show what?"),
    ],
)
def test_what_it_does_not_know_is_one_sentence(args, said):
    done = door(*args)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(said)


@pytest.mark.workflow
@pytest.mark.parametrize("name", ["provenance", "scaffold", "compare", "lint_paper"])
def test_old_spellings_still_work(name):
    new, old = door(name, "--help"), door("--help", module=f"pipeline.{name}")
    assert old.returncode == 0 and old.stdout == new.stdout


def test_commands_are_modules_with_a_main_and_a_docstring():
    for name, module in commands.MODULES.items():
        file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        assert "\ndef main() -> None:" in file.read_text(), name
        assert len(commands.sentence(module)) > 20, name


@pytest.mark.parametrize("kind", listing.LISTS)
def test_every_list_has_entries_of_one_line(kind):
    lines = listing.answer("list", kind)
    assert len(lines) > 5
    assert all("\n" not in line and len(line) <= listing.WIDTH for line in lines)


def test_a_terminal_is_given_whole_texts():
    lines = listing.table({"short": "a word " * 30, "n" * 60: "text"}, columns=50)
    bare = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines]
    assert max(map(len, bare)) <= 50 and " ".join(bare).count("word") == 30
    assert "".join(bare).count("n") == 60 and lines != bare


def test_the_lists_are_those_of_the_code():
    assert set(listing.list_papers()) == {
        f.parent.name for f in ROOT.glob("rules/papers/*/paper.yaml")
    }
    assert {f"<arm>.<dictionary>.{m}" for m in scalars.SAE} <= set(listing.list_metrics())
    assert all(listing.list_methods().values()) and all(listing.list_kinds().values())


@pytest.mark.parametrize("name", ["delta_loss", "trained.topk_k32.delta_loss"])
def test_a_metric_is_shown_by_its_last_name_or_as_a_report_writes_it(name):
    assert any(scalars.SAE["delta_loss"] in text for text in listing.shown(name))


def test_a_hook_of_one_block_is_shown():
    (shown,) = listing.shown("blocks.11.mlp.hook_post")
    assert shown.startswith("blocks.N.mlp.hook_post (hooks)\n  the MLP's neurons")


def test_a_paper_is_shown_with_its_card_and_how_it_is_run():
    (shown,) = listing.shown("grokking")
    for said in ("(2023)", "https://", "snakemake -c2 --config papers=[grokking] scale=smoke"):
        assert said in shown


def test_a_type_of_model_is_shown_with_what_its_layout_is_called():
    assert listing.shown("gpt2") == ["gpt2 (models)\n  layout gpt-sw3"]


def test_a_name_that_nothing_has_is_refused():
    with pytest.raises(RetraceError, match="nothing is called 'zz'"):
        listing.shown("zz")
