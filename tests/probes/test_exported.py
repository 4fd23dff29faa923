"""Directions as llama.cpp and SAELens read them: the same change of the stream."""

import json

import numpy as np
import pytest
import torch

from pipeline.errors import RetraceError
from pipeline.probes import exported

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def written(tiny_activations, tmp_path_factory):
    """(directions by name, mean norms, folder of the exports)."""
    from safetensors.numpy import save_file

    out = tmp_path_factory.mktemp("directions")
    rng = np.random.default_rng(0)
    names = [f"{d}/{c}/{h}" for d in ("mean", "random") for c in ("a place", "animals")
             for h in HOOKS]  # fmt: skip
    found = {n: rng.normal(size=32).astype(np.float32) for n in names}
    found = {n: v / np.linalg.norm(v) for n, v in found.items()}
    norms = dict(zip(HOOKS, (3.0, 5.0), strict=True))
    file = out / "directions.safetensors"
    save_file(found, file, metadata={h: repr(n) for h, n in norms.items()})
    exported.export(str(file), str(tiny_activations), str(out / "out"))
    return found, norms, out


def test_a_control_vector_has_the_mean_norm_of_the_stream_and_no_tensor_of_block_0(written):
    from gguf import GGUFReader

    found, norms, out = written
    files = {f.name for f in (out / "out").glob("*.gguf")}
    assert files == {f"{d}.{c}.gguf" for d in ("mean", "random") for c in ("a_place", "animals")}
    reader = GGUFReader(out / "out/mean.a_place.gguf")
    assert reader.fields["general.architecture"].contents() == "controlvector"
    (tensor,) = reader.tensors
    assert tensor.name == "direction.1" and tensor.data.dtype == np.float32
    want = norms[HOOKS[1]] * found[f"mean/a place/{HOOKS[1]}"]
    np.testing.assert_allclose(tensor.data, want, rtol=1e-6)


@pytest.mark.parametrize(
    "hook, block", [("blocks.3.hook_resid_post", 3), ("blocks.3.hook_resid_pre", 2),
                    ("blocks.0.hook_resid_pre", -1)],
)  # fmt: skip
def test_a_hook_lies_behind_a_block(hook, block):
    """What block l + 1 reads is what block l leaves."""
    assert exported.block_of(hook) == block


def test_saelens_reads_the_rows_and_gives_their_projections(written):
    from sae_lens import SAE

    found, _, out = written
    folder = out / "out/saelens" / HOOKS[0]
    sae = SAE.load_from_disk(folder)
    names = json.loads((folder / "names.json").read_text())
    assert names == ["mean/a place", "mean/animals", "random/a place", "random/animals"]
    rows = np.stack([found[f"{name}/{HOOKS[0]}"] for name in names])
    np.testing.assert_array_equal(sae.W_dec.detach().numpy(), rows)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    want = (x @ torch.from_numpy(rows).T).relu()
    torch.testing.assert_close(sae.encode(x), want)
    assert sae.cfg.metadata.hook_name == HOOKS[0]


def test_what_is_no_file_of_steering_is_told(written, tiny_activations, tmp_path):
    from safetensors.numpy import save_file

    other = tmp_path / "other.safetensors"
    save_file({"weight": np.zeros(3, np.float32)}, other)
    with pytest.raises(RetraceError, match="no directions of the stage steering"):
        exported.read(other)
    with pytest.raises(RetraceError, match="not there; run a paper with a section steering"):
        exported.read(tmp_path / "none.safetensors")
    far = tmp_path / "far.safetensors"
    save_file({"a/b/blocks.7.hook_resid_post": np.ones(4, np.float32)}, far,
              metadata={"blocks.7.hook_resid_post": "1.0"})  # fmt: skip
    with pytest.raises(RetraceError, match=r"has no hook 'blocks\.7\.hook_resid_post'"):
        exported.export(str(far), str(tiny_activations), str(tmp_path / "out"))
