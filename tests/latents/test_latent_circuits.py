"""Curves of a circuit of latents."""

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.latents import latent_circuits


@pytest.mark.parametrize("none, share", [(1.0, 0.5), (3.0, np.nan), (4.0, np.nan)])
def test_no_share_of_a_metric_that_no_circuit_has_to_restore(none, share):
    """m is 3 of the whole model: where none has as much, nothing is left to explain."""

    class Ablation:
        class sites:
            class task:
                before = torch.tensor([3.0])

        def metric(self, circuits, complement=False):
            return torch.tensor([[none if not c else (none + 3) / 2] for c in circuits])

    rows = latent_circuits.curves([latent_circuits.Kind("random", Ablation(), [0])])
    assert rows[-1]["faithfulness"] == pytest.approx(share, nan_ok=True)
    assert rows[0]["faithfulness"] == pytest.approx(0 if none < 3 else np.nan, nan_ok=True)


def test_a_curve_has_the_model_at_its_end_and_the_complement_where_it_is_taken_out():
    """m is the number of nodes kept, of four."""

    class Ablation:
        class sites:
            class task:
                before = torch.tensor([4.0])

        def metric(self, circuits, complement=False):
            kept = [4 - len(c) if complement else len(c) for c in circuits]
            return torch.tensor(kept, dtype=torch.float)[:, None]

    kinds = [latent_circuits.Kind(f"k {i}", Ablation(), [0, 1, 2, 3], i == 1) for i in (0, 1)]
    done = []
    rows = pd.DataFrame(latent_circuits.curves(kinds, done.append))
    assert done == [1, 2] and set(rows["kind"]) == {"k"}
    whole, gone = (rows[rows["draw"] == f"k {i}"] for i in (0, 1))
    assert gone["n_nodes"].tolist() == [0, 1, 2, 4]
    assert gone["faithfulness"].tolist() == [0, 0.25, 0.5, 1]
    assert gone["completeness"].tolist() == [1, 0.75, 0.5, 0]
    assert whole["completeness"].isna().tolist() == [False, True, True, True]
