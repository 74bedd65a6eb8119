"""D14: a damaged checkpoint is noticed, and the one before it is used; and how files are written."""

import errno
import os
import random
import shutil

import pytest
import torch

from sela_ext.data.safe_files import open_regular, write_whole
from sela_ext.errors import CheckpointError, ResourceError
from sela_ext.training import checkpoint
from sela_ext.training.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint, write_atomically

SMALL = [
    *("--epochs", "2", "--batch-size", "40", "--clusters", "10,10", "--image-size", "16", "--threads", "1"),
    *("--checkpoint-seconds", "0", "--evaluate-every", "1", "--log-every", "1", "--no-progress"),
]


def cut(path):
    os.truncate(path, path.stat().st_size // 3)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 16
    path.write_bytes(data)


def empty(path):
    os.truncate(path, 0)


def replace(path):
    path.write_bytes(os.urandom(5000))


def lengthen(path):
    with open(path, "ab") as file:
        file.write(b"\0")


DAMAGES = [flip, *(pytest.param(one, marks=pytest.mark.slow) for one in (cut, empty, replace, lengthen))]


@pytest.fixture(scope="module")
def killed(server, command, tmp_path_factory):
    """A run that was killed while it wrote the checkpoint of step 6."""
    out = tmp_path_factory.mktemp("killed") / "run"
    status, printed = server.run(*command, "--out", out, fault="before rename:9:kill")
    assert status == -9, printed
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == [f"step-00000000000{n}.ckpt{'.partial' * (n == 6)}" for n in (4, 5, 6)]
    return out


@pytest.fixture
def out(killed, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(killed, tmp_path / "run")


@pytest.mark.parametrize("damage", DAMAGES)
def test_d14_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(server, runs, command, unbroken, out, damage):
    damage(out / "checkpoints" / "step-000000000005.ckpt")
    status, printed = server.run(*command, "--out", out, "--resume")
    assert status == 0, printed
    assert "checkpoint step-000000000005.ckpt: " in printed
    assert "the one before it, step-000000000004.ckpt, is used" in printed
    runs.assert_equal_runs(unbroken, out)


def test_d14_without_a_whole_checkpoint_a_resume_is_an_error_that_changes_nothing(server, command, out):
    for damage, name in [(cut, "step-000000000004.ckpt"), (flip, "step-000000000005.ckpt")]:
        damage(out / "checkpoints" / name)
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".partial" and path.name != ".lock"]
    before = {path: path.read_bytes() for path in files}
    status, printed = server.run(*command, "--out", out, "--resume")
    assert status == 4
    assert printed.count("\n") == 1
    assert "none of the 2 checkpoints can be read" in printed
    assert "step-000000000004.ckpt: expected" in printed
    assert "step-000000000005.ckpt: its checksum does not match" in printed
    assert "begin again with overwrite, or put a copy back" in printed
    now = {path: path.read_bytes() for path in before}
    assert now == before
    status, printed = server.run(*command, "--out", out, "--overwrite")
    assert status == 0, printed


def test_d14_every_damaged_bit_of_the_head_and_any_other_length_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"weights": torch.arange(100.0)})
    whole, rng = path.read_bytes(), random.Random(0)
    head = 48
    places = [*range(0, head * 8, 5), *(rng.randrange(head * 8, len(whole) * 8) for _ in range(60))]
    for bit in places:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    for length in [*range(head + 3), *(rng.randrange(head, len(whole)) for _ in range(40)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    path.write_bytes(whole)
    assert torch.equal(read_checkpoint(path)["weights"], torch.arange(100.0))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT])
def test_d14_a_checkpoint_on_a_damaged_place_of_the_disk_gives_way_to_the_one_before(tmp_path, monkeypatch, number):
    save_checkpoint(tmp_path, 1, {"step": 1})
    newest = save_checkpoint(tmp_path, 2, {"step": 2})
    reason = os.strerror(number)
    monkeypatch.setattr(checkpoint, "open_regular", unreadable(newest, number))
    with pytest.warns(UserWarning, match=rf"step-000000000002.ckpt: cannot be read: {reason}.*step-0000.*1.ckpt, is"):
        assert load_checkpoint(tmp_path)["step"] == 1


def unreadable(newest, number):
    """`open_regular`, for which one file cannot be read."""

    def refuse(path):
        if path == newest:
            raise OSError(number, os.strerror(number))
        return open_regular(path)

    return refuse


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "have it readable for whoever starts the run"),
        (errno.EPERM, "have it readable for whoever starts the run"),
        (errno.ESTALE, "see to the disk or mount, then resume; to go on from the checkpoint before it, move it away"),
        (errno.ETIMEDOUT, "see to the disk or mount"),
        (errno.EMFILE, "raise the limit"),
        (errno.ENOMEM, "raise the limit"),
    ],
)
def test_d14_a_checkpoint_that_may_be_whole_but_cannot_be_read_is_not_passed_over(
    tmp_path, monkeypatch, number, remedy
):
    """Or the run would go on from the one before it, and delete it."""
    for step in (1, 2):
        newest = save_checkpoint(tmp_path, step, {"step": step})
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "open_regular", unreadable(newest, number))
        with pytest.raises(ResourceError, match=rf"{newest.name}: cannot be read: {os.strerror(number)}; {remedy}"):
            load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 2


def test_d14_a_folder_of_checkpoints_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    out, command, sela, monkeypatch
):
    """Or the run would begin at its beginning, and cut its log to nothing."""
    metrics, listing = (out / "metrics.jsonl").read_bytes(), os.listdir

    def refuse(path="."):
        if os.fspath(path) == str(out / "checkpoints"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "listdir", refuse)
    status, _, errors = sela(*command, "--out", out, "--resume")
    assert status == 7
    told = "cannot be read: Permission denied; have it readable for whoever starts the run (chmod, chown), then resume"
    assert errors == f"sela: error: checkpoint {out / 'checkpoints'}: {told}\n"
    assert (out / "metrics.jsonl").read_bytes() == metrics


def test_d14_a_whole_checkpoint_is_not_passed_over_for_want_of_memory(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step})

    def too_little(*arguments, **options):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", too_little)
        with pytest.raises(ResourceError, match=r"checkpoint step-000000000002\.ckpt: expected memory to read it"):
            load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 2


def test_a_file_reaches_the_disk_before_its_name_and_its_name_before_anything_else_happens(tmp_path, monkeypatch):
    """Rule 1 of writing: the file is synchronised, then renamed, then its folder is synchronised."""
    path, done = tmp_path / "file", []
    path.write_bytes(b"old")
    synchronise, rename = os.fsync, os.replace

    def fsync(handle):
        what = os.readlink(f"/proc/self/fd/{handle}")
        done.append(("fsync", os.path.basename(what), os.stat(handle).st_size if os.path.isfile(what) else None))
        synchronise(handle)

    def replace_(source, target):
        done.append(("rename", os.path.basename(source), os.path.basename(target)))
        assert path.read_bytes() == b"old"
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_)
    write_atomically(path, b"12345", memoryview(b"678"))
    assert done == [
        ("fsync", "file.partial", 8),
        ("rename", "file.partial", "file"),
        ("fsync", tmp_path.name, None),
    ]
    assert path.read_bytes() == b"12345678"


def test_a_name_appears_with_all_its_bytes_or_not_at_all(tmp_path, monkeypatch):
    for place in ("before write", "after write", "before fsync", "after fsync", "before rename"):
        path = tmp_path / "file"

        def fail(now, name="", wanted=place):
            if now == wanted:
                raise KeyboardInterrupt

        monkeypatch.setattr("sela_ext.training.faults.at", fail)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, b"12345")
        assert list(tmp_path.iterdir()) == []


def test_a_file_of_a_pack_that_is_interrupted_leaves_nothing_either(tmp_path, monkeypatch):
    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"12345")
    assert list(tmp_path.iterdir()) == []


def test_d14_two_checkpoints_are_kept_and_a_file_too_many_is_no_error(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step})

    remove = type(tmp_path).unlink

    def refuse(path, missing_ok=False):
        if path.suffix == ".ckpt":
            raise PermissionError(13, "Permission denied")
        remove(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "unlink", refuse)
        save_checkpoint(tmp_path, 3, {"step": 3})
    assert len(list(tmp_path.iterdir())) == 3
    save_checkpoint(tmp_path, 4, {"step": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000003.ckpt", "step-000000000004.ckpt"]
