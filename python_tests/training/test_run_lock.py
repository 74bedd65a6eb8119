"""One run per folder, with real processes."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from sela_ext.errors import OptionError, ResourceError
from sela_ext.training import run_lock
from sela_ext.training.run_folder import RunFolder
from sela_ext.training.run_lock import HELD, NAME, RunLock

HOLD = """
import sys
from pathlib import Path
from sela_ext.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path / "run"`."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that cannot lock, as some network mounts."""

    def refuse(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_folder_in_use_is_refused_with_process_machine_and_time(tmp_path, holder):
    expected = (
        rf"^out: expected a folder that no run is using.* process {holder.pid} on \S+ since \d{{4}}-.*; wait for it"
    )
    with pytest.raises(OptionError, match=expected), RunLock(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / NAME).exists()
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / NAME).read_text())["pid"] == os.getpid()


def test_a_run_that_ends_leaves_nothing_behind(tmp_path, holder):
    holder.communicate("\n")
    assert holder.returncode == 0
    assert list((tmp_path / "run").iterdir()) == []


def test_the_same_process_cannot_hold_a_folder_twice(tmp_path):
    with RunLock(tmp_path):
        with pytest.raises(OptionError, match=f"in use by process {os.getpid()} "), RunLock(tmp_path):
            pass
        assert (tmp_path / NAME).exists(), "the refused one has taken the file away"
    with RunLock(tmp_path):
        pass


def hold_in_turn(folder, rounds, errors):
    """Take the lock again and again; whoever has it finds nobody inside."""
    inside, held = folder / "inside", 0
    while held < rounds:
        try:
            with RunLock(folder):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                inside.unlink()
                held += 1
        except OptionError:
            pass
        except Exception as error:
            errors.append(error)
            return


@pytest.mark.parametrize("locks", [True, False])
def test_of_many_at_once_only_one_is_inside(tmp_path, request, monkeypatch, locks):
    if not locks:
        request.getfixturevalue("no_locks")
    monkeypatch.setattr(run_lock, "_TIME_TO_WRITE", 0.001)
    errors = []
    threads = [threading.Thread(target=hold_in_turn, args=(tmp_path, 30, errors)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_without_locks_of_the_system_a_living_holder_is_believed(tmp_path, no_locks):
    with RunLock(tmp_path):
        expected = f"in use by process {os.getpid()} .*, or delete .*{HELD} if that process is gone$"
        with pytest.raises(OptionError, match=expected), RunLock(tmp_path):
            pass
        assert (tmp_path / HELD).exists()
    with RunLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_without_locks_of_the_system_a_holder_that_is_gone_is_passed_over(tmp_path, no_locks):
    text = json.loads(run_lock._own_text())
    (tmp_path / HELD).write_text(json.dumps({**text, "started": "long ago"}))  # its number is another's by now
    with RunLock(tmp_path):
        assert json.loads((tmp_path / HELD).read_text())["started"] == text["started"]
    assert list(tmp_path.iterdir()) == []


def leave_dead(folder):
    """What a holder leaves that is gone."""
    (folder / HELD).write_text(json.dumps({**json.loads(run_lock._own_text()), "started": "long ago"}))


def test_who_finds_a_dead_holder_too_late_leaves_the_new_ones_file_alone(tmp_path, no_locks, monkeypatch):
    leave_dead(tmp_path)
    began, others = run_lock.started, []

    def late(pid):
        found = began(pid)
        if not others:  # the file was read; before anything is done about it another run takes the folder
            others.append(RunLock(tmp_path))
            others[0].__enter__()
            others.append((tmp_path / HELD).read_bytes())
            (tmp_path / HELD).chmod(0o600)
        return found

    monkeypatch.setattr(run_lock, "started", late)
    with pytest.raises(OptionError, match=f"in use by process {os.getpid()} "), RunLock(tmp_path):
        pass
    assert (tmp_path / HELD).read_bytes() == others[1]
    others[0].__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_one_at_a_time_removes_what_a_dead_holder_left(tmp_path, no_locks, monkeypatch):
    leave_dead(tmp_path)
    monkeypatch.setattr(run_lock, "_TRIES", 3)
    lock = RunLock(tmp_path)
    with lock._alone():
        with pytest.raises(OptionError, match="in use by process"), lock:
            pass
        assert (tmp_path / HELD).exists()
    with lock:
        pass
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_lets_one_at_a_time_remove_it_a_dead_holder_is_believed(tmp_path, no_locks, monkeypatch):
    leave_dead(tmp_path)
    monkeypatch.setattr(run_lock.sys, "platform", "elsewhere")
    with pytest.raises(OptionError, match=rf"or delete .*{HELD} if that process is gone$"), RunLock(tmp_path):
        pass
    assert (tmp_path / HELD).exists()


def test_of_many_that_find_a_dead_holder_one_is_inside(tmp_path, no_locks, monkeypatch):
    monkeypatch.setattr(run_lock, "_TIME_TO_WRITE", 0.001)
    errors, inside = [], []

    def enter(start):
        start.wait()
        try:
            with RunLock(tmp_path):
                inside.append(1)
                if len(inside) > 1:
                    errors.append("two inside")
                    refused.release()
                ended.wait()
        except OptionError:
            refused.release()

    for _ in range(40):
        leave_dead(tmp_path)
        start, ended, refused = threading.Barrier(4), threading.Event(), threading.Semaphore(0)
        threads = [threading.Thread(target=enter, args=(start,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            refused.acquire()
        ended.set()
        for thread in threads:
            thread.join()
        assert (errors, inside) == ([], [1])
        inside.clear()


def test_without_locks_of_the_system_a_holder_on_another_machine_is_believed(tmp_path, no_locks):
    text = json.loads(run_lock._own_text())
    (tmp_path / HELD).write_text(json.dumps({**text, "host": "far", "machine": "far", "started": "long ago"}))
    with pytest.raises(OptionError, match=rf"process {os.getpid()} on far since"), RunLock(tmp_path):
        pass
    assert (tmp_path / HELD).exists()


@pytest.mark.parametrize("text", [b"", b"\xff\x00", b"[1]", b'{"pid": "one"}', b'{"pid": -1}'])
def test_a_damaged_lock_file_of_a_dead_process_is_free(tmp_path, text):
    (tmp_path / NAME).write_bytes(text)
    with RunLock(tmp_path):
        pass


def test_a_lock_that_leads_elsewhere_is_refused_and_what_it_leads_to_left_alone(tmp_path):
    (tmp_path / "precious").write_text("data")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(ResourceError, match=r"^out: cannot lock .*\.lock"), RunLock(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "data"


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="name another folder"), RunLock(tmp_path / "file" / "run"):
        pass


def test_a_folder_with_nothing_but_a_lock_is_empty_and_overwrite_knows_the_lock(tmp_path):
    (tmp_path / NAME).touch()
    (tmp_path / HELD).touch()
    RunFolder.check(tmp_path, resume=False, overwrite=False, data="digits")
    (tmp_path / "labels.csv").touch()
    with pytest.raises(OptionError, match="with 1 entries"):
        RunFolder.check(tmp_path, resume=False, overwrite=False, data="digits")
    RunFolder.check(tmp_path, resume=False, overwrite=True, data="digits")
