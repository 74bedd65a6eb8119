import dataclasses

import numpy as np
import pytest

from sela_ext.errors import DataError
from sela_ext.report.overview import Overview, lay_out, map_rows, nearest_clusters, read_overview


def blobs(count, groups=3, width=12):
    rng = np.random.default_rng(count)
    return 9 * rng.normal(size=(groups, width))[np.arange(count) % groups] + rng.normal(size=(count, width))


@pytest.mark.parametrize("count", [1, 31, 800, 801, 1_000_003])
def test_images_of_the_map_are_spread_over_the_data(count):
    rows = map_rows(count)
    assert len(set(rows.tolist())) == len(rows) == min(count, 800)
    assert rows[0] == 0
    assert rows[-1] == count - 1


@pytest.mark.parametrize("count", [31, 33, 301])
def test_the_map_keeps_groups_together_and_is_the_same_every_time(count):
    features = blobs(count)
    places, components = lay_out(features)
    for found in (places, components):
        assert found.shape == (count, 2)
        assert found.min() == 0
        assert found.max() == 1
        distance = np.linalg.norm(found[:, None] - found[None], axis=2)
        np.fill_diagonal(distance, np.inf)
        assert (distance.argmin(1) % 3 == np.arange(count) % 3).mean() > 0.95
    again = lay_out(features.copy())
    np.testing.assert_array_equal(places, again[0])
    np.testing.assert_array_equal(components, again[1])


@pytest.mark.parametrize(
    "features", [np.zeros((7, 3)), np.ones((1, 4)), blobs(3), blobs(40, width=1), blobs(9) * 1e300]
)
def test_few_equal_or_huge_features_give_places_too(features):
    for found in lay_out(features):
        assert found.shape == (len(features), 2)
        assert np.isfinite(found).all()
        assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("clusters", [1, 2, 31, 1033])
def test_nearest_clusters_have_the_largest_cosine(clusters):
    rng = np.random.default_rng(clusters)
    means = rng.normal(size=(clusters, 5))
    used = rng.random(clusters) < 0.8
    used[0] = True
    found = nearest_clusters(means, used)
    assert found.shape == (clusters, 6)
    assert (found[~used] == -1).all()
    rows = np.flatnonzero(used)
    centred = means - means[rows].mean(0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    for k in rows[:40]:
        likeness = {int(j): float(centred[k] @ centred[j]) for j in rows if j != k}
        best = sorted(likeness.values(), reverse=True)[:6]
        listed = [likeness[int(j)] for j in found[k] if j >= 0]
        assert len(listed) == min(6, len(rows) - 1)
        np.testing.assert_allclose(listed, best, atol=2e-5)


def an_overview(images=50):
    index = map_rows(images, 20)
    places = np.linspace(0, 1, 40, dtype=np.float32).reshape(20, 2)
    truth = (np.arange(images) % 3).astype(np.int32) - 1
    return Overview(index, places, places, 1, np.array([[1], [0]], np.int32), truth, np.array(["a", "b"]))


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "report.npz"
    assert read_overview(path, 50) is None
    made = an_overview()
    path.write_bytes(made.to_bytes())
    found = read_overview(path, 50)
    for field in dataclasses.fields(Overview):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(made, field.name))
    assert path.read_bytes() == made.to_bytes()


def test_a_million_images_leave_a_small_file():
    truth = np.random.default_rng(0).integers(1000, size=1_000_003).astype(np.int32)
    assert len(dataclasses.replace(an_overview(), truth=truth).to_bytes()) < 3e6
    assert len(dataclasses.replace(an_overview(), truth=None).to_bytes()) < 5000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": np.array([3, 99])}, "of 50 images"),
        ({"index": np.array([-1, 3])}, "of 50 images"),
        ({"index": np.zeros(20_000, np.int64)}, "at most 16384"),
        ({"tsne": np.zeros((3, 2), np.float32)}, r"expected places in \[0, 1\], \[20, 2\]"),
        ({"pca": np.full((20, 2), np.nan, np.float32)}, "expected places"),
        ({"pca": np.full((20, 2), 2.0, np.float32)}, "expected places"),
        ({"neighbours": np.zeros(3, np.int32)}, "expected neighbours"),
        ({"truth": np.zeros(3, np.int32)}, "expected 50 true labels"),
        ({"truth": np.full(50, -7, np.int32)}, "expected 50 true labels"),
        ({"classes": np.zeros(3)}, "names of classes"),
    ],
)
def test_a_file_that_lies_is_refused_with_the_remedy(tmp_path, changes, message):
    path = tmp_path / "report.npz"
    path.write_bytes(dataclasses.replace(an_overview(), **changes).to_bytes())
    with pytest.raises(
        DataError, match=f"report.npz: expected .*{message.removeprefix('expected ')}.*sela report --map"
    ):
        read_overview(path, 50)


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_a_damaged_file_is_refused(tmp_path, keep):
    path = tmp_path / "report.npz"
    path.write_bytes(an_overview().to_bytes()[:keep])
    with pytest.raises(DataError, match=r"report\.npz: expected"):
        read_overview(path, 50)


def test_neighbours_that_are_no_clusters_are_not_shown(tmp_path):
    from report_runs import make_run, render

    make_run(tmp_path, n=50, clusters=(2,))
    near = np.array([[-1, 0, 1, 2, 99], [-7, 1, 0, 2**31 - 1, 5]], np.int32)
    (tmp_path / "report.npz").write_bytes(dataclasses.replace(an_overview(), head=0, neighbours=near).to_bytes())
    page = render(tmp_path)
    assert {link["href"] for link in page.all("a") if "#cluster-" in link["href"]} == {"#cluster-0", "#cluster-1"}
