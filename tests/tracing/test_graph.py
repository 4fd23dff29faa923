"""Attribution graphs: finite differences, balance, selection, memory, pruning and scores."""

from dataclasses import replace

import drawn
import pytest
import torch

from pipeline.errors import RetraceError
from pipeline.tracing import graph, influence
from pipeline.tracing.graph import Tracer, top_logits, trace

CASES = [
    ("llama", "each", "mlp.hook_in", 0),
    ("llama", "cross", "hook_resid_mid", 1),
    ("gpt2", "skip", "ln2.hook_normalized", 2),
    ("gemma2", "cross", "mlp.hook_in", 0),
    ("gpt_neox", "skip", "mlp.hook_in", 0),
]


def made(kind="llama", sort="each", reads="mlp.hook_in", skip_first=0, **options):
    found = drawn.replacement(kind, sort, reads=reads, skip_first=skip_first)
    logits = top_logits(found, 0.0, 10, 0.95)
    return found, trace(found, logits, batch_size=13, **options)


def forward(found, sizes, errors, embed):
    """What every target reads, in the linearised model, for a batch of sizes of sources.

    Features, errors and embeddings are written with these sizes whatever is read; a skip is linear.

    Args:
        sizes: [batch features]; errors: [batch layers pos]; embed: [batch pos].
    """
    d, features = found.dictionaries, found.features
    written = torch.stack(found.fixed) + errors[..., None] * torch.stack(found.errors)
    for i in range(len(features)):
        layer, at = int(features.layer[i]), int(features.position[i])
        for out in range(d.W_dec[layer].shape[1]):
            row = d.W_dec[layer][features.number[i], out] * features.activation[i]
            written[:, layer + out, at] += sizes[:, i, None] * row
    linear = found.linear

    def writes(layer, x):
        if d.W_skip is None:
            return written[:, layer]
        return written[:, layer] + (x @ d.W_skip[layer].T) * d.known(x.shape[-2])

    reads, last = linear.forward(writes, linear.embed * embed[..., None])
    values = [
        reads[layer][:, at] @ d.W_enc[layer][number] + d.b_enc[layer][number]
        for layer, at, number in zip(*(x.tolist() for x in features[:3]), strict=True)
    ]
    return torch.stack(values, 1), linear.unembedded(last)[:, -1]


def doubled(found):
    """The same replacement model in float64, so that differences are exact."""

    def up(x):
        if isinstance(x, torch.Tensor):
            return x.double() if x.is_floating_point() else x
        if isinstance(x, list | tuple) and not hasattr(x, "_fields"):
            return type(x)(map(up, x))
        if hasattr(x, "_fields"):
            return type(x)(*map(up, x))
        if hasattr(x, "__dataclass_fields__"):
            return replace(x, **{k: up(getattr(x, k)) for k in x.__dataclass_fields__})
        return x

    return up(found)


@pytest.mark.parametrize(("kind", "sort", "reads", "skip_first"), CASES)
def test_every_edge_is_a_finite_difference_of_the_linearised_model(kind, sort, reads, skip_first):
    found, made_graph = made(kind, sort, reads, skip_first)
    exact = doubled(found)
    n, n_pos = len(found.features), len(drawn.TOKENS)
    n_errors = drawn.N_LAYERS * n_pos
    every = torch.ones(1 + n + n_errors + n_pos, n + n_errors + n_pos).double()
    every[1:] -= torch.eye(len(every) - 1).double()  # each source taken away in turn
    sizes, errors, embed = every.split([n, n_errors, n_pos], 1)
    values, out = forward(exact, sizes, errors.unflatten(1, (-1, n_pos)), embed)
    out = out[:, made_graph.logits.tokens] - out.mean(1, keepdim=True)
    both = torch.cat([values, out], 1)
    want = (both[0] - both[1:]).T
    got = made_graph.edges.double()
    assert n > 30 and got.shape == want.shape
    size = want.abs().amax(1, keepdim=True)
    assert ((got - want).abs() <= 1e-4 * want.abs() + 1e-6 * size).all()


@pytest.mark.parametrize(("kind", "sort", "reads", "skip_first"), CASES)
def test_edges_and_bias_sum_to_what_a_node_reads(kind, sort, reads, skip_first):
    found, made_graph = made(kind, sort, reads, skip_first)
    assert made_graph.balance() < 1e-5
    total = made_graph.edges.sum(1) + made_graph.bias
    torch.testing.assert_close(
        total[: made_graph.n_chosen], found.features.activation, rtol=1e-3, atol=1e-4
    )
    assert (made_graph.bias.abs() > 1e-3).any()


def test_fewer_features_are_those_that_count_and_their_rows_are_the_same():
    found, whole = made()
    logits = whole.logits
    some = trace(found, logits, max_features=12, batch_size=2)
    assert some.n_chosen == 12 and some.balance() < 1e-5
    n = len(found.features)
    columns = torch.cat([some.chosen, torch.arange(n, whole.edges.shape[1])])
    rows = torch.cat([some.chosen, torch.arange(n, n + len(logits.tokens))])
    torch.testing.assert_close(some.edges, whole.edges[rows[:, None], columns])
    # The first batches are chosen by what flows into logits directly.
    first = trace(found, logits, max_features=3, batch_size=2)
    shares = whole.edges[n:].abs() / whole.edges[n:].abs().sum(1, keepdim=True)
    direct = (logits.probabilities @ shares)[:n].topk(3).indices.sort().values
    assert first.chosen.tolist() == direct.tolist()


@pytest.mark.parametrize(("kind", "sort", "reads", "skip_first"), CASES)
def test_features_are_ranked_anew_as_rows_come_in(kind, sort, reads, skip_first):
    """By the whole matrix, each round with the rows so far."""
    found, whole = made(kind, sort, reads, skip_first)
    n, p = len(found.features), whole.logits.probabilities
    wanted, size = n // 2, 2
    done = torch.empty(0, dtype=torch.long)
    while len(done) < wanted:
        rows = torch.cat([done, torch.arange(n, len(whole.edges))])
        levels = whole.levels[rows]
        ranks = influence.influence(whole.edges[rows], levels, p, done)[:n]
        ranks[done] = -1
        more = ranks.topk(min(graph.UPDATE * size, wanted - len(done))).indices
        done = torch.cat([done, more]).sort().values
    some = trace(found, whole.logits, max_features=wanted, batch_size=size)
    assert some.chosen.tolist() == done.tolist()
    columns = torch.cat([done, torch.arange(n, whole.edges.shape[1])])
    rows = torch.cat([done, torch.arange(n, len(whole.edges))])
    torch.testing.assert_close(
        some.edges, whole.edges[rows[:, None], columns], rtol=1e-5, atol=1e-6
    )
    left = whole.edges[rows].sum(1) - some.edges.sum(1)
    torch.testing.assert_close(some.left_out, left, rtol=1e-4, atol=1e-5)


def test_targets_in_one_batch_do_not_mix():
    found, whole = made(sort="cross")
    tracer = Tracer(found)
    for i in (0, len(found.features) // 2, len(found.features) - 1):
        row = tracer.feature_rows(torch.tensor([i]))[0]
        torch.testing.assert_close(row, whole.edges[i], rtol=1e-4, atol=1e-5)


def test_logits_are_the_smallest_set_of_enough_probability():
    found = drawn.replacement()
    p = found.linear.logits[-1].softmax(-1).sort(descending=True)
    for share in (0.3, 0.6, 0.9):
        got = top_logits(found, 0.0, 40, share)
        held = got.probabilities.sum()
        assert held >= share > held - got.probabilities[-1]
        assert got.tokens.tolist() == p.indices[: len(got.tokens)].tolist()
    assert len(top_logits(found, 0.0, 4, 0.9999).tokens) == 4


def test_a_graph_that_does_not_fit_says_the_largest_that_does():
    found = drawn.replacement()
    n = len(found.features)
    need = graph.bytes_of(found, 3, n, 8)
    graph.check_memory(found, 3, n, 8, free=int(need / graph.SPARE) + 2)
    with pytest.raises(RetraceError, match="the largest graph that fits has") as e:
        graph.check_memory(found, 3, n, 8, free=int(0.9 * need / graph.SPARE))
    largest = int(str(e.value).rpartition(" ")[2])
    room = 0.9 * need
    assert graph.bytes_of(found, 3, largest, 8) <= room < graph.bytes_of(found, 3, largest + 1, 8)
    with pytest.raises(RetraceError, match="shorten the prompt"):
        graph.check_memory(found, 3, n, 8, free=10)


def test_a_jobs_own_limit_counts_as_memory(tmp_path):
    group = tmp_path / "fs/slurm/job_7"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/slurm/job_7\n")
    limited = {"max": "9000\n", "current": "5000\n", "stat": "anon 3000\ninactive_file 2000\n"}
    for at, said in ((group.parent, limited), (group, limited | {"max": "max\n"})):
        for name, text in said.items():
            (at / f"memory.{name}").write_text(text)
    found = graph.limits(tmp_path / "cgroup", tmp_path / "fs")
    assert min(found) == 9000 - 3000
    assert [*graph.limits(tmp_path / "none", tmp_path / "none")] == [float("inf")]
    assert 0 < graph.free_bytes(torch.device("cpu")) < 2**50


# --- influence: two logits, two features, two errors, one embedding ------------------------

#             feature 0, feature 1, error 0, error 1, embedding
EDGES = torch.tensor([
    [0.0, 0.0, 0.0, 0.0, 3.0],  # feature 0, layer 0
    [1.0, 0.0, -1.0, 0.0, 2.0],  # feature 1, layer 1
    [0.0, 2.0, 0.0, -2.0, 0.0],  # logit of 0.6
    [1.0, 0.0, 0.0, 0.0, 1.0],  # logit of 0.3
])  # fmt: skip
LEVELS, P = torch.tensor([0, 1, 2, 2]), torch.tensor([0.6, 0.3])


def test_influence_by_hand_and_by_powers():
    got = influence.influence(EDGES, LEVELS, P, torch.tensor([0, 1]))
    # feature 1: .6/2; error 1: .6/2; feature 0: .3/2 + .3/4; error 0: .3/4; embedding the rest
    torch.testing.assert_close(got, torch.tensor([0.225, 0.3, 0.075, 0.3, 0.15 + 0.15 + 0.225]))
    _, whole = made(sort="cross")
    n, columns = whole.n_chosen, whole.edges.shape[1]
    A = torch.zeros(columns + len(whole.logits.tokens), columns + len(whole.logits.tokens)).double()
    A[:n, :columns], A[columns:, :columns] = whole.edges[:n], whole.edges[n:]
    A = A.abs() / A.abs().sum(1, keepdim=True).clamp(min=1e-10)
    power = torch.cat([torch.zeros(columns), whole.logits.probabilities]).double()
    total = torch.zeros_like(power)
    while (power := power @ A).any():
        total += power
    ours = influence.influence(
        whole.edges, whole.levels, whole.logits.probabilities, torch.arange(n)
    )
    torch.testing.assert_close(ours.double(), total[:columns], rtol=1e-4, atol=1e-7)


def test_scores_by_hand():
    replaced, complete = influence.scores(EDGES, LEVELS, P, n_pos=1)
    assert replaced == pytest.approx(0.525 / (0.525 + 0.375))
    # rows read 0, 1/4, 1/2 and 0 from errors, weighted by .225, .3, .6 and .3
    assert complete == pytest.approx(1 - (0.25 * 0.3 + 0.5 * 0.6) / (0.225 + 0.3 + 0.6 + 0.3))


def test_pruning_by_hand():
    every = influence.prune(EDGES, LEVELS, P, n_pos=1, node=1.0, edge=1.0)
    assert every.nodes.all() and (every.edges == (EDGES != 0)).all()
    torch.testing.assert_close(every.cumulative.max(), torch.tensor(1.0))
    # .525 + .3 + .3 of 1.425 hold .75: the embedding, feature 1 and error 1
    some = influence.prune(EDGES, LEVELS, P, n_pos=1, node=0.75, edge=1.0)
    assert some.nodes.tolist() == [False, True, False, True, True, True, True]
    assert some.edges.nonzero().tolist() == [[1, 4], [2, 1], [2, 3], [3, 4]]


def test_nodes_without_edges_in_or_out_go():
    # Feature 1 feeds the logit; what feeds feature 1 is below the threshold.
    edges = torch.tensor([[0.0, 0.0, 0.01, 0.01], [0.4, 0.0, 0.6, 0.0], [0.0, 2.0, 0.0, 1.0]])
    levels, p = torch.tensor([0, 1, 2]), torch.tensor([1.0])
    kept = influence.prune(edges, levels, p, n_pos=1, node=0.2, edge=0.99)
    assert kept.nodes.tolist() == [False, False, False, True, True]
    assert kept.edges.nonzero().tolist() == [[2, 3]]
