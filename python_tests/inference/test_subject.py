import json
import pickle
import shutil
from urllib.error import URLError
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
import torchvision

import sela_ext
from sela_ext.data import open_source
from sela_ext.errors import CheckpointError, OptionError, ResourceError
from sela_ext.inference.subject import open_subject
from sela_ext.models import SmallResNet

QUIET = {"threads": 1, "precision": "float32"}


def images(n=6, side=40):
    return open_source(np.random.default_rng(0).integers(0, 256, size=(n, side, side, 3), dtype=np.uint8))


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run, to be damaged."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_is_opened_as_it_looked_at_its_images(run):
    subject = open_subject(run)
    prepared = subject.prepare(open_source("digits"))
    assert (subject.kind, subject.model, subject.precision) == ("run", "small-resnet", "float32")
    assert prepared.network.heads.clusters == [10, 7, 10]
    assert (prepared.plain.size, prepared.plain.crop) == (32, "resize")
    assert (prepared.probe.crop, prepared.probe.flip_probability) == ("random", 0.0)
    assert not prepared.probe.jitters
    assert open_subject(run / "network.pt").model == "small-resnet"


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("name", ["network.pt", "weights.pth"])
def test_nothing_in_a_file_is_executed(copied, capsys, name):
    with open(copied / name, "wb") as file:
        pickle.dump({"state_dict": Payload()}, file)
    subject = copied if name == "network.pt" else f"resnet18:{copied / name}"
    with pytest.raises(CheckpointError, match="a pickle of another kind"):
        open_subject(subject)
    assert "executed" not in capsys.readouterr().out


def test_damage_is_named(copied):
    weights = torch.load(copied / "network.pt", weights_only=True)
    weights["backbone"].pop("stem.0.weight")
    torch.save(weights, copied / "network.pt")
    with pytest.raises(CheckpointError, match=r"the weights do not fit small-resnet: .*stem\.0\.weight"):
        open_subject(copied)
    (copied / "network.pt").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match=r"network\.pt: expected a file written by torch\.save"):
        open_subject(copied)
    (copied / "network.pt").unlink()
    checkpoint = max((copied / "checkpoints").iterdir())
    checkpoint.write_bytes(checkpoint.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"step-.*\.ckpt: expected .* bytes"):
        open_subject(checkpoint)
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(CheckpointError, match=r"expected network.pt or a checkpoint, found neither"):
        open_subject(copied)
    (copied / "options.json").write_text(json.dumps({"options": {}}))
    with pytest.raises(CheckpointError, match=r"expected the options\.json of a run"):
        open_subject(copied)


def test_a_network_of_the_users_own_is_asked_for(copied):
    info = json.loads((copied / "options.json").read_text())
    info["resolved"]["network"] = "MyNet"
    (copied / "options.json").write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match="found 'MyNet'; pass the module that was trained as model"):
        open_subject(copied)
    found = sela_ext.embed(copied, open_source("digits").array[:9], model=SmallResNet(1), **QUIET)
    info["resolved"]["network"] = "small-resnet"
    (copied / "options.json").write_text(json.dumps(info))
    assert np.array_equal(found, sela_ext.embed(copied, open_source("digits").array[:9], **QUIET))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_under_torchvisions_names_is_loaded(tmp_path, wrapped):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=7).eval()
    state = network.state_dict()
    if wrapped:
        state = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(state, tmp_path / "weights.pth")
    found = sela_ext.embed(f"resnet18:{tmp_path / 'weights.pth'}", images(), image_size=64, **QUIET)
    network.fc = torch.nn.Identity()
    prepared = open_subject(f"resnet18:{tmp_path / 'weights.pth'}", image_size=64).prepare(images())
    views = next(iter(sela_ext.Loader(images(), augment=prepared.plain, shuffle=False, threads=1).epoch(0))).images
    with torch.no_grad():
        np.testing.assert_allclose(found, network(views).numpy(), atol=1e-4)


def test_weights_in_torchs_cache_are_used_and_others_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ResourceError, match=r"put https://.*resnet18-.*\.pth there, or allow the download"):
        open_subject("resnet18:IMAGENET1K_V1")
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "checkpoints" / weights.url.rsplit("/", 1)[-1])
    prepared = open_subject("resnet18:IMAGENET1K_V1").prepare(images())
    assert (prepared.plain.size, prepared.plain.resize_side, prepared.plain.crop) == (224, 256, "center")


def test_a_download_is_announced(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()

    def fetch(url, file, hash_prefix, progress):
        assert hash_prefix == "f37072fd"
        torch.save(state, file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    said = []
    open_subject("resnet18:IMAGENET1K_V1", download=True, say=said.append)
    assert said[0].startswith("fetching https://")


def test_a_failed_download_says_where_the_file_belongs(tmp_path, monkeypatch):
    def fetch(url, file, hash_prefix, progress):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(ResourceError, match=r"could not be fetched: .*; put the file in .*checkpoints"):
        open_subject("resnet18:IMAGENET1K_V1", download=True)


def test_weights_that_would_unpack_to_more_than_the_file_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
    with ZipFile(tmp_path / "plain.pth") as plain, ZipFile(tmp_path / "bomb.pth", "w", ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(CheckpointError, match="compressed entries"):
        open_subject(f"resnet18:{tmp_path / 'bomb.pth'}")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet18:IMAGENET9", OptionError, "expected a file of weights or one of torchvision's sets for resnet18"),
        ("resnet81:IMAGENET1K_V1", OptionError, "did you mean"),
        ("nothing", CheckpointError, "nothing: expected a run folder, a checkpoint, released weights"),
        (7, OptionError, "run: expected a run folder, .* found int"),
    ],
)
def test_what_there_is_not_is_refused(name, error, message):
    with pytest.raises(error, match=message):
        open_subject(name)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "few.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"the weights do not fit: .* tensors are not there, first"):
        open_subject(f"resnet50:{tmp_path / 'r34.pth'}")
    with pytest.raises(CheckpointError, match="tensors are not there"):
        open_subject(f"resnet18:{tmp_path / 'few.pth'}")
    with pytest.raises(CheckpointError, match="expected a mapping of names to tensors, found list"):
        open_subject(f"resnet18:{tmp_path / 'list.pth'}")


def test_random_networks_fit_the_images_and_leave_torchs_generator_alone():
    subject = open_subject("random:small-resnet", seed=4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    grey, colour = subject.prepare(open_source("digits")), subject.prepare(images())
    assert torch.equal(torch.get_rng_state(), state)
    assert (grey.network.channels_in, colour.network.channels_in) == (1, 3)
    assert (grey.plain.size, colour.plain.size) == (32, 40)
    large = open_subject("random:resnet18").prepare(images(3, side=80))
    assert (large.plain.size, large.plain.crop) == (224, "center")
    again = open_subject("random:small-resnet", seed=4).prepare(images())
    assert all(
        torch.equal(one, other)
        for one, other in zip(colour.network.state_dict().values(), again.network.state_dict().values(), strict=True)
    )


def test_files_are_read_as_the_run_read_them(copied, monkeypatch):
    from sela_ext.inference import passes

    info = json.loads((copied / "options.json").read_text())
    info["options"].update(exact=True, exif=True)
    (copied / "options.json").write_text(json.dumps(info))
    asked = []
    original = passes.embed_images

    def keep(*given, exact=False, exif=False, **options):
        asked.append((exact, exif))
        return original(*given, **options)

    monkeypatch.setattr(passes, "embed_images", keep)
    sela_ext.embed(copied, open_source("digits").array[:9], **QUIET)
    sela_ext.embed("random:small-resnet", open_source("digits").array[:9], **QUIET)
    assert asked[0] == (True, True)
    assert set(asked[1:]) == {(False, False)}
