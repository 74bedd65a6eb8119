"""Rows spread over ranks: the bits of one process for any number of ranks, and errors that reach everybody."""

import contextlib
import itertools
import os
import pickle
import queue
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext.assign import UnbalancedLabelsWarning
from sela_ext.errors import OptionError

SECONDS = 100  # for any answer of a rank; torch alone takes some to load on a busy machine


class Pool:
    """Processes that are the ranks of a gloo group, of which the first few can work as smaller groups."""

    def __init__(self, ranks, folder):
        meeting = folder / "meeting"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        script = Path(__file__).with_name("group_rank.py")
        self.ranks = ranks
        self.answers = queue.Queue()
        self.workers = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(ranks), str(meeting)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                cwd=folder,
            )
            for rank in range(ranks)
        ]
        for rank in range(ranks):
            threading.Thread(target=self._listen, args=(rank,), daemon=True).start()

    def _listen(self, rank):
        while True:
            try:
                self.answers.put((rank, pickle.load(self.workers[rank].stdout)))
            except Exception:
                self.answers.put((rank, {"error": "Gone", "message": "the process ended"}))
                return

    def run(self, jobs):
        """Give ranks 0, 1, ... a job each; their answers, in the order of the ranks."""
        for worker, job in zip(self.workers, jobs, strict=False):
            pickle.dump({"ranks": len(jobs), **job}, worker.stdin)
            worker.stdin.flush()
        found = {}
        while len(found) < len(jobs):
            try:
                rank, answer = self.answers.get(timeout=SECONDS)
            except queue.Empty:
                pytest.fail(f"no answer within {SECONDS} s from ranks {sorted(set(range(len(jobs))) - set(found))}")
            found[rank] = answer
        return [found[rank] for rank in range(len(jobs))]

    def close(self):
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.stdin.close()
        for worker in self.workers:
            try:
                worker.wait(timeout=10)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            worker.stdout.close()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    started = Pool(3, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def smooth_logits(rows, cols, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(dtype)


def peaked_logits(rows, cols, seed=0, classes=40, dtype=np.float32):
    """Rows of a class share their favourite clusters; spans of hundreds of nats; sorted by class."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, 24))
    features = centres[np.sort(rng.integers(classes, size=rows))] + 0.5 * rng.standard_normal((rows, 24))
    weight = rng.standard_normal((24, cols)) / np.sqrt(24)
    return (3.0 * (features @ weight + 0.3 * rng.standard_normal(cols))).astype(dtype)


def even(rows, ranks):
    return [sela_ext.shard_rows(rows, ranks, rank) for rank in range(ranks)]


def cut(*ends):
    return [slice(start, stop) for start, stop in itertools.pairwise((0, *ends))]


def jobs(logits, shards, options, **other):
    """One job per shard; row weights are cut like the logits."""
    weights = options.get("row_weights")
    return [
        {
            "logits": logits[part],
            "options": {**options, **({} if weights is None else {"row_weights": weights[part]})},
            **other,
        }
        for part in shards
    ]


def alone(logits, options, kind=None):
    if kind is not None:
        logits = torch.from_numpy(logits).to(getattr(torch, kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnbalancedLabelsWarning)
        return sela_ext.assign(logits, threads=2, **options)


def without_seconds(history):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


def check_bits(answers, one):
    """All ranks' answers are, bit for bit, what one process found."""
    for answer in answers:
        assert "error" not in answer, answer["trace"]
        assert {category for category, *_ in answer["warnings"]} <= {"UnbalancedLabelsWarning"}, answer["warnings"]
    found = [answer["result"] for answer in answers]
    labels = np.concatenate([fields["labels"] for fields in found])
    np.testing.assert_array_equal(labels, np.asarray(one.labels), strict=True)
    for fields in found:
        for name in ("potential", "sizes", "prices"):
            value = getattr(one, name)
            if value is None:
                assert fields[name] is None
            else:
                assert fields[name].tobytes() == np.asarray(value).tobytes(), name
        for name in ("error", "objective", "passes", "converged", "masked", "ties", "method", "reason", "lam", "gap"):
            assert fields[name] == getattr(one, name), name
        assert fields["backend"] == one.backend
        assert without_seconds(fields["history"]) == without_seconds(one.history)


def spoiled(logits):
    logits = logits.copy()
    logits[[3, 140, 700], [0, 2, 5]] = np.nan, np.inf, np.nan
    logits[500] = -np.inf
    logits[600, :4] = -np.inf
    return logits


def dead_column(logits):
    logits = logits.copy()
    logits[:, 5] = -np.inf
    logits[:, 7] -= 40  # the sums of a pass leave it out
    return logits


RNG = np.random.default_rng(5)
CASES = {
    "smooth": (smooth_logits(1001, 33), {"tol": 1e-6, "method": "anderson"}),
    "plain iterations": (smooth_logits(1001, 33), {"tol": 1e-3, "method": "sinkhorn"}),
    "auto": (smooth_logits(1001, 33, seed=1), {}),
    "peaked, sorted by class": (peaked_logits(3001, 60), {"tol": 1e-6, "method": "newton"}),
    "peaked, auto, sampled stages": (peaked_logits(17_000, 40), {"tol": 1e-5}),
    "float64": (peaked_logits(1500, 31, dtype=np.float64), {"tol": 1e-9}),
    "float16": (smooth_logits(1501, 64, seed=2, dtype=np.float16), {"tol": 1e-5}),
    "row weights": (
        peaked_logits(1501, 31, seed=3),
        {"tol": 1e-5, "row_weights": RNG.choice([0, 0.5, 1, 3.25], 1501, p=[0.1, 0.3, 0.4, 0.2])},
    ),
    "weights in one shard only": (
        smooth_logits(1001, 9, seed=3),
        {"row_weights": np.where(np.arange(1001) < 128, 1 + np.arange(1001) / 7, 0)},
    ),
    "heavy rows in one shard": (
        smooth_logits(1001, 9, seed=3),
        {"row_weights": np.where(np.arange(1001) < 300, 1000 / 3, 0.01 + np.arange(1001) / 1e4)},
    ),
    "marginals": (peaked_logits(1501, 31, seed=4), {"tol": 1e-5, "marginals": np.arange(1.0, 32.0)}),
    "masked rows": (spoiled(smooth_logits(1001, 9, seed=5)), {"tol": 1e-5}),
    "faint and impossible columns": (dead_column(smooth_logits(1500, 12, seed=6)), {"tol": 1e-5}),
    "faint columns in sampled stages": (
        peaked_logits(17_000, 40, seed=6) - np.where(np.arange(40) == 7, np.float32(60), 0).astype(np.float32),
        {"tol": 1e-5},
    ),
    "relaxed": (smooth_logits(1500, 17, seed=7), {"relax": 0.2, "tol": 1e-6}),
    "bounded": (peaked_logits(1500, 17, seed=8), {"size_bounds": (60, 110), "tol": 1e-5}),
    "exact sizes": (smooth_logits(3001, 201, seed=9), {"balance": "exact", "tol": 1e-2}),
    "exact sizes, equal rows": (np.zeros((3001, 201), np.float32), {"balance": "exact"}),
    "exact sizes, weights, masked": (
        spoiled(smooth_logits(1001, 9, seed=10)),
        {"balance": "exact", "row_weights": RNG.choice([0, 1.0], 1001)},
    ),
    "a 16-bit copy": (peaked_logits(3001, 60, seed=20), {"tol": 1e-3, "storage": "fixed16"}),
    "exact sizes, far from balance": (
        smooth_logits(6001, 101, seed=21) @ np.diag(1 + np.arange(101) / 20).astype(np.float32),
        {"balance": "exact", "tol": 0.3},
    ),
    "exact sizes, far from balance, heavy rows": (
        smooth_logits(6001, 6, seed=1) @ smooth_logits(6, 101, seed=2) / np.float32(4),
        {"balance": "exact", "tol": 0.3, "row_weights": np.where(np.arange(6001) % 5, 1.0, 7.0)},
    ),
    "an empty cluster": (smooth_logits(1501, 31, seed=22), {"marginals": np.arange(31)}),
    "bounded, sampled": (
        peaked_logits(17_000, 40, seed=23),
        {"size_bounds": (300, 500), "tol": 1e-5, "max_passes": 30},
    ),
    "relaxed, sampled, weights": (
        peaked_logits(17_000, 40, seed=24),
        {"relax": 1.0, "tol": 1e-5, "max_passes": 30, "row_weights": np.arange(17_000) % 7 / 3},
    ),
    "bounded, sampled, weights": (
        peaked_logits(17_000, 40, seed=24),
        {"size_bounds": (300, 500), "tol": 1e-5, "max_passes": 30, "row_weights": 0.5 + np.arange(17_000) % 7 / 6},
    ),
    "ties": (np.zeros((1001, 7), np.float32), {}),
    "one block": (smooth_logits(100, 5, seed=11), {"tol": 1e-5}),
    "one row": (smooth_logits(1, 5, seed=12), {}),
    "one column": (smooth_logits(300, 1, seed=12), {}),
    "no time to converge": (peaked_logits(1500, 31, seed=13), {"tol": 0.0, "max_passes": 5}),
}


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_ranks_gives_the_bits_of_one_process(pool, name):
    logits, options = CASES[name]
    one = alone(logits, options)
    for ranks in (1, 2, 3):
        check_bits(pool.run(jobs(logits, even(len(logits), ranks), options)), one)


def test_the_cases_take_the_ways_they_are_meant_for():
    taken = {name: alone(*CASES[name]) for name in ("peaked, auto, sampled stages", "faint and impossible columns")}
    assert any(entry.get("rows", 17_000) < 17_000 for entry in taken["peaked, auto, sampled stages"].history)
    assert taken["peaked, auto, sampled stages"].method == "newton"
    found = taken["faint and impossible columns"]
    assert found.passes > len(found.history)  # columns were read once more
    assert alone(*CASES["ties"]).ties > 800
    assert alone(*CASES["masked rows"]).masked == 4


@pytest.mark.parametrize(
    "shards",
    [
        cut(128, 3001),
        cut(2944, 3001),
        cut(0, 3001),
        cut(3001, 3001),
        cut(640, 640, 3001),
        cut(0, 0, 3001),
        cut(3001, 3001, 3001),
    ],
)
@pytest.mark.parametrize("options", [{"tol": 1e-6, "method": "newton"}, {"tol": 1e-3, "balance": "exact"}])
def test_uneven_and_empty_shards_give_the_bits_of_one_process(pool, shards, options):
    logits = peaked_logits(3001, 60, seed=14)
    check_bits(pool.run(jobs(logits, shards, options)), alone(logits, options))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_tensors_give_the_bits_of_one_process(pool, kind):
    logits = smooth_logits(1001, 33, seed=15)
    check_bits(pool.run(jobs(logits, even(1001, 3), {}, torch=kind)), alone(logits, {}, kind))


STAGES = [{"method": "sinkhorn", "tol": 1e-3}, {"method": "anderson", "tol": 1e-5}]  # of several passes, on a card


@pytest.mark.parametrize("shards", [even(1001, 3), cut(0, 896, 1001), cut(1001, 1001, 1001)])
@pytest.mark.parametrize("options", [{"tol": 1e-5}, {"balance": "exact"}, *STAGES])
def test_tensors_on_cards_give_the_bits_of_one_card(pool, as_cuda, host_card, shards, options):
    logits = smooth_logits(1001, 33, seed=17)
    as_cuda(host_card)
    one = alone(logits, options, "float32")
    assert one.backend == "cuda"
    check_bits(pool.run(jobs(logits, shards, options, torch="float32", card=True)), one)


@pytest.mark.parametrize("options", [{"tol": 1e-5}, {"balance": "exact"}, {"storage": "fixed16", "tol": 1e-3}])
@pytest.mark.parametrize("shards", [even(17_000, 3), cut(0, 128, 17_000)])
def test_features_give_the_bits_of_one_process(pool, options, shards):
    rng = np.random.default_rng(25)
    features = rng.standard_normal((17_000, 24)).astype(np.float32)
    weight = rng.standard_normal((40, 24)).astype(np.float32)
    one = sela_ext.assign(sela_ext.FeatureLogits(features, weight), threads=2, **options)
    given = [{"logits": features[part], "weight": weight, "options": options} for part in shards]
    check_bits(pool.run(given), one)


def test_faint_columns_that_do_not_fit_into_memory_give_the_same_bits(pool):
    logits, options = CASES["faint and impossible columns"]
    check_bits(pool.run(jobs(logits, even(len(logits), 2), options, at_once=0)), alone(logits, options))


def test_a_solve_goes_on_from_the_result_of_another(pool):
    logits = peaked_logits(1501, 31, seed=16)
    first = alone(logits, {"max_passes": 3, "tol": 1e-7})
    options = {"start": first, "tol": 1e-7}
    check_bits(pool.run(jobs(logits, even(1501, 2), options)), alone(logits, options))


def test_all_ranks_warn_of_labels_that_stay_unbalanced(pool):
    logits, options = CASES["faint and impossible columns"]
    for answer in pool.run(jobs(logits, even(len(logits), 2), options)):
        ((category, message, where),) = answer["warnings"]
        assert category == "UnbalancedLabelsWarning"
        assert "1 of 12 clusters receive nothing, the first is 5" in message
        assert where.endswith("group_rank.py")


# ---- Refusals, which every rank sees.


def refusals(answers, kind):
    assert [answer.get("error") for answer in answers] == [kind] * len(answers)
    return [answer["message"] for answer in answers]


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("lam", (25.0, 10.0, 25.0), "25.0 on ranks 0, 2, 10.0 on rank 1"),
        ("tol", (1e-4, 1e-4, 1e-3), "0.0001 on ranks 0, 1, 0.001 on rank 2"),
        ("method", ("auto", "newton", "newton"), "'auto' on rank 0, 'newton' on ranks 1, 2"),
        ("max_passes", (5, 6, 5), "5 on ranks 0, 2, 6 on rank 1"),
        ("start", (None, np.zeros(9), None), "None on ranks 0, 2, 9 numbers of checksum"),
        ("marginals", (np.arange(1, 10), np.arange(1, 10), None), "on rank 2"),
        ("size_bounds", ((90, 130), (90, 130), (90, 131)), "on rank 2"),
        ("row_weights", (np.ones(384), None, None), "given on rank 0, None on ranks 1, 2"),
    ],
)
def test_options_that_differ_are_named_on_all_ranks(pool, name, values, found):
    given = jobs(smooth_logits(1000, 9), even(1000, 3), {})
    for job, value in zip(given, values, strict=True):
        job["options"] = {name: value}
    for message in refusals(pool.run(given), "OptionError"):
        assert message.startswith(f"{name}: expected the same on all ranks of the group, found ")
        assert found in message


def test_shapes_and_types_that_differ_are_named_on_all_ranks(pool):
    given = jobs(smooth_logits(1000, 9), even(1000, 2), {})
    other = smooth_logits(500, 8)
    messages = refusals(pool.run([given[0], {**given[1], "logits": other}]), "OptionError")
    assert all("clusters: " in words and "9 on rank 0, 8 on rank 1" in words for words in messages)
    other = smooth_logits(500, 9, dtype=np.float64)
    messages = refusals(pool.run([given[0], {**given[1], "logits": other}]), "OptionError")
    assert all("dtype: " in words and "float32 on rank 0, float64 on rank 1" in words for words in messages)


def test_instruction_sets_that_differ_are_named_with_the_remedy(pool):
    given = jobs(smooth_logits(1000, 9), even(1000, 2), {})
    given[1]["backend"], given[0]["backend"] = "cpu-avx2", "cpu-avx512"
    for message in refusals(pool.run(given), "OptionError"):
        assert "found cpu-avx512 on rank 0, cpu-avx2 on rank 1; set SELA_CPU_ISA to the same on all" in message


def test_shards_that_are_not_aligned_are_named_with_the_remedy(pool):
    logits = smooth_logits(1000, 9)
    for message in refusals(pool.run(jobs(logits, cut(100, 384, 1000), {})), "OptionError"):
        assert "end at a multiple of 128 rows of the whole matrix, found 100 rows on rank 0" in message
        assert "sela_ext.shard_rows(rows, ranks, rank)" in message


def test_what_no_rank_can_solve_is_an_error_on_all_ranks(pool):
    nothing = np.zeros((0, 9), np.float32)
    answers = pool.run([{"logits": nothing, "options": {}}] * 2)
    assert "found none on any rank" in refusals(answers, "DataError")[0]
    answers = pool.run([{"logits": np.full((128, 9), np.nan, np.float32), "options": {}}] * 2)
    assert "256 of 256 rows" in refusals(answers, "DataError")[0]
    answers = pool.run([{"logits": smooth_logits(128, 9), "options": {"row_weights": np.zeros(128)}}] * 2)
    assert "only zeros on all ranks" in refusals(answers, "OptionError")[0]
    answers = pool.run([{"logits": smooth_logits(128, 9), "options": {"stop": "official"}}] * 2)
    assert "a rule for one process" in refusals(answers, "OptionError")[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_error_before_the_solve_reaches_all_ranks(pool, ranks):
    given = jobs(smooth_logits(1000, 9), even(1000, ranks), {})
    given[1]["options"] = {"lam": -1.0}
    answers = pool.run(given)
    assert answers[1]["error"] == "OptionError"
    for answer in (answers[0], *answers[2:]):
        assert answer["error"] == "DistributedError"
        assert f"rank 1 of {ranks} failed: OptionError: lam: expected a number" in answer["message"]


@pytest.mark.parametrize(("method", "after"), [("anderson", 1), ("anderson", 4), ("newton", 3)])
def test_an_error_within_the_solve_reaches_all_ranks(pool, method, after):
    given = jobs(peaked_logits(3001, 60), even(3001, 3), {"method": method, "tol": 1e-7})
    given[1]["fault"] = {"kind": "memory", "after": after}
    answers = pool.run(given)
    assert answers[1]["error"] == "MemoryError"
    for answer in (answers[0], answers[2]):
        assert answer["error"] == "DistributedError"
        assert "rank 1 of 3 failed: MemoryError: no room for a pass" in answer["message"]
    check_bits(pool.run(jobs(*CASES["one block"][:1], even(100, 3), CASES["one block"][1])), alone(*CASES["one block"]))


def test_ranks_that_drift_apart_are_told(pool):
    given = jobs(smooth_logits(1000, 9), even(1000, 2), {"tol": 1e-6})
    given[1]["fault"] = {"kind": "drift", "after": 3}
    answers = pool.run(given)
    for message in refusals(answers, "DistributedError"):
        assert "expected ranks in step, found a pass" in message
        assert "on rank 0, a pass" in message


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path):
    pool = Pool(2, tmp_path)
    try:
        given = jobs(smooth_logits(1000, 9), even(1000, 2), {"tol": 1e-6})
        given[1]["fault"] = {"kind": "exit", "after": 3}
        answers = pool.run(given)
        assert answers[1]["error"] == "Gone"
        assert answers[0]["error"] == "DistributedError"
        assert "rank 0 of 2 cannot reach the others, one of them died or hangs" in answers[0]["message"]
    finally:
        pool.close()


# ---- Without ranks.


def test_shards_are_whole_blocks_and_differ_by_one_at_most():
    for rows, ranks in itertools.product([0, 1, 127, 128, 129, 1000, 1_281_167], [1, 2, 3, 31]):
        shards = even(rows, ranks)
        assert [part.start for part in shards] == [0, *(part.stop for part in shards[:-1])]
        assert shards[-1].stop == rows
        blocks = [-(-(part.stop - part.start) // 128) for part in shards]
        assert max(blocks) - min(blocks) <= 1
        assert all(part.stop % 128 == 0 for part in shards if part.stop < rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 2, 0), "rows: expected an integer >= 0, found -1"),
        ((10, 0, 0), "ranks: expected an integer >= 1, found 0"),
        ((10, 2, 2), "rank: expected a number in 0 .. 1, found 2"),
        ((10.0, 2, 1), "rows: expected an integer >= 0, found 10.0"),
    ],
)
def test_numbers_of_shards_are_refused_in_one_line(arguments, message):
    with pytest.raises(OptionError, match=message):
        sela_ext.shard_rows(*arguments)
