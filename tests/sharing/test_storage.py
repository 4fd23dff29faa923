"""Results in an object storage: a local S3 server, through Snakemake's storage plugin.

Skipped where snakemake-storage-plugin-s3, moto[s3] and flask-cors are missing. No lock file holds
them: with boto3 they take 100 MB, and botocore wants a python-dateutil below 3.
"""

import importlib.util
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from snake import ROOT, Done, snakemake, toy_project

from pipeline.sharing import verify

NEEDED = ("snakemake_storage_plugin_s3", "moto", "flask_cors")
pytestmark = [
    pytest.mark.workflow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, NEEDED)),
        reason="needs snakemake-storage-plugin-s3, moto[s3] and flask-cors",
    ),
]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket of a local S3 server, as boto3 has it; snakemake finds it in the environment."""
    import boto3

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    settings = {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "ACCESS_KEY": "x", "SECRET_KEY": "x"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(f"SNAKEMAKE_STORAGE_S3_{key}", value)
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        s3 = boto3.resource(
            "s3", endpoint_url=settings["ENDPOINT_URL"], region_name="us-east-1",
            aws_access_key_id="x", aws_secret_access_key="x",
        )  # fmt: skip
        yield s3.create_bucket(Bucket="bucket")
    server.terminate()
    server.wait()


def stored(prefix: str, cwd: Path, *args: str, **config) -> Done:
    """Snakemake with its results in the bucket."""
    where = ["--default-storage-provider=s3", f"--default-storage-prefix=s3://bucket/{prefix}"]
    return snakemake(*where, *args, cwd=cwd, timeout=3000, **config)


def download(bucket, prefix: str, to: Path) -> Path:
    """All that lies in the bucket below a prefix."""
    for item in bucket.objects.filter(Prefix=f"{prefix}/"):
        file = to / item.key.removeprefix(f"{prefix}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        item.Object().download_file(str(file))
    return to


def same_but_reports(ours: Path, theirs: Path) -> list[str]:
    """Names of the results, which are alike byte for byte, but for costs.html."""
    names = [
        str(f.relative_to(theirs))
        for f in sorted(theirs.glob("results/s*/**/*"))
        if f.is_file() and f.name != "costs.html" and not {".digests", ".owner"} & set(f.parts)
    ]
    differ = [n for n in names if (ours / n).read_bytes() != (theirs / n).read_bytes()]
    assert differ == []
    return names


def test_a_paper_in_a_storage_is_the_paper_on_a_disk(bucket, tmp_path):
    project = toy_project(tmp_path / "project")
    done = stored("toy", project)
    assert "results: s3://bucket/toy/results/smoke" in done.said
    assert not (project / "results/smoke").exists()
    assert "Nothing to be done" in stored("toy", project).said
    download(bucket, "toy", project)
    assert verify.faults(project / "results/smoke", project) == []
    (project / "results").rename(tmp_path / "results")
    snakemake(cwd=project)
    assert "results/smoke/toy/claims.csv" in same_but_reports(tmp_path, project)


def test_a_changed_setting_reruns_what_it_changes(bucket, tmp_path):
    project = toy_project(tmp_path / "project")
    stored("changed", project)
    card = project / "rules/papers/toy/paper.yaml"
    card.write_text(card.read_text().replace("\ntitle: ", "\ntitle: Another ", 1))
    assert set(stored("changed", project).jobs) <= {"report_html", "index", "all"}


@pytest.mark.slow
def test_the_store_lies_in_the_storage(bucket, tmp_path):
    """A paper with a model, a corpus, activations and dictionaries: minutes."""
    where = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    stored("topk", ROOT, *where, scale="smoke", papers="[topk_saes]")
    ours = download(bucket, "topk", tmp_path / "ours")
    assert {p.name for p in (ours / "results/store").iterdir()} >= {"model", "corpus", "sae"}
    for part in ("smoke", "store"):
        assert verify.faults(ours / "results" / part, ours) == []
    report = (ours / "results/smoke/topk_saes/report.html").read_text()
    assert "CC BY-SA 4.0" in report and "not on this machine" not in report
