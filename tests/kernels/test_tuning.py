"""Opt-in tuning with a clock that is made up: what is timed, kept, read again and left out; off, nothing changes."""

from dataclasses import replace

import pytest
import torch
from oracle import check, make, tf32

import inrun_kernels as k
from inrun_kernels import tuning
from inrun_kernels.config import CHIPS, Tile, chip_named, matrix_tiles
from inrun_kernels.cost import CEILINGS, Sizes, predict

SIZES = Sizes(16, 1024, 768, 3072)
TILES = matrix_tiles(CHIPS["sm_90"], torch.bfloat16, 3072, 768, 1024, copies=True)


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Tuning on, in a folder of its own; the tiles that were timed. The smaller its area, the faster a tile."""
    seen: list[Tile] = []

    def made_up(run, tile):
        seen.append(tile)
        return tile.block_m * tile.block_n

    monkeypatch.setattr(tuning, "_time", made_up)
    k.tune(folder=tmp_path)
    yield seen
    k.tune(False)


def chosen(sizes: Sizes = SIZES, tiles=TILES, facts: str = "") -> Tile:
    x = torch.empty(0, dtype=torch.bfloat16)
    return tuning.choose("wgrad_dot", tiles, sizes, facts, x, run=lambda tile: None)


def test_off_nothing_is_timed_or_read(timed, tmp_path, monkeypatch):
    k.tune(False)
    monkeypatch.setattr(tuning, "_read", lambda path: pytest.fail("read a cache"))
    assert chosen() == TILES[0] and not timed and not list(tmp_path.iterdir())


def test_the_fastest_is_kept_for_its_class_of_shapes(timed, tmp_path):
    fastest = chosen()
    assert fastest == min(timed, key=lambda tile: tile.block_m * tile.block_n) != TILES[0]
    once = len(timed)
    assert chosen(replace(SIZES, tokens=600)) == fastest and len(timed) == once  # 600 and 1024 are of one class
    k.tune(folder=tmp_path)  # as in a new process: from the file
    assert chosen() == fastest and len(timed) == once
    chosen(replace(SIZES, tokens=1025))
    assert len(timed) > once
    chosen(facts="other strides")
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    assert torch.__version__ in next(tmp_path.iterdir()).name


def test_hopeless_candidates_are_not_timed(timed):
    seconds = {tile: predict("wgrad_dot", SIZES, CEILINGS["sm_90"], torch.bfloat16, tile).seconds for tile in TILES}
    chosen()
    assert set(timed) == {tile for tile in TILES if seconds[tile] <= 1.5 * min(seconds.values())} < set(TILES)


def test_a_tile_that_is_no_candidate_is_not_launched(timed, tmp_path):
    fastest = chosen()
    others = [tile for tile in TILES if tile != fastest]
    assert chosen(tiles=others) in others


def test_processes_add_to_one_file_and_a_broken_one_is_made_anew(timed, tmp_path):
    chosen()
    path = next(tmp_path.iterdir())
    mine = tuning._read(path)
    tuning._write(path, {"of another process": {}})
    assert tuning._read(path) == mine | {"of another process": {}}
    path.write_text("{")
    k.tune(folder=tmp_path)
    chosen()
    assert tuning._read(path) == mine
    path.write_bytes(b"\xff")
    k.tune(folder=tmp_path)
    chosen()
    assert tuning._read(path) == mine


def test_shapes_that_take_turns_are_each_timed_once(timed, monkeypatch):
    """Of one class, with other candidates: by alignment, or by how many tokens there are in all."""
    from inrun_kernels import tiles

    monkeypatch.setattr(tiles, "ON_CPU", "sm_80")
    seen = []
    for _ in range(2):
        for outputs, inputs in ((128, 128), (127, 128)):
            acts, grads = torch.randn(2, 40, inputs).bfloat16(), torch.randn(2, 40, outputs).bfloat16()
            direction = torch.randn(outputs, inputs).bfloat16()
            k.ghost_wgrad_dot(acts, grads, direction, form="prefix", backend="triton")
        for batch, tokens in ((3, 5), (4, 8)):
            acts = torch.randn(batch, tokens, 64).bfloat16()
            k.ghost_dot(acts, acts, torch.randn(64, 64).bfloat16(), backend="triton")
        seen.append(len(timed))
    assert seen[0] == seen[1] > 4


def test_launches_take_the_chosen_tile_and_stay_right(timed):
    case = make("linear", 3, 20, 72, 136, dtype=torch.float16, directions=2)
    check(case, "triton")
    val = make("linear", 2, 9, 72, 136, dtype=torch.float16, seed=1)
    found = k.ghost_dot_pairwise(case.x, case.grads, val.x, val.grads, backend="triton")
    kernels = {key.split()[0] for table in tuning._tables.values() for key in table}
    assert kernels == {"dot", "wgrad_dot", "pairwise"} and timed
    k.tune(False)
    plain = k.ghost_dot_pairwise(case.x, case.grads, val.x, val.grads, backend="triton")
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize(
    ("architecture", "taken"),
    [("sm_90", "sm_90"), ("sm_87", "sm_86"), ("sm_103", "sm_100"), ("sm_110", "sm_100"), ("sm_121", "sm_120"),
     ("sm_75", "gfx942"), ("gfx950", "gfx942")],
)  # fmt: skip
def test_a_chip_that_is_not_listed_is_taken_for_the_one_before_it(architecture, taken):
    assert chip_named(architecture) is CHIPS[taken]


def test_float32_is_multiplied_as_torch_is_told_to():
    from inrun_kernels.tiles import precision

    exact, half = torch.empty(0), torch.empty(0, dtype=torch.float16)
    assert precision(exact) == precision(half) == "ieee"
    with tf32():
        assert (precision(exact), precision(half)) == ("tf32", "ieee")
        check(make("linear", 2, 5, 16, 24), "triton")  # interpreted, it is exact nevertheless
