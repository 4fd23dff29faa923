"""Our Jacobian lens beside that of TransformerLens, on tiny random models; see jacobian_lens.sh.

Both read the same texts, some of different lengths, with the paper's 16 positions left out.
TransformerLens counts a layer by its output, we by its input: its layer l is our l + 1.
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from conftest import byte_tokenizer  # noqa: E402

from pipeline.models import lens  # noqa: E402
from pipeline.tuning import jacobian_lens  # noqa: E402

D, LAYERS, VOCAB = 24, 4, 260
TEXTS = [f"{n} bottles of beer on the wall, {n} bottles of beer." for n in range(95, 105)]
CLOSE = 1e-5  # of the largest entry: rounding of float32 in sums of another order


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    made = {
        "GPT-2": GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_embd=D, n_layer=LAYERS, n_head=4, n_positions=64,
                       initializer_range=0.3, bos_token_id=0, eos_token_id=0)
        ),
        "Llama": LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS,
                        num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                        initializer_range=0.3, bos_token_id=0, eos_token_id=0)
        ),
    }  # fmt: skip
    return {name: model.eval() for name, model in made.items()}


def theirs(hf: torch.nn.Module) -> tuple[dict[int, Tensor], Tensor, list[Tensor]]:
    """Their J by layer, the logits of their lens on the first text, and the tokens they read."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis import JacobianLens

    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        model = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
        found = JacobianLens.fit(model, TEXTS, corpus="tests", dim_batch=7, show_progress=False)
        read = found.readout(model, TEXTS[0], return_full_logits=True)
        tokens = [model.to_tokens(text)[0] for text in TEXTS]
    logits = torch.stack([read.lens_logits[layer] for layer in found.source_layers])
    return found.jacobians, logits, tokens


def ours(hf: torch.nn.Module, tokens: list[Tensor]) -> tuple[dict[int, Tensor], Tensor]:
    """Our J by layer, and the logits of our lens on the first text."""
    layers, how = list(range(1, LAYERS)), jacobian_lens.JacobianLensSpec(n_prompts=1)
    each = [jacobian_lens.fit("m", hf, t[None], layers, how)[1] for t in tokens]
    J = {layer: torch.stack([one[layer] for one in each]).mean(0) for layer in layers}
    x, read = lens.streams(hf, tokens[0][None])[0], jacobian_lens.jacobian_lens(hf, J)
    with torch.no_grad():
        return J, torch.stack([read(layer, x[layer][0]) for layer in layers])


def main() -> None:
    wrong = 0
    print(f"TransformerLens {version('transformer-lens')}, {len(TEXTS)} texts")
    for name, hf in models().items():
        want, their_logits, tokens = theirs(hf)
        got, our_logits = ours(hf.requires_grad_(False), tokens)
        pairs = [(f"J of layer {i + 1}", got[i + 1], J) for i, J in want.items()]
        pairs.append(("logits of the lens", our_logits, their_logits))
        away = max(float((J - torch.eye(D)).abs().max()) for J in want.values())
        print(f"{name}: {sorted({len(t) for t in tokens})} tokens; J - I up to {away:.2f}")
        for what, a, b in pairs:
            gap = float((a - b).abs().max() / b.abs().max())
            wrong += gap > CLOSE
            print(f"  {what}: largest difference {gap:.1e} of the largest entry")
    sys.exit(f"{wrong} differ by more than {CLOSE:g}" if wrong else 0)


if __name__ == "__main__":
    main()
