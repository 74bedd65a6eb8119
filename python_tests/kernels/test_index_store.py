import io
import os
import subprocess
import sys
import textwrap
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sela_ext.errors import OptionError
from sela_ext.kernels import READ_OK, READ_OTHER, Augment, IndexStore, IndexStoreWarning, Reader, jpeg_index

HEAD = 16
RECORD = 48


def encoded(seed, height=120, width=140):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    file = io.BytesIO()
    coarse.save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def indexes():
    return [jpeg_index(encoded(seed, 100 + seed, 90 + 7 * seed)) for seed in range(9)]


def number(data, at, size, signed=False):
    return int.from_bytes(data[at : at + size], "little", signed=signed)


def records(data):
    """What the layout in csrc/sela/index_store.h makes of a file's bytes, read by itself."""
    assert data[:8] == b"SELAJPIX"
    assert number(data, 8, 4) == 1
    assert number(data, 12, 4) == zlib.crc32(data[:12])
    at, found = HEAD, []
    while at < len(data):
        assert data[at : at + 4] == b"SJRE"
        assert number(data, at + 4, 4) == zlib.crc32(data[at + 8 : at + RECORD])
        length = number(data, at + 32, 4)
        payload = data[at + RECORD : at + RECORD + length]
        assert number(data, at + 40, 4) == zlib.crc32(payload)
        key = number(data, at + 8, 8), number(data, at + 16, 8), number(data, at + 24, 8, signed=True)
        found.append((key, number(data, at + 36, 2), payload))
        end = at + RECORD + length
        at = (end + 7) // 8 * 8
        assert data[end:at] == bytes(at - end)
    assert at == len(data)
    return found


def filled(folder, indexes, rank=0):
    with IndexStore(folder, rank=rank) as store:
        for i, index in enumerate(indexes):
            store.put(3 * i, 1000 + i, index, -5 + i)
    return Path(folder) / f"jpeg_index-{rank}.bin"


def test_the_file_has_the_stated_layout(tmp_path, indexes):
    path = filled(tmp_path, indexes)
    expected = [((3 * i, 1000 + i, -5 + i), 1, index) for i, index in enumerate(indexes)]
    assert records(path.read_bytes()) == expected


def digest(seed, data):
    mask = (1 << 64) - 1
    h = seed ^ (len(data) * 0x9E3779B97F4A7C15 & mask)
    for at in range(0, len(data), 8):
        h = (h ^ number(data[at : at + 8].ljust(8, b"\0"), 0, 8)) * 0xD6E8FEB86659FD93 & mask
        h ^= h >> 32
    return h


def digest_of_file(data):
    at = data.index(b"\xff\xda")
    scan = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    h, rest = digest(1, data[: min(scan, 4096)]), data[scan:]
    if len(rest) <= 2048:
        return digest(h, rest)
    for i in range(32):
        begin = i * ((len(rest) - 64) // 31)
        h = digest(h, rest[begin : begin + 64])
    return h


@pytest.mark.parametrize(("height", "width"), [(17, 30), (500, 601)])
def test_an_index_has_the_stated_layout(height, width):
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "JPEG", subsampling=0)
    data = file.getvalue()
    index = jpeg_index(data)
    across, down = -(-width // 8), -(-height // 8)
    assert index[:4] == b"SJIX"
    assert [number(index, at, size) for at, size in ((4, 2), (6, 2), (8, 4), (12, 4))] == [1, 4, across, down]
    assert (number(index, 16, 8), number(index, 24, 8)) == (len(data), digest_of_file(data))
    assert len(index) == 40 + 11 * down * -(-across // 4)
    assert number(index, 32, 4) == 0
    assert number(index, len(index) - 8, 8) == digest(0, index[:-8])


def test_a_damaged_file_leaves_its_digest(tmp_path):
    data = bytearray(encoded(0, 300, 300))
    data[-60:-2] = b"\xff\xd8" * 29
    with IndexStore(tmp_path) as store, Reader([Augment.none(32)], threads=1, index=store) as reader:
        batch = reader.submit([bytes(data)], [4], [torch.zeros(1, 3, 32, 32)], seed=0, epoch=0).wait()
        assert batch.status[0] == READ_OTHER
    [(key, kind, payload)] = records((tmp_path / "jpeg_index-0.bin").read_bytes())
    assert (key, kind, number(payload, 0, 8), len(payload)) == ((4, len(data), 0), 2, digest_of_file(bytes(data)), 8)


def test_what_was_put_in_is_found_again_after_opening_anew(tmp_path, indexes):
    filled(tmp_path, indexes)
    with IndexStore(tmp_path) as store:
        assert len(store) == len(indexes)
        assert store.path == tmp_path / "jpeg_index-0.bin"
        assert store.failure is None
        for i, index in enumerate(indexes):
            assert store.get(3 * i, 1000 + i, -5 + i) == index
            assert store.get(3 * i, 1000 + i, 0 if i != 5 else 1) is None
            assert store.get(3 * i, 1001 + i, -5 + i) is None
            assert store.get(3 * i + 1, 1000 + i, -5 + i) is None


def test_thousands_of_entries_are_found(tmp_path, indexes):
    numbers = np.random.default_rng(0).permutation(5000)
    with IndexStore(tmp_path) as store:
        for n in numbers.tolist():
            store.put(n * 219902325, n + 1, indexes[n % 9])
    with IndexStore(tmp_path) as store:
        assert len(store) == 5000
        assert store.nbytes == (tmp_path / "jpeg_index-0.bin").stat().st_size
        assert all(store.get(n * 219902325, n + 1) == indexes[n % 9] for n in numbers.tolist())


def test_the_last_record_of_an_image_counts(tmp_path, indexes):
    with IndexStore(tmp_path) as store:
        store.put(7, 10, indexes[0])
        store.put(7, 10, indexes[1])  # nothing new: not written
        assert store.get(7, 10) == indexes[0]
        store.put(7, 11, indexes[2])
        assert (store.get(7, 10), store.get(7, 11)) == (None, indexes[2])
        assert len(store) == 1
    assert len(records((tmp_path / "jpeg_index-0.bin").read_bytes())) == 2
    with IndexStore(tmp_path) as store:
        assert (store.get(7, 10), store.get(7, 11)) == (None, indexes[2])


def test_a_torn_tail_is_cut_off_wherever_it_was_torn(tmp_path, indexes):
    path = filled(tmp_path, indexes[:4])
    whole = path.read_bytes()
    ends = [HEAD]
    for _, _, payload in records(whole):
        ends.append(ends[-1] + (RECORD + len(payload) + 7) // 8 * 8)
    for cut in [
        0,
        1,
        11,
        15,
        16,
        17,
        40,
        63,
        64,
        ends[1] - 1,
        ends[1],
        ends[1] + 5,
        ends[3] + 47,
        ends[3] + 48,
        len(whole) - 1,
    ]:
        path.write_bytes(whole[:cut])
        kept = max(sum(end <= cut for end in ends) - 1, 0)
        with IndexStore(tmp_path) as store:
            assert (len(store), store.failure) == (kept, None), cut
            assert path.stat().st_size == ends[kept]
            store.put(99, 1, indexes[5])
        assert [key[0] for key, _, _ in records(path.read_bytes())] == [*[0, 3, 6, 9][:kept], 99]


def test_damage_costs_the_records_it_hits_and_never_gives_a_wrong_index(tmp_path, indexes):
    path = filled(tmp_path, indexes[:4])
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(HEAD, len(data))] = rng.integers(256)
        path.write_bytes(data)
        with IndexStore(tmp_path) as store:
            for i, index in enumerate(indexes[:4]):
                found = store.get(3 * i, 1000 + i, -5 + i)
                # What an index holds is vouched for by its own checksum, which the decoder looks at.
                assert found is None or found == index or len(found) == len(index)


def test_records_that_claim_to_be_huge_end_the_file(tmp_path, indexes):
    path = filled(tmp_path, indexes[:2])
    data = bytearray(path.read_bytes())
    for length in (0xFFFFFFFF, 1 << 28, 1 << 20):
        data[HEAD + 32 : HEAD + 36] = length.to_bytes(4, "little")
        data[HEAD + 4 : HEAD + 8] = zlib.crc32(data[HEAD + 8 : HEAD + RECORD]).to_bytes(4, "little")
        path.write_bytes(data)
        with IndexStore(tmp_path) as store:
            assert len(store) == 0
            assert store.get(0, 1000, -5) is None


def test_foreign_files_are_neither_read_nor_changed(tmp_path, indexes):
    foreign = tmp_path / "jpeg_index-0.bin"
    newer = b"SELAJPIX" + (2).to_bytes(4, "little")
    for content in (b"something else entirely", newer + zlib.crc32(newer).to_bytes(4, "little") + b"more"):
        foreign.write_bytes(content)
        with pytest.warns(IndexStoreWarning, match="not a file of checkpoint indexes"):
            store = IndexStore(tmp_path)
        with store:
            store.put(1, 2, indexes[0])
            assert store.get(1, 2) == indexes[0]
            assert store.path is None
        assert foreign.read_bytes() == content


def test_pipes_and_folders_of_such_a_name_do_not_hang(tmp_path, indexes):
    os.mkfifo(tmp_path / "jpeg_index-1.bin")
    (tmp_path / "jpeg_index-2.bin").mkdir()
    with IndexStore(tmp_path) as store:
        assert len(store) == 0
    (tmp_path / "jpeg_index-0.bin").unlink()
    os.mkfifo(tmp_path / "jpeg_index-0.bin")
    with pytest.warns(IndexStoreWarning, match="not a regular file"):
        store = IndexStore(tmp_path)
    with store:
        store.put(1, 2, indexes[0])
        assert store.get(1, 2) == indexes[0]


def test_processes_write_files_of_their_own_and_read_all(tmp_path, indexes):
    with IndexStore(tmp_path, rank=0) as first, IndexStore(tmp_path, rank=1) as second:
        first.put(0, 5, indexes[0])
        second.put(1, 5, indexes[1])
        assert (first.get(1, 5), second.get(0, 5)) == (None, None)
        first.refresh()
        second.refresh()
        assert (first.get(1, 5), second.get(0, 5)) == (indexes[1], indexes[0])
        second.put(2, 5, indexes[2])
        with IndexStore(tmp_path, rank=2) as third:
            assert [third.get(i, 5) for i in range(3)] == indexes[:3]
            third.put(0, 6, indexes[3])  # another state of the image
        first.refresh()
        assert (first.get(0, 5), first.get(0, 6), first.get(2, 5)) == (None, indexes[3], indexes[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"jpeg_index-{rank}.bin" for rank in range(3)]


def test_a_second_writer_of_the_same_file_does_not_disturb_the_first(tmp_path, indexes):
    with IndexStore(tmp_path) as first:
        first.put(0, 5, indexes[0])
        with pytest.warns(IndexStoreWarning, match="not kept after this run: .*in use by another process$"):
            second = IndexStore(tmp_path)
        with second:
            assert second.get(0, 5) == indexes[0]
            second.put(1, 5, indexes[1])
            assert second.get(1, 5) == indexes[1]
        first.put(2, 5, indexes[2])
        assert first.get(0, 5) == indexes[0]
    assert [key[0] for key, _, _ in records((tmp_path / "jpeg_index-0.bin").read_bytes())] == [0, 2]


def test_a_folder_that_cannot_be_written_to_is_read_and_told_once(tmp_path, indexes):
    filled(tmp_path, indexes[:3], rank=1)
    (tmp_path / "sub").write_text("a file, where a folder is expected")
    with pytest.warns(IndexStoreWarning, match="sub") as caught:
        store = IndexStore(tmp_path / "sub")
    assert len(caught) == 1
    with store, warnings.catch_warnings():
        warnings.simplefilter("error")
        store.put(1, 2, indexes[0])
        assert store.get(1, 2) == indexes[0]
    if os.geteuid() == 0:
        return  # root writes anywhere
    tmp_path.chmod(0o500)
    with pytest.warns(IndexStoreWarning), IndexStore(tmp_path) as store:
        assert len(store) == 3
    tmp_path.chmod(0o700)


def test_a_full_disk_ends_the_writing_with_one_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(FULL), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    kept = len(records((tmp_path / "jpeg_index-0.bin").read_bytes()))
    assert 0 < kept < 60


FULL = """
    import io, resource, sys, warnings
    import numpy as np, torch
    from PIL import Image
    from sela_ext.kernels import Augment, IndexStore, IndexStoreWarning, Reader
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)).save(file, "JPEG")
    data = file.getvalue()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    store = IndexStore(sys.argv[1])
    reader = Reader([Augment.sela(32)], threads=2, index=store)
    batches = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in (0, 0, 0):
            out = torch.empty(60, 3, 32, 32)
            batch = reader.submit([data] * 60, np.arange(60), [out], seed=0, epoch=epoch).wait()
            assert (batch.status == 0).all()
            batches.append(out)
    assert torch.equal(batches[0], batches[1]) and torch.equal(batches[0], batches[2])
    assert [w.category for w in caught] == [IndexStoreWarning], caught
    assert "File too large" in str(caught[0].message), caught[0].message
    assert 0 < len(store) < 60
"""


def test_folders_need_not_have_names_in_utf8(tmp_path, indexes):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    with IndexStore(folder) as store:
        store.put(1, 2, indexes[0])
        assert store.path == Path(folder) / "jpeg_index-0.bin"
    with IndexStore(folder) as store:
        assert store.get(1, 2) == indexes[0]
        with pytest.warns(IndexStoreWarning, match="in use by another process") as caught:
            IndexStore(folder).close()
        str(caught[0].message).encode("utf-8")


def test_images_that_keep_changing_do_not_fill_the_disk(tmp_path, indexes):
    with IndexStore(tmp_path) as store:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for size in range(2000):
                store.put(0, size, indexes[0])
        assert [str(warning.message).count("replacing") for warning in caught] == [1]
        assert store.nbytes < 1100 * (RECORD + len(indexes[0]) + 8)


def test_bad_ranks_are_refused(tmp_path):
    with pytest.raises(OptionError, match="rank"):
        IndexStore(tmp_path, rank=-1)
    with pytest.raises(OptionError, match="rank"):
        IndexStore(tmp_path, rank="0")


# ---------------------------------------------------------------- with a reader


def read(items, store, epoch=0):
    augment = Augment.sela(32)
    out = torch.zeros(len(items), 3, 32, 32)
    with Reader([augment], threads=2, index=store) as reader:
        batch = reader.submit(items, np.arange(len(items)), [out], seed=1, epoch=epoch).wait()
    assert (batch.status == READ_OK).all()
    return out


def test_the_reader_stores_the_index_that_jpeg_index_makes(tmp_path):
    items = [encoded(seed) for seed in range(5)]
    paths = []
    for i, data in enumerate(items):
        paths.append(str(tmp_path / f"{i}.jpg"))
        Path(paths[-1]).write_bytes(data)
    with IndexStore() as store:
        read(paths, store)
        for i, data in enumerate(items):
            assert store.get(i, len(data), os.stat(paths[i]).st_mtime_ns) == jpeg_index(data)


def test_a_changed_file_is_indexed_anew(tmp_path):
    path = tmp_path / "a.jpg"
    with IndexStore(tmp_path / "run") as store:
        for seed in range(4):
            path.write_bytes(encoded(seed))
            os.utime(path, ns=(1, 10**18 + seed))
            assert torch.equal(read([str(path)], store), read([encoded(seed)], None))
            assert store.get(0, path.stat().st_size, 10**18 + seed) == jpeg_index(encoded(seed))
        assert len(store) == 1


def test_bytes_of_the_same_size_but_other_content_do_not_get_a_foreign_index():
    first = encoded(1)
    second = bytearray(first)
    second[-40] ^= 1  # within the entropy-coded data, which may now be in order or not
    with IndexStore() as store:
        expected = read([first], store)
        augment = Augment.sela(32)
        for data in (bytes(second), first):
            made = []
            for index in (None, store, store):
                out = torch.zeros(1, 3, 32, 32)
                with Reader([augment], threads=1, index=index) as reader:
                    batch = reader.submit([data], [0], [out], seed=1, epoch=0).wait()
                made.append((batch.status[0], out))
            assert len({int(status) for status, _ in made}) == 1
            assert torch.equal(made[0][1], made[1][1])
            assert torch.equal(made[0][1], made[2][1])
        assert torch.equal(made[0][1], expected)


def test_spoilt_indexes_in_a_store_are_made_anew(tmp_path):
    items = [encoded(seed) for seed in range(3)]
    expected = read(items, None)
    with IndexStore(tmp_path) as store:
        read(items, store)
    path = tmp_path / "jpeg_index-0.bin"
    data = bytearray(path.read_bytes())
    data[HEAD + RECORD + 40] ^= 255  # in the first payload
    path.write_bytes(data)
    with IndexStore(tmp_path) as store:
        assert len(store) == 3
        assert torch.equal(read(items, store), expected)
        assert [store.get(i, len(items[i])) for i in range(3)] == [jpeg_index(data) for data in items]
    assert path.read_bytes()[: len(data)] == data  # appended, nothing overwritten
