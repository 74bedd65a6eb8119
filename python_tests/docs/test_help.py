"""The examples that `--help` ends with are executed, with small stand-ins for the files that they name."""

import re

import pytest
import torch

from sela_ext.cli import main
from sela_ext.cli.program import _build_parser

# What needs more than a test has; its options are read all the same.
NOT_EXECUTED = {
    "sela evaluate alexnet.pth --data imagenet": "ImageNet and Places, and hours",
    "sela finetune resnet50 --pretrained": "weights that are downloaded",
}
BEFORE = {
    "train": ["sela train --data digits --out runs/before"],
    "verify": ["sela assign logits.npy --out labels.npy --potential potential.npy"],
    "evaluate": ["sela train --data digits --out runs/digits"],
    "predict": ["sela train --data my/photos --out runs/photos --clusters 20"],
    "embed": ["sela train --data my/photos --out runs/photos --clusters 20"],
    "export": ["sela train --data my/photos --out runs/photos --clusters 20"],
    "finetune": ["sela train --data my/photos --out runs/photos --clusters 20"],
    "report": ["sela train --data digits --out runs/digits"],
}
SLOW = ("train", "predict", "embed", "export", "finetune", "report", "evaluate")
COMMANDS = ["assign", "verify", "pack", "doctor", "info", *SLOW]


def examples(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    return re.split(r"^examples?:$", capsys.readouterr().out, flags=re.MULTILINE)[1].split("\n  ")[1:]


@pytest.mark.parametrize("command", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in COMMANDS])
def test_the_examples_of_a_help_are_executed(desk, capsys, command):
    if command == "finetune":
        published = desk.load("compat/published.py")
        torch.save(published.draw(published.preact() | published.linear("top_layer0", 2048, 30)), "resnet-10x3k.pth")
    for line in BEFORE.get(command, ()):
        desk.command(line)
    desk.left_out = NOT_EXECUTED
    before = desk.commands
    found = examples(capsys, command)
    for line in found:
        desk.command(line.strip())
    left_out = [line for line in found if line.startswith(tuple(NOT_EXECUTED))]
    assert desk.commands - before == len(found) - len(left_out) > 0


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_every_example_are_known(capsys, command):
    for line in examples(capsys, command):
        words = line.split()[1:]
        given, rest = _build_parser(words).parse_known_args(words)
        assert given.command == command
        assert rest == []
