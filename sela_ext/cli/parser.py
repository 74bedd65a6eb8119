"""What the commands share: a parser whose errors are one line, and options from a dataclass."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from sela_ext.errors import OptionError, nearest


class _Help(argparse.HelpFormatter):
    """Each example on a line of its own, whole, as it can be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        head, found, examples = text.partition(": ")
        if not found or head not in ("example", "examples"):
            return super()._fill_text(text, width, indent)
        return "\n".join([f"{head}:", *(f"  {one}" for one in examples.split(" | "))])


# What argparse says of a value that is none of those allowed; versions of Python differ in the quotes.
_INVALID_CHOICE = re.compile(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """Errors are one line, name the nearest option, and exit with status 2."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong as an OptionError."""
        if message.startswith("unrecognized arguments:"):
            wrong = message.split(":", 1)[1].split()[0]
            kind = "option" if wrong.startswith("-") else "argument"
            known = [string for action in self._actions for string in action.option_strings]
            near = difflib.get_close_matches(wrong.split("=")[0], known, n=1)
            message = f"unknown {kind} {wrong}" + (f"; did you mean {near[0]}?" if near else "")
        choice = _INVALID_CHOICE.fullmatch(message)
        if choice:
            known = [name.strip("'\"") for name in choice[3].split(", ")]
            name, found = choice[1], choice[2]
            message = f"{name}: expected one of {', '.join(known)}, found {found}{nearest(found, known)}"
        raise OptionError(f"{message}; see {self.prog} --help")


def add_options(parser: argparse.ArgumentParser, options: Any) -> None:
    """Add every field of a dataclass of options, dashes for underscores."""
    from sela_ext.training.option_text import read_option

    for spec in dataclasses.fields(options):
        meta = spec.metadata
        if spec.name == "callbacks":
            continue  # functions have no text
        flag = "--" + spec.name.replace("_", "-")
        default = "" if spec.default is None else f" (default {spec.default})"
        text = (meta["help"] + default).replace("%", "%%")
        if meta["kind"] == "bool":
            parser.add_argument(
                flag, dest=spec.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
            continue
        shown = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else meta["kind"].upper()
        parser.add_argument(
            flag,
            dest=spec.name,
            default=argparse.SUPPRESS,
            metavar=shown,
            help=text,
            type=functools.partial(read_option, spec),
        )


def check_can_write(path: str, option: str) -> None:
    """Refuse a result's file that cannot be written, before the work whose result it is; changes nothing.

    Raises:
        OptionError: a folder, or a file in a folder that is not there or not to be written.
    """
    if os.path.isdir(path):
        raise OptionError(f"{option}: expected a file, found the folder {path}; name a file in it")
    there = os.path.exists(path)
    if not (there and not os.path.isfile(path)):  # it is written beside its place, see `result_file`
        folder = os.path.dirname(os.path.realpath(path))
        if not os.path.isdir(folder):
            raise OptionError(f"{option}: expected a file in a folder that exists, found {path}; create {folder} first")
        if not os.access(folder, os.W_OK):
            raise OptionError(f"{option}: expected a folder that can be written, found {folder}; name another")
    if there and not os.access(path, os.W_OK):
        raise OptionError(f"{option}: expected a file that can be written, found {path}; name another")


class _Stream(io.BufferedIOBase):
    """Takes bytes one after the other: a pipe that numpy knows for a file would be asked for its position."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)


@contextlib.contextmanager
def result_file(path: str) -> Iterator[Any]:
    """A result's file, to be written: it is there whole, or what was there before stays.

    A link stays, and what it leads to is replaced. Pipes and devices are written as they are.

    Raises:
        ResourceError: it cannot be written.
    """
    from sela_ext.export.destination import new_file

    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            yield _Stream(file)
        return
    target = Path(os.path.realpath(path))
    # To be read, too: of files for writing alone numpy uses its own, and does not notice that the disk is full.
    with new_file(target, overwrite=True) as partial, open(partial, "x+b") as file:
        yield file


@contextlib.contextmanager
def result_table(path: str) -> Iterator[IO[str]]:
    """The same for a table; names of files that are not UTF-8 are escaped."""
    with result_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        yield text
        text.detach()
