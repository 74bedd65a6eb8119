import json

import numpy as np
import pytest

import sela_ext
from sela_ext.cli import main
from sela_ext.data import Augment
from sela_ext.errors import OptionError
from sela_ext.training.config import merge, read_config

SHORT = {"epochs": 1, "threads": 1, "progress": False, "device": "cpu", "precision": "float32"}
# Of a run and not of what is learnt, or of the machine's room at that moment.
OF_ONE_RUN = ("progress", "overwrite", "resume")


@pytest.fixture
def written(tmp_path):
    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def images(n=40, size=12, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def said(run):
    return json.loads((run / "options.json").read_text())


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("lr: 1e-3", "lr", 0.001),
        ("label-tol: 1.0E-2", "label_tol", 0.01),
        ("clusters: 10,128", "clusters", [10, 128]),
        ("clusters: [10, 128]", "clusters", [10, 128]),
        ("clusters:\n- 10\n- 128", "clusters", [10, 128]),
        ("nesterov: no", "nesterov", False),
        ("resume: true", "resume", True),
        ("index: off", "index", "off"),
        ("imbalance: none", "imbalance", "none"),
        ("marginals: estimated", "marginals", "estimated"),
        ("marginals: [1, 2, .5]", "marginals", [1, 2, 0.5]),
        ("holdout: 0.1", "holdout", 0.1),
        ("budget: 10min", "budget", "10min"),
        ("budget:", "budget", None),
        ("model: 'resnet18'", "model", "resnet18"),
        ("crops: 2x160+4x96", "crops", "2x160+4x96"),
        ("wandb: true", "wandb", True),
        ("epochs: auto", "epochs", "auto"),
        ("data: 2024", "data", "2024"),
        ("data: [a.png, b.png]", "data", ["a.png", "b.png"]),
    ],
)
def test_values_are_read_as_on_the_command_line(written, line, name, value):
    found = read_config(written(f"# a comment\n---\n{line}\n")).options
    assert found == {name: value}
    assert type(found[name]) is type(value)


def test_json_says_the_same_as_yaml(written):
    expected = {"data": "digits", "epochs": 3, "lr": 0.1, "size_bounds": [0.5, 2], "nesterov": False}
    assert read_config(written(json.dumps(expected, indent=2), "run.json")).options == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: digits\nepoch: 3", ":2: unknown option 'epoch'; did you mean epochs?"),
        ("data: digits\n\ncallbacks: x", ":3: unknown option 'callbacks'"),
        ("epochs: three", ":1: epochs: expected a whole number >= 1 and <= 1e.06, found 'three'"),
        ("epochs: '3'", ":1: epochs: expected a whole number"),
        ("seed: 0\nlr: -1", ":2: lr: expected a number > 0"),
        ("method: sella", ":1: method: expected one of .* did you mean 'sela'"),
        ("epochs: 3\nseed: 1\nepochs: 4", ":3: expected 'epochs' once, found it in line 1 too"),
        ("label-tol: 1\nlabel_tol: 1", ":2: expected label_tol once, found it in line 1 too"),
        ("data: [digits\nepochs: 3", ":2: expected YAML"),
        ("\tdata: digits", ":1: expected YAML"),
        ("- digits", ":1: expected lines such as epochs: 50"),
        ("digits", ":1: expected lines such as epochs: 50, found 'digits'"),
        ("data: {path: digits}", ":1: data: expected a value or a list of values"),
        ("data:", ":1: data: expected a path, found None"),
        ("[1, 2]: 3", ":1: expected the name of an option"),
        ('{"data": "digits",\n "epoch": 3}', ":2: unknown option 'epoch'; did you mean epochs?"),
        ('{"epochs": 3,\n "epochs": 4}', ":2: expected 'epochs' once"),
        ('{"epochs": 3,\n "seed" 4}', ":2: expected JSON: .* .column 9."),
        ("x" * (1 << 20) + "y", "at most 1048576 bytes"),
    ],
)
def test_mistakes_name_file_and_line(written, text, message):
    path = written(text)
    with pytest.raises(OptionError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value) or "1048576" in message
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        'data: !!python/object/apply:os.system ["touch {out}"]',
        "data: !!python/name:os.system",
        "epochs: !!python/object/new:int [3]",
        "!!python/object/apply:os.system ['touch {out}']",
        "data: !!binary aGVsbG8=",
        "data: !own digits",
        "clusters: !!set {1, 2}",
    ],
)
def test_tags_are_refused_and_nothing_is_built(written, tmp_path, text):
    with pytest.raises(OptionError, match="expected"):
        read_config(written(text.replace("{out}", str(tmp_path / "made"))))
    assert not (tmp_path / "made").exists()


def test_many_aliases_and_deep_nesting_take_no_memory(written):
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    with pytest.raises(OptionError):
        read_config(written("\n".join(lines)))
    with pytest.raises(OptionError):
        read_config(written("clusters: " + "[" * 5000 + "]" * 5000))


def test_an_empty_file_says_nothing(written):
    assert read_config(written("# nothing yet\n")).options == {}


def test_the_caller_goes_before_the_file_and_the_file_before_the_preset(written, tmp_path):
    config = written("data: digits\npreset: digits\nlr: 0.125\nepochs: 3\n")
    plan = tmp_path / "x"
    result = sela_ext.train(config=config, out=plan, **SHORT)
    found = said(result.out)
    assert found["options"]["epochs"] == 1  # the caller's
    assert found["options"]["lr"] == 0.125  # the file's
    assert found["options"]["preset"] == "digits"
    from sela_ext.training.presets import PRESETS

    preset = PRESETS["digits"].options
    assert {name: found["options"][name] for name in preset if name not in ("lr", "epochs", "precision")} == {
        name: value for name, value in preset.items() if name not in ("lr", "epochs", "precision")
    }
    assert found["options"]["data"] == "digits"


def test_data_and_out_may_come_from_the_file_alone(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", images())
    config = written("data: a.npy\nout: runs/x\nepochs: 1\nthreads: 1\nheads: 2\nclusters: 4\nprogress: false\n")
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", str(config)])
    assert caught.value.code == 0
    assert (tmp_path / "runs/x/labels.csv").exists()


def test_without_data_or_out_it_says_what_is_missing(written):
    with pytest.raises(OptionError, match="data: expected images"):
        sela_ext.train(config=written("epochs: 1"), out="x")
    with pytest.raises(OptionError, match="out: expected a run folder"):
        sela_ext.train(config=written("data: digits"))


VECTORS = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
RUNS = {
    "images": (images(), {"clusters": 4, "heads": 2}),
    "the fast recipe's own heads": (images(60), {}),
    "defaults that were asked for": (images(), {"label_tol": 1e-4, "label_spacing": "quadratic", "init": "random"}),
    "an augmentation by its fields": (images(), {"augment": Augment.cifar(16), "clusters": 3, "heads": 1}),
    "a preset": (images(), {"preset": "sela-v2-small", "clusters": 4, "heads": 2}),
    "sela-v2": (images(), {"method": "sela-v2", "clusters": 4, "heads": 2}),
    "kmeans": (images(), {"method": "kmeans", "clusters": 4}),
    "deepcluster": (images(), {"method": "deepcluster", "clusters": 4}),
    "vectors": (VECTORS, {"clusters": 5}),
    "adamw": (images(), {"optimizer": "adamw", "lr_schedule": "onecycle", "clusters": 4, "heads": 1}),
    "a budget": (images(), {"budget": "1s", "clusters": 4, "heads": 1}),
}


@pytest.mark.parametrize("name", RUNS)
def test_options_json_repeats_its_run(tmp_path, name):
    data, options = RUNS[name]
    np.save(tmp_path / "data.npy", data)
    short = {key: value for key, value in SHORT.items() if not ("budget" in options and key == "epochs")}
    first = sela_ext.train(tmp_path / "data.npy", out=tmp_path / "x", **short, **options)
    again = sela_ext.train(config=tmp_path / "x/options.json", out=tmp_path / "y", progress=False)
    old, new = said(first.out), said(again.out)
    assert {**old["options"], "progress": None} == {**new["options"], "progress": None}
    assert old["reasons"] == new["reasons"]
    assert old["given"] == new["given"]
    if "budget" not in options:
        assert np.array_equal(first.labels, again.labels)


def test_what_was_auto_is_taken_as_it_was_even_where_this_machine_would_choose_otherwise(tmp_path):
    np.save(tmp_path / "data.npy", images())
    sela_ext.train(tmp_path / "data.npy", out=tmp_path / "x", clusters=4, **SHORT)
    content = said(tmp_path / "x")
    content["options"].update(model="small-convnet", lr=0.0625)
    content["reasons"].update(model="another machine's reason")
    (tmp_path / "other.json").write_text(json.dumps(content))
    again = said(sela_ext.train(config=tmp_path / "other.json", out=tmp_path / "y").out)
    assert again["options"]["model"] == "small-convnet"
    assert again["options"]["lr"] == 0.0625
    assert again["reasons"]["model"] == "another machine's reason"


def test_what_was_auto_is_chosen_anew_beside_other_options(tmp_path):
    np.save(tmp_path / "data.npy", images())
    sela_ext.train(tmp_path / "data.npy", out=tmp_path / "x", clusters=4, **SHORT)
    config = read_config(tmp_path / "x/options.json")
    assert "label_passes" in config.kept.values
    assert merge(config, None, "y", {"seed": 3})[3].values == config.kept.values
    assert merge(config, None, "y", {"epochs": 1})[3].values == config.kept.values  # the same as it was
    assert not merge(config, None, "y", {"epochs": 7})[3].values
    assert not merge(config, "elsewhere", "y", {})[3].values
    other = said(sela_ext.train(config=tmp_path / "x/options.json", out=tmp_path / "y", epochs=3).out)
    assert other["options"]["label_passes"] == 3
    assert other["options"]["clusters"] == said(tmp_path / "x")["options"]["clusters"]


def test_a_run_of_an_array_says_that_data_must_be_given(tmp_path):
    sela_ext.train(images(), out=tmp_path / "x", clusters=4, heads=1, **SHORT)
    with pytest.raises(OptionError, match=r"data: expected a path or a value .* came from memory; give data as well"):
        sela_ext.train(config=tmp_path / "x/options.json", out=tmp_path / "y")
    again = sela_ext.train(images(), config=tmp_path / "x/options.json", out=tmp_path / "y")
    assert np.array_equal(again.labels[0] >= 0, np.ones(40, bool))


def test_an_older_options_json_without_what_was_given_is_read(tmp_path):
    np.save(tmp_path / "data.npy", images())
    sela_ext.train(tmp_path / "data.npy", out=tmp_path / "x", clusters=4, lam=10.0, **SHORT)
    content = said(tmp_path / "x")
    del content["given"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    found = read_config(tmp_path / "old.json").options
    assert found["lam"] == 10.0
    assert found["clusters"] == content["options"]["clusters"]


def test_a_config_resumes_its_run(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", images())
    config = written("data: a.npy\nout: x\nepochs: 2\nthreads: 1\nheads: 1\nclusters: 4\nprogress: false\n")
    first = sela_ext.train(config=config)
    again = sela_ext.train(config=config, resume=True)
    assert np.array_equal(first.labels, again.labels)
