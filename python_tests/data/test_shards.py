import hashlib
import json
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sela_ext import doctor
from sela_ext.data import PackSource, open_source, pack, shards, verify_pack
from sela_ext.data.shard_format import FOOT, FORMATS, HEAD, PLACE, RECORD, RECORD_STRUCT
from sela_ext.data.shards import find_pack, open_pack
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels import try_decode_jpeg

SHARD = "shard-00000.sela"


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """5 JPEG files, the fourth of which is empty, and a PNG."""
    root = tmp_path_factory.mktemp("images")
    for i in range(5):
        Image.fromarray(random_images(20 + i, 110, 3, seed=i)).save(root / f"{i}.jpg", quality=30)
    (root / "3.jpg").write_bytes(b"")
    Image.fromarray(random_images(4, 6, 3)).save(root / "5.png")
    return root


@pytest.fixture
def packed(tmp_path, images):
    pack(images, tmp_path / "pack", on_bad_image="skip", max_bad_fraction=0.5, labels=list(range(6)))
    return tmp_path / "pack"


def flip(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def read_foot(data):
    return list(FOOT.unpack(data[-FOOT.size :]))


def seal(path, data):
    """Make the checksums of a shard right whatever it says."""
    fields = read_foot(data)
    images, table_offset, text_offset, text_bytes = fields[:4]
    fields[5] = zlib.crc32(data[table_offset : table_offset + 64 * images])
    fields[6] = zlib.crc32(data[text_offset : text_offset + text_bytes])
    body = bytes(data[: -FOOT.size])
    fields[7] = hashlib.sha256(body).digest()
    foot = FOOT.pack(*fields)
    foot = foot[:-12] + struct.pack("<I", zlib.crc32(foot[:-12])) + foot[-8:]
    path.write_bytes(body + foot)


def change_manifest(folder, **changes):
    """Write pack.json with other values and the right checksum."""
    fields = json.loads((folder / "pack.json").read_bytes())
    del fields["sha256"]
    fields.update(changes)
    text = ('{"sha256": "' + "0" * 64 + '", ' + json.dumps(fields)[1:]).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    (folder / "pack.json").write_bytes(text.replace(b"0" * 64, digest, 1))


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_in_head_foot_and_table_is_found_when_the_pack_is_opened(packed):
    path = packed / SHARD
    whole = path.read_bytes()
    size, table = len(whole), read_foot(whole)[1]
    places = [*range(HEAD.size), *range(table, size)]
    assert len(places) == 64 + 6 * 64 + 128
    for position in places:
        flip(path, position, position * 5 % 8)
        with pytest.raises(DataError, match=SHARD) as caught:
            open_source(packed)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    open_source(packed)


def test_every_flipped_bit_in_the_manifest_is_found(packed):
    path = packed / "pack.json"
    whole = path.read_bytes()
    for position in [*range(100), *range(100, len(whole), 5)]:
        flip(path, position, position % 8)
        with pytest.raises(DataError, match=r"pack\.json"):
            open_source(packed)
        path.write_bytes(whole)
    open_source(packed)


def test_every_flipped_byte_of_the_contents_is_found_by_verify(packed):
    path = packed / SHARD
    whole = path.read_bytes()
    table, text = read_foot(whole)[1:3]
    draw = np.random.default_rng(3)
    for position in [*draw.integers(HEAD.size, text, 60).tolist(), *range(text, table)]:
        flip(path, position, position % 8)
        with pytest.raises(DataError, match=f"damaged: {SHARD}: the contents do not match"):
            verify_pack(packed)
        path.write_bytes(whole)
    assert verify_pack(packed).images == 6


def test_damage_of_an_image_is_named_by_number(packed):
    whole = (packed / SHARD).read_bytes()
    table = read_foot(whole)[1]
    offset, index_offset, length, index_length = PLACE.unpack_from(whole, table + 2 * RECORD.itemsize)
    for position in (offset, offset + length - 1, index_offset, index_offset + index_length - 1):
        flip(packed / SHARD, position, 3)
        with pytest.raises(DataError, match=r"; shard-00000\.sela: image 2 does not match its checksum; copy"):
            verify_pack(packed)
        source = open_source(packed)
        with pytest.raises(DataError, match=r"2\.jpg: image 2 in .* does not match its checksum"):
            source.read(2)
        source.read(1)
        (packed / SHARD).write_bytes(whole)


def damage_pixels(folder, index):
    """Change a byte in the middle of a JPEG file, in a way that it can still be decoded."""
    source = PackSource(folder)
    before = source.read(index)
    _, record = source._record(index)
    offset, _, length, _ = PLACE.unpack_from(record)
    for position in range(offset + length // 2, offset + length):
        flip(folder / SHARD, position, 0)
        data = (folder / SHARD).read_bytes()[offset : offset + length]
        found = try_decode_jpeg(data)
        if found is not None and (found != before).any():
            return
        flip(folder / SHARD, position, 0)
    raise AssertionError("nothing that could be damaged")


def test_damage_that_can_still_be_decoded_is_found_by_all_that_read_once(tmp_path, packed):
    damage_pixels(packed, 1)
    message = r"1\.jpg: image 1 in .* does not match its checksum; copy the shard again"
    source = open_source(packed)
    for read in (source.read, source.encoded_bytes, source.subset([2, 1]).read, source.subset([1, 1]).encoded_bytes):
        with pytest.raises(DataError, match=message):
            read(1)
    with pytest.raises(DataError, match=message):  # a pack of a pack must not give wrong bytes a right checksum
        pack(source.subset([0, 1]), tmp_path / "again")
    bad = {one["index"]: one["reason"] for one in doctor(packed, threads=1)["bad"]["images"]}
    assert set(bad) == {1, 3}
    assert "does not match its checksum" in bad[1]
    assert "empty file" in bad[3]
    assert "(when it was packed)" in bad[3]


def test_damaged_names_are_found_when_they_are_asked_for(packed):
    text = read_foot((packed / SHARD).read_bytes())[2]
    flip(packed / SHARD, text, 0)
    source = open_source(packed)
    with pytest.raises(DataError, match="the names do not match their checksum"):
        _ = source.names


def test_a_truncated_shard_is_found_at_every_length(packed):
    path = packed / SHARD
    whole = path.read_bytes()
    for length in [*range(0, 70), *range(70, len(whole), 397), *range(len(whole) - 200, len(whole), 3)]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=SHARD):
            open_source(packed)
    path.write_bytes(whole + b"x")
    with pytest.raises(DataError, match=f"expected {len(whole)} bytes, found {len(whole) + 1}"):
        open_source(packed)


def test_a_missing_shard_and_a_missing_manifest_are_named(packed):
    data = (packed / SHARD).read_bytes()
    (packed / SHARD).unlink()
    with pytest.raises(DataError, match="the shard is missing"):
        open_source(packed)
    os.mkfifo(packed / SHARD)
    with pytest.raises(DataError, match="not a regular file"):
        open_source(packed)
    (packed / SHARD).unlink()
    (packed / SHARD).write_bytes(data)
    (packed / "pack.json").unlink()
    with pytest.raises(DataError, match=r"has lost its pack\.json"):
        open_source(packed)


def test_foreign_files_and_shards_of_other_packs_are_refused(tmp_path, packed):
    whole = (packed / SHARD).read_bytes()
    (packed / SHARD).write_bytes(b"BM" + bytes(len(whole) - 2))
    with pytest.raises(DataError, match="expected a shard of a pack, found a file that starts with"):
        open_source(packed)
    pack("digits", tmp_path / "digits")
    (packed / SHARD).write_bytes((tmp_path / "digits" / SHARD).read_bytes())
    with pytest.raises(DataError, match="a shard of another pack"):
        open_source(packed)
    with pytest.raises(DataError, match="expected the folder of a pack"):
        verify_pack(tmp_path / "absent")


def test_shards_under_one_anothers_names_are_refused(tmp_path):
    pack(random_images(30, 8, 8), tmp_path / "pack", shard_bytes=64 * 10)
    one, two = tmp_path / "pack" / SHARD, tmp_path / "pack" / "shard-00001.sela"
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    with pytest.raises(DataError, match="expected shard 0 with images from 0, found shard 1 with images from 10"):
        open_source(tmp_path / "pack")


def test_a_shard_of_the_same_pack_made_from_other_bytes_is_found_by_verify(tmp_path):
    images = random_images(3, 8, 8)
    pack(images, tmp_path / "pack")
    path = tmp_path / "pack" / SHARD
    data = bytearray(path.read_bytes())
    data[HEAD.size] ^= 1
    record = read_foot(data)[1]
    struct.pack_into("<I", data, record + 56, zlib.crc32(data[HEAD.size : HEAD.size + 64]))
    seal(path, data)
    with pytest.raises(DataError, match=r"the SHA-256 is not that of pack\.json"):
        verify_pack(tmp_path / "pack")


def test_a_newer_version_is_named(packed):
    whole = bytearray((packed / SHARD).read_bytes())
    struct.pack_into("<I", whole, 8, 2)
    (packed / SHARD).write_bytes(whole)
    with pytest.raises(DataError, match=r"newer version of this package \(format 2, this one reads 1.*upgrade"):
        open_source(packed)
    change_manifest(packed, version=3)
    with pytest.raises(DataError, match=r"newer version of this package \(format 3, this one reads 1"):
        open_source(packed)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "another"},
        {"version": "1"},
        {"version": 0},
        {"id": "zz"},
        {"id": 5},
        {"images": 0},
        {"images": 7},
        {"images": True},
        {"skipped": 0},
        {"skipped": -1},
        {"channels": 2},
        {"channels": 10**30},
        {"class_names": "ab"},
        {"class_names": [1]},
        {"class_names": ["a"]},
        {"labels": 1},
        {"names_sha256": None},
        {"options": []},
        {"shards": {}},
        {"shards": []},
        {"shards": [{"file": "../shard-00000.sela", "images": 6, "bytes": 100, "sha256": ""}]},
        {"shards": [{"file": SHARD, "images": 6, "bytes": 1 << 70, "sha256": ""}]},
        {"shards": [{"file": SHARD, "images": 6, "bytes": 99, "sha256": ""}]},
        {"images": 1 << 50, "shards": [{"file": SHARD, "images": 1 << 50, "bytes": 99, "sha256": ""}]},
        {"shards": [{"file": SHARD, "images": 6}]},
        {"shards": [None]},
    ],
)
def test_manifests_that_cannot_be_are_refused(packed, changes):
    change_manifest(packed)
    open_source(packed)  # so that it is the change that is refused
    change_manifest(packed, **changes)
    with pytest.raises(DataError):
        open_source(packed)


def test_a_manifest_of_hostile_json_is_refused(packed):
    for body in (b"[" * 100_000, b"null", b'{"format": NaN}', b'"\xff"', b""):
        text = b'{"sha256": "' + b"0" * 64 + b'", "x": ' + body
        digest = hashlib.sha256(text).hexdigest().encode()
        (packed / "pack.json").write_bytes(text.replace(b"0" * 64, digest, 1))
        with pytest.raises(DataError):
            open_source(packed)


# ---- tables that lie, under right checksums -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("offset", 0, "image 2 lies outside the file"),
        ("offset", 2**64 - 1, "image 2 lies outside the file"),
        ("offset", 2**63, "image 2 lies outside the file"),
        ("length", 2**32 - 1, "image 2 lies outside the file"),
        ("length", 0, "image 2 has no bytes"),
        ("index_offset", 2**64 - 5, "image 2 has an index that lies outside"),
        ("index_length", 2**32 - 1, "image 2 has an index that lies outside"),
        ("height", 0, "image 2 has an impossible size"),
        ("width", 2**32 - 1, "image 2 has an impossible size"),
        ("label", -2, "image 2 has an impossible label"),
        ("text_offset", 2**64 - 1, "image 2 has a name that lies outside"),
        ("name_length", 2**32 - 1, "image 2 has a name that lies outside"),
        ("reason_length", 1, "image 2 has a reason"),
        ("format", 8, "image 2 has an unknown format"),
        ("format", 255, "image 2 has an unknown format"),
        ("format", 0, "image 2 has bytes, though"),
        ("format", 1, "image 2 has a JPEG index, though it is no JPEG"),
        ("format", 3, "image 2 has a JPEG index, though it is no JPEG"),
    ],
)
def test_a_table_that_points_out_of_the_file_is_refused(packed, field, value, message):
    data = bytearray((packed / SHARD).read_bytes())
    start, images = read_foot(data)[1], read_foot(data)[0]
    table = np.frombuffer(data, dtype=RECORD, count=images, offset=start)
    table[field][2] = value
    del table
    seal(packed / SHARD, data)
    with pytest.raises(DataError, match=message):
        open_source(packed)


def test_raw_pixels_that_are_too_few_for_their_size_are_refused(tmp_path):
    pack(random_images(3, 8, 9), tmp_path / "pack")
    path = tmp_path / "pack" / SHARD
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, read_foot(data)[1] + 64 + 24, 9)
    seal(path, data)
    with pytest.raises(DataError, match="image 1 has more or fewer bytes than pixels"):
        open_source(tmp_path / "pack")


@pytest.mark.parametrize(("field", "change"), [(0, 1), (0, 2**40), (1, 64), (1, -64), (2, 2**62), (3, 2**63), (4, 1)])
def test_a_foot_that_points_out_of_the_file_is_refused(packed, field, change):
    data = (packed / SHARD).read_bytes()
    fields = read_foot(data)
    fields[field] += change
    foot = FOOT.pack(*fields)
    foot = foot[:-12] + struct.pack("<I", zlib.crc32(foot[:-12])) + foot[-8:]
    (packed / SHARD).write_bytes(data[: -FOOT.size] + foot)
    with pytest.raises(DataError, match=SHARD):
        open_source(packed)


numbers = st.one_of(
    st.integers(0, 200), st.integers(0, 2**64 - 1), st.sampled_from([2**31, 2**32 - 1, 2**63, 2**64 - 1])
)
records = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(RECORD.names), numbers),
    min_size=1,
    max_size=6,
)


@settings(max_examples=300)
@given(changes=records)
def test_whatever_a_table_says_nothing_outside_the_file_is_read(sealed, changes):
    folder, whole = sealed
    data = bytearray(whole)
    start, images = read_foot(data)[1], read_foot(data)[0]
    table = np.frombuffer(data, dtype=RECORD, count=images, offset=start)
    for row, field, value in changes:
        kind = RECORD[field]
        table[field][row] = value % (1 << 8 * kind.itemsize) if kind.kind == "u" else value % (1 << 62) - 1
    del table
    seal(folder / SHARD, data)
    try:
        source = open_source(folder)
    except DataError:
        return
    for i in range(images):
        if source.encoded:
            place = source.locate(i)
            assert len(place.data) < len(whole)
        assert isinstance(source.name(i), str)
        try:
            assert source.read(i).nbytes < 1 << 26
        except DataError:
            continue


@pytest.fixture(scope="module")
def sealed(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("sealed") / "pack"
    pack(images, folder, on_bad_image="skip", max_bad_fraction=0.5, labels=list(range(6)))
    return folder, (folder / SHARD).read_bytes()


# ---- the source -----------------------------------------------------------------------------------------------------


def test_a_pack_is_found_by_its_folder_and_its_manifest(tmp_path, packed):
    assert find_pack(packed) == find_pack(packed / "pack.json") == packed
    assert find_pack(tmp_path) is None
    assert find_pack(tmp_path / "absent") is None
    assert find_pack(packed / SHARD) is None
    assert open_source(str(packed / "pack.json")).names == open_pack(packed).names
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pack.json").write_text('{"name": "a game"}')
    assert find_pack(tmp_path / "other") is None


def test_the_labels_must_fit_the_class_names(packed):
    change_manifest(packed, class_names=list("abcdef"))
    assert open_source(packed).class_names == list("abcdef")
    change_manifest(packed, class_names=list("abcd"))
    with pytest.raises(DataError, match="expected labels below the number of classes, 4, found 5"):
        open_source(packed)


def test_numbers_out_of_range_are_refused(packed):
    source = open_source(packed)
    for index in (-1, 6):
        with pytest.raises(IndexError, match=r"expected an image in 0\.\.5"):
            source.locate(index)
        with pytest.raises(IndexError, match=r"expected an image in 0\.\.5"):
            source.read(index)


def test_threads_of_verify_are_checked(packed):
    with pytest.raises(OptionError, match="threads: expected a whole number"):
        verify_pack(packed, threads=0)


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_few_files_are_open_however_many_shards_there_are(tmp_path, monkeypatch):
    images = random_images(60, 130, 120, 3)
    pack(images, tmp_path / "pack", raw=False, shard_bytes=1)
    before = open_files()
    source = open_source(tmp_path / "pack")
    assert source.encoded
    assert open_files() == before
    monkeypatch.setattr(shards, "_most_maps", lambda: 5)
    places = [source.locate(i) for i in range(60)]
    assert len(source._maps) == 5
    for i in (0, 31, 59):  # what was taken from a map that is closed is still there
        assert bytes(places[i].data).startswith(b"\x89PNG")
        np.testing.assert_array_equal(source.read(i), images[i])
    del places
    assert open_files() <= before + 6


def test_a_quarter_of_the_files_that_may_be_open_are_maps():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert shards._most_maps() in (64, 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_few_file_handles_are_no_damage(packed):
    resource = pytest.importorskip("resource")
    source = open_source(packed)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(highest + 1)]  # so that no number is free below the limit
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, hard))
        with pytest.raises(ResourceError, match="Too many open files; raise the limit"):
            source.locate(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for handle in held:
            os.close(handle)
    assert len(source.locate(0).data) > 0


def test_a_shard_that_is_cut_after_the_pack_was_opened_is_found_when_it_is_mapped(packed):
    source = open_source(packed)
    data = (packed / SHARD).read_bytes()
    (packed / SHARD).write_bytes(data[:-500])
    with pytest.raises(DataError, match="as when it was opened"):
        source.locate(0)


def test_the_record_has_the_layout_of_the_document():
    assert HEAD.size == 64
    assert FOOT.size == 128
    assert RECORD.itemsize == RECORD_STRUCT.size == 64
    assert FORMATS == ("none", "raw", "JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
    values = (1, 2, 3, 4, 5, 6, -1, 8, 9, 10, 11, 7)
    assert np.frombuffer(RECORD_STRUCT.pack(*values), dtype=RECORD)[0].item() == values


def test_opening_reads_no_image(packed, monkeypatch):
    monkeypatch.setattr(shards, "map_shard", lambda shard: pytest.fail("mapped"))
    source = open_source(packed)
    assert isinstance(source, PackSource)
    assert source.labels.tolist() == [0, 1, 2, -1, 4, 5]
    assert "6 images" in source.describe()
