"""DPO against trl's own trainer, on a model of two layers; run by tests/libraries/dpo.sh."""

import os
import sys

import pytest
import torch

LIBRARIES = os.environ.get("RETRACE_TRL")
if not LIBRARIES:
    pytest.skip("needs trl: tests/libraries/dpo.sh", allow_module_level=True)
sys.path.append(LIBRARIES)  # behind the project's own packages

from pipeline.tuning import finetuning  # noqa: E402

LETTERS = "abcdefgh?: "
ROWS = [("ab?: ", "a", "hh"), ("hg: ", "cde", "b"), ("a: ", "fg", "cd"), ("bcd? ", "h", "a")]
BETA = 0.3


def gpt2(seed: int):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    shape = {"vocab_size": len(LETTERS) + 1, "n_positions": 16, "n_embd": 16, "n_layer": 2}
    end = {"bos_token_id": None, "eos_token_id": len(LETTERS)}
    return GPT2LMHeadModel(GPT2Config(**shape, n_head=2, initializer_range=0.5, **end)).eval()


@pytest.fixture
def trainer(tmp_path):
    """A DPOTrainer of theirs whose model differs from its reference."""
    from datasets import Dataset
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    vocabulary = {c: i for i, c in enumerate([*LETTERS, "<end>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>",
                                        pad_token="<end>", unk_token="<end>")  # fmt: skip
    data = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in ROWS])
    how = DPOConfig(str(tmp_path), beta=BETA, report_to=[], use_cpu=True, bf16=False,
                    gradient_checkpointing=False, per_device_train_batch_size=4)  # fmt: skip
    return DPOTrainer(gpt2(0), gpt2(1), how, train_dataset=data, processing_class=tokenizer)


def ids(text: str) -> list[int]:
    return [LETTERS.index(c) for c in text]


def test_loss_gradient_and_rewards_are_trls(trainer):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    trainer.model.eval()  # dropout
    want = trainer.compute_loss(trainer.model, batch)
    end = [len(LETTERS)]
    answers = [ids(row[which]) + end for which in (1, 2) for row in ROWS]
    rows = finetuning.pairs([ids(p) for p, _, _ in ROWS] * 2, answers)
    model = gpt2(0)
    found = finetuning.preference(model, gpt2(1), BETA, *rows)
    torch.testing.assert_close(found.loss.mean(), want, rtol=1e-5, atol=1e-6)
    assert found.loss.std() > 0.01
    found.loss.mean().backward()
    want.backward()
    theirs = dict(trainer.model.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
    logged = {k: v[-1] for k, v in trainer._metrics["eval"].items() if k.startswith("rewards/")}
    means = {"chosen": found.chosen, "rejected": found.rejected,
             "margins": found.chosen - found.rejected}  # fmt: skip
    for name, value in means.items():
        assert float(value.detach().mean()) == pytest.approx(logged[f"rewards/{name}"], rel=1e-4)
