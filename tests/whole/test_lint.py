"""The linters pass: ruff, snakefmt, and snakemake --lint but for what ALLOWED names."""

import ast
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# What `snakemake --lint` says and this workflow does on purpose.
ALLOWED = {
    # One locked environment for all; no conda or container a rule (requirements.lock).
    r"Specify a conda environment or container for each rule\.",
    # PYTHON and DEVICE say where a job runs and not what it computes: as params they would rerun
    # every job when the checkout moves or a GPU comes.
    r"Shell command directly uses variable (PYTHON|DEVICE) from outside of the rule",
    # rules/common.smk sets it for the jobs; nobody has to set it before.
    r"Environment variable PYTHONPATH used but not asserted with envvars directive in line \d+\.",
}


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", [["check"], ["format", "--check", "--diff"]])
def test_ruff(command):
    done = run(str(BIN / "ruff"), *command, ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_text_file_is_utf8():
    """No file is read or written in the encoding of somebody's locale."""
    done = run(str(BIN / "ruff"), "check", "--preview", "--select", "PLW1514", "pipeline", "rules")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.workflow
def test_snakefmt():
    done = run(str(BIN / "snakefmt"), "--check", "Snakefile", "rules", "pipeline/papers/template")
    assert done.returncode == 0, done.stdout + done.stderr


# What snakemake puts into the namespace of its files.
GIVEN = (
    "ancient config directory expand input multiext report rules shell temp unpack workflow".split()
)


def compiled() -> str:
    """The Python that snakemake makes of its files, in the order in which they share names."""
    from snakemake.parser import parse
    from snakemake.sourcecache import infer_source_file

    read = lambda f: Path(f.get_path_or_uri(secret_free=False)).read_text("utf-8")  # noqa: E731
    cache = SimpleNamespace(open=lambda f: io.StringIO(read(f)))
    files = [ROOT / "rules" / "common.smk", ROOT / "Snakefile"]
    files += sorted({*(ROOT / "rules").glob("*.smk")} - {files[0]})
    files += sorted((ROOT / "rules" / "papers").glob("*/*.smk"))
    asked = SimpleNamespace(sourcecache=cache)
    code = [parse(infer_source_file(f), asked, {})[0] for f in files]
    return "\n".join(code)


def test_rules_as_python(tmp_path):
    """ruff on what snakemake makes of the rules: names defined twice or never, unused imports."""
    file = tmp_path / "rules.py"
    file.write_text(compiled(), encoding="utf-8")
    config = f"builtins = {json.dumps(GIVEN)}"
    done = run(
        str(BIN / "ruff"), "check", "--isolated", "--no-cache", "--config", config, "--select",
        "F,E7,E9,B006,B008,B023,PLW", "--ignore", "PLW2901", "--output-format", "concise", file,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_no_stage_that_is_run_as_a_script_has_a_package():
    """pipeline/job/own_stage.py runs them by their path, where `from . import` fails."""
    files = [f for f in (ROOT / "rules/papers").rglob("*.py") if '"__main__"' in f.read_text()]
    assert files
    assert not [f for f in files if re.search(r"^from \.", f.read_text(), re.M)]


def test_every_helper_of_the_rules_is_used_and_named_once():
    """A second definition would silently take the first one's place."""
    text = (ROOT / "rules" / "common.smk").read_text("utf-8")
    lines = re.findall(r"^(?:def )?([a-z]\w*(?:, \w+)*)(?:\(.*:| = .*)$", text, re.M)
    names = [name for line in lines for name in line.split(", ")]
    assert {"print_claims", "ask", "arms_of", "code_of"} <= set(names)
    assert sorted(set(names)) == sorted(names)
    everywhere = compiled()
    unused = [n for n in names if len(re.findall(rf"\b{n}\b", everywhere)) < 2]
    assert not unused


def defined(code: str) -> list[str]:
    """Names that a file binds at its top level by def, class, import or a plain assignment."""
    found, stack = [], list(reversed(ast.parse(code).body))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found += [a.asname or a.name.split(".")[0] for a in node.names]
        elif isinstance(node, ast.Assign):
            found += [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)
                      and isinstance(n.ctx, ast.Store)]  # fmt: skip
        elif isinstance(node, ast.If):  # one of its branches runs
            branches = ["\n".join(map(ast.unparse, b)) for b in (node.body, node.orelse)]
            found += sorted({n for b in branches for n in defined(b)})
        elif isinstance(node, ast.For | ast.With | ast.Try):
            stack += reversed(node.body)
    return [name for name in found if not name.startswith("__rule")]


def twice(code: str) -> list[str]:
    names = defined(code)
    return sorted({n for n in names if names.count(n) > 1})


def test_no_name_is_defined_twice_across_the_rules():
    """Included files share one namespace: a helper of a paper would replace that of all others.

    ruff's F811 sees only a second definition of what was not used in between.
    """
    assert twice(compiled()) == []
    assert {"arms_of", "RUN", "papers"} <= set(defined(compiled()))


@pytest.mark.parametrize(
    "code, said",
    [
        ("def a(): pass\na()\ndef a(): pass", ["a"]),
        ("import b\nfor x in b:\n    b = 1", ["b"]),
        ("from p import c as d\nd()\nc = 1", []),
        ("if x:\n    e = 1\nelse:\n    e = 2", []),
        ("if x:\n    e = 1\nelse:\n    e = 2\nf, (e, g) = y", ["e"]),
    ],
)
def test_a_second_definition_is_seen(code, said):
    assert twice(code) == said


def unexpected(said: str) -> list[str]:
    """Lints that ALLOWED does not name, each under the heading it stands under."""
    heading, found = "", []
    for line in said.splitlines():
        if line.startswith("Lints for "):
            heading = line
        lint = re.match(r"    \* (.*?):?$", line)
        if lint and not any(re.fullmatch(known, lint[1]) for known in ALLOWED):
            found.append(f"{heading} {lint[1]}")
    return found


@pytest.mark.workflow
def test_snakemakes_own_lints():
    done = run(warm.python(), "-m", "snakemake", "--lint")
    said = done.stdout + done.stderr
    assert "Lints for rule" in said, said  # it ran, and spoke of the rules
    assert unexpected(said) == []


def test_an_unexpected_lint_is_seen():
    said = "Lints for rule x (line 1, Snakefile):\n    * No log directive defined:\n      text"
    assert unexpected(said) == ["Lints for rule x (line 1, Snakefile): No log directive defined"]
