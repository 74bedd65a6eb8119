"""The studies of docs/results.md: which runs there are, what their rows say, and how the page is made of them."""

import dataclasses
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def loaded(name):
    if str(ROOT / "bench") not in sys.path:
        sys.path.insert(0, str(ROOT / "bench"))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


cases = loaded("results_cases")
tables = loaded("results_tables")
run = loaded("results_run")
results = loaded("results")

MACHINE = {
    "cpu": "Some CPU",
    "cores": 2,
    "memory_gib": 4.0,
    "sela_ext": "1",
    "isa": "avx2",
    "torch": "2",
    "python": "3",
}


def row(case, *, resolved=None, time="2026-01-01T00:00:00", **metrics):
    return {
        "key": case.key, "name": case.name, **case.identity(), "metrics": metrics, "resolved": resolved or {},
        "time": time, "machine": MACHINE, "commit": "abc", "threads": 1, "processor_seconds_in_all": 90.0,
    }  # fmt: skip


def by_name(study, data, name, seeds=(0, 1, 2)):
    return [case for case in cases.cases_of([study], [data], seeds) if case.name == name]


def keyed(*rows):
    return tables.newest(rows)


# ---------------------------------------------------------------- which runs


def test_every_option_of_every_run_is_an_option_of_the_trainer():
    from sela_ext.training import Options

    known = {spec.name for spec in dataclasses.fields(Options)}
    found = cases.cases_of(cases.STUDIES, list(cases.DATA), [0])
    assert {name for case in found for name in case.options} <= known
    assert {case.study for case in found} == set(cases.STUDIES)


def test_methods_of_a_data_set_share_network_and_epochs():
    for data in cases.DATA.values():
        trained = [case for case in cases.cases_of(["methods"], [data.name], [0]) if case.kind == "train"]
        assert {(case.options["model"], case.options["epochs"]) for case in trained} == {
            (data.model, data.epochs["methods"])
        }
        assert [case.name for case in trained] == list(cases.METHODS)


def test_studies_share_runs_that_are_the_same():
    sela = by_name("methods", "digits", "SeLa", [0])[0]
    assert sela.key == by_name("ablation", "digits", "the recipe: as it is", [0])[0].key
    assert sela.key == by_name("goals", "digits", "SeLa", [0])[0].key
    assert sela.key != by_name("methods", "digits", "SeLa", [1])[0].key
    listed = cases.once(cases.cases_of(["methods", "goals", "ablation"], ["digits"], [0]))
    assert len({case.key for case in listed}) == len(listed)


def test_a_seed_is_whole_before_the_next_and_the_gates_come_first():
    found = [case for case in cases.cases_of(["methods", "goals", "ablation"], None, [0, 1]) if case.rank[0] < 5]
    first = [case for case in found if case.study != "ablation"]
    assert found[: len(first)] == first
    assert [case.seed for case in first] == sorted(case.seed for case in first)
    trained = [case for case in first if case.kind == "train"]
    assert [case.data for case in trained[: len(cases.METHODS)]] == ["digits"] * len(cases.METHODS)


def test_teachers_run_before_what_they_teach():
    listed = cases.once(cases.cases_of(["transfer"], ["digits"], [0, 1]))
    place = {case.key: number for number, case in enumerate(listed)}
    taught = [case for case in listed if case.teacher is not None]
    assert len(taught) == 6
    assert all(place[case.teacher.key] < place[case.key] and case.teacher.seed == case.seed for case in taught)


def test_commands_can_be_typed(monkeypatch):
    import sela_ext.training
    from sela_ext.cli.program import run as run_command

    asked = {}
    monkeypatch.setattr(sela_ext.training, "train", lambda data, *, out, **options: asked.update(options))

    def text(value):
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    first = cases.cases_of(["methods"], ["cifar10"], [0])[:3]
    for case in [*cases.once(cases.cases_of(cases.STUDIES, ["digits"], [2])), *first]:
        words = shlex.split(cases.command(case))
        if case.kind != "train":
            assert words[:2] == ["sela", "evaluate"]
            continue
        asked.clear()
        assert run_command(words[1:]) == 0
        assert asked.pop("config") is None
        assert asked.pop("seed", 0) == case.seed
        asked.pop("eval_data", None)
        files = {cases.TRUE_LABELS: "classes.npy", cases.TEACHER: "runs/teacher"}
        wanted = {
            name: files.get(value, value) if name == "fixed_labels" else value for name, value in case.options.items()
        }
        assert {name: text(value) for name, value in asked.items()} == {k: text(v) for k, v in wanted.items()}
    one = by_name("ablation", "digits", "heads: 1 x 10 clusters", [0])[0]
    expected = "sela train --data digits --out runs/x --model small-resnet --epochs 160 --clusters 10 --heads 1"
    assert cases.command(one) == expected


def test_shares_of_the_epochs_become_numbers_of_label_passes():
    assert by_name("ablation", "digits", "label passes: 1 in ten epochs", [0])[0].options["label_passes"] == 16
    assert by_name("ablation", "cifar10", "label passes: 1 in ten epochs", [0])[0].options["label_passes"] == 1
    never = by_name("ablation", "digits", "label passes: 0, labels dealt at random", [0])[0]
    assert never.options["label_passes"] == 0


# ---------------------------------------------------------------- a run's row


def test_a_short_run_has_all_the_figures_of_the_tables(tmp_path):
    case = by_name("methods", "digits", "SeLa", [1])[0]
    case = dataclasses.replace(case, options={**case.options, "epochs": 1})
    found = run.run_case(case, tmp_path / "run")
    assert json.loads(json.dumps(found)) == found
    assert set(tables.HEADINGS) <= set(found["metrics"])
    assert all(0 <= found["metrics"][name] <= 1 for name in tables.HEADINGS)
    assert found["metrics"]["few_clusters"] == 10
    assert found["metrics"]["many_clusters"] == 128
    assert len(found["metrics"]["few_nmi_of_heads"]) == 8
    assert found["images_seen"] == 1437
    assert found["seed"] == 1
    assert found["resolved"]["epochs"] == 1
    assert "threads" not in found["resolved"]
    assert sum(found["class_sizes"]) == sum(found["cluster_sizes"]) == 1437
    assert 0 <= found["label_share"] <= 1
    assert 0 <= found["data_share"] <= 1
    end = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    few = [head for head in end["heads"] if head["clusters"] == 10]
    chosen = min(few, key=lambda head: head["cross_entropy"])
    assert found["metrics"]["few_nmi"] == chosen["nmi"]
    assert found["metrics"]["knn"] == end["knn"]


def test_pixels_and_random_networks_are_judged_alike():
    case = by_name("methods", "digits", "pixels", [0])[0]
    found = run.in_this_process(case, 1)
    assert found["metrics"]["knn"] == pytest.approx(0.981, abs=0.002)
    assert found["metrics"]["features_nmi"] == pytest.approx(0.73, abs=0.04)
    other = run.in_this_process(by_name("methods", "digits", "random network", [0])[0], 1)
    assert set(other["metrics"]) == set(found["metrics"])
    assert other["metrics"]["features_nmi"] < found["metrics"]["features_nmi"]


def test_what_the_package_lacks_is_said(tmp_path, monkeypatch):
    import sela_ext
    from sela_ext.errors import OptionError

    def refuse(*_, **__):
        raise OptionError("method: 'deepcluster' is not available in this version; leave it out")

    monkeypatch.setattr(sela_ext, "train", refuse)
    case = by_name("methods", "digits", "DeepCluster", [0])[0]
    with pytest.raises(run.NotAvailableError, match="deepcluster"):
        run.run_case(case, tmp_path / "run")


def test_other_mistakes_are_not_taken_for_absence(tmp_path):
    from sela_ext.errors import OptionError

    case = by_name("methods", "digits", "SeLa", [0])[0]
    case = dataclasses.replace(case, options={**case.options, "epochs": 0})
    with pytest.raises(OptionError, match="epochs"):
        run.run_case(case, tmp_path / "run")


def test_the_head_of_lowest_cross_entropy_is_taken_among_those_of_its_size():
    heads = [
        {"head": 0, "clusters": 128, "cross_entropy": 1.0, "nmi": 0.5, "ari": 0.1, "accuracy": 0.1, "purity": 0.7},
        {"head": 1, "clusters": 10, "cross_entropy": 0.4, "nmi": 0.6, "ari": 0.5, "accuracy": 0.7, "purity": 0.7},
        {"head": 2, "clusters": 10, "cross_entropy": 0.3, "nmi": 0.55, "ari": 0.4, "accuracy": 0.6, "purity": 0.6},
    ]
    found = run._of_heads("few", heads[1:])
    assert (found["few_nmi"], found["few_head"], found["few_nmi_of_heads"]) == (0.55, 2, [0.6, 0.55])
    assert run._of_heads("many", []) == {}


# ---------------------------------------------------------------- the driver


def options(*words):
    return results.parser().parse_args(list(words))


def no_process(monkeypatch, row_of):
    """Runs that are over as soon as they start: `row_of(case)` is their row, or their exit status."""

    class Over:
        def __init__(self, status):
            self.returncode = status

        def poll(self):
            return self.returncode

        terminate = wait = poll

    order = []

    def start(self, case):
        order.append(case)
        folder = self.folder / case.key
        folder.mkdir()
        (folder / "labels.npz").write_bytes(b"labels")
        given, log, path = row_of(case), self.folder / f"{case.key}.log", self.folder / f"{case.key}.json"
        log.write_text("first\nthe reason\n")
        if not isinstance(given, int):
            path.write_text(json.dumps(given))
        self.under_way.append(results.Started(case, Over(given if isinstance(given, int) else 0), folder, path, log))

    monkeypatch.setattr(results.Runs, "start", start)
    monkeypatch.setattr(results, "write", lambda check: 0)
    return order


def test_runs_are_recorded_once_and_their_files_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results.common, "RESULTS", tmp_path / "results")
    order = no_process(monkeypatch, lambda case: row(case, knn=0.5))
    todo = cases.once(cases.cases_of(["methods"], ["digits"], [0]))
    folder = tmp_path / "runs"
    folder.mkdir()
    assert results.Runs(todo[:3], results.done_before(False), folder, options()).work() == 0
    assert results.Runs(todo, results.done_before(False), folder, options()).work() == 0
    assert [case.key for case in order] == [case.key for case in todo]
    assert {one["key"] for one in tables.read_rows(results.rows_path())} == {case.key for case in todo}
    assert list(folder.iterdir()) == []
    assert "kNN 0.500" in capsys.readouterr().out


def test_a_teacher_whose_labels_are_gone_is_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(results.common, "RESULTS", tmp_path / "results")
    order = no_process(monkeypatch, lambda case: row(case, knn=0.5))
    todo = cases.once(by_name("transfer", "digits", "small-convnet, the teacher's labels", [0]))
    teacher = todo[0]
    assert results.Runs(todo, {teacher.key}, tmp_path, options()).work() == 0
    assert [case.key for case in order] == [teacher.key, todo[1].key]
    order.clear()
    more = cases.once(by_name("transfer", "digits", "small-resnet, the teacher's labels", [0]))
    assert results.Runs(more, {teacher.key}, tmp_path, options()).work() == 0
    assert [case.key for case in order] == [more[1].key]


def test_a_page_that_cannot_be_written_stops_no_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results.common, "RESULTS", tmp_path / "results")
    no_process(monkeypatch, lambda case: row(case, knn=0.5))

    def broken(check):
        raise ValueError("a marker is missing")

    monkeypatch.setattr(results, "write", broken)
    assert results.Runs(by_name("methods", "digits", "SeLa"), set(), tmp_path, options()).work() == 0
    assert len(tables.read_rows(results.rows_path())) == 3
    assert "not written: a marker is missing" in capsys.readouterr().out


def test_what_is_not_available_is_tried_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results.common, "RESULTS", tmp_path)
    order = no_process(monkeypatch, lambda case: 3 if case.name == "SeLa-v2" else row(case, knn=0.5))
    todo = [case for case in cases.cases_of(["methods"], ["digits"]) if case.name in ("SeLa-v2", "SeLa")]
    assert results.Runs(todo, set(), tmp_path, options()).work() == 0
    assert sorted(case.title for case in order if case.name == "SeLa-v2") == ["SeLa-v2, digits, seed 0"]
    assert len(order) == 4
    assert "skipped; the reason" in capsys.readouterr().out


def test_a_failure_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results.common, "RESULTS", tmp_path)
    no_process(monkeypatch, lambda case: 1 if case.seed == 0 else row(case, knn=0.5))
    assert results.Runs(by_name("methods", "digits", "SeLa"), set(), tmp_path, options("--jobs", "2")).work() == 1
    assert len(tables.read_rows(results.rows_path())) == 2
    assert "failed; the reason" in capsys.readouterr().out


def test_nothing_starts_when_the_time_is_over(tmp_path, monkeypatch, capsys):
    order = no_process(monkeypatch, lambda case: row(case))
    runs = results.Runs(by_name("methods", "digits", "SeLa"), set(), tmp_path, options("--minutes", "0"))
    assert runs.work() == 0
    assert order == []
    assert "3 runs are left" in capsys.readouterr().out


def test_rows_of_other_commits_count_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(results.common, "RESULTS", tmp_path)
    case = by_name("methods", "digits", "SeLa", [0])[0]
    results.common.record("learning", [row(case)], MACHINE)
    assert results.done_before(again=False) == {case.key}
    monkeypatch.setattr(run, "commit", lambda: "def")
    assert results.done_before(again=True) == set()


def test_data_that_are_not_there_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SELA_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("SELA_FASHION_MNIST", str(tmp_path))
    found = results.chosen(options("--studies", "methods", "--seeds", "0"))
    assert {case.data for case in found} == {"digits"}
    said = capsys.readouterr().out
    assert "CIFAR-10 JPEG: not there" in said
    assert "Fashion-MNIST: not there" in said


def test_the_list_says_what_is_there_and_what_is_left(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(results.common, "RESULTS", tmp_path)
    case = by_name("methods", "digits", "SeLa", [0])[0]
    results.common.record("learning", [row(case)], MACHINE)
    assert results.main(["--list", "--studies", "methods", "--data", "digits", "--seeds", "0"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"there +methods +SeLa, digits, seed 0", said)
    expected = by_name("methods", "digits", "k-means in the loop", [0])[0].core_minutes()
    took = 1.5 / case.core_minutes()  # the row says 90 s
    assert re.search(rf"{expected * took:.1f} min +methods +k-means in the loop", said)
    assert "processor minutes left, roughly: methods" in said


# ---------------------------------------------------------------- the page


def test_the_page_is_up_to_date():
    assert results.main(["--check"]) == 0


def test_a_page_out_of_date_is_told_and_mended(tmp_path, monkeypatch, capsys):
    text = results.DOCUMENT.read_text()
    page = tmp_path / "results.md"
    page.write_text(text.replace("<!-- goals:end -->", "| stray |\n<!-- goals:end -->"))
    monkeypatch.setattr(results, "DOCUMENT", page)
    assert results.main(["--check"]) == 1
    assert "run python bench/results.py --write" in capsys.readouterr().out
    assert results.main(["--write"]) == 0
    assert results.main(["--check"]) == 0
    assert "stray" not in page.read_text()


def test_a_marker_that_is_missing_is_told():
    with pytest.raises(ValueError, match="expected each of short, machines, goals"):
        tables.filled("<!-- goals:begin -->\n<!-- goals:end -->\n", {})


def test_means_and_deviations_are_over_seeds():
    rows = [
        row(case, knn=value) for case, value in zip(by_name("methods", "digits", "SeLa"), (0.8, 0.9, 1.0), strict=True)
    ]
    assert tables.spread(
        tables.values(tables.rows_of(by_name("methods", "digits", "SeLa")[0], keyed(*rows)), "knn")
    ) == (".900 ± .100")
    assert tables.spread([0.5]) == ".500"
    assert tables.spread([]) == "-"
    assert tables.three(1.0) == "1.000"
    assert tables.three(-0.25) == "-.250"


def test_no_mean_is_taken_over_two_recipes():
    old, new = by_name("methods", "digits", "SeLa", [0, 1])
    rows = keyed(row(old, knn=0.1, resolved={"lr": 0.1}), row(new, knn=0.9, resolved={"lr": 0.2}, time="2026-02-01"))
    assert tables.values(tables.rows_of(old, rows), "knn") == [0.9]


def test_the_newest_row_of_a_run_counts():
    case = by_name("methods", "digits", "SeLa", [0])[0]
    assert keyed(row(case, knn=0.1), row(case, knn=0.2))[case.key]["metrics"]["knn"] == 0.2


def test_methods_without_rows_are_named_and_given_labels_not_praised():
    sela, taught = (by_name("methods", "digits", name, [0])[0] for name in ("SeLa", "supervised network"))
    page = tables.methods(
        keyed(row(sela, knn=0.9, few_nmi=0.8), row(taught, knn=0.95, few_nmi=1.0, test_accuracy=0.97))
    )
    assert "| SeLa | .900 | - | .800 |" in page
    assert "| supervised network | .950 | - | - |" in page
    assert "names .970 of the test images rightly" in page
    assert "Not measured yet: k-means in the loop, DeepCluster, SeLa-v2." in page


def test_another_number_of_clusters_is_told_and_not_compared():
    sela, other = (by_name("methods", "digits", name, [0])[0] for name in ("SeLa", "DeepCluster"))
    rows = keyed(row(sela, many_nmi=0.5, many_clusters=128), row(other, many_nmi=0.6, many_clusters=100))
    assert ".600 (K = 100)" in tables.methods(rows)
    assert tables.behind(rows) == tables.NOTHING


def test_where_another_method_is_better_the_page_says_so():
    ours, theirs = by_name("methods", "digits", "SeLa"), by_name("methods", "digits", "DeepCluster")
    rows = [row(case, knn=value, linear=0.9) for case, value in zip(ours, (0.80, 0.81, 0.82), strict=True)]
    rows += [row(case, knn=value, linear=0.8) for case, value in zip(theirs, (0.90, 0.91, 0.92), strict=True)]
    said = tables.behind(keyed(*rows))
    assert said.startswith("In 1 of 2 comparisons")
    assert "digits, kNN: DeepCluster .910, SeLa .810; the difference of .100 is more than twice" in said
    assert "linear" not in said
    close = [
        dict(one, metrics={**one["metrics"], "knn": value})
        for one, value in zip(rows[3:], (0.79, 0.81, 0.84), strict=True)
    ]
    assert "is less than twice its standard error" in tables.behind(keyed(*rows[:3], *close))
    assert tables.behind(keyed(*rows[:3])) == tables.NOTHING


def test_goals_are_judged_by_the_median_and_the_worst_seed():
    found = by_name("goals", "digits", "SeLa")
    rows = [
        {**row(case, few_nmi=value, knn=0.985), "label_share": share, "data_share": 0.01}
        for case, value, share in zip(found, (0.70, 0.91, 0.95), (0.01, 0.04, 0.06), strict=True)
    ]
    lines = {line.split(" | ")[0][2:]: line for line in tables.goal_table(keyed(*rows)).splitlines()}
    assert "| .820 | .900 | .910 | stretch | .700 .910 .950 |" in lines["digits: NMI"]
    assert "| .740 | - | .700 | not met |" in lines["digits: NMI, worst seed"]
    assert "| .980 | .990 | .985 | gate |" in lines["digits: kNN"]
    assert "| 5 | 1 | 6 | not met | 1 4 6 |" in lines["digits: share of the training time for labels, %"]
    assert "| 4 | 2 | 1 | stretch |" in lines["digits: share of the training time for images, %"]
    assert "not measured yet" in lines["CIFAR-10 JPEG: kNN"]


def test_the_lead_over_k_means_is_a_difference_of_medians():
    rows = [row(case, knn=0.85, few_nmi=0.5) for case in by_name("methods", "fashion-mnist", "SeLa")]
    rows += [row(case, knn=0.81, few_nmi=0.52) for case in by_name("methods", "fashion-mnist", "k-means in the loop")]
    text = tables.goal_table(keyed(*rows))
    assert "| Fashion-MNIST: kNN above k-means in the loop | .030 | - | .040 | gate | .850 against .810 |" in text
    assert "| Fashion-MNIST: NMI above k-means in the loop | - | .030 | -.020 | stretch not met |" in text


def test_other_studies_show_their_commands_and_sizes():
    changed = by_name("ablation", "digits", "label source: eval", [0])[0]
    assert (
        "`sela train --data digits --out runs/x --model small-resnet --epochs 160 --label-source eval`"
        in tables.ablation(keyed(row(changed, knn=0.9)))
    )
    subset = by_name("imbalance", "digits", "heavy: SeLa, equal sizes", [0])[0]
    sized = {**row(subset, knn=0.9), "class_sizes": [20, 140], "cluster_sizes": [79, 81]}
    assert "| heavy: SeLa, equal sizes | .900 |" in tables.imbalance(keyed(sized))
    assert "| 20 to 140 | 79 to 81 |" in tables.imbalance(keyed(sized))
    taught = by_name("transfer", "digits", "small-convnet, the teacher's labels", [0])[0]
    assert "--fixed-labels runs/teacher" in tables.transfer(keyed(row(taught, knn=0.9)))


def test_the_page_begins_with_what_the_tables_say():
    sela, pixels = (by_name("methods", "digits", name, [0])[0] for name in ("SeLa", "pixels"))
    rows = keyed(row(sela, knn=0.9, few_nmi=0.8, few_accuracy=0.85), row(pixels, knn=0.7))
    assert tables.short(rows) == (
        "* **digits**: SeLa's features name .900 of the test images rightly by kNN (pixels .700). Its 10 clusters "
        "against the classes: NMI .800; accuracy .850."
    )
    assert tables.short({}) == tables.NOTHING


def test_the_machine_and_the_commit_of_the_rows_are_on_the_page():
    case = by_name("methods", "digits", "SeLa", [0])[0]
    assert tables.machines(keyed(row(case))) == (
        "* Some CPU, 2 cores, 4.0 GiB; sela_ext 1 (avx2), torch 2, Python 3; one thread a run: 1 runs, 2026-01-01, "
        "commit abc."
    )


@pytest.mark.slow
def test_the_quick_form_goes_through_every_method(capsys):
    assert results.main(["--quick"]) == 0
    said = capsys.readouterr().out
    for name in ("pixels", "random network", "SeLa"):
        assert re.search(rf"^ +{name} ", said, re.MULTILINE)
