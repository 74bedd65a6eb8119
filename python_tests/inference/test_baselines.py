"""Untrained networks and bare pixels score what they are known to score: a probe that flatters or cheats would not."""

import os
from pathlib import Path

import pytest

import sela_ext
from sela_ext.evaluation.published import TRIVIAL

FASHION = Path("/usr/share/datasets/fashion-mnist")
IMAGES = Path(os.environ.get("SELA_DATA_DIR") or Path(__file__).resolve().parents[2] / "../shared/data")


@pytest.fixture
def fashion():
    if not (FASHION / "train-images-idx3-ubyte.gz").exists():
        pytest.skip(f"Fashion-MNIST is not in {FASHION}")
    return FASHION


@pytest.fixture
def cifar():
    if not ((IMAGES / "train").is_dir() and (IMAGES / "test").is_dir()):
        pytest.skip(f"no CIFAR folders train and test in {IMAGES}; name their parent in SELA_DATA_DIR")
    return f"{IMAGES / 'train'}::{IMAGES / 'test'}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_random_network_on_the_digits():
    found = sela_ext.evaluate("random:small-resnet", "digits")
    assert found["knn"] == pytest.approx(0.942, abs=0.03)
    assert found["linear"] == pytest.approx(0.956, abs=0.03)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_random_network_on_fashion_mnist(fashion):
    found = sela_ext.evaluate("random:small-resnet", fashion, what="knn,linear")
    assert found["knn"] == pytest.approx(0.782, abs=0.03)
    assert found["linear"] == pytest.approx(0.772, abs=0.04)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_pixels_of_fashion_mnist(fashion):
    found = sela_ext.evaluate("pixels", fashion)
    assert found["data_sets"][0]["known_as"] == "fashion-mnist"
    assert found["nmi"] == pytest.approx(0.491, abs=0.03)
    assert found["ari"] == pytest.approx(0.340, abs=0.03)
    assert found["accuracy"] == pytest.approx(0.501, abs=0.05)
    assert found["knn"] == pytest.approx(TRIVIAL["fashion-mnist"]["knn"], abs=0.005)
    assert found["linear"] == pytest.approx(0.831, abs=0.02)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_random_network_on_cifar10(cifar):
    found = sela_ext.evaluate("random:small-convnet", cifar, what="knn,linear")
    assert found["data_sets"][0]["known_as"] == "cifar10"
    assert found["knn"] == pytest.approx(0.350, abs=0.03)
    assert found["linear"] == pytest.approx(0.375, abs=0.04)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_pixels_of_cifar10(cifar):
    found = sela_ext.evaluate("pixels", cifar)
    assert found["nmi"] == pytest.approx(0.079, abs=0.01)
    assert found["ari"] == pytest.approx(0.042, abs=0.01)
    assert found["accuracy"] == pytest.approx(0.206, abs=0.02)
    assert found["knn"] == pytest.approx(TRIVIAL["cifar10"]["knn"], abs=0.005)
    assert found["linear"] == pytest.approx(0.384, abs=0.02)


def test_pixels_of_the_digits_vote_as_the_column_beside_them_says():
    found = sela_ext.evaluate("pixels", "digits", what="knn", threads=1)
    assert found["knn"] == pytest.approx(TRIVIAL["digits"]["knn"], abs=0.003)
