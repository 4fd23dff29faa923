"""A model proves, when it is loaded, that its hooks are where their names say. [torch]

One short pass on a few tokens, any family:

    resid_pre + attn_out + mlp_out = resid_post             the parts of a layer, also resid_mid
    resid_post of a layer = resid_pre of the next
    the upper part, resumed on its own stream, gives the logits
    the unembedding of the last stream gives the logits     final norm, scale, soft cap, bias
    sum_h z_h W_O[h] + b_O gives what attention writes      the parts of a head
    z at the first position = v there                       the columns of a joint projection
    q, k and v are projections of resid_pre and one norm    what edges into them change
    g n + b gives what a norm writes                        hook_normalized and hook_scale
    pattern times v gives z                                 where patterns are stored
    z is a function of q, k and v alone                     edges: no gate reads the stream (AFMoE)
    the end of a prompt, run on the keys and values of its  else patched runs compute all positions
    beginning, gives its last stream
    another last token leaves the positions before it       patching and graphs: they go on from one

Hooks that fail are refused by name, each in a sentence, and nothing is computed on them; all others
go on. Where resuming, the unembedding, the parts of heads or edges fail, what needs them is too.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.models import hooks, inner, modules, places, rerun, splice
from pipeline.models.heads import SLOTS, Heads
from pipeline.models.pairs import Pairs, Run, Task

N_TOKENS = 5
ROUNDING = 4  # units in the last place of each summand: a sum of three has one or two roundings
# Sums over many products, in another order than the model's.
LOOSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
STREAMS = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")


@torch.no_grad()
def prove(hf: nn.Module) -> dict[str, str]:
    """Hook -> why it is refused; noted at the model, where hooks.py and splice.py look it up.

    Raises:
        RetraceError: the model does not run on token ids alone.
    """
    hf.retrace_refused, hf.retrace_fails = {}, {}
    modules.check_layout(hf)
    names, tokens = hooks.hook_names(hf), few_tokens(hf)
    try:
        hf.retrace_overwritten = overwritten(hf, names, tokens)
        with hooks.capture(hf, names) as acts, norms_seen(hf) as outs:
            out = hf(input_ids=tokens, use_cache=False)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise RetraceError(
            f"model type '{hf.config.model_type}': does not run on {tokens.shape[1]} token ids "
            f"alone ({str(e).splitlines()[0][:120]})"
        ) from e
    logits = getattr(out, "logits", None)
    if not torch.isfinite(out[0] if logits is None else logits).all():
        return {}  # no sum holds then; the stage that stores or sums values says where they begin
    refused = {n: "never runs in a forward pass of this model" for n in names if n not in acts}
    refused |= shape_faults(acts, tokens) | router_faults(hf)
    acts = {n: x for n, x in acts.items() if n not in refused}
    for i, layer in enumerate(modules.layers_of(hf)):
        at = {h: acts.get(f"blocks.{i}.{h}") for h in (*STREAMS, *_parts(hf))}
        found = layer_faults({h: x for h, x in at.items() if x is not None})
        found |= norm_faults(hf, layer, at, outs) | head_faults(hf, i, at)
        after = acts.get(f"blocks.{i + 1}.hook_resid_pre")
        post = at.get("hook_resid_post")
        both = after is not None and post is not None
        if both and (after.shape != post.shape or not near(after, post, post)):
            found["hook_resid_post"] = "is not what the next layer reads as its hook_resid_pre"
        refused |= {f"blocks.{i}.{h}": why for h, why in found.items()}
    final = acts.get("ln_final.hook_normalized")
    if final is not None and not is_norm(norm := splice.final_norm(hf), final, outs[norm]):
        why = "the final norm is not a gain times the standardised stream plus a bias"
        refused |= {f"ln_final.{h}": why for h in ("hook_normalized", "hook_scale")}
    hf.retrace_refused = refused
    if logits is None:
        hf.retrace_fails = headless(hf)
    else:  # where both refuse, the second says more
        hf.retrace_fails = last_faults(hf, tokens, acts) | whole_faults(hf, tokens, acts, logits)
    if logits is not None and not hf.retrace_fails.keys() & {"resume", "heads"}:
        hf.retrace_past_fails = not _goes_on(hf, tokens)
    return refused


def overwritten(hf: nn.Module, names: list[str], tokens: Tensor) -> set[str]:
    """Hooks within a layer whose tensor is changed in place behind them (OLMoE's clip_qkv)."""
    versions: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        versions[name] = x._version

    with hooks.capture(hf, names) as acts, ExitStack() as stack:
        for name in names:
            stack.callback(hooks.site(hf, name).register(partial(note, name)).remove)
        hf.base_model(input_ids=tokens, use_cache=False)
    return {n.split(".", 2)[-1] for n, x in acts.items() if x._version != versions[n]}


@contextmanager
def norms_seen(hf: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """Inside: a forward pass fills the dictionary, norm -> its output."""
    outs: dict[nn.Module, Tensor] = {}

    def keep(norm: nn.Module, _: tuple, out: Tensor) -> None:
        outs[norm] = out

    paths, layers = modules.norm_paths(modules.family(hf)), modules.layers_of(hf)
    norms = [modules.reached(layer, path) for layer in layers for path in paths]
    with ExitStack() as stack:
        for norm in [*norms, splice.final_norm(hf)]:
            if norm is not None:
                stack.callback(norm.register_forward_hook(keep).remove)
        yield outs


def few_tokens(hf: nn.Module) -> Int[Tensor, "2 pos"]:
    """Token ids, no two neighbours alike."""
    n = min(N_TOKENS, getattr(hf.config, "max_position_embeddings", N_TOKENS) or N_TOKENS)
    ids = torch.arange(2 * n, device=next(hf.parameters()).device) * 7 + 3
    return (ids % hf.config.vocab_size).view(2, n)


def _parts(hf: nn.Module) -> list[str]:
    names = modules.family(hf)
    norms = [f"{p}.{h}" for p in names.parts for h in ("hook_normalized",) if p.startswith("ln")]
    return [*norms, "attn.hook_v", "attn.hook_z"]


def near(
    a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], *summands: Float[Tensor, "*shape"]
) -> bool:
    """Whether a = b but for the rounding of sums of these summands, coordinate by coordinate."""
    eps = torch.finfo(a.dtype).eps
    size = sum(x.abs().double() for x in summands)
    return bool(((a.double() - b.double()).abs() <= ROUNDING * eps * size + 1e-12).all())


def alike(a: Float[Tensor, "*batch d"], b: Float[Tensor, "*batch d"], dtype: torch.dtype) -> bool:
    """Whether a = b but for the rounding of long sums, relative to each row's size."""
    size = b.abs().amax(-1, keepdim=True).double()
    return bool(((a.double() - b.double()).abs() <= LOOSE[dtype] * size + 1e-9).all())


def shape_faults(acts: dict[str, Tensor], tokens: Int[Tensor, "batch pos"]) -> dict[str, str]:
    """Hooks without one row per token: a stream in several copies (Gemma 3n, Hunyuan 4).

    What a part writes into such a stream is not what its module gives, so that is refused, too.
    """
    found: dict[str, str] = {}
    for name, x in acts.items():
        if x.shape[:-1] == tokens.shape:
            continue
        layer, _, at = name.rpartition(".")
        every = [f"{layer}.{h}" for h in STREAMS] if at in STREAMS else [name]
        why = (
            f"{at} has the shape {list(x.shape)} for {list(tokens.shape)} tokens in this model, "
            f"where one row per token is stored"
        )
        found |= {n: why for n in every if n in acts}
    return found


def router_faults(hf: nn.Module) -> dict[str, str]:
    """Routers that took several distributions over experts in the last pass (Phi MoE)."""
    hook, found = "mlp.hook_expert_weights", {}
    place = modules.family(hf).place(hook)
    for i, layer in enumerate(modules.layers_of(hf) if place else []):
        block = modules.reached(layer, place[0].rpartition(".")[0])
        if block is not None and inner.is_sequential(block):
            found[f"blocks.{i}.{hook}"] = (
                "this router draws one expert after another, each from probabilities of its own; "
                "take mlp.hook_in or mlp.hook_experts_out"
            )
    return found


# --- one layer -----------------------------------------------------------------------------


def layer_faults(at: dict[str, Float[Tensor, "batch pos _"]]) -> dict[str, str]:
    """Hook of a layer -> why it is refused, of the streams that the layer has."""
    pre, attn, mid, mlp, post = (at.get(h) for h in STREAMS)
    if pre is None or post is None:
        return {}
    if other := [h for h in STREAMS if h in at and at[h].shape != pre.shape]:
        why = f"{', '.join(other)}: of another width than hook_resid_pre, so that no parts sum"
        return {
            h: why for h in {*other, "hook_attn_out", "hook_mlp_out", "hook_resid_mid"} if h in at
        }
    why_not = "do not sum to the stream behind the layer, so that this name stands elsewhere here"
    out = {}
    if attn is not None and mid is not None and not near(mid, pre + attn, pre, attn):
        why = (
            "hook_resid_pre + hook_attn_out is not hook_resid_mid, so that one of them is elsewhere"
        )
        out = dict.fromkeys(("hook_attn_out", "hook_resid_mid"), f"{why} in this model")
    if attn is not None and mlp is not None:
        if not near(post, pre + attn + mlp, pre, attn, mlp):
            out |= dict.fromkeys(
                ("hook_attn_out", "hook_mlp_out"),
                f"hook_resid_pre, hook_attn_out and hook_mlp_out {why_not}",
            )
            if mid is not None and not near(post, mid + mlp, mid, mlp):
                out.setdefault("hook_resid_mid", f"hook_resid_mid and hook_mlp_out {why_not}")
    elif mid is not None and mlp is not None and not near(post, mid + mlp, mid, mlp):
        why = f"hook_resid_mid and hook_mlp_out {why_not}"
        out |= dict.fromkeys(("hook_mlp_out", "hook_resid_mid"), why)
    return out


def norm_faults(
    hf: nn.Module, layer: nn.Module, at: dict[str, Tensor | None], outs: dict[nn.Module, Tensor]
) -> dict[str, str]:
    """Hooks of norms whose output is not gain * normalized + bias.

    Args:
        outs: what each norm wrote in the pass.
    """
    found = {}
    for part, path in modules.family(hf).parts.items():
        n, norm = at.get(f"{part}.hook_normalized"), modules.reached(layer, path)
        if n is not None and not is_norm(norm, n, outs[norm]):
            why = "this norm is not a gain times the standardised stream plus a bias"
            found |= {f"{part}.{h}": why for h in ("hook_normalized", "hook_scale")}
    return found


def is_norm(
    norm: nn.Module, n: Float[Tensor, "batch pos d"], out: Float[Tensor, "*rows d"]
) -> bool:
    """Whether out = g n + b, with the gain and bias of the norm."""
    if isinstance(norm, nn.Identity):
        return bool(torch.equal(n, out))
    run, n = places.as_function(norm), n.float()
    out = places.moved(out.view(n.shape), places.where(n))
    return alike(places.gain(run, n) * n + run(torch.zeros_like(n)), out, out.dtype)


def head_faults(hf: nn.Module, i: int, at: dict[str, Tensor | None]) -> dict[str, str]:
    """Queries, keys and values of a joint projection whose columns are not where the layout says.

    The first position attends to itself alone, so that z there is v, for each query head that of
    its key head.
    """
    z, v = at.get("attn.hook_z"), at.get("attn.hook_v")
    place = modules.family(hf).place("attn.hook_v")
    if z is None or v is None or " of " not in place[1]:
        return {}
    n_heads = modules.n_heads_of(hf, i)
    by_head = v[:, 0].unflatten(-1, (-1, z.shape[-1] // n_heads))
    there = by_head.repeat_interleave(n_heads // by_head.shape[1], 1).flatten(1)
    clip = getattr(getattr(hf.config, "attn_config", None), "clip_qkv", None)  # MPT's, behind v
    there = there if clip is None else there.clamp(-clip, clip)
    if alike(z[:, 0], there, z.dtype):
        return {}
    why = "z at the first position is not v there, so that the columns of q, k and v lie elsewhere"
    return dict.fromkeys(("attn.hook_q", "attn.hook_k", "attn.hook_v"), why)


@torch.no_grad()
def prove_patterns(hf: nn.Module, names: list[str]) -> None:
    """Prove that attention patterns are what attention uses: pattern times v is z.

    `prove` leaves this out, since fused attention forms no pattern. Eager attention, which does, is
    held to that of the model (of Falcon with ALiBi it adds the bias twice).

    Args:
        names: hooks that are about to be read; their layers are tried.

    Raises:
        RetraceError: they are not, in a layer that has v and z.
    """
    known = set(hooks.hook_names(hf))
    for layer in sorted({hook.rsplit(".", 2)[0] for hook in names if hooks.is_by_key(hook)}):
        at = [f"{layer}.attn.hook_{h}" for h in ("pattern", "v", "z")]
        if not known.issuperset(at[1:]):
            continue
        acts = hooks.run_to(hf, few_tokens(hf), at)
        z, own = acts[at[2]], hooks.run_to(hf, few_tokens(hf), at[2:])[at[2]]
        if not alike(z, own, z.dtype):
            raise RetraceError(
                f"hook '{at[0]}': eager attention, which forms patterns, is not the attention of "
                f"this model, whose attn.hook_z is another; store attn.hook_z"
            )
        if not _is_pattern(*(acts[h] for h in at)):
            raise RetraceError(
                f"hook '{at[0]}': times attn.hook_v it is not attn.hook_z in this model, so that "
                f"its scores and patterns are not known; store attn.hook_z"
            )


def _is_pattern(pattern: Tensor, v: Tensor, z: Tensor) -> bool:
    """Whether a pattern [batch pos n_heads*n_keys] times v is z, head by head."""
    n_heads, odd = divmod(pattern.shape[-1], pattern.shape[1])
    if odd or z.shape[-1] % n_heads:
        return False  # keys beside the tokens'
    z, d_head = inner.by_head(z, n_heads), z.shape[-1] // n_heads
    n_key, odd = divmod(v.shape[-1], d_head)
    if odd or n_heads % n_key:
        return False
    v = inner.by_head(v, n_key).repeat_interleave(n_heads // n_key, 1)
    return alike(inner.by_head(pattern, n_heads).to(v.dtype) @ v, z, z.dtype)


# --- the whole -----------------------------------------------------------------------------


def headless(hf: nn.Module) -> dict[str, str]:
    """`whole_faults` of a model without a head: an encoder."""
    why = f"model type '{hf.config.model_type}' without a head has no logits"
    return dict.fromkeys(("resume", "unembed", "heads"), why)


def whole_faults(
    hf: nn.Module, tokens: Tensor, acts: dict[str, Tensor], logits: Tensor
) -> dict[str, str]:
    """resume, unembed or heads -> why what needs it is refused."""
    kind, n = hf.config.model_type, len(modules.layers_of(hf))
    middle, last = f"blocks.{n // 2}.hook_resid_pre", f"blocks.{n - 1}.hook_resid_post"
    tests: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], str]] = {
        "resume": (
            lambda: (_resumed(hf, middle, tokens, acts[middle]), logits),
            "its upper layers, resumed on their own stream, do not give its logits",
        ),
        "unembed": (
            lambda: (splice.unembed(hf, acts[last]), logits),
            "the final norm and the unembedding of its last stream do not give its logits",
        ),
        "heads": (
            lambda: _heads(hf, acts),
            "what its heads or its MLPs write, computed apart, is not what its layers write",
        ),
        "edges": (
            lambda: _of_inputs(hf, tokens, acts),
            "its attention reads more of the stream than queries, keys and values, such as a gate, "
            "so that edges into these are not all that there are; patch nodes",
        ),
    }
    out: dict[str, str] = {}
    weights = next(hf.parameters()).dtype  # Mamba gives the logits of half weights in float32
    dtype = max(logits.dtype, weights, key=LOOSE.__getitem__)
    for name, (test, why) in tests.items():
        if name == "edges" and "heads" in out:
            break
        try:
            good = alike(*test(), dtype)
        except RetraceError as e:
            good, why = False, str(e)
        except Exception as e:  # of another's code on a stream that it does not expect
            good, why = False, f"{why} ({type(e).__name__}: {str(e).splitlines()[0][:100]})"
        if not good:
            out[name] = why if why.startswith("model type") else f"model type '{kind}': {why}"
    return out


def _resumed(hf: nn.Module, hook: str, tokens: Tensor, x: Tensor) -> Tensor:
    """`splice.resume`; where upper layers miss what lower ones would leave, those run, too."""
    hf.retrace_reads_below = False
    try:
        return splice.resume(hf, hook, tokens, x)
    except KeyError:  # of keys and values by the layer that made them
        hf.retrace_reads_below = True
        return splice.resume(hf, hook, tokens, x)


def _heads(hf: nn.Module, acts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(what heads and MLPs write, computed apart, and in the model's pass), of all layers."""
    heads = Heads(hf)
    ours, theirs = [], []
    for i in range(heads.n_layers):
        pre = acts[f"blocks.{i}.hook_resid_pre"]
        for slot in SLOTS:
            there = acts[f"blocks.{i}.attn.hook_{slot}"]
            if not alike(heads.read(i, slot, pre), there, there.dtype):
                raise RetraceError(
                    f"model type '{hf.config.model_type}': attn.hook_{slot} of its layer {i} is "
                    f"not its projection of the stream before the layer and one norm"
                )
        z, mlp_out = acts[f"blocks.{i}.attn.hook_z"], acts.get(f"blocks.{i}.hook_mlp_out")
        ours.append(heads.written(z, i).sum(-2) + heads.rest(z, i))
        theirs.append(acts[f"blocks.{i}.hook_attn_out"])
        if mlp_out is not None:
            read = acts[f"blocks.{i}.{'hook_resid_pre' if heads.parallel else 'hook_resid_mid'}"]
            given = acts.get(f"blocks.{i}.mlp.hook_in")
            if given is not None and not alike(heads.mlp_reads(i, read), given, given.dtype):
                raise RetraceError(
                    f"model type '{hf.config.model_type}': mlp.hook_in of its layer {i} is not one "
                    f"norm of the stream before it"
                )
            ours.append(heads.mlp_writes(i, read))
            theirs.append(mlp_out)
    return torch.stack(ours), torch.stack(theirs)


def _of_inputs(hf: nn.Module, tokens: Tensor, acts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(z with q, k and v as they were and the streams of the prompts exchanged, z), all layers.

    Raises:
        RetraceError: what MLPs write changes so, with what they read as it was.
    """
    layers = [f"blocks.{i}." for i in range(len(modules.layers_of(hf)))]
    kept = [
        f"{at}{h}" for at in layers for h in (*(f"attn.hook_{s}" for s in SLOTS), "mlp.hook_in")
    ]
    names = [f"{at}{h}" for h in ("attn.hook_z", "hook_mlp_out") for at in layers]
    names = [name for name in names if name in acts]
    with ExitStack() as stack:
        seen = stack.enter_context(hooks.capture(hf, names))
        for at in layers:
            stack.enter_context(hooks.edited(hf, f"{at}hook_resid_pre", lambda x: x.flip(0)))
        for name in kept:
            if name in acts:
                stack.enter_context(hooks.edited(hf, name, lambda _, x=acts[name]: x))
        hf.base_model(input_ids=tokens, use_cache=False)
    for name in names[len(layers) :]:
        if not alike(seen[name], acts[name], acts[name].dtype):
            raise RetraceError(
                f"model type '{hf.config.model_type}': its MLPs read more of the stream than "
                f"mlp.hook_in, so that edges into them are not all that there are; patch nodes"
            )
    return tuple(torch.stack([x[n] for n in names[: len(layers)]]) for x in (seen, acts))


def last_faults(hf: nn.Module, tokens: Tensor, acts: dict[str, Tensor]) -> dict[str, str]:
    """unembed or behind -> what the stream behind the last layer shows against it.

    RWKV halves that stream before the final norm, which an epsilon alone tells from the logits.
    Where attention looks ahead, whole passes with cut edges are right (edge_graph.py), and what
    computes from a position on alone is refused.
    """
    last, out = f"blocks.{len(modules.layers_of(hf)) - 1}.hook_resid_post", {}
    final = acts.get("ln_final.hook_normalized")
    if (x := acts.get(last)) is None:
        return out
    kind = f"model type '{hf.config.model_type}' with these settings"
    if final is not None:
        n = places.standardised(splice.final_norm(hf), x)[2]
        if not near(final, n, n):
            out["unembed"] = (
                f"{kind} changes its last stream before the final norm, so that its logits are not "
                f"those of hook_resid_post"
            )
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % hf.config.vocab_size
    if not alike(hooks.run_to(hf, other, [last])[last][:, :-1], x[:, :-1], x.dtype):
        out["behind"] = (
            f"{kind} looks at later tokens, too, and circuits need attention that looks back only"
        )
    return out


def _goes_on(hf: nn.Module, tokens: Int[Tensor, "batch pos"]) -> bool:
    """Whether the end of a prompt, run on keys and values of its beginning, has the same stream."""
    rows = torch.arange(len(tokens), device=tokens.device)
    end = torch.full_like(rows, tokens.shape[1] - 1)
    pairs = Pairs(tokens, tokens, rows, rows, end, {})
    try:
        base = Run.of(Heads(hf), tokens)
        nothing = torch.zeros(len(tokens), device=tokens.device)
        task = Task(hf, Heads(hf), pairs, _no_metric, base, base, nothing, nothing)
        at = pairs.suffix(end // 2)
        hook = "blocks.0.hook_resid_pre"  # all layers, since some may be local and others global
        if not base.past:
            return True
        found = rerun.on_past(task, hook, pairs.gathered(base.at(hook), at)[None], at, rows)[0]
    except Exception as e:  # of another's code on a mask that it does not expect
        cli.log.info("keys and values are not stored: %s: %s", type(e).__name__, e)
        return False
    return alike(found, pairs.gathered(base.post[-1], at), found.dtype)


def _no_metric(x: Tensor) -> Tensor:
    return x
