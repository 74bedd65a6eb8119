import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from sela_ext.data.prefetch import prefetch


def counting(n, made=None, closed=None):
    try:
        for i in range(n):
            if made is not None:
                made.append(i)
            yield i
    finally:
        if closed is not None:
            closed.append(threading.current_thread().name)


@pytest.mark.parametrize("depth", [1, 3])
def test_every_item_arrives_in_order(depth):
    waits = []
    assert list(prefetch(counting(31), depth=depth, on_wait=waits.append)) == list(range(31))
    assert len(waits) == 32
    assert min(waits) >= 0


def test_no_more_than_depth_items_are_made_ahead():
    made = []
    items = prefetch(counting(100, made), depth=3, on_wait=lambda _: None)
    for taken in range(1, 6):
        next(items)
        time.sleep(0.05)
        assert len(made) <= taken + 3
    items.close()


def test_nothing_runs_before_the_first_item_is_asked_for():
    made = []
    items = prefetch(counting(5, made), depth=3, on_wait=lambda _: None)
    time.sleep(0.02)
    assert made == []
    items.close()
    assert made == []


def test_closing_ends_the_thread_and_closes_the_producer_there():
    before = threading.active_count()
    closed = []
    items = prefetch(counting(1000, closed=closed), depth=3, on_wait=lambda _: None)
    next(items)
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before
    assert closed == ["sela-prefetch"]


def test_an_exception_arrives_at_its_place():
    def broken():
        yield 1
        yield 2
        raise ZeroDivisionError("in the background")

    before = threading.active_count()
    items = prefetch(broken(), depth=3, on_wait=lambda _: None)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ZeroDivisionError, match="in the background"):
        next(items)
    assert threading.active_count() == before


def test_an_exception_while_the_producer_is_closed_arrives_too():
    def untidy(stop):
        try:
            yield 1
            if stop:
                raise ZeroDivisionError("the first")
        finally:
            raise KeyError("while closing")

    for stop, expected in ((False, KeyError), (True, KeyError)):
        items = prefetch(untidy(stop), depth=1, on_wait=lambda _: None)
        assert next(items) == 1
        with pytest.raises(expected, match="while closing"):
            next(items)


@pytest.mark.parametrize("kind", ["digits", "files"])
def test_a_program_that_ends_inside_an_epoch_exits_cleanly(tmp_path, kind):
    if kind == "files":
        for i in range(64):
            small = Image.new("RGB", (9, 9), (i, 2 * i, 3 * i))
            small.resize((300, 300)).save(tmp_path / f"{i:02d}.{'png' if i % 4 == 3 else 'jpg'}")
    program = (
        "import sys\n"
        "from sela_ext.data import Loader\n"
        "loader = Loader(sys.argv[1], batch_size=8, threads=2)\n"
        "batches = loader.epoch(0)\n"
        "next(batches)\n"
        "raise SystemExit(7)\n"
    )
    data = "digits" if kind == "digits" else str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program, data], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (7, "")
