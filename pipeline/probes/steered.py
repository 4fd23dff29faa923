"""What a direction does that is added to the stream, or taken out of it. [torch]

    add      x + c * s * v      v of length 1, s the mean norm of the stream at the hook
    ablate   x - (x . v) v

at every position but the first ones, which activations leave out as well (attention sinks). The
stream is made once for some blocks, and only the layers above the hook run again for each edit.

Measured against the model as it is, on held-out blocks of two kinds, of the class that is meant and
of others: the loss on either, the log-probability of the tokens that are typical of the class, and
what a probe reads at a later layer (Turner et al. 2023 for the losses; Wu et al. 2025 for
comparing directions).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.models import hooks, places, splice
from pipeline.text.labels import Corpus

BATCH = 8  # blocks that run at a time
PRIOR = 0.01  # tokens of every id that a class is given before counting (Monroe et al. 2008)


@dataclass(frozen=True)
class Edit:
    """One way to change the stream at a hook.

    Attributes:
        mode: none, add or ablate.
        v: of length 1, [d].
        coefficient: mean norms of the stream that are added.
    """

    hook: str
    mode: str
    v: Tensor
    coefficient: float = 0.0

    def on(self, x: Tensor, norm: float, skip: int) -> Tensor:
        """The stream [batch pos d] as edited.

        Args:
            norm: mean norm of the stream at the hook.
            skip: positions at the front that stay as they are.
        """
        if self.mode == "none":
            return x
        change = self.coefficient * norm * self.v
        if self.mode == "ablate":
            change = -(places.full(x) @ self.v)[..., None] * self.v
        kept = torch.arange(x.shape[1], device=x.device)[None, :, None] >= skip
        return x + change * kept


@dataclass(frozen=True)
class Text:
    """Held-out blocks on which a class is steered.

    Attributes:
        tokens: [blocks pos].
        own, other: whether the next token is of a document of the class, of another with a label,
            bool [blocks pos - 1].
    """

    tokens: Tensor
    own: Tensor
    other: Tensor


def texts(
    corpus: Corpus, split: np.ndarray, name: str, column: str, n: int, seed: int, device: Any
) -> Text:
    """Held-out blocks of a class and of others, at most n of either.

    Args:
        split: of each block.
        column: label or title.

    Raises:
        RetraceError: none of either kind.
    """
    at = 1 if column == "label" else 0
    class_of = {d: about[at] for d, about in corpus.about.items()}
    of = np.array([[class_of.get(int(d), "") for d in row] for row in corpus.document], object)
    own, other = of == name, (of != name) & (of != "")
    share = own.mean(1)
    held = split == "eval"
    rng = np.random.default_rng([seed, 3])
    chosen = []
    for kind, fits in (("of", share > 0.5), ("without", share == 0)):
        found = np.flatnonzero(held & fits & (own | other).any(1))
        if not len(found):
            raise RetraceError(
                f"steering.classes: no held-out block is {kind} class '{name}'; raise "
                f"corpus.n_eval_tokens or name another class"
            )
        chosen.append(np.sort(rng.permutation(found)[:n]))
    blocks = np.concatenate(chosen)
    parts = corpus.tokens[blocks].astype(np.int64), own[blocks, 1:], other[blocks, 1:]
    return Text(*(torch.from_numpy(np.ascontiguousarray(p)).to(device) for p in parts))


def typical(
    corpus: Corpus, split: np.ndarray, name: str, column: str, n: int, least: int = 5
) -> np.ndarray:
    """Ids of the n tokens that are most typical of a class in the training text.

    By the z-score of the log odds against all other labelled text (Monroe et al. 2008).
    """
    at = 1 if column == "label" else 0
    train = corpus.document[split == "train"]
    tokens = corpus.tokens[split == "train"][train >= 0]
    owners, place = np.unique(train[train >= 0], return_inverse=True)
    of = np.array([corpus.about.get(int(d), ("", ""))[at] for d in owners], object)[place]
    size = int(corpus.tokens.max()) + 1
    own = np.bincount(tokens[of == name], minlength=size)
    other = np.bincount(tokens[(of != name) & (of != "")], minlength=size)
    a, b = own + PRIOR, other + PRIOR
    odds = np.log(a / (a.sum() - a)) - np.log(b / (b.sum() - b))
    z = np.where(own >= least, odds / np.sqrt(1 / a + 1 / b), -np.inf)
    order = np.argsort(-z, kind="stable")[:n]
    found = order[np.isfinite(z[order])]
    if not len(found):
        raise RetraceError(
            f"steering.classes: no token stands {least} times in training text of class '{name}'; "
            f"raise corpus.n_tokens or name another class"
        )
    return found


class Steered:
    """A model, the stream of some text at a hook, and what it says then.

    Args:
        norm, skip: as of `Edit.on`.
        words: ids of typical tokens.
        reading: (hook, direction [d]) of a probe that is read above, or None.
    """

    def __init__(
        self, hf: nn.Module, hook: str, text: Text, words: np.ndarray, norm: float, skip: int,
        reading: tuple[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.hf, self.hook, self.text, self.norm, self.skip = hf, hook, text, norm, skip
        self.words = torch.from_numpy(words).to(text.tokens.device)
        self.reading = reading
        self.streams = [splice.stream(hf, hook, part) for part in text.tokens.split(BATCH)]
        self.plain = self._measured(None)

    def effect(self, edit: Edit) -> dict[str, float]:
        """own_loss, other_loss, words and reading of an edit, each minus the model's own."""
        found = self._measured(edit)
        return {k: found[k] - self.plain[k] for k in found}

    def _measured(self, edit: Edit | None) -> dict[str, float]:
        sums = dict.fromkeys(("own_loss", "other_loss", "words", "reading"), 0.0)
        n_own, n_other = float(self.text.own.sum()), float(self.text.other.sum())
        parts = [self.text.tokens, self.text.own, self.text.other]
        batches = zip(*(p.split(BATCH) for p in parts), self.streams, strict=True)
        for tokens, own, other, x in batches:
            log_p, read = self._run(tokens, edit.on(x, self.norm, self.skip) if edit else x)
            nats = -log_p.gather(-1, tokens[:, 1:, None])[..., 0]
            sums["own_loss"] += float((nats * own).sum()) / n_own
            sums["other_loss"] += float((nats * other).sum()) / n_other
            likely = log_p[..., self.words].mean(-1)
            sums["words"] += float((likely * other).sum()) / n_other
            if read is not None:
                sums["reading"] += float((read[:, :-1] * other).sum()) / n_other
        if self.reading is None:
            sums["reading"] = float("nan")
        return sums

    def _run(self, tokens: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities [batch pos-1 d_vocab] of the next token; the reading [batch pos]."""
        if self.reading is None:
            logits, read = splice.resume(self.hf, self.hook, tokens, x), None
        else:
            hook, v = self.reading
            with hooks.capture(self.hf, [hook]) as seen:
                logits = splice.resume(self.hf, self.hook, tokens, x)
            read = places.full(seen[hook]) @ v
        return logits[:, :-1].float().log_softmax(-1), read


def edits(hook: str, v: Tensor, coefficients: list[float], ablate: bool) -> Iterator[Edit]:
    """Every edit with one direction."""
    for c in sorted(coefficients):
        yield Edit(hook, "add", v, c)
    if ablate:
        yield Edit(hook, "ablate", v)


def contrast(
    hf: nn.Module, hook: str, tokens: Tensor, answer: int, foil: int, norm: float, skip: int
) -> Callable[[Edit | None], float]:
    """A function from an edit to the logit of the answer minus that of the foil, of one prompt.

    Args:
        tokens: of the prompt, BOS included, [1 pos].
    """
    x = splice.stream(hf, hook, tokens)

    def difference(edit: Edit | None) -> float:
        at = edit.on(x, norm, skip) if edit else x
        logits = splice.resume(hf, hook, tokens, at, last=1)[0, -1].float()
        return float(logits[answer] - logits[foil])

    return difference


def continued(
    hf: nn.Module, prompt: list[int], steer: list[Edit], norm: float, skip: int, n_new: int
) -> list[list[int]]:
    """The likeliest next tokens under each edit, [edits n_new]; all edits are at one hook.

    The prompt runs once for all of them, with its keys and values kept; then a token at a time.
    """
    device = steer[0].v.device
    at = 0  # the position of the first token that a pass sees

    def edit(x: Tensor) -> Tensor:
        rows = [e.on(x[i : i + 1], norm, max(0, skip - at)) for i, e in enumerate(steer)]
        return torch.cat(rows)

    tokens = torch.tensor([prompt] * len(steer), device=device)
    with hooks.edited(hf, steer[0].hook, edit):
        found = hf(input_ids=tokens, use_cache=True)
        for _ in range(n_new - 1):
            new = found.logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, new], 1)
            kept = getattr(found, "past_key_values", None)
            at = 0 if kept is None else tokens.shape[1] - 1
            given = {"input_ids": tokens} if kept is None else {"input_ids": new}
            more = {} if kept is None else {"past_key_values": kept}
            found = hf(**given, **more, use_cache=True)
        last = found.logits[:, -1].argmax(-1, keepdim=True)
    return torch.cat([tokens, last], 1)[:, len(prompt) :].tolist()
