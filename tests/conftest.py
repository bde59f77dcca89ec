"""Without a GPU, Triton kernels are interpreted: that, and how many threads there are, is said before imports."""

import os

# tests run in two processes, and start others: each with threads for all cores would wait for the others'
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
