import gc
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from sela_ext import Augment, Loader
from sela_ext.data import ring as ring_module
from sela_ext.data.ring import TensorRing


def test_memory_is_used_again_when_nobody_holds_a_tensor():
    ring = TensorRing([(3, 5, 7)], rows=9, dtype=torch.float32)
    places = set()
    for _ in range(20):
        (images,) = ring.lend(9)
        images.fill_(1)
        places.add(images.data_ptr())
        del images
    assert len(places) == 1
    assert ring.free == 1


@pytest.mark.parametrize(
    "hold",
    [
        lambda x: x[1:2, 0],
        lambda x: x.detach(),
        lambda x: x.permute(1, 0, 2, 3).reshape(-1)[3:],
        lambda x: x.numpy(),
        lambda x: np.from_dlpack(x),
        lambda x: x.untyped_storage(),
        lambda x: (x * torch.ones((), requires_grad=True)).sum(),  # what autograd keeps for the way back
    ],
)
def test_memory_is_not_used_again_while_anybody_holds_a_part_of_it(hold):
    ring = TensorRing([(1, 4, 4)], rows=2, dtype=torch.float32)
    (images,) = ring.lend(2)
    place = images.data_ptr()
    images.fill_(7)
    held = hold(images)
    del images
    gc.collect()
    assert ring.free == 0
    (other,) = ring.lend(2)
    assert other.data_ptr() != place
    other.fill_(8)
    if isinstance(held, torch.Tensor) and held.requires_grad:
        held.backward()
    elif not isinstance(held, torch.UntypedStorage):
        assert float(held.min()) == float(held.max()) == 7
    del held
    assert ring.free == 1
    (again,) = ring.lend(2)
    assert again.data_ptr() == place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("channels_last", [False, True])
def test_tensors_are_as_asked_for_and_do_not_overlap(dtype, channels_last):
    shapes = [(3, 9, 9), (2, 1, 1), (1, 31, 33)]
    ring = TensorRing(shapes, rows=5, dtype=dtype, channels_last=channels_last)
    for rows in (5, 1, 3):
        tensors = ring.lend(rows)
        order = torch.channels_last if channels_last else torch.contiguous_format
        for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            assert tensor.dtype == dtype
            assert tuple(tensor.shape) == (rows, *shape)
            assert tensor.is_contiguous(memory_format=order)
            assert tensor.data_ptr() % 64 == 0
            assert tensor.is_leaf
            tensor.fill_(number)
        assert [float(tensor.float().mean()) for tensor in tensors] == [0, 1, 2]
        del tensor, tensors
    assert ring.free == 1


def test_views_share_one_piece_of_memory():
    ring = TensorRing([(3, 8, 8), (3, 4, 4)], rows=2, dtype=torch.float32)
    large, small = ring.lend(2)
    del large
    assert ring.free == 0
    del small
    assert ring.free == 1


def test_what_is_kept_is_limited(monkeypatch):
    ring = TensorRing([(1, 10, 10)], rows=10, dtype=torch.float32)
    held = [ring.lend(10) for _ in range(ring_module.KEPT + 5)]
    del held
    assert ring.free == ring_module.KEPT
    ring.trim()
    assert ring.free == ring_module.KEPT
    monkeypatch.setattr(ring_module, "KEPT_BYTES", 2 * ring.nbytes)
    ring.trim()
    assert ring.free == 2


def test_the_last_reference_may_die_in_another_thread():
    ring = TensorRing([(1, 4, 4)], rows=2, dtype=torch.float32)
    held = [ring.lend(2)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert ring.free == 1


def test_tensors_outlive_the_ring():
    ring = TensorRing([(1, 4, 4)], rows=2, dtype=torch.float32)
    (images,) = ring.lend(2)
    images.fill_(3)
    del ring
    gc.collect()
    assert images.sum() == 96


@pytest.mark.parametrize("ahead", [2, 3, 5])
@pytest.mark.parametrize("kind", ["array", "files"])
def test_a_loader_needs_a_few_pieces_of_memory_only(tmp_path, kind, ahead):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    data = pixels
    if kind == "files":
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / f"{i:02d}.{'jpg' if i % 2 else 'png'}")
        data = tmp_path
    loader = Loader(data, batch_size=2, augment=Augment.sela(16), threads=2, prefetch=ahead)
    places = set()
    for epoch in range(4):
        for batch in loader.epoch(epoch):
            places.add(batch.images.data_ptr())
            assert torch.isfinite(batch.images).all()
        del batch
    # Those ahead, the consumer's, and the one that it still holds when it asks for the next.
    assert 2 <= len(places) <= ahead + 2


def test_batches_that_are_kept_stay_as_they_are():
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    make = lambda: Loader(images, batch_size=4, augment=Augment.sela(8), threads=2)  # noqa: E731
    kept = list(make().epoch(0))
    copies = [batch.images.clone() for batch in make().epoch(0)]
    assert len(kept) == 16
    for batch, copy in zip(kept, copies, strict=True):
        assert torch.equal(batch.images, copy)
