import io
import tarfile

import numpy as np
import pytest

from sela_ext.data.tar import is_tar, walk_tar
from sela_ext.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def walk(data):
    return list(walk_tar(io.BytesIO(data), "a.tar", archive_bytes=len(data)))


def archive(*entries, format=tarfile.GNU_FORMAT):
    """A tar archive of (name, bytes, {field: value})."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as out:
        for name, data, fields in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            out.addfile(info, io.BytesIO(data))
    return file.getvalue()


def with_sum(block):
    """A header block with the right checksum."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def header(name=b"a.jpg", size=b"00000000005\0", kind=b"0", magic=b"ustar\x0000"):
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size
    block[156:157] = kind
    block[257:265] = magic
    return with_sum(block)


END = bytes(1024)


@pytest.mark.parametrize("format", FORMATS)
def test_members_are_where_tarfile_finds_them(format):
    rng = np.random.default_rng(2)
    names = ["a.jpg", "./b/c.png", "d/" * 40 + "deep.jpg", "x" * 99, "y" * 100, "m/" * 20 + "z" * 90]
    if format != "ustar":
        names += ["p" * 300 + ".jpg", "q/" * 200 + "r.cls", "Müller/Bild – 1.jpg", "\udcff.jpg"]
    sizes = [0, 1, 511, 512, 513, 1024, 70000, 3, 5, 7]
    entries = [(name, rng.bytes(size), {}) for name, size in zip(names, sizes, strict=False)]
    data = archive(("folder", b"", {"type": tarfile.DIRTYPE}), *entries, format=FORMATS[format])
    found = walk(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as known:
        wanted = [(m.name, m.offset_data, m.size) for m in known.getmembers() if m.isfile()]
    assert [(m.name, m.offset, m.size) for m in found] == [
        (name.removeprefix("./"), offset, size) for name, offset, size in wanted
    ]
    assert [data[m.offset : m.offset + m.size] for m in found] == [content for _, content, _ in entries]


def test_sizes_in_base_256_and_in_pax_headers_are_read():
    block = header(size=b"\x80" + bytes(10) + b"\x05")
    assert walk(block + b"12345".ljust(512, b"\0") + END)[0].size == 5
    record = b"10 size=5\n"
    assert len(record) == 10
    pax = header(name=b"x", size=b"00000000012\0", kind=b"x") + record.ljust(512, b"\0")
    assert walk(pax + header(size=b"00000000000\0") + b"12345".ljust(512, b"\0") + END)[0].size == 5


def test_common_headers_of_no_importance_are_skipped():
    data = archive(("a.jpg", b"1", {"mtime": 1.5}), format=tarfile.PAX_FORMAT)
    comment = b"18 comment=abcdef\n"
    pax = header(name=b"g", size=b"%011o\0" % len(comment), kind=b"g") + comment.ljust(512, b"\0")
    assert [member.name for member in walk(pax + data)] == ["a.jpg"]
    named = b"16 path=abcdefg\n"
    pax = header(name=b"g", size=b"%011o\0" % len(named), kind=b"g") + named.ljust(512, b"\0")
    with pytest.raises(DataError, match="expected each member to have its own name and size"):
        walk(pax + data)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../../b.jpg", "..", "a/..", "./../b.jpg", "//x.jpg"]
)
@pytest.mark.parametrize("format", FORMATS)
def test_names_that_lead_out_of_the_archive_are_refused(name, format):
    data = archive(("ok.jpg", b"1", {}), (name, b"root:x", {}), format=FORMATS[format])
    with pytest.raises(DataError, match=r"a\.tar: expected names within the archive, found '.*'; nothing was unpacked"):
        walk(data)


def test_a_long_name_that_climbs_is_refused_too():
    for format in ("gnu", "pax"):
        with pytest.raises(DataError, match="expected names within the archive"):
            walk(archive(("../" * 60 + "etc/passwd", b"x", {}), format=FORMATS[format]))


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (tarfile.SYMTYPE, "a symbolic link, a.jpg"),
        (tarfile.LNKTYPE, "a hard link, a.jpg"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"M", "a part of another"),
        (b"Z", "unknown type b'Z'"),
    ],
)
def test_links_devices_and_sparse_files_are_refused(kind, match):
    with pytest.raises(DataError, match=match):
        walk(header(kind=kind, size=b"00000000000\0") + END)


def test_sparse_files_of_pax_archives_are_refused():
    record = b"22 GNU.sparse.major=1\n"
    pax = header(name=b"x", size=b"%011o\0" % len(record), kind=b"x") + record.ljust(512, b"\0")
    with pytest.raises(DataError, match="a sparse file"):
        walk(pax + header() + bytes(512) + END)


@pytest.mark.parametrize("format", FORMATS)
def test_an_archive_cut_anywhere_is_refused(format):
    data = archive(
        ("a.jpg", b"12345", {}),
        ("b" * 120 + ".jpg" if format != "ustar" else "b", b"1" * 700, {}),
        format=FORMATS[format],
    )
    end = data.rstrip(b"\0")
    least = -(-len(end) // 512) * 512 + 1024  # two blocks of zeros
    for size in range(least):
        with pytest.raises(DataError):
            walk(data[:size])
    assert len(walk(data[:least])) == 2


def test_data_behind_the_end_are_noticed():
    data = archive(("a.jpg", b"1", {}))
    with pytest.raises(DataError, match="expected the end of the archive, found more data"):
        walk(data + data)


def test_a_flipped_bit_in_a_header_is_noticed():
    data = archive(("a.jpg", b"1", {}), ("b.jpg", b"2", {}))
    for at in range(512):
        for bit in (0, 7):
            changed = bytearray(data)
            changed[1024 + at] ^= 1 << bit
            try:
                found = walk(bytes(changed))
            except DataError:
                continue
            # Only the way in which the checksum itself is written can differ.
            assert [member.name for member in found] == ["a.jpg", "b.jpg"]
            assert 148 <= at < 156


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "truncated"),
        (b"x" * 600, "expected the header"),
        (header(size=b"77777777777\0"), "lying header"),
        (header(size=b"\x80" + b"\xff" * 11), "expected the size"),
        (header(size=b"\xff" * 12), "expected the size"),
        (header(size=b"0000000000x\0"), "expected the size"),
        (header(size=b"-0000000001\0"), "expected the size"),
        (header(name=b""), "expected members with names"),
        (header(kind=b"x", size=b"77777777777\0"), "an extended header of at most"),
        (header(kind=b"L", size=b"77777777777\0"), "an extended header of at most"),
        (header(kind=b"L", size=b"00000001000\0") + b"a", "truncated in an extended header"),
    ],
)
def test_lying_headers_are_refused(data, match):
    with pytest.raises(DataError, match=match):
        walk(data + END if len(data) > 512 and data[512:513] != b"a" else data)


@pytest.mark.parametrize(
    "text",
    [
        b"5 path=a\n",
        b"99999999999999999999 path=a\n",
        b"-1 path=a\n",
        b"0 path=a\n",
        b"path=a\n",
        b"9 path a\n",
        b"9 path=a ",
        b"3 \n",
        b"999 path=a\n",
    ],
)
def test_pax_records_that_do_not_add_up_are_refused(text):
    pax = header(name=b"x", size=b"%011o\0" % len(text), kind=b"x") + text.ljust(512, b"\0")
    with pytest.raises(DataError, match="expected records in the extended header"):
        walk(pax + header() + bytes(512) + END)


@pytest.mark.parametrize("value", [b"-5", b"5x", b"99999999999999999999999", b"9999999999999999", b"", "٣".encode()])
def test_pax_sizes_that_are_none_are_refused(value):
    record = b" size=" + value + b"\n"
    record = str(len(record) + (2 if len(record) > 8 else 1)).encode() + record
    pax = header(name=b"x", size=b"%011o\0" % len(record), kind=b"x") + record.ljust(512, b"\0")
    with pytest.raises(DataError, match="expected the size of a member"):
        walk(pax + header() + bytes(512) + END)


def test_an_archive_is_known_by_its_first_block():
    assert is_tar(archive(("a", b"1", {}))[:512])
    assert not is_tar(bytes(512))
    assert not is_tar(archive(("a", b"1", {}))[:511])
    assert not is_tar(b"\x89PNG".ljust(512, b"x"))
