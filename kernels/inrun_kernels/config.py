"""Tile shapes and launch parameters of the Triton kernels: what each chip offers, and an analytic default.

No device is queried and triton is not imported here.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Chip:
    """What the defaults need to know of an architecture."""

    shared: int  # bytes of shared memory that one program may use
    copies: bool = False  # has an engine that copies tiles to shared memory: tensor descriptors
    asynchronous: bool = False  # matrix instructions write registers while the program runs on
    accumulates_apart: bool = False  # matrix results stay out of the registers (tensor memory)


CHIPS = {
    "sm_80": Chip(163 * 1024),
    "sm_86": Chip(99 * 1024),
    "sm_89": Chip(99 * 1024),
    "sm_90": Chip(227 * 1024, copies=True, asynchronous=True),
    "sm_100": Chip(227 * 1024, copies=True, accumulates_apart=True),
    "sm_120": Chip(99 * 1024, copies=True),
    "gfx942": Chip(64 * 1024),
}


def chip_named(architecture: str) -> Chip:
    """The chip of an architecture, or the last one listed before it: sm_103 is taken for sm_100, sm_121 for sm_120.

    One from before all of them is taken to have what any GPU has: pointer loads and the least shared memory.
    """
    if architecture in CHIPS or not architecture.startswith("sm_"):
        return CHIPS.get(architecture, CHIPS["gfx942"])
    before = [name for name in CHIPS if name.startswith("sm_") and int(name[3:]) < int(architecture[3:])]
    return CHIPS[before[-1] if before else "gfx942"]


@dataclass(frozen=True)
class Tile:
    """An output tile of `block_m x block_n`, reduced `block_k` at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Best first. 128 x 256 has the tensor cores wait least for shared memory; it fills the registers of a
# multiprocessor with one accumulator, 128 x 128 with two.
_TILES = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 32, 8, 4),
    Tile(128, 128, 64, 8, 6),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 64, 8, 5),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 32, 8, 4),
    Tile(128, 128, 32, 8, 3),
    Tile(128, 64, 64, 8, 3),
    Tile(128, 64, 32, 8, 4),
    Tile(128, 64, 32, 8, 3),
    Tile(64, 64, 32, 8, 3),
    Tile(64, 32, 32, 4, 3),
)
# Tokens that the tensor cores multiply while a piece of a tile is written, read and added to others.
_PIECE = 1500
# On the ordinary cores, an output to 32 of which each thread reads 12 numbers; TF32 fits as well.
_FLOAT32 = (Tile(64, 64, 32, 4, 3), Tile(64, 64, 16, 4, 3), Tile(64, 64, 16, 8, 3), Tile(64, 32, 16, 4, 3))


@lru_cache(4096)
def matrix_tiles(
    chip: Chip,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    *,
    accumulators: int = 1,
    copies: bool = False,
    aligned: bool = True,
    kept: int = 0,
) -> tuple[Tile, ...]:
    """Tiles for an m x n x k product that fit the chip, the default first.

    `accumulators` of the tile's size stay in registers; `kept` bytes for each element of the output tile lie in
    shared memory beside the operands, which are there once for each stage (one less where matrix instructions take
    them from registers). Without `copies` the addresses and what the accumulators meet take registers
    too: half the tile, and 64 x 64 where loads cannot be vectorised (`aligned` False). float32 has tiles of its own.
    Small sizes shrink a tile, no further than the 16 that a tensor-core instruction takes.
    """
    if dtype == torch.float32:
        tiles = _FLOAT32 if aligned else _FLOAT32[-1:]
        fitted = (replace(t, block_m=_fit(m, t.block_m), block_n=_fit(n, t.block_n), block_k=_fit(k, t.block_k))
                  for t in tiles)  # fmt: skip
        return tuple(dict.fromkeys(fitted))
    largest = (128 * 256 if copies else 128 * 128 if aligned else 64 * 64) // accumulators
    if chip.accumulates_apart:
        largest = min(largest, 128 * 128)  # one that is read at every sample's end meets the direction in registers
    fitting = []
    for tile in _TILES:
        held = tile.num_stages if copies or chip.asynchronous else tile.num_stages - 1
        shared = (tile.block_m + tile.block_n) * tile.block_k * 2 * held + kept * tile.block_m * tile.block_n
        shared += 1024 if copies else 0  # barriers, reductions
        if kept and tile.num_stages == 6:
            continue  # slower on an H200 than four, where a direction waits as well
        if tile.block_m * tile.block_n > largest or shared > chip.shared or (not copies and tile.block_k > 32):
            continue
        block_m, block_n = _fit(m, tile.block_m), _fit(n, tile.block_n)
        small = block_m * block_n * accumulators <= 64 * 128 and aligned
        warps = 4 if small else tile.num_warps
        tile = replace(tile, block_m=block_m, block_n=block_n, block_k=_fit(k, tile.block_k), num_warps=warps)
        if tile not in fitting:
            fitting.append(tile)
    return tuple(fitting)


def wgrad_accumulators(form: str, kept: int, directions: int) -> int:
    """For how many tiles a program of a weight gradient has registers: "two", or one and, of several float32
    directions, what reads them at each sample's end. `kept` as in `matrix_tiles`."""
    return 2 if form != "prefix" or (kept == 4 and directions > 1) else 1


def resident_programs(tile: Tile, accumulators: int, beside: int = 64) -> int:
    """Programs that share a multiprocessor's 65536 registers, with so many in each thread `beside` the accumulators."""
    return max(1, 65536 // (accumulators * tile.block_m * tile.block_n + beside * 32 * tile.num_warps))


@lru_cache(1024)
def sample_splits(tiles: int, n_samples: int, slots: int) -> int:
    """How many programs share the samples of one tile, so that few tiles still fill the device, and more than fill it
    leave little of it idle at the end.

    The fewest that finish first: `slots` programs run at once, and each costs its samples, and about a quarter of a
    sample for its start and its store.
    """
    most = max(1, min(n_samples, max(4, slots // tiles)))
    return min(range(1, most + 1), key=lambda n: ceil_div(tiles * n, slots) * (ceil_div(n_samples, n) + 0.25))


@dataclass(frozen=True)
class Share:
    """Who has which tiles of a weight gradient: one program each of the first `whole`, `programs` together the others.

    A shared tile's units begin `span` after those of the one before it, and each program has the next `per` of all.
    """

    whole: int
    programs: int = 0
    span: int = 0
    per: int = 0
    pieces: int = 0  # of tiles, at most, that their programs write


@lru_cache(1024)
def share(tiles: int, units: int, n_samples: int, n_tokens: int, slots: int, filled: float = 1.0) -> Share:
    """How `slots` programs that run at once share `tiles` of `units` (samples, or parts of them) each.

    What fills the slots has a program to a tile. The rest is shared where that is quicker: by equal parts of each tile,
    or, where there is more than one program to a tile but not two, by equal parts of all. Each program then leaves a
    piece, at a price of _PIECE tokens. All pieces take less memory than 5 of 8 samples' gradients would, of tiles of
    which so much is `filled`.
    """
    rest = tiles % slots
    most = min(slots, int(rest * (n_samples * 5 / 8 * filled - 1)))
    if rest == 0 or most <= rest:
        return Share(tiles)
    of_tile = most // rest
    if of_tile > 1:
        per = ceil_div(units, of_tile)
        span = per * ceil_div(units, per)
    else:
        per, span = ceil_div(rest * units, most), units
    if per + units * _PIECE / max(1, n_tokens) >= units:
        return Share(tiles)
    programs = ceil_div(rest * span, per)
    return Share(tiles - rest, programs, span, per, programs + rest)


def row_tile(rows: int, width: int, element_size: int, *, sums: bool) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile for one pass over `[rows, width]` memory.

    With column sums 64 rows of 256 bytes, so that the sums are few beside what they are of; else a row to each warp.
    """
    columns = _fit(width, 256 // element_size if sums else 256)
    if sums:
        return _fit(rows, 64), columns, 8
    return 2048 // columns, columns, 4


def column_tile(tokens: int, width: int, element_size: int) -> tuple[int, int]:
    """(tokens, columns) of a program that sums columns: 256 bytes of as many rows as a sample has, or 128."""
    return 32 if tokens <= 32 else 128, _fit(width, 256 // element_size)


def norm_tile(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile of whole rows: 16 elements to a thread."""
    columns = _power_of_two(width)
    return max(1, 2048 // columns), columns, max(4, columns // 512)


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def _fit(size: int, largest: int) -> int:
    return min(largest, _power_of_two(size))


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
