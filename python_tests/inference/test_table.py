import io

import pytest
from rich.console import Console

from sela_ext.evaluation.published import PUBLISHED, TRIVIAL, known_data, published_for
from sela_ext.inference.table import figure_rows, show_report

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def report(**fields):
    one = {
        "name": "photos",
        "images": 1000,
        "test_images": 100,
        "classes": 1000,
        "nmi": 0.5,
        "knn": 0.25,
        "knn_k": 20,
        "knn_scores": {"20": {"top1": 0.25}, "50": {"top1": 0.125}},
        "linear": 0.75,
        "published": [],
        **fields,
    }
    return {"subject": {"name": "weights.pth"}, "data_sets": [one]}


def printed(found):
    console = Console(file=io.StringIO(), width=200)
    show_report(found, console)
    return console.file.getvalue()


def test_published_figures_stand_beside_ones_own():
    entries = [
        {"model": entry.model, "source": entry.source, **entry.figures}
        for entry in published_for("alexnet", "imagenet")
    ]
    text = printed(report(published=entries[:1]))
    assert "AlexNet, 1 x 1k" in text
    line = next(line for line in text.splitlines() if "NMI" in line)
    assert "0.500" in line
    assert "0.505" in line
    assert "0.421" in next(line for line in text.splitlines() if "linear probe" in line)


def test_trivial_figures_have_a_column_where_the_data_are_known():
    assert "pixels alone" in printed(report(trivial=TRIVIAL["digits"]))
    assert "pixels alone" not in printed(report())


def test_every_part_of_a_report_has_its_rows():
    one = report(
        layers={"stages": {"conv1": {"values": 9600, "top1": 0.125, "top5": 0.375}}},
        few_shot={"0.01": {"images": 13, "linear": {"top1": 0.0625}, "fine_tuned": {"top1": 0.875}}},
    )["data_sets"][0]
    rows = {name: value for name, _, value in figure_rows(one)}
    assert rows == {
        "NMI": "0.500",
        "kNN, k = 20": "0.250",
        "linear probe": "0.750",
        "kNN, k = 50": "0.125",
        "probe of conv1 (9600 values)": "0.125 / 0.375",
        "0.01 of the labels (13 images), linear": "0.062",
        "0.01 of the labels (13 images), fine-tuned": "0.875",
    }


@pytest.mark.parametrize(
    ("name", "class_names", "classes", "expected"),
    [
        ("digits", None, 10, "digits"),
        ("/data/Fashion_MNIST", None, 10, "fashion-mnist"),
        ("x", CIFAR10, 10, "cifar10"),
        ("/data/cifar-10", None, 10, "cifar10"),
        ("/data/cifar-100", None, 100, None),
        ("/data/SVHN/train", None, 10, "svhn"),
        ("/data/imagenet/train", None, 1000, "imagenet"),
        ("x", [f"n{i:08d}" for i in range(1000)], 1000, "imagenet"),
        ("/data/imagenet-small", None, 100, None),
        ("digits", None, 3, None),
    ],
)
def test_known_data_are_told_by_their_classes(name, class_names, classes, expected):
    assert known_data(name, class_names, classes) == expected


def test_published_figures_are_shares_of_known_metrics():
    assert len(PUBLISHED) >= 10
    for entry in PUBLISHED:
        assert entry.figures
        assert all(0 < value < 1 for value in entry.figures.values())
        assert set(entry.figures) <= {"nmi", "ami", "ari", "accuracy", "linear", "knn"}
    assert published_for("resnet18", "cifar10") == []
    assert [entry.figures["knn"] for entry in published_for("alexnet", "cifar10")] == [0.776]
