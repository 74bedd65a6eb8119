"""What a process of `devices=n` runs, see Note [How children start] in `sela_ext.training.launch`."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from typing import NoReturn

import cloudpickle

from sela_ext.errors import DistributedError, SelaError
from sela_ext.training.launch import read_task

_PR_SET_PDEATHSIG = 1


def main() -> NoReturn:
    """Do the task of the file `sys.argv[1]`, and leave the answer in the file `sys.argv[2]`, both open already."""
    task, answer, parent = map(int, sys.argv[1:4])
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the launcher passes it on
    words: dict[str, str | bool] = {}
    status, result = 0, b""
    try:
        work, arguments = read_task(task)
        found = work(*arguments)
        result = cloudpickle.dumps(found) if os.environ["RANK"] == "0" else b""
    except SelaError as error:
        words = {"error": type(error).__name__, "message": str(error), "of_all_ranks": error.of_all_ranks}
        status = error.exit_code
    except KeyboardInterrupt:
        status = 130
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        traceback.print_exc()
        words = {"error": "DistributedError", "message": f"{type(error).__name__}: {error}", "of_all_ranks": False}
        status = DistributedError.exit_code
    with open(answer, "wb") as file:
        file.write(json.dumps(words).encode() if words else result)
    leave(status)


def leave(status: int) -> NoReturn:
    """End this rank: at once after a failure, in which threads of the ranks' messages may be about to abort it."""
    if status:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)
    sys.exit(0)


def _die_with(parent: int) -> None:
    """Be killed when the launcher is, so that no rank is left behind; the heartbeat sees to it where Linux does not."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(DistributedError.exit_code)
