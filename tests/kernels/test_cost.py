"""The static model of times, by numbers worked out by hand."""

import pytest
import torch

from inrun_kernels.config import Tile
from inrun_kernels.cost import CEILINGS, Ceilings, Sizes, default_tile, predict

TILE = Tile(64, 64, 16, 8, 3)
DEVICE = Ceilings(matrix=1e12, plain=1e11, memory=1e10, cache=1e11, multiprocessors=4, launch=1e-6, latency=1e-7)


def test_one_full_wave_of_a_product():
    """4 tiles of 64 x 64 with prefix, 8 samples of 32 tokens: 128 x 128 weights."""
    found = predict("wgrad_dot", Sizes(8, 32, 128, 128), DEVICE, torch.bfloat16, TILE, "prefix")
    assert found.compute > (2 * 8 * 32 * 128 * 128) / 1e12
    assert found.memory == pytest.approx((2 * (256 * 256 + 128 * 128) + 4 * 128 * 128) / 1e10)
    assert found.cache == pytest.approx(4 * 8 * 2 * (64 + 64) * 16 * 2 / 1e11)
    assert found.seconds == max(found.compute, found.memory, found.cache) + found.fill + 1e-6


def test_what_is_padded_or_left_idle_costs():
    whole = predict("dot", Sizes(4, 64, 64, 64), DEVICE, torch.float16, TILE)
    assert whole.compute == pytest.approx(4 * 64 * 64 * (2 * 64 / 1e12 + 3 / 1e11))  # four tiles on four processors
    ragged = predict("dot", Sizes(4, 64, 65, 65), DEVICE, torch.float16, TILE)  # 8 tiles, 80 deep: padded, not idle
    assert ragged.compute == pytest.approx(8 * 64 * 64 * (2 * 80 / 1e12 + 3 / 1e11))
    alone = predict("dot", Sizes(1, 64, 64, 64), DEVICE, torch.float16, TILE)
    assert alone.compute == pytest.approx(whole.compute)  # a quarter of the work on a quarter of the device


def test_terms_without_a_tile_and_of_rows():
    sizes = Sizes(2, 100, 30, 40)
    passes = 3 * 4 * 30 * 40 * 2
    two = predict("wgrad_dot", sizes, DEVICE, torch.float32)
    assert two.compute == pytest.approx(2 * 200 * 30 * 40 / 1e12 + passes / 1e11)
    prefix = predict("wgrad_dot", sizes, DEVICE, torch.float32, form="prefix")
    assert two.compute - prefix.compute == pytest.approx(2 / 3 * passes / 1e11)
    assert predict("rows", sizes, DEVICE, torch.bfloat16).memory == pytest.approx(2 * 200 * 40 / 1e10)
    pairs = predict("pairwise", Sizes(2, 100, 30, 40, val_samples=3, val_tokens=10), DEVICE, torch.float32)
    assert pairs.compute == pytest.approx(2 * 200 * 30 * 70 / 1e12)
    with pytest.raises(ValueError, match="kernel: expected 'wgrad_dot', 'dot', 'pairwise' or 'rows', received 'gemm'"):
        predict("gemm", sizes, DEVICE, torch.float32)


@pytest.mark.parametrize("architecture", list(CEILINGS))
def test_no_prediction_beats_the_device(architecture):
    sizes, device = Sizes(16, 1024, 768, 3072, val_samples=1, val_tokens=1024), CEILINGS[architecture]
    for kernel, width in (("wgrad_dot", 768 * 3072), ("dot", 768 * 3072), ("pairwise", 1024 * (768 + 3072))):
        tile = default_tile(kernel, sizes, architecture, torch.bfloat16)
        assert predict(kernel, sizes, device, torch.bfloat16, tile).seconds > 2 * 16 * 1024 * width / device.matrix
