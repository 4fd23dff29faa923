"""Rows of the tables heads, eigenvalues and composition of one model: what its weights say."""

from typing import Any

import numpy as np
import pandas as pd

from pipeline.circuits import head_circuits

INDUCTION = 0.5  # prefix matching of an induction head


def previous_head(rows: pd.DataFrame) -> int | None:
    """The head of the first layer that attends most to the token before, where there are others."""
    if rows["layer"].max() == 0:
        return None
    first = rows[rows["layer"] == 0]
    return int(first.loc[first["previous_token"].idxmax(), "head"])


def read_weights(
    shape: Any, n_tokens: int, columns: dict, rows: pd.DataFrame, state: dict[str, np.ndarray]
) -> tuple[list[dict], list[dict]]:
    """Rows of the tables heads and eigenvalues of one model.

    Args:
        shape: its architecture.
        n_tokens: tokens whose embeddings count, the first ones.
        columns: those that name the model.
        rows: its rows of the table scores.
    """
    W_E, W_U = head_circuits.embeddings(state, n_tokens)
    made = head_circuits.heads(state, shape.n_layers, shape.n_heads)
    previous, out, values = previous_head(rows), [], []
    for row in rows.itertuples():
        head = made[row.layer][row.head]
        earlier = made[0][previous] if row.layer and previous is not None else None
        found = {
            "OV": head_circuits.ov_eigenvalues(head, W_E, W_U),
            "QK": head_circuits.qk_eigenvalues(head, W_E, earlier),
        }
        place = columns | {"layer": row.layer, "head": row.head}
        smear = state.get(f"model.layers.{row.layer}.attn.k.smear")
        own_key = np.nan if smear is None else float(1 / (1 + np.exp(-smear[row.head])))
        scores = {"prefix_matching": row.prefix_matching, "previous_token": row.previous_token}
        signs = {"copying": "OV", "matching": "QK"}
        scores |= {name: head_circuits.positivity(found[c]) for name, c in signs.items()}
        role = "previous token" if row.layer == 0 and row.head == previous else "other"
        role = "induction" if row.prefix_matching > INDUCTION else role
        out.append(place | scores | {"own_key": own_key, "role": role})
        for circuit, eigenvalues in found.items():
            of = place | {"circuit": circuit}
            numbers = enumerate(eigenvalues)
            values += [of | {"index": i, "real": v.real, "imag": v.imag} for i, v in numbers]
    return out, values


def composed(shape: Any, columns: dict, state: dict[str, np.ndarray]) -> list[dict]:
    """Rows of the table composition of one model of two layers."""
    first, second = head_circuits.heads(state, shape.n_layers, shape.n_heads)
    random = head_circuits.baseline(shape.d_model, shape.head_size, np.random.default_rng(0))
    return [
        columns | {"kind": kind, "earlier": i, "later": j, "score": score}
        | dict(zip(("baseline", "baseline_sd"), random[kind], strict=True))
        for i, earlier in enumerate(first)
        for j, later in enumerate(second)
        for kind, score in head_circuits.composition(earlier, later).items()
    ]  # fmt: skip
