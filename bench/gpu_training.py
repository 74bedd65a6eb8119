"""What training does with a card: batches per second, and where a run's time goes, with images kept there and sent.

Called by bench/gpu.py. The images are 50,000 of 32 x 32 x 3, as CIFAR's. Kept, they are augmented by the card in one
launch per batch; sent, the processor augments them, and each batch is copied from pinned memory on a stream of its own.
From JPEG files, decoded samples are sent of which the card makes the views, beside finished views.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import common
import images_cases as cases
import numpy as np
import torch

import sela_ext
from sela_ext.data import Augment, Loader
from sela_ext.kernels.check_cases import augment_difference
from sela_ext.kernels.device import on_card

IMAGES, PHOTOGRAPHS, BATCH, SEED = 50_000, 512, 256, 7
EPOCHS = 4
# Parts of a run's clock, as its last event names them, and what they are called here.
PARTS = {
    "train_seconds": "steps",
    "wait_seconds": "waiting for batches",
    "label_pass_seconds": "label passes",
    "evaluation_seconds": "evaluation",
}


class Card(Protocol):
    """What is needed of bench/gpu.py's card."""

    place: torch.device
    tiny: int

    def wait(self) -> None:
        """Wait for the device."""


def pictures(card: Card) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Generated images; what they show does not matter to time."""
    count = max(256, IMAGES // card.tiny)
    return np.random.default_rng(SEED).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def ways(card: Card) -> Iterable[tuple[str, bool]]:
    """How images come to the card; on the processor there is one way."""
    return (("kept on the card", True), ("sent", False)) if on_card(card.place) else (("sent", False),)


def loader_case(card: Card, rounds: int) -> list[dict[str, Any]]:
    """Images per second of the Loader alone: an epoch, with nothing done to the batches.

    Raises:
        SystemExit: batches are not those of the processor.
    """
    images, augment = pictures(card), Augment.cifar(32, gray_first=True)
    options: dict[str, Any] = {"batch_size": BATCH, "augment": augment, "dtype": torch.bfloat16, "channels_last": True}
    expected = next(Loader(images, resident=False, **options).epoch(1))
    table, recorded = [], []
    for label, resident in ways(card):
        loader = Loader(images, device=card.place, resident=resident, **options)
        first = next(loader.epoch(1))
        difference = augment_difference(augment, first.images.cpu(), expected.images)
        if difference is not None or not torch.equal(first.index, expected.index):
            raise SystemExit(f"no agreement: {difference or 'another order than the CPU'}; nothing is timed")
        del first
        times = []
        for number in range(2 + min(rounds, 5)):
            card.wait()
            began = time.perf_counter()
            for batch in loader.epoch(number):
                del batch
            card.wait()
            times.append(time.perf_counter() - began)
        seconds = sorted(times[2:])[len(times[2:]) // 2]
        loader.close()
        table.append((label, len(images) / seconds / 1e3, seconds * 1e3))
        recorded.append({"case": "loader", "what": label, "images": len(images), "seconds": seconds})
        recorded[-1]["images_per_second"] = len(images) / seconds
    title = f"Loader, {len(images)} images of 32 x 32 x 3 in batches of {BATCH}, bfloat16, an epoch with nothing else"
    common.table(title, ("", "thousand images / s", "ms"), table)
    return recorded


def photographs_case(card: Card, rounds: int) -> list[dict[str, Any]]:
    """Images per second of the Loader from JPEG files to 224 pixels: samples sent and views made by the card, or views.

    Beside it the processor time per image. Photographs where there are some, else generated files.

    Raises:
        SystemExit: batches are not those of the processor.
    """
    augment = Augment.sela(224)
    options: dict[str, Any] = {"augment": augment, "dtype": torch.bfloat16, "channels_last": True}
    table, recorded = [], []
    with tempfile.TemporaryDirectory() as folder:
        many = max(8, PHOTOGRAPHS // card.tiny)
        files = cases.photographs(Path(folder), many) or cases.generated(Path(folder) / "generated", many)
        order = np.arange(len(files) * (8 if card.tiny == 1 else 1)) % len(files)
        options["batch_size"] = min(BATCH, len(files))
        expected = next(Loader(files, **options).epoch(1, order=order))
        for what in ("planes", "views") if on_card(card.place) else ("views",):
            loader = Loader(files, device=card.place, send=what, **options)
            first = next(loader.epoch(1, order=order))
            difference = augment_difference(augment, first.images.cpu(), expected.images)
            if difference is not None:
                raise SystemExit(f"no agreement: {difference}; nothing is timed")
            del first
            times = []
            for number in range(2 + min(rounds, 5)):
                card.wait()
                began, busy = time.perf_counter(), time.process_time()
                for batch in loader.epoch(number, order=order):
                    del batch
                card.wait()
                times.append((time.perf_counter() - began, time.process_time() - busy))
            loader.close()
            seconds, busy = sorted(times[2:])[len(times[2:]) // 2]
            table.append((f"{what} sent", len(order) / seconds, busy / len(order) * 1e3))
            recorded.append({"case": "loader, JPEG files", "what": what, "images": len(order), "seconds": seconds})
            recorded[-1] |= {"images_per_second": len(order) / seconds, "processor_seconds": busy}
    title = f"Loader, {len(order)} JPEG files to 224 in batches of {options['batch_size']}, bfloat16, nothing else"
    common.table(title, ("", "images / s", "ms of processors per image"), table)
    return recorded


def training_case(card: Card) -> list[dict[str, Any]]:
    """Where the time of a run goes: its own clock, the start left out."""
    images = pictures(card)
    table, recorded = [], []
    for label, resident in ways(card):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            sela_ext.train(
                images,
                out=out,
                model="small-resnet",
                device=str(card.place),
                resident=resident,
                epochs=EPOCHS,
                batch_size=BATCH if len(images) > 4 * BATCH else 64,
                clusters=128 if len(images) > 4 * BATCH else 8,
                heads=4,
                seed=SEED,
                progress=False,
                threads=torch.get_num_threads(),
            )
            events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        end = events[-1]
        seconds = {name: float(end[key]) for key, name in PARTS.items()}
        whole = sum(seconds.values())
        rate = EPOCHS * len(images) / max(seconds["steps"] + seconds["waiting for batches"], 1e-9)
        table.append((label, rate / 1e3, *(f"{value / whole:.1%}" for value in seconds.values()), whole))
        recorded.append({"case": "training", "what": label, "images": len(images), "images_per_second": rate})
        recorded[-1].update({f"{name.replace(' ', '_')}_seconds": value for name, value in seconds.items()})
    title = f"Training, {len(images)} images of 32 x 32 x 3, {EPOCHS} epochs, small-resnet, 4 heads"
    common.table(title, ("", "thousand images / s", *PARTS.values(), "seconds"), table)
    return recorded
