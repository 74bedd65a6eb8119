import math

import numpy as np
import pytest

from sela_ext.finetuning.scores import (
    Boxes,
    area_precision,
    box_precision,
    confusion,
    detection_scores,
    eleven_point_precision,
    image_precision,
    overlaps,
    segmentation_scores,
)


def curve(hits, positives):
    hits = np.asarray(hits, float)
    found = np.cumsum(hits)
    return found / positives, found / np.arange(1, len(hits) + 1)


def by_definition(hits, positives):
    """Both averages, straight from what they are said to be."""
    recall, precision = curve(hits, positives)

    def best(level):
        reached = [p for r, p in zip(recall, precision, strict=True) if r >= level - 1e-12]
        return max(reached, default=0.0)

    area = sum(best(k / positives) for k in range(1, positives + 1)) / positives
    return area, sum(best(k / 10) for k in range(11)) / 11


@pytest.mark.parametrize("seed", range(20))
def test_both_averages_are_what_their_definitions_say(seed):
    rng = np.random.default_rng(seed)
    hits = rng.random(rng.integers(1, 40)) < 0.4
    positives = int(hits.sum() + rng.integers(0 if hits.any() else 1, 5))
    recall, precision = curve(hits, positives)
    area, eleven = by_definition(hits, positives)
    assert area_precision(recall, precision) == pytest.approx(area, abs=1e-12)
    assert eleven_point_precision(recall, precision) == pytest.approx(eleven, abs=1e-12)


def test_a_perfect_ranking_scores_one_and_an_empty_one_nothing():
    assert image_precision(np.array([3.0, 2.0, 1.0]), np.array([1, 1, -1])) == (1.0, 1.0)
    assert area_precision(np.array([]), np.array([])) == 0
    assert eleven_point_precision(np.array([]), np.array([])) == 0


def test_images_that_are_hard_to_tell_are_left_out():
    scores, truth = np.array([0.9, 0.8, 0.7]), np.array([1, 0, 1])
    assert image_precision(scores, truth) == (1.0, 1.0)


def test_equal_scores_do_not_flatter():
    assert image_precision(np.zeros(4), np.array([1, -1, -1, -1]))[0] == 0.25


def test_a_class_that_no_image_has_is_not_judged():
    assert all(math.isnan(value) for value in image_precision(np.zeros(2), np.array([-1, -1])))


def test_overlap_of_boxes_by_hand():
    a = np.array([[0, 0, 10, 10], [20, 20, 20, 30]], float)
    b = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [2, 2, 4, 4]], float)
    assert np.allclose(overlaps(a, b), [[1, 1 / 3, 0, 0.04], [0, 0, 0, 0]])


def truth_of(*boxes, labels=None, difficult=None):
    count = len(boxes)
    return Boxes(
        np.array(boxes, float).reshape(-1, 4),
        np.zeros(count, int) if labels is None else np.array(labels),
        difficult=np.zeros(count, bool) if difficult is None else np.array(difficult),
    )


def found_of(*pairs, labels=None):
    count = len(pairs)
    boxes = np.array([box for box, _ in pairs], float).reshape(-1, 4)
    scores = np.array([score for _, score in pairs], float)
    return Boxes(boxes, np.zeros(count, int) if labels is None else np.array(labels), scores)


A, B, FAR = (0, 0, 10, 10), (20, 20, 40, 40), (70, 70, 80, 80)


@pytest.mark.parametrize(
    ("found", "truth", "area"),
    [
        ([found_of((A, 0.9), (B, 0.8))], [truth_of(A, B)], 1.0),
        ([found_of((A, 0.9), (A, 0.8))], [truth_of(A, B)], 0.5),  # found twice: once right, once wrong
        ([found_of((A, 0.8), (A, 0.9), (B, 0.1))], [truth_of(A, B)], (1 + 2 / 3) / 2),
        ([found_of((FAR, 0.9), (A, 0.5))], [truth_of(A)], 0.5),
        ([found_of((A, 0.9)), found_of((A, 0.8))], [truth_of(A), truth_of(B)], 0.5),  # each image for itself
        ([found_of((A, 0.9), (B, 0.8))], [truth_of(A, B, difficult=[True, False])], 1.0),
        ([found_of((A, 0.9), (A, 0.8), (B, 0.7))], [truth_of(A, B, difficult=[True, False])], 1.0),
        ([found_of((A, 0.9), labels=[1])], [truth_of(A)], 0.0),
        ([found_of()], [truth_of(A)], 0.0),
        ([found_of((A, 0.9))], [truth_of(A, labels=[1])], None),
        ([found_of((A, 0.9))], [truth_of(A, difficult=[True])], None),
    ],
)
def test_precision_of_boxes_by_hand(found, truth, area):
    value = box_precision(found, truth, 0)[0]
    assert math.isnan(value) if area is None else value == pytest.approx(area)


def test_eleven_points_of_boxes_by_hand():
    # Recall .5 at precision 1, recall 1 at precision 2/3: six points at 1, five at 2/3.
    found = [found_of((A, 0.9), (FAR, 0.8), (B, 0.7))]
    assert box_precision(found, [truth_of(A, B)], 0)[1] == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_a_box_that_overlaps_by_just_the_threshold_is_right():
    half = (0, 0, 10, 5)
    assert box_precision([found_of((half, 0.9))], [truth_of(A)], 0, 0.5)[0] == 1.0
    assert box_precision([found_of((half, 0.9))], [truth_of(A)], 0, 0.51)[0] == 0.0


def test_scores_of_a_detector_are_means_over_the_classes_that_occur():
    eight = (0, 0, 10, 8)  # overlaps by .8: right at seven of the ten thresholds
    found = [found_of((A, 0.9), (eight, 0.9), (FAR, 0.3), labels=[0, 1, 2])]
    truth = [truth_of(A, A, labels=[0, 1])]
    scores = detection_scores(found, truth, ["a", "b", "c"])
    assert scores["ap50"] == scores["ap75"] == scores["ap50_11point"] == 1.0
    assert scores["ap"] == pytest.approx((1.0 + 0.7) / 2)
    assert scores["per_class"]["a"] == 1.0
    assert math.isnan(scores["per_class"]["c"])


def test_segmentation_by_hand():
    truth = np.array([[0, 0, 1], [1, 255, 255]])
    found = np.array([[0, 1, 1], [0, 0, 2]])
    table = confusion(found, truth, 4)
    assert table.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    scores = segmentation_scores(table)
    assert scores["miou"] == pytest.approx(1 / 3)  # classes 2 and 3 do not occur
    assert scores["pixel_accuracy"] == 0.5
    assert math.isnan(scores["per_class"]["3"])


def test_a_class_found_where_it_is_not_costs():
    scores = segmentation_scores(confusion(np.array([0, 2]), np.array([0, 0]), 3))
    assert scores["miou"] == pytest.approx((0.5 + 0.0) / 2)


def test_nothing_decided_is_not_judged():
    scores = segmentation_scores(confusion(np.array([0]), np.array([255]), 2))
    assert math.isnan(scores["miou"])
    assert math.isnan(scores["pixel_accuracy"])
