"""Files written by somebody who means harm: refused in one line, nothing executed, little memory taken."""

import contextlib
import copy
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sela_ext
from sela_ext.cli import main
from sela_ext.data import Loader, open_source, tar
from sela_ext.data.decode import decode_image
from sela_ext.errors import CheckpointError, DataError, OptionError, ResourceError, SelaError
from sela_ext.inference.subject import open_subject
from sela_ext.report import write_report
from sela_ext.report.run_folder import read_run
from sela_ext.training.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint, write_atomically
from sela_ext.training.fixed_labels import read_fixed_labels
from sela_ext.training.run_folder import RunFolder
from sela_ext.training.run_lock import RunLock

MIB = 1 << 20


def status(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def at_most(mib):
    """Fails where what is inside takes more memory than that, however briefly."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    except OSError:
        pytest.skip("the kernel does not set the peak of a process's memory back")
    before = status("VmRSS")
    yield
    assert status("VmHWM") - before < mib * MIB


@contextlib.contextmanager
def refused(kind, match):
    """The error must be ours, of that kind, on one line that a terminal can show."""
    with pytest.raises(kind, match=match) as caught:
        yield
    assert str(caught.value).isprintable()
    assert isinstance(caught.value, SelaError)


def program(capsys, *words):
    """Exit status of the command line, and the only line that it says on stderr."""
    with pytest.raises(SystemExit) as end:
        main(list(words))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (1 if end.value.code else 0), lines
    return end.value.code, "".join(lines)


class Code:
    """Unpickling this makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


# --- Checkpoints (D15)


def sealed(path, payload):
    """A checkpoint of our own with any content: whoever writes a file writes its checksum as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<8sQ32s", b"SELACKP1", len(payload), hashlib.sha256(payload).digest()) + payload)
    return path


def saved(value, **how):
    file = io.BytesIO()
    torch.save(value, file, **how)
    return file.getvalue()


def members(payload):
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(contents, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return file.getvalue()


def code_in_a_dict(marker):
    return saved({"state": {"step": 1}, "x": Code(marker)})


def a_whole_module(marker):
    return saved(torch.nn.Linear(2, 2))


def a_bare_pickle(marker):
    return pickle.dumps(Code(marker))


def the_format_of_old(marker):
    return saved({"x": Code(marker)}, _use_new_zipfile_serialization=False)


def zeros_that_are_compressed(marker):
    contents = members(saved({"x": torch.zeros(1000)}))
    return zipped({**contents, "archive/data/0": bytes(200 * MIB)}, zipfile.ZIP_DEFLATED)


def a_tensor_of_eight_gigabytes(marker):
    contents = members(saved({"x": torch.zeros(7)}))
    name = next(name for name in contents if name.endswith("data.pkl"))
    # Its number of values and its shape, 7, become 2,000,000,000.
    assert contents[name].count(b"K\x07") == 2
    contents[name] = contents[name].replace(b"K\x07", b"J" + struct.pack("<i", 2_000_000_000))
    return zipped(contents)


def a_tensor_that_is_repeated(marker):
    return saved({"x": torch.zeros(1).expand(1 << 40)})


def a_directory_that_lies(marker):
    payload = bytearray(saved({"x": torch.zeros(1000)}))
    at = payload.index(b"PK\x01\x02")
    payload[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    return bytes(payload)


def nothing_but_the_first_bytes(marker):
    return b"PK\x03\x04" + bytes(100)


def a_list(marker):
    return saved([torch.zeros(3)])


HOSTILE_CHECKPOINTS = [
    code_in_a_dict,
    a_whole_module,
    a_bare_pickle,
    the_format_of_old,
    zeros_that_are_compressed,
    a_tensor_of_eight_gigabytes,
    a_tensor_that_is_repeated,
    a_directory_that_lies,
    nothing_but_the_first_bytes,
    a_list,
]


@pytest.mark.parametrize("make", HOSTILE_CHECKPOINTS, ids=lambda make: make.__name__)
def test_d15_a_hostile_checkpoint_with_the_right_checksum_is_refused(tmp_path, make):
    path = sealed(tmp_path / "checkpoints" / "step-000000000009.ckpt", make(tmp_path / "ran"))
    with at_most(32), refused(CheckpointError, r"step-000000000009\.ckpt: "):
        read_checkpoint(path)
    with at_most(32), refused(CheckpointError, "none of the 1 checkpoints can be read"):
        load_checkpoint(path.parent)
    assert not (tmp_path / "ran").exists()


def test_d15_a_resume_from_a_hostile_folder_ends_with_status_4_and_runs_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    sealed(run / "checkpoints" / "step-000000000009.ckpt", code_in_a_dict(tmp_path / "ran"))
    words = ("--epochs", "1", "--clusters", "10", "--heads", "1", "--threads", "1", "--no-progress")
    code, line = program(capsys, "train", "--data", "digits", "--out", str(run), "--resume", *words)
    assert (code, "objects that need code" in line) == (4, True)
    assert not (tmp_path / "ran").exists()
    assert not (run / "network.pt").exists()


def test_d15_a_good_checkpoint_behind_a_hostile_one_is_used(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1})
    sealed(tmp_path / "step-000000000002.ckpt", code_in_a_dict(tmp_path / "ran"))
    with pytest.warns(UserWarning, match=r"nothing of it was run.* step-000000000001\.ckpt, is used"):
        assert load_checkpoint(tmp_path)["step"] == 1
    assert not (tmp_path / "ran").exists()


def test_d15_a_checkpoint_that_is_a_pipe_or_leads_in_a_circle_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "step-000000000003.ckpt")
    os.symlink("step-000000000002.ckpt", tmp_path / "step-000000000002.ckpt")
    os.symlink("/dev/zero", tmp_path / "step-000000000001.ckpt")
    with at_most(8), refused(CheckpointError, "none of the 3 checkpoints .*not a regular file"):
        load_checkpoint(tmp_path)


def test_d15_a_checkpoint_larger_than_the_memory_is_not_read(tmp_path):
    path = tmp_path / "step-000000000001.ckpt"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with at_most(8), refused(ResourceError, "bytes of memory to read it, found"):
        load_checkpoint(tmp_path)


def test_d15_tensors_and_plain_values_come_back(tmp_path):
    state = {"a": torch.arange(5), "b": {"c": [1, 2.5, "x", None, True]}, "d": torch.zeros(0)}
    found = read_checkpoint(save_checkpoint(tmp_path, 3, state))
    assert torch.equal(found["a"], state["a"])
    assert found["b"] == state["b"]


# --- Images


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *more, rows=None):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = zlib.compress(bytes(height * (3 * width + 1)) if rows is None else rows)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encoded(kind, **options):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 90)).save(file, kind, **options)
    return file.getvalue()


def claimed_jpeg(progressive):
    data = bytearray(encoded("JPEG", progressive=progressive))
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 65000, 65000)
    return bytes(data) + bytes(1100)


def claimed_gif():
    data = bytearray(encoded("GIF"))
    data[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(data)


def claimed_bmp():
    data = bytearray(encoded("BMP"))
    data[18:26] = struct.pack("<ii", 1 << 30, 1 << 30)
    return bytes(data)


def claimed_tiff():
    data = encoded("TIFF")
    for tag in (256, 257):
        old = struct.pack("<HHII", tag, 4, 1, 8)
        assert old in data
        data = data.replace(old, struct.pack("<HHII", tag, 4, 1, 1 << 24))
    return data


def claimed_webp():
    canvas = (1 << 24) - 2
    extended = bytes(4) + canvas.to_bytes(3, "little") + canvas.to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + extended + encoded("WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


CLAIMS = {
    "jpeg": claimed_jpeg(False),
    "progressive": claimed_jpeg(True),
    "png": png(100_000, 100_000, rows=bytes(64)),
    "gif": claimed_gif(),
    "bmp": claimed_bmp(),
    "tiff": claimed_tiff(),
    "webp": claimed_webp(),
}


@pytest.mark.parametrize("kind", list(CLAIMS))
def test_a_small_file_that_claims_a_huge_image_takes_no_memory(kind):
    assert len(CLAIMS[kind]) < 2500
    with at_most(16), refused(DataError, "a.img: .*(?:claims|limit|cannot be decoded)"):
        decode_image(CLAIMS[kind], "a.img")


def test_claims_in_a_folder_are_bad_images_of_the_loader(tmp_path):
    for kind, data in CLAIMS.items():
        (tmp_path / f"{kind}.jpg").write_bytes(data)
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    with at_most(64):
        loader = Loader(open_source(tmp_path), batch_size=8, on_bad_image="skip", max_bad_fraction=1.0, threads=1)
        with contextlib.closing(loader):
            seen = [name for batch in loader.epoch(0) for name in (loader.source.name(i) for i in batch.index.tolist())]
    assert seen == ["good.png"]
    assert len(loader.bad_images) == len(CLAIMS)


ZEROS = bytes(60 * MIB)


@pytest.mark.parametrize(
    "bomb",
    [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(ZEROS)),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(ZEROS)),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(ZEROS)),
    ],
    ids=["zTXt", "iCCP", "iTXt"],
)
def test_compressed_text_in_a_png_is_not_unpacked_whole(bomb):
    with at_most(24):
        try:
            assert decode_image(png(3, 2, bomb), "a.png").shape == (2, 3, 3)
        except DataError as error:  # that it is refused for its text is as good
            assert str(error).startswith("a.png: ")  # noqa: PT017


def test_more_pixels_in_a_png_than_its_size_are_not_unpacked():
    with at_most(24):
        assert decode_image(png(3, 2, rows=ZEROS), "a.png").shape == (2, 3, 3)


def test_a_folder_of_traps_gives_its_images_and_waits_for_nothing(tmp_path):
    """Pipes, devices and circles, also under the names of files that are looked for."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good.png").write_bytes(png(9, 9))
    for name in (
        "pipe.png",
        "labels.csv",
        "pack.json",
        "train_X.bin",
        "data_batch_1",
        "x.tar",
        "x.parquet",
        "state.json",
    ):
        os.mkfifo(folder / name)
    for name, target in (
        ("zero.png", "/dev/zero"),
        ("classes.txt", "/dev/zero"),
        ("self.png", "self.png"),
        ("gone.png", "no"),
    ):
        os.symlink(target, folder / name)
    os.symlink(folder, folder / "circle")
    os.symlink("..", folder / "above")
    with at_most(16):
        assert open_source(folder).names == ["good.png"]


# --- Arrays


def npy(header, data=b""):
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


def described(shape, kind="|u1"):
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"


def object_array(marker):
    file = io.BytesIO()
    np.save(file, np.array([Code(marker)], dtype=object), allow_pickle=True)
    return file.getvalue()


ARRAYS = {
    "longer than the file": npy(described((1 << 40, 8, 8)), bytes(64)),
    "more than numbers reach": npy(described((1 << 62, 1 << 62, 4)), bytes(64)),
    "wraps to zero": npy(described((1 << 32, 1 << 32)), bytes(64)),
    "negative": npy(described((-8, -8)), bytes(64)),
    "calls": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (__import__('os').mkdir('ran'),), }"),
    "no dictionary": npy("[" * 2000),
    "cut": b"\x93NUMPY\1\0",
    "no header": b"\x93NUMPY\1\0\xff\xff{",
    "objects by name": npy(described((1,), "|O"), bytes(8)),
}


@pytest.mark.parametrize("case", list(ARRAYS))
@pytest.mark.parametrize("use", ["data", "labels", "fixed labels", "assign"])
def test_a_lying_array_is_refused_wherever_one_is_read(tmp_path, monkeypatch, capsys, case, use):
    monkeypatch.chdir(tmp_path)
    Path("a.npy").write_bytes(ARRAYS[case])
    images = np.zeros((5, 8, 8), np.uint8)
    with at_most(16):
        if use == "assign":
            code, line = program(capsys, "assign", "a.npy", "--out", "labels.npy")
            assert code == 3
            assert "a.npy" in line
        else:
            with refused(DataError, r"a\.npy"):
                if use == "data":
                    open_source(Path("a.npy"))
                elif use == "labels":
                    open_source(images, labels="a.npy")
                else:
                    read_fixed_labels("a.npy", open_source(images))
    assert sorted(os.listdir()) == ["a.npy"]


@pytest.mark.parametrize("use", ["data", "labels", "fixed labels", "report"])
def test_arrays_of_objects_are_never_unpickled(tmp_path, use):
    data, images = object_array(tmp_path / "ran"), np.zeros((5, 8, 8), np.uint8)
    (tmp_path / "a.npy").write_bytes(data)
    (tmp_path / "labels.npz").write_bytes(zipped({"labels.npy": data, "names.npy": data}))
    (tmp_path / "options.json").write_text('{"options": {}}')
    with refused(DataError, "(?i)object"):
        if use == "data":
            open_source(tmp_path / "a.npy")
        elif use == "labels":
            open_source(images, labels=tmp_path / "a.npy")
        elif use == "fixed labels":
            read_fixed_labels(tmp_path / "labels.npz", open_source(images))
        else:
            read_run(tmp_path)
    assert not (tmp_path / "ran").exists()


def bomb(count):
    """A labels.npz whose labels unpack to `count` bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.npy", npy(described((1, count // 4), "<i4"), bytes(count)))
    return file.getvalue()


@pytest.mark.parametrize("use", ["report", "run", "fixed labels", "verify", "data"])
def test_an_archive_that_unpacks_to_more_than_the_memory_is_not_unpacked(tmp_path, monkeypatch, capsys, use):
    monkeypatch.setattr("sela_ext.data.npz.free_memory", lambda: 64 * MIB)
    (tmp_path / "labels.npz").write_bytes(bomb(40 * MIB))
    (tmp_path / "images.npz").write_bytes(
        zipped({"x.npy": npy(described((640, 256, 256)), bytes(40 * MIB))}, zipfile.ZIP_DEFLATED)
    )
    (tmp_path / "options.json").write_text('{"options": {}}')
    np.save(tmp_path / "logits.npy", np.zeros((5, 2), np.float32))
    with at_most(16):
        if use == "verify":
            words = ("verify", str(tmp_path / "logits.npy"), "--labels", str(tmp_path / "labels.npz"))
            code, line = program(capsys, *words)
            assert (code, "GiB of memory" in line) == (3, True)
            return
        with refused(DataError, "takes 0.0 GiB of memory, of which"):
            if use == "report":
                write_report(tmp_path)
            elif use == "run":
                read_fixed_labels(tmp_path, open_source(np.zeros((5, 8, 8), np.uint8)))
            elif use == "fixed labels":
                read_fixed_labels(tmp_path / "labels.npz", open_source(np.zeros((5, 8, 8), np.uint8)))
            else:
                open_source(tmp_path / "images.npz")


@pytest.mark.parametrize(
    "contents",
    [
        {"labels.npy": npy(described((1, 1 << 40), "<i4"), bytes(8))},
        {"labels.npy": npy(described((1, 2), "<i4"), bytes(MIB))},
        {"labels.npy": npy(described((-2, -1), "<i4"), bytes(8))},
        {"labels.npy": b"no array"},
        {"labels.npy": npy(described((1, 2), "<i4"), struct.pack("<2i", 0, 2_147_483_646))},
        {"labels.npy": npy(described((1, 2), "<i8"), struct.pack("<2q", 0, 1 << 40))},
        {"labels.npy": npy(described((1, 2), "<i4"), struct.pack("<2i", 0, -5))},
    ],
    ids=["claims", "surplus", "negative", "none", "cluster 2147483646", "cluster 2^40", "cluster -5"],
)
def test_labels_that_lie_cost_the_report_no_memory(tmp_path, contents):
    (tmp_path / "labels.npz").write_bytes(zipped(contents))
    (tmp_path / "options.json").write_text('{"options": {}}')
    with at_most(16), refused(DataError, r"labels\.npz: "):
        write_report(tmp_path)


# --- Archives


def member(name, data=b"", size=None):
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124:136] = b"0000644\0", b"%011o\0" % (len(data) if size is None else size)
    block[156:157], block[257:265] = b"0", b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % 512)


def test_an_archive_that_goes_on_for_ever_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("sela_ext.data.cifar.MOST_BYTES", 8 * MIB)
    path = tmp_path / "cifar.tar.gz"
    for data in (
        member(b"cifar-10-batches-py/x", bytes(7 * MIB)) * 4,
        member(b"cifar-10-batches-py/x") + bytes(40 * MIB),
    ):
        path.write_bytes(gzip.compress(data, 1))
        with at_most(24), refused(DataError, "at most 16,777,216 bytes once it is decompressed"):
            open_source(path)


def test_a_member_with_an_endless_name_is_refused():
    for size, fits in ((tar.MOST_NAME_BYTES, True), (tar.MOST_NAME_BYTES + 1, False)):
        name = b"n" * size
        block = bytearray(member(b"././@LongLink", name + b"\0"))
        block[156:157] = b"L"
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block[:512])
        file = io.BytesIO(bytes(block) + member(b"n" * 100, b"x") + bytes(1024))
        if fits:
            assert [one.name for one in tar.walk_tar(file, "a.tar")] == [name.decode()]
        else:
            with refused(DataError, "names of at most 4096 bytes, found one of 4097"):
                list(tar.walk_tar(file, "a.tar"))


def test_a_zip_of_pictures_is_no_data_and_nothing_is_unpacked(tmp_path):
    path = tmp_path / "images.zip"
    path.write_bytes(zipped({"../../escaped.png": png(2, 2), "/absolute/escaped.png": png(2, 2)}))
    with refused(DataError, "found a file of another kind"):
        open_source(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["images.zip"]


# --- Options and logs

SMALL = np.array([[0, 1, 1, 0]], np.int32)


def run_of(folder, options=None, events=()):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "labels.npz", labels=SMALL, names=np.array(["a", "b", "c", "d"]))
    content = {"options": {"data": "digits"}} if options is None else options
    (folder / "options.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


BAD_JSON = {
    "a number of 5,000 digits": b'{"options": {"seed": ' + b"9" * 5000 + b"}}",
    "nested 100,000 times": b'{"options": ' + b"[" * 100_000,
    "not UTF-8": b'{"options": {"a": "\xff"}}',
    "a list": b"[1]",
    "no options": b'{"options": 3}',
    "longer than any": b'{"options": {}}' + b" " * (17 * MIB),
}


@pytest.mark.parametrize("case", list(BAD_JSON))
def test_hostile_options_are_refused_in_one_line(tmp_path, capsys, case):
    run = run_of(tmp_path / "run", BAD_JSON[case])
    with refused(DataError, r"options\.json: expected"):
        write_report(run)
    with refused(CheckpointError, "expected the options.json of a run"):
        open_subject(run)
    assert program(capsys, "report", str(run))[0] == 3
    assert program(capsys, "evaluate", str(run))[0] == 4


def test_options_and_logs_that_are_pipes_are_not_waited_for(tmp_path, capsys):
    for name in ("options.json", "metrics.jsonl", "labels.npz"):
        run = run_of(tmp_path / name)
        (run / name).unlink()
        os.mkfifo(run / name)
        code, line = program(capsys, "report", str(run))
        assert (code, "not a regular file" in line or "can be read" in line) == (3, True)


VALUES = [None, True, -1, 1 << 70, -(1 << 70), 1e308, "x" * 5000, "</script><script>", [], {}, [[1]], {"a": {"b": 1}}]
EVENT_KEYS = ("step", "epoch", "pass", "loss", "lr", "head", "masked", "elapsed_seconds", "warnings", "nmi", "knn")
HEAD_KEYS = ("head", "clusters", "error", "converged", "passes", "changed", "cross_entropy", "ln_k", "method", "nmi")


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_any_value_anywhere_in_a_log_gives_a_report(tmp_path, value):
    events = []
    for kind in ("step", "label_pass", "evaluation", "end"):
        for key in EVENT_KEYS:
            events.append({"event": kind, "heads": [{"head": 0, "clusters": 2}], key: value})
        for key in HEAD_KEYS:
            events.append({"event": kind, "step": 1, "epoch": 0.5, "heads": [{"head": 0, key: value}]})
        events.append({"event": kind, "heads": value, "stability_by_clusters": {"x": value, "7": value}})
    run = run_of(tmp_path / "run", {"options": {"a": value}, "reasons": value, "resolved": {"b": value}}, events)
    with at_most(64):
        text = write_report(run).read_text()
    scripts = re.findall(r"(?i)<script[^>]*>", text)
    assert scripts.count("<script>") == 1  # the page's own program; the others hold data
    assert all(re.fullmatch(r'<script( type="application/json" id="data-[a-z0-9-]+")?>', one) for one in scripts)
    assert len(re.findall(r"(?i)</script", text)) == len(scripts)
    assert len(text) < 2 * MIB


def test_options_nested_as_deeply_as_json_allows_give_a_report(tmp_path):
    deep = 1
    for _ in range(300):
        deep = {"deeper": [deep]}
    assert "..." in write_report(run_of(tmp_path / "run", {"options": {"deep": deep}})).read_text()


def subject_files(folder, **changes):
    """A run folder with a small network, some of its options changed."""
    from sela_ext.models import Network, build_backbone

    backbone = build_backbone("small-resnet", channels=1, image_size=(8, 8))
    network = Network(backbone.module, backbone.feature_dim, [10], name="small-resnet")
    written = {"clusters": [10], "projection": 0, "head_kind": "linear", "temperature": 0.1}
    augment = {"size": 8, "mean": [0.5], "std": [0.5]}
    resolved = {"channels": 1, "image_size": [8, 8], "network": "small-resnet", "augment": augment}
    for name, value in changes.items():
        place = augment if name in augment else resolved if name in resolved else written
        place[name] = value
    run = run_of(folder, {"options": written, "resolved": resolved})
    parts = {name: getattr(network, name).state_dict() for name in ("backbone", "projection", "heads")}
    torch.save({**parts, "model": "small-resnet", "clusters": [10], "rotation": None}, run / "network.pt")
    return run


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A plain run, opened: modules that are imported on the way shall not count as memory."""
    return open_subject(subject_files(tmp_path_factory.mktemp("warm")))


def test_a_plain_run_is_opened(warm):
    assert warm.model == "small-resnet"


@pytest.mark.parametrize(
    "changes",
    [
        {"clusters": [1 << 40]},
        {"clusters": [1 << 70]},
        {"clusters": [10_000_000]},
        {"clusters": [-3]},
        {"clusters": "ten"},
        {"projection": [1 << 34]},
        {"projection": "wide"},
        {"head_kind": 3, "temperature": "hot"},
        {"size": 1_000_000},
        {"size": 1 << 70},
        {"size": 0},
        {"mean": "grey"},
        {"image_size": [1e400, 1]},
        {"image_size": 8},
        {"channels": 1 << 40},
        {"network": "os.system"},
        {"network": ["alexnet"]},
        {"lam": "large"},
    ],
    ids=str,
)
def test_a_run_that_claims_what_its_network_is_not_takes_no_memory(tmp_path, warm, changes):
    run = subject_files(tmp_path / "run", **changes)
    with at_most(64), refused(CheckpointError, r"run: "):
        open_subject(run)


# --- Run folders that lead elsewhere


@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log", "labels.npz", "checkpoints", "tensorboard", "index"])
@pytest.mark.parametrize("found", ["a link", "something else"])
def test_a_run_whose_files_are_links_or_pipes_is_not_continued(tmp_path, name, found):
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    if found == "a link":
        (victim.touch if "." in name else victim.mkdir)()
        os.symlink(victim, run / name)
    else:
        os.mkfifo(run / name)
    with refused(OptionError, rf"resume: expected {name} in .* found {found}"):
        RunFolder.check(run, resume=True, overwrite=False, data="digits")


def test_a_run_folder_may_itself_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    os.symlink("disk", tmp_path / "run")
    RunFolder.check(tmp_path / "run", resume=True, overwrite=False, data="digits").create()


def test_overwrite_removes_links_and_nothing_that_they_lead_to(tmp_path):
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    (victim / "inner").mkdir(parents=True)
    (victim / "step-000000000001.ckpt").write_text("precious")
    (victim / "file").write_text("precious")
    for name in ("checkpoints", "tensorboard", "wandb"):
        os.symlink(victim, run / name)
    for name in ("labels.csv", "network.pt", "train.log", ".writable", "labels.csv.partial"):
        os.symlink(victim / "file", run / name)
    (run / "index").mkdir()
    os.symlink(victim, run / "index" / "deeper")
    folder = RunFolder.check(run, resume=False, overwrite=True, data="digits")
    folder.create()
    folder.clear(overwrite=True)
    assert list(run.iterdir()) == []
    assert sorted(os.listdir(victim)) == ["file", "inner", "step-000000000001.ckpt"]
    assert (victim / "file").read_text() == "precious"


def test_a_link_with_the_name_of_a_half_written_file_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    os.symlink("victim", tmp_path / "labels.csv.partial")
    write_atomically(tmp_path / "labels.csv", b"index,name\n")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "labels.csv").read_text() == "index,name\n"
    assert not (tmp_path / "labels.csv").is_symlink()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    os.symlink("victim", tmp_path / ".lock")
    with refused(ResourceError, r"cannot lock .*\.lock: Too many levels of symbolic links"), RunLock(tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


# --- A resume whose checkpoint is plain, and lies

QUIET = {"epochs": 1, "clusters": [10], "heads": 1, "threads": 1, "progress": False, "evaluate_every": 0, "seed": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The only checkpoint of a short run, and its images."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8)
    out = tmp_path_factory.mktemp("finished") / "run"
    sela_ext.train(images, out=out, **QUIET)
    return images, load_checkpoint(out / "checkpoints")


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved.clear(),
        lambda saved: saved.pop("identity"),
        lambda saved: saved.update(identity={"options": 3, "data": None}),
        lambda saved: saved.update(state=[1]),
        lambda saved: saved["state"].update(step=10**40),
        lambda saved: saved["state"].update(step=-1),
        lambda saved: saved["state"].update(epoch="one"),
        lambda saved: saved["state"].update(seconds=float("nan")),
        lambda saved: saved["state"].pop("position"),
        lambda saved: saved["state"].update(labels=torch.zeros(1, 63, dtype=torch.int32)),
        lambda saved: saved["state"].update(labels=torch.full((1, 64), 10, dtype=torch.int32)),
        lambda saved: saved["state"].update(labels="none"),
        lambda saved: saved.update(network={"heads.weight": torch.zeros(3)}),
        lambda saved: saved.update(network=7),
        lambda saved: saved.update(update={"optimizer": {"state": {}, "param_groups": []}}),
        lambda saved: saved.update(rng=[torch.zeros(3, dtype=torch.uint8)]),
    ],
    ids=lambda change: change.__code__.co_consts and str(change.__code__.co_names[:3]),
)
def test_d15_a_resume_from_a_plain_checkpoint_that_lies_ends_in_one_line(tmp_path, finished, change):
    images, content = finished
    saved = copy.deepcopy(content)
    change(saved)
    save_checkpoint(tmp_path / "run" / "checkpoints", 9, saved)
    expected = "resume: (expected the state of this run in its checkpoint, found another|the network is not the one)"
    with refused(CheckpointError, expected):
        sela_ext.train(images, out=tmp_path / "run", resume=True, **QUIET)
