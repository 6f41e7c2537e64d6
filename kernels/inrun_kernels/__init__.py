"""Per-sample gradient products: what a sample's weight gradient says along a given direction.

Tensors in, tensors out; no modules, no hooks. Each function is one registered custom op with a Triton kernel (GPU),
kernels in C for the products a CPU needs most, and a torch/BLAS path for all; float32 accumulation and float32 results,
and no per-sample gradient in memory. Importing this package does not import triton, nor build anything.
"""

from inrun_kernels.api import (
    bias_dot,
    bias_wgrad_dot,
    embedding_dot,
    explain,
    ghost_dot,
    ghost_dot_pairwise,
    ghost_square,
    ghost_wgrad_dot,
    linear_wgrad_dot,
    norm_dot,
    norm_wgrad_dot,
)
from inrun_kernels.tuning import tune

__all__ = [
    "bias_dot",
    "bias_wgrad_dot",
    "embedding_dot",
    "explain",
    "ghost_dot",
    "ghost_dot_pairwise",
    "ghost_square",
    "ghost_wgrad_dot",
    "linear_wgrad_dot",
    "norm_dot",
    "norm_wgrad_dot",
    "tune",
]
