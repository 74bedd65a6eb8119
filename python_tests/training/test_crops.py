import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sela_ext import Augment
from sela_ext.errors import OptionError
from sela_ext.models import Heads, Network, SmallResNet
from sela_ext.training.crops import (
    CropGroup,
    crop_losses,
    crop_views,
    default_crops,
    embed_views,
    parse_crops,
    takes_sizes,
)


@pytest.mark.parametrize("crops", ["2x160+4x96", " 2 x 160 + 4x96 ", ["2x160", "4x96"], [(2, 160), [4, 96]]])
def test_crops_are_read_from_text_and_from_lists(crops):
    assert parse_crops(crops) == [CropGroup(2, 160), CropGroup(4, 96)]


def test_what_is_written_is_read_again():
    for text in ("2x160+4x96", "2x224:0.14-1+6x96:0.05-0.14", "1x32"):
        assert "+".join(map(str, parse_crops(text))) == text


@pytest.mark.parametrize(
    "crops", ["", "2x", "x160", "2x160+", "160", "2*160", 224, None, [], [(2, 160, 3)], [(2, 1.5)], [(True, 160)]]
)
def test_anything_else_is_refused(crops):
    with pytest.raises(OptionError, match='crops: expected COUNTxSIZE, several joined by "\\+"'):
        parse_crops(crops)


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        ("0x32", "counts of at least 1"),
        ("2x3", "sizes from 4 to 4096, found 2x3"),
        ("2x5000", "sizes from 4 to 4096"),
        ("2x96+4x160", "the largest first"),
        ("200x32+57x16", "at most 256 views"),
        ("2x32:0-1", "0 < LOW <= HIGH <= 1"),
        ("2x32:0.5-0.4", "0 < LOW <= HIGH <= 1"),
        ("2x32:0.5-1.1", "0 < LOW <= HIGH <= 1"),
    ],
)
def test_crops_out_of_range_are_refused(crops, message):
    with pytest.raises(OptionError, match=message):
        parse_crops(crops)


def test_small_crops_end_where_large_ones_begin():
    views = crop_views(Augment.aug_plus(224, scale=(0.14, 1.0)), parse_crops("2x160+3x96"))
    assert [view.size for view in views] == [160, 160, 96, 96, 96]
    assert [view.scale for view in views] == [(0.14, 1.0)] * 2 + [(pytest.approx(0.05), 0.14)] * 3
    assert {view.blur_probability for view in views} == {0.5}


def test_shares_that_are_named_are_used():
    views = crop_views(Augment.sela(32), parse_crops("1x32:0.5-0.9+1x32+1x16:0.2-0.3"))
    assert [view.scale for view in views] == [(0.5, 0.9), (0.08, 1.0), (0.2, 0.3)]


def test_multi_crop_needs_random_crops():
    with pytest.raises(OptionError, match=r"random crops, found crop='resize'"):
        crop_views(Augment.none(32), parse_crops("2x32"))


@pytest.mark.parametrize(("size", "small"), [(32, 16), (28, 16), (8, 8), (4, 4), (224, 112), (33, 16)])
def test_the_default_has_small_crops_of_half_the_size(size, small):
    assert default_crops(size) == [CropGroup(2, size), CropGroup(4, small)]


def test_a_network_that_takes_one_size_only_is_found_out():
    assert takes_sizes("small-resnet", 1, (32, 16, 8)) == ""
    one = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    assert "does not take images of 3 x 8 x 8" in takes_sizes(one, 3, (16, 8))
    assert takes_sizes(nn.Flatten(), 3, (4, 2)) == "12 features at 2 x 2 instead of 48"


@torch.no_grad()
def test_views_of_one_size_make_one_pass_and_keep_their_order():
    torch.manual_seed(0)
    network = Network(SmallResNet(1, (4, 8, 8)), 8, [5], projection=[8, 4], channels_in=1).eval()
    sizes = (16, 12, 16, 12, 12)
    views = [torch.randn(3, 1, size, size) for size in sizes]
    seen = []
    network.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    found = embed_views(network, views)
    assert seen == [(6, 1, 16, 16), (9, 1, 12, 12)]
    for view, embedding in zip(views, found, strict=True):
        assert torch.allclose(embedding, network(view), atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 31])
@pytest.mark.parametrize("views", [1, 3])
def test_the_loss_is_the_mean_over_views_of_the_cross_entropy(batch, views):
    torch.manual_seed(batch)
    heads = Heads(8, [3, 33], "cosine", temperature=0.1)
    embeddings = [torch.randn(batch, 8) for _ in range(views)]
    target = torch.stack([torch.randint(0, k, (batch,)) for k in heads.clusters])
    expected = torch.stack(
        [torch.stack([F.cross_entropy(heads.logits_of(h, e), target[h]) for e in embeddings]).mean() for h in range(2)]
    )
    assert torch.allclose(crop_losses(heads, embeddings, target), expected, atol=1e-5)


def test_images_without_a_label_weigh_nothing():
    torch.manual_seed(0)
    heads = Heads(8, [3], "cosine")
    embeddings = [torch.randn(5, 8) for _ in range(2)]
    target = torch.tensor([[0, -1, 2, -1, 1]])
    kept = [0, 2, 4]
    assert torch.allclose(
        crop_losses(heads, embeddings, target), crop_losses(heads, [e[kept] for e in embeddings], target[:, kept])
    )
    loss = crop_losses(heads, embeddings, torch.full((1, 5), -1))
    assert loss.tolist() == [0.0]
    loss.sum().backward()
    assert float(heads.weight.grad.abs().max()) == 0
