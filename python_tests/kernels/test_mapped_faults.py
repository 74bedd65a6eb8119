"""A mapped file that becomes shorter while it is read."""

import os
import re
import signal
import subprocess
import sys

import pytest

from sela_ext import _core
from sela_ext.kernels.mapped_faults import told_mapped_faults

PROGRAM = """
import contextlib, mmap, os, resource, sys, threading
from sela_ext.kernels.mapped_faults import told_mapped_faults
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
path, how = sys.argv[1:]
with open(path, "wb") as file:
    file.write(bytes(5 * mmap.PAGESIZE))
with open(path, "rb") as file:
    mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

def read():
    for place in range(0, len(mapped), mmap.PAGESIZE):
        mapped[place]

if how == "nested":
    with told_mapped_faults(), told_mapped_faults():
        pass
with contextlib.nullcontext() if how == "nested" else told_mapped_faults():
    read()
    if how == "threads":
        os.truncate(path, mmap.PAGESIZE)
        several = [threading.Thread(target=read) for _ in range(5)]
        for one in several: one.start()
        for one in several: one.join()
    os.truncate(path, 2 * mmap.PAGESIZE)
    mapped[mmap.PAGESIZE]
    if how != "not read":
        read()
print("end")
"""


def run(path, how):
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, path, how], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc for the name")
@pytest.mark.parametrize("how", ["read", "threads"])
def test_a_mapped_file_that_was_cut_short_is_named_and_the_status_is_that_of_data(tmp_path, how):
    path = tmp_path / "a name\x1b[2J with all sorts"
    status, printed, told = run(path, how)
    assert (status, printed) == (3, "")
    named = re.escape(str(path).replace("\x1b", "?"))
    expected = rf"sela: error: data: {named} was read, and could not be: it became shorter .*, then resume\n"
    assert re.fullmatch(expected, told)


def test_what_is_still_there_is_read(tmp_path):
    assert run(tmp_path / "file", "not read") == (0, "end\n", "")


def test_afterwards_the_system_ends_the_process_as_before(tmp_path):
    assert run(tmp_path / "file", "nested")[0] == -signal.SIGBUS


def test_a_handler_that_is_there_stays_and_so_does_the_outer_one():
    before = signal.signal(signal.SIGBUS, lambda number, frame: None)
    try:
        assert not _core.mapped_faults_begin()
        with told_mapped_faults():
            assert signal.getsignal(signal.SIGBUS) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGBUS, before)
    with told_mapped_faults():
        assert not _core.mapped_faults_begin()
