import json
import math
import warnings

import pytest

import sela_ext
from sela_ext.training.symptoms import SYMPTOMS, Facts, History, Symptoms

LN10 = math.log(10)
FACTS = Facts(images=1000, clusters=(10, 10), lr=0.2, processors=2, threads=2)
ONE_HEAD = Facts(images=1000, clusters=(10,), lr=0.2, processors=2, threads=2)


def step(epoch, loss=1.0, **more):
    return {"event": "step", "step": int(epoch * 6), "epoch": epoch, "loss": loss, "ln_k": LN10, **more}


def head(number=0, **more):
    found = {
        "head": number, "clusters": 10, "changed": 0.1, "cross_entropy": 1.0, "ln_k": LN10, "size_min": 95,
        "size_max": 105, "error": 1e-5, "converged": True, "nmi_previous": 0.8,
    }  # fmt: skip
    return {**found, **more}


def label_pass(epoch, heads=None, **more):
    heads = [head(0), head(1, nmi_other=0.7)] if heads is None else heads
    return {
        "event": "label_pass",
        "step": int(epoch * 6),
        "epoch": epoch,
        "masked": 0,
        "spread": 0.3,
        "heads": heads,
        **more,
    }


def found(events, facts=None, epochs=20):
    heads = max((len(event.get("heads", ())) for event in events), default=0)
    symptoms = Symptoms(facts or (ONE_HEAD if heads == 1 else FACTS))
    for event in events:
        symptoms.look(event, event["epoch"] / epochs)
    return symptoms.found


def course(epochs=20, loss=lambda e: LN10 * (0.15 + 0.8 * math.exp(-e / 3)), passes=label_pass):
    """A run with a label pass before, and a log entry after, each epoch."""
    return [event for e in range(epochs) for event in (passes(float(e)), step(e + 1.0, loss(e + 1.0)))]


def test_a_run_that_learns_has_no_symptom():
    assert found(course()) == {}


def test_no_event_at_all_is_no_symptom():
    assert all(symptom.find(History(FACTS)) is None for symptom in SYMPTOMS)


def test_events_without_any_numbers_are_no_symptom():
    bare = [{"event": kind, "epoch": 1.0, "step": 1} for kind in ("step", "label_pass", "evaluation", "end")] * 10
    nulls = [{**step(1.0), "loss": None, "ln_k": None}] * 9
    assert found(bare + nulls) == {}


ODD = (None, math.nan, math.inf, -math.inf, "x", True, [], {}, -1, 0)


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_events_that_something_damaged_are_looked_at_without_an_error(odd):
    names = {*label_pass(1.0), *step(1.0), "data_wait_share", "interval_seconds", "heads"} - {"event"}
    damaged = [{**event, name: odd} for event in (step(3.0), label_pass(3.0)) for name in names]
    damaged += [label_pass(3.0, [{**head(1), name: odd}]) for name in [*head(), "nmi_other"]]
    damaged += [label_pass(3.0, [odd, head(1)])]
    damaged += [{key: value for key, value in label_pass(3.0).items() if key != name} for name in names]
    damaged += [label_pass(3.0, [{k: v for k, v in head(1, size_max=990).items() if k != name}]) for name in head()]
    symptoms = Symptoms(FACTS)
    for number, event in enumerate(damaged * 3):
        symptoms.look(event, number / 3 / len(damaged))


CASES = {
    "collapsed_clusters": (
        [label_pass(1.0, [head(0), head(1, size_max=900)])],
        [label_pass(1.0, [head(0), head(1, size_max=490)])],
        "head 1 has 90% of the images in one of 10 clusters",
    ),
    "collapsed_features": (
        [step(1.0), label_pass(1.0, spread=1e-5)],
        [label_pass(0.0, spread=1e-5), step(1.0), label_pass(1.0, spread=0.004)],  # before the first step, and little
        "nearly the same features",
    ),
    "identical_heads": (
        [step(1.0), *[label_pass(e, [head(0), head(1, nmi_other=0.999)]) for e in (1.0, 2.0)]],
        [step(1.0), *[label_pass(e, [head(0), head(1, nmi_other=0.999, cross_entropy=0.1)]) for e in (15.0, 16.0)]],
        "heads identical",
    ),
    "frozen_labels": (
        course(6, lambda e: 2.0, lambda e: label_pass(e, [head(0, changed=0.0005, cross_entropy=2.0)])),
        course(20, passes=lambda e: label_pass(e, [head(0, changed=0.001 if e > 11 else 0.1, cross_entropy=0.2)])),
        "changed 0.05% of the labels",
    ),
    "jumping_labels": (
        course(20, lambda e: 2.0, lambda e: label_pass(e, [head(0, changed=0.9)])),
        course(20, passes=lambda e: label_pass(e, [head(0, changed=0.9 if e < 10 else 0.4)])),
        "still changed 90% of the labels",
    ),
    "memorised": (
        course(6, passes=lambda e: label_pass(e, [head(0, cross_entropy=0.1 if e >= 4 else 2.0)])),
        course(20, passes=lambda e: label_pass(e, [head(0, cross_entropy=0.1 if e >= 12 else 1.0)])),
        "augmentation too weak",
    ),
    "masked_rows": (
        [label_pass(1.0, masked=3)],
        [label_pass(1.0, masked=0)],
        "masked rows: 3 images",
    ),
    "unconverged_solver": (
        [label_pass(e, [head(0, converged=False, error=0.02)]) for e in (0.0, 1.0, 2.0)],
        [label_pass(e, [head(0, converged=e > 1, error=0.02)]) for e in (0.0, 1.0, 2.0, 3.0, 4.0)],
        "in 3 of 3 label passes the solver stopped at an error of up to 2.0e-02",
    ),
    "learning_rate": (
        [step(2.0, 1.9 * LN10), step(3.0, 1.7 * LN10)],
        [step(1.0, 1.8 * LN10), step(2.0, 1.6 * LN10), step(3.0, 1.1 * LN10), step(4.0, 0.9 * LN10)],
        "learning rate too high: the loss is 1.70 times that of guessing",
    ),
    "waiting_for_images": (
        [step(e / 2, data_wait_share=0.5, interval_seconds=10.0) for e in range(1, 8)],
        [step(e / 2, data_wait_share=0.5, interval_seconds=0.1) for e in range(1, 30)],
        "steps spend 50% of their time waiting",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_symptom_is_told_where_it_shows(name):
    events, _, words = CASES[name]
    assert words in found(events)[name]


@pytest.mark.parametrize("name", CASES)
def test_a_symptom_is_not_told_where_something_similar_is_well(name):
    _, events, _ = CASES[name]
    assert name not in found(events)


def test_too_many_clusters_for_the_images():
    events = [label_pass(0.0), step(1.0)]
    told = found(events, Facts(images=1437, clusters=(10, 800)))
    assert "800 clusters for 1,437 images are 1.8 images each" in told["too_many_clusters"]
    assert "clusters=57 or fewer" in told["too_many_clusters"]
    assert found(events, Facts(images=5, clusters=(2,)))["too_many_clusters"].endswith("by heart; use more images")
    assert "too_many_clusters" not in found(events, Facts(images=1437, clusters=(128, 10)))
    assert "too_many_clusters" not in found(events, Facts(images=1_281_167, clusters=(3000,) * 10))


def test_every_symptom_has_a_case():
    assert {symptom.name for symptom in SYMPTOMS} == {*CASES, "too_many_clusters"}


def test_clusters_that_are_meant_to_be_large_have_not_collapsed():
    events = [label_pass(1.0, [head(0, size_max=700)])]
    assert "collapsed_clusters" not in found(events, Facts(images=1000, clusters=(10,), largest_share=0.7))
    assert "collapsed_clusters" in found(events)
    two = [label_pass(1.0, [head(0, clusters=2, size_max=700)])]
    assert "collapsed_clusters" not in found(two, Facts(images=1000, clusters=(2,)))


def test_a_loss_that_does_not_leave_the_level_of_guessing():
    flat = course(20, lambda e: 0.99 * LN10)
    assert "nothing learnt: after 5 epochs" in found(flat)["learning_rate"]
    assert "lower lr" in found(flat)["learning_rate"]
    assert "random deal" in found(flat, Facts(images=1000, clusters=(10,), passes=0))["learning_rate"]
    assert "learning_rate" not in found(flat, epochs=400)  # only a twentieth of the run is done
    slow = course(20, lambda e: LN10 * (1.0 - 0.01 * e))
    assert "learning_rate" not in found(slow)


def test_a_loss_that_jumps_late_is_told_and_one_that_a_label_pass_raises_is_not():
    low = [step(e + 1.0, 0.4 * LN10) for e in range(12)]
    assert "jumped from 0.40 to 1.20" in found([*low, step(13.0, 1.2 * LN10)])["learning_rate"]
    assert "learning_rate" not in found([*low, step(13.0, 0.7 * LN10)])


def test_labels_that_change_less_and_less_in_a_short_run_do_not_jump():
    events = course(12, passes=lambda e: label_pass(e, [head(0, changed=0.95 - 0.035 * e)]))
    assert "jumping_labels" not in found(events, epochs=12)
    events = course(12, passes=lambda e: label_pass(e, [head(0, changed=0.95 - 0.01 * e)]))
    assert "jumping_labels" in found(events, epochs=12)


def test_methods_that_number_their_clusters_anew_do_not_jump():
    events, _, _ = CASES["jumping_labels"]
    assert "jumping_labels" not in found(events, Facts(images=1000, clusters=(10,), balanced=False))


def test_heads_that_take_turns_are_judged_over_as_many_passes():
    def one(e):
        return label_pass(e, [head(int(e) % 2, changed=0.0005, cross_entropy=2.0)])

    five = [step(1.0), *[one(1.0 + e) for e in range(5)]]
    ten = [step(1.0), *[one(1.0 + e / 2) for e in range(10)]]
    assert "frozen_labels" not in found(five, FACTS)
    assert "frozen_labels" in found(ten, FACTS)


@pytest.mark.parametrize(
    ("facts", "remedy"),
    [
        ({"threads": 1, "processors": 8}, "raise threads (now 1; this process may use 8)"),
        ({"encoded": True, "index": "off"}, "index=run"),
        ({"encoded": True}, "sela pack"),
        ({}, "folder, an array or a packed set"),
    ],
)
def test_the_remedy_for_waiting_depends_on_what_is_read(facts, remedy):
    events, _, _ = CASES["waiting_for_images"]
    assert remedy in found(events, Facts(images=1000, clusters=(10,), **facts))["waiting_for_images"]


def test_each_symptom_is_said_once_and_kept():
    symptoms = Symptoms(FACTS)
    said = [message for e in range(9) for message in symptoms.look(label_pass(float(e), masked=2), e / 20)]
    assert len(said) == 1
    assert symptoms.messages(of_the_clock=False) == said
    assert symptoms.messages(of_the_clock=True) == []


def test_only_the_speed_of_the_loader_is_a_matter_of_the_clock():
    assert [symptom.name for symptom in SYMPTOMS if symptom.of_the_clock] == ["waiting_for_images"]
    symptoms = Symptoms(FACTS)
    for event in CASES["waiting_for_images"][0]:
        symptoms.look(event, 0.1)
    assert len(symptoms.messages(of_the_clock=True)) == 1
    assert symptoms.messages(of_the_clock=False) == []


@pytest.mark.parametrize("name", CASES)
def test_messages_are_one_line_with_a_remedy(name):
    events, _, _ = CASES[name]
    message = found(events)[name]
    assert "\n" not in message
    assert ";" in message


def warnings_of(out):
    *_, end = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return end["warnings"]


def test_a_healthy_run_on_digits_has_no_symptom(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = sela_ext.train("digits", out=tmp_path / "run", epochs=12, threads=1, progress=False)
    assert warnings_of(result.out) == []
    assert "warning" not in (result.out / "train.log").read_text()


def test_a_learning_rate_far_too_high_on_digits_is_told(tmp_path):
    options = {"epochs": 5, "lr": 100.0, "head_kind": "linear", "init": "predictions", "threads": 1}
    result = sela_ext.train("digits", out=tmp_path / "run", progress=False, **options)
    assert "learning rate too high" in " ".join(warnings_of(result.out))
