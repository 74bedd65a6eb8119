import numpy as np
import pytest
import torch
from PIL import Image

import sela_ext
from sela_ext.data import digits_split, open_source
from sela_ext.errors import CheckpointError, DataError, OptionError
from sela_ext.models import Network, SmallResNet

QUIET = {"threads": 1, "precision": "float32"}


def test_images_of_the_run_get_the_labels_that_it_left(trained):
    found = sela_ext.predict(trained, "digits", **QUIET)
    assert found.dtype == np.int32
    assert found.shape == trained.labels.shape
    _, held = digits_split()
    # Held-out images were labelled just so; trained ones by the solve, of which potentials are the whole state.
    assert np.mean(found[:, held] == trained.labels[:, held]) > 0.995
    assert np.mean(found == trained.labels) > 0.99


def test_a_label_is_the_largest_of_scaled_logits_and_potentials(trained):
    found = sela_ext.predict(trained.out, "digits", **QUIET)
    saved = torch.load(trained.out / "network.pt", weights_only=True)
    features = torch.from_numpy(sela_ext.embed(trained.out, "digits", **QUIET))
    network = trained.network.cpu().eval()
    with torch.no_grad():
        for head, potential in enumerate(saved["potentials"]):
            logits = network.heads.logits_of(head, network.projection(features))
            expected = (saved["lam"] * logits.double() + potential).argmax(1).numpy()
            assert np.mean(found[head] == expected) > 0.998


def test_one_head_may_be_asked_for(trained):
    everything = sela_ext.predict(trained.out, "digits", **QUIET)
    assert np.array_equal(sela_ext.predict(trained.out, "digits", head=1, **QUIET), everything[1])
    assert np.array_equal(sela_ext.predict(trained.out, "digits", head="best", **QUIET), everything[trained.head])


def test_features_do_not_depend_on_batches_and_belong_to_their_images(run):
    images = open_source("digits").array[:101]
    whole = sela_ext.embed(run, images, batch_size=101, **QUIET)
    assert whole.dtype == np.float32
    assert whole.shape == (101, 128)
    np.testing.assert_allclose(sela_ext.embed(run, images, batch_size=16, **QUIET), whole, atol=2e-5)
    order = np.random.default_rng(0).permutation(101)
    np.testing.assert_allclose(sela_ext.embed(run, images[order], **QUIET), whole[order], atol=2e-5)


def test_results_are_of_the_kind_that_came_in(run):
    images = torch.from_numpy(open_source("digits").array[:31].copy())
    assert isinstance(sela_ext.embed(run, images, **QUIET), torch.Tensor)
    labels = sela_ext.predict(run, images, head=0, **QUIET)
    assert isinstance(labels, torch.Tensor)
    assert labels.dtype == torch.int32


def test_unreadable_images_are_marked(tmp_path):
    for number in range(4):
        Image.fromarray(open_source("digits").array[number, :, :, 0]).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    torch.manual_seed(0)
    network = Network(SmallResNet(3), 128, [4, 3])  # files are read as colour images
    with pytest.raises(DataError, match=r"2\.png"):
        sela_ext.predict(network, tmp_path, **QUIET)
    labels = sela_ext.predict(network, tmp_path, on_bad_image="skip", **QUIET)
    assert (labels[:, 2] == -1).all()
    assert (labels[:, [0, 1, 3]] >= 0).all()
    features = sela_ext.embed(network, tmp_path, on_bad_image="skip", **QUIET)
    assert np.isnan(features[2]).all()
    assert np.isfinite(features[[0, 1, 3]]).all()


@pytest.mark.parametrize(
    ("subject", "head", "error", "message"),
    [
        (None, 3, OptionError, r"head: expected best or a number in 0 \.\. 2, found 3"),
        (None, -1, OptionError, "head: expected best"),
        (None, "first", OptionError, "head: expected best .* found 'first'"),
        ("random:small-resnet", None, CheckpointError, "expected a network with cluster heads, found none; use embed"),
        ("nowhere", None, CheckpointError, "nowhere: expected a run folder, a checkpoint"),
    ],
)
def test_heads_that_there_are_not_are_refused(run, subject, head, error, message):
    with pytest.raises(error, match=message):
        sela_ext.predict(subject or run, open_source("digits").array[:9], head=head, **QUIET)


def test_an_unfinished_run_labels_by_what_the_network_finds_most_likely(run, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "network.pt").unlink()
    stale = tmp_path / "run" / "checkpoints" / "step-000000000099.ckpt.partial"
    stale.touch()
    images = open_source("digits").array[:50]
    labels = sela_ext.predict(tmp_path / "run", images, **QUIET)
    assert labels.shape == (3, 50)
    assert (labels >= 0).all()
    assert stale.exists()  # whoever writes it may still be at work
    with pytest.raises(OptionError, match="does not say which is best"):
        sela_ext.predict(tmp_path / "run", images, head="best", **QUIET)
