"""docs/formats.md: its example is what is written, its reader reads every pack, its digests are those of the core.

`python -P python_tests/data/test_formats.py FOLDER` makes the pack of the example in FOLDER and prints both blocks.
"""

import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sela_ext.data import open_source, pack
from sela_ext.data.shard_format import FORMATS
from sela_ext.kernels import jpeg_index

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
# What changes with every version of the package.
CHANGING = re.compile(r'"(?:sha256|written_by)": "[^"]*"')


def hex_dump(data):
    """As `xxd -g 1` shows it."""
    lines = []
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"    {start:08x}: {row.hex(' '):47}  {text}")
    return "\n".join(lines)


def example(folder):
    """The two blocks of the document."""
    pack(np.arange(12, dtype=np.uint8).reshape(2, 2, 3), folder, labels=[1, 0])
    manifest = (folder / "pack.json").read_text()
    return {
        "example": hex_dump((folder / "shard-00000.sela").read_bytes()),
        "manifest": "\n".join("    " + line for line in manifest.splitlines()),
    }


def blocks_of(document, name):
    (found,) = re.findall(rf"<!-- {name} -->\n(.*?)\n?<!-- end of {name} -->", document, re.DOTALL)
    return found.strip("\n")


def test_the_example_is_what_is_written(tmp_path):
    document = DOCUMENT.read_text(encoding="utf-8")
    for name, block in example(tmp_path / "pack").items():
        assert CHANGING.sub("", blocks_of(document, name)) == CHANGING.sub("", block), f"expected:\n{block}"


@pytest.fixture
def read_pack():
    """The function in the document."""
    (code,) = re.findall(r"```python\n(import hashlib.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    return names["read_pack"]


@pytest.mark.parametrize("kind", ["raw", "files", "skipped"])
def test_the_reader_of_the_document_reads_packs(tmp_path, read_pack, kind):
    draw = np.random.default_rng(2)
    data = draw.integers(0, 256, (33, 7, 5, 3), dtype=np.uint8)
    if kind != "raw":
        root, data = tmp_path / "images", tmp_path / "images"
        root.mkdir()
        for i in range(20):
            pixels = draw.integers(0, 256, (110, 111 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"ö{i:02d}.{('png', 'jpg', 'webp')[i % 3]}")
        if kind == "skipped":
            (root / "ö04.jpg").write_bytes(b"\xff\xd8\xff")
    pack(
        data,
        tmp_path / "pack",
        on_bad_image="skip",
        max_bad_fraction=0.1,
        shard_bytes=30_000 if kind == "files" else None,
    )
    source = open_source(tmp_path / "pack")
    found = list(read_pack(tmp_path / "pack"))
    assert [name for name, *_ in found] == source.names
    for i, (_, label, number, height, width, image, index) in enumerate(found):
        assert label == -1
        if number == 0:
            assert (i, image, index, height, width) == (4, b"", b"", 0, 0)
            continue
        pixels = source.read(i)
        assert pixels.shape[:2] == (height, width)
        if FORMATS[number] == "raw":
            assert image == pixels.tobytes()
        else:
            assert image == bytes(source.locate(i).data)
            assert index == bytes(source.locate(i).index or b"")
    assert (sum(number == 0 for _, _, number, *_ in found) == 1) == (kind == "skipped")


def digest(start, data):
    """The digest of the document."""
    mask = (1 << 64) - 1
    h = start ^ (len(data) * 0x9E3779B97F4A7C15 & mask)
    for i in range(0, len(data), 8):
        h = (h ^ int.from_bytes(data[i : i + 8], "little")) * 0xD6E8FEB86659FD93 & mask
        h ^= h >> 32
    return h


@pytest.mark.parametrize("shape", [(8, 8), (33, 70), (250, 310)])
def test_a_checkpoint_index_is_what_the_document_says(tmp_path, shape):
    pixels = np.random.default_rng(5).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg", subsampling="4:4:4")
    data = (tmp_path / "image.jpg").read_bytes()
    index = jpeg_index(data)
    magic, version, group, across, down, size, file_digest = struct.unpack_from("<4sHHIIQQ", index)
    assert (magic, version, group) == (b"SJIX", 1, 4)
    assert (across, down) == (-(-shape[1] // 8), -(-shape[0] // 8))
    assert size == len(data)
    checkpoints = -(-across // 4) * down
    assert len(index) == 32 + 11 * checkpoints + 8
    assert struct.unpack("<Q", index[-8:])[0] == digest(0, index[:-8])
    at = data.index(b"\xff\xda")
    scan = at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
    expected = digest(1, data[: min(scan, 4096)])
    rest = data[scan:]
    if len(rest) <= 2048:
        expected = digest(expected, rest)
    else:
        for i in range(32):
            start = i * ((len(rest) - 64) // 31)
            expected = digest(expected, rest[start : start + 64])
    assert file_digest == expected
    assert struct.unpack_from("<IB3h", index, 32) == (0, 0, 0, 0, 0)


if __name__ == "__main__":
    for name, block in example(Path(sys.argv[1])).items():
        print(f"<!-- {name} -->\n\n{block}\n\n<!-- end of {name} -->")
