"""Models and datasets of a hub, as a small hub on loopback serves them."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import stage
from loopback_hub import COMMIT, fetched, fetching, serving
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pipeline.downloads import hub
from pipeline.errors import RetraceError
from pipeline.papers import folders, lint
from pipeline.spec import aliases
from pipeline.spec.sources import CorpusSpec, ModelSpec
from pipeline.store import tables

TINY = f"model owner/tiny {COMMIT}"


@pytest.fixture
def served(tiny_model, tmp_path, monkeypatch):
    """A hub with the tiny model as owner/tiny and three shards of text as datasets/owner/text."""
    files = {p.name: p.read_bytes() for p in tiny_model.iterdir()}
    shards = {f"data/train-{i:05}-of-00003.jsonl": b'{"text": "%d"}\n' % i for i in range(3)}
    repos = {"owner/tiny": files, "datasets/owner/text": shards | {"data/test.jsonl": b"{}"}}
    with serving(repos, tmp_path / "hf", monkeypatch) as found:
        yield found


def gets(served, name: str) -> int:
    return sum(a.endswith(f"/{name}") for a in served.asked)


# --- the cache -----------------------------------------------------------------------------


@pytest.mark.workflow
def test_what_the_cache_holds_is_not_asked_for_again(served, tmp_path, monkeypatch):
    fetched(TINY, cwd=tmp_path)
    calls = served.calls
    assert f"snapshots/{COMMIT} mit" in fetched(TINY, cwd=tmp_path)[0]
    assert served.calls == calls  # not even for the names
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert f"snapshots/{COMMIT} mit" in fetched(TINY, cwd=tmp_path)[0]


@pytest.mark.workflow
def test_two_arms_at_once_download_once(served, tmp_path):
    served.slow = 0.3
    both = [fetching(TINY, cwd=tmp_path) for _ in range(2)]
    assert all(f"snapshots/{COMMIT}" in p.communicate()[0] for p in both)
    assert len(served.asked) == len(set(served.asked))


@pytest.mark.workflow
def test_a_connection_that_is_cut_goes_on_where_it_was(served, tmp_path):
    """Of a file of 13 MiB, cut at 12: the rest alone is sent, and the file is whole."""
    whole = b"".join(i.to_bytes(4, "big") for i in range(13 << 18))
    served.repos["datasets/owner/text"]["large.txt"] = whole
    served.cut = {"large.txt": 12 << 20}
    (said,) = fetched(f"dataset owner/text {COMMIT} large.txt", cwd=tmp_path)
    assert (Path(said.split()[0]) / "large.txt").read_bytes() == whole
    assert served.ranges == [f"bytes={12 << 20}-"]
    assert not list(tmp_path.rglob("*.retrace*"))


@pytest.mark.workflow
def test_a_download_that_was_killed_is_not_taken_for_whole(served, tmp_path, monkeypatch):
    """One shard of three is there: online the rest comes, offline the sentence says so."""
    pattern = f"dataset owner/text {COMMIT} data/train-*.jsonl"
    served.cut = {"data/train-00001-of-00003.jsonl": -1, "data/train-00002-of-00003.jsonl": -1}
    (said,) = fetched(pattern, cwd=tmp_path)
    assert "the hub answers 410" in said
    served.cut = {}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (said,) = fetched(pattern, cwd=tmp_path)
    assert re.search("HF_HUB_OFFLINE is set, .* does not hold all .*repo-type dataset", said), said
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    names = [f"data/train-{i:05}-of-00003.jsonl" for i in range(3)]
    assert fetched(pattern, cwd=tmp_path)[0].split()[2:] == names
    assert gets(served, names[0]) == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetched(pattern, cwd=tmp_path)[0].split()[2:] == names


@pytest.mark.parametrize(
    "pattern, there, gone",
    [
        ("a-*.parquet", [0, 1, 2], ""),
        ("a-*.parquet", [0, 2], "a-00001-of-00003.parquet"),
        ("a-0000[02]-*.parquet", [0, 2], ""),
        ("a-00001-of-00003.parquet", [1], ""),
    ],
)
def test_numbered_shards_tell_which_of_them_lacks(pattern, there, gone):
    names = [f"a-{i:05}-of-00003.parquet" for i in there] + ["b-00000-of-00009.parquet"]
    choose = hub.matching([pattern])
    if gone:
        with pytest.raises(RetraceError, match=f"the shard {gone} is not there"):
            choose(names, None)
    else:
        assert choose(names, None) == names[:-1]


@pytest.mark.workflow
def test_what_another_program_downloaded_serves_offline(served, tmp_path, monkeypatch):
    """A cache without our list of names, as `hf download` leaves it on a cluster's login node."""
    fetched(TINY, cwd=tmp_path)
    for left in (tmp_path / "hf").rglob("retrace"):
        for file in left.iterdir():
            file.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"snapshots/{COMMIT} " in fetched(TINY, cwd=tmp_path)[0]


@pytest.mark.workflow
def test_a_cache_that_cannot_be_written(served, tmp_path, monkeypatch):
    if os.getuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "hf").mkdir(mode=0o500)
    assert fetched(TINY, cwd=tmp_path)[0].startswith("x ")


@pytest.mark.workflow
def test_weights_in_shards(served, tiny_model, tmp_path):
    """An index and its shards; the same weights in other files are left where they are."""
    files = served.repos["owner/tiny"]
    names = sorted(weights := load_file(tiny_model / "model.safetensors"))
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, tensors in parts.items():
        save_file({n: weights[n] for n in tensors}, tmp_path / file, metadata={"format": "pt"})
        files[file] = (tmp_path / file).read_bytes()
    index = {"metadata": {}, "weight_map": {n: f for f, some in parts.items() for n in some}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    files |= dict.fromkeys(["model.fp16.safetensors", "tf_model.h5", "onnx/model.onnx"], b"no")
    del files["model.safetensors"]
    out = tmp_path / "item"
    spec = {"repo": "owner/tiny", "revision": COMMIT}
    stage("model", {"model": spec}, out=out / "model.json", checkpoint=out / "checkpoint")
    got = load_file(out / "checkpoint" / "model.safetensors")
    assert all(torch.equal(got[n], weights[n]) for n in names)
    large = [a.split("/")[-1] for a in served.asked if "safetensors" in a or "onnx" in a]
    assert sorted(large) == sorted([*parts, "model.safetensors.index.json"])


# --- who may read --------------------------------------------------------------------------


@pytest.mark.workflow
def test_each_refusal_has_a_sentence_of_its_own(served, tmp_path, monkeypatch):
    tiny = served.repos["owner/tiny"]
    served.repos |= {"owner/gated": tiny, "owner/private": tiny}
    served.gated, served.private = {"owner/gated": {"mine"}}, {"owner/private": {"mine"}}
    served.users = {"mine", "another"}
    asked = [f"model owner/{n} {COMMIT}" for n in ("gated", "private", "missing")]
    asked += [f"model owner/tiny {'d' * 40}", f"dataset owner/text {COMMIT} data/tra-*.jsonl"]
    login, name = "`hf auth login`", "correct its name"
    said = {
        "": [f"gated; accept its terms on its page, then {login}",
             f"answers 401: there is no such repository, or it is private; {name}.*{login}",
             f"answers 401: there is no such repository, or it is private; {name}.*{login}",
             "the repository is there, but not its commit dddd",
             r"no such file at this commit: 'data/tra-\*.jsonl'.*it holds data/test.jsonl, data/"],
        "another": ["gated, and the account of your token may not read it; accept its terms",
                    f"no such model that your token may read; {name}.*{login} with a token",
                    f"no such model that your token may read; {name}.*{login} with a token",
                    "not its commit dddd", "no such file"],
        "expired": [r"does not accept your token \(Invalid credentials.*unset HF_TOKEN"] * 4,
    }  # fmt: skip
    wanted = [w for t, some in said.items() for w in (f"HF_TOKEN={t}", *asked[: len(some)])]
    patterns = [pattern for some in said.values() for pattern in some]
    for pattern, sentence in zip(patterns, fetched(*wanted, cwd=tmp_path), strict=True):
        assert re.search(f"^hub (model|dataset) owner/.*: .*{pattern}", sentence), sentence
    assert not [a for a in served.asked if a.endswith((".safetensors", ".jsonl"))]
    monkeypatch.setenv("HF_TOKEN", "mine")
    for line in fetched(*asked[:2], cwd=tmp_path):
        assert f"snapshots/{COMMIT} mit" in line
    assert served.tokens == {"mine", "another", "expired"}


@pytest.mark.workflow
def test_no_network_is_told_within_seconds(served, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (said,) = fetched(TINY, cwd=tmp_path)
    assert re.search("cannot be downloaded: no hub answers .*source: package", said), said


# --- names and commits ---------------------------------------------------------------------


def test_the_names_are_transformer_lenss_own():
    assert aliases.known() == aliases.of_transformer_lens()


@pytest.mark.parametrize(
    "name, repo",
    [
        ("pythia-70m", "EleutherAI/pythia-70m"),
        ("gpt2-small", "gpt2"),
        ("gpt2", "gpt2"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("tiny-stories-33M", "roneneldan/TinyStories-33M"),
    ],
)
def test_a_name_or_a_repository_both_work(name, repo):
    spec = ModelSpec(repo=name)
    assert (spec.source, spec.repo) == ("hub", repo)
    assert ModelSpec(**spec.model_dump()) == spec


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"repo": "pythia-70"}, "no model that TransformerLens knows.*mean 'pythia-70m'.*owner/"),
        ({"repo": "a b/c"}, "'a b/c' is not owner/name"),
        ({"repo": "a/../b"}, "not owner/name"),
        ({"repo": "https://huggingface.co/a/b"}, "not owner/name"),
        ({"repo": "a/b", "revision": "step3000"}, "'step3000' is not a full commit.*prints the"),
    ],
)
def test_names_that_are_none(fields, says):
    with pytest.raises(ValidationError, match=says):
        ModelSpec(**fields)
    with pytest.raises(ValidationError, match="needs repo: owner/name of a dataset, and file: its"):
        CorpusSpec(repo="owner/text")


@pytest.mark.workflow
def test_without_a_revision_the_commit_is_printed_and_certified(served, tmp_path, monkeypatch):
    """TransformerLens's name, and no revision: the certificate and model.json have the commit."""
    served.repos["EleutherAI/pythia-70m"] = served.repos["owner/tiny"]
    out = tmp_path / "item"
    files = {"out": out / "model.json", "checkpoint": out / "checkpoint"}
    done = stage("model", {"model": {"repo": "pythia-70m"}}, **files)
    assert re.search(f"model EleutherAI/pythia-70m: no revision.*`revision: {COMMIT}`", done.stdout)
    found = tables.read_json(out / "model.json")
    assert found["source"]["revision"] == found["provenance"]["source"]["revision"] == COMMIT
    # a second arm finds the cache; without a network nobody knows which commit is the newest
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = stage("model", {"model": {"repo": "pythia-70m"}}, check=False, **files)
    assert f"no revision is pinned, and the hub's cache has commit {COMMIT};" in done.stderr


def test_arms_of_a_hub_are_left_out_whether_the_source_is_said_or_not(tmp_path):
    raw = {"arms": {"a": {"repo": "pythia-70m"}, "b": {"source": "hub"}, "c": {"source": "folder"}}}
    assert list(folders._without_hub(raw)["arms"]) == ["c"]


def test_a_referee_is_told_of_a_revision_that_is_left_out(tmp_path):
    paper = tmp_path / "mine"
    paper.mkdir()
    card = "title: t\nauthors: a\nyear: 2024\nurl: https://x\n"
    (paper / "paper.yaml").write_text(card + "model: {repo: pythia-70m}\n")
    (fault,) = [f for f in lint.lint(paper) if "revision" in f]
    assert "model EleutherAI/pythia-70m: no revision is pinned" in fault
    (paper / "paper.yaml").write_text(card + f"model: {{repo: pythia-70m, revision: {COMMIT}}}\n")
    assert not [f for f in lint.lint(paper) if "revision" in f]
