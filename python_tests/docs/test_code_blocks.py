"""Every command and code block of README and pages is executed, with small stand-ins for the files that they name.

How commands are shortened is written down in conftest.py (`SHORTER`). Every page with blocks is in one of the tables
below, or a test fails.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import sela_ext

# Executed from top to bottom by the test named.
ELSEWHERE = {
    "docs/data.md": "python_tests/data/test_data_page.py",
    "docs/embeddings.md": "python_tests/embeddings/test_document.py",
    "docs/export.md": "python_tests/export/test_document.py",
    "docs/formats.md": "python_tests/data/test_formats.py",
}
# What is not executed as it stands, and why.
NOT_EXECUTED = {
    "docs/gpu.md": "torch.compile of an operator on a device; python_tests/assign/test_ops.py compiles it on the CPU",
}


def photos(desk):
    """A run on photographs, which the page takes for granted."""
    desk.command("sela train --data my/photos --out runs/photos --clusters 20 --epochs 50")


def digits(desk):
    """A run on digits."""
    desk.command("sela train --data digits --out runs/digits")


def released(desk):
    """A checkpoint in the layout of the authors'."""
    published = desk.load("compat/published.py")
    shapes = published.preact()
    for head in range(10):
        shapes |= published.linear(f"top_layer{head}", 2048, 30)
    torch.save(published.draw(shapes), "resnet-10x3k.pth")
    desk.known["images"] = torch.zeros(1, 3, 64, 64)


def features(desk):
    """Arrays that the README names, and a process group of one."""
    released(desk)
    desk.known |= {name: np.load(f"{name}.npy") for name in ("logits", "features", "weight", "bias")}
    desk.known["new_logits"] = desk.known["logits"][:5]
    group = Path("group").absolute().as_uri()
    torch.distributed.init_process_group("gloo", init_method=group, rank=0, world_size=1)


def one_rank(desk):
    """The names that the page speaks of, and the environment that torchrun makes."""
    desk.setenv(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    logits = np.load("logits.npy")
    desk.known |= {"torch": torch, "N": len(logits), "world_size": 1, "rank": 0, "logits_of": lambda rows: logits[rows]}


def labelled(desk):
    """Runs and data of the page on evaluation."""
    photos(desk)
    digits(desk)
    shutil.copytree("my/labelled", "labelled/photos")
    shutil.copytree("my/labelled/train", "TRAIN")
    shutil.copytree("my/labelled/test", "TEST")


def backbones(desk):
    """What the page on fine-tuning begins with."""
    photos(desk)
    released(desk)
    shutil.copytree("VOCdevkit/VOC2007", "VOCdevkit/VOC2012")
    finetune = sela_ext.finetune
    desk.setattr(sela_ext, "finetune", lambda *a, **k: finetune(*a, **{"out": "runs/py", **k, **SMALL}))


# Of a fine-tuning from Python; conftest.py has the same for the command line.
SMALL = {"iterations": 2, "image_size": 64, "test_crops": "centre", "threads": 1, "progress": False}


# The page, what is there before it begins, and how many commands and blocks it must have had executed.
FAST = {
    "README.md": (features, 15, 2),
    "docs/quickstart.md": (None, 12, 2),
    "docs/scaling.md": (one_rank, 0, 1),
}
SLOW = {
    "docs/watching.md": (None, 1, 1),
    "docs/own_images.md": (None, 10, 1),
    "docs/choosing.md": (None, 3, 1),
    "docs/checkpoints.md": (released, 0, 1),
    "docs/faults.md": (photos, 1, 0),
    "docs/evaluation.md": (labelled, 4, 0),
    "docs/finetune.md": (backbones, 5, 1),
}
# Lines of pages in SLOW and FAST that need what no test has, and why.
NEEDS_MORE = {
    "sela evaluate alexnet-10x3k.pth --data imagenet": "ImageNet, and hours; python_tests/inference runs these probes",
    "sela evaluate resnet18:IMAGENET1K_V1": "torchvision's weights, which are downloaded",
}


@pytest.fixture(autouse=True)
def no_group_is_left():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(desk, page, prepare, commands, blocks):
    desk.known["sela_ext"] = sela_ext
    desk.left_out = NEEDS_MORE
    if prepare is not None:
        prepare(desk)
    before = desk.commands
    counts = desk.page(page)
    assert (desk.commands - before, counts["python"]) == (commands, blocks)


@pytest.mark.timeout(1200)  # several runs, on a machine that may have much else to do
@pytest.mark.parametrize("page", FAST)
def test_a_page_runs_from_top_to_bottom(desk, page):
    run(desk, page, *FAST[page])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", SLOW)
def test_a_long_page_runs_from_top_to_bottom(desk, page):
    run(desk, page, *SLOW[page])


def test_every_page_with_blocks_is_executed_somewhere(documents):
    root, blocks_of = documents
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    found = {
        page.relative_to(root).as_posix()
        for page in pages
        if any(language in ("bash", "python", "console", "sh") for language, _, _ in blocks_of(page))
    }
    told = [*FAST, *SLOW, *ELSEWHERE, *NOT_EXECUTED]
    assert sorted(told) == sorted(found)
    for test in ELSEWHERE.values():
        assert (root / test).exists(), test
