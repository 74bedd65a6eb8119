"""The SIMT runner itself: what it executes as a GPU would, and what it refuses."""

import numpy as np
import pytest

TYPES = {"int32": np.int32, "uint64": np.uint64, "float32": np.float32, "float64": np.float64, "float16": np.float16}


def address(array):
    return array.ctypes.data


@pytest.fixture
def probe(simt):
    """Runs a kernel of csrc/simt/probes.cu: probe(name, type, input, output, grid, block, ...)."""

    def run(name, dtype, source, out, grid=1, block=32, **options):
        shapes = [(size, 1, 1) if isinstance(size, int) else size for size in (grid, block)]
        simt.probe(name, dtype, 0 if source is None else address(source), address(out), *shapes, **options)
        return out

    return run


# ---- Shapes and schedules.


@pytest.mark.parametrize(
    ("grid", "block"),
    [((1, 1, 1), (1, 1, 1)), ((3, 2, 2), (5, 3, 2)), ((1, 1, 4), (33, 1, 1)), ((2, 1, 1), (1, 31, 7)), (3, 1024)],
)
def test_every_thread_of_every_shape_runs_once_and_knows_its_place(probe, schedule, grid, block):
    g, b = ((size, 1, 1) if isinstance(size, int) else size for size in (grid, block))
    out = np.full((np.prod(g) * np.prod(b), 6), -1, np.int32)
    probe("indices", "int32", None, out, g, b)
    # Linear numbers count x fastest, the block's before the grid's.
    axes = [range(n) for n in (*g[::-1], *b[::-1])]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 6)
    np.testing.assert_array_equal(out, places[:, [5, 4, 3, 2, 1, 0]])


@pytest.mark.parametrize(
    ("grid", "block", "dynamic", "expected"),
    [
        ((1, 1, 1), (1025, 1, 1), 0, "expected a block of 1 to 1024 threads"),
        ((1, 1, 1), (32, 0, 1), 0, "expected a block of 1 to 1024 threads"),
        ((1, 1, 1), (1, 1, 65), 0, "expected a block of 1 to 1024 threads"),
        ((0, 1, 1), (32, 1, 1), 0, "expected a grid of at least one block"),
        ((1, 65536, 1), (32, 1, 1), 0, "expected a grid of at least one block, at most .* found grid 1 x 65536 x 1"),
        ((2048, 1024, 1), (32, 1, 1), 0, "the runner is for small grids"),
        ((1, 1, 1), (32, 1, 1), 64 * 1024 + 1, "expected at most 64 KB of dynamic shared memory"),
    ],
)
def test_a_shape_that_no_device_accepts_is_refused(simt, grid, block, dynamic, expected):
    with pytest.raises(simt.SimtError, match=f"order: {expected}"):
        simt.probe("order", "int32", 0, 0, grid, block, dynamic)


def test_schedules_differ_in_the_order_of_blocks_warps_and_lanes_and_repeat_themselves(simt, probe):
    def order(seed):
        simt.set_schedule(seed)
        out = probe("order", "int32", None, np.zeros(4 * 96 + 1, np.int32), 4, 96)
        simt.set_schedule(0)
        return out[:-1]

    in_order, shuffled = order(0), order(1)
    np.testing.assert_array_equal(in_order, np.arange(4 * 96))
    np.testing.assert_array_equal(np.sort(shuffled), in_order)
    np.testing.assert_array_equal(shuffled, order(1))
    assert not np.array_equal(shuffled, order(2))
    for part in (96, 32):  # blocks, then warps, come in another order, each in one piece here: nobody waits
        firsts = shuffled[::part] // part
        assert not np.array_equal(firsts, np.arange(len(firsts)))
    assert not np.array_equal(shuffled[:32], np.sort(shuffled[:32]))


def test_statistics_count_what_ran(simt, probe):
    before = simt.statistics()
    probe("reverse", "float32", np.zeros(3 * 64, np.float32), np.zeros(3 * 64, np.float32), 3, 64, dynamic_shared=256)
    after = simt.statistics()
    assert after.pop("dynamic_shared") == 256
    counts = {name: after[name] - before[name] for name in after}
    assert counts == {
        "launches": 1, "blocks": 3, "threads": 192, "switches": 384, "barriers": 3, "warp_operations": 0
    }  # fmt: skip


# ---- Warps.


def expected_shuffle(values, kind, argument, width):
    """What CUDA's documentation says; values: [warps, 32]."""
    lane = np.arange(32)
    group, inside = lane // width * width, lane % width
    source = {
        "idx": group + argument % width,
        "up": np.where(inside >= argument, lane - argument, lane),
        "down": np.where(inside + argument < width, lane + argument, lane),
        "xor": np.where((lane ^ argument) // width <= lane // width, lane ^ argument, lane),
    }[kind]
    return values[:, source]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["idx", "up", "down", "xor"])
def test_shuffles_give_the_value_that_cuda_documents(probe, schedule, kind, dtype):
    values = np.random.default_rng(1).integers(0, 1000, (2, 32)).astype(TYPES[dtype])
    if dtype == "uint64":
        values += np.uint64(2**40)  # all eight bytes travel
    code = ["idx", "up", "down", "xor"].index(kind)
    for width in (32, 8, 1):
        for argument in (0, 1, 5, 31):
            out = probe("shuffle", dtype, values, np.zeros_like(values), 1, 64, a=code, b=argument, c=width)
            np.testing.assert_array_equal(out, expected_shuffle(values, kind, argument, width))


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("width", [0, 12, -8, 64])
def test_a_shuffle_of_a_width_that_is_no_power_of_two_up_to_32_is_refused(simt, probe, kind, width):
    values = np.zeros(32, np.float32)
    with pytest.raises(simt.SimtError, match=rf"^csrc/simt/probes.cu:\d+: .*expected a width .* found {width}$"):
        probe("shuffle", "float32", values, values.copy(), a=kind, c=width)


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FF01, 0x80000000])
def test_votes_count_the_lanes_of_the_mask(probe, schedule, mask):
    lanes = np.array([mask >> lane & 1 for lane in range(32)], bool)
    for votes in (np.zeros(32), np.ones(32), np.arange(32) % 3 == 0):
        out = np.full((32, 3), 7, np.uint32)
        probe("vote", "int32", votes.astype(np.int32), out, a=mask - (1 << 32) if mask >> 31 else mask)
        yes = lanes & (votes > 0)
        ballot = sum(1 << int(lane) for lane in np.flatnonzero(yes))
        np.testing.assert_array_equal(out[lanes], [[ballot, yes.any(), yes[lanes].all()]] * lanes.sum())
        np.testing.assert_array_equal(out[~lanes], 7)


def test_a_full_mask_suits_a_warp_that_is_not_full(probe, schedule):
    values = np.arange(41, dtype=np.float32)
    out = probe("shuffle", "float32", values, np.zeros_like(values), 1, 41, a=3, b=1, c=32)
    right = np.arange(41) ^ 1
    np.testing.assert_array_equal(out[:40], right[:40])
    assert np.isnan(out[40])  # from lane 9 of a warp of 9


@pytest.mark.parametrize(("first", "second"), [(1, 1), (3, 5), (8, 2)])
def test_parts_of_a_warp_meet_among_themselves(probe, schedule, first, second):
    out = probe("halves", "int32", None, np.zeros(32, np.int32), a=first, b=second)
    rounds = np.repeat([first, second], 16) - 1
    np.testing.assert_array_equal(out, 100 * rounds + (np.arange(32) ^ 1))


# ---- Atomic functions.


@pytest.mark.parametrize("dtype", ["int32", "uint32", "uint64", "float32", "float64"])
def test_atomic_additions_lose_nothing(probe, schedule, dtype):
    values = np.arange(100).astype(dtype)
    out = probe("atomic", dtype, values, np.zeros(101, dtype), 4, 25, a=0)
    assert out[0] == values.sum()
    steps = np.sort(out[1:])  # what each thread found: the sums so far
    assert steps[0] == 0
    assert len(np.unique(steps)) >= 99  # the thread that adds 0 finds what the next one finds


@pytest.mark.parametrize("dtype", ["int32", "uint32", "uint64"])
@pytest.mark.parametrize(
    ("code", "start", "expected"),
    [(3, 50, 99), (4, 50, 1), (5, 128, 255), (6, 255, 0)],
    ids=["max", "min", "or", "and"],
)
def test_atomic_functions_of_whole_numbers(probe, schedule, dtype, code, start, expected):
    out = np.zeros(100, dtype)
    out[0] = start
    probe("atomic", dtype, np.arange(1, 100).astype(dtype), out, 3, 33, a=code)
    assert out[0] == expected


def test_an_atomic_maximum_of_signed_numbers_knows_the_sign(probe):
    out = np.array([-5, 0, 0], np.int32)
    assert probe("atomic", "int32", np.array([-7, -3], np.int32), out, 1, 2, a=3)[0] == -3


def test_an_atomic_exchange_hands_every_value_on_once(probe, schedule):
    out = np.full(65, -1, np.int32)
    probe("atomic", "int32", np.arange(64, dtype=np.int32), out, 2, 32, a=1)
    np.testing.assert_array_equal(np.sort(out), np.arange(-1, 64))


def test_of_all_threads_that_compare_and_swap_one_succeeds(probe, schedule):
    out = probe("atomic", "int32", np.arange(1, 65, dtype=np.int32), np.zeros(65, np.int32), 2, 32, a=2, b=0)
    assert (out[1:] == 0).sum() == 1
    assert set(out[1:]) == {0, out[0]}


def test_an_atomic_function_on_a_misaligned_address_is_refused(simt, probe):
    with pytest.raises(simt.SimtError, match=r"probes.cu:\d+: .*an atomic function on a misaligned address"):
        probe("misaligned_atomic", "int32", None, np.zeros(4, np.int32), 1, 1, a=2)


# ---- Shared memory and asynchronous copies.


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("block", [1, 33, (7, 3, 2)])
def test_a_block_exchanges_values_by_way_of_dynamic_shared_memory(probe, schedule, dtype, block):
    threads = int(np.prod(block))
    values = np.arange(3 * threads).reshape(3, threads).astype(TYPES[dtype])
    out = probe("reverse", dtype, values, np.zeros_like(values), 3, block, dynamic_shared=values[0].nbytes)
    np.testing.assert_array_equal(out, values[:, ::-1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_nobody_wrote_is_nan_in_every_type(probe, schedule, dtype):
    if dtype == "bfloat16":  # the upper half of a float
        out = probe("poison", dtype, None, np.zeros(3, np.uint16), 1, 2, dynamic_shared=64)
        out = (out.astype(np.uint32) << 16).view(np.float32)
    else:
        out = probe("poison", dtype, None, np.zeros(3, dtype), 1, 2, dynamic_shared=64)
    assert np.isnan(out).all()


def test_objects_of_awkward_sizes_lie_apart(probe, schedule):
    out = probe("objects", "int32", None, np.zeros(1, np.int32), 1, 2)
    assert out[0] == 1 + 8 + sum(range(7)) + sum(range(5)) + 10


@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_a_pipeline_of_asynchronous_copies_reads_what_has_landed(probe, schedule, pieces):
    raw = np.zeros(pieces * 128 + 4, np.float32)
    start = -address(raw) % 16 // 4
    values = raw[start : start + pieces * 128]
    values[:] = np.arange(pieces * 128)
    out = np.zeros_like(raw)[start : start + pieces * 128]
    out = out if address(out) % 16 == 0 else raw.copy()[start : start + pieces * 128]
    probe("pipeline", "int32", values, out, 1, 32, dynamic_shared=2 * 32 * 16, a=pieces)
    np.testing.assert_array_equal(out, 2 * values)


@pytest.mark.parametrize(
    ("name", "dynamic", "expected"),
    [
        ("too_much_static", 0, "second brings static shared memory to 49156 bytes, a block has at most 48 KB"),
        ("much_static", 24 * 1024 + 1, "values brings shared memory to 65537 bytes, a block has at most 64 KB"),
        ("much_static", 8 * 1024 + 1, "values brings shared memory to 49153 bytes; more than 48 KB must be asked for"),
    ],
)
def test_more_shared_memory_than_a_block_has_is_refused(simt, probe, name, dynamic, expected):
    with pytest.raises(simt.SimtError, match=rf"^csrc/simt/probes.cu:\d+: {name}, block .*: {expected}"):
        probe(name, "int32", None, np.zeros(1, np.int32), 1, 1, dynamic_shared=dynamic)


def test_as_much_shared_memory_as_a_block_has_is_granted(probe):
    probe("much_static", "int32", None, np.zeros(1, np.int32), 1, 1, dynamic_shared=8 * 1024)
    probe("order", "int32", None, np.zeros(2, np.int32), 1, 1, dynamic_shared=64 * 1024)


# ---- half and bfloat16.


def test_half_rounds_as_ieee_does(probe):
    values = np.random.default_rng(2).normal(size=999).astype(np.float32) * np.logspace(-9, 5, 999).astype(np.float32)
    values[:5] = [np.inf, -np.inf, np.nan, 0.0, -0.0]
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(probe("convert", "float16", values, np.zeros_like(values), 27, 37), expected)


def test_bfloat16_keeps_the_upper_half_of_a_float_rounded_to_even(probe):
    values = np.random.default_rng(3).normal(size=999).astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    out = probe("convert", "bfloat16", values, np.zeros_like(values), 27, 37)
    np.testing.assert_array_equal(out, rounded.view(np.float32))


# ---- A kernel of the package.


def sinkhorn(simt, logits, potential):
    rows, cols = logits.shape
    sums, labels = np.zeros(cols, np.int64), np.zeros(rows, np.int32)
    totals_count, scratch_bytes = simt.sinkhorn_workspace_cuda(address(logits), "float32", rows, cols, cols)
    totals, scratch, masked = np.zeros(totals_count), np.zeros(max(1, scratch_bytes), np.uint8), np.zeros(1, np.int64)
    simt.sinkhorn_pass_cuda(
        *(address(logits), "float32", rows, cols, cols, 1.0, address(potential), 0, 1.0, 0, address(sums), 0),
        *(address(labels), address(totals), address(masked), address(scratch), 0),
    )
    return sums, labels, totals


@pytest.mark.parametrize("cols", [5, 300])
def test_a_kernel_gives_the_same_bits_in_every_order_and_what_the_cpu_gives(simt, schedule, cols):
    rows = 67
    rng = np.random.default_rng(cols)
    logits = rng.normal(size=(rows, cols)).astype(np.float32)
    potential = rng.normal(size=cols)
    sums, labels, totals = sinkhorn(simt, logits, potential)

    cpu_sums, cpu_labels = np.zeros(cols, np.int64), np.zeros(rows, np.int32)
    objective, weight, *_ = simt.sinkhorn_pass_cpu(
        *(address(logits), "float32", rows, cols, cols, 1.0, address(potential), 0, 1.0, 0, address(cpu_sums), 0),
        *(address(cpu_labels), 1, ""),
    )
    resolution = simt.sinkhorn_resolution(rows, 1.0)
    np.testing.assert_allclose(sums * resolution, cpu_sums * resolution, rtol=2e-6)
    np.testing.assert_array_equal(labels, cpu_labels)
    assert totals.reshape(2, -1).sum(1) == pytest.approx([objective, weight], rel=1e-6)

    simt.set_schedule(0)
    for found, in_order in zip((sums, labels, totals), sinkhorn(simt, logits, potential), strict=True):
        np.testing.assert_array_equal(found, in_order)


@pytest.mark.parametrize("device", [(1, 1), (2, 3), (100, 8)])
def test_the_launchers_believe_the_device_that_a_test_sets(simt, device):
    logits, potential = np.ones((300, 300), np.float32), np.zeros(300)
    simt.set_device(*device)
    before = simt.statistics()["blocks"]
    sinkhorn(simt, logits, potential)
    simt.set_device(4, 2)
    assert simt.statistics()["blocks"] - before == min(5, device[0] * device[1])  # 300 rows are five tiles
