"""The command line: `sela`, with a command for each public function."""

from sela_ext.cli.program import main, run

__all__ = ["main", "run"]
