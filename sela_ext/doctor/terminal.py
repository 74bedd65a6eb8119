"""The result on a terminal: a screenful."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from sela_ext.doctor.page import facts, sentence, value_in_words

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_NAMES = 3


def show(result: Mapping[str, Any], written: list[str]) -> None:
    """Print a result.

    Args:
        result: Of the check.
        written: Files that hold more of it.
    """
    console = Console(highlight=False)
    encoding = console.encoding or "utf-8"

    def text(words: str, style: str = "") -> Text:
        printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
        return Text(printable.encode(encoding, "replace").decode(encoding), style=style)

    path = result["data"]["path"]
    console.print(text(("" if path is None else f"{path}: ") + sentence(result), "bold"))
    grid = RichTable.grid(padding=(0, 2))
    for finding in result["findings"]:
        grid.add_row(text(finding["severity"], _STYLES[finding["severity"]]), text(finding["text"]))
        names = finding["names"][:_NAMES]
        if names:
            more = ", ..." if len(finding["names"]) > _NAMES else ""
            grid.add_row("", text(", ".join(_short(name) for name in names) + more, "dim"))
        if finding["severity"] != "note":  # what to do about notes is on the page and in the manual
            grid.add_row("", text(finding["advice"], "dim"))
    console.print(grid)
    if not result["findings"]:
        console.print(text("nothing wrong was found", "green"))
    grid = RichTable.grid(padding=(0, 2))
    for name, value in facts(result):
        grid.add_row(text(name, "dim"), text(value))
    for one in result["suggestions"]:
        grid.add_row(text(one["option"], "bold"), text(f"{value_in_words(one)} ({one['reason']})"))
    console.print(grid)
    if result["command"]:
        console.print(text(result["command"], "bold"), soft_wrap=True)
    for file in written:
        console.print(text(f"written: {file}"), soft_wrap=True)
    sys.stdout.flush()


def _short(name: str, most: int = 40) -> str:
    return name if len(name) <= most else "\N{HORIZONTAL ELLIPSIS}" + name[-most:]
