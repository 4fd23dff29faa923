"""Fixtures shared by all tests: a tiny random model, text, tokens, activations and a finished run.

All are made once per session by the pipeline's own stages, in seconds, without a network. With two
workers (pytest-xdist) the first one that needs a fixture makes it for both, so no test may change
what it gets: copy it first. The tests of a file stay on one worker.
"""

import contextlib
import fcntl
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import remembered
import warm

# Without bytecode each worker compiles half a minute long what it collects, and each process of a
# test our modules. It lies in folders __pycache__, which git ignores.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As pipeline/weights/model.py does when a test imports it: warm.py compares environments.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Two workers have two cores: threads beside them spin while they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/proc/driver/nvidia/gpus").is_dir():
    # Read when triton is imported, which torch's other users do long before tests of kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")
gc.set_threshold(20_000, 20, 20)  # 700, 10, 10 cost an eighth of the tests that start no process
ROOT = Path(__file__).parent.parent
WARM = pytest.StashKey[tempfile.TemporaryDirectory]()
TORCH_ROOMS = (
    "families models activations weights tuning kernels sae imports latents crosscoders saebench "
    "circuits tracing probes"
).split()
HOOK = "blocks.0.hook_resid_post"
LONGEST = (  # files; they start first
    "test_smoke test_groups test_workflow test_tutorial test_browser test_kills test_saelens_evals "
    "test_training test_activations test_commands test_release test_model"
).split()

# Fixtures that start snakemake, or a stage or a training of seconds: file.fixture, or its name.
COSTLY = (
    "toy_run test_sae.made test_training.made test_crosscoders.two test_lenses.made "
    "test_lenses_jacobian.frames test_encoder.made"
).split()


# --- shapes --------------------------------------------------------------------------------


def checked_modules() -> list[str]:
    """Dotted names of the modules whose annotations are checked: those of the rooms with torch.

    Triton reads the source of its kernels, so that nothing may wrap them.
    """
    files = [f for room in TORCH_ROOMS for f in sorted((ROOT / "pipeline" / room).glob("*.py"))]
    return [f"pipeline.{f.parent.name}.{f.stem}" for f in files if f.parent.name != "kernels"]


# From here on, importing one of these modules wraps its functions and dataclasses: a call with a
# wrong type or shape, such as Float[Tensor, "batch pos d_model"], fails with an error that
# names the argument. It imports no torch. Stages in processes of their own are not checked.
# The tower: an int may stand where a float is asked for.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook(checked_modules(), CHECKER)
jaxtyping.jaxtyped = remembered.jaxtyped  # which the hook puts before each definition


# --- two workers ---------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """Processes of the tests are forked off one that has imported their libraries: warm.py."""
    if "RETRACE_PYTHON" not in os.environ:
        config.stash[WARM] = tempfile.TemporaryDirectory(prefix="retrace-")
        warm.begin(config.stash[WARM].name)


def pytest_unconfigure(config: pytest.Config) -> None:
    if WARM in config.stash:
        os.environ.pop("RETRACE_PYTHON", None)
        config.stash[WARM].cleanup()


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker is left with one of them at the end.

    Tests with a fixture of COSTLY are marked workflow, as those that do the same themselves.
    Tests marked slow are left out unless -m names them (an -m in addopts is undone by another).
    """
    if "slow" not in config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    for item in items:
        names = getattr(item, "fixturenames", ())
        if not {n for name in names for n in (name, f"{item.path.stem}.{name}")}.isdisjoint(COSTLY):
            item.add_marker("workflow")
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported and collected stays, so no search for garbage goes through it again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread, also after a test that asked for more."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@contextlib.contextmanager
def locked(file: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the system's lock on a file, which ends with its process."""
    with file.open("a") as held:
        fcntl.flock(held, how)
        yield


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker to ask for it makes, and that all workers read.

    Args:
        make: fills the empty folder that it is given.
    """
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name, base / f"{name}.done"
    with locked(base / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed to make it
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


# --- stages --------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Of a stage's process: our pipeline, and no commit, which might change between two runs."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GIT_DIR": "nowhere"}


def stage(name: str, spec: dict, cwd: Path = ROOT, check: bool = True, **paths):
    """Run `python -m pipeline <name>` as snakemake does, in a process of its own.

    Args:
        spec: what --spec carries.
        check: fail the test where the stage fails.
        paths: options of the stage; None leaves one out, a list passes many values. Where they
            name no threads there is one.

    Returns:
        The finished process, its stderr as text.
    """
    command = [warm.python(), "-m", "pipeline", name, "--spec", json.dumps(spec)]
    for option, value in ({"threads": 1} | paths).items():
        values = value if isinstance(value, list) else [value]
        if value is not None:
            command += [f"--{option.replace('_', '-')}", *map(str, values)]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    if check and done.returncode:
        pytest.fail(f"stage {name} failed:\n{done.stderr}")
    return done


def rewrite(path: Path, to: Path | None = None, **changes) -> Path:
    """Write a JSON file with other values as its stage would have: its certificate fits."""
    from pipeline.store import tables

    data = json.loads(path.read_text()) | changes
    made = data.pop("provenance", {"stage": "test"})
    tables.write_json(to or path, data, {k: v for k, v in made.items() if k != "content"})
    return to or path


def byte_tokenizer():
    """A byte-level tokenizer: id 0 is <|endoftext|>, ids 4 to 259 are the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unused|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Hugging Face folder: a random 2-layer LlamaForCausalLM (d_model 32) and a tokenizer."""
    return shared(tmp_path_factory, "tiny_model", save_tiny_model)


def save_tiny_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # large enough that layers change the stream visibly
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model_json(tiny_model, tmp_path_factory) -> Path:
    """model.json of the store item that stage model makes of tiny_model."""
    spec = {"model": {"name": "tiny", "source": "folder", "path": str(tiny_model)}}

    def make(out: Path) -> None:
        stage("model", spec, out=out / "model.json", checkpoint=out / "checkpoint")

    return shared(tmp_path_factory, "model", make) / "model.json"


@pytest.fixture(scope="session")
def tiny_gpt2_json(tmp_path_factory) -> Path:
    """model.json of a random 2-layer GPT-2 (d_model 16, 4 heads) for published dictionaries."""
    from published import tiny_gpt2
    from synthetic import call

    out = tmp_path_factory.mktemp("gpt2")
    section = {"name": "tiny", "source": "folder", "path": str(tiny_gpt2(out / "hf"))}
    call("model", {"model": section}, out=out / "model.json", checkpoint=out / "checkpoint")
    return out / "model.json"


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A .jsonl of 60 documents with fields text, title and label; one holds HTML."""
    words = "the cat sat on a mat and saw two dogs run over hills of red sand by the sea".split()
    records = [
        {
            "text": " ".join(words[(i * j + i + j) % len(words)] for j in range(20 + i % 7)) + ".",
            "title": f"Story {i}",
            "label": ["animals", "places", "colours"][i % 3],
        }
        for i in range(60)
    ]
    records[7]["text"] = "<script>alert('no')</script> <b>bold</b> & " + records[7]["text"]
    lines = "".join(json.dumps(r) + "\n" for r in records)
    folder = shared(tmp_path_factory, "text", lambda out: (out / "stories.jsonl").write_text(lines))
    return folder / "stories.jsonl"


@pytest.fixture(scope="session")
def tiny_corpus(tiny_model_json, tiny_text, tmp_path_factory) -> Path:
    """tokens.parquet of tiny_text: n_ctx 16, 3,200 training and 640 held-out tokens."""
    spec = {
        "source": "local",
        "path": str(tiny_text),
        "title_field": "title",
        "label_field": "label",
        "n_ctx": 16,
        "n_tokens": 3200,
        "n_eval_tokens": 640,
    }

    def make(out: Path) -> None:
        stage(
            "corpus",
            {"corpus": spec},
            tokenizer=tiny_model_json,
            out=out / "tokens.parquet",
            documents=out / "documents.parquet",
        )

    return shared(tmp_path_factory, "corpus", make) / "tokens.parquet"


@pytest.fixture(scope="session")
def tiny_activations(tiny_model_json, tiny_corpus, tmp_path_factory) -> Path:
    """manifest.json of tiny_model's activations on tiny_corpus at two hooks, float32."""
    spec = {
        "hooks": [HOOK, "blocks.1.hook_resid_post"],
        "dtype": "float32",
        "batch_size": 8,
        "shard_rows": 600,
    }

    def make(out: Path) -> None:
        stage(
            "activations",
            {"activations": spec},
            model=tiny_model_json,
            corpus=tiny_corpus,
            out=out / "manifest.json",
            shards=out / "shards",
            device="cpu",
            threads=1,
        )

    return shared(tmp_path_factory, "activations", make) / "manifest.json"


@pytest.fixture(scope="session")
def made_up(tmp_path_factory):
    """(working directory, paper): made-up tables with figures, pages and reports."""
    import synthetic

    root = tmp_path_factory.mktemp("made_up")
    return root, synthetic.paper(root)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory) -> tuple[Path, str]:
    """The toy project after a run from nothing, its archive included, and what that run printed."""
    from snake import snakemake, toy_project

    def make(folder: Path) -> None:
        project = toy_project(folder / "retrace")
        said = snakemake("all", "results/smoke/toy/release.zip", cwd=project).said
        (folder / "said.txt").write_text(said)

    folder = shared(tmp_path_factory, "toy_run", make)
    return folder / "retrace", (folder / "said.txt").read_text()


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Iterator[Path]:
    """A toy project without results: the working directory, and the code that is hashed."""
    from snake import forget_code, toy_project

    from pipeline.job import source

    project = toy_project(tmp_path / "retrace")
    monkeypatch.chdir(project)
    monkeypatch.setattr(source, "PIPELINE", project / "pipeline")
    forget_code(note=False)
    yield project
    forget_code(note=False)


@pytest.fixture(scope="session")
def draw():
    """(paper, figure's name, tables, options) -> figure and numbers, as the figure's job has them.

    A job is handed its options as JSON, whose keys are sorted.
    """
    from pipeline.figures import drawing
    from pipeline.papers import papers

    def drawn(paper, name: str, frames: dict, **options):
        spec = json.loads(papers.to_json(paper.spec.figures[name].model_dump(mode="json")))
        spec["options"] |= options
        given = {t: frames[t] for t in spec["tables"]}
        figure, numbers = drawing.make(name, spec, given, paper.folder / "figures.py")
        assert drawing.plain(figure)["data"] and len(numbers), name
        return figure, numbers

    return drawn


@pytest.fixture(scope="session")
def every_figure(draw):
    """(paper, tables): draw every figure but the verdicts, which need claims.csv."""

    def drawn(paper, frames: dict) -> None:
        for name, figure in paper.spec.figures.items():
            if figure.kind != "verdicts":
                draw(paper, name, frames)

    return drawn
