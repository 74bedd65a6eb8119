import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sela_ext
from sela_ext.data.loader import BATCHES_AHEAD
from sela_ext.errors import OptionError, ResourceError
from sela_ext.training import plan as module
from sela_ext.training.loop import _number_of_ranks
from sela_ext.training.machine import Interrupt
from sela_ext.training.options import make_options
from sela_ext.training.plan import (
    ALWAYS,
    CHECKPOINTS,
    PASSES,
    STEPS,
    Part,
    RunPlan,
    activation_bytes,
    plan_run,
    size,
    with_time,
)
from sela_ext.training.ranks import device_number
from sela_ext.training.resolve import resolve
from sela_ext.training.run import make_run
from sela_ext.training.run_folder import RunFolder
from sela_ext.training.snapshot import first_state
from sela_ext.training.split import choose_images

MIB = 1 << 20


def make(tmp_path, count=96, data=None, **options):
    """A run on generated images, without its loop."""
    if data is None:
        data = np.random.default_rng(0).integers(0, 255, (count, 16, 16, 3), dtype=np.uint8)
    given = {"clusters": 4, "heads": 2, "threads": 1, "precision": "float32", "index": "off", "epochs": 2, **options}
    chosen = make_options(given)
    found = choose_images(data, chosen)
    resolved = resolve(chosen, set(given), found.train)
    run = make_run(resolved, found, RunFolder(tmp_path), Interrupt())
    run.state.update(first_state())
    return run


def part_of(plan, name):
    (found,) = [part for part in plan.parts if part.name == name]
    return found.nbytes


def test_parts_of_the_same_time_add_up_and_others_replace_one_another():
    parts = (
        Part("a", 10, "cpu", ALWAYS, "x"),
        Part("b", 5, "cpu", STEPS, "x"),
        Part("c", 6, "cpu", STEPS, "x"),
        Part("d", 8, "cpu", PASSES, "x"),
        Part("e", 99, "cuda", PASSES, "x"),
    )
    plan = RunPlan(parts, {"cpu": None, "cuda": None})
    assert plan.peak("cpu") == (21, "steps")
    assert plan.peak("cuda") == (99, "label passes")
    assert RunPlan(parts[:1], {"cpu": None}).peak("cpu")[0] == 10


def test_what_does_not_fit_is_an_error_that_names_the_largest_part_and_the_remedy():
    parts = (
        Part("network", 900 * MIB, "cpu", ALWAYS, "a smaller model", there=True),
        Part("activations", 700 * MIB, "cpu", STEPS, "lower batch_size (now 256)"),
        Part("label solver", 600 * MIB, "cpu", PASSES, "fewer clusters"),
    )
    told = (
        r"memory: expected 700\.0 MiB for the steps, found 500\.0 MiB free; the largest part is 700\.0 MiB for "
        r"activations: lower batch_size \(now 256\)"
    )
    with pytest.raises(ResourceError, match=told):
        RunPlan(parts, {"cpu": 500 * MIB}).check()
    RunPlan(parts, {"cpu": 750 * MIB}).check()
    RunPlan(parts, {"cpu": None}).check()
    with pytest.raises(ResourceError, match="GPU memory"):
        RunPlan((Part("activations", 9, "cuda", STEPS, "x"),), {"cuda": 1, "cpu": None}).check()


def test_activations_are_those_of_a_network_that_can_be_counted(tmp_path):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(768, 1000)

        def forward(self, images):
            return torch.sin(self.linear(torch.cos(images.flatten(1)[:, :768])))

    run = make(tmp_path, model=Layer, head_kind="linear", projection=0, image_size=32, half_resolution=0.0)
    fixed, per_image = activation_bytes(run, [run.plan.augment])
    # Kept: what the linear map, the sine and the heads take; and twice the largest of them, while gradients are made.
    largest = 4 * 1000
    kept = 4 * (768 + 1000 + 1000) + 2 * largest
    assert kept <= per_image <= kept + 4 * 50  # the losses of two heads of four clusters
    assert fixed < 100
    # Of two views, twice as much.
    _, twice = activation_bytes(run, [run.plan.augment, run.plan.augment])
    assert 1.5 * per_image < twice <= 2.1 * per_image


def test_gradients_are_there_while_a_checkpoint_is_written(tmp_path):
    seen = []

    def note(event, info):
        if event["event"] == "label_pass" and event["step"]:
            seen.append(sum(part.grad.nbytes for part in network.parameters() if part.grad is not None))

    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 8))
    data = np.random.default_rng(0).integers(0, 255, (96, 16, 16, 3), dtype=np.uint8)
    given = {"clusters": 4, "threads": 1, "image_size": 16, "half_resolution": 0.0, "progress": False, "epochs": 2}
    sela_ext.train(data, out=tmp_path / "run", model=network, callbacks=note, batch_size=32, **given)
    assert seen
    assert all(seen)
    plan = sela_ext.train(data, out=tmp_path / "other", model=network, dry_run=True, **given)
    (part,) = [part for part in plan.parts if part.name == "gradients"]
    assert part.when == ALWAYS


def test_the_trial_changes_neither_network_nor_random_state(tmp_path):
    run = make(
        tmp_path, model=lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 8), nn.BatchNorm1d(8))
    )
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    state = torch.get_rng_state()
    plan = plan_run(run, [run.plan.augment])
    with_time(plan, run, [run.plan.augment])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in run.network.state_dict().items())
    assert all(parameter.grad is None for parameter in run.network.parameters())


def test_parts_follow_the_options(tmp_path):
    small = plan_run(make(tmp_path, batch_size=16), [make(tmp_path).plan.augment])
    run = make(tmp_path, batch_size=32)
    large = plan_run(run, [run.plan.augment])
    assert part_of(large, "batches of images") == 2 * part_of(small, "batches of images")
    assert part_of(large, "activations") > 1.5 * part_of(small, "activations")
    weights = sum(p.numel() * 4 for p in run.network.parameters())
    assert part_of(large, "gradients") == part_of(large, "optimiser") == weights
    assert part_of(large, "bank of embeddings") == 96 * run.network.embedding_dim * 4
    without = plan_run(make(tmp_path, momentum=0.0, nesterov=False, label_source="eval"), [run.plan.augment])
    assert part_of(without, "optimiser") == 0
    assert part_of(without, "embeddings of all images") == 96 * run.network.embedding_dim * 4
    more = plan_run(make(tmp_path, clusters=40), [run.plan.augment])
    assert part_of(more, "label solver") > part_of(large, "label solver")


def test_samples_on_their_way_to_a_card_are_a_part(tmp_path, monkeypatch, as_cuda, host_card):
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 255, (150, 120 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.jpg", subsampling=0)
    options = {"image_size": 48, "batch_size": 8}
    run = make(tmp_path / "run", data=tmp_path, **options)
    views = [run.plan.augment]
    assert module.arena_bytes(run, views) == 0
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    as_cuda(host_card)
    loader = run.make_loader(views)
    assert loader.sending.planes
    assert part_of(plan_run(run, views), "decoded samples, page-locked") == (BATCHES_AHEAD + 1) * loader.arena_nbytes
    assert loader.arena_nbytes > 8 * np.mean(loader.sending.wanted)
    in_memory = make(tmp_path / "array")
    assert module.arena_bytes(in_memory, [in_memory.plan.augment]) == 0


def test_a_network_that_cannot_be_copied_leaves_a_note(tmp_path):
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3072, 8)

        def forward(self, images):
            return self.inner(images.flatten(1))

        def __deepcopy__(self, memo):
            raise TypeError("not me")

    run = make(tmp_path, model=Stubborn(), half_resolution=0.0)
    plan = plan_run(run, [run.plan.augment])
    plan = with_time(plan, run, [run.plan.augment])
    assert plan.notes == ("activations are not known: not me", "the time is not known: not me")
    assert plan.seconds is None
    assert "not me" in plan.table()


def test_a_table_has_a_line_per_part_and_what_is_free():
    parts = (Part("network", 3 * MIB, "cpu", ALWAYS, "x"), Part("nothing", 0, "cpu", ALWAYS, "x"))
    lines = RunPlan(parts, {"cpu": 1 << 30}, seconds=425.0, speed="46 epochs", opening="images").table().splitlines()
    assert lines[0] == "images"
    assert lines[2].split() == ["network", "3.0", "MiB", "always"]
    assert "1.0 GiB free" in lines[3]
    assert lines[4] == "time  about 7 min: 46 epochs"
    assert len(lines) == 5


def test_a_dry_run_tells_memory_and_time_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    state = torch.get_rng_state()
    plan = sela_ext.train("digits", out=out, dry_run=True, epochs=5, threads=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []
    assert plan.seconds > 0
    shown = capsys.readouterr().out
    assert "activations" in shown
    assert "most at once" in shown
    assert "time  about" in shown
    assert {part.when for part in plan.parts} >= {ALWAYS, STEPS, PASSES, CHECKPOINTS}


def test_a_dry_run_of_several_ranks_tells_what_the_first_needs_beside_the_others(tmp_path):
    options = {"dry_run": True, "threads": 1, "epochs": 2, "batch_size": 64, "precision": "float32", "progress": False}
    alone = sela_ext.train("digits", out=tmp_path / "run", **options)
    plan = sela_ext.train("digits", out=tmp_path / "run", devices=4, **options)
    assert 4 * part_of(plan, "batches of images") == part_of(alone, "batches of images")
    assert part_of(plan, "activations") < 0.6 * part_of(alone, "activations")
    others = {part.when: part.nbytes for part in plan.parts if part.name == "3 more ranks of this machine"}
    own = [part.nbytes for part in plan.parts if part.when == STEPS and "more ranks" not in part.name]
    assert others[STEPS] == 3 * sum(own)
    assert others[CHECKPOINTS] == 0  # the first alone writes them
    assert plan.peak("cpu")[0] > alone.peak("cpu")[0]
    with pytest.raises(OptionError, match="batch_size: expected a multiple of the 3 ranks"):
        sela_ext.train("digits", out=tmp_path / "run", devices=3, **options)


def test_an_evaluation_needs_the_features_of_held_out_images_too_on_the_first_rank_those_of_all_ranks(tmp_path):
    options = {"dry_run": True, "threads": 1, "epochs": 1, "batch_size": 64, "precision": "float32", "progress": False}
    images, name = np.zeros((600, 16, 16), np.uint8), "features of held-out and judged images"

    def planned(**more):
        return sela_ext.train(images, out=tmp_path / "run", **options, **more)

    without, alone, pair = planned(), planned(holdout=101), planned(holdout=101, devices=2)
    assert part_of(without, name) == 0
    features = part_of(without, "features of all images") // 600
    assert part_of(alone, name) == 101 * features
    assert part_of(alone, "features of all images") == 499 * features
    assert part_of(pair, name) == (51 + 101) * features
    assert part_of(pair, "features of all images") == (250 + 499) * features


def test_more_ranks_than_cuda_devices_are_refused_before_any_is_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _number_of_ranks(2, 1, torch.device("cuda")) == 2
    assert _number_of_ranks(3, 1, torch.device("cpu")) == 3
    with pytest.raises(OptionError, match="devices: expected at most 2, the CUDA devices of this machine, found 3"):
        _number_of_ranks(3, 1, torch.device("cuda"))
    with pytest.raises(OptionError, match="found 2 and rank 2 of it"):
        device_number(2, 2)


@pytest.mark.parametrize("method", ["sela", "deepcluster", "kmeans", "sela-v2"])
def test_a_dry_run_plans_for_as_many_ranks_as_are_asked_for(tmp_path, monkeypatch, method):
    monkeypatch.setattr(module, "_MEASURE_SECONDS", 0.01)
    given = {"dry_run": True, "method": method, "batch_size": 256, "epochs": 1, "threads": 1, "progress": False}
    images = np.zeros((600, 16, 16), np.uint8)
    one = sela_ext.train(images, out=tmp_path / "run", **given)
    four = sela_ext.train(images, out=tmp_path / "run", devices=4, **given)

    def activations(plan):
        return next(part.nbytes for part in plan.parts if part.name == "activations")

    assert activations(four) < 0.5 * activations(one)
    assert "; 4 processes" in four.speed
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_the_ranks_would_refuse(tmp_path):
    given = {"out": tmp_path / "run", "dry_run": True, "threads": 1, "progress": False}
    with pytest.raises(OptionError, match="batch_size: expected a multiple of the 3 ranks"):
        sela_ext.train("digits", devices=3, batch_size=256, **given)
    with pytest.raises(OptionError, match="sync_batch_norm: expected several CUDA devices, found 2 x cpu"):
        sela_ext.train("digits", devices=2, sync_batch_norm=True, device="cpu", **given)


def test_a_dry_run_with_a_budget_takes_the_budget(tmp_path):
    plan = sela_ext.train("digits", out=tmp_path / "run", dry_run=True, budget="5min", threads=1, progress=False)
    assert 300 <= plan.seconds < 400


def test_a_run_that_does_not_fit_ends_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: MIB)
    with pytest.raises(ResourceError, match=r"memory: expected .*, found 1\.0 MiB free; the largest part is"):
        sela_ext.train("digits", out=tmp_path / "run", epochs=5, threads=1, progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(ResourceError, match="largest part"):
        sela_ext.train("digits", out=tmp_path / "other", epochs=5, threads=1, progress=False, dry_run=True)


def test_the_plan_is_in_options_json(tmp_path):
    result = sela_ext.train("digits", out=tmp_path / "run", epochs=1, threads=1, progress=False)
    resolved = json.loads((result.out / "options.json").read_text())["resolved"]
    assert resolved["memory_bytes"]["cpu"] > MIB


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 40, "5120.0 GiB")])
def test_sizes_in_words(nbytes, text):
    assert size(nbytes) == text
