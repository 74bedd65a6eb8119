"""`sela info`: versions, instruction set and devices."""

from __future__ import annotations

import argparse
from typing import Any

from sela_ext.errors import SelaError


def add_command(commands: Any) -> None:
    """Add `info`."""
    info = commands.add_parser("info", help="versions, instruction set, devices and their self-check; presets")
    info.add_argument("--presets", action="store_true", help="list the presets of train instead: source, cost, score")
    info.set_defaults(run=_info, parser=info)


def _info(given: argparse.Namespace) -> int:
    if given.presets:
        return _presets()
    import torch

    from sela_ext import build_info
    from sela_ext.kernels import device_verdict

    for name, value in build_info().items():
        print(f"{name:13} {' '.join(value) if isinstance(value, list) else value}")
    print(f"{'torch':13} {torch.__version__}")
    print(f"{'threads':13} {torch.get_num_threads()}")
    for i in range(torch.cuda.device_count()):
        try:
            verdict = str(device_verdict(i))
        except SelaError as error:
            verdict = f"cuda:{i}: not checked: {error}"
        print(f"{'device':13} {verdict}")
    if torch.cuda.device_count() == 0:
        why = "" if torch.version.cuda else ": this torch is built without CUDA"
        print(f"{'device':13} no CUDA device{why}")
    return 0


def _presets() -> int:
    from sela_ext.training.presets import PRESETS

    for name, preset in PRESETS.items():
        needs = "".join(f" Needs --{option.replace('_', '-')}." for option in preset.needs)
        print(f"{name}\n    {preset.source}{needs}")
    return 0
