import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile

import pytest
import torch

from sela_ext.compat.archive import read_archive, tensors_in
from sela_ext.errors import CheckpointError


class Code:
    """Unpickling this runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def content():
    return {"state_dict": {"a": torch.zeros(3)}}


def saved(path, value, legacy=False):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, legacy):
    marker = tmp_path / "ran"
    path = saved(tmp_path / "evil.pth", {**content(), "x": Code(marker)}, legacy)
    with pytest.raises(CheckpointError, match=r"objects that need code \(posix.system\); nothing of it was run"):
        read_archive(path)
    assert not marker.exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Code(marker)))
    with pytest.raises(CheckpointError, match="a pickle of another kind"):
        read_archive(path)
    assert not marker.exists()


def test_a_whole_module_is_refused(tmp_path):
    path = saved(tmp_path / "module.pth", torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_archive(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_cut_off_file_is_a_clear_error(tmp_path, legacy, share):
    path = saved(tmp_path / "cut.pth", {"a": torch.arange(1001)}, legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        read_archive(path)


def test_every_damaged_byte_gives_a_result_or_a_clear_error(tmp_path):
    path = saved(tmp_path / "damaged.pth", content())
    whole = path.read_bytes()
    legacy = saved(tmp_path / "damaged.t7", content(), legacy=True).read_bytes()
    for original in (whole, legacy):
        for at in range(0, len(original), 3):
            path.write_bytes(original[:at] + bytes([original[at] ^ 0x55]) + original[at + 1 :])
            try:
                read_archive(path)
            except CheckpointError as error:
                assert "\n" not in str(error)  # noqa: PT017 - a result is as good


@pytest.mark.parametrize(("make", "found"), [("touch", "an empty file"), ("text", "starts with b'hello wo'")])
def test_other_files_are_refused(tmp_path, make, found):
    path = tmp_path / "file"
    path.write_bytes(b"" if make == "touch" else b"hello world")
    with pytest.raises(CheckpointError, match=found):
        read_archive(path)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "found something else"), ("absent", "No such file"), (".", "found something else")):
        with pytest.raises(CheckpointError, match=message):
            read_archive(tmp_path / name)


def test_the_old_tar_format_is_named(tmp_path):
    path = tmp_path / "old.pth"
    path.write_bytes(b"\0" * 257 + b"ustar" + b"\0" * 250)
    with pytest.raises(CheckpointError, match="tar format of PyTorch before"):
        read_archive(path)


def rewritten(source, target, change=lambda name, data: data, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    path = rewritten(saved(tmp_path / "a.pth", content()), tmp_path / "bomb.pth", method=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed entries"):
        read_archive(path)


def test_a_directory_that_claims_more_than_the_file_is_refused(tmp_path):
    path = saved(tmp_path / "a.pth", content())
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, entry + 24, 1 << 30)  # the uncompressed size
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"claimed in|damaged"):
        read_archive(path)


def test_a_long_directory_is_refused_before_it_is_read(tmp_path):
    path = saved(tmp_path / "a.pth", content())
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.rindex(b"PK\x05\x06") + 12, 9 << 20)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="found a directory of 9,437,184 bytes"):
        read_archive(path)


def claims(elements):
    """Three elements become this many, wherever the pickle says so."""
    return lambda name, data: data.replace(b"K\x03", b"J" + struct.pack("<i", elements))


@pytest.mark.parametrize("elements", [100_000, 2_000_000_000])
def test_a_tensor_that_claims_more_than_the_file_is_refused(tmp_path, elements):
    source = saved(tmp_path / "a.pth", content())

    def change(name, data):
        return claims(elements)(name, data) if name.endswith("data.pkl") else data

    with pytest.raises(CheckpointError, match=r"not resizable|within its .* bytes"):
        read_archive(rewritten(source, tmp_path / "claim.pth", change))
    old = saved(tmp_path / "a.t7", content(), legacy=True)
    old.write_bytes(claims(elements)("", old.read_bytes()))
    with pytest.raises(CheckpointError, match=r"within its .* bytes"):
        read_archive(old)


def test_refusing_a_tensor_of_eight_gigabytes_takes_no_memory(tmp_path):
    old = saved(tmp_path / "a.t7", content(), legacy=True)
    old.write_bytes(claims(2_000_000_000)("", old.read_bytes()))
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from sela_ext.compat.archive import read_archive\n"
        "from sela_ext.errors import CheckpointError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    read_archive(Path(sys.argv[1]))\n"
        "except CheckpointError:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(old)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 50_000  # kilobytes
    assert resource.getpagesize() > 0


def test_a_stretched_tensor_is_refused(tmp_path):
    path = saved(tmp_path / "stretched.pth", {"a": torch.zeros(1).expand(1_000_000)})
    with pytest.raises(CheckpointError, match=r"found one of \(1000000,\)"):
        read_archive(path)


def test_a_sparse_tensor_is_refused(tmp_path):
    path = saved(tmp_path / "sparse.pth", {"a": torch.eye(3).to_sparse()})
    with pytest.raises(CheckpointError, match="sparse"):
        read_archive(path)


def test_lists_that_hold_one_another_are_looked_into_once(tmp_path):
    nested = [torch.zeros(2)]
    for _ in range(60):
        nested = [nested, nested]
    assert len(list(tensors_in(nested))) == 1
    loop = {}
    loop["self"] = loop
    assert list(tensors_in(loop)) == []
    path = saved(tmp_path / "nested.pth", nested)
    assert len(list(tensors_in(read_archive(path)))) == 1


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_content_comes_back(tmp_path, legacy):
    tensor = torch.arange(12).reshape(3, 4)
    value = {"x": tensor.T, "shared": tensor, "n": 3, "list": [1.5, "a", None]}
    found = read_archive(saved(tmp_path / "plain.pth", value, legacy))
    assert torch.equal(found["x"], tensor.T)
    assert torch.equal(found["shared"], tensor)
    assert (found["n"], found["list"]) == (3, [1.5, "a", None])
