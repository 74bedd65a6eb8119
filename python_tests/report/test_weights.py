import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from report_runs import make_run, render

from sela_ext.report.weights import draw_filters, read_weights


def pixels(filters):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(filters.source.split(",")[1]))))


@pytest.mark.parametrize(("count", "channels", "side"), [(8, 3, 7), (33, 1, 3), (64, 2, 11), (9, 4, 5)])
def test_filters_are_drawn_each_on_its_own_scale(count, channels, side):
    weights = np.random.default_rng(count).normal(size=(count, channels, side, side)).astype(np.float32)
    found = draw_filters(weights)
    drawn = pixels(found)
    assert drawn.shape[:2] == (found.picture_height, found.picture_width)
    width = side if channels == 3 else side * channels
    for i in (0, count // 2, count - 1):
        y, x = i // found.across * (side + 1), i % found.across * (width + 1)
        tile = drawn[y : y + side, x : x + width]
        assert (tile[..., 3] == 255).all()
        wanted = 127.5 + 127.5 * weights[i] / np.abs(weights[i]).max()
        wanted = wanted.transpose(1, 2, 0) if channels == 3 else np.concatenate(list(wanted), axis=1)[..., None]
        wanted = np.broadcast_to(np.clip(wanted, 0, 255), (side, width, 3))
        np.testing.assert_allclose(tile[..., :3], wanted, atol=0.51)


def test_weights_that_are_no_numbers_are_drawn_too():
    weights = np.full((8, 1, 3, 3), np.nan, np.float32)
    weights[0] = np.inf
    assert pixels(draw_filters(weights)).size


def test_only_the_first_of_very_many_filters_are_drawn():
    found = draw_filters(np.ones((700, 1, 3, 3), np.float32))
    assert (found.count, found.shown) == (700, 256)


def saved(path, backbone, heads=None, clusters=(4, 3)):
    torch.save({"backbone": backbone, "heads": heads or {}, "clusters": list(clusters)}, path)
    return path


def test_the_first_convolution_that_learns_is_taken(tmp_path):
    backbone = {
        "sobel.0.weight": torch.ones(1, 3, 1, 1),
        "sobel.1.weight": torch.ones(2, 1, 3, 3),
        "norm.weight": torch.ones(64),
        "features.0.weight": torch.randn(64, 2, 11, 11),
        "features.4.weight": torch.randn(128, 64, 5, 5),
    }
    found = read_weights(saved(tmp_path / "network.pt", backbone), 0).filters
    assert (found.count, found.channels, found.height) == (64, 2, 11)


def test_prototypes_are_those_of_the_asked_head(tmp_path):
    weight = torch.randn(7, 5)
    path = saved(tmp_path / "network.pt", {}, {"weight": weight})
    np.testing.assert_array_equal(read_weights(path, 1).prototypes, weight[4:])
    assert read_weights(path, 0).filters is None
    assert read_weights(path, 2).prototypes is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", None, {}, {"backbone": 3, "heads": [1]}, [1]])
def test_a_network_that_cannot_be_read_costs_the_report_nothing(tmp_path, content):
    make_run(tmp_path, n=40, clusters=(4, 3))
    if isinstance(content, bytes):
        (tmp_path / "network.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "network.pt")
    page = render(tmp_path)
    assert "filters" not in page.ids


def test_clusters_of_like_prototypes_are_near_where_the_run_left_no_features(tmp_path):
    make_run(tmp_path, n=40, clusters=(4, 3), metrics=False)
    weight = torch.tensor([[1.0, 0], [1, 0.1], [-1, 0], [-1, 0.1], [0, 0], [0, 0], [0, 0]])
    saved(tmp_path / "network.pt", {}, {"weight": weight})
    page = render(tmp_path)
    assert "most alike in the direction of their prototypes" in page.words
    for k, near in ((0, 1), (1, 0), (2, 3), (3, 2)):
        article = page.source.split(f'id="cluster-{k}"')[1].split("</article>")[0]
        assert article.split("Nearest: ")[1].startswith(f'<a href="#cluster-{near}">{near}</a>')
