"""Linear probes of a job, kept for those who write what was read: name -> weights. [torch]

A safetensors file holds float32 [C d+1] under `label/method/hook`: a row a class, for activations
as they are, the bias last. Its metadata name the classes of each label.
"""

import json
from pathlib import Path

import numpy as np

from pipeline.errors import RetraceError, nearest
from pipeline.store import tables


class Directions:
    """Linear probes by label, method and hook."""

    def __init__(self) -> None:
        self.weights: dict[str, np.ndarray] = {}
        self.classes: dict[str, list[str]] = {}

    def add(self, label: str, method: str, hook: str, classes: list[str], W: np.ndarray) -> None:
        """Keep a probe's weights [C d+1]."""
        self.weights[f"{label}/{method}/{hook}"] = np.ascontiguousarray(W, np.float32)
        self.classes[label] = classes

    def of(self, label: str, method: str, hook: str) -> np.ndarray:
        """Weights [C d+1] of a probe.

        Raises:
            RetraceError: there is none.
        """
        name = f"{label}/{method}/{hook}"
        if name not in self.weights:
            raise RetraceError(f"no probe '{name}' was fitted{nearest(name, self.weights)}")
        return self.weights[name]

    def towards(self, label: str, method: str, hook: str, name: str) -> np.ndarray:
        """The direction [d] of a class against the mean of the others; of two, their difference."""
        if name not in self.classes.get(label, []):
            known = self.classes.get(label, [])
            raise RetraceError(
                f"probes.labels.{label}: has no class '{name}'{nearest(name, known)}"
            )
        W, i = self.of(label, method, hook)[:, :-1], self.classes[label].index(name)
        return W[i] - np.delete(W, i, 0).mean(0)

    def write(self, path: str | Path, certificate: dict) -> None:
        """Write all probes as safetensors, with a certificate."""
        from safetensors.numpy import save_file

        metadata = {"classes": json.dumps(self.classes)}
        tables.atomically(path, lambda to: save_file(self.weights, to, metadata=metadata))
        tables.stamp_safetensors(path, certificate)

    @classmethod
    def read(cls, path: str | Path) -> "Directions":
        """What `write` wrote."""
        from safetensors import safe_open

        out = cls()
        with safe_open(path, "numpy") as file:
            out.weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            out.classes = json.loads(file.metadata()["classes"])
        return out
