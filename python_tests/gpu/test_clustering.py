"""K-means and whitening on a device: equal to the CPU's up to rounding, and the same bits every time."""

import numpy as np
import pytest
import torch

from sela_ext.training.clustering import Whitening, kmeans, unit_rows


def points(rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(37, width, generator=generator)
    return centres[torch.arange(rows) % 37] + 0.1 * torch.randn(rows, width, generator=generator)


@pytest.mark.parametrize(("rows", "width", "clusters"), [(33, 3, 5), (1001, 17, 37), (20_011, 64, 100)])
def test_clusters_are_those_of_the_cpu(card, rows, width, clusters):
    at_home = points(rows, width)
    backend = "torch" if card.played else "auto"  # what is chosen for points on a card
    away = [kmeans(at_home.to(card.place), clusters, seed=1, backend=backend) for _ in range(2)]
    assert away[0].backend == "torch"
    assert torch.equal(away[0].centroids, away[1].centroids)
    np.testing.assert_array_equal(away[0].labels, away[1].labels)
    expected = kmeans(at_home, clusters, seed=1, backend="scikit-learn")
    # With more clusters than centres borders run through clouds of points: there rounding decides for 1.1% on a CPU.
    assert (away[0].labels == expected.labels).mean() > (0.99 if clusters <= 37 else 0.95)
    assert away[0].objective[-1] == pytest.approx(expected.objective[-1], rel=1e-2)
    assert np.bincount(away[0].labels, minlength=clusters).min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whitening_is_that_of_the_cpu(card, dtype):
    features = points(1001, 33).to(dtype)
    there, here = Whitening.fit(features.to(card.place), 9), Whitening.fit(features, 9)
    torch.testing.assert_close(there.matrix.cpu(), here.matrix, rtol=1e-2, atol=1e-3)
    whitened = unit_rows(there(features.to(card.place)))
    torch.testing.assert_close(whitened.cpu(), unit_rows(here(features)), rtol=1e-2, atol=1e-2)
    assert whitened.device == card.place
