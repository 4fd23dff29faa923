"""A circuit judged by mean ablation, where F is the number of heads that are kept."""

import numpy as np
import pytest
import torch

from pipeline.circuits import judged
from pipeline.circuits.knockout import Knockout

WHOLE = frozenset((i, h, "") for i in range(2) for h in range(3))


class Counted(Knockout):
    """F of a circuit is how many heads it keeps; each circuit that is run is noted."""

    class heads:
        n_heads = 3

    def __init__(self) -> None:
        self.ran: list = []

    def whole(self):
        return WHOLE

    def metric(self, circuits, on_progress=lambda _: None):
        self.ran += circuits
        return torch.tensor([[float(len(kept - gone))] for kept, gone in circuits])


def test_a_random_circuit_has_the_layers_and_positions_and_no_head_of_the_circuit():
    circuit = frozenset({(0, 1, "END"), (0, 2, "END"), (1, 0, "S2")})
    drawn = judged.random_circuit(circuit, 6, np.random.default_rng(0))
    assert len(drawn) == 3 and not drawn & circuit
    assert sorted((i, p) for i, _, p in drawn) == sorted((i, p) for i, _, p in circuit)
    full = frozenset((0, h, "END") for h in range(3))
    assert judged.random_circuit(full, 3, np.random.default_rng(0)) == frozenset()


def test_cases_are_the_circuits_whole_and_each_without_every_set():
    parts = {"one": frozenset({(0, 0, "")}), "two": frozenset({(1, 1, "")}), "none": frozenset()}
    small, knockout = frozenset({(0, 0, "")}), Counted()
    cases = judged.cases(parts, {"small": small}, knockout, 1, np.random.default_rng(0))
    named = [(c.circuit, c.removed) for c in cases]
    whole = ["model", "circuit", "small"]
    assert named[:5] == [(c, "nothing") for c in (*whole, "no head", "random 0")]
    assert named[5:] == [(c, k) for k in ("one", "two", "random set 0") for c in whole]
    f = dict(zip(named, judged.measure(cases, knockout), strict=True))
    assert (
        f["model", "nothing"] == 6 and f["circuit", "nothing"] == 2 and f["no head", "nothing"] == 0
    )
    assert f["model", "one"] == 5 and f["circuit", "one"] == 1 and f["small", "one"] == 0
    assert f["small", "two"] == 1
    assert len(knockout.ran) == len(set(knockout.ran)) < len(cases)  # none is run twice


def test_the_search_takes_the_head_that_widens_the_gap_and_ends_with_the_circuit():
    class Lonely(Counted):
        """A part without head 0.0 is worth nothing, and the whole does not mind."""

        def metric(self, circuits, on_progress=lambda _: None):
            lost = [kept != WHOLE and (0, 0, "") not in kept - gone for kept, gone in circuits]
            return torch.tensor([[0.0 if no else float(len(k - g))]
                                 for no, (k, g) in zip(lost, circuits, strict=True)])  # fmt: skip

    circuit = frozenset({(0, 0, ""), (0, 1, ""), (1, 2, "")})
    found = judged.greedy(circuit, Lonely(), 9, 9, np.random.default_rng(0))
    assert [len(gone) for gone, *_ in found] == [1, 2, 3]
    (first, m, c), *_ = found
    assert first == {(0, 0, "")} and m - c == pytest.approx(5)


def test_the_search_takes_the_widest_gap_whichever_side_is_above():
    class Rising(Counted):
        """Without head 0.1 the circuit is worth nine more, the model one less."""

        def metric(self, circuits, on_progress=lambda _: None):
            more = [9.0 * (kept != WHOLE and (0, 1, "") in gone) for kept, gone in circuits]
            return super().metric(circuits) + torch.tensor(more)[:, None]

    circuit = frozenset({(0, 0, ""), (0, 1, ""), (1, 2, "")})
    ((first, m, c),) = judged.greedy(circuit, Rising(), 1, 9, np.random.default_rng(0))
    assert first == {(0, 1, "")} and (m, c) == (5, 11)
