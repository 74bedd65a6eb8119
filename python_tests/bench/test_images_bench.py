"""bench/images.py in parts: what is read and checked before timing, the targets, the page that shows the rows."""

import importlib
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sela_ext import kernels

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delenv("SELA_DATA_DIR", raising=False)


def module(name):
    return pytest.fixture(lambda on_path: importlib.import_module(name), name=name)


images = module("images")
images_agreement = module("images_agreement")
images_alone = module("images_alone")
images_cases = module("images_cases")
images_child = module("images_child")
images_ours = module("images_ours")
images_peers = module("images_peers")
images_run = module("images_run")
images_targets = module("images_targets")
performance = module("performance")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Six JPEG files, one of them grey, none of them small."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photographs")
    for i, shape in enumerate([(130, 150), (150, 131), (201, 140), (140, 180), (125, 160), (160, 160)]):
        coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
        image = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)
        (image.convert("L") if i == 2 else image).save(folder / f"{i}.JPEG", quality=90)
    return tuple(sorted(str(path) for path in folder.iterdir()))


@pytest.fixture
def run(images_run, files, tmp_path, monkeypatch):
    """A run on the six files and small images, beside torchvision alone, in single rounds."""
    made = images_run.Run(tmp_path, True, "quick", photographs=len(files), smalls=200, rounds=1)
    made.made["photographs"] = files
    monkeypatch.setattr(images_run, "PEERS", ("torchvision v2", "torchvision v1"))
    return made


def task_of(images_cases, files, preset="sela", **values):
    return images_cases.Task(preset, 64, files, count=len(files), **{"batch": 4, **values})


# ---------------------------------------------------------------- what is read


def test_photographs_are_spread_over_all_there_are(images_cases, files, monkeypatch, tmp_path):
    monkeypatch.setenv("SELA_DATA_DIR", str(Path(files[0]).parent))
    assert images_cases.photographs(tmp_path, 100) == list(files)
    assert images_cases.photographs(tmp_path, 3) == [files[0], files[2], files[5]]


def test_without_photographs_generated_files_take_their_place(images_cases, images_run, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SELA_DATA_DIR", str(tmp_path))
    assert images_cases.photographs(tmp_path, 5) == []
    run = images_run.Run(tmp_path, photographs=4)
    assert run.photograph_files() == run.generated_files()
    assert len(run.photograph_files()) == 4
    assert capsys.readouterr().out.count("no photographs") == 1


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_an_archive_of_photographs_is_unpacked(images_cases, files, monkeypatch, tmp_path):
    raw = tmp_path / "photos.tar"
    with tarfile.open(raw, "w") as tar:
        for path in files:
            tar.add(path, arcname=f"photos/{Path(path).name}")
    subprocess.run(["zstd", "-q", str(raw), "-o", str(tmp_path / images_cases.ARCHIVE)], check=True)
    monkeypatch.setenv("SELA_DATA_DIR", str(tmp_path))
    found = images_cases.photographs(tmp_path / "unpacked", 10)
    assert [Path(path).read_bytes() for path in found] == [Path(path).read_bytes() for path in files]


def test_an_archive_that_is_none_gives_no_photographs(images_cases, monkeypatch, tmp_path, capsys):
    (tmp_path / images_cases.ARCHIVE).write_bytes(b"no archive")
    monkeypatch.setenv("SELA_DATA_DIR", str(tmp_path))
    assert images_cases.photographs(tmp_path / "unpacked", 10) == []
    assert "cannot be unpacked" in capsys.readouterr().out


def test_generated_files_are_baseline_and_the_same_in_every_run(images_cases, tmp_path):
    one, two = (images_cases.generated(tmp_path / name, 3) for name in ("one", "two"))
    assert [Path(path).read_bytes() for path in one] == [Path(path).read_bytes() for path in two]
    headers = [kernels.jpeg_header(Path(path).read_bytes()) for path in one]
    assert [(h.height, h.width) for h in headers] == [(500, 375), (375, 500), (375, 500)]
    assert all(h.sampling[0] == (2, 2) for h in headers)
    assert 30_000 < np.mean([Path(path).stat().st_size for path in one]) < 150_000


def test_small_images_are_parts_of_the_photographs(images_cases, tmp_path):
    whole = np.arange(140 * 160 * 3, dtype=np.uint32).reshape(140, 160, 3).astype(np.uint8)
    small = images_cases.patches([whole], 33)
    assert small.shape == (33, 32, 32, 3)
    half = whole[::2, ::2]
    windows = {half[y : y + 32, x : x + 32].tobytes() for y in range(39) for x in range(49)}
    assert all(image.tobytes() in windows for image in small)
    paths = images_cases.small_files(tmp_path / "small", small)
    assert len(paths) == 33
    assert images_cases.pixels(paths[32]).shape == (32, 32, 3)


@pytest.mark.parametrize("count", [1, 31, 60, 240, 1001, 1440])
def test_all_batches_are_full(images_run, count):
    size = images_run.even(count, 64)
    assert count % size == 0
    assert 1 <= size <= 64


# ---------------------------------------------------------------- agreement


@pytest.mark.parametrize("preset", ["sela", "aug_plus", "eval"])
def test_the_exact_way_is_torchvisions_and_the_planar_one_near_it(run, images_run, images_cases, files, preset):
    task = task_of(images_cases, files, preset)
    images_run.agree(run, preset, task, ["exact, plain files"], ["planar, plain files"])
    exact, planar = run.rows
    assert exact["largest"] < 0.01
    assert 0 < planar["mean"] < 0.3
    assert exact["beside"] == "torchvision v2 in float"


@pytest.mark.parametrize("exact", [True, False])
def test_nothing_is_timed_without_agreement(run, images_run, images_agreement, images_cases, images_ours, files, exact):
    real = images_ours.WAYS["exact, plain files"]

    def darker(task):
        def batches(epoch):
            for batch in real(task)(epoch):
                yield replace(batch, images=batch.images - (0.001 if exact else 0.01))

        return batches

    what = "exact, darker" if exact else "planar, darker"
    images_ours.WAYS[what] = darker
    try:
        exacts = [what] if exact else ["exact, plain files"]
        with pytest.raises(images_agreement.DisagreementError, match=f"x, {what}: expected less than"):
            images_run.agree(run, "x", task_of(images_cases, files), exacts, [] if exact else [what])
    finally:
        del images_ours.WAYS[what]


def test_ways_that_draw_differently_are_not_compared(images_agreement, images_cases, images_ours, files):
    task = task_of(images_cases, files)
    way = images_ours.WAYS["planar, plain files"](task)
    with pytest.raises(images_agreement.DisagreementError, match="different parameters"):
        images_agreement.apart(way(0), list(way(1)), task.augment())


def test_a_decoder_with_other_pixels_is_noticed(images_agreement, images_cases, files):
    data = [Path(path).read_bytes() for path in files]
    wanted = [images_cases.pixels(path).copy() for path in files]
    assert images_agreement.unequal_pixels(data, wanted) == 0
    wanted[1][5, 7, 2] ^= 1
    assert images_agreement.unequal_pixels(data, wanted) == 1


def batches_of(images):
    return lambda: iter([images[:4], images[4:]])


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x[:5],
        lambda x: x[:, :, :32],
        lambda x: x.double(),
        lambda x: x + 3.0,
        lambda x: x * 0.0 + 2.0,
    ],
    ids=["missing", "shape", "type", "range", "mean"],
)
def test_competitors_that_return_something_else_are_refused(
    images_run, images_child, images_agreement, images_cases, damage
):
    task = images_cases.Task("eval", 64, ("x",) * 6, count=6, batch=4)
    good = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.4
    tasks = dict.fromkeys(("planar, packed", "torchvision v2"), task)
    ours = images_child.Here(batches_of(good), task)
    images_run.sane("x", {"planar, packed": ours, "torchvision v2": ours}, tasks)
    theirs = images_child.Here(batches_of(damage(good)), task)
    with pytest.raises(images_agreement.DisagreementError, match="x: expected 6 images float32"):
        images_run.sane("x", {"planar, packed": ours, "torchvision v2": theirs}, tasks)


# ---------------------------------------------------------------- competitors

NAMES = ("torchvision v2", "torchvision v1", "Albumentations", "DALI")
MODULES = {"Albumentations": "albumentations", "DALI": "nvidia.dali"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "DALI"])
@pytest.mark.parametrize("preset", ["sela", "aug_plus", "eval"])
def test_a_competitor_gives_normalised_batches_of_all_files(
    images_child, images_cases, images_peers, files, name, preset
):
    if name in MODULES:
        pytest.importorskip(MODULES[name])
    task = task_of(images_cases, files, preset)
    seen = images_child.look(images_peers.PEERS[name](task), task)
    assert (seen.images, seen.shape, seen.dtype) == (6, (4, 3, 64, 64), "float32")
    assert -0.5 <= seen.low < seen.high <= 255.5
    if preset == "eval":
        ours = images_child.look(images_ours_epoch("exact, plain files", task), task)
        assert abs(seen.mean - ours.mean) < 1


def images_ours_epoch(what, task):
    return importlib.import_module("images_ours").OURS[what](task)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_competitor_runs_in_a_process_of_its_own_with_two_workers(images_child, images_cases, files, name):
    if name in MODULES:
        pytest.importorskip(MODULES[name])
    one = images_child.Apart(name, task_of(images_cases, files * 2, threads=2))
    try:
        assert one.look().images == 12
        assert one.go().images == 12
    finally:
        one.close()


def test_ours_in_a_process_of_its_own_gives_the_same(images_child, images_cases, files):
    task = task_of(images_cases, files)
    here = images_child.look(images_child.epoch_of("exact, plain files", task), task)
    one = images_child.Apart("exact, plain files", task, {"SELA_CPU_ISA": "generic"})
    try:
        seen = one.look()
        assert seen.mean == pytest.approx(here.mean, abs=1e-3)
        spent = one.go()
        assert spent.images == spent.steady == 6
        assert spent.processor > 0
        assert spent.wall > 0
    finally:
        one.close()
    assert one.process.returncode == 0


def test_what_is_not_installed_is_skipped_with_its_reason_once(
    images_run, images_cases, images_peers, files, run, capsys
):
    tasks = {"FFCV": task_of(images_cases, files)}
    for _ in range(2):
        with images_run.competitors(run, tasks) as found:
            assert not found
    assert capsys.readouterr().out.count("FFCV: skipped, ") == 1


def test_a_process_that_fails_says_why(images_child, images_cases):
    with pytest.raises(images_cases.Absent, match="no-such-file"):
        images_child.Apart("torchvision v2", images_cases.Task("sela", 64, ("no-such-file.jpg",), count=1))


def test_the_first_batches_do_not_count_by_the_clock(images_child):
    assert images_child.went_through(lambda: iter([torch.zeros(4)] * 8))[:2] == (32, 32)
    assert images_child.went_through(lambda: iter([torch.zeros(4)] * 9))[:2] == (36, 24)


# ---------------------------------------------------------------- the script


def test_a_pipeline_gives_rows_for_everybody(run, images, capsys):
    images.sela(run)
    rates = {row["what"]: row for row in run.rows if row["question"] == "rate"}
    assert {"exact, plain files", "planar, plain files", "planar, later epochs"} < set(rates)
    assert {"torchvision v2", "torchvision v1"} < set(rates)
    for what, row in rates.items():
        assert row["ours"] == (not what.startswith("torchvision"))
        assert row["images"] == (24 if row["ours"] else 6)
        assert json.loads(json.dumps(row)) == row
    shown = capsys.readouterr().out
    assert "x torchvision v2" in shown
    assert "of 255 from torchvision v2 in float" in shown


def test_small_images_from_memory_are_compared_and_timed(run, images, monkeypatch):
    monkeypatch.setattr(images, "PEERS", ("torchvision v2", "torchvision v1"))
    images.small(run)
    rates = {row["what"]: row["images"] for row in run.rows if row["question"] == "rate"}
    assert rates == {"from an array": 200, "torchvision v2": 10, "torchvision v1": 16}


def test_small_files_are_taken_from_their_pack_as_one_array(run, images):
    images.small_files(run)
    rates = {row["what"]: row["images"] for row in run.rows if row["question"] == "rate"}
    assert rates["planar, packed"] == rates["torchvision v2"] == 20
    assert rates["planar, later epochs"] == 80


def test_decoding_alone_is_compared_with_pillow_first(run, images_alone, images_agreement, monkeypatch):
    images_alone.decode(run)
    assert run.rows[0]["unequal"] == 0
    rates = {row["what"] for row in run.rows if row["question"] == "rate"}
    assert {"to planes", "to RGB", "planes of a crop, with an index", "torchvision.io", "Pillow"} <= rates
    assert {row["what"] for row in run.rows if row["question"] == "isa"} >= {"generic"}
    monkeypatch.setattr(images_agreement, "unequal_pixels", lambda *_: 2)
    with pytest.raises(images_agreement.DisagreementError, match="2 files with others"):
        images_alone.decode(run)


def test_the_part_behind_the_decoder_is_timed_by_itself(run, images_alone):
    images_alone.behind(run)
    assert len(run.rows) == 12
    assert all(row["images"] == 6 and row["question"] == "behind" for row in run.rows)


def test_a_run_of_one_part_prints_its_table_and_the_targets(images, images_run, monkeypatch, files, capsys):
    monkeypatch.setenv("SELA_DATA_DIR", str(Path(files[0]).parent))
    monkeypatch.setattr(images_run, "PEERS", ("torchvision v2",))
    monkeypatch.setattr(images, "QUICK_PHOTOGRAPHS", 4)
    monkeypatch.setattr(sys, "argv", ["images.py", "--quick", "--part", "eval", "--no-record"])
    before = torch.get_num_threads()
    try:
        images.main()
    finally:
        torch.set_num_threads(before)
    shown = capsys.readouterr().out
    assert "eval 256/224, photographs" in shown
    assert "Targets, from the rows of this run" in shown
    assert "rows appended" not in shown


def test_disagreement_ends_the_run_and_another_failure_only_its_part(images, images_agreement, monkeypatch, capsys):
    def broken(run):
        raise ValueError("no such thing")

    def disagreeing(run):
        raise images_agreement.DisagreementError("x: expected this, found that")

    before = torch.get_num_threads()
    monkeypatch.setattr(images, "sela", broken)
    monkeypatch.setattr(images, "generated", lambda run: run.add("rate", "x", "y", images_per_second=1.0))
    monkeypatch.setattr(sys, "argv", ["images.py", "--only", "sela", "generated", "--no-record"])
    try:
        with pytest.raises(SystemExit, match="failed: sela"):
            images.main()
        assert "sela: failed, ValueError: no such thing" in capsys.readouterr().out
        monkeypatch.setattr(images, "sela", disagreeing)
        with pytest.raises(SystemExit, match="no agreement, x: expected this, found that"):
            images.main()
    finally:
        torch.set_num_threads(before)


def test_an_unknown_part_is_named(images):
    with pytest.raises(SystemExit, match=r"expected one of decode, sela, .* found moon"):
        images.parts_of(type("Options", (), {"only": ["moon"], "quick": False}))


# ---------------------------------------------------------------- targets and the page

SELA = "SeLa 224, photographs"


def rate_row(case, what, rate, **values):
    row = {"question": "rate", "case": case, "what": what, "mode": "full", "clock": "processor", "images": 240}
    row |= {"ours": what not in NAMES, "images_per_second": float(rate), "best_per_second": 1.1 * rate, "rounds": 5}
    return row | values


ROWS = [
    rate_row(SELA, "exact, plain files", 1500),
    rate_row(SELA, "planar, later epochs", 2500),
    rate_row(SELA, "planar, packed", 2600),
    rate_row(SELA, "torchvision v2", 250),
    rate_row(SELA, "Albumentations", 800),
    rate_row("32 px, from memory, two threads", "from an array, one thread", 300_000, clock="wall"),
    rate_row("32 px, from memory, two threads", "from an array, two threads", 570_000, clock="wall"),
    rate_row(SELA, "avx512", 2500, question="isa"),
    rate_row(SELA, "avx2", 1500, question="isa"),
]


def line(images_targets, rows, measure):
    return next(found for found in images_targets.lines(rows) if found[0] == measure)[1:]


def test_targets_are_read_off_the_rows(images_targets):
    found = line(images_targets, ROWS, "SeLa 224, plain files, exact, against torchvision v2")
    assert found == ("4x", "5x", "6x", "stretch", "exact, plain files: 1,500 images/s, torchvision v2: 250")
    found = line(images_targets, ROWS, "SeLa 224, packed or later epochs, against torchvision v2")
    assert found[2:] == ("10.4x", "stretch", "planar, packed: 2,600 images/s, torchvision v2: 250")
    assert line(images_targets, ROWS, "... two threads")[2:4] == ("1.9x", "gate")
    assert line(images_targets, ROWS, "AVX2 of AVX-512, JPEG files")[2:4] == ("0.6x", "not met")
    assert line(images_targets, ROWS, "... 32 px")[2:4] == ("-", "not in this run")


def test_the_best_peer_is_the_fastest_that_was_there(images_targets):
    found = images_targets.lines(ROWS)[1]
    assert found[0] == "... against the best peer"
    assert found[3:] == ("1.88x", "gate", "exact, plain files: 1,500 images/s, Albumentations: 800")


def test_targets_without_rows_are_not_in_the_run(images_targets):
    found = images_targets.lines([])
    assert len(found) == len(images_targets.TARGETS) > 20
    assert {words[4] for words in found} == {"not in this run"}


def kept(folder, *runs):
    machine = {"cpu": "A processor", "cores": 2, "memory_gib": 23.5, "sela_ext": "0.1.0", "isa": "avx2", "torch": "2"}
    machine |= {"compiler": "GNU", "numpy": "2", "python": "3.11", "load": 0.0, "torchvision": "0.29", "ffcv": None}
    with (folder / "images.jsonl").open("w") as file:
        for time, mode, rows in runs:
            for row in rows:
                file.write(json.dumps({"time": time, "machine": machine, **row, "mode": mode}) + "\n")


def document(performance):
    return "\n".join(
        f"<!-- {n}:begin -->\n<!-- {n}:end -->"
        for n in (*performance.SOLVER, *performance.IMAGES, *performance.TRAINING)
    )


def test_the_page_shows_the_latest_full_run_and_parts_run_again_since(performance, tmp_path):
    decoding = [rate_row("decoding, photographs", "to planes", 2000), rate_row("decoding, photographs", "DALI", 1000)]
    checked = {"question": "agreement", "case": SELA, "what": "planar, packed", "mean": 0.16, "largest": 19.0}
    rows = [*ROWS, *decoding, {**checked, "beside": "exact"}]
    older, again = (
        [{**ROWS[0], "images_per_second": 1234.0}],
        [{**row, "images_per_second": 4321.0} for row in ROWS[5:7]],
    )
    kept(tmp_path, ("2026-01-01", "full", older), ("2026-01-02", "full", rows), ("2026-01-03", "only", again))
    text = performance.filled(document(performance), tmp_path)
    assert "A processor with 2 cores and 23.5 GiB; 2026-01-02." in text
    assert "torchvision 0.29" in text
    assert "FFCV" in text.split("Not installed:")[1].splitlines()[0]
    assert "| planar, packed | 2,600 | 10.4 | 3.25 |" in text
    assert "| to planes | 2,000 | 2 |" in text
    assert f"| {SELA}: planar, packed | exact | 0.160 | 19 |" in text
    assert f"| {SELA} | 2,500 (100%) | 1,500 (60%) |" in text
    assert "| from an array, two threads | 4,321 |" in text, "run again alone"
    assert "1,234" not in text, "an older run"
    assert performance.filled(text, tmp_path) == text, "filling twice changes nothing"


def test_the_page_says_so_when_nothing_is_recorded(performance, tmp_path):
    text = performance.filled(document(performance), tmp_path)
    assert text.count(performance.NOTHING) == len(performance.SOLVER) + len(performance.IMAGES) + len(
        performance.TRAINING
    )
