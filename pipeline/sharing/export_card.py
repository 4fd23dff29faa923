"""README.md of an exported dictionary: its model, its tokens, and which loader takes which name.

The code on a card runs as it stands, from the folder in which snakemake was called; a test runs it.
What the card warns of was seen in sae-lens 6.54 and transformer-lens 3.9; `findings/` shows it.
"""

from typing import Any

from pipeline.sharing.export_formats import SaeLensConfig

NATIVE = "NativeForCausalLM"  # trained here; TransformerLens has no name for it
LOAD = """\
model = TransformerBridge.boot_transformers({checkpoint!r}, device="cpu")
"""
COMPATIBILITY = """\
model.enable_compatibility_mode()  # as when the dictionary was trained: norms folded in
"""
LOAD_NATIVE = """\
model = bridge({model_json!r})
"""
EVALUATE = """\
import torch
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
{imported}

{loaded}sae = SAE.load_from_disk({folder!r})
# texts: a datasets.Dataset with a column "text", or "tokens" of {n_ctx} ids each
store = ActivationsStore.from_sae(model, sae, texts)
config = get_eval_everything_config(n_eval_reconstruction_batches=1)
with torch.no_grad():
    found, _ = run_evals(sae, store, model, ActivationScaler(), config)
"""
RUN = """\
from sae_lens import SAE

sae = SAE.load_from_disk({folder!r})
y_hat = sae(x)  # x [rows d] at {hook}, y_hat at {hook_out}
"""
ATTACH = """\
import torch
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

model = SAETransformerBridge.boot_transformers({checkpoint!r}, device="cpu")
{compatibility}sae = SAE.load_from_disk({folder!r})
# tokens: ids [batch pos]; it reads {hook} and writes {hook_out}
with torch.no_grad():
    logits = model.run_with_saes(tokens, saes=[sae])
"""


def card(
    config: SaeLensConfig, model: dict[str, Any], *, folder: str, named: dict[str, str]
) -> str:
    """The card's Markdown.

    Args:
        config: cfg.json of the dictionary.
        model: model.json of what it was trained on.
        folder: where the export lies.
        named: paper, arm and sae.
    """
    about = config.metadata
    names = [f"`{about.hook_name}`", f"`{about.hook_name_bridge}`"]
    writes = f", reconstructs `{about.hook_name_out}`" if about.hook_name_out else ""
    return "\n\n".join(
        [
            f"# {named['arm']}.{named['sae']}",
            f"A dictionary of {config.d_sae} latents ({config.architecture}) of Retrace's paper "
            f"`{named['paper']}`. It reads {names[0]}, {config.d_in} wide{writes}. provenance.json "
            f"says how it was made.",
            f"**Model**: {described(model)}. Its checkpoint lies in `{_store(config)}`.",
            f"**Tokens**: {tokens(config)}",
            "**Names of the hook**: `metadata.hook_name` is TransformerLens's, "
            "`metadata.hook_name_bridge` the one that a bridge uses itself.",
            "| loader | name |\n| --- | --- |\n"
            f"| `TransformerBridge`, `HookedTransformer` | {names[0]} |\n"
            f"| `SAETransformerBridge`, to attach (`add_sae`, `run_with_saes`) | either |\n"
            f"| `SAETransformerBridge`, to read or edit (`run_with_hooks`, `run_with_cache`, "
            f"`ActivationsStore`, `run_evals`) | {names[1]} |",
            "In the last row sae-lens 6.54 ignores the first name without a word, and an "
            "evaluation changes nothing. Set `sae.cfg.metadata.hook_name = "
            "sae.cfg.metadata.hook_name_bridge` before it.",
            *warnings(config),
            f"```python\n{code(config, model, folder)}```",
        ]
    ) + "\n"  # fmt: skip


def _store(config: SaeLensConfig) -> str:
    return f"results/store/model/{config.metadata.model_name}/checkpoint"


def described(model: dict[str, Any]) -> str:
    """Where the weights come from, in words."""
    source = {k: v for k, v in model["source"].items() if v is not None and k != "source"}
    made = ", ".join(f"{k} {v}" for k, v in source.items())
    redrawn = "" if model["weights"] == "trained" else f", weights: {model['weights']}"
    return f"{model['name']} ({model['source']['source']}: {made}{redrawn})"


def tokens(config: SaeLensConfig) -> str:
    """Which tokens of which blocks the dictionary was trained on."""
    about, first = config.metadata, config.metadata.seqpos_slice[0] or 0
    begin = "BOS and then text" if about.prepend_bos else "text, without BOS"
    left_out = f", positions below {first} left out" if first else ""
    return f"blocks of {about.context_size}, {begin}{left_out}."


def warnings(config: SaeLensConfig) -> list[str]:
    """What goes wrong in silence with a dictionary at this hook."""
    about = config.metadata
    other = "an SAE" if about.hook_name_out else "a transcoder"
    out = [
        f"Do not attach {other} that reads the same hook to one `SAETransformerBridge` together "
        f"with this: the transcoder is then given the MLP's output, and one of the two stays "
        f"attached."
    ]
    if about.hook_name.endswith("hook_resid_mid"):
        out.append(
            "At `hook_resid_mid` a bridge replaces what the MLP reads, and the skip connection "
            "keeps x. Retrace's evaluation replaces both, so its spliced losses differ."
        )
    return out


def code(config: SaeLensConfig, model: dict[str, Any], folder: str) -> str:
    """Python that loads model and dictionary and evaluates it; a transcoder is attached or run."""
    about = config.metadata
    native = model["architecture"] == NATIVE
    paths = {"checkpoint": _store(config), "folder": folder, "n_ctx": about.context_size}
    compatibility = COMPATIBILITY if model["processing"] == "compatibility" else ""
    if about.hook_name_out:
        paths |= {"hook": about.hook_name, "hook_out": about.hook_name_out}
        return (RUN if native else ATTACH).format(**paths, compatibility=compatibility)
    if native:
        imported = (
            "\nfrom pipeline.weights.model import bridge  # of Retrace, which trained the model"
        )
        loaded = LOAD_NATIVE.format(model_json=f"results/store/model/{about.model_name}/model.json")
    else:
        imported = "from transformer_lens.model_bridge import TransformerBridge"
        loaded = LOAD.format(**paths) + compatibility
    return EVALUATE.format(**paths, imported=imported, loaded=loaded)
