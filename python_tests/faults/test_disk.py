"""D16 and D10: a disk that is full, or a folder that cannot be written, is one error, and nothing is lost."""

import contextlib
import io
import os
import shutil
import signal
import stat
import subprocess
import threading

import numpy as np
import pytest
import torch

from sela_ext.cli.parser import check_can_write, result_file, result_table
from sela_ext.errors import OptionError, ResourceError
from sela_ext.training.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from sela_ext.training.outputs import TensorBoard
from sela_ext.training.run_folder import RunFolder

SMALL = [
    *("--epochs", "2", "--batch-size", "40", "--clusters", "10,10", "--image-size", "16", "--threads", "1"),
    *("--evaluate-every", "1", "--log-every", "1", "--checkpoint-seconds", "0", "--no-progress"),
]


def assert_refused(status, printed, *names):
    """One line that names the file and says what to do."""
    assert status == 7, printed
    assert printed.count("\n") == 1, printed
    for name in names:
        assert name in printed
    assert "Traceback" not in printed


# The n-th file that a run of 8 steps writes whole, and its name.
FILES = [(1, "options.json"), (8, "step-000000000005.ckpt"), (15, "labels.csv")]
FILES += [
    pytest.param(*one, marks=pytest.mark.slow)
    for one in [
        (2, "metrics.csv"),
        (3, "step-000000000001.ckpt"),
        (14, "labels.npz"),
        (16, "report.npz"),
        (17, "network.pt"),
    ]
]


@pytest.mark.parametrize(("count", "name"), FILES)
def test_d16_a_disk_that_fills_up_at_a_file_ends_the_run_and_spares_the_last_checkpoint(
    server, runs, command, unbroken, tmp_path, count, name
):
    out = tmp_path / "run"
    status, printed = server.run(*command, "--out", out, fault=f"after write:{count}:full disk")
    assert_refused(status, printed, f"cannot write {out}", name, " bytes): No space left on device", "free some space")
    runs.assert_whole(out)
    runs.assert_tidy(out)
    saved = load_checkpoint(out / "checkpoints")
    assert (saved["state"]["step"] if saved else 0) == {1: 0, 2: 0, 3: 0, 8: 4}.get(count, 8)
    status, printed = server.run(*command, "--out", out, "--resume")
    assert status == 0, printed
    runs.assert_equal_runs(unbroken, out)


def test_d16_a_limit_on_the_size_of_files_ends_a_resumed_run_and_spares_its_checkpoint(
    server, runs, command, unbroken, tmp_path
):
    out = tmp_path / "run"
    assert server.run(*command, "--out", out, fault="after rename:5:kill")[0] == -9
    before = {path: path.read_bytes() for path in (out / "checkpoints").iterdir()}
    size = len(max(before.values(), key=len))
    status, printed = server.run(*command, "--out", out, "--resume", file_size=size - 1000)
    assert_refused(status, printed, "step-000000000004.ckpt", " bytes): File too large", "ulimit -f")
    assert {path: path.read_bytes() for path in (out / "checkpoints").iterdir()} == before
    status, printed = server.run(*command, "--out", out, "--resume")
    assert status == 0, printed
    runs.assert_equal_runs(unbroken, out)


@pytest.fixture
def small_disk(tmp_path):
    """Makes a disk of so many bytes, that is gone after the test."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("there is no program to mount a file system with")
    yield make
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def fill(path):
    """Take all the space that is left."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    os.sync()


# Where the disk fills up, and what cannot be written then.
FULL_AT = [
    pytest.param("after log is cut:1", "cannot write", marks=pytest.mark.slow),
    ("after step:3", ""),
    pytest.param("before rename:6", "", marks=pytest.mark.slow),
    pytest.param("before labels:1", "labels.npz", marks=pytest.mark.slow),
    ("before report:1", "report.html: cannot write the report"),
]


@pytest.mark.parametrize(("place", "words"), FULL_AT)
def test_d16_a_run_on_a_disk_that_is_full_ends_and_goes_on_when_there_is_room(
    server, runs, command, unbroken, small_disk, place, words
):
    disk = small_disk(32 << 20)
    out, ballast = disk / "run", disk / "ballast"
    started = server.start(*command, "--out", out, fault=f"{place}:stop")

    def stands():
        with open(f"/proc/{started.pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "T"

    assert runs.wait_for(lambda: started.wait(0) is not None or stands())
    fill(ballast)
    started.kill(signal.SIGCONT)
    status = started.wait()
    assert_refused(status, started.printed(), str(out), words)
    runs.assert_whole(out)
    runs.assert_tidy(out)
    ballast.unlink()
    status, printed = server.run(*command, "--out", out, "--resume")
    assert status == 0, printed
    runs.assert_equal_runs(unbroken, out)


def test_d16_a_checkpoint_that_does_not_fit_is_refused_before_it_is_begun(small_disk):
    folder = small_disk(1 << 20)
    save_checkpoint(folder / "checkpoints", 1, {"weights": torch.zeros(100_000)})
    with pytest.raises(ResourceError, match=r"step-000000000002\.ckpt: expected 8\d\d,\d{3} free bytes, found \d+"):
        save_checkpoint(folder / "checkpoints", 2, {"weights": torch.zeros(200_000)})
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000000000001.ckpt"]
    assert load_checkpoint(folder / "checkpoints")["weights"].shape == (100_000,)
    with pytest.raises(ResourceError, match=r"labels\.npz \(2,000,000 bytes\): No space left.*earlier file"):
        write_atomically(folder / "labels.npz", bytes(2_000_000))
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]


def record(curves, count):
    for step in range(count):
        curves.record({"event": "step", "step": step, "loss": 1.0})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk without space")
def test_d16_curves_that_cannot_be_written_are_an_error_that_names_their_folder(tmp_path, capfd):
    def broken(folder):
        curves = TensorBoard(folder, None, {})
        (file,) = folder.iterdir()
        file.unlink()
        file.symlink_to("/dev/full")
        return curves

    curves = broken(tmp_path / "a")
    record(curves, 3)
    with pytest.raises(ResourceError, match=r"cannot write .*/a: No space left.*then resume"):
        curves.close()
    curves = broken(tmp_path / "b")
    record(curves, 3)
    curves.close(status=1)  # the run failed already: its own error is the one to be shown
    assert capfd.readouterr().err == ""


def test_d16_what_the_writer_of_curves_meets_while_it_works_is_told_at_a_later_event(tmp_path, monkeypatch, capfd):
    hook, writing = threading.excepthook, "tensorboard.summary.writer.record_writer.RecordWriter.write"
    curves = TensorBoard(tmp_path, None, {})
    monkeypatch.setattr(writing, _no_space)
    with pytest.raises(ResourceError, match="No space left"):
        record(curves, 100)
    curves.close(status=1)
    with pytest.raises(ResourceError, match="No space left"):
        TensorBoard(tmp_path, None, {"options": "a table"})
    assert capfd.readouterr().err == ""
    assert threading.excepthook == hook


def _no_space(self, data):
    raise OSError(28, "No space left on device")


def test_d10_folders_that_cannot_be_a_runs_are_distinct_errors(server, command, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear reader")
    cases = [
        (tmp_path / "file", 2, "found the file"),
        (tmp_path / "full", 2, "with 1 entries"),
        (tmp_path / "file" / "run", 7, "cannot write in"),
        (tmp_path / ("a" * 300), 2, "File name too long"),
        ("~nobody-of-this-name/run", 2, "out: expected a folder, found"),
        ("/proc/run", 7, "cannot write in /proc/run"),
    ]
    for out, status, words in cases:
        found, printed = server.run(*command, "--out", out)
        assert (found, printed.count("\n")) == (status, 1), printed
        assert words in printed
    found, printed = server.run(*command, "--out", tmp_path / "full", "--overwrite")
    assert found == 2
    assert "found letter.txt; nothing was deleted" in printed
    assert (tmp_path / "full" / "letter.txt").read_text() == "dear reader"


@pytest.mark.parametrize("out", [None, 3, "a\0b", b"bytes"])
def test_d10_what_is_no_path_is_an_error_of_the_option(out):
    with pytest.raises(OptionError, match=r"out: expected a folder, found .*; name another"):
        RunFolder.check(out, resume=False, overwrite=False, data="digits")


def test_d10_what_a_kill_left_is_a_runs_own_and_is_removed(server, command, tmp_path):
    out = tmp_path / "run"
    assert server.run(*command, "--epochs", "1", "--out", out)[0] == 0
    names = [".writable", ".report-x7.tmp", "labels.npz.partial", "checkpoints/step-9.ckpt.partial"]
    for how in ("--resume", "--overwrite"):
        for name in names:
            (out / name).write_bytes(b"half")
        status, printed = server.run(*command, "--epochs", "1", "--out", out, how)
        assert status == 0, printed
        assert not any((out / name).exists() for name in names)


def test_overwrite_deletes_a_link_and_not_what_it_leads_to(tmp_path):
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    (kept / "step-000000000001.ckpt").write_bytes(b"another's")
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoints").symlink_to(kept)
    RunFolder.check(out, resume=False, overwrite=True, data="digits").clear(overwrite=True)
    assert list(out.iterdir()) == []
    assert [path.name for path in kept.iterdir()] == ["step-000000000001.ckpt"]


def test_d12_checkpoints_of_a_run_that_is_replaced_go_all_at_once(tmp_path, monkeypatch):
    """Whatever of their deletion a kill leaves undone, no resume finds them, and the next start ends it."""
    out = tmp_path / "run"
    save_checkpoint(out / "checkpoints", 1, {"step": 1})
    seen = []

    def killed(path):
        seen.append(path.name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            RunFolder(out).clear(overwrite=True)
    assert seen == ["checkpoints.partial"]
    assert load_checkpoint(out / "checkpoints") is None
    RunFolder.check(out, resume=False, overwrite=True, data="digits").clear(overwrite=False)
    assert list(out.iterdir()) == []


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    path = tmp_path_factory.mktemp("logits") / "logits.npy"
    np.save(path, np.random.default_rng(0).standard_normal((30_000, 10), dtype=np.float32))
    return path


@pytest.mark.parametrize("suffix", ["npy", "npz", "csv"])
def test_d16_results_that_do_not_fit_leave_what_was_there(server, data, logits, unbroken, tmp_path, suffix):
    """`assign`, `predict` and `embed` write their results whole or not at all."""
    of_run = [unbroken, *data[:2], "--threads", "1", "--image-size", "16"]
    works = [(["assign", logits], 50_000), (["predict", *of_run], 500)]
    works += [(["embed", *of_run], 5_000)] if suffix != "csv" else []
    for arguments, room in works:
        out = tmp_path / f"{arguments[0]}.{suffix}"
        out.write_text("the result of yesterday")
        status, printed = server.run(*arguments, "--out", out, file_size=room)
        assert_refused(status, printed, f"cannot write {out}: File too large; make room; nothing was changed")
        assert out.read_text() == "the result of yesterday"
        assert [path.name for path in tmp_path.iterdir()] == [out.name]
        assert server.run(*arguments, "--out", out)[0] == 0
        assert out.stat().st_size > room
        out.unlink()


def test_a_result_replaces_what_a_link_leads_to_and_keeps_who_may_read_it(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    kept, link = tmp_path / "elsewhere" / "labels.csv", tmp_path / "labels.csv"
    kept.write_text("old")
    kept.chmod(0o640)
    link.symlink_to(kept)
    with result_table(str(link)) as table:
        table.write("new \udce9\n")
        assert kept.read_text() == "old"
    assert link.is_symlink()
    assert kept.read_text() == "new \\udce9\n"
    assert kept.stat().st_mode & 0o777 == 0o640
    with contextlib.suppress(KeyboardInterrupt), result_table(str(link)) as table:
        table.write("half")
        raise KeyboardInterrupt
    assert kept.read_text() == "new \\udce9\n"
    assert len(list(tmp_path.rglob("*"))) == 3


def test_a_result_goes_into_a_pipe_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    check_can_write(str(tmp_path / "pipe"), "--out")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with result_table(str(tmp_path / "pipe")) as table:
        table.write("index,label\n")
    assert os.read(reader, 100) == b"index,label\n"
    for save in (np.save, np.savez):
        with result_file(str(tmp_path / "pipe")) as file:
            save(file, np.arange(9))
        found = np.load(io.BytesIO(os.read(reader, 4096)))
        np.testing.assert_array_equal(found["arr_0"] if save is np.savez else found, np.arange(9))
    os.close(reader)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "labels.npy").write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    with pytest.raises(OptionError, match="--out: expected a folder that can be written"):
        check_can_write(str(tmp_path / "labels.npy"), "--out")
