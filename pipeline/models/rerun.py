"""The base run of a task once more, with another stream from one layer and position on. [torch]

    rerun        m with the stream at a hook set to x at some places
    patched      the same of streams at all positions, those from a first change on are taken
    in_passes    effects of many interventions, as many in one forward pass as fit

Layers below the hook do not run, and positions before the first place are not computed: they give
the keys and values that they gave in the base run. Of models without stored keys and values all
positions are computed. The results are those of whole forward passes, which the tests check.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.models import splice
from pipeline.models.pairs import Pairs, Stream, Task

TOKENS_PER_PASS = {"cpu": 4096, "cuda": 32_768}
WORTH_A_PASS = {"cpu": 128, "cuda": 32_768}  # tokens from which a pass of its own costs no more
OnDone = Callable[[int], None]  # called with the number of interventions that are done


def ignore(n_done: int) -> None:
    """An OnDone that shows no progress."""


def rerun(
    task: Task,
    hook: str,
    x: Float[Tensor, "runs batch suffix d_model"],
    places: Int[Tensor, "batch suffix"],
) -> Float[Tensor, "runs batch"]:
    """m of base runs whose stream at `hook` is x at `places`, and as in base before them.

    Args:
        hook: hook_resid_pre, hook_resid_mid or hook_resid_post of a layer.
        places: see `Pairs.suffix`; all that differs from base is among them.
    """
    pairs = task.pairs
    if not task.base.past:
        return task.metric(pairs.at_end(_on_whole_prompts(task, hook, x, places)))
    end = on_past(task, hook, x, places, pairs.rows)
    return task.metric(end[:, pairs.rows, pairs.end - places[:, 0]])


def rerun_by_length(
    task: Task,
    hook: str,
    x: Float[Tensor, "runs batch suffix d_model"],
    places: Int[Tensor, "batch suffix"],
) -> Float[Tensor, "runs batch"]:
    """`rerun` in several passes, so that short suffixes are not filled up to the longest.

    The rows of a pass are not those of the task: it is not for runs whose hooks count them.
    """
    pairs = task.pairs
    if not task.base.past:
        return rerun(task, hook, x, places)
    last = pairs.end - places[:, 0]
    ends = torch.empty_like(x[:, :, 0])
    for some in alike(last + 1, len(x), WORTH_A_PASS.get(x.device.type, 32_768)):
        length = int(last[some].max()) + 1
        args = x[:, some, :length], places[some, :length], some
        ends[:, some] = ends_on_past(task, hook, *args, last[some]).to(x.dtype)
    return task.metric(ends)


def alike(lengths: Int[Tensor, " batch"], runs: int, least: int) -> list[Int[Tensor, " some"]]:
    """Prompts in groups of similar length, each of at least `least` tokens over all runs."""
    groups: list[list[int]] = []
    full = True
    for i in lengths.argsort(descending=True, stable=True).tolist():
        if full and (not groups or lengths[i] < lengths[groups[-1][0]]):
            groups.append([])
        groups[-1].append(i)
        full = runs * len(groups[-1]) * int(lengths[groups[-1][0]]) >= least
    if not full and len(groups) > 1:
        groups[-2:] = [groups[-2] + groups[-1]]
    return [torch.tensor(sorted(some), device=lengths.device) for some in groups]


def _on_whole_prompts(
    task: Task, hook: str, x: Tensor, places: Tensor
) -> Float[Tensor, "runs batch pos d_model"]:
    """The stream before the final norm, all positions computed."""
    k, n = x.shape[:2]
    whole = task.base.at(hook).repeat(k, 1, 1)
    at = places.clamp(max=whole.shape[1] - 1).repeat(k, 1)
    inside = (places < whole.shape[1]).repeat(k, 1)
    row = torch.arange(k * n, device=x.device)[:, None].expand_as(at)
    whole[row[inside], at[inside]] = x.flatten(0, 1)[inside]
    return splice.resume_stream(task.hf, hook, whole).unflatten(0, (k, n))


def on_past(
    task: Task,
    hook: str,
    x: Float[Tensor, "runs batch suffix d_model"],
    places: Int[Tensor, "batch suffix"],
    rows: Int[Tensor, " batch"],
) -> Float[Tensor, "runs batch suffix d_model"]:
    """The stream before the final norm at `places`, on the keys and values of the base run.

    Args:
        rows: which prompts of the task these are.
    """
    end = splice.resume_stream(
        task.hf, hook, x.to(task.base.at(hook).dtype).flatten(0, 1),
        **_on_past(task, hook, len(x), places, rows),
    )  # fmt: skip
    return end.unflatten(0, x.shape[:2])


def ends_on_past(
    task: Task,
    hook: str,
    x: Float[Tensor, "runs batch suffix d_model"],
    places: Int[Tensor, "batch suffix"],
    rows: Int[Tensor, " batch"],
    last: Int[Tensor, " batch"],
) -> Float[Tensor, "runs batch d_model"]:
    """`on_past` at one place of each prompt, for which alone the last MLP is computed.

    Args:
        last: which of `places`.
    """
    each, final = torch.arange(len(last), device=last.device), task.heads.n_layers - 1
    mid = f"blocks.{final}.hook_resid_mid"
    if task.heads.parallel or hook == f"blocks.{final}.hook_resid_post":
        return on_past(task, hook, x, places, rows)[:, each, last]
    x = x.to(task.base.at(hook).dtype)
    if hook != mid:
        given = _on_past(task, hook, len(x), places, rows)
        x = splice.resume_stream(task.hf, hook, x.flatten(0, 1), to=mid, **given).unflatten(
            0, x.shape[:2]
        )
    x = x[:, each, last]
    return x + task.heads.mlp_writes(final, x)


def _on_past(
    task: Task, hook: str, k: int, places: Int[Tensor, "batch suffix"], rows: Int[Tensor, " batch"]
) -> dict[str, Any]:
    """What the model takes beside the stream to go on from `places`, k times over.

    Of the base run's keys and values, those before the last of the first places are enough.
    """
    from transformers import DynamicCache

    cache, first = DynamicCache(), int(hook.split(".")[1])
    length = max(1, int(places[:, 0].max()))
    for i, past in enumerate(task.base.past):  # layers below the hook do not run and need no copy
        past = [t[rows, :, :length] for t in past]
        cache.update(*(t.repeat(k, 1, 1, 1) if i >= first else t for t in past), i)
    last_position = task.pairs.base.shape[1] - 1  # rotary angles may depend on the largest
    mask = _attention_mask(length, places, task.base.at(hook).dtype)
    return {
        "past_key_values": cache,
        "use_cache": True,
        "position_ids": places.clamp(max=last_position).repeat(k, 1),
        "attention_mask": mask.repeat(k, 1, 1, 1),
    }


def _attention_mask(
    length: int, places: Int[Tensor, "batch suffix"], dtype: torch.dtype
) -> Float[Tensor, "batch 1 suffix keys"]:
    """Additive mask over length + suffix keys: those of base before the suffix, and the suffix's.

    Keys of base inside the suffix are replaced by the suffix's own, and so are masked out.
    """
    n, s = places.shape
    index = torch.arange(length, device=places.device)
    before = (index < places[:, :1])[:, None, :].expand(n, s, length)
    own = torch.ones(s, s, dtype=torch.bool, device=places.device).tril().expand(n, s, s)
    seen = torch.cat([before, own], -1)[:, None]
    zeros = torch.zeros(seen.shape, dtype=dtype, device=places.device)
    return zeros.masked_fill(~seen, torch.finfo(dtype).min)


def patched(
    task: Task,
    hook: str,
    streams: Iterable[Stream],
    start: Int[Tensor, " batch"],
    again: Callable[..., Tensor] = rerun,
) -> Float[Tensor, "runs batch"]:
    """m of base runs, one per stream, with the stream at `hook` replaced by it.

    Args:
        streams: equal to the base run's before `start`.
        again: `rerun`, or `rerun_by_length`.
    """
    places = task.pairs.suffix(start)
    x = torch.stack([task.pairs.gathered(stream, places) for stream in streams])
    return again(task, hook, x, places)


def pieces(pairs: Pairs, items: list, length: int) -> Iterator[list]:
    """The items in lists, each as long as fits into one pass with `length` tokens per prompt."""
    most = TOKENS_PER_PASS.get(pairs.base.device.type, 4096)
    size = max(1, most // (length * len(pairs.end)))
    for start in range(0, len(items), size):
        yield items[start : start + size]


def in_passes(
    task: Task,
    keys: list[Any],
    m_of: Callable[[Any, list[int]], Tensor],
    start_of: Callable[[Any], Tensor],
    on_done: OnDone = ignore,
) -> Float[Tensor, "items batch"]:
    """m(patched) - m(base) of interventions; those of one key share passes, as many as fit.

    Args:
        keys: one per intervention, such as its hook and position.
        m_of: (key, numbers of some interventions) -> m [runs batch] with each of them alone.
        start_of: key -> the first position that is changed, [batch].
        on_done: called with the number of interventions done so far.
    """
    out = torch.zeros(len(keys), len(task.before), device=task.before.device)
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    n_done = 0
    for key, group in groups.items():
        length = task.pairs.suffix(start_of(key)).shape[1]
        for some in pieces(task.pairs, group, length):
            out[some] = m_of(key, some) - task.before
            n_done += len(some)
            on_done(n_done)
    return out
