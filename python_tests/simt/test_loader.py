"""Batches of JPEG files whose views the kernels' own source makes, from samples that the compiled reader decodes."""

import numpy as np
import pytest

pytestmark = pytest.mark.plain_only


@pytest.fixture
def photographs(tmp_path):
    """9 JPEG files, large and small, grey and turned, and a PNG file."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(130, 171), (301, 105), (104, 104), (33, 31), (120, 160), (171, 130)] * 2):
        pixels = image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((width, height), 3)
        exif = image.Exif()
        exif[0x0112] = 6 if i in (1, 4) else 1
        if i == 7:
            pixels.save(tmp_path / f"{i:02d}.png")
        else:
            pixels.convert("L" if i == 5 else "RGB").save(tmp_path / f"{i:02d}.jpg", subsampling=i % 3, exif=exif)
    return tmp_path


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("sela", {"channels_last": True}),
        ("sela", {"exact": True, "dtype": "float16"}),
        ("aug_plus", {"dtype": "bfloat16"}),
        ("deepcluster_eval", {"exif": True}),
        ("two", {}),
    ],
)
@pytest.mark.parametrize("room", [None, 60_000])
def test_views_are_those_of_the_cpu(simt, as_cuda, host_card, monkeypatch, photographs, preset, options, room):
    torch = pytest.importorskip("torch")
    from sela_ext import Augment, Loader
    from sela_ext.data.planes_upload import Sending
    from sela_ext.kernels.check_cases import augment_difference

    augment = Augment.multi_crop((33, 12), (2, 1)) if preset == "two" else getattr(Augment, preset)(31)
    options = {"batch_size": 6, "augment": augment, "threads": 1, "seed": 3, **options}
    options["dtype"] = getattr(torch, options.get("dtype", "float32"))
    expected = list(Loader(photographs, **options).epoch(1))
    host_card.core = simt
    as_cuda(host_card)
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    if room is not None:
        monkeypatch.setattr(Sending, "room", lambda sending, rows: room)
    there = Loader(photographs, send="planes", **options)
    assert there.sending.planes
    found = list(there.epoch(1))
    for one, other in zip(found, expected, strict=True):
        for view, wanted, drawn in zip(one.views, other.views, there.views, strict=True):
            assert view.stride() == wanted.stride()
            assert augment_difference(drawn, view, wanted) is None
    simt.set_schedule(1)
    try:
        again = list(there.epoch(1))
    finally:
        simt.set_schedule(0)
    for one, other in zip(again, found, strict=True):
        assert all(torch.equal(view, wanted) for view, wanted in zip(one.views, other.views, strict=True))
