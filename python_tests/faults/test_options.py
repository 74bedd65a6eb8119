"""Options and folders that cannot be: the cases D7 to D10 of the fault list."""

import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import sela_ext
from sela_ext import Augment
from sela_ext.errors import DataError, OptionError, ResourceError, SelaError, one_line, shown
from sela_ext.finetuning.options import FinetuneOptions
from sela_ext.finetuning.options import make_options as make_finetune_options
from sela_ext.training.options import Options, check, make_options
from sela_ext.training.resolve import _shared_batch

TINY = {
    "model": "small-convnet", "image_size": 16, "epochs": 1, "batch_size": 16, "clusters": [4, 3], "projection": 0,
    "label_source": "eval", "label_passes": 1, "half_resolution": 0.0, "threads": 1, "progress": False,
}  # fmt: skip
FLAGS = [
    *("--model", "small-convnet", "--image-size", "16", "--epochs", "1", "--clusters", "2,3", "--projection", "0"),
    *("--label-source", "eval", "--label-passes", "1", "--threads", "1", "--no-progress"),
]


def images(count=40, side=12):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def tree(folder):
    """Every file and folder below a folder, with what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def events(out, kind):
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if row["event"] == kind]


# ---- D7: too few images.


def nothing(tmp_path):
    """Data without any image, by kind."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    (tmp_path / "list.txt").write_text("")
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8, 3), np.uint8))
    return [tmp_path / name for name in ("empty", "texts", "list.txt", "none.npy")]


# D7
def test_d7_no_image_is_an_error_that_says_so_and_makes_nothing(tmp_path, sela):
    for data in nothing(tmp_path):
        status, _, err = sela("train", "--data", data, "--out", tmp_path / "run", *FLAGS)
        assert (status, err.count("\n")) == (3, 1), data
        assert any(told in err for told in ("found none", "expected at least one", "found an empty file")), err
        assert str(data) in err or "shape [0, 8, 8, 3]" in err
        assert not (tmp_path / "run").exists()
    for data in (
        [],
        np.zeros((0, 8, 8), np.uint8),
        torch.zeros(0, 8, 8, dtype=torch.uint8),
        np.zeros((0, 5), np.float32),
    ):
        with pytest.raises(DataError):
            sela_ext.train(data, out=tmp_path / "run", **TINY)
    assert not (tmp_path / "run").exists()


# D7
def test_d7_one_image_is_an_error_and_two_are_enough(tmp_path):
    with pytest.raises(DataError, match="expected at least 2 images, found 1"):
        sela_ext.train(images(1), out=tmp_path / "run", **{**TINY, "clusters": "auto"})
    assert not (tmp_path / "run").exists()
    for count in (2, 3):
        result = sela_ext.train(images(count), out=tmp_path / str(count), epochs=1, threads=1, progress=False)
        assert result.labels.shape == (12, count)
        assert set(np.unique(result.labels)) <= set(range(count))
        assert np.isfinite(result.confidence).all()


# D7
def test_d7_more_clusters_than_images_are_an_error_that_says_both(tmp_path, sela):
    with pytest.raises(OptionError, match="clusters: expected at most the number of images, 40, found 41"):
        sela_ext.train(images(), out=tmp_path / "run", **{**TINY, "clusters": [4, 41]})
    np.save(tmp_path / "images.npy", images())
    flags = [*FLAGS, "--clusters", "100"]
    status, _, err = sela("train", "--data", tmp_path / "images.npy", "--out", tmp_path / "run", *flags)
    assert (status, err.count("\n")) == (2, 1)
    assert "at most the number of images, 40, found 100" in err
    assert not (tmp_path / "run").exists()
    # As many clusters as images: each has its own.
    result = sela_ext.train(images(), out=tmp_path / "run", **{**TINY, "clusters": [40], "balance": "exact"})
    assert sorted(result.labels[0].tolist()) == list(range(40))


# D7
def test_d7_fewer_images_than_a_batch_make_a_smaller_batch_and_options_json_says_why(tmp_path):
    result = sela_ext.train(images(), out=tmp_path / "run", log_every=1, **{**TINY, "batch_size": 256})
    written = json.loads((result.out / "options.json").read_text())
    assert written["options"]["batch_size"] == 40
    assert written["reasons"]["batch_size"] == "there are 40 images"
    assert [step["step"] for step in events(result.out, "step")] == [1]


# D7
def test_d7_fewer_images_than_ranks_are_an_error_that_says_both():
    four = types.SimpleNamespace(several=True, world_size=4)
    with pytest.raises(DataError, match="at least two images for each of the 4 ranks, found 7; use fewer ranks"):
        _shared_batch(7, None, 7, four)
    with pytest.raises(OptionError, match=r"batch_size: expected a multiple of the 4 ranks.*found 30"):
        _shared_batch(30, 30, 100, four)
    with pytest.raises(OptionError, match="found 3 images, batch_size 256, 4 ranks"):
        sela_ext.Loader(images(3), rank=3, world_size=4)


# D7
@pytest.mark.slow
def test_d7_fewer_images_than_ranks_end_the_program_with_one_line(tmp_path, sela):
    np.save(tmp_path / "images.npy", images(3))
    status, _, err = sela(
        "train", "--data", tmp_path / "images.npy", "--out", tmp_path / "run", *FLAGS, "--devices", "2"
    )
    assert (status, err.count("\n")) == (3, 1), err
    assert "for each of the 2 ranks, found 3" in err


# ---- D8: unknown options and wrong types.

EVERY = [(Options, spec) for spec in dataclasses.fields(Options)]
EVERY += [(FinetuneOptions, spec) for spec in dataclasses.fields(FinetuneOptions)]
MAKE = {Options: make_options, FinetuneOptions: make_finetune_options}


def of_field(field):
    return f"{field[0].__name__}.{field[1].name}"


def refused(make, name, value):
    """What is said of a value that is refused: one line, of reasonable length, with the name of the option."""
    with pytest.raises(OptionError) as caught:
        make({name: value})
    message = str(caught.value)
    assert name in message
    assert "expected" in message
    assert "found" in message
    assert "\n" not in message
    assert len(message) < 600
    return message


# D8
def test_d8_an_unknown_option_is_an_error_before_any_data_are_read(tmp_path, sela):
    absent = tmp_path / "absent"
    with pytest.raises(OptionError, match="unknown option 'epoch'; did you mean 'epochs'"):
        sela_ext.train(absent, out=tmp_path / "run", epoch=3)
    with pytest.raises(OptionError, match=r"unknown option 'zzz'$"):
        sela_ext.train(absent, out=tmp_path / "run", zzz=3)
    train = ["train", "--data", absent, "--out", tmp_path / "run"]
    for flags, told in (
        (["--epoch", "3"], "unknown option --epoch; did you mean --epochs?"),
        (["--cluster=3"], "unknown option --cluster=3; did you mean --clusters?"),
        (["--epochs", "many"], "epochs: expected a whole number >= 1 and <= 1e+06, found 'many'"),
        (["--optimizer", "adam"], "did you mean 'adamw'?"),
        (["--exact=yes"], "ignored explicit argument 'yes'"),
    ):
        status, _, err = sela(*train, *flags)
        assert (status, err.count("\n")) == (2, 1)
        assert told in err
    assert list(tmp_path.iterdir()) == []


# D8
@pytest.mark.parametrize("field", EVERY, ids=of_field)
def test_d8_the_nearest_name_and_the_nearest_choice_are_suggested(field):
    options, spec = field
    others = {one.name for one in dataclasses.fields(options)}
    wrong = spec.name[:-1] + spec.name[-1] * 2
    assert wrong not in others
    with pytest.raises(OptionError, match=rf"unknown option '{wrong}'; did you mean '(\w+)'") as caught:
        MAKE[options]({wrong: 1})
    assert f"'{spec.name}'" in str(caught.value)
    for choice in spec.metadata["choices"] or ():
        message = refused(MAKE[options], spec.name, choice + "x")
        assert f"did you mean {choice!r}?" in message


# What is no value of any option that is not "any": of a type that nobody expects.
ODD = [1 + 2j, b"3", {}, object(), np.zeros((3, 3)), [object()], "a\nb\x1b[31m", len]


# D8
@pytest.mark.parametrize("field", [one for one in EVERY if one[1].metadata["kind"] != "any"], ids=of_field)
def test_d8_values_of_a_wrong_type_are_refused_in_one_line(field):
    options, spec = field
    free_text = spec.metadata["kind"] == "str" and not spec.metadata["choices"]
    for value in ODD:
        if not (free_text and isinstance(value, str)):
            refused(MAKE[options], spec.name, value)
    kind = spec.metadata["kind"]
    others = {"bool": [0, 1, "yes", None, 0.5], "str": [0, None, True, 1.5, ["sgd"]]}
    for value in others.get(kind, [True, False, None, "many", "", list(map(str, range(3000)))]):
        if value is not None or spec.default is not None:
            refused(MAKE[options], spec.name, value)


# Options that take several kinds of values: what is none of them.
OF_MANY_KINDS = {
    "model": ["", "no-such-network", 3, [], {}, np.zeros((3, 3)), 10**400],
    "budget": ["soon", "", [], {}, b"3", np.zeros((3, 3)), object(), True],
    "marginals": ["even", 0.5, {}, [[1, 2]], np.zeros((3, 3)), ["a", "b", "c", "d"], 10**400],
    "relax": ["much", "", [], {}, True, 1 + 2j, np.zeros((3, 3)), object()],
    "size_bounds": ["wide", 1.0, [1], [1, 2, 3], {}, ["a", "b"], np.zeros((3, 3)), [True, 2]],
    "crops": ["", "many", 3, [], {}, "2x16+4x", [(2, 16.5)], np.zeros((3, 3)), list(range(2000))],
    "fixed_labels": ["absent", 3, {}, np.zeros((3, 3)), [0, 1]],
    "augment": ["blur", 3, None, [], {}, np.zeros((3, 3)), Augment],
    "label_augment": ["blur", 3, None, [], {}, np.zeros((3, 3)), Augment],
    "index": ["", 3, None, [], {}, np.zeros((3, 3))],
    "labels": ["absent", 3, {}, [0, 1], np.zeros((3, 3)), 1 + 2j],
    "classes": ["absent", 3, {}],
    "eval_data": ["absent", "", 3, {}, [], np.zeros((3, 3, 3)), object()],
    "holdout": ["some", "", [], {}, None, True, 1 + 2j, np.zeros((3, 3))],
    "devices": ["two", "", [], {}, None, True, 1.5, np.zeros((3, 3))],
    "callbacks": [3, "print", [3], {1: 2}],
    "wandb": [3, "", [], {}],
    "preset": ["cifar-10", 3, [], {}, np.zeros((3, 3)), True],
}


# D8
def test_d8_every_option_of_many_kinds_is_in_this_test():
    assert {spec.name for _, spec in EVERY if spec.metadata["kind"] == "any"} == set(OF_MANY_KINDS)


# D8
@pytest.mark.parametrize("name", list(OF_MANY_KINDS))
def test_d8_options_of_many_kinds_refuse_everything_else_in_one_line(tmp_path, name):
    of_labels = ("clusters", "label_source", "label_passes")  # which fixed labels make needless
    options = {key: value for key, value in TINY.items() if not (name == "fixed_labels" and key in of_labels)}
    for value in OF_MANY_KINDS[name]:
        with pytest.raises((OptionError, DataError)) as caught:
            sela_ext.train(images(), out=tmp_path / "run", **{**options, name: value})
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 800
        assert name in message or (name in ("labels", "classes", "fixed_labels") and "labels" in message), message
        # A network is made when everything else is settled; the folder may be there then, and nothing in it.
        assert name == "model" or not (tmp_path / "run").exists()
        assert not [path for path in (tmp_path / "run").glob("*") if path.name != ".lock"]


# ---- D9: numbers out of range.

NUMBERS = [one for one in EVERY if one[1].metadata["kind"] in ("int", "float", "ints", "floats")]
NEVER = [math.nan, math.inf, -math.inf, 10**400, -(10**400), np.float32("nan"), np.float64("inf")]


# D9
@pytest.mark.parametrize("field", NUMBERS, ids=of_field)
def test_d9_every_number_has_a_range_and_is_held_to_it(field):
    options, spec = field
    low, high, above = (spec.metadata[name] for name in ("low", "high", "above"))
    assert (low is None) != (above is None), "a smallest value, or one that all values are larger than"
    assert high is not None, "a largest value"
    whole = spec.metadata["kind"].startswith("int")
    smallest, most = low if low is not None else above, high
    step = 1 if whole else max(abs(most), 1.0) * 1e-6
    bounds = f"{'>=' if low is not None else '>'} {smallest:g} and <= {most:g}"
    for value in [*NEVER, -1, -0.5, smallest - step, most + step, *([0] if smallest > 0 or above == 0 else [])]:
        assert bounds in refused(MAKE[options], spec.name, value)
        if spec.metadata["kind"].endswith("s"):
            refused(MAKE[options], spec.name, [value])
            refused(MAKE[options], spec.name, [most, value])
    # The ends themselves are in it.
    for value in ([low] if low is not None else []) + [high]:
        check(spec, value)
    if above is not None:
        check(spec, above + step)


# Options that may be numbers, and other things: numbers that they may not be.
SOMETIMES_NUMBERS = {
    "budget": [0, -1, -0.5, "0s", "-3min", "1e400s", "99999999999999h", *NEVER],
    "marginals": [[-1.0, 1, 1, 1], [0.0] * 4, [math.nan, 1, 1, 1], [math.inf, 1, 1, 1], [1.0, 2.0], *NEVER],
    "relax": [0, -1, -0.5, *NEVER],
    "size_bounds": [[-1, 2], [0.5, 0.9], [1.5, 2], [math.nan, 2], [0.5, math.inf], [0.5, 10**400], *NEVER],
    "crops": ["0x16", "2x0", "-2x16", "99999x16", "2x99999", "2x16:0-1", "2x16:0.5-0.1", "2x16:0.1-2"],
    "holdout": [-1, -0.5, 40, 41, 1.5, 10**30, *NEVER],
    "devices": [0, -1, 0.5, 10**30, *NEVER],
}


# D9
@pytest.mark.parametrize("name", list(SOMETIMES_NUMBERS))
def test_d9_numbers_in_options_of_many_kinds_are_held_to_their_range_too(tmp_path, name):
    options = {**TINY, "clusters": 4, "heads": 2, "epochs": "auto" if name == "budget" else 1}
    for value in SOMETIMES_NUMBERS[name]:
        with pytest.raises(OptionError) as caught:
            sela_ext.train(images(), out=tmp_path / "run", **{**options, name: value})
        message = str(caught.value)
        assert message.startswith(f"{name}: expected"), message
        assert "\n" not in message
        assert len(message) < 400
        assert not (tmp_path / "run").exists()


# D9
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--lr", "0"], "lr: expected a number > 0 and <= 1000, found 0"),
        (["--lr", "-0.1"], "lr: expected a number > 0 and <= 1000, found -0.1"),
        (["--lr", "nan"], "lr: expected a number > 0 and <= 1000, found nan"),
        (["--lr", "1e400"], "lr: expected a number > 0 and <= 1000, found inf"),
        (["--epochs", "0"], "epochs: expected a whole number >= 1 and <= 1e+06, found 0"),
        (["--epochs", "1e9"], "epochs: expected a whole number >= 1 and <= 1e+06, found 1000000000.0"),
        (["--epochs", "9" * 5000], "epochs: expected a whole number >= 1 and <= 1e+06, found inf"),
        (["--batch-size", "1"], "batch_size: expected a whole number >= 2 and <= 1e+06, found 1"),
        (["--batch-size", "-64"], "batch_size: expected a whole number >= 2"),
        (["--clusters", "1"], "clusters: expected a whole number >= 2"),
        (["--clusters", "10,0"], "clusters: expected a whole number >= 2"),
        (["--clusters", "-3"], "clusters: expected a whole number >= 2"),
        (["--clusters", "99999999999999"], "clusters: expected a whole number >= 2"),
        (["--lam", "0"], "lam: expected a number > 0 and <= 1e+06, found 0"),
        (["--lam=-inf"], "lam: expected a number > 0 and <= 1e+06, found -inf"),
        (["--devices", "0"], "devices: expected"),
        (["--seed", "-1"], "seed: expected a whole number >= 0"),
    ],
    ids=lambda one: " ".join(one)[:30] if isinstance(one, list) else "",
)
def test_d9_the_program_says_the_range_and_ends_with_status_2(tmp_path, sela, flags, told):
    status, said, err = sela("train", "--data", tmp_path / "absent", "--out", tmp_path / "run", *flags)
    assert (status, said, err.count("\n")) == (2, "", 1)
    assert told in err
    assert len(err) < 300
    assert list(tmp_path.iterdir()) == []


# D8 D9
def test_errors_are_one_line_whatever_stands_in_them():
    for error in (OptionError, DataError, ResourceError):
        text = str(error("a\nb\r\n c\x1b[31m\x00\u2028d\udce9 ä日"))
        assert text == "a\\nb\\r\\n c\\x1b[31m\\x00\\u2028d\\udce9 ä日"
    assert str(SelaError()) == ""
    assert one_line("  a \t b ") == "  a \\t b "
    assert shown(10**5000).startswith("a value of type int")
    assert len(shown("x" * 10**6)) < 120
    assert len(shown(np.zeros((100, 100)))) < 120
    assert "\n" not in shown(np.zeros((3, 3)))


# ---- D10: folders that a run cannot have.


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("thread", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextlib.contextmanager
def bound_by_permissions():
    """Have this thread heed the permissions of files, which root does not: without CAP_DAC_OVERRIDE and its like."""
    if os.geteuid():
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root may write everywhere")
    library = ctypes.CDLL(None)
    header, found = _Header(0x20080522, 0), (_Capabilities * 2)()
    if library.capget(ctypes.byref(header), found):
        pytest.skip("root may write everywhere")
    before = found[0].effective
    found[0].effective = before & ~0b110
    if library.capset(ctypes.byref(header), found):
        pytest.skip("root may write everywhere")
    try:
        yield
    finally:
        found[0].effective = before
        library.capset(ctypes.byref(header), found)


@pytest.fixture
def places(tmp_path):
    """Data, and folders of all kinds that a run cannot have: name -> (out, options, error, what is told)."""
    data = tmp_path / "place" / "data"
    data.mkdir(parents=True)
    for i, image in enumerate(images(24)):
        Image.fromarray(image).save(data / f"{i:02d}.png")
    (data / "labels.txt").write_text("mine")
    here = tmp_path / "place"
    (here / "file").write_text("mine")
    full = here / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("mine")
    (full / "metrics.jsonl").write_text("of a run, perhaps")
    (here / "run").mkdir()
    (here / "run" / "labels.csv").write_text("of a run")
    closed = here / "closed"
    closed.mkdir()
    (closed / "inner").mkdir()
    (closed / "inner").chmod(0o555)
    closed.chmod(0o555)
    (here / "link").symlink_to(data)
    (here / "self").symlink_to(here / "self")
    found = {
        "not empty": (full, {}, OptionError, "expected an empty or absent folder, found .*full with 2 entries"),
        "a run": (here / "run", {}, OptionError, "set resume to continue the run in it, overwrite to replace it"),
        "foreign files": (full, {"overwrite": True}, OptionError, r"found thesis\.tex; nothing was deleted"),
        "a file": (here / "file", {}, OptionError, "expected a folder, found the file"),
        "a file, to overwrite": (here / "file", {"overwrite": True}, OptionError, "found the file"),
        "below a file": (here / "file" / "run", {}, ResourceError, "cannot write in .*run: Not a directory"),
        "the data": (data, {}, OptionError, "found .*data, which holds the data"),
        "the data, to overwrite": (data, {"overwrite": True}, OptionError, "which holds the data"),
        "the data, to resume": (data, {"resume": True}, OptionError, "which holds the data"),
        "around the data": (here, {"overwrite": True}, OptionError, "which holds the data"),
        "a link to the data": (here / "link", {"overwrite": True}, OptionError, "which holds the data"),
        "in circles": (here / "self", {}, (OptionError, ResourceError), "self"),
        "read-only": (closed / "inner", {}, ResourceError, "cannot write in .*inner: Permission denied"),
        "read-only above": (closed / "new", {}, ResourceError, "cannot write in .*new: Permission denied"),
        "a name too long": (here / ("x" * 300), {}, OptionError, "File name too long"),
        "no name": ("", {}, OptionError, "found an empty path"),
        "a null character": ("a\0b", {}, OptionError, "null"),
        "nobody's home": ("~nobody-of-this-name/run", {}, OptionError, "home directory"),
    }
    yield here, data, found
    closed.chmod(0o755)
    (closed / "inner").chmod(0o755)


# D10
def test_d10_folders_that_a_run_cannot_have_are_distinct_errors_and_nothing_is_deleted(places):
    here, data, found = places
    before = tree(here)
    told = {}
    for name, (out, more, error, message) in found.items():
        with bound_by_permissions(), pytest.raises(error, match=message) as caught:
            sela_ext.train(data, out=out, **TINY, **more)
        told[name] = str(caught.value)
        assert "\n" not in told[name]
        assert tree(here) == before, name
    # Each kind of mistake has its own words.
    kinds = [
        "not empty",
        "foreign files",
        "a file",
        "below a file",
        "the data",
        "read-only",
        "a name too long",
        "no name",
    ]
    for one, other in itertools.combinations(kinds, 2):
        assert told[one].replace(str(found[one][0]), "") != told[other].replace(str(found[other][0]), "")


# D10
def test_d10_the_program_ends_with_the_status_of_the_mistake(places, sela):
    here, data, found = places
    before = tree(here)
    for name in ("not empty", "foreign files", "a file", "the data", "read-only", "no name"):
        out, more, error, _ = found[name]
        flags = [f"--{option}" for option in more]
        with bound_by_permissions():
            status, said, err = sela("train", "--data", data, "--out", out, *FLAGS, *flags)
        assert (status, said, err.count("\n")) == (error.exit_code, "", 1), name
        assert tree(here) == before, name


# D10
def test_d10_a_run_beside_or_below_other_things_leaves_them_alone(places):
    here, data, _ = places
    before = tree(data)
    sela_ext.train(data, out=here / "new" / "deep" / "run", **TINY)
    out = data / "run"  # in the folder of the data, of which it is no part
    first = sela_ext.train(data, out=out, **TINY)
    again = sela_ext.train(data, out=out, overwrite=True, **TINY)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert {name: content for name, content in tree(data).items() if not name.startswith("run")} == before
