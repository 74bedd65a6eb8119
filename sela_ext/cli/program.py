"""The program `sela`: its commands, its exit status, and how it complains."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from sela_ext.cli import exports, images, inference, information, labels, reports, training
from sela_ext.cli.parser import Parser
from sela_ext.errors import SelaError, one_line, out_of_memory
from sela_ext.kernels.mapped_faults import told_mapped_faults


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status.

    Exit status: 0 done, 1 a certificate that does not hold, 2 options, 3 data, 4 checkpoint, 5 numerics,
    6 distributed, 7 resources, 130 / 143 signals.
    """
    terminate = _end_at_sigterm()
    _mend_streams()
    try:
        remedy = "use fewer images, clusters or heads, a smaller batch_size, or a machine with more memory"
        with told_mapped_faults(), out_of_memory(remedy):
            status = run(sys.argv[1:] if arguments is None else list(arguments))
    except SelaError as error:
        _complain(str(error))
        status = error.exit_code
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # Whoever read our output is gone: nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        _complain(f"{error}; check that the path exists and can be written, and that the disk has room")
        status = 7
    finally:
        if terminate is not None:
            signal.signal(signal.SIGTERM, terminate)
    if status and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        from sela_ext.training.launch_child import leave

        leave(status)
    raise SystemExit(status)


def _end_at_sigterm() -> Any:
    """Have SIGTERM end the program in order, with status 143, wherever it is. Returns what it did before."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return None

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    return signal.signal(signal.SIGTERM, end)


def run(arguments: list[str]) -> int:
    """Run one command.

    Raises:
        SelaError: what went wrong, in one line.
    """
    parser = _build_parser(arguments)
    given, rest = parser.parse_known_args(arguments)
    if rest:
        given.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    status: int = given.run(given)
    return status


def _mend_streams() -> None:
    """Make do with the standard streams that there are.

    A stream that was closed is the null device: otherwise the next file that is opened, a checkpoint say, gets its
    number, and whatever a library writes to standard output goes into it. What the encoding of the terminal lacks is
    escaped: names of files may hold anything.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(number)
            except OSError:
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, number)  # which children inherit
                if null != number:
                    os.close(null)
                setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - until the end
        elif (
            number
            and isinstance(stream, io.TextIOWrapper)
            and (stream.errors == "strict" or stream.encoding.lower() not in ("utf-8", "utf8"))
        ):
            stream.reconfigure(errors="backslashreplace")


def _complain(message: str) -> None:
    # Names of files may hold anything, also what terminals take for commands.
    try:
        print(f"sela: error: {one_line(message)}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # nobody hears it; the status stays, which the interpreter would change at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _build_parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = Parser(
        prog="sela",
        description="Self-labelling: from unlabelled images to labels and a trained network.",
        epilog="example: sela train --data digits --out runs/digits",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = arguments[0] if arguments else ""  # the options of some commands take a second to import
    training.add_train(commands, chosen)
    labels.add_commands(commands)
    inference.add_commands(commands)
    exports.add_export(commands)
    images.add_pack(commands)
    training.add_finetune(commands, chosen)
    reports.add_report(commands)
    images.add_doctor(commands)
    information.add_command(commands)
    return parser
