"""`sela report` on small runs, and what training leaves for it."""

import shutil

import numpy as np
import pytest
from PIL import Image
from report_runs import Page

import sela_ext
from sela_ext.cli.program import run as run_command
from sela_ext.errors import CheckpointError, DataError, OptionError
from sela_ext.report.overview import read_overview

N = 60
OPTIONS = {"clusters": [5, 3], "epochs": 1, "threads": 1, "progress": False, "precision": "float32"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of images in three class folders, twelve of them held out, and a run on them."""
    folder = tmp_path_factory.mktemp("command")
    rng = np.random.default_rng(0)
    for i in range(N):
        path = folder / "images" / f"class {i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
    sela_ext.train(str(folder / "images"), out=folder / "run", holdout=12, **OPTIONS)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained / "run", tmp_path / "run")


def test_training_leaves_a_map_of_all_images_near_clusters_and_true_labels(trained):
    found = read_overview(trained / "run" / "report.npz", N)
    assert found.index.tolist() == list(range(N))
    assert found.neighbours.shape == (5 if found.head == 0 else 3, 6)
    assert found.truth.tolist() == sorted(i % 3 for i in range(N))  # folders in order
    assert found.classes.tolist() == ["class 0", "class 1", "class 2"]
    features = sela_ext.embed(trained / "run", str(trained / "images"))
    distance = np.linalg.norm(features[:, None] - features[None], axis=2) + 1e9 * np.eye(N)
    near = np.linalg.norm(found.tsne[:, None] - found.tsne[None], axis=2) + 1e9 * np.eye(N)
    # Neighbours by the features are near on the map, held-out images among them: chance is one in ten.
    among = [np.isin(distance[i].argsort()[:3], near[i].argsort()[:6]).mean() for i in range(N)]
    assert np.mean(among) > 0.35


def test_a_report_written_again_has_the_same_bytes(trained, copy):
    before = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    assert run_command(["report", str(copy)]) == 0
    assert (copy / "report.html").read_bytes() == before
    page = Page(before.decode())
    assert page.words.count("class 1") > 3
    assert len([one for one in page.all("span") if one.get("role") == "img"]) == N


def test_the_page_goes_where_it_is_asked_to(copy, tmp_path, capsys):
    before = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    target = tmp_path / "other.html"
    assert run_command(["report", str(copy), "--out", str(target)]) == 0
    assert target.read_bytes() == before
    assert capsys.readouterr().out.strip() == str(target)
    assert not (copy / "report.html").exists()
    with pytest.raises(OptionError, match=r"out: expected a file in a folder that exists"):
        run_command(["report", str(copy), "--out", str(tmp_path / "none" / "page.html")])


def test_images_that_have_moved_are_found_where_data_says(trained, copy, tmp_path, capsys):
    moved = shutil.copytree(trained / "images", tmp_path / "moved")
    options = (copy / "options.json").read_text().replace(str(trained / "images"), str(tmp_path / "gone"))
    (copy / "options.json").write_text(options)
    assert run_command(["report", str(copy)]) == 0
    assert "the images cannot be shown" in capsys.readouterr().out
    assert "background-image" not in (copy / "report.html").read_text()
    assert run_command(["report", str(copy), "--data", str(moved)]) == 0
    assert "background-image" in (copy / "report.html").read_text()
    (moved / "class 0" / "000.png").unlink()
    with pytest.raises(DataError, match="are not the ones that were labelled"):
        run_command(["report", str(copy), "--data", str(moved)])


def test_the_map_is_made_again_of_as_many_images_as_asked(trained, copy):
    made = read_overview(copy / "report.npz", N)
    assert run_command(["report", str(copy), "--map"]) == 0
    again = read_overview(copy / "report.npz", N)
    # Images of other batches: the features agree to rounding, and the components with them.
    np.testing.assert_allclose(again.pca, made.pca, atol=1e-3)
    assert run_command(["report", str(copy), "--map", "31"]) == 0
    fewer = read_overview(copy / "report.npz", N)
    assert fewer.index.size == 31
    np.testing.assert_array_equal(fewer.neighbours, made.neighbours)
    assert len(Page((copy / "report.html").read_text()).data("data-map")["names"]) == 31


def test_a_run_that_left_no_map_gets_one_with_true_classes(copy):
    (copy / "report.npz").unlink()
    assert run_command(["report", str(copy)]) == 0
    page = Page((copy / "report.html").read_text())
    assert not {"map", "classes"} & set(page.ids)
    assert "direction of their prototypes" in page.words
    assert run_command(["report", str(copy), "--map"]) == 0
    assert {"map", "classes"} <= set(Page((copy / "report.html").read_text()).ids)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--map", "many"], OptionError, "map: expected a number of images, found many"),
        (["--map", "2"], OptionError, "map: expected 5 to 16384 images, found 2"),
        (["--data", "nowhere"], DataError, "nowhere"),
    ],
)
def test_wrong_options_are_refused(copy, words, error, message):
    with pytest.raises(error, match=message):
        run_command(["report", str(copy), *words])


def test_a_map_wants_the_network(copy):
    (copy / "network.pt").unlink()
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match=r"expected network\.pt or a checkpoint"):
        run_command(["report", str(copy), "--map"])
