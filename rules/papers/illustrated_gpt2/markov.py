"""A Markov chain over tokens that has a loss on text that it has not seen.

1. Count what followed every context of up to `order` tokens of a text (Shannon 1948, Section 3).
2. Mix the orders as Witten and Bell do (1991, "The zero-frequency problem"): with c(h) occurrences
   of a context h and t(h) different tokens behind it,

       p(w | h) = (c(h w) + t(h) p(w | h without its first token)) / (c(h) + t(h)),

   and below the empty context all tokens are alike. The probabilities sum to 1 at every order.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np


class Chain:
    """Counts of a text.

    Args:
        tokens: ids, [n].
        order: tokens that are remembered, at most.
        d_vocab: different tokens that there are.
    """

    def __init__(self, tokens: Sequence[int], order: int, d_vocab: int) -> None:
        self.order, self.d_vocab = order, d_vocab
        ids = [int(t) for t in tokens]
        self.counts: dict[tuple[int, ...], Counter] = defaultdict(Counter)
        for length in range(order + 1):
            for i in range(length, len(ids)):
                self.counts[tuple(ids[i - length : i])][ids[i]] += 1

    def next(self, context: Sequence[int], order: int | None = None) -> np.ndarray:
        """Probabilities of the next token, [d_vocab].

        Args:
            context: ids, of which the last `order` count.
            order: at most that of the chain; default: all of it.
        """
        p = np.full(self.d_vocab, 1 / self.d_vocab)
        for counts in self._seen(context, order):
            total, kinds = counts.total(), len(counts)
            p *= kinds / (total + kinds)
            p[list(counts)] += np.array(list(counts.values())) / (total + kinds)
        return p

    def of(self, context: Sequence[int], token: int, order: int | None = None) -> float:
        """Probability of one token, as `next` has it."""
        p = 1 / self.d_vocab
        for counts in self._seen(context, order):
            total, kinds = counts.total(), len(counts)
            p = (counts[token] + kinds * p) / (total + kinds)
        return p

    def _seen(self, context: Sequence[int], order: int | None):
        """Counts behind the ends of a context that were seen, the shortest first."""
        longest = min(self.order if order is None else order, len(context))
        for length in range(longest + 1):
            end = tuple(int(t) for t in context[len(context) - length :])
            if end not in self.counts:
                return
            yield self.counts[end]

    def loss(self, blocks: np.ndarray, order: int) -> float:
        """Mean of -ln p over all tokens of blocks [n pos] but the first of each, nats a token."""
        total = 0.0
        for block in blocks.tolist():
            for i in range(1, len(block)):
                total -= np.log(self.of(block[max(0, i - order) : i], block[i], order))
        return total / (len(blocks) * (blocks.shape[1] - 1))


def drawn(p: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """A token of probabilities p [d_vocab], sharpened to p^(1/temperature); 0: the likeliest."""
    if not temperature:
        return int(p.argmax())
    logs = np.log(np.maximum(p, np.finfo(float).tiny)) / temperature
    weights = np.exp(logs - logs.max())
    return int(rng.choice(len(p), p=weights / weights.sum()))


def written(
    chain: Chain, start: Sequence[int], n: int, order: int, temperature: float, seed: int
) -> list[int]:
    """n tokens that the chain writes after some."""
    rng, ids = np.random.default_rng(seed), [int(t) for t in start]
    for _ in range(n):
        ids.append(drawn(chain.next(ids, order), temperature, rng))
    return ids[len(start) :]
