"""A connection written into the stream, or out of it: does the model walk as if it were so? [torch]

After Spies et al. 2024. Their directions are latents of dictionaries, ours differences of means.

1. `pairs`: a maze without some connection and the same maze with it, which makes the shortest path
   shorter, so that it leads through it. The two paths agree up to a cell, and part there.
2. `directions`: of a connection, the mean stream at the semicolons behind it minus that at all.
3. `rows`: *activate* adds the direction to the maze without the connection, at its last semicolon,
   behind another connection; *remove* takes it from the maze with it, at its own semicolon. The
   model has moved if, where the paths part, its likeliest token is the other maze's next cell. Only
   pairs are judged of which it names both mazes' next cells unedited; `solved` counts them. Null
   arms: random directions of that length, and the direction of another connection.
4. `shown`: a few pairs whole, for the figure that one plays with.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.models import hooks
from pipeline.text import mazes

from . import data

BATCH = 128
LAST = 8  # tokens from the last semicolon to <PATH_START>


class Pairs(NamedTuple):
    """Mazes without and with a connection; its number, and the cells before the paths part, [n]."""

    without: data.Written
    joined: data.Written
    number: Tensor
    part: Tensor


def numbers(tokens: Tensor, size: int) -> Tensor:
    """The connection before each semicolon, -1 at other tokens, int64 [n pos]."""
    cell = torch.from_numpy(mazes.token_cells(size))[tokens]
    one, other = cell[:, 1:-3], cell[:, 3:-1]
    found = torch.minimum(one, other) + size**2 * ((one - other).abs() == 1)
    out = torch.full_like(tokens, -1)
    out[:, 4:] = torch.where(tokens[:, 4:] == mazes.SEMICOLON, found, -1)
    return out


def joined(found: mazes.Mazes, number: np.ndarray) -> mazes.Mazes:
    """Mazes with one more connection each, solved anew."""
    right, number = number >= found.size**2, number % found.size**2
    bit = np.uint64(1) << number.astype(np.uint64)
    words = found.right | bit * right, found.down | bit * ~right
    return mazes.solve(*words, found.origin, found.target, found.size)


def pairs(found: mazes.Mazes, n: int, seed: int) -> Pairs:
    """Up to n pairs, one of each maze that has one; RetraceError where none has."""
    rank = np.random.default_rng(seed).random((found.n, 2 * found.size**2))[: 4 * n]
    found = found.rows(slice(4 * n))  # most have one
    there, shorter = found.connections(), np.zeros(rank.shape, bool)
    for number in mazes.inside(found.size):
        made = joined(found, np.full(found.n, number))
        shorter[:, number] = ~there[:, number] & (made.length < found.length)
    keep = np.flatnonzero(shorter.any(1))[:n]
    if not len(keep):
        raise RetraceError(f"own.world.n_probe_mazes: in none of {len(there)} mazes a connection "
                           f"would make the path shorter; raise it")  # fmt: skip
    number, without = (rank * shorter)[keep].argmax(1), found.rows(keep)
    made = joined(without, number)
    both = (data.written(which, seed) for which in (without, made))
    part = (without.path == made.path).argmin(1)
    return Pairs(*both, torch.from_numpy(number), torch.from_numpy(part))


def directions(model: Any, given: data.Written, behind: int, device: Any) -> Tensor:
    """Of each connection, its mean stream at semicolons minus that of all, [2*cells d]."""
    hook, size = f"blocks.{behind}.hook_resid_post", given.mazes.size
    total = torch.zeros(2 * size**2, model.config.d_model, device=device)
    count = torch.zeros(2 * size**2, 1, device=device)
    for x in given.tokens.split(BATCH):
        with hooks.capture(model, [hook]) as acts:
            model(x.to(device))
        number = numbers(x, size).to(device)
        rows, known = acts[hook].float()[number >= 0], number[number >= 0]
        total.index_add_(0, known, rows)
        count.index_add_(0, known, torch.ones_like(rows[:, :1]))
    found = total / count.clamp(min=1) - total.sum(0) / count.sum()
    return found * (count > 0)


def read(model: Any, tokens: Tensor, behind: int, where: Tensor, add: Tensor) -> Tensor:
    """Logits [n pos d_vocab] with `add` [n d] added to the stream at one place of each maze."""
    at = where.to(tokens.device)[:, None, None].expand(-1, 1, add.shape[1])

    def write(stream: Tensor) -> Tensor:
        return stream.scatter_add(1, at, add[:, None].to(stream.dtype))

    with hooks.edited(model, f"blocks.{behind}.hook_resid_post", write):
        return model(tokens).logits


def rows(
    model: Any, pairs: Pairs, toward: Tensor, options: Any, device: Any
) -> Iterator[dict[str, Any]]:
    """Rows of the table edits: for each edit, direction and scale."""
    rng, every = torch.Generator().manual_seed(options.seed), torch.arange(len(pairs.part))
    size = pairs.without.mazes.size
    token = torch.from_numpy(mazes.cell_tokens(size))
    own = (numbers(pairs.joined.tokens, size) == pairs.number[:, None]).long().argmax(1)
    where = {"without": pairs.without.start - LAST, "joined": own}

    def named(name: str, wanted: str, add: Tensor) -> Tensor:
        given, other = getattr(pairs, name), getattr(pairs, wanted)
        z = read(model, given.tokens.to(device), options.behind, where[name], add)
        likely = z[every.to(device), (given.start + pairs.part).to(device)].argmax(-1).cpu()
        return likely == token[other.mazes.path[every, pairs.part]]

    along = toward[pairs.number.to(device)]
    solved = named("without", "without", 0 * along) & named("joined", "joined", 0 * along)
    other = torch.randint(1, len(toward), every.shape, generator=rng) + pairs.number
    ways = {"random": torch.randn(along.shape, generator=rng).to(device),
            "other": toward[(other % len(toward)).to(device)]}  # fmt: skip
    lengths = {name: way.norm(dim=1, keepdim=True).clamp(min=1e-9) for name, way in ways.items()}
    long = along.norm(dim=1, keepdim=True)
    ways = {"mean": along} | {name: way / lengths[name] * long for name, way in ways.items()}
    edits = (("activate", "without", "joined", 1), ("remove", "joined", "without", -1))
    for edit, *names, sign in edits:
        for direction, way in ways.items():
            for scale in options.scales:
                moved = named(*names, sign * scale * way)[solved]
                yield {"edit": edit, "direction": direction, "scale": scale, "n": len(solved),
                       "solved": len(moved), "moved": float(moved.double().mean())}  # fmt: skip


def best(made: list[dict[str, Any]]) -> float:
    """The scale at which most connections are activated; the first where none can be judged."""
    own = [r for r in made if (r["edit"], r["direction"]) == ("activate", "mean")]
    return max(own, key=lambda r: r["moved"] if r["solved"] else -1)["scale"]


def shown(model: Any, pairs: Pairs, add: Tensor, options: Any, device: Any,
          reading: Callable) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of the table play, of the first pairs, as figures of kind `maze` read it.

    `wall` is the reading of a connection, at the middle of its cells, and `mark` whether it is
    there, or that it is what was `written`. `move` is the probability of a cell behind a step, and
    `mark` the step at which the path is there, or -1. The edit adds `add` [2*cells d].
    """
    size, number = pairs.without.mazes.size, pairs.number[: options.n_shown]
    given = data.Written(pairs.without.mazes.rows(slice(len(number))),
                         *(x[: len(number)] for x in pairs.without[1:]))  # fmt: skip
    there, add = given.mazes.connections(), add[number.to(device)]
    for edit, change in (("", 0 * add), ("written in", add)):

        def forward(tokens: Tensor, change: Tensor = change) -> Tensor:
            return read(model, tokens, options.behind, given.start - LAST, change)

        walls, p = reading(given, forward), forward(given.tokens.to(device)).softmax(-1).cpu()
        for i, path in enumerate(given.mazes.path.tolist()):
            card = {"case": i + 1, "edit": edit}
            for k, place in enumerate(mazes.inside(size).tolist()):
                row, column, down = *divmod(place % size**2, size), place < size**2
                mark = "written" if place == number[i] else str(there[i, place])
                card |= {"row": row + 0.5 * down, "column": column + 0.5 * (not down)}
                for layer, x in enumerate(walls[:, i, k].tolist()):
                    yield card | {
                        "what": "wall",
                        "layer": layer,
                        "step": 0,
                        "value": x,
                        "mark": mark,
                    }
            for step in range(given.mazes.length[i]):
                z = p[i, given.start[i] + step][mazes.cell_tokens(size)].tolist()
                for cell, x in enumerate(z):
                    mark = str(path.index(cell) if cell in path else -1)
                    yield card | {"row": cell // size, "column": cell % size, "what": "move",
                                  "layer": -1, "step": step, "value": x, "mark": mark}  # fmt: skip
