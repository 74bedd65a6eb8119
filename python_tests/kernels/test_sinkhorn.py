"""The fused pass: equal to its twin, to itself on any number of threads, and unharmed by bad rows."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext import kernels
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import reference

ISAS = ("generic", "avx2", "avx512")
BEST = ISAS.index(sela_ext.build_info()["cpu_isa"])
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# rows and columns that are multiples of nothing, of everything, and larger than 16-bit numbers
SIZES = ((1, 1), (2, 31), (31, 33), (129, 128), (300, 1), (130, 1001), (257, 300), (5, 70_001))


def case(rows, cols, dtype=torch.float32, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, cols, generator=generator)).to(dtype)
    potential = spread * torch.randn(cols, generator=generator, dtype=torch.float64)
    return logits, potential


def assert_equal_to_twin(found, expected, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    total = max(expected.weight, 1e-30)
    assert float((found.column_sums - expected.column_sums).abs().sum()) <= tolerance * total
    assert found.masked == expected.masked
    assert found.weight == pytest.approx(expected.weight, rel=1e-12)
    assert found.objective == pytest.approx(expected.objective, rel=2e-7, abs=2e-6 * total)
    torch.testing.assert_close(found.lse, expected.lse, rtol=3e-7, atol=5e-6, equal_nan=True)
    if expected.labels is not None:
        assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize("isa", ISAS[: BEST + 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 1.0, 20.0])
def test_kernel_equals_twin_with_and_without_reference(isa, dtype, spread):
    for rows, cols in SIZES:
        logits, potential = case(rows, cols, dtype, spread)
        weights = torch.rand(rows, generator=torch.Generator().manual_seed(1))
        expected = reference.sinkhorn_pass(logits, potential, scale=25.0, row_weights=weights, want_labels=True)
        before = None
        for _ in range(3):
            found = kernels.sinkhorn_pass(
                logits, potential, scale=25.0, row_weights=weights, reference=before, want_labels=True, isa=isa
            )
            assert_equal_to_twin(found, expected, dtype)
            before = found.lse


@pytest.mark.parametrize("isa", ISAS[: BEST + 1])
def test_every_half_and_bfloat16_number_is_read_exactly(isa):
    bits = np.arange(65536, dtype=np.uint16)
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.from_numpy(bits.view(np.int16)).view(dtype)
        values = values[torch.isfinite(values) & (values.abs() < 1e30)]
        logits = values[:, None].contiguous()
        found = kernels.sinkhorn_pass(logits, [0.0], isa=isa)  # one column: lse = logit
        expected = values.float()
        expected[expected.abs() < 1.2e-38] = 0.0  # float32 denormals count as zero
        torch.testing.assert_close(found.lse, expected, rtol=1.2e-7, atol=2e-7)


def test_the_twins_are_reached_from_the_package_without_an_import(tmp_path):
    code = (
        "import sys, numpy as np, sela_ext; x = np.eye(3, dtype=np.float32);"
        "sela_ext.kernels.sinkhorn_pass(x, np.zeros(3)); assert 'torch' not in sys.modules;"
        "print(sela_ext.kernels.reference.sinkhorn_pass(x, np.zeros(3)).weight)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.strip() == "3.0", done.stderr


def test_the_environment_chooses_the_instruction_set_of_the_kernels(tmp_path):
    code = (
        "import numpy as np, sela_ext; from sela_ext import kernels;"
        "x = np.random.default_rng(0).standard_normal((257, 333)).astype(np.float32);"
        "s = kernels.sinkhorn_pass(x, np.zeros(333), scale=25.0);"
        "print(sela_ext.build_info()['cpu_isa'], s.column_sums.tobytes().hex())"
    )
    x = np.random.default_rng(0).standard_normal((257, 333)).astype(np.float32)
    for isa in ISAS[: BEST + 1]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "SELA_CPU_ISA": isa},
            cwd=tmp_path,  # elsewhere, or the source folder would hide the installed package
            check=False,
        )
        assert done.returncode == 0, done.stderr
        name, columns = done.stdout.split()
        here = kernels.sinkhorn_pass(x, np.zeros(333), scale=25.0, isa=isa)
        assert (name, columns) == (isa, here.column_sums.tobytes().hex())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 20.0])
def test_bits_do_not_depend_on_threads(dtype, spread):
    logits, potential = case(3001, 301, dtype, spread)
    weights = torch.rand(3001)
    passes = [
        kernels.sinkhorn_pass(logits, potential, scale=25.0, row_weights=weights, want_labels=True, threads=threads)
        for threads in (1, 2, 3, 4, 7)
    ]
    for other in passes[1:]:
        assert torch.equal(other.column_sums, passes[0].column_sums)
        assert torch.equal(other.lse, passes[0].lse)
        assert torch.equal(other.labels, passes[0].labels)
        assert (other.objective, other.weight) == (passes[0].objective, passes[0].weight)


@pytest.mark.parametrize("isa", ISAS[: BEST + 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cols", "spread"), [(31, 1.0), (333, 0.1), (1001, 20.0)])
def test_bad_rows_are_masked_and_leave_the_others_bits_alone(isa, dtype, cols, spread):
    logits, potential = case(200, cols, dtype, spread)
    for clean in (
        kernels.sinkhorn_pass(logits, potential, scale=25.0, want_labels=True, isa=isa),
        kernels.sinkhorn_pass(logits, potential, scale=25.0, want_labels=True, isa=isa, reference=torch.zeros(200)),
    ):
        spoiled = logits.clone()
        bad = {0: float("nan"), 17: float("nan"), 42: float("inf"), 130: -float("inf"), 199: float("inf")}
        for place, (row, value) in zip(itertools.cycle((0, cols // 2, cols - 1)), bad.items(), strict=False):
            spoiled[row, place] = value
        spoiled[130] = -float("inf")
        lse = clean.lse if clean.lse.abs().max() < 0 else None
        found = kernels.sinkhorn_pass(spoiled, potential, scale=25.0, want_labels=True, isa=isa, reference=lse)
        again = kernels.sinkhorn_pass(spoiled, potential, scale=25.0, want_labels=True, isa=isa, reference=found.lse)
        fresh = kernels.sinkhorn_pass(logits, potential, scale=25.0, want_labels=True, isa=isa)
        good = torch.ones(200, dtype=torch.bool)
        good[list(bad)] = False
        assert found.masked == again.masked == len(bad)
        assert (found.labels[~good] == -1).all()
        assert found.lse[~good].isnan().all()
        assert torch.equal(found.labels[good], fresh.labels[good])
        assert torch.equal(found.lse[good], fresh.lse[good])
        only_good = kernels.sinkhorn_pass(logits[good], potential, scale=25.0, isa=isa)
        assert float((found.column_sums - only_good.column_sums).abs().sum()) < 1e-4
        assert found.weight == only_good.weight == 195


def test_nan_between_dead_columns_of_a_peaked_row_is_found():
    logits = torch.full((8, 1024), -50.0)
    logits[:, 5] = 0.0
    for place in (5, 6, 500, 511, 512, 1023):
        spoiled = logits.clone()
        spoiled[3, place] = float("nan")
        found = kernels.sinkhorn_pass(spoiled, torch.zeros(1024), scale=25.0, reference=torch.zeros(8))
        assert found.masked == 1
        assert found.column_sums[5] == 7


def test_single_minus_infinity_is_an_impossible_label():
    for dtype, cols in itertools.product(DTYPES, (3, 301)):
        logits, potential = case(64, cols, dtype)
        logits[:, 1] = -float("inf")
        found = kernels.sinkhorn_pass(logits, potential, want_labels=True)
        assert found.masked == 0
        assert found.column_sums[1] == 0
        assert not (found.labels == 1).any()
        assert float(found.column_sums.sum()) == pytest.approx(64, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("cols", "spread"), [(33, 1.0), (333, 0.1), (1001, 20.0)])
def test_any_reference_gives_the_same_sums(dtype, cols, spread):
    logits, potential = case(130, cols, dtype, spread)
    expected = reference.sinkhorn_pass(logits, potential, scale=25.0, want_labels=True)
    lse = expected.lse
    for bad in (lse + 1, lse - 3, lse + 30, lse - 60, lse + 300, lse * 0 + float("nan"), lse * 0 - float("inf")):
        found = kernels.sinkhorn_pass(logits, potential, scale=25.0, reference=bad, want_labels=True)
        assert_equal_to_twin(found, expected, dtype)


@pytest.mark.parametrize("size", [1e4, 1e9, 1e30])
@pytest.mark.parametrize("cols", [7, 500])
def test_huge_logits_stay_finite(size, cols):
    logits = torch.zeros(5, cols)
    logits[torch.arange(5), torch.arange(5)] = size
    logits[4] = -size
    found = kernels.sinkhorn_pass(logits, torch.zeros(cols), scale=25.0, want_labels=True)
    assert found.masked == 0
    assert found.labels.tolist() == [0, 1, 2, 3, 0]
    torch.testing.assert_close(found.column_sums[:4], torch.ones(4, dtype=torch.float64) + 1 / cols, rtol=1e-6, atol=0)


def test_zero_weight_takes_a_row_out_of_the_sums_but_not_out_of_the_labels():
    logits, potential = case(100, 33)
    weights = torch.ones(100)
    weights[10:] = 0
    found = kernels.sinkhorn_pass(logits, potential, row_weights=weights, want_labels=True)
    few = kernels.sinkhorn_pass(logits[:10], potential)
    everything = kernels.sinkhorn_pass(logits, potential, want_labels=True)
    torch.testing.assert_close(found.column_sums, few.column_sums, rtol=1e-6, atol=1e-9)
    assert found.weight == 10
    assert torch.equal(found.labels, everything.labels)


def test_weights_of_any_size_neither_overflow_nor_vanish():
    logits, potential = case(400, 33)
    plain = kernels.sinkhorn_pass(logits, potential)
    for size in (1e-20, 1e20):
        found = kernels.sinkhorn_pass(logits, potential, row_weights=torch.full((400,), size))
        torch.testing.assert_close(found.column_sums / size, plain.column_sums, rtol=1e-6, atol=0)
        for nats in (45, -65):  # whatever the reference, weight / sum must not leave the range of float
            again = kernels.sinkhorn_pass(
                logits, potential, row_weights=torch.full((400,), size), reference=plain.lse + nats
            )
            torch.testing.assert_close(again.column_sums / size, plain.column_sums, rtol=1e-5, atol=0)


def test_lowest_column_wins_a_tie():
    logits = np.zeros((3, 77), np.float32)
    logits[1, [40, 70]] = 1
    logits[2, [76, 3]] = 1
    assert kernels.sinkhorn_pass(logits, np.zeros(77), want_labels=True).labels.tolist() == [0, 40, 3]


def test_strided_transposed_and_memory_mapped_logits_are_read_in_place_or_copied(tmp_path):
    wide = np.random.default_rng(0).standard_normal((50, 200)).astype(np.float32)
    expected = kernels.sinkhorn_pass(wide[:, 3:180].copy(), np.zeros(177)).column_sums
    np.save(tmp_path / "logits.npy", wide)
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    for view in (wide[:, 3:180], np.asfortranarray(wide)[:, 3:180], mapped[:, 3:180], wide[:, 3:180].astype(">f4")):
        assert np.array_equal(kernels.sinkhorn_pass(view, np.zeros(177)).column_sums, expected)
    tensor = torch.from_numpy(wide)
    for view in (tensor[:, 3:180], tensor.t().contiguous().t()[:, 3:180]):
        assert np.array_equal(kernels.sinkhorn_pass(view, np.zeros(177)).column_sums.numpy(), expected)
    flipped = kernels.sinkhorn_pass(wide[::-1, 3:180], np.zeros(177)).column_sums
    np.testing.assert_allclose(flipped, expected, rtol=1e-6)


def test_no_rows_give_zero_sums():
    found = kernels.sinkhorn_pass(np.zeros((0, 5), np.float32), np.zeros(5), want_labels=True)
    assert found.column_sums.tolist() == [0.0] * 5
    assert found.labels.shape == (0,)


def test_arguments_are_refused_in_one_line():
    good = np.zeros((4, 3), np.float32)
    with pytest.raises(DataError, match=r"\[N, K\], found shape \(4,\)"):
        kernels.sinkhorn_pass(np.zeros(4, np.float32), np.zeros(3))
    with pytest.raises(DataError, match="found int64; convert"):
        kernels.sinkhorn_pass(np.zeros((4, 3), np.int64), np.zeros(3))
    with pytest.raises(OptionError, match=r"potential: expected shape \(3,\), found \(2,\)"):
        kernels.sinkhorn_pass(good, np.zeros(2))
    with pytest.raises(OptionError, match="potential: expected finite numbers, found nan at 1"):
        kernels.sinkhorn_pass(good, [0, np.nan, 0])
    with pytest.raises(OptionError, match=r"row_weights: expected numbers >= 0, found -1.0 at 2"):
        kernels.sinkhorn_pass(good, np.zeros(3), row_weights=[1, 1, -1, 1])
    with pytest.raises(OptionError, match=r"scale: expected a finite number > 0, found 0.0"):
        kernels.sinkhorn_pass(good, np.zeros(3), scale=0)
    with pytest.raises(OptionError, match=r"reference: expected shape \(4,\)"):
        kernels.sinkhorn_pass(good, np.zeros(3), reference=np.zeros(5))
    with pytest.raises(OptionError, match="threads: expected an integer"):
        kernels.sinkhorn_pass(good, np.zeros(3), threads=-1)
    with pytest.raises(OptionError, match="expected a tensor on cpu or cuda, found meta"):
        kernels.sinkhorn_pass(torch.zeros(4, 3, device="meta"), np.zeros(3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_parts_add_up_to_the_bits_of_the_whole(dtype, every, weighted):
    logits, potential = case(1337, 61, dtype, spread=3.0)
    logits[200, 3] = float("nan")
    weights = torch.rand(1337, generator=torch.Generator().manual_seed(1)) if weighted else None
    largest = None if weights is None else float(weights.max())
    arguments = {"scale": 2.0, "want_labels": True, "every": every, "keep": 16.0}
    whole = kernels.sinkhorn_pass(logits, potential, row_weights=weights, **arguments)
    for ends in ((128, 1337), (256, 384, 1152, 1337), (1280, 1337)):
        for passes in (kernels.sinkhorn_pass, reference.sinkhorn_pass):
            first, parts = 0, []
            for end in ends:
                part = passes(
                    logits[first:end],
                    potential,
                    row_weights=None if weights is None else weights[first:end],
                    first_row=first,
                    rows_in_all=1337,
                    largest_weight=largest,
                    **arguments,
                )
                parts.append(part)
                first = end
            found = kernels.add_sums(parts)
            assert_equal_to_twin(found, whole, dtype)
            assert found.candidates.rows == whole.candidates.rows
            assert found.candidates.entries == pytest.approx(whole.candidates.entries, abs=3)
            if passes is kernels.sinkhorn_pass:
                np.testing.assert_array_equal(found.exact, whole.exact)
                torch.testing.assert_close(found.column_sums, whole.column_sums, rtol=0, atol=0)
                assert (found.objective, found.weight) == (whole.objective, whole.weight)
                for name in ("offsets", "columns", "values", "weights"):
                    np.testing.assert_array_equal(getattr(found.candidates, name)(), getattr(whole.candidates, name)())


def test_candidates_of_parts_overflow_together():
    logits, potential = case(256, 20)

    def passed(first, limit):
        return kernels.sinkhorn_pass(
            logits[first : first + 128], potential, keep=16.0, keep_at_most=limit, first_row=first, rows_in_all=256
        )

    entries = passed(0, 10_000).candidates.entries
    found = kernels.add_sums([passed(0, entries), passed(128, entries)])
    assert found.candidates.overflow
    assert found.candidates.entries == 0
    with pytest.raises(ValueError, match="columns"):
        passed(0, 10_000).candidates.append(kernels.sinkhorn_pass(logits[:, :5], potential[:5], keep=16.0).candidates)


def test_candidates_are_made_again_from_their_arrays():
    logits, potential = case(100, 20, spread=5.0)
    found = kernels.sinkhorn_pass(logits, potential, keep=16.0, row_weights=np.full(100, 0.5)).candidates
    arrays = {name: getattr(found, name)() for name in ("offsets", "columns", "values", "weights")}
    made = type(found).of(**arrays, cols=20, level=16.0, limit=found.limit)
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(made, name)(), array)
    assert (made.rows, made.cols, made.entries) == (100, 20, found.entries)
    for name, wrong in (("columns", arrays["columns"] + 20), ("values", arrays["values"][1:]), ("offsets", [0, 5])):
        with pytest.raises(ValueError, match="do not fit together"):
            type(found).of(**{**arrays, name: wrong}, cols=20, level=16.0, limit=found.limit)


def test_first_row_and_rows_in_all_are_checked():
    logits, potential = case(10, 5)
    with pytest.raises(OptionError, match="first_row: expected a multiple of 128"):
        kernels.sinkhorn_pass(logits, potential, first_row=64)
    with pytest.raises(OptionError, match="rows_in_all: expected at least 138"):
        kernels.sinkhorn_pass(logits, potential, first_row=128, rows_in_all=137)
    with pytest.raises(OptionError, match="largest_weight"):
        kernels.sinkhorn_pass(logits, potential, row_weights=np.full(10, 2.0), largest_weight=1.0)


@pytest.mark.parametrize("every", [1, 2, 5, 33, 1000])
@pytest.mark.parametrize(("first_row", "rows"), [(0, 1), (0, 131), (0, 1001), (384, 1001), (128, 0)])
def test_entries_are_those_of_the_rows_that_are_read(every, first_row, rows):
    logits = np.random.default_rng(0).standard_normal((rows, 17)).astype(np.float32)
    options = {"every": every, "first_row": first_row, "rows_in_all": 3000}
    found = kernels.sinkhorn_pass(logits, np.zeros(17), **options)
    read = np.arange(first_row, first_row + rows) // 4 % every == 0
    assert found.entries == 17 * read.sum()
    assert found.weight == read.sum()
    assert found.live_share == 1.0
