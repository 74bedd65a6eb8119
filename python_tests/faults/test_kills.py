"""D12: a run that is killed at any moment, and resumed, ends with the bits of one that was not."""

import json
import random
import time

import numpy as np
import pytest
from PIL import Image

from sela_ext.training.faults import PLACES

SMALL = [
    *("--epochs", "2", "--batch-size", "40", "--clusters", "10,10", "--image-size", "16", "--threads", "1"),
    *("--evaluate-every", "1", "--log-every", "1", "--no-progress"),
]
EVERY_STEP = ["--checkpoint-seconds", "0"]
WRITING = [place for place in PLACES if place.split()[-1] in ("write", "fsync", "rename")]
# Only a run that replaces another comes here.
OVERWRITING = "overwriting"


class Unbroken:
    """Runs that nothing happens to, by command; the folder of each, and the seconds that it took."""

    def __init__(self, server, folder):
        self.server, self.folder, self.known = server, folder, {}

    def __call__(self, command, ranks=1):
        key = (*command, ranks)
        if key not in self.known:
            out, began = self.folder / str(len(self.known)), time.monotonic()
            started = start(self.server, ranks, *command, *EVERY_STEP, "--out", out)
            assert [one.wait() for one in started] == [0] * ranks, [one.printed() for one in started]
            self.known[key] = out, time.monotonic() - began
        return self.known[key]


def start(server, ranks, *arguments, fault=None):
    """One process without ranks, or as many as are asked for."""
    if ranks == 1:
        return [server.start(*arguments, fault=fault)]
    return server.start_ranks(ranks, *arguments, fault=fault)


@pytest.fixture(scope="module")
def unbroken(server, tmp_path_factory):
    return Unbroken(server, tmp_path_factory.mktemp("unbroken"))


def kill_and_resume(server, runs, unbroken, command, out, fault):
    """Kill a run at a place, resume it, and compare it with the one that was not killed."""
    status, printed = server.run(*command, *EVERY_STEP, "--out", out, fault=f"{fault}:kill")
    assert status == -9, f"not killed {fault}: {printed}"
    runs.assert_whole(out)
    status, printed = server.run(*command, *EVERY_STEP, "--out", out, "--resume")
    assert status == 0, printed
    runs.assert_whole(out)
    runs.assert_tidy(out)
    runs.assert_equal_runs(unbroken(command)[0], out)


# Of places that are much alike one is enough for every day.
OFTEN = ("after write", "before rename", "after rename", "after log is cut", "inside label pass", "after step")
OFTEN += ("after last epoch", "before labels", "before report")
PLANTED = [
    pytest.param(f"{place}:{3 if place in WRITING else 1}", marks=() if place in OFTEN else pytest.mark.slow)
    for place in PLACES
    if place != OVERWRITING
]


@pytest.mark.parametrize("fault", PLANTED)
def test_d12_a_run_killed_at_a_place_resumes_to_the_same_bits(server, runs, unbroken, command, tmp_path, fault):
    kill_and_resume(server, runs, unbroken, command, tmp_path / "run", fault)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 7, 12, 13, 14, 15, 16])
@pytest.mark.parametrize("place", WRITING)
def test_d12_a_run_killed_while_any_of_its_files_is_written_resumes_to_the_same_bits(
    server, runs, unbroken, command, tmp_path, place, count
):
    kill_and_resume(server, runs, unbroken, command, tmp_path / "run", f"{place}:{count}")


FILES = ["options.json", "labels.npz", "labels.csv", "report.npz", "network.pt", "report.html"]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        pytest.param(place, name, marks=() if (place, name) == ("before rename", "report.html") else pytest.mark.slow)
        for place in WRITING
        for name in FILES
    ],
)
def test_d12_a_run_killed_while_it_writes_its_results_resumes_to_the_same_bits(
    server, runs, unbroken, command, tmp_path, place, name
):
    kill_and_resume(server, runs, unbroken, command, tmp_path / "run", f"{place}/{name}:1")


def test_every_file_of_a_run_is_one_that_it_is_killed_at(server, unbroken, command):
    logs = ("metrics.jsonl", "metrics.csv", "train.log")
    found = [path.name for path in unbroken(command)[0].iterdir() if path.is_file() and path.name not in logs]
    assert sorted(found) == sorted(FILES)


@pytest.mark.parametrize("again", ["the same", pytest.param("that of the run", marks=pytest.mark.slow)])
def test_d12_a_killed_run_by_a_file_of_options_resumes_by_it(server, runs, unbroken, command, tmp_path, again):
    out, config, words = tmp_path / "run", tmp_path / "options.json", iter([*command[1:], *EVERY_STEP])
    given = {}
    for word in words:
        name = word.removeprefix("--").replace("-", "_")
        value = False if name == "no_progress" else next(words)
        given["progress" if name == "no_progress" else name] = value
    numbers = ("epochs", "batch_size", "image_size", "threads", "evaluate_every", "log_every", "checkpoint_seconds")
    given.update({name: int(given[name]) for name in numbers}, clusters=[10, 10], out=str(out))
    config.write_text(json.dumps(given))
    status, printed = server.run("train", "--config", config, fault="after step:5:kill")
    assert status == -9, printed
    again_by = [config] if again == "the same" else [out / "options.json", "--out", out]
    status, printed = server.run("train", "--config", *again_by, "--resume")
    assert status == 0, printed
    runs.assert_equal_runs(unbroken(command)[0], out)


@pytest.mark.parametrize("count", [1, 5])
def test_d12_a_kill_while_a_run_is_replaced_leaves_nothing_of_it_to_go_on_with(
    server, runs, unbroken, command, tmp_path, count
):
    out = tmp_path / "run"
    status, printed = server.run(*command, "--seed", "5", "--epochs", "1", "--out", out)
    assert status == 0, printed
    fault = f"{OVERWRITING}:{count}:kill"
    assert server.run(*command, *EVERY_STEP, "--out", out, "--overwrite", fault=fault)[0] == -9
    assert not (out / "checkpoints").exists()
    status, printed = server.run(*command, *EVERY_STEP, "--out", out, "--resume")
    assert status == 0, printed
    runs.assert_equal_runs(unbroken(command)[0], out)


METHODS = {
    "sampler of clusters, average, held-out images": ["--sampler", "clusters", "--ema", "0.9", "--holdout", "20"],
    "passes in train mode": ["--label-source", "official", "--label-passes", "2"],
    "sela-v2": ["--method", "sela-v2"],
    "kmeans": ["--method", "kmeans"],
    "deepcluster": ["--method", "deepcluster"],
    "rotnet": ["--rotnet"],
    "accumulate": ["--accumulate", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["inside label pass:1", "after step:3", "after rename:5", "after last epoch:1"])
@pytest.mark.parametrize("method", METHODS)
def test_d12_a_killed_run_of_any_method_resumes_to_the_same_bits(
    server, runs, unbroken, command, tmp_path, method, fault
):
    kill_and_resume(server, runs, unbroken, [*command, *METHODS[method]], tmp_path / "run", fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["before step:1", "after step:5", "before labels:1"])
def test_d12_a_killed_run_on_fixed_labels_resumes_to_the_same_bits(
    server, runs, unbroken, command, tmp_path, data, fault
):
    fixed = [word for word in command if word != "10,10"]
    fixed.remove("--clusters")
    kill_and_resume(server, runs, unbroken, [*fixed, "--fixed-labels", data[3]], tmp_path / "run", fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["inside label pass:1", "after step:4", "before report:1"])
def test_d12_a_killed_run_on_photographs_resumes_to_the_same_bits_with_the_index_that_it_finds(
    server, runs, unbroken, tmp_path, tmp_path_factory, fault
):
    photos = tmp_path_factory.getbasetemp() / "photos"
    if not photos.exists():
        photos.mkdir()
        rng = np.random.default_rng(0)
        for i in range(80):
            small = rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(small).resize((150, 130), Image.Resampling.BICUBIC).save(photos / f"{i}.jpg")
        (photos / "13.jpg").write_bytes((photos / "13.jpg").read_bytes()[:900])
    bad = ["--on-bad-image", "skip", "--max-bad-fraction", "0.1"]
    command = ["train", "--data", str(photos), *SMALL, *bad, "--precision", "float32"]
    kill_and_resume(server, runs, unbroken, command, tmp_path / "run", fault)
    assert "13.jpg" in (tmp_path / "run" / "bad_images.csv").read_text()


def kill_at_random(server, runs, unbroken, command, folder, *, kills, ranks=1):
    """Kill runs at random moments, and at places now and then, until `kills` hit; compare each that came to its end."""
    rng, hits, ended = random.Random(kills * 10 + ranks), 0, 0
    whole, seconds = unbroken(command, ranks)
    while hits < kills or not ended:
        out, attempt = folder / f"run{ended}", 0
        while True:
            every = ["--checkpoint-seconds", rng.choice(["0", "0", "0.05", "100"])]
            # Beyond the last kill, and after many without getting anywhere, a run may end.
            calm = hits >= kills or attempt >= 12
            place = None if calm or rng.random() < 0.7 else rng.choice(WRITING)
            fault = None if place is None else f"{place}:{rng.randint(1, 12)}:kill:{rng.randrange(ranks)}"
            # A rank that is killed before all have met is missed by nobody but the clock.
            every += ["--rank-timeout", "60"] if ranks > 1 else []
            started = start(server, ranks, *command, *every, "--out", out, "--resume", fault=fault)
            victim = rng.choice(started)
            if not calm and fault is None and victim.wait(rng.uniform(0, seconds)) is None:
                victim.kill()
            statuses = [one.wait() for one in started]
            assert None not in statuses, f"a rank lives on: {[one.printed() for one in started]}"
            runs.assert_whole(out)
            attempt += 1
            if set(statuses) == {0}:
                break
            told = [one.printed() for one in started]
            assert -9 in statuses, f"{statuses}: {told}"
            # A rank that is killed when all work is done leaves the others nothing to fail at.
            over = (out / "report.html").exists() and 0 in statuses
            assert over or all(status in (-9, 6) for status in statuses), f"{statuses}: {told}"
            hits += 1
        runs.assert_tidy(out)
        runs.assert_equal_runs(whole, out)
        ended += 1
    return hits, ended


def test_d12_a_run_killed_at_random_moments_resumes_to_the_same_bits(server, runs, unbroken, command, tmp_path):
    assert kill_at_random(server, runs, unbroken, command, tmp_path, kills=5)[0] >= 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_d12_a_hundred_kills_at_random_moments(server, runs, unbroken, command, tmp_path):
    assert kill_at_random(server, runs, unbroken, command, tmp_path, kills=100)[0] >= 100


@pytest.mark.timeout(600)
def test_d12_two_ranks_of_which_one_is_killed_resume_to_the_same_bits(server, runs, unbroken, command, tmp_path):
    assert kill_at_random(server, runs, unbroken, command, tmp_path, kills=2, ranks=2)[0] >= 2


# 160 images: the last step of an epoch has 40.
SHORT_STEP = ["--batch-size", "60"]


@pytest.mark.timeout(600)
def test_d12_two_ranks_killed_between_epochs_do_not_begin_the_last_step_again(
    server, runs, unbroken, command, tmp_path
):
    command, out = [*command, *SHORT_STEP], tmp_path / "run"
    started = start(server, 2, *command, *EVERY_STEP, "--out", out, fault="inside evaluation:1:kill:1")
    assert [one.wait() for one in started] == [6, -9], [one.printed() for one in started]
    started = start(server, 2, *command, *EVERY_STEP, "--out", out, "--resume")
    assert [one.wait() for one in started] == [0, 0], [one.printed() for one in started]
    runs.assert_equal_runs(unbroken(command, 2)[0], out)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_d12_thirty_kills_of_one_of_two_ranks(server, runs, unbroken, command, tmp_path):
    command = [*command, *SHORT_STEP]
    assert kill_at_random(server, runs, unbroken, command, tmp_path, kills=30, ranks=2)[0] >= 30
