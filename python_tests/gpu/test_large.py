"""Logits of more than 2^31 entries: every index is 64 bits wide."""

import pytest
import torch

from sela_ext import kernels
from sela_ext.kernels.sinkhorn import pass_in_torch

# Just above 2^31 entries, one shape for every mapping: a warp, a block, a wide one, split rows.
SHAPES = ((67_200_000, 32), (2_150_000, 1000), (540_000, 4000), (240_000, 9000))
LARGER = 1 << 31


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_last_rows_of_very_large_logits_are_as_right_as_the_first(card, assert_equal_to_twin, dtype, rows, cols):
    assert rows * cols > LARGER
    if card.played:
        rows //= 20_000
    else:
        needed = rows * cols * torch.finfo(dtype).bits // 8 + rows * 48 + (2 << 30)
        free, _ = torch.cuda.mem_get_info(card.place)
        if free < needed:
            pytest.skip(f"{needed / 2**30:.0f} GiB of device memory are needed, {free / 2**30:.0f} GiB are free")
    logits = torch.empty(rows, cols, dtype=dtype, device=card.place)
    generator = torch.Generator(card.place).manual_seed(0)
    for part in logits.split(max(1, (1 << 26) // cols)):  # normal_ of more than 2^31 numbers is not taken for granted
        part.normal_(generator=generator)
    logits[rows - 3, cols - 1] = float("nan")
    potential = torch.randn(cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    found = kernels.sinkhorn_pass(logits, potential, scale=4.0, want_labels=True)
    assert found.masked == 1
    assert found.weight == rows - 1
    assert float(found.column_sums.sum()) == pytest.approx(rows - 1, rel=1e-5)
    count = min(rows, 2000)
    for part in (slice(0, count), slice(rows // 2, rows // 2 + count // 2), slice(rows - count, rows)):
        expected = pass_in_torch(logits[part], potential, scale=4.0, want_labels=True)
        torch.testing.assert_close(found.lse[part], expected.lse, rtol=3e-7, atol=1e-5, equal_nan=True)
        own = kernels.sinkhorn_pass(logits[part], potential, scale=4.0, want_labels=True)
        assert_equal_to_twin(own, expected, logits[part], potential, 4.0)
        assert torch.equal(own.labels, found.labels[part])
        assert torch.equal(own.lse.nan_to_num(), found.lse[part].nan_to_num())

    # The sums of the whole are those of its halves, computed on their own.
    halves = [kernels.sinkhorn_pass(part, potential, scale=4.0) for part in (logits[: rows // 2], logits[rows // 2 :])]
    together = halves[0].column_sums + halves[1].column_sums
    assert float((together - found.column_sums).abs().sum()) <= 1e-6 * rows
    assert sum(half.objective for half in halves) == pytest.approx(found.objective, rel=1e-9)
