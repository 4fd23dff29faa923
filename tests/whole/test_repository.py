"""What the repository says of itself holds: README, the lock file, versions."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import pipeline
from pipeline.claims import verdicts
from pipeline.claims.summary import OTHERS, VERDICTS, read_claims, tally
from pipeline.papers import papers
from pipeline.spec.base import SCALES
from pipeline.store import tables

ROOT = Path(__file__).parents[2]
ROOMS = (
    "spec store job downloads text models families activations weights tuning kernels sae imports "
    "latents crosscoders saebench circuits tracing probes claims figures report papers sharing "
    "notebook"
).split()
README = (ROOT / "README.md").read_text()
RUNS = (ROOT / "results/reference/README.md").read_text()
PAGES = ("README.md", "CONTRIBUTING.md", "results/reference/README.md")
PAGES += ("rules/papers/TUTORIAL.md", "rules/papers/TUTORIAL_PROBES.md")
PUBLISHED = sorted(f.parent for f in (ROOT / "results/reference").glob("*/*/claims.csv"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if not line.startswith("#")
]


def blocks(language: str, page: str = "README.md") -> list[str]:
    """The code blocks of a page in a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    return [text for name, text in fenced if name == language]


@pytest.mark.parametrize("scale", SCALES)
def test_the_paper_in_contributing_is_valid(tmp_path, scale):
    (tmp_path / "gao").mkdir()
    (tmp_path / "gao/paper.yaml").write_text(blocks("yaml", "CONTRIBUTING.md")[0])
    paper = papers.load(tmp_path / "gao", scale)
    assert len(paper.spec.saes_of("trained")) == 3 and len(paper.spec.claims) == 1


def test_the_two_commands_of_the_readme():
    install, test = blocks("bash")[0].strip().splitlines()
    assert install.split(" && ") == [
        "python3.11 -m venv .venv",
        ".venv/bin/pip install -r requirements.lock",
        ".venv/bin/snakemake -c2",
    ]
    last = (ROOT / ".ci/run").read_text().strip().splitlines()[-1]
    assert last == test.replace(".venv/bin/python", '"$venv/bin/python"')


def test_the_tree_names_the_rooms_in_the_order_of_imports():
    tree = blocks("", "CONTRIBUTING.md")[0]
    assert (
        re.findall(r"^  (\w+)/", tree[tree.index("pipeline/") : tree.index("rules/")], re.M)
        == ROOMS
    )
    named = re.findall(r"^(?:(\w+)/|  (\w+)/)", tree, re.M)
    for top, below in named:
        assert not top or (ROOT / top).is_dir()
        assert not below or any((ROOT / p / below).is_dir() for p in ("pipeline", "rules"))


def test_files_that_scripts_and_findings_name_exist():
    scripts = [*ROOT.glob("tests/**/*.sh"), *ROOT.glob("findings/*.sh"), ROOT / ".ci/run"]
    file = re.compile(r"\b(?:tests|pipeline|rules)/[\w/]+\.(?:py|sh|yaml)")
    named = {(script.name, n) for script in scripts for n in file.findall(script.read_text())}
    assert len(named) > 15 and [n for n in named if not (ROOT / n[1]).is_file()] == []


def test_files_and_papers_that_the_readme_names_exist():
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    figure = re.search(r"results/laptop/(\w+)/figures/(\w+)\.html", README)
    assert figure[1] in config["papers"]
    card = papers.load_yaml(ROOT / "rules/papers" / figure[1] / "paper.yaml")
    assert figure[2] in card["figures"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_what_the_readme_shows_of_a_first_run_is_of_its_command():
    """At most ten lines of jobs, and every claim of the paper in the sentence below them."""
    command, printed = blocks("bash")[1].strip(), blocks("text")[0].strip().splitlines()
    assert command.startswith(".venv/bin/snakemake -c2 ")
    (name,) = re.search(r"papers=\[(\w+)\]", command).groups()
    paper = papers.load(ROOT / "rules/papers" / name, "smoke")
    assert printed[-1].startswith(f"{name}: no claim is judged at this scale; ")
    said = sum(map(int, re.findall(r"; (\d+) ", printed[-1])))
    assert said == sum(c.of == "paper" for c in paper.spec.claims)
    assert len(printed) <= 12 and max(map(len, printed)) <= 120


def test_the_readme_is_one_screen():
    assert len(README.splitlines()) <= 120


def test_the_lock_pins_every_dependency_and_nothing_of_one_machine():
    for pin in LOCK:
        assert re.fullmatch(r"==[^+*,]+", str(pin.specifier)) and not pin.url and not pin.marker
    pinned = {pin.name.lower().replace("_", "-"): pin for pin in LOCK}
    assert len(pinned) == len(LOCK)
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda"))]
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, wanted):
        version = str(pinned[requirement.name.lower()].specifier)[2:]
        assert requirement.specifier.contains(version), requirement


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == pipeline.__version__


def cell(path: str) -> str:
    """What the page of the published runs says of a table of claims."""
    count = tally(read_claims(ROOT / "results/reference" / path))
    rest = [f"{count[v]} {v}" for v in VERDICTS[1:] if count[v]]
    rest += [f"{OTHERS[w]} {count[w][0]} of {count[w][1]}" for w in OTHERS if count[w][1]]
    if count["second_hand"]:
        rest.append(f"{count['second_hand']} second-hand")
    return "; ".join([f"[{count['reproduced']} of {count['judged']}]({path})", *rest])


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda f: "-".join(f.parts[-2:]))
def test_readme_counts_verdicts_as_the_tables_do(folder):
    path = f"{folder.parent.name}/{folder.name}/claims.csv"
    said = cell(path)
    assert f"| {said} |" in RUNS, f"write into results/reference/README.md: {said}"
    short = said.split(";")[0].replace("](", "](results/reference/")
    assert f"| {short} |" in README, f"write into README's table: {short}"


def test_every_paper_is_among_the_published_or_the_unpublished():
    table, rest = README.split("\nWithout a published run: ")
    without = set(re.findall(r"\(`(\w+)`\)", rest.split("\n")[0]))
    published = {folder.parent.name for folder in PUBLISHED}
    assert set(re.findall(r"^\| \[.*?\(`(\w+)`\)", table, re.M)) == published
    every = {f.parent.name for f in (ROOT / "rules/papers").glob("*/paper.yaml")}
    assert without == every - published


def section(after: str) -> str:
    """The part of the page of the published runs between a line and the next heading."""
    return RUNS.split(f"{after}\n", 1)[1].split("\n## ", 1)[0]


def number(row: dict[str, str]) -> str:
    """The cell `ours` of an example: an order's expression, or a value beside the paper's."""
    if row["kind"] == "order":
        return f"`{row['ours']}`"
    sd = f" ± {float(row['sd']):.4g}" if row["sd"] else ""
    return f"{float(row['ours']):.4g}{sd} (paper: {float(row['paper_value']):.4g})"


def test_examples_of_claims_are_rows_of_the_published_tables():
    named, wrong = [], []
    for line in section("Some of them:").splitlines():
        cells = [c.strip() for c in line.strip("|").split(" | ")]
        label = re.fullmatch(r"\[(\w+)\]\((\w+)/(\w+)/claims\.csv\), (\w+)", cells[0])
        if label is None:
            assert cells[0] in ("", "paper, scale") or set(line) <= set("|- "), line
            continue
        assert label[1] == label[2] and label[3] == label[4], line
        named.append(label[2])
        table = read_claims(ROOT / "results/reference" / label[2] / label[3] / "claims.csv")
        row = next(r for r in table if r["text"] == cells[1])
        if (now := [number(row), row["verdict"]]) != cells[2:]:
            wrong.append(f"{cells[1]}: {now}")
    assert not wrong, "write into results/reference/README.md: " + "; ".join(wrong)
    assert len(set(named)) == len({folder.parent.name for folder in PUBLISHED})


def clock(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def machine(run: dict, paper: str) -> str:
    """What run.json's `device` and `remark` say of the machine, in the words of the table."""
    said = run["device"]
    gpu = re.search(r"[AH]\d00", said)
    name = f"{'two' if 'each with half' in said else 'one'} {gpu[0]}" if gpu else "2 cores, no GPU"
    sharers = re.search(r"(\w+) and (\w+) shared one", said)
    shared = "share" in run.get("remark", "") or (sharers and paper in sharers.groups())
    return name + (", shared with other papers" if shared else "")


def test_what_a_paper_costs_is_what_its_run_says():
    costs = section("## What it costs")
    for folder in PUBLISHED:
        run = tables.read_json(folder / "run.json")
        name, path = folder.parent.name, f"{folder.parent.name}/{folder.name}/run.json"
        if folder.name == "paper":
            time = f"{clock(run['total_seconds'])} of jobs ([run.json]({path}))"
            said = f"| {name} | {machine(run, name)} | {time} |"
            assert said in costs, f"write into results/reference/README.md: {said}"
            continue
        busy = re.search(r"(?:busy with|beside) other work", run["device"])
        minutes = round(run["total_seconds"] / 60)
        times = [f"{minutes} min"] if busy else [clock(run["wall_seconds"])]
        times += [clock(run["wall_seconds"])] if busy else []
        cells = re.findall(r"\[([^\]]*)\]\(" + path, RUNS)
        assert cells and all(c.partition(" on ")[0] in times for c in cells), (path, times)
        assert all(("busy" in c) == bool(busy) for c in cells), (path, cells)
        assert all(f"[{c}](results/reference/{path})" in README for c in cells)


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda f: "-".join(f.parts[-2:]))
def test_what_is_not_reproduced_is_discussed(folder):
    """In the card, and so in every report: what was tried, and what is thought to be the reason."""
    for row in read_claims(folder / "claims.csv"):
        if row["verdict"] in ("not reproduced", "undecided"):
            assert len(row["discussion"]) > 40, row["id"]


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda f: "-".join(f.parts[-2:]))
def test_published_verdicts_are_those_of_the_claims_and_rules_of_today(folder):
    """Judged again from the published metrics, every claim has the published row."""
    paper = papers.load(ROOT / "rules/papers" / folder.parent.name, folder.name)
    job = verdicts.for_the_job(paper)
    metrics = tables.read_json(folder / "metrics.json")["metrics"]
    judged = verdicts.judged(job, metrics)
    published = {r["id"]: r for r in read_claims(folder / "claims.csv")}
    assert published.keys() == {r["id"] for r in judged}
    for row in judged:
        for key in ("verdict", "why", "of", "null_arm", "budget", "discussion"):
            assert (row[key] or "") == published[row["id"]][key], (row["id"], key)
