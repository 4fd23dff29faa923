"""Fixtures shared by all tests: a tiny random model, text, tokens and activations.

All are made once a session by the pipeline's own stages, in seconds, without a network.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
HOOK = "blocks.0.hook_resid_post"


def environment() -> dict[str, str]:
    """Of a stage's process: our pipeline, and no commit, which might change between two runs."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GIT_DIR": "nowhere"}


def stage(name: str, spec: dict, cwd: Path = ROOT, check: bool = True, **paths):
    """Run `python -m pipeline.<name>` as snakemake does, in a process of its own.

    Args:
        spec: what --spec carries.
        check: fail the test where the stage fails.
        paths: options of the stage; None leaves one out, a list passes many values.

    Returns:
        The finished process, its stderr as text.
    """
    command = [sys.executable, "-m", f"pipeline.{name}", "--spec", json.dumps(spec)]
    for option, value in paths.items():
        values = value if isinstance(value, list) else [value]
        if value is not None:
            command += [f"--{option.replace('_', '-')}", *map(str, values)]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    if check and done.returncode:
        pytest.fail(f"stage {name} failed:\n{done.stderr}")
    return done


def rewrite(path: Path, to: Path | None = None, **changes) -> Path:
    """Write a JSON file with other values as its stage would have: its certificate fits."""
    from pipeline import tables

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
    folder = tmp_path_factory.mktemp("tiny_model")
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_json(tiny_model, tmp_path_factory) -> Path:
    """model.json of the store item that stage model makes of tiny_model."""
    out = tmp_path_factory.mktemp("model")
    spec = {"model": {"name": "tiny", "source": "folder", "path": str(tiny_model)}}
    stage("model", spec, out=out / "model.json", checkpoint=out / "checkpoint")
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
    file = tmp_path_factory.mktemp("text") / "stories.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


@pytest.fixture(scope="session")
def tiny_corpus(tiny_model_json, tiny_text, tmp_path_factory) -> Path:
    """tokens.parquet of tiny_text: n_ctx 16, 3,200 training and 640 held-out tokens."""
    out = tmp_path_factory.mktemp("corpus")
    spec = {
        "source": "local",
        "path": str(tiny_text),
        "title_field": "title",
        "label_field": "label",
        "n_ctx": 16,
        "n_tokens": 3200,
        "n_eval_tokens": 640,
    }
    stage(
        "corpus",
        {"corpus": spec},
        tokenizer=tiny_model_json,
        out=out / "tokens.parquet",
        documents=out / "documents.parquet",
    )
    return out / "tokens.parquet"


@pytest.fixture(scope="session")
def tiny_activations(tiny_model_json, tiny_corpus, tmp_path_factory) -> Path:
    """manifest.json of tiny_model's activations on tiny_corpus at two hooks, float32."""
    out = tmp_path_factory.mktemp("activations")
    spec = {
        "hooks": [HOOK, "blocks.1.hook_resid_post"],
        "dtype": "float32",
        "batch_size": 8,
        "shard_rows": 600,
    }
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
    return out / "manifest.json"


@pytest.fixture(scope="session")
def made_up(tmp_path_factory):
    """(working directory, paper): made-up tables with figures, pages and reports."""
    import synthetic

    root = tmp_path_factory.mktemp("made_up")
    return root, synthetic.paper(root)


@pytest.fixture(scope="session")
def draw():
    """(paper, figure's name, tables, options) -> figure and numbers, as the figure's job has them.

    A job is handed its options as JSON, whose keys are sorted.
    """
    from pipeline import figures, papers

    def drawn(paper, name: str, frames: dict, **options):
        spec = json.loads(papers.to_json(paper.spec.figures[name].model_dump(mode="json")))
        spec["options"] |= options
        given = {t: frames[t] for t in spec["tables"]}
        figure, numbers = figures.make(name, spec, given, paper.folder / "figures.py")
        assert figures.plain(figure)["data"] and len(numbers), name
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
