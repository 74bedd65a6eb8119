"""JPEG files to planes on the runner: every sample is the CPU decoder's, or the file's status says that it is not.

The CPU decoder is the one inside `_simt`, so that nothing but numpy and scipy is needed; files come from the writer of
python_tests/kernels.
"""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

GREY = [(1, 1)]
FULL = [(1, 1), (1, 1), (1, 1)]
WIDE = [(2, 1), (1, 1), (1, 1)]
TALL = [(1, 2), (1, 1), (1, 1)]
HALF = [(2, 2), (1, 1), (1, 1)]
KINDS = {"grey": GREY, "4:4:4": FULL, "4:2:2": WIDE, "4:4:0": TALL, "4:2:0": HALF}
RARE = {
    "4:1:1": [(4, 1), (1, 1), (1, 1)],
    "3 x 1": [(3, 1), (1, 1), (1, 1)],
    "mixed": [(2, 2), (1, 2), (2, 1)],
    "largest": [(2, 4), (1, 1), (1, 1)],
}
PIXELS = 1 << 40
FOLDER = Path(os.environ.get("SELA_DATA_DIR") or Path(__file__).resolve().parents[3] / "shared" / "data")
PHOTOGRAPHS = sorted(FOLDER.glob("*.JPEG"))
BAD_DATA, BAD_TURN, BAD_SAMPLE = 1, 2, 4


@pytest.fixture(scope="module")
def writer():
    path = Path(__file__).parents[1] / "kernels" / "jpeg_writer.py"
    spec = importlib.util.spec_from_file_location("simt_jpeg_writer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def device(simt):
    """Two multiprocessors of one block: most blocks take several pieces of work."""
    simt.set_device(1 if simt.variant == "thread" else 2, 1)
    yield
    simt.set_device(2, 2)


def thin(simt, cases):
    """All the cases; every fifth under ThreadSanitizer, which takes a millisecond per thread."""
    cases = list(cases)
    return cases[::5] if simt.variant == "thread" else cases


def index_of(simt, data):
    status, _, index = simt.jpeg_planes(data, 0, 0, 1, 1, 1, None, True, PIXELS, "")
    assert status == "ok"
    return index


def on_cpu(simt, data, box=(0, 0, 0, 0), index=None):
    """(status, colour, planes) of the CPU decoder."""
    status, found, _ = simt.jpeg_planes(data, *box, 1, index, False, PIXELS, "")
    return (status, *found) if status == "ok" else (status, None, None)


def exact(size, filler):
    """An array of so many bytes, of this value, at a multiple of 16: AddressSanitizer watches what is around it."""
    array = np.full(size, filler, np.uint8)
    assert array.ctypes.data % 16 == 0
    return array


def plan(simt, files, indexes=None, boxes=None, most=1 << 40):
    indexes = [index_of(simt, data) for data in files] if indexes is None else indexes
    boxes = [(0, 0, 0, 0)] * len(files) if boxes is None else boxes
    return simt.JpegBatch(files, indexes, boxes, most, PIXELS)


def run(simt, batch, filler=0xA5):
    """[(status word, bits that the kernels set, colour, planes)] of each file that was taken."""
    upload, planes = exact(batch.upload_bytes, 0xEE), exact(batch.plane_bytes, filler)
    batch.write(upload.ctypes.data)
    workspace, status = exact(batch.workspace_bytes, filler), np.zeros(batch.image_count, np.uint32)
    addresses = [array.ctypes.data for array in (upload, workspace, planes, status)]
    simt.decode_jpeg_cuda(batch, *addresses, 0)
    out = []
    for image in batch.images():
        if image["status"] != "ok":
            out.append((image["status"], 0, None, None))
            continue
        found = []
        for plane in image["planes"]:
            offset, stride, height, width = (plane.pop(name) for name in ("offset", "stride", "height", "width"))
            view = np.lib.stride_tricks.as_strided(planes[offset:], (height, width), (stride, 1))
            found.append({**plane, "samples": view})
        out.append(("ok", int(status[image["image"]]), image["colour"], tuple(found)))
    return out


def assert_same_planes(found, expected):
    assert len(found) == len(expected)
    for c, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert {k: v for k, v in a.items() if k != "samples"} == {k: v for k, v in b.items() if k != "samples"}
        np.testing.assert_array_equal(a["samples"], b["samples"], err_msg=f"component {c}")


def check(simt, files, boxes=None, **options):
    """Every file is decoded to the CPU's planes, with and without the index."""
    indexes = [index_of(simt, data) for data in files]
    boxes = [(0, 0, 0, 0)] * len(files) if boxes is None else boxes
    for data, index, box, found in zip(
        files, indexes, boxes, run(simt, plan(simt, files, indexes, boxes), **options), strict=True
    ):
        assert found[:2] == ("ok", 0)
        for used in (index, None):
            status, colour, planes = on_cpu(simt, data, box, used)
            assert (status, colour) == ("ok", found[2])
            assert_same_planes(found[3], planes)


def random_box(rng, height, width):
    top, left = int(rng.integers(height)), int(rng.integers(width))
    return top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))


@pytest.mark.parametrize("name", [*KINDS, *RARE])
def test_every_sampling_and_size_gives_the_cpus_planes(simt, writer, name):
    rng = np.random.default_rng(len(name))
    factors = {**KINDS, **RARE}[name]
    sizes = [(1, 1), (31, 33), (33, 31), (7, 100), (101, 5), (64, 64), (129, 40), (8, 8), (17, 16), (2, 9)]
    files = [writer.picture(rng, w, h, factors, restart=[0, 0, 1, 3][i % 4]) for i, (w, h) in enumerate(sizes)]
    check(simt, thin(simt, files))


@pytest.mark.parametrize("name", KINDS)
def test_boxes_give_the_cpus_planes_of_the_same_boxes(simt, writer, name):
    rng = np.random.default_rng(3)
    files, boxes = [], []
    for width, height in thin(simt, [(150, 70), (70, 150), (200, 33), (45, 45), (90, 90)]):
        data = writer.picture(rng, width, height, KINDS[name], restart=int(rng.choice([0, 0, 5])))
        for box in [(0, 0, 1, 1), (height - 1, width - 1, 1, 1), *(random_box(rng, height, width) for _ in range(3))]:
            files.append(data)
            boxes.append(box)
    check(simt, files, boxes)


def test_a_photograph_sized_file_is_decoded_by_many_blocks(simt, writer):
    rng = np.random.default_rng(5)
    width, height = (150, 101) if simt.variant == "thread" else (333, 250)
    before = simt.statistics()["blocks"]
    check(simt, [writer.picture(rng, width, height, HALF, quality=6)])
    assert simt.statistics()["blocks"] > before


@pytest.mark.plain_only
@pytest.mark.skipif(not PHOTOGRAPHS, reason=f"no photographs in {FOLDER.name}: set SELA_DATA_DIR")
@pytest.mark.parametrize("step", [60, pytest.param(1, marks=pytest.mark.slow)])
def test_photographs_whole_and_in_part_give_the_cpus_planes(simt, step):
    rng = np.random.default_rng(23)
    taken = 0
    for path in PHOTOGRAPHS[::step]:
        data = path.read_bytes()
        facts = simt.jpeg_header(data)
        if facts["status"] != "ok":
            continue
        box = random_box(rng, facts["height"], facts["width"])
        check(simt, [data, data], [box, (0, 0, 0, 0)])
        taken += 1
    assert taken > 0


def test_planes_depend_neither_on_grid_nor_on_schedule_nor_on_what_lay_in_memory(simt, writer, schedule):
    rng = np.random.default_rng(6)
    sizes = [(90, 70), (40, 40), (129, 17)]
    files = [writer.picture(rng, w, h, HALF, restart=[0, 2, 0][i]) for i, (w, h) in enumerate(sizes)]
    batch = plan(simt, files)
    for grid, filler in [((1, 1), 0), ((3, 1), 255), ((40, 1), 0x7F)]:
        simt.set_device(*grid)
        for data, found in zip(files, run(simt, batch, filler), strict=True):
            assert found[:2] == ("ok", 0)
            assert_same_planes(found[3], on_cpu(simt, data)[2])


def flat(writer, values, factors=GREY):
    """A file whose blocks are of one colour each; values: of the first component's blocks, [down, across]."""
    values = np.asarray(values)
    blocks = [np.zeros((*values.shape, 64), int)]
    blocks[0][..., 0] = values
    return writer.write(8 * values.shape[1], 8 * values.shape[0], factors, blocks, [8] * 64)


def test_blocks_without_detail_take_the_short_way_to_the_same_samples(simt, writer):
    values = np.arange(-130, 130).reshape(10, 26) // 2
    mixed = np.zeros((4, 9, 64), int)
    mixed[..., 0] = np.arange(36).reshape(4, 9) - 18
    for k, place in enumerate([(0, 3), (1, 0), (2, 5), (3, 8)]):
        mixed[place][1 + 20 * k] = 3  # one block with detail among others
    files = [flat(writer, values), writer.write(72, 32, GREY, [mixed], [4] * 64)]
    check(simt, files)


@pytest.mark.parametrize("k", range(1, 64))
def test_every_coefficient_has_its_place(simt, writer, k):
    if simt.variant == "thread" and k % 9:
        return
    blocks = np.zeros((1, 5, 64), int)
    blocks[0, :, 0] = [0, 4, -3, 60, 7]
    blocks[0, :, k] = [5, -5, 1, -1, 9]
    check(simt, [writer.write(40, 8, GREY, [blocks], list(range(3, 67)))])


def ladder(writer, rng, down, across):
    """Coefficients whose symbols come 1, 2, 4, ... times, so that their codes have every length up to 16."""
    blocks = np.zeros((down, across, 64), int)
    kinds = [(run, size) for size in (1, 2, 3, 4) for run in (0, 1, 2, 3)]
    for i, block in enumerate(blocks.reshape(-1, 64)):
        rank = min(int(rng.geometric(0.5)) - 1, len(kinds) - 1) if i >= len(kinds) else i
        run, size = kinds[rank]
        block[1 + run] = (1 << (size - 1)) * (1 if i % 2 else -1)
    return blocks


def test_codes_of_every_length_are_read(simt, writer):
    rng = np.random.default_rng(8)
    blocks = ladder(writer, rng, 40, 60)
    data = writer.write(480, 320, GREY, [blocks], [2] * 64)
    marker = data.index(b"\xff\xc4", data.index(b"\xff\xc4") + 2)  # the table of AC codes
    lengths = np.frombuffer(data, np.uint8, 16, marker + 5)
    assert lengths[11:].sum() >= 2
    boxes = [(0, 0, 0, 0)] if simt.variant != "thread" else [(0, 0, 16, 16)]
    check(simt, [data], boxes)


@pytest.mark.parametrize("restart", [1, 2, 3, 4, 5, 7, 8, 24])
def test_restart_markers_are_passed_within_checkpoints_and_between_them(simt, writer, restart):
    rng = np.random.default_rng(restart)
    files = [writer.picture(rng, 180, 60, kind, restart=restart, quality=5) for kind in (HALF, FULL, GREY)]
    files.append(writer.picture(rng, 99, 40, WIDE, restart=restart, fill=b"\xff\xff"))
    check(simt, thin(simt, files), None)
    check(simt, files[:1], [(17, 40, 20, 77)])


def test_stuffed_bytes_are_left_out_wherever_they_are(simt, writer):
    """Noise of few divisors: one byte in some hundred is 0xFF, at every place of a word."""
    rng = np.random.default_rng(9)
    blocks = rng.integers(-15, 16, (20, 32, 64))
    blocks[..., 0] = rng.integers(-40, 40, (20, 32))
    blocks = blocks // (1 + np.arange(64) // 8)
    data = writer.write(256, 160, GREY, [blocks], [1] * 64)
    scan = data[data.index(b"\xff\xda") :]
    assert scan.count(b"\xff\x00") > 30
    check(simt, [data], None if simt.variant != "thread" else [(0, 0, 20, 20)])


def test_files_with_different_codes_and_divisors_share_a_batch(simt, writer):
    rng = np.random.default_rng(10)
    kinds = [HALF, GREY, FULL, HALF, WIDE, GREY, HALF]
    files = [writer.picture(rng, 60 + 9 * i, 50, kind, quality=2 + 3 * i) for i, kind in enumerate(kinds)]
    files = thin(simt, [*files, files[0], files[0], files[2], files[1], files[1]])
    check(simt, files)


def test_images_of_one_code_share_blocks_of_threads(simt, writer):
    """Four small images of the same codes fit into one block; the upload holds their codes once."""
    data = writer.picture(np.random.default_rng(11), 33, 33, HALF)
    one, four = plan(simt, [data]), plan(simt, [data] * 4)
    assert one.work_count == four.work_count == 1
    assert four.upload_bytes - one.upload_bytes < 3 * len(data) + 4096
    check(simt, [data] * 4)


@pytest.mark.parametrize("wide", [False, True])
def test_large_divisors_are_honoured_up_to_what_fits(simt, writer, wide):
    blocks = np.zeros((2, 4, 64), int)
    blocks[..., 0] = [[1, -1, 0, 1], [0, 0, 1, -1]]
    blocks[..., 5] = 1
    quant = [900 if wide else 255] * 64
    check(simt, [writer.write(32, 16, GREY, [blocks], quant, wide_quant=wide)])


# ---- What is refused.


def judged(simt, data, index, box=(0, 0, 0, 0)):
    """A file that may be damaged: either its status says so, or its planes are those of the CPU with this index."""
    ((status, bits, colour, planes),) = run(simt, plan(simt, [data], [index], [box]))
    if status == "ok" and bits == 0:
        expected = on_cpu(simt, data, box, index)
        assert expected[:2] == ("ok", colour)
        assert_same_planes(planes, expected[2])
    return status, bits


def scan_of(data):
    """Where entropy-coded data begin."""
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def forged(simt, data, edit):
    """An index whose checkpoints were changed by edit(rows), rows [n, 11] of bytes, with the right checksum."""
    raw = bytearray(index_of(simt, data))
    body = np.frombuffer(bytes(raw[32:-8]), np.uint8).reshape(-1, 11).copy()
    edit(body)
    raw[32:-8] = body.tobytes()
    raw[-8:] = digest(0, bytes(raw[:-8])).to_bytes(8, "little")
    return bytes(raw)


def digest(h, data):
    """The digest of docs/formats.md."""
    mask = 2**64 - 1
    h ^= len(data) * 0x9E3779B97F4A7C15 & mask
    for i in range(0, len(data), 8):
        h = (h ^ int.from_bytes(data[i : i + 8], "little")) * 0xD6E8FEB86659FD93 & mask
        h ^= h >> 32
    return h


def renewed(simt, index, data):
    """The index of one file made to pass for another one of the same size: digests of docs/formats.md."""
    scan, mask = scan_of(data), 2**64 - 1
    h = digest(1, data[: min(scan, 4096)])
    rest = len(data) - scan
    if rest <= 2048:
        h = digest(h, data[scan:])
    else:
        for i in range(32):
            at = scan + (rest - 64) // 31 * i
            h = digest(h, data[at : at + 64])
    body = index[:24] + (h & mask).to_bytes(8, "little") + index[32:-8]
    return body + digest(0, body).to_bytes(8, "little")


def test_a_forged_index_of_unchanged_checkpoints_is_accepted(simt, writer):
    data = writer.picture(np.random.default_rng(12), 70, 50, HALF)
    index = index_of(simt, data)
    assert forged(simt, data, lambda rows: None) == index
    assert renewed(simt, index, data) == index
    assert judged(simt, data, index) == ("ok", 0)


@pytest.mark.parametrize("kind", ["4:2:0", "grey"])
def test_damaged_data_are_noticed_or_harmless(simt, writer, kind):
    rng = np.random.default_rng(13)
    data = writer.picture(rng, 75, 60, KINDS[kind], quality=9, restart=0)
    index, scan = index_of(simt, data), scan_of(data)
    noticed = 0
    trials = 60 if simt.variant == "plain" else 12
    for _ in range(trials):
        damaged = bytearray(data)
        for at in rng.integers(scan, len(data) - 2, int(rng.choice([1, 3]))):
            damaged[at] = rng.choice([0, 0xFF, 0xD0, int(rng.integers(256))])
        damaged = bytes(damaged)
        box = (0, 0, 0, 0) if rng.random() < 0.5 else random_box(rng, 60, 75)
        noticed += judged(simt, damaged, renewed(simt, index, damaged), box) != ("ok", 0)
    assert noticed > trials / 4


@pytest.mark.parametrize("restart", [0, 3])
def test_damage_around_restart_markers_is_noticed_or_harmless(simt, writer, restart):
    rng = np.random.default_rng(14)
    data = writer.picture(rng, 80, 40, HALF, quality=9, restart=restart)
    index, scan = index_of(simt, data), scan_of(data)
    markers = [i for i in range(scan, len(data) - 2) if data[i] == 0xFF]
    for at in thin(simt, markers):
        for offset, value in [(1, 0xFF), (1, 0xD1), (1, 0xD9), (0, 0), (1, 0), (-1, 0xFF), (2, 0xFF)]:
            damaged = bytearray(data)
            damaged[at + offset] = value
            judged(simt, bytes(damaged), renewed(simt, index, bytes(damaged)))


def test_a_file_that_was_cut_is_refused(simt, writer):
    data = writer.picture(np.random.default_rng(15), 75, 60, HALF, quality=9)
    index, scan = index_of(simt, data), scan_of(data)
    for length in range(scan + 40, len(data) - 2, 97):
        cut = data[:length]
        body = index[:16] + length.to_bytes(8, "little") + index[24:]
        status, bits = judged(simt, cut, renewed(simt, body, cut))
        assert status != "ok" or bits != 0


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        (0, 1, ("ok", BAD_TURN)),  # offset
        (3, 200, ("foreign index", 0)),
        (4, 8, ("foreign index", 0)),  # bit
        (4, 255, ("foreign index", 0)),
        (5, 77, ("ok", BAD_TURN)),  # predictors
        (7, 77, ("ok", BAD_TURN)),
        (9, 77, ("ok", BAD_TURN)),
    ],
)
def test_a_wrong_checkpoint_is_noticed(simt, writer, column, value, words):
    """Beside the wrong turn other bits may be set: whatever is read from a wrong place on."""
    data = writer.picture(np.random.default_rng(16), 140, 60, HALF, quality=9)

    def change(rows):
        rows[4, column] = (int(rows[4, column]) + value) % 256 if column in (0, 5, 7, 9) else value

    status, bits = judged(simt, data, forged(simt, data, change))
    assert status == words[0]
    assert bits & words[1] == words[1]


def test_a_wrong_bit_of_a_checkpoint_is_noticed(simt, writer):
    data = writer.picture(np.random.default_rng(16), 140, 60, HALF, quality=9)
    for row in range(1, 9):

        def change(rows, row=row):
            rows[row, 4] = (rows[row, 4] + 1) % 8

        status, bits = judged(simt, data, forged(simt, data, change))
        assert status == "ok"
        assert bits != 0


def test_random_checkpoints_do_no_harm(simt, writer):
    rng = np.random.default_rng(17)
    for kind, restart in [(HALF, 0), (GREY, 2), (FULL, 5)]:
        data = writer.picture(rng, 75, 60, kind, quality=9, restart=restart)
        size = len(data) - scan_of(data)
        for trial in range(30 if simt.variant == "plain" else 6):

            def change(rows, size=size, trial=trial):
                if trial % 2:
                    offsets = np.sort(rng.integers(0, size, len(rows))).astype("<u4")
                    rows[:, :4] = offsets.view(np.uint8).reshape(-1, 4)
                    rows[:, 4] = rng.integers(0, 8, len(rows))
                else:
                    chosen = rng.integers(0, len(rows), 3)
                    rows[chosen] = rng.integers(0, 256, (3, 11))
                    rows[chosen, 1:4] = 0

            judged(simt, data, forged(simt, data, change))


def test_coefficients_out_of_range_are_noticed_where_the_cpu_notices_them(simt, writer):
    rng = np.random.default_rng(18)
    found = {"ok": 0, "damaged": 0}
    for trial in range(60 if simt.variant == "plain" else 15):
        blocks = np.zeros((1, 4, 64), int)
        blocks[0, :, 0] = rng.integers(-60, 60, 4)
        for _ in range(int(rng.integers(0, 3))):
            blocks[0, rng.integers(4), rng.integers(64)] = int(rng.choice([30, -30, 300, -300, 2000, 32767, -90]))
        quant = [int(rng.choice([1, 8, 255]))] * 64
        if trial % 3 == 0:
            blocks[0, :, 1:] = 0  # the short way
            blocks[0, 2, 0] = int(rng.choice([511, 513, -512, -513, 4000, -4097]))
            quant = [8] * 64
        data = writer.write(32, 8, GREY, [blocks], quant)
        status = on_cpu(simt, data)[0]
        word, bits = judged(simt, data, first_checkpoint(data, 4, 1))  # of a file out of range no index is made
        assert word == "ok"
        assert (bits == 0) == (status == "ok")
        found[status] += 1
    assert min(found.values()) > 2


def first_checkpoint(data, mcus_x, rows):
    """An index of one checkpoint, at the first byte."""
    head = b"SJIX" + (1).to_bytes(2, "little") + (4).to_bytes(2, "little")
    head += mcus_x.to_bytes(4, "little") + rows.to_bytes(4, "little") + len(data).to_bytes(8, "little") + bytes(8)
    return renewed(None, head + bytes(11) + bytes(8), data)


def test_what_is_not_for_the_device_gets_a_status_and_harms_no_other(simt, writer):
    rng = np.random.default_rng(19)
    good = writer.picture(rng, 50, 40, HALF)
    other = writer.picture(rng, 50, 40, HALF)
    progressive = writer.picture(rng, 50, 40, HALF, frame=0xC2)
    files = [good, b"", b"\xff\xd8\xff", progressive, other, good, good]
    indexes = [index_of(simt, good), None, None, None, index_of(simt, good), None, index_of(simt, good)]
    found = run(simt, plan(simt, files, indexes))
    words = [status for status, *_ in found]
    assert words == ["ok", "unsupported", "unsupported", "unsupported", "foreign index", "foreign index", "ok"]
    for k in (0, 6):
        assert found[k][1] == 0
        assert_same_planes(found[k][3], on_cpu(simt, good)[2])
    assert run(simt, plan(simt, [b"", b"x"], [None, None])) == [("unsupported", 0, None, None)] * 2


def test_a_batch_takes_what_its_workspace_has_room_for_but_at_least_one(simt, writer):
    data = writer.picture(np.random.default_rng(20), 50, 40, HALF)
    need = plan(simt, [data]).coefficient_bytes
    assert need == 2 * 128 * 6 * 4 * 3 // 2  # 4 x 3 MCUs of six blocks of 128 bytes
    for most, taken in [(0, 1), (need, 1), (2 * need - 1, 1), (2 * need, 2), (3 * need, 3), (10 * need, 4)]:
        batch = plan(simt, [data] * 4, most=most)
        assert batch.taken == taken
        assert batch.coefficient_bytes == taken * need
    assert simt.JpegBatch([data], [index_of(simt, data)], [(0, 0, 0, 0)], 1 << 40, 1999).images() == [
        {"status": "unsupported"}
    ]


def test_boxes_outside_of_an_image_are_refused(simt, writer):
    data = writer.picture(np.random.default_rng(21), 50, 40, HALF)
    for box in [(0, 0, 41, 1), (0, 0, 1, 51), (40, 0, 1, 1), (-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, -1, 5), (0, 0, 5, 0)]:
        with pytest.raises(ValueError, match=r"boxes\[1\]: expected one within 40 x 50, found"):
            plan(simt, [data] * 2, boxes=[(0, 0, 0, 0), box])
    with pytest.raises(ValueError, match="differ in length"):
        simt.JpegBatch([data], [], [(0, 0, 0, 0)], 1, 1)


def test_addresses_must_be_multiples_of_16(simt, writer):
    batch = plan(simt, [writer.picture(np.random.default_rng(22), 9, 9, GREY)])
    for wrong in range(3):
        addresses = [1024 + 8 * (k == wrong) for k in range(3)]
        with pytest.raises(ValueError, match="multiples of 16 bytes"):
            simt.decode_jpeg_cuda(batch, *addresses, 0, 0)


def test_nothing_is_launched_for_nothing(simt):
    before = simt.statistics()["launches"]
    batch = plan(simt, [])
    assert (batch.taken, batch.upload_bytes, batch.image_count) == (0, 64, 0)
    simt.decode_jpeg_cuda(batch, 0, 0, 0, 0, 0)
    assert simt.statistics()["launches"] == before
