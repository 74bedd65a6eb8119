"""Run an iterator ahead of its consumer in one background thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")

# How often a blocked producer looks whether it is still wanted, seconds.
POLL_SECONDS = 0.2


def prefetch(
    items: Generator[T, None, None], *, depth: int, on_wait: Callable[[float], None]
) -> Generator[T, None, None]:
    """Yield what `items` yields, computed in a background thread at most `depth` items ahead.

    The thread starts with the first `next` and has ended when this generator is exhausted or closed (as when the
    consumer breaks out of its loop). It is not a daemon, since a thread killed inside compiled code aborts the process;
    instead it ends by itself when the main thread has ended.

    Args:
        items: Used and closed in the background thread.
        depth: Items that may be ready or in the making, >= 1.
        on_wait: Called with the seconds that the consumer waited for each item.

    Raises:
        BaseException: What `items` raised, at its place in the sequence.
    """
    ready: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stop = threading.Event()

    def wait_for_room() -> bool:
        """Whether another item is wanted."""
        while not stop.is_set() and threading.main_thread().is_alive():
            if room.acquire(timeout=POLL_SECONDS):
                return not stop.is_set()
        return False

    def work() -> None:
        end: BaseException | None = None
        try:
            while wait_for_room():
                try:
                    item = next(items)
                except StopIteration:
                    break
                ready.put((item,))
                del item  # what the consumer lets go of shall be free before the next one is made
        except BaseException as error:
            end = error
        finally:
            try:
                items.close()
            except BaseException as error:
                end = end or error
            ready.put(end)  # whatever happens: the consumer waits for it

    thread = threading.Thread(target=work, name="sela-prefetch")
    thread.start()
    try:
        while True:
            began = time.perf_counter()
            entry = ready.get()
            on_wait(time.perf_counter() - began)
            room.release()
            if entry is None:
                return
            if isinstance(entry, BaseException):
                raise entry
            (item,) = entry
            del entry
            yield item
            del item
    finally:
        stop.set()
        room.release()  # a producer that waits for room wakes up at once
        if thread is not threading.current_thread():  # where a garbage collection may close an abandoned iterator
            thread.join()
