"""How long a product should take: a static model of its FLOPs, bytes and programs against a device's ceilings.

A bound from below by what overlaps (the largest of arithmetic, device memory and cache) plus what does not (a launch,
the first loads of each wave of programs, pieces that are added up). It is for choosing between tiles and for finding
what a measured time is short of. But for two ceilings of the H100 nothing in it was fitted.
It knows nothing of TF32, of a bias that is a pass of its own, and of how pairs are split.
"""

from dataclasses import dataclass

import torch

from inrun_kernels.config import (
    Share,
    Tile,
    ceil_div,
    chip_named,
    matrix_tiles,
    resident_programs,
    share,
    wgrad_accumulators,
)


@dataclass(frozen=True)
class Ceilings:
    """What a device does in a second. A term whose ceiling is None is left out."""

    matrix: float  # FLOPs of matrix products in the inputs' dtype
    plain: float  # FLOPs of float32 outside of them
    memory: float  # bytes of device memory, read and written
    cache: float | None = None  # bytes from the last cache to the multiprocessors
    multiprocessors: int = 1
    launch: float = 0.0  # seconds to start a kernel
    latency: float = 0.0  # seconds from a load to its data


# Datasheets of A100 80GB SXM, H100 SXM, B200, RTX 5090 and MI300X, dense half precision; A100's cache at the 5120 bytes
# per clock of its whitepaper. Of H100's, matrix products are at the rate that `bench_kernels` measured on an H200, and
# the cache at one with which the model says what it measured of the form "two".
CEILINGS = {
    "sm_80": Ceilings(312e12, 19.5e12, 2.04e12, 7.2e12, 108, 4e-6, 0.8e-6),
    "sm_90": Ceilings(805e12, 67e12, 3.35e12, 11e12, 132, 4e-6, 0.8e-6),
    "sm_100": Ceilings(2250e12, 80e12, 8e12, None, 148, 4e-6, 0.8e-6),
    "sm_120": Ceilings(209e12, 105e12, 1.79e12, None, 170, 4e-6, 0.8e-6),
    "gfx942": Ceilings(1307e12, 163e12, 5.3e12, None, 304, 4e-6, 0.8e-6),
}


@dataclass(frozen=True)
class Sizes:
    """Of one product. `val_samples` of `val_tokens` are the pairwise product's."""

    batch: int
    tokens: int
    inputs: int
    outputs: int
    directions: int = 1
    val_samples: int = 0
    val_tokens: int = 0


@dataclass(frozen=True)
class Terms:
    """Seconds of each part of a prediction; `seconds` is all of it."""

    compute: float
    memory: float
    cache: float
    fill: float
    launch: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.cache) + self.fill + self.launch


def predict(
    kernel: str, sizes: Sizes, device: Ceilings, dtype: torch.dtype, tile: Tile | None = None, form: str = "two"
) -> Terms:
    """The time of one kernel, by its parts.

    Args:
        kernel: "wgrad_dot", "dot", "pairwise", or "rows" (norm, bias and embedding products over `outputs`).
        sizes, dtype: of the inputs; directions in the same dtype.
        device: its ceilings, of CEILINGS or measured.
        tile: of the Triton kernel. None: one pass of the whole product, as on a CPU, which has the ceilings' rates at
            any size; "two" then adds three passes over a weight for each sample, at the cache's rate.
        form: of "wgrad_dot", as in `ghost_wgrad_dot`.

    Example:
        >>> tile = default_tile("wgrad_dot", Sizes(16, 1024, 768, 3072), "sm_90", torch.bfloat16)
        >>> predict("wgrad_dot", Sizes(16, 1024, 768, 3072), CEILINGS["sm_90"], torch.bfloat16, tile).seconds
    """
    item, rows, weight = dtype.itemsize, sizes.batch * sizes.tokens, sizes.inputs * sizes.outputs
    if kernel == "rows":
        nbytes = item * rows * sizes.outputs
        return Terms(
            2 * rows * sizes.outputs / device.plain, nbytes / device.memory, 0.0, device.latency, device.launch
        )
    rate = device.plain if dtype == torch.float32 and tile else device.matrix
    m, n, depth, samples, copies = _product(kernel, sizes)
    written = 4 * weight if kernel == "wgrad_dot" else 4 * rows
    read = item * (rows * (sizes.inputs + sizes.outputs) + (sizes.directions * weight if kernel != "pairwise" else 0))
    if kernel == "pairwise":
        read += item * sizes.val_samples * sizes.val_tokens * (sizes.inputs + sizes.outputs)
    memory = (read + written) / device.memory
    if tile is None:
        passes = (3 if form == "two" else 1) * 4 * weight * samples if kernel == "wgrad_dot" else 0
        compute = 2 * m * n * depth * samples * copies / rate + passes / (device.cache or device.memory)
        return Terms(compute, memory, 0.0, device.latency, device.launch)
    accumulators = _accumulators(kernel, form)
    tiles = ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n) * copies
    slots = device.multiprocessors * resident_programs(tile, accumulators)
    plan = Share(tiles)
    if kernel == "wgrad_dot":
        units = samples * ceil_div(depth, tile.block_k) if form == "prefix" and dtype != torch.float32 else samples
        filled = m * n / (tiles * tile.block_m * tile.block_n)
        plan = share(tiles, units, samples, samples * depth, slots, filled)
    area, blocks = tile.block_m * tile.block_n, samples * ceil_div(depth, tile.block_k)
    # Programs that share a multiprocessor share its rate: what idles is a multiprocessor with one program fewer.
    busy = ceil_div(tiles, device.multiprocessors)
    if plan.programs:
        busy = (plan.whole + plan.per / units * slots) / device.multiprocessors
    busy *= device.multiprocessors / tiles
    # Contractions wait for the matrix instructions. Of a weight's tile, a direction's element is widened as well: on an
    # H100 three instructions for each, which count as two operations.
    contracted = 6 * samples * max(1, sizes.directions) if kernel == "wgrad_dot" else 3
    compute = tiles * area * (2 * blocks * tile.block_k / rate + contracted / device.plain) * busy
    cached = tiles * blocks * (tile.block_m + tile.block_n) * tile.block_k * item
    cache = cached / device.cache * busy if device.cache else 0.0
    fill = ceil_div(tiles, slots) * device.latency
    if plan.programs:  # pieces, written and read
        fill += 8 * plan.pieces * area / device.memory + device.launch
    return Terms(compute, memory, cache, fill, device.launch)


def default_tile(
    kernel: str,
    sizes: Sizes,
    architecture: str,
    dtype: torch.dtype,
    form: str = "two",
    *,
    direction: torch.dtype | None = None,
    documents: bool = False,
) -> Tile:
    """The tile that a launch takes where its operands are aligned.

    Args:
        direction: its dtype; None: as the inputs'.
        documents: whether the samples of "wgrad_dot" are told apart by offsets, which forbid copies by descriptors.
    """
    m, n, depth, _, _ = _product(kernel, sizes)
    chip = chip_named(architecture)
    copies = chip.copies and dtype != torch.float32
    kept = (direction or dtype).itemsize if kernel == "wgrad_dot" and sizes.directions else 0
    kept = kept if copies or form != "prefix" else min(kept, 2)
    of_wgrad = kernel == "wgrad_dot"
    accumulators = wgrad_accumulators(form, kept, sizes.directions) if of_wgrad else _accumulators(kernel, form)
    return matrix_tiles(
        chip, dtype, m, n, depth, accumulators=accumulators, copies=copies and not documents, kept=kept
    )[0]


def _accumulators(kernel: str, form: str) -> int:
    return 2 if kernel == "pairwise" or (kernel == "wgrad_dot" and form == "two") else 1


def _product(kernel: str, sizes: Sizes) -> tuple[int, int, int, int, int]:
    """(m, n, depth, samples, copies): an m x n product, `depth` deep for each of `samples`, for each of `copies`."""
    rows = sizes.batch * sizes.tokens
    if kernel == "wgrad_dot":
        return sizes.outputs, sizes.inputs, sizes.tokens, sizes.batch, 1
    if kernel == "dot":
        return rows, min(sizes.inputs, sizes.outputs), max(sizes.inputs, sizes.outputs), 1, sizes.directions
    if kernel == "pairwise":
        return rows, sizes.val_samples * sizes.val_tokens, sizes.inputs + sizes.outputs, 1, 1
    raise ValueError(f"kernel: expected 'wgrad_dot', 'dot', 'pairwise' or 'rows', received {kernel!r}")
