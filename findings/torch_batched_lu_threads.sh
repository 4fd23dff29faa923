#!/usr/bin/env bash
# torch 2.13.0 (CPU wheel, oneMKL 2024.2): torch.linalg.solve of several matrices at once, on two
# threads, raises; on one thread, or one matrix at a time, it does not.
#
# Guess: a batch of well-conditioned matrices is solved as each of them is, whatever
#        torch.set_num_threads says.
# Seen:  with four positive definite 576 x 576 matrices in float64, torch.linalg.solve ends in
#        "RuntimeError: Pivots given to lu_solve must all be greater or equal to 1", after oneMKL has
#        written "Parameter 6 was incorrect on entry to DLASWP" 32 times. The same call on one thread
#        is right to 1e-13, so are the four solved one by one on two threads, and so is a batched
#        Cholesky on two threads. Three of three attempts, on an AMD EPYC with AVX-512.
# Here:  ridge probes of several layers are solved by Cholesky (pipeline/probes/closed.py).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$work"
timeout 300 "$work/venv/bin/python" -W ignore - << 'PYTHON' 2> "$work/said" || { grep -v "^$" "$work/said" | sort -u | head -5; exit 1; }
import sys

import torch

draw = torch.Generator().manual_seed(0)
X = torch.randn(4, 1152, 576, generator=draw, dtype=torch.float64)
A, B = X.mT @ X, torch.randn(4, 576, 5, generator=draw, dtype=torch.float64)


def residual(solved):
    return float((A @ solved - B).abs().max())


torch.set_num_threads(1)
print("one thread:             ", found := [residual(torch.linalg.solve(A, B))])
torch.set_num_threads(2)
found.append(residual(torch.stack([torch.linalg.solve(a, b) for a, b in zip(A, B)])))
print("two threads, one by one:", found[-1])
found.append(residual(torch.cholesky_solve(B, torch.linalg.cholesky(A))))
print("two threads, Cholesky:  ", found[-1])
try:
    torch.linalg.solve(A, B)
    said = "no error"
except RuntimeError as error:
    said = str(error)
print("two threads, together:  ", said)
sys.exit(not (max(found) < 1e-10 and said.startswith("Pivots given to lu_solve")))
PYTHON
