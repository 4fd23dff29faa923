"""A release as an RO-Crate: its provenance in the standard that archives and registries read.

    python -m pipeline crate results/laptop/topk_saes/release.zip --out topk_saes.crate.zip

RO-Crate (Soiland-Reyes et al. 2022) with the profile Process Run Crate 0.5 (Leo et al. 2024): every
job that a certificate tells of is a CreateAction, with the stage's code as its instrument, the
files that it read as its objects and those that it wrote as its results. Weights and activations
stay behind; they are named with their sha256. Needs the extra `crate` of pyproject.toml.
"""

import argparse
import datetime
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.errors import RetraceError, command
from pipeline.sharing.published import certificate, unpack
from pipeline.spec.yaml_files import load_yaml
from pipeline.store import provenance, tables

PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
CONTEXT = "https://w3id.org/ro/terms/workflow-run/context"  # defines sha256
TYPES = {
    ".html": "text/html",
    ".json": "application/json",
    ".csv": "text/csv",
    ".parquet": "application/vnd.apache.parquet",
    ".yaml": "application/yaml",
    ".py": "text/x-python",
    ".md": "text/markdown",
}


def jobs(certificates: dict[str, dict]) -> list[dict[str, Any]]:
    """The jobs behind some files: stage, spec, code, git, device, inputs, and what each wrote.

    Args:
        certificates: file -> certificate.
    """
    found: dict[str, dict] = {}
    for file, made in certificates.items():
        same = {k: made[k] for k in ("stage", "spec", "code", "git", "device", "inputs")}
        found.setdefault(provenance.canonical(same), {**same, "outputs": []})["outputs"].append(
            file
        )
    return list(found.values())


def build(root: Path, date: str) -> Any:
    """The crate of a release that was unpacked in `root`.

    Raises:
        RetraceError: rocrate is not installed, or the folder is no release.
    """
    try:
        from rocrate.model.contextentity import ContextEntity
        from rocrate.rocrate import ROCrate
    except ImportError:
        raise RetraceError("no package rocrate here; pip install 'rocrate>=0.16'") from None

    about = next(iter(root.glob("results/*/*/release.json")), None)
    if about is None:
        raise RetraceError(
            "the archive holds no release.json; name the release.zip that snakemake made"
        )
    told = tables.read_json(about)
    if any(not re.fullmatch(r"\w+", str(told.get(k))) for k in ("paper", "scale")):
        raise RetraceError(f"{about}: names no paper and scale; make the release again")
    file = root / "rules/papers" / told["paper"] / "paper.yaml"
    card = load_yaml(file)
    if wrong := [k for k in ("title", "url", "authors") if not isinstance(card.get(k), str)]:
        raise RetraceError(f"{file}: has no {wrong[0]}; make the release again")
    crate = ROCrate()
    crate.metadata.extra_contexts.append(CONTEXT)

    def entity(id: str, kind: str, **properties: Any) -> Any:
        return crate.add(ContextEntity(crate, id, properties={"@type": kind, **properties}))

    crate.name = f"{card['title']}: a replication at scale {told['scale']}"
    crate.description = str(card.get("summary") or "").strip() or card["title"]
    crate.datePublished = datetime.date.fromisoformat(date)
    paper = entity(card["url"], "ScholarlyArticle", name=card["title"], author=card["authors"])
    crate.root_dataset["isBasedOn"] = paper
    crate.root_dataset["conformsTo"] = entity(PROFILE, "CreativeWork", name="Process Run Crate")
    files, certificates = {}, {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = str(path.relative_to(root))
        facts = {"name": path.name, "sha256": provenance.sha256_file(path)}
        facts |= {"encodingFormat": TYPES[path.suffix]} if path.suffix in TYPES else {}
        files[name] = crate.add_file(path, name, properties=facts)
        if not name.endswith((".csv.json", "release.json")) and (made := certificate(path)):
            certificates[name] = made

    def read(name: str, sha256: str) -> Any:
        """The entity of an input; of one that is not in the crate, its name and digest."""
        if name not in files:
            files[name] = entity(f"#{name}", "CreativeWork", name=name, sha256=sha256)
        return files[name]

    for n, job in enumerate(jobs(certificates)):
        commit = job["git"]["commit"] + ("+" if job["git"]["dirty"] else "")
        stage = entity(
            f"#{job['stage']}-{job['code'][:12]}",
            "SoftwareApplication",
            name=f"pipeline {job['stage']}",
            softwareVersion=f"code {job['code']}, commit {commit}",
        )
        entity(
            f"#job-{n}",
            "CreateAction",
            name=f"stage {job['stage']}" + (f" on {job['device']}" if job["device"] else ""),
            description=provenance.canonical(job["spec"]),
            actionStatus="http://schema.org/CompletedActionStatus",
            instrument=stage,
            object=[read(name, sha) for name, sha in job["inputs"].items()],
            result=[files[name] for name in job["outputs"]],
        )
    actions = [e for e in crate.contextual_entities if e.type == "CreateAction"]
    crate.root_dataset["mentions"] = actions
    return crate


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline crate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("release", type=Path, help="release.zip of a paper")
    parser.add_argument("--out", type=Path, required=True, help="the crate, .zip")
    parser.add_argument(
        "--date", default=str(datetime.date.today()), help="of publication; default: today"
    )
    args = parser.parse_args()
    try:
        datetime.date.fromisoformat(args.date)
    except ValueError:
        sys.exit(f"error: --date {args.date}: is no date; write it as 2024-06-30")
    with command("crate"):
        with tempfile.TemporaryDirectory() as folder:
            unpack(args.release, Path(folder))
            crate = build(Path(folder), args.date)
            tables.atomically(args.out, lambda to: _write(crate, to))
        print(args.out.resolve())


def _write(crate: Any, to: Path) -> None:
    """Write a crate's zip under any name; rocrate would append .zip to it."""
    with open(to, "wb") as f:
        f.writelines(crate.stream_zip())
