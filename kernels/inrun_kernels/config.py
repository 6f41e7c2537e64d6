"""Tile shapes and launch parameters of the Triton kernels: an analytic default from dtype and sizes.

No device is queried and triton is not imported here.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """An output tile of `block_m x block_n`, reduced `block_k` at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def matrix_tile(dtype: torch.dtype, m: int, n: int, k: int, *, accumulators: int = 1, aligned: bool = True) -> Tile:
    """Tile of a kernel for an m x n x k product that holds one or two accumulators of the tile's size.

    Half precision: 128 x 128 outputs in 8 warps keep the tensor cores busy; two accumulators and the operand
    they meet fill the registers at half that. Loads that cannot be vectorised (`aligned` False) need a register
    per address, and float32 runs on the ordinary cores: 64 x 64. Small sizes shrink the tile, no further than
    the 16 that a tensor-core instruction takes.
    """
    half = dtype != torch.float32
    largest = 128 if half and aligned else 64
    block_m, block_n = _fit(m, largest), _fit(n, largest // accumulators)
    if not half:
        return Tile(block_m, block_n, _fit(k, 16), 4 * accumulators, 2)
    deep = accumulators == 1 and aligned
    warps = 8 if block_m * block_n * accumulators > 64 * 128 else 4
    return Tile(block_m, block_n, _fit(k, 64 if deep else 32), warps, 3 if deep else 4)


def row_tile(width: int, columns: int = 512) -> tuple[int, int]:
    """(rows, columns) of a tile for one pass over `[rows, width]` memory: 2048 elements in 4 warps."""
    columns = _fit(width, columns)
    return 2048 // columns, columns


def sample_splits(tiles: int, n_samples: int, multiprocessors: int) -> int:
    """How many programs share the samples of one weight tile, so that a small weight still fills the device.

    Each split holds a partial weight gradient; at most half as many as samples, so that memory stays clear of
    one gradient per sample.
    """
    return max(1, min(n_samples // 2, multiprocessors // tiles))


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def _fit(size: int, largest: int) -> int:
    return min(largest, max(16, 1 << (size - 1).bit_length()))
