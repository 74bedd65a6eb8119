"""Every named case has tests, and docs/faults.md says where; cases that need whole runs over ranks."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]
CASES = [f"D{number}" for number in range(1, 26)]
LISTED = re.compile(r"^\| (D\d+) \| [^|]+ \| ([^|]+) \|$", re.M)
NAMED = re.compile(r"^def test_d(\d+)_\w+\(", re.M)
SMALL = [
    *("--epochs", "2", "--clusters", "10,10", "--image-size", "16", "--threads", "1", "--no-progress"),
    *("--rank-timeout", "60"),
]


def listed():
    """Case -> files that its tests are in, by docs/faults.md."""
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    return {case: set(re.findall(r"`([\w/]+\.py)`", files)) for case, files in LISTED.findall(text)}


def written():
    """Case -> files that hold tests of its name."""
    found = {}
    for path in (ROOT / "python_tests").rglob("test_*.py"):
        for number in NAMED.findall(path.read_text(encoding="utf-8")):
            found.setdefault(f"D{number}", set()).add(str(path.relative_to(ROOT / "python_tests")))
    return found


def test_every_named_case_has_tests_and_the_table_says_in_which_files():
    assert list(listed()) == CASES
    assert listed() == written()


@pytest.mark.parametrize(
    ("images", "ranks", "batch", "steps"),
    [
        # Batch norm needs two images: a step that leaves one for any rank is passed over by all.
        (163, 2, 4, 40),
        (165, 2, 8, 21),  # three images of one rank in the last step, two of the other
        pytest.param(165, 3, 6, 27, marks=pytest.mark.slow),  # one of each; the third rank owns no rows
        pytest.param(161, 2, 40, 4, marks=pytest.mark.slow),  # the one that is left over is left out of the epoch
        pytest.param(163, 1, 2, 81, marks=pytest.mark.slow),
    ],
)
def test_d24_ranks_that_do_not_divide_the_images_label_every_one_once(server, tmp_path, images, ranks, batch, steps):
    np.save(tmp_path / "images.npy", (load_digits().images[:images] * 15).astype(np.uint8))
    command = ["train", "--data", tmp_path / "images.npy", "--out", tmp_path / "run", *SMALL, "--batch-size", batch]
    started = server.start_ranks(ranks, *command) if ranks > 1 else [server.start(*command)]
    assert [one.wait() for one in started] == [0] * ranks, [one.printed() for one in started]
    with open(tmp_path / "run" / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(images))
    labels = np.array([[int(row[f"label_{head}"]) for row in rows] for head in range(2)])
    assert labels.min() >= 0
    assert labels.max() < 10
    assert max(np.bincount(one).max() for one in labels) < images
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "end"] == [2 * steps]
    heads = [head for event in events if event["event"] == "label_pass" for head in event["heads"]]
    assert heads
    assert {head["used"] for head in heads} == {10}
