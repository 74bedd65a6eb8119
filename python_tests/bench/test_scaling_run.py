"""The cost model of whole runs, by hand-computed cases, and the run that compares it with one rank and two here."""

import dataclasses
import importlib.util
import json
import math
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sela_ext.models import Network, build_backbone
from sela_ext.training.schedule import label_pass_times

ROOT = Path(__file__).resolve().parents[2]


def loaded(name):
    if str(ROOT / "bench") not in sys.path:
        sys.path.insert(0, str(ROOT / "bench"))
    if name in sys.modules:  # what other modules of the benchmark have imported
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


label_model = loaded("scaling_model")
model = loaded("scaling_run_model")
run = loaded("scaling_run")

R = {name: parameter.value for name, parameter in model.RUN_PARAMETERS.items()}
# Ten million bytes a second inside of a node, one million between nodes.
LINK = label_model.Link(hop=1e-3, rate=1e7, far_hop=2e-3, far_rate=1e6)
RATES = model.Rates(
    image=0.01, look=0.003, load=0.002, fixed=0.1, floor=0.05, overlap=0.5, bucket=1e6, link=LINK, host_hop=1e-4
)


# ---- A step.


def test_two_ranks_average_gradients_in_one_exchange():
    # Three messages of two hops each; half of four million bytes twice at 1e7 a second.
    assert model.gradient_seconds(3e6, 2, RATES) == pytest.approx(3 * 2e-3 + 0.3)
    assert model.gradient_seconds(3e6, 1, RATES) == 0.0


def test_between_nodes_every_gpu_carries_its_part():
    # Four nodes: 3 up and 3 down inside, 2 and 2 between; 7/8 twice inside, an eighth of it 3/4 twice between.
    hops = 3 * (6e-3 + 4 * 2e-3)
    moved = 2 * 3e6 * 7 / 8 / 1e7 + 2 * (3e6 / 8) * 3 / 4 / 1e6
    assert model.gradient_seconds(3e6, 32, RATES) == pytest.approx(hops + moved)


def test_messages_that_the_backward_pass_hides_leave_the_last_one():
    # 0.1 + 40 * 0.01 = 0.5 s; half of two thirds of it hide 0.167 s, more than 0.102 s.
    step = model.step_cost(40, 250_000, 2, RATES)
    assert step.compute == pytest.approx(0.5)
    assert step.gradients == pytest.approx(2e-3 + 0.1)
    assert step.seconds == pytest.approx(0.602)
    assert step.bound == "compute"


def test_messages_longer_than_the_backward_pass_show():
    # 4 MB: 4 * 2 ms + 0.4 s = 0.408 s, of which 0.5 * 2/3 * 0.5 s are hidden.
    step = model.step_cost(40, 1_000_000, 2, RATES)
    assert step.gradients == pytest.approx(0.408 - 0.5 / 3)
    assert step.seconds == pytest.approx(0.5 + 0.408 - 0.5 / 3)


def test_one_rank_sends_nothing():
    step = model.step_cost(40, 1_000_000, 1, RATES)
    assert (step.gradients, step.launches, step.seconds) == (0.0, 0.05, pytest.approx(0.5))


@pytest.mark.parametrize(
    ("changes", "seconds", "bound"),
    [
        ({"floor": 0.7}, 0.7 + 2 * 1e-4, "launches"),
        ({"load": 0.02}, 0.8, "input"),
        ({}, 0.5, "compute"),
    ],
)
def test_the_slowest_of_what_goes_on_at_once_is_what_a_step_takes(changes, seconds, bound):
    step = model.step_cost(40, 0, 2, dataclasses.replace(RATES, **changes))
    assert (step.seconds, step.bound) == (pytest.approx(seconds), bound)


def test_a_card_loads_from_cores_or_from_storage_whichever_is_slower():
    few, many = model.gpu_rates(model.PAPER, 8), model.gpu_rates(model.PAPER, 4096)
    assert few.load == pytest.approx(max(1 / (2400 * 12), 1.1e5 / 1e9))
    assert many.load == pytest.approx(4096 * 1.1e5 / 1e12)
    assert few.image == pytest.approx((24_286_789_632 + 3 * 2 * 2048 * 30_000) / 8e13)


# ---- A label pass, memory, an epoch.


def small_recipe(**changes):
    """Numbers that one can follow: 10 heads of 100 clusters on 16 features."""
    return dataclasses.replace(
        model.BANK, embedding=16, features=32, clusters=100, heads=10, parameters=1000, activation=1e6, **changes
    )


def test_a_label_pass_costs_what_its_parts_say():
    recipe, images, ranks = small_recipe(), 1_024_000, 8
    n = 128_000
    cost = model.label_pass_cost(recipe, images, ranks, model.gpu_rates(recipe, ranks))
    product = max(2 * n * 16 * 100 / label_model.P["F"], n * (32 + 400) / label_model.P["B"])
    one = label_model.stored_pass(images, 100, 8, 4).seconds
    assert cost.solver == pytest.approx(10 * (product + 101 * one))
    assert cost.records == pytest.approx(R["z"] * 10 * images)
    hops, inside = 3 * label_model.P["a1"], label_model.P["b1"]
    assert cost.messages == pytest.approx(hops + (8 * 10 * images + n * (2 * 16 + 16)) * 7 / 8 / inside)
    assert cost.look == 0.0
    assert cost.seconds == pytest.approx(cost.solver + cost.records + cost.messages)


def test_a_pass_that_looks_runs_the_network_on_its_share():
    rates = dataclasses.replace(model.gpu_rates(model.PAPER, 8), look=1e-3, load=2e-3)
    cost = model.label_pass_cost(model.PAPER, 1_024_000, 8, rates)
    assert cost.look == pytest.approx(128_000 * 2e-3)
    assert model.dealt_bytes(model.PAPER, 1_024_000, 8) == 128_000 * (2 * 2048 + 8) * 7 / 8


@pytest.mark.parametrize(
    ("images", "ranks", "found"), [(1000, 1, 1000), (1000, 2, 512), (1025, 2, 1024), (300, 8, 300)]
)
def test_whole_batches_of_a_look_are_dealt_out(images, ranks, found):
    assert model.look_images(images, ranks) == found


def test_float32_logits_are_read_at_four_bytes():
    one = label_model.stored_pass(128 * 64, 100, 1, 4)
    assert one.read == pytest.approx(128 * 64 * (400 + 12) / label_model.P["B"])


def test_logits_that_take_half_of_the_free_memory_are_computed():
    recipe = small_recipe(looks=True)
    assert model.stored(recipe, 1280, 2, 2 * 640 * 400)
    assert not model.stored(recipe, 1280, 2, 2 * 640 * 400 - 1)
    assert not model.stored(recipe, 1280, 2, -1)
    each = model.solve_seconds(recipe, 1280, 2, 0)
    assert each == pytest.approx(101 * label_model.computed_pass(1280, 100, 2, 16).seconds)


def test_newtons_method_needs_room_for_all_candidates_beside_the_logits():
    recipe, images = small_recipe(looks=True), 1_280_000
    logits, room = 4.0 * 640_000 * 100, label_model.candidate_bytes(images, device=True)
    found = model.methods(recipe, images, 2, logits + room + 1)
    assert sorted(found) == ["anderson", "newton"]
    one = label_model.stored_pass(images, 100, 2, 4).seconds
    gathers = 6 * label_model.candidate_seconds(images, 2)
    assert found["newton"] == pytest.approx(7 * one + gathers + label_model.replicated_seconds(images))
    assert found["anderson"] == pytest.approx(101 * one)
    assert sorted(model.methods(recipe, images, 2, logits + room - 1)) == ["anderson"]


def test_of_the_methods_the_quicker_one_is_counted():
    few, many = (model.methods(model.PAPER, model.IMAGENET, ranks, 60e9) for ranks in (8, 512))
    assert few["newton"] < few["anderson"] / 2
    assert many["anderson"] < many["newton"]
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"a solve takes {1e3 * few['newton']:.0f} ms on 8 cards, a third of what 100 passes" in text
    for ranks, found in ((8, few), (512, many)):
        n = label_model.rows_per_rank(model.IMAGENET, ranks)
        product = max(2.0 * n * 2048 * 3000 / label_model.P["F"], n * (4096 + 12_000) / label_model.P["B"])
        assert model.solve_seconds(model.PAPER, model.IMAGENET, ranks, 60e9) == product + min(found.values())


def test_memory_is_the_sum_of_what_is_held():
    recipe, images = small_recipe(), 1_024_000
    bank = 2 * 128_000 * 16
    resident = 16 * 1000 + 4 * 10 * images + 2 * bank
    assert model.resident_bytes(recipe, images, 8) == resident
    assert model.device_bytes(recipe, images, 8, 4) == resident + 128_000 * (400 + 12)
    assert model.device_bytes(recipe, images, 8, 400) == resident + 400e6
    checkpoint = 8 * 1000 + 4 * 10 * images + 2 * images * 16
    assert model.checkpoint_bytes(recipe, images) == checkpoint
    assert model.node_bytes(recipe, images, 64) == 8 * images * (12 * 10 + 8) + 2 * checkpoint


def test_what_is_not_kept_between_passes_is_held_in_a_pass_alone():
    recipe, images = small_recipe(looks=True), 1_024_000
    assert model.resident_bytes(recipe, images, 8) == 16 * 1000 + 4 * 10 * images
    held = 128_000 * (400 + 12 + 32)
    assert model.device_bytes(recipe, images, 8, 4) == 16 * 1000 + 4 * 10 * images + held
    assert model.checkpoint_bytes(recipe, images) == 8 * 1000 + 4 * 10 * images


def test_an_epoch_has_a_hundred_steps_at_least():
    assert model.batch_of(model.PAPER, 10**8, 8) == 256
    assert model.batch_of(model.PAPER, 10**6, 64) == 156
    assert model.batch_of(model.PAPER, 10**6, 4096) == 2
    assert model.batch_of(model.PAPER, 1000, 4096) == 1


def test_an_epoch_is_its_steps_its_order_and_its_part_of_the_label_passes():
    epoch = model.epoch_cost(model.PAPER, 10**6, 8, 100)
    rates = model.gpu_rates(model.PAPER, 8)
    step = model.step_cost(100, model.PAPER.parameters, 8, rates)
    labels = model.label_pass_cost(model.PAPER, 10**6, 8, rates)
    before = 1250 * step.seconds + 10**6 * R["q"] + 99 / 400 * labels.seconds
    saved = model.checkpoint_bytes(model.PAPER, 10**6) / R["W"]
    assert epoch.seconds == pytest.approx(before * (1 + saved / 60))
    assert epoch.rate == pytest.approx(10**6 / epoch.seconds)
    assert sum(epoch.share(name) for name in epoch.parts) == pytest.approx(1)
    assert epoch.bound == step.bound == "compute"


def test_checkpoints_take_a_twentieth_of_the_time_at_most():
    one = model.checkpoint_bytes(model.BANK, 10**9) / R["W"]
    assert one > 60
    assert model.checkpoint_seconds(model.BANK, 10**9, 3600) == pytest.approx(3600 / 20)


def test_the_end_is_done_by_rank_0():
    recipe, images = small_recipe(), 1_024_000
    rates = model.gpu_rates(recipe, 64)
    look = (16_384 + 1024) * max(rates.look, rates.load)  # 2,000 batches are 32 a rank, 98 are 2
    sent = images * (4 * 32 + 2 * 16) * 63 / 64 / label_model.P["b2"]
    solver = 10 * model.solve_seconds(recipe, images, 1, 60e9)
    found = model.evaluation_seconds(recipe, images, 64)
    assert found == pytest.approx(look + sent + solver + R["z"] * 10 * images)


def test_a_whole_run_is_the_sum_of_its_parts():
    parts = model.run_parts(model.BANK, 1_024_000, 8, 400)
    epoch = model.epoch_cost(model.BANK, 1_024_000, 8)
    rates = model.gpu_rates(model.BANK, 8)
    assert parts["first look"] == pytest.approx(128_000 * max(rates.look, rates.load))
    assert parts["steps"] + parts["label passes"] + parts["checkpoints"] == pytest.approx(400 * epoch.seconds)
    assert parts["neighbours"] == pytest.approx(2 * 1_024_000 * 50_000 * 2048 / R["X"])
    assert parts["labels written"] == pytest.approx(1_024_000 * 10 * R["y"])
    assert model.run_parts(model.PAPER, 1_024_000, 8, 400)["first look"] == 0.0


def test_limits_are_where_memory_is_full():
    found = {what: images for what, images, _ in model.limits(model.BANK)}
    labels = found["labels of all images on every device"]
    activations = 43.9e6 * 256
    assert labels * 40 + 16 * model.BANK.parameters + activations == pytest.approx(label_model.P["M"])
    on_hosts = found["labels, probabilities and order of all images on every rank"]
    assert model.node_bytes(model.BANK, on_hosts, 8) - 2 * model.checkpoint_bytes(model.BANK, on_hosts) == R["H"]
    at_the_end = found["features and embeddings of all images on the device of rank 0, at the end"]
    assert at_the_end * (8192 + 256 + 40) + 16 * model.BANK.parameters == pytest.approx(label_model.P["M"])
    assert found["labels.csv takes an hour"] == pytest.approx(360e6)


def test_records_of_few_clusters_take_less():
    parts = model.epoch_cost(model.SMALL, 10**8, 64).parts
    assert parts["records"] == pytest.approx(R["z'"] * 10 * 10**8)


def test_records_take_as_long_as_the_steps_from_so_many_ranks_on():
    ranks = model.records_ranks(model.PAPER)
    rates = model.gpu_rates(model.PAPER, 1)
    assert 99 / 400 * 10 * R["z"] * 10**9 == pytest.approx(10**9 / ranks * rates.image)


def test_the_document_says_how_many_images_fill_the_launches():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"{R['o'] / model.gpu_rates(model.BANK, 8).image:.0f} images on a card fill that time" in text
    assert R["o"] / model.gpu_rates(model.SMALL, 8).image == pytest.approx(9000, rel=0.03)
    assert "9,000 with ResNet-18 at 32" in text


# ---- What the parameters are taken from.


@pytest.mark.parametrize(
    ("recipe", "name", "size", "projection"),
    [(model.PAPER, "resnet50", 224, 0), (model.BANK, "resnet50", 224, 128), (model.SMALL, "resnet18", 32, 0)],
    ids=["paper", "bank", "small"],
)
def test_flops_and_parameters_are_those_of_the_networks(recipe, name, size, projection):
    with torch.device("meta"):
        backbone = build_backbone(name, channels=3, image_size=(size, size))
        network = Network(
            backbone.module,
            backbone.feature_dim,
            [recipe.clusters] * recipe.heads,
            projection=projection,
            head_kind="cosine",
            temperature=0.1,
            channels_in=3,
            name=name,
        )
        images = torch.zeros(2, 3, size, size)
    module = backbone.module.to("meta")
    with FlopCounterMode(display=False) as forward:
        features = module(images)
    with FlopCounterMode(display=False) as step:
        module(images).sum().backward()
    assert forward.get_total_flops() / 2 == recipe.forward
    assert step.get_total_flops() / 2 == recipe.step
    assert features.shape[1] == recipe.features
    assert sum(p.numel() for p in network.parameters()) == recipe.parameters
    assert network.embedding_dim == recipe.embedding


def test_the_papers_schedule_makes_99_of_its_100_passes_in_400_epochs():
    times = label_pass_times(100, 400, 1.0, "quadratic")
    assert sum(time < 400 for time in times) == 99 == round(model.PAPER.passes * 400)


def test_loading_is_what_the_measurements_say():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for title, name in (("SeLa 224, photographs", "v"), ("32 px, files", "v'")):
        part = text.split(f"**{title}**\n", 1)[1].split("\n**", 1)[0]
        rate = float(re.search(r"\| planar, later epochs \| ([\d,]+) \|", part)[1].replace(",", ""))
        assert rate == pytest.approx(R[name], rel=0.25)


# ---- Tables.


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0123, "12 ms"), (43, "43 s"), (119, "119 s"), (120, "2.0 min"), (7199.9, "2.0 h"), (86400 * 2.5, "2.5 d")],
)
def test_times_are_written_in_the_units_that_people_use(seconds, words):
    assert model.time_words(seconds) == words


def test_memory_that_there_is_not_is_slanted():
    assert model.marked(71e9, 72e9) == "71 GB"
    assert model.marked(73e9, 72e9) == "*73 GB*"


def test_the_document_says_what_the_tables_say():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert model.tables() in text
    lines = model.epoch_rows(model.BANK, 10**10)
    assert [line[1] for line in lines] == ["8", "64", "512", "4,096"]
    assert all(line[7].startswith("*") for line in lines)


# ---- One rank and two.


def folder_of_a_run(folder, *, steps=(9.0, 0.1, 0.5, 0.2, 0.3, 0.4, 0.6), parameters=1000):
    """What a run writes, as far as it is read."""
    folder.mkdir(parents=True, exist_ok=True)
    events = [{"event": "step", "step": i + 1, "interval_seconds": seconds} for i, seconds in enumerate(steps)]
    heads = [{"head": 0, "passes": 3.5}, {"head": 1, "passes": 4.5}]
    events += [{"event": "label_pass", "pass": i, "heads": heads, "solve_seconds": 0.1 * i} for i in range(2)]
    events.append({"event": "end", "label_pass_seconds": 0.5, "evaluation_seconds": 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "options.json").write_text(json.dumps({"resolved": {"parameters": parameters, "feature_dim": 64}}))


def test_a_run_is_read_from_its_folder(tmp_path):
    folder_of_a_run(tmp_path)
    assert run.read_run(tmp_path) == dataclasses.replace(PAIR, solve=0.05)


CASE = run.Case("some", 1000, 100, {"clusters": 50, "heads": 2})
PAIR = run.Run(
    step=0.3, label_pass=0.25, solve=0.2, evaluation=1.5, steps=7, passes=2, reads=16.0, parameters=1000, features=64
)
ONE = dataclasses.replace(PAIR, step=0.5, label_pass=0.4, solve=0.35, evaluation=2.0)


def test_two_ranks_are_expected_to_take_what_one_takes_for_its_half_and_the_messages():
    # 1 ms a message; 4,000 bytes at 1e6 a second; records of 1 us.
    guess = run.expected(CASE, ONE, PAIR, 1e-3, 1e6, 1e-6)
    assert guess.step == pytest.approx(0.3 + (1e-3 + 4e-3) + 2 * 1e-3)
    sums = 8 * (50 + 14) / 1e6 + 1e-3  # of one pass
    told = 5e-4 + 8 * 1000 * 2 / 2 / 1e6
    dealt = 250 * (2 * 64 + 16) / 1e6
    each = 2 * ((4 + run.PIECES) * sums + run.GATHERS * 1e-3) + told + 500 * 2 * 64 / 1e6 + 500 * 2 * 1e-6
    assert guess.solve == pytest.approx(0.2 + each)
    assert guess.label_pass == pytest.approx(0.25 + each + dealt)
    assert guess.evaluation == pytest.approx(1.5 + (0.35 - 0.2) + 500 * (6 * 64 + 9) / 1e6)


def test_bytes_that_a_rank_sends_are_those_of_its_messages():
    steps = 7 * (4000 + 2 * 5 * 8)
    solves = (16 + 2 * 2 * run.PIECES) * 8 * (50 + 14)
    labels = 2 * (8 * 2 * 500 + 500 * 2 * 64)  # of two passes, with what their spread is told from
    at_the_end = 500 * (6 * 64 + 9)
    of_bank = 3 * 250 * (128 + 16) + 250 * (128 + 8)  # two passes, last epoch, first look
    checkpoint = 500 * 129
    assert run.sent_bytes(CASE, PAIR) == steps + solves + labels + at_the_end + of_bank + checkpoint
    looking = dataclasses.replace(CASE, bank=False)
    assert run.sent_bytes(looking, PAIR) == steps + solves + labels + at_the_end + 2 * 250 * (128 + 8)


def test_recorded_runs_become_a_table():
    assert "nothing is recorded yet" in run.table([{"case": "dense", "time": "2026"}])
    two = dataclasses.replace(PAIR, step=0.32, label_pass=0.3, sent=360_000.0)
    row = run.compared(CASE, ONE, PAIR, two, 1e-3, 1e6, 1e-6)
    facts = {"cpu": "Some CPU", "cores": 2, "load": 0.5, "load_after": 1.5}
    table = run.table([{"time": "2026-01-02T03", "machine": facts, **row}])
    assert "**Runs measured** on Some CPU, 2 cores" in table
    assert "2026-01-02, load 0.5 before and 1.5 after, medians; some: 1,000 images" in table
    # 100 images in 0.5 s; 50 in 0.3 s; 100 in 0.32 s and 0.307 s.
    assert "| some | images/s | 200 | 167 | 312 | 326 | 0.96 | 1.56 |" in table
    assert "|  | a step | 500 ms | 300 ms | 320 ms | 307 ms | 1.04 | 1.56 |" in table
    sent = run.sent_bytes(CASE, PAIR)
    assert f"|  | sent by a rank | - | - | 360 kB | {sent / 1e3:.0f} kB | {360e3 / sent:.2f} | - |" in table


PRETENDED = """
import shutil


def write(case, out, environment):
    if environment.get("RANK") == "1":
        assert environment["WORLD_SIZE"] == "2"
        return 1234.0
    shutil.copytree(case.options["folder"], out)


def fail(case, out, environment):
    raise ValueError("no way")
"""


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """In place of runs: writes a folder, and how many bytes rank 1 sent; or fails. Started processes import it."""
    (tmp_path / "pretended_runs.py").write_text(PRETENDED)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("pretended_runs")
    del sys.modules["pretended_runs"]


def test_processes_of_a_case_run_at_once_and_are_read(tmp_path, pretended):
    folder_of_a_run(tmp_path / "template", parameters=77)
    case = dataclasses.replace(CASE, options={"folder": str(tmp_path / "template")})
    with run.Workers(pretended.write) as workers:
        pair = workers.train(case.half(), 2)
        assert [(one.parameters, one.sent) for one in pair] == [(77, None)] * 2
        together = workers.train(case, 2, together=True)
        assert [(one.parameters, one.sent) for one in together] == [(77, 1234)]
        assert len(workers.train(case, 1)) == 1
    assert not multiprocessing.active_children()


def test_a_run_that_fails_is_told(pretended):
    with (
        pytest.raises(SystemExit, match="some, 2 processes: ValueError: no way"),
        run.Workers(pretended.fail) as workers,
    ):
        workers.train(CASE, 2)
    assert not multiprocessing.active_children()


def test_ranks_find_each_other_as_torchrun_has_it():
    first, second = run.environments(2)
    assert first.pop("RANK") == first.pop("LOCAL_RANK") == "0"
    assert second.pop("RANK") == second.pop("LOCAL_RANK") == "1"
    assert first == second
    assert {"RANK", "LOCAL_RANK", *first} == set(run.RANK_NAMES)


def test_medians_are_taken_over_runs():
    runs = [dataclasses.replace(PAIR, step=step, evaluation=10 * step) for step in (3.0, 1.0, 2.0)]
    assert run.in_the_middle(runs) == dataclasses.replace(PAIR, step=2.0, evaluation=20.0)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count the bytes of processes")
def test_written_bytes_grow_by_what_is_written(tmp_path):
    before = run.written_bytes()
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(b"x" * 1_000_003)
    assert 1_000_003 <= run.written_bytes() - before < 1_100_003


def test_half_a_case_has_half_the_images_and_half_the_batch():
    assert (CASE.half().images, CASE.half().batch) == (500, 50)


@pytest.mark.slow
def test_bare_messages_take_time():
    message, rate = run.measured_link(1 << 20)
    assert 0 < message < 1
    assert math.isfinite(rate)
    assert rate > 1e6


@pytest.mark.slow
def test_runs_of_one_rank_and_two_are_compared_here():
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "scaling.py"), "--run", "--quick", "--no-record"],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if re.search(r"bank +[\d.]+ us", line))
    sent, guess = (float(number) for number in re.findall(r"(\d+) MB", row))
    assert sent == pytest.approx(guess, rel=0.1)
