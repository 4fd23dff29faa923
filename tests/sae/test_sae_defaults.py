"""Every default of a dictionary against SAELens's own config classes, field by field.

What is set nowhere in paper.yaml is SAELens's choice, and where it is not, a reason stands here. A
field that SAELens gains has no line in THEIRS or DIFFERENT, and fails until somebody decides.
"""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from pipeline.job.source import import_file
from pipeline.papers import papers
from pipeline.sae.train import build
from pipeline.spec.sae import SaeSpec, SaeTraining

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/synth_sae_bench"
recovery = import_file(FOLDER / "recovery.py")
D_IN, D_SAE = 16, 32
ASKED = {  # what a paper.yaml must give
    "standard": {"l1_coefficient": 1.0},
    "gated": {"l1_coefficient": 1.0},
    "jumprelu": {"l0_coefficient": 1.0},
    "topk": {"k": 100},
    "batchtopk": {"k": 100},
    "matryoshka_batchtopk": {"k": 100},
    "matching_pursuit": {"k": 8},
}
COMMON = {
    "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "metadata", "decoder_init_norm",
}  # fmt: skip
TOPK = {"k", "use_sparse_activations", "aux_loss_coefficient", "rescale_acts_by_decoder_norm"}
THEIRS = {  # fields that were thought of: at SAELens's default unless they stand in DIFFERENT
    "standard": {"l1_coefficient", "lp_norm", "l1_warm_up_steps"},
    "gated": {"l1_coefficient", "l1_warm_up_steps"},
    "topk": TOPK,
    "batchtopk": TOPK | {"topk_threshold_lr"},
    "matryoshka_batchtopk": TOPK
    | {"topk_threshold_lr", "matryoshka_widths", "use_matryoshka_aux_loss"},
    "jumprelu": {
        "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode",
        "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "jumprelu_tanh_scale",
        "jumprelu_ste_to_input", "target_l0",
    },
    "matching_pursuit": {"residual_threshold", "max_iterations", "stop_on_duplicate_support"},
}  # fmt: skip
DIFFERENT = {  # (architecture, field) -> why
    ("matryoshka_batchtopk", "matryoshka_widths"): "SAELens's default, no width, is refused by "
    "SAELens; ours are the five of Bussmann et al. 2025",
    ("matching_pursuit", "max_iterations"): "SAELens's default, d_in, bounds a loop; ours is the k "
    "that paper.yaml must give",
    ("matching_pursuit", "decoder_init_norm"): "SAELens sets 1, its only choice, and warns",
}  # fmt: skip
OF_THE_BENCH = DIFFERENT | {  # what Recipe, the authors' released sweeps/common.py, changes further
    ("matching_pursuit", "residual_threshold"): "0 in the authors' get_mp_config",
    ("matching_pursuit", "stop_on_duplicate_support"): "False in the authors' get_mp_config",
    ("jumprelu", "target_l0"): "0, which the step penalty ignores; our controller has the target",
}
TRAINING = {  # SaeTraining's field -> SAELens's name, and why ours differs, or None
    "n_rows": ("training_tokens", "a paper says it; SAELens's two million are a placeholder"),
    "batch_size": ("train_batch_size_tokens", None),
    "lr": ("lr", None),
    "betas": (("adam_beta1", "adam_beta2"), None),
    "warmup_steps": ("lr_warm_up_steps", "short runs: Adam's first steps are its worst"),
    "decay_share": ("lr_decay_steps", "short runs: the last fifth to 0, as in SAELens's tutorials"),
    "dead_rows": ("dead_feature_window", "in rows, as a run is shorter than 1,000 steps of 4,096"),
    "normalize": ("normalize_activations", "coefficients carry over between layers and models"),
    "buffer_rows": ("n_batches_in_buffer", "rows come from shards, not from a running model"),
    "seed": ("seed", "0 everywhere in this repository"),
    "precision": ("autocast", None),
}  # fmt: skip


def default(field):
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else MISSING


def made(spec):
    """The SAELens config that a dictionary becomes."""
    return build(spec, D_IN).cfg


def offs(ours):
    """The fields of a config that are not at SAELens's default, those with none left out."""
    known = {f.name: default(f) for f in fields(ours) if f.name != "metadata"}
    return {n for n, d in known.items() if d is not MISSING and getattr(ours, n) != d}


@pytest.mark.filterwarnings("ignore:decoder_init_norm")
@pytest.mark.parametrize(
    ("kind", "reasons"), [(SaeSpec, DIFFERENT), (recovery.Recipe, OF_THE_BENCH)]
)
@pytest.mark.parametrize("architecture", THEIRS)
def test_defaults_are_saelenss_or_have_a_reason(architecture, kind, reasons):
    cfg = made(kind(architecture=architecture, d_sae=D_SAE, **ASKED[architecture]))
    names = {f.name for f in fields(cfg)}
    unknown, gone = names - COMMON - THEIRS[architecture], THEIRS[architecture] - names
    assert not unknown, f"SAELens gained {unknown}: offer it, or leave it, and say so"
    assert not gone, f"SAELens lost {gone}"
    found = offs(cfg) - {"d_in", "d_sae"}
    assert found == {field for name, field in reasons if name == architecture}


def test_every_architecture_is_compared():
    known = SaeSpec.model_fields["architecture"].annotation.__args__
    assert set(THEIRS) == set(ASKED) == set(known)


def test_the_schedule_is_saelenss_or_has_a_reason():
    """SAELens's runner for language models; what stands in TRAINING without a reason is equal."""
    from sae_lens.config import LanguageModelSAERunnerConfig

    ours = {n: f.default for n, f in SaeTraining.model_fields.items()}
    assert set(ours) - set(TRAINING) == {"eps", "checkpoint_seconds"}  # torch's Adam, and ours
    assert ours["eps"] == 1e-8
    theirs = {f.name: default(f) for f in fields(LanguageModelSAERunnerConfig)}
    for name, (field, reason) in TRAINING.items():
        if reason is None and name != "precision":
            want = tuple(map(theirs.get, field)) if isinstance(field, tuple) else theirs[field]
            assert ours[name] == want, name
    assert theirs["autocast"] is False and ours["precision"] == "float32"


def fixed_by_papers():
    """(paper, dictionary, its fields as the file has them) of every dictionary at every scale."""
    for path in sorted((ROOT / "rules/papers").glob("*/paper.yaml")):
        for scale in papers.load_yaml(path).get("scales", {}):
            paper = papers.load(path.parent, scale).spec
            for name, spec in (paper.sae.dictionaries if paper.sae else {}).items():
                yield path.parent.name, f"{scale}/{name}", spec


def test_topk_dictionaries_of_papers_say_their_auxiliary_coefficient():
    """1/32 is Gao et al.'s, not a default: each paper.yaml that has it says so."""
    seen = 0
    for paper, name, spec in fixed_by_papers():
        if "topk" in spec.architecture:
            assert "aux_loss_coefficient" in spec.model_fields_set, (paper, name)
            assert spec.aux_loss_coefficient in (0, 1 / 32), (paper, name)
            seen += 1
    assert seen > 20
