import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from sela_ext.errors import DataError, OptionError
from sela_ext.training import clustering
from sela_ext.training.clustering import Whitening, Workers, kmeans, match_clusters, unit_rows


def blobs(rows, width, clusters, seed=0, spread=0.05):
    """Points around centres, and the centre of each."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((clusters, width))
    truth = draw.permutation(np.arange(rows) % clusters)
    points = centres[truth] + spread * draw.standard_normal((rows, width))
    return torch.from_numpy(points.astype(np.float32)), truth


def distances(points, centroids):
    return torch.cdist(points.double(), centroids.double()).square()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(clustering, "_CHUNK", 13)


@pytest.mark.parametrize("backend", ["faiss", "scikit-learn", "torch"])
@pytest.mark.parametrize(("rows", "width", "clusters"), [(31, 3, 1), (33, 1, 5), (1001, 17, 31)])
def test_an_iteration_is_nearest_centroid_and_then_the_mean(backend, rows, width, clusters):
    if backend == "faiss":
        pytest.importorskip("faiss")
    points, _ = blobs(rows, width, 7, spread=1.0)
    start = points[:clusters]
    first = distances(points, start).argmin(1)
    means = torch.stack([points[first == k].double().mean(0) for k in range(clusters)]).float()
    found = kmeans(points, clusters, iterations=1, start=start, backend=backend)
    torch.testing.assert_close(found.centroids, means)
    np.testing.assert_array_equal(found.labels, distances(points, means).argmin(1).numpy())
    expected = [distances(points, at).min(1).values.mean().item() for at in (start, means)]
    assert found.objective == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert (found.backend, found.repaired) == (backend, 0)


def test_well_separated_groups_are_found():
    points, truth = blobs(1001, 20, 7)
    found = min((kmeans(points, 7, seed=seed) for seed in range(8)), key=lambda one: one.objective[-1])
    matched = match_clusters(truth, found.labels, 7)
    np.testing.assert_array_equal(matched, truth)
    assert found.gain == 0


def test_the_objective_never_grows_and_ends_where_nothing_changes():
    points, _ = blobs(1001, 9, 40, spread=0.8)
    found = kmeans(points, 40, iterations=500)
    assert len(found.objective) < 500
    assert all(b <= a * (1 + 1e-6) for a, b in zip(found.objective, found.objective[1:], strict=False))
    again = kmeans(points, 40, iterations=1, start=found.centroids)
    np.testing.assert_array_equal(again.labels, found.labels)


@pytest.mark.parametrize("backend", ["faiss", "scikit-learn"])
def test_bits_depend_on_seed_and_stream_and_not_on_threads(backend, small_chunks):
    if backend == "faiss":
        pytest.importorskip("faiss")
    points, _ = blobs(501, 33, 9, spread=0.9)
    one = kmeans(points, 20, seed=3, threads=1, backend=backend)
    for threads in (2, 3):
        other = kmeans(points, 20, seed=3, threads=threads, backend=backend)
        assert one.labels.tobytes() == other.labels.tobytes()
        assert torch.equal(one.centroids, other.centroids)
        assert one.objective == other.objective
    for other in (kmeans(points, 20, seed=4), kmeans(points, 20, seed=3, stream=1)):
        assert one.labels.tobytes() != other.labels.tobytes()


def test_backends_agree():
    pytest.importorskip("faiss")
    points, _ = blobs(1001, 17, 31, spread=0.7)
    found = [kmeans(points, 31, backend=backend) for backend in ("faiss", "scikit-learn", "torch")]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0].labels, other.labels)
        torch.testing.assert_close(found[0].centroids, other.centroids)


def test_without_faiss_scikit_learn_is_used_and_asking_for_faiss_says_so(monkeypatch):
    monkeypatch.setattr(clustering, "_faiss", lambda: None)
    points, _ = blobs(33, 3, 3)
    assert kmeans(points, 3).backend == "scikit-learn"
    with pytest.raises(OptionError, match=r"faiss-cpu, found none; pip install \"sela_ext\[faiss\]\""):
        kmeans(points, 3, backend="faiss")


@pytest.mark.parametrize("distinct", [3, 31, 40])
def test_no_cluster_is_empty_while_there_are_distinct_points(distinct):
    """Most points coincide, so that random starts do too: without repair most clusters would be empty."""
    draw = np.random.default_rng(distinct)
    places = draw.standard_normal((distinct, 2)).astype(np.float32)
    points = torch.from_numpy(places[np.concatenate([np.arange(distinct), np.zeros(500, int)])])
    for seed in range(5):
        found = kmeans(points, 31, seed=seed, iterations=3)
        assert len(np.unique(found.labels)) == min(31, distinct)
        assert found.repaired > 0


def test_an_empty_cluster_gets_a_part_of_the_largest():
    points = torch.tensor([[0.0], [1], [2], [3], [10], [11]])
    start = torch.tensor([[1.5], [10.5], [1000.0]])
    labels = np.array([0, 0, 0, 0, 1, 1])
    centroids = start.clone()
    assert clustering._fill_empty(points, labels, centroids) == 1
    assert sorted(np.bincount(labels)) == [2, 2, 2]
    assert {tuple(np.flatnonzero(labels == k)) for k in range(3)} == {(0, 1), (2, 3), (4, 5)}
    for k in range(3):
        assert centroids[k, 0] == points[labels == k].mean()
    assert torch.equal(start, torch.tensor([[1.5], [10.5], [1000.0]]))


def test_points_that_cannot_be_clustered_are_refused():
    points = torch.zeros(5, 2)
    with pytest.raises(OptionError, match=r"clusters: expected 1\.\.5, the number of points, found 6"):
        kmeans(points, 6)
    with pytest.raises(DataError, match=r"start: expected \[2, 2\], found \[3, 2\]"):
        kmeans(points, 2, start=torch.zeros(3, 2))
    with pytest.raises(DataError, match=r"expected float32 \[N, D\], found torch\.float64"):
        kmeans(points.double(), 2)
    with pytest.raises(OptionError, match="backend: expected one of"):
        kmeans(points, 2, backend="cuml")
    points[3, 1] = torch.nan
    with pytest.raises(DataError, match="expected finite numbers"):
        kmeans(points, 2)


def test_whitening_is_the_principal_components_at_variance_one():
    draw = np.random.default_rng(0)
    features = (draw.standard_normal((501, 33)) @ draw.standard_normal((33, 33)) + 5).astype(np.float32)
    whitening = Whitening.fit(torch.from_numpy(features), 12)
    whitened = whitening(torch.from_numpy(features)).numpy()
    expected = PCA(12, whiten=True, svd_solver="full").fit(features.astype(np.float64))
    reference = expected.transform(features.astype(np.float64)) * np.sqrt(501 / 500)  # over N instead of N - 1
    np.testing.assert_allclose(np.abs(whitened), np.abs(reference), atol=2e-3)
    np.testing.assert_allclose(np.cov(whitened.T, ddof=0), np.eye(12), atol=1e-4)
    assert whitening.share == pytest.approx(expected.explained_variance_ratio_.sum(), abs=1e-5)


def test_whitening_is_that_of_faiss_up_to_its_length():
    faiss = pytest.importorskip("faiss")
    draw = np.random.default_rng(1)
    features = (draw.standard_normal((1001, 31)) * np.linspace(0.2, 3, 31) + 1).astype(np.float32)
    matrix = faiss.PCAMatrix(31, 9, -0.5)
    matrix.train(features)
    theirs = matrix.apply(features) * np.sqrt(1001)
    ours = Whitening.fit(torch.from_numpy(features), 9)(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=2e-3)


def test_directions_without_variance_are_left_out():
    draw = np.random.default_rng(2)
    features = torch.from_numpy((draw.standard_normal((101, 4)) @ draw.standard_normal((4, 20))).astype(np.float32))
    whitening = Whitening.fit(features, 20)
    assert whitening.matrix.shape == (20, 4)
    assert whitening.share == pytest.approx(1.0)
    assert torch.isfinite(whitening(features)).all()
    with pytest.raises(DataError, match="expected some variance"):
        Whitening.fit(torch.ones(5, 3), 2)


def test_whitening_does_not_depend_on_threads_nor_on_how_rows_are_cut(small_chunks):
    features = torch.randn(101, 33, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    fits = [Whitening.fit(features, 9, threads=threads) for threads in (1, 2, 3)]
    assert all(torch.equal(fits[0].matrix, other.matrix) for other in fits[1:])
    outputs = [fits[0](features, threads=threads) for threads in (1, 2)]
    assert torch.equal(*outputs)
    assert outputs[0].dtype == torch.float32


def test_rows_become_one_long_but_for_zeros():
    points = torch.tensor([[3.0, 4], [0, 0], [1e-3, 0]])
    assert torch.equal(unit_rows(points), torch.tensor([[0.6, 0.8], [0, 0], [1, 0]]))


@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_come_in_order_and_errors_come_through(threads):
    def fail(cut):
        raise ValueError(f"at {cut.start}")

    before = torch.get_num_threads()
    with Workers(threads) as workers:
        assert torch.get_num_threads() == 1
        cuts = [(cut.start, cut.stop) for cut in workers.chunks(lambda cut: cut, 131, 10)]
        with pytest.raises(ValueError, match="at 0"):
            list(workers.chunks(fail, 31, 10))
    assert cuts == [(start, min(start + 10, 131)) for start in range(0, 131, 10)]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("limit", [2048, 4], ids=["exact", "greedy"])
def test_clusters_get_back_the_numbers_that_they_had(limit, monkeypatch):
    monkeypatch.setattr(clustering, "_MATCHED_EXACTLY", limit)
    draw = np.random.default_rng(0)
    old = draw.integers(0, 31, 1001)
    old[:50] = -1
    new = draw.permutation(31)[np.where(old < 0, 3, old)]
    new[::40] = draw.integers(0, 31, len(new[::40]))
    new[7] = -1
    matched = match_clusters(old, new, 31)
    assert matched[7] == -1
    assert (matched == old)[50:].mean() > 0.95
    number = {(a, b) for a, b in zip(new.tolist(), matched.tolist(), strict=True) if a >= 0}
    assert len({a for a, _ in number}) == len({b for _, b in number}) == len(number)


def test_matching_is_the_best_there_is():
    # Greedy would give the first cluster number 0 (overlap 5), and lose 4 + 4 of the others.
    overlap = [(0, 0, 5), (0, 1, 4), (1, 0, 4)]
    new = np.repeat([a for a, _, _ in overlap], [n for *_, n in overlap])
    old = np.repeat([b for _, b, _ in overlap], [n for *_, n in overlap])
    assert int((match_clusters(old, new, 2) == old).sum()) == 8


def test_clusters_without_points_get_the_numbers_that_are_left(monkeypatch):
    for limit in (2048, 1):
        monkeypatch.setattr(clustering, "_MATCHED_EXACTLY", limit)
        assert match_clusters(np.array([4, 4, 2]), np.array([0, 0, 1]), 5).tolist() == [4, 4, 2]
        assert match_clusters(np.array([-1, -1]), np.array([0, 3]), 5).tolist() != [-1, -1]
