"""Work that ranks share gives what one process gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKS = Path(__file__).with_name("rank_checks.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What ranks found, by their number: a list with an entry per rank."""
    folder, kept = tmp_path_factory.mktemp("ranks"), {}

    def of(ranks):
        if ranks not in kept:
            path = folder / f"{ranks}.pt"
            subprocess.run(
                [sys.executable, "-P", str(CHECKS), str(ranks), str(path)], check=True, timeout=120,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            kept[ranks] = torch.load(path, weights_only=False)
        return kept[ranks]

    return of


several = pytest.mark.parametrize("ranks", [2, 3])


@several
def test_rows_come_to_whom_they_are_for_in_the_order_of_their_senders(found, ranks):
    for rank, part in enumerate(found(ranks)):
        expected = [
            100.0 * sender + place for sender in range(ranks) for place in range(5 + sender) if place % ranks == rank
        ]
        assert part["dealt"][:, 0].tolist() == expected
        assert part["dealt"].dtype is torch.float16


@several
def test_rows_of_any_number_are_gathered_by_all_or_by_the_first(found, ranks):
    expected = [[100.0 * sender + place for place in range(5 + sender)] for sender in range(ranks)]
    for rank, part in enumerate(found(ranks)):
        assert [rows[:, 0].tolist() for rows in part["gathered"]] == expected
        assert [rows[:, 0].tolist() for rows in part["first"]] == (expected if rank == 0 else [])
        assert [len(rows) for rows in part["empty"]] == [3] + [0] * (ranks - 1)


@several
def test_small_things_are_told_to_all(found, ranks):
    for part in found(ranks):
        assert part["least"] == 6.0 - ranks
        assert part["totals"] == [ranks, sum(range(ranks))]
        assert part["bytes"] == bytes(range(256))
        assert part["nothing"] is None
        assert part["led"] == {"by": 0}


@several
def test_an_error_of_one_rank_is_raised_by_all(found, ranks):
    for part in found(ranks):
        assert part["failures"] == [
            ("OptionError", "out: no", True),
            ("DataError", f"rank 1 of {ranks}: image 7: no", True),
        ]
    assert [part["fine"] for part in found(ranks)] == list(range(ranks))


@several
def test_a_bank_keeps_the_last_of_what_any_rank_wrote(found, ranks):
    first = found(ranks)[0]
    assert first["bank"]["valid"].all()
    assert first["bank"]["embeddings"][:, 0].tolist() == [2000.0 + image for image in range(1001)]
    assert torch.equal(torch.cat([part["back"] for part in found(ranks)]), first["bank"]["embeddings"])
    assert torch.equal(torch.cat([part["own"] for part in found(ranks)]), first["bank"]["embeddings"])


@several
def test_a_look_at_all_images_has_the_same_bits_for_any_number_of_ranks(found, ranks):
    one, first = found(1)[0], found(ranks)[0]
    assert torch.equal(one["embeddings"], first["embeddings"])
    assert torch.equal(one["features"], first["features"])


@several
def test_a_look_in_train_mode_does_not_wait_for_batches_that_other_ranks_have_not(found, ranks):
    first = found(ranks)[0]
    assert torch.equal(first["with shared norms"], found(1)[0]["embeddings"])
    assert first["left"] == []


@several
def test_as_many_unreadable_images_are_accepted_as_by_one_process(found, ranks):
    for part in found(ranks):
        accepted, refused = part["unreadable"]
        assert accepted == part["bad"]
        assert "8 of 400 images cannot be read, more than max_bad_fraction=0.0175" in refused


@several
def test_vectors_that_are_read_where_they_lie_are_shared_out_and_brought_together(found, ranks):
    one = found(1)[0]
    for part in found(ranks):
        assert torch.equal(part["vector labels"], one["vector labels"])
        assert part["vector masked"] == one["vector masked"] == 0
    assert (one["vector labels"] < 0).nonzero().tolist() == [[head, row] for head in range(2) for row in (5, 700)]
    for mine, theirs in zip(found(ranks)[0]["vectors"], one["vectors"], strict=True):
        valid = theirs[2]
        assert torch.equal(mine[2], valid)
        assert valid.sum() == 999
        for a, b in zip(mine[:2], theirs[:2], strict=True):
            assert torch.equal(a[valid], b[valid])


@several
def test_a_label_pass_has_the_same_bits_for_any_number_of_ranks(found, ranks):
    one = found(1)[0]
    for part in found(ranks):
        for name in ("labels", "confidence"):
            assert torch.equal(one[name], part[name]), name
        assert all(torch.equal(a, b) for a, b in zip(one["potentials"], part["potentials"], strict=True))
        assert part["records"] == one["records"]
        assert part["cross_entropy"] == pytest.approx(one["cross_entropy"], rel=1e-12)
        assert part["spread"] == one["spread"]


@several
def test_images_that_were_not_seen_get_no_label_and_weigh_nothing(found, ranks):
    first = found(ranks)[0]
    missing = int((first["partial"][0] < 0).sum())
    assert missing == sum(len(part["own"][::50]) for part in found(ranks))
    assert first["masked"] == (0, 0)
    sizes = torch.bincount(first["partial"][0][first["partial"][0] >= 0])
    assert len(sizes) == 10
    assert sizes.min() > 60
    assert all(torch.equal(part["partial"], first["partial"]) for part in found(ranks))


@several
def test_bounds_of_cluster_sizes_are_multiples_of_an_equal_share_of_the_images_that_were_seen(found, ranks):
    labels = found(ranks)[0]["bounded"]
    assert torch.equal(labels, found(1)[0]["bounded"])
    assert torch.equal((labels < 0).nonzero()[:, 0], torch.arange(0, 1001, 20))
    assert torch.bincount(labels[labels >= 0]).min() > 90  # 95 of 950 images in 10 clusters, but for rounding


@several
def test_shares_that_the_network_estimates_are_those_of_all_ranks(found, ranks):
    agree = (found(1)[0]["estimated"] == found(ranks)[0]["estimated"]).float().mean()
    assert agree > 0.999  # sums in another order


@several
@pytest.mark.parametrize("name", ["whole", "rest", "done", "odd"])
def test_a_step_has_the_same_images_for_any_number_of_ranks(found, ranks, name):
    alone = found(1)[0]["steps"][name]
    shared = [part["steps"][name] for part in found(ranks)]
    assert len({len(part) for part in shared}) == 1
    assert len(shared[0]) == len(alone)
    for step, (index, position, count, _) in enumerate(alone):
        here = [part[step] for part in shared]
        assert {(one[1], one[2]) for one in here} == {(position, count)}
        if count < 2 * ranks:  # batch norm needs two on every rank
            assert all(one[0] is None for one in here)
            continue
        assert sorted(image for one in here for image in one[0]) == sorted(index)
        assert sum(one[3] for one in here) == pytest.approx(ranks)
        assert [one[3] for one in here] == pytest.approx([len(one[0]) * ranks / count for one in here])
