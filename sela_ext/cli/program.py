"""The program `sela`: its commands, its exit status, and how it complains."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from sela_ext.cli import exports, images, inference, information, labels, training
from sela_ext.cli.parser import Parser
from sela_ext.errors import SelaError


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status.

    Exit status: 0 done, 1 a certificate that does not hold, 2 options, 3 data, 4 checkpoint, 5 numerics,
    6 distributed, 7 resources, 130 / 143 signals.
    """
    try:
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
    except (MemoryError, RuntimeError, OSError) as error:
        memory = isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate" in str(error)
        if memory:
            _complain("out of memory; use a smaller batch_size, fewer clusters or fewer heads")
        elif isinstance(error, OSError):
            _complain(f"{error}; check that the path exists and can be written, and that the disk has room")
        else:
            raise
        status = 7
    raise SystemExit(status)


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


def _complain(message: str) -> None:
    # Names of files may hold anything, also what terminals take for commands.
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    print(f"sela: error: {line}", file=sys.stderr)


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
    training.add_report(commands)
    images.add_doctor(commands)
    information.add_command(commands)
    return parser
