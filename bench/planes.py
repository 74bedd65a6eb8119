"""What the processor has to do for an image where a GPU makes the views, beside all of it, and what is sent.

    SELA_DATA_DIR=folder python bench/planes.py [--quick] [--no-record]

The compiled reader with one thread, photographs (or generated files in their place) with their entry points known:
processor time per image of finished views, and of the samples that they need, in turn, medians over epochs. Beside it
the bytes that are sent. The table is in docs/design/0008-loader.md.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import images_cases as cases
import numpy as np
import torch

from sela_ext.kernels import Augment, IndexStore, Reader

PRESETS: dict[str, list[Augment]] = {
    "SeLa, 224": [Augment.sela(224)],
    "SeLa, 224, exact": [Augment.sela(224)],
    "Aug++, 224": [Augment.aug_plus(224)],
    "2 x 224 and 6 x 96": list(Augment.multi_crop((224, 96), (2, 6))),
    "SeLa, 32": [Augment.sela(32)],
}


def processor_seconds(function: Callable[[], Any]) -> float:
    """Time of all threads of this process."""
    began = time.process_time()
    function()
    return time.process_time() - began


def measure(files: list[str], augments: list[Augment], rounds: int, *, exact: bool) -> dict[str, float]:
    """Milliseconds of processor time per image, and bytes."""
    count, views = len(files), range(len(augments))
    out = [torch.empty(count, 3, augment.size, augment.size) for augment in augments]
    arena = np.zeros(count << 21, np.uint8)
    index = np.arange(count)
    times: dict[str, list[float]] = {"views": [], "samples": []}
    sent = 0
    with Reader(augments, threads=1, exact=exact, index=IndexStore()) as reader:
        for epoch in range(1 + rounds):
            key: dict[str, Any] = {"seed": 7, "epoch": epoch, "views": views}
            for name, function in (
                ("views", lambda key=key: reader.submit(files, index, out, **key).wait()),
                ("samples", lambda key=key: reader.submit_planes(files, index, arena, **key).wait()),
            ):
                times[name].append(processor_seconds(function))
            found = reader.submit_planes(files, index, arena[:0], **key).wait()
            sent += int(found.wanted.sum()) if epoch else 0
    found_times = {name: statistics.median(values[1:]) / count * 1e3 for name, values in times.items()}
    return {**found_times, "sent": sent / rounds / count, "float32": sum(4 * o[0].numel() for o in out)}


def main() -> None:
    parser = common.arguments("Processor time of samples for a GPU, beside that of finished views.")
    options = parser.parse_args()
    facts = common.machine()
    common.print_machine(facts, 1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        many = 40 if options.quick else 120
        files = cases.photographs(Path(folder), many) or cases.generated(Path(folder) / "generated", many)
        for name, augments in PRESETS.items():
            found = measure(files, augments, 3 if options.quick else 7, exact="exact" in name)
            rows.append({"case": "planes", "what": name, "images": len(files), **found})
    common.table(
        f"{len(files)} JPEG files, one thread: ms of processor time and kB sent per image",
        ("", "views", "samples", "ratio", "samples, kB", "float32, kB"),
        [
            (
                row["what"],
                row["views"],
                row["samples"],
                row["views"] / row["samples"],
                row["sent"] / 1e3,
                row["float32"] / 1e3,
            )
            for row in rows
        ],
    )
    if not options.no_record:
        print(f"\nrows appended to {common.record('planes', rows, facts)}")


if __name__ == "__main__":
    main()
