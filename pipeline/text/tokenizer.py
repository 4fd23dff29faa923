"""The text of a corpus -> a tokenizer, for models that are trained here.

1. `kind: char`: a token for every character of the text, sorted, and no special token, as in
   nanoGPT's data/shakespeare_char: tiny Shakespeare gives 65.
   `kind: bpe`: byte-level BPE as in GPT-2 (Radford et al. 2019, section 2.2): no text is unknown;
   <|endoftext|>, id 0, is BOS and EOS. Its merges are learned from the whole text, the held-out
   part included; the model trains on none of that part.
2. It is saved as a Hugging Face folder beside model.json, as a model's tokenizer is.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.spec.sources import CorpusSpec, TokenizerSpec
from pipeline.store import provenance, tables
from pipeline.text import sources

DOCUMENT_TOKEN = "<|endoftext|>"
OUTSIDE = "<a character that the text does not have>"


def char(texts: Iterable[str]) -> Any:
    """A token for every character of the texts, in the order of their code points."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters: set[str] = set()
    for document in texts:
        characters.update(document)
    # BPE without merges: several times faster than a pre-tokenizer that cuts at every character.
    vocabulary = {c: i for i, c in enumerate(sorted(characters))}
    # The name of a token that is not there makes other characters an error, not nothing.
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=OUTSIDE, cache_capacity=0))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """Byte-level BPE with at most vocab_size tokens: <|endoftext|>, 256 bytes, and merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=DOCUMENT_TOKEN,
        eos_token=DOCUMENT_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def make(texts: Sequence[str], spec: TokenizerSpec) -> Any:
    """The tokenizer of a section.

    Raises:
        RetraceError: it would not give back the text.
    """
    out = char(texts) if spec.kind == "char" else bpe(texts, spec.vocab_size)
    sample = texts[0][:10_000]
    if out.decode(out(sample, add_special_tokens=False)["input_ids"]) != sample:
        raise RetraceError(f"tokenizer: kind {spec.kind} does not give back the text it encodes")
    return out


def describe(tokenizer: Any, spec: TokenizerSpec) -> dict[str, Any]:
    """What later stages read of model.json to tokenise; bos_id is None where there is none."""
    return {
        "name": f"{spec.kind}{len(tokenizer)}",
        "kind": spec.kind,
        "bos_id": tokenizer.bos_token_id,
        "d_vocab": len(tokenizer),
    }


def main() -> None:
    parser = cli.parser(
        "tokenizer", __doc__, out="model.json", checkpoint="Hugging Face tokenizer folder"
    )

    def work(job: cli.Job) -> None:
        os.environ |= {"RAYON_NUM_THREADS": str(job.args.threads), "TOKENIZERS_PARALLELISM": "true"}
        spec, checkpoint = job.section("tokenizer", TokenizerSpec), Path(job.args.checkpoint)
        partial = checkpoint.with_name(checkpoint.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            found = sources.read(job.section("corpus", CorpusSpec), Path(f"{job.args.out}.partial"))
            tokenizer = make(found.texts, spec)
            tokenizer.save_pretrained(partial / "checkpoint")
            shutil.rmtree(checkpoint, ignore_errors=True)
            os.replace(partial / "checkpoint", checkpoint)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        names = sorted(p for p in checkpoint.iterdir() if p.is_file())
        files = {f"checkpoint/{p.name}": provenance.sha256_file(p) for p in names}
        made = job.certificate([], **found.certificate())
        info = describe(tokenizer, spec) | {"text_sha256": found.sha256, "files": files}
        tables.write_json(job.args.out, info, made)
        cli.log.info("%d tokens from %s", info["d_vocab"], found.name)

    cli.run("tokenizer", parser.parse_args(), work)
