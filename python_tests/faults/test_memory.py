"""Memory that does not suffice is an error with words, before the work where it can be known; never an abort."""

import numpy as np
import pytest
from PIL import Image

import sela_ext
from sela_ext.assign import plan
from sela_ext.cli import main
from sela_ext.errors import ResourceError, out_of_memory
from sela_ext.kernels.jpeg import starved

MIB = 1 << 20
SMALL = [
    *("--epochs", "1", "--batch-size", "40", "--clusters", "10,10", "--image-size", "16", "--threads", "1"),
    "--no-progress",
]


def assert_told(status, printed):
    """Exit 7 and one line about memory."""
    assert status == 7, f"{status}: {printed}"
    assert printed.count("\n") == 1, printed
    assert "sela: error: memory: expected" in printed


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    path = tmp_path_factory.mktemp("logits") / "logits.npy"
    np.save(path, np.random.default_rng(0).standard_normal((40_000, 300), dtype=np.float32))
    return path


# The logits are 46 MiB, which a file of its own memory holds: from none at all to nearly enough.
@pytest.mark.parametrize("room", [1, 20, 60, 80, 100])
@pytest.mark.parametrize("options", [[], ["--balance", "exact"], ["--method", "anderson"]])
def test_assign_within_a_limit_of_memory_ends_in_order(server, logits, tmp_path, room, options):
    status, printed = server.run(
        "assign", logits, "--out", tmp_path / "labels.npy", "--threads", "2", *options, memory=room * MIB
    )
    if status == 0 and room >= 60:
        assert np.load(tmp_path / "labels.npy").shape == (40_000,)
        return
    assert_told(status, printed)
    assert not (tmp_path / "labels.npy").exists()


def test_a_limit_of_this_process_is_known_before_the_work(server, data, tmp_path):
    """The plan that every run makes counts what `ulimit -v` leaves as what is free."""
    words = ["--clusters", "150", "--heads", "1000", "--projection", "512", "--batch-size", "160"]
    status, printed = server.run("train", *data, *SMALL, *words, "--out", tmp_path / "run", memory=1500 * MIB)
    assert_told(status, printed)
    assert "GiB" in printed
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_limits_of_the_process_count_as_available_memory(tmp_path, monkeypatch):
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    (tmp_path / "self" / "statm").write_text("1000 500 300 1 0 400 0\n")
    page, unlimited = plan.resource.getpagesize(), plan.resource.RLIM_INFINITY
    limits = {plan.resource.RLIMIT_AS: unlimited, plan.resource.RLIMIT_DATA: unlimited}
    monkeypatch.setattr(plan.resource, "getrlimit", lambda kind: (limits[kind], unlimited))
    assert plan.available_memory(tmp_path, tmp_path) == 8000000 << 10
    limits[plan.resource.RLIMIT_AS] = 5000 * page
    assert plan.available_memory(tmp_path, tmp_path) == 4000 * page
    limits[plan.resource.RLIMIT_DATA] = 600 * page
    assert plan.available_memory(tmp_path, tmp_path) == 200 * page
    limits[plan.resource.RLIMIT_DATA] = 1 * page
    assert plan.available_memory(tmp_path, tmp_path) == 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of large JPEG files, one of which claims 65,000 x 65,000 pixels in 2 kB, and small ones."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(12):
        small = rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 64)).save(folder / f"small{i:02d}.jpg")
    for i in (0, 3):
        Image.new("RGB", (5000, 5000), (40 * i, 90, 20)).save(folder / f"large{i}.jpg", progressive=i == 3)
    data = bytearray((folder / "small00.jpg").read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (65_000).to_bytes(2, "big") * 2
    (folder / "claims.jpg").write_bytes(data)
    return folder


def test_an_image_that_claims_to_be_huge_is_a_bad_image_and_costs_no_memory(server, photos, tmp_path):
    words = [*("--image-size", "32", "--batch-size", "8", "--index", "off"), "--clusters", "4"]
    arguments = ["train", "--data", photos, "--out", tmp_path / "run", *SMALL, *words]
    status, printed = server.run(*arguments, memory=900 * MIB)
    assert status == 3, printed
    assert "claims.jpg" in printed
    assert "the header claims too many pixels" in printed


@pytest.mark.parametrize(("command", "room"), [("pack", 8), ("pack", 40), ("pack", 120), ("pack", 240), ("doctor", 40)])
def test_decoding_within_a_limit_of_memory_ends_in_order_or_with_a_result(server, photos, tmp_path, command, room):
    """No thread of a reader ends the process, and no image is to blame for a lack of memory.

    By commands that do without PyTorch's kernels: some of oneDNN's crash when an allocation fails.
    """
    good, out = tmp_path / "photos", ["--out", tmp_path / "pack"] if command == "pack" else []
    good.mkdir()
    for path in photos.iterdir():
        if path.name != "claims.jpg":
            (good / path.name).symlink_to(path)
    status, printed = server.run(command, good, *out, "--threads", "2", memory=room * MIB)
    if status != 0 or room < 200:
        assert status == 7, f"{status}: {printed}"
        assert printed.count("sela: error: ") == 1, printed
        assert "memory" in printed
        assert "Traceback" not in printed


def test_want_of_memory_is_told_from_damage_where_the_decoder_has_one_word_for_both(photos, monkeypatch):
    error, data = OSError("broken data stream when reading image file"), (photos / "large3.jpg").read_bytes()
    assert not starved(data, error)
    assert not starved(b"no picture", error)

    def refuse(size, kind):
        assert size == 16 * 5000 * 5000
        raise MemoryError

    monkeypatch.setattr("sela_ext.kernels.jpeg.np.empty", refuse)
    assert starved(data, error)
    assert not starved(data, OSError("image file is truncated"))


def test_training_from_python_says_it_with_the_same_error(tmp_path, monkeypatch):
    def fail(*given):
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr("sela_ext.training.loop.make_run", fail)
    with pytest.raises(ResourceError, match=r"memory: expected more .*std::bad_alloc.*use a smaller batch_size"):
        sela_ext.train(np.zeros((60, 8, 8), np.uint8), out=tmp_path / "run", clusters=5, progress=False)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_a_lack_of_memory_of_any_kind_is_one_error(error, monkeypatch, capsys):
    place = "GPU memory" if "CUDA" in str(error) else "memory"
    told = rf"^{place}: expected more than this process can have.*; use less"
    with pytest.raises(ResourceError, match=told), out_of_memory("use less"):
        raise error

    def fail(arguments):
        raise error

    monkeypatch.setattr("sela_ext.cli.program.run", fail)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 7
    assert capsys.readouterr().err.startswith(f"sela: error: {place}: expected more")


def test_other_errors_are_left_as_they_are():
    for error in (
        RuntimeError("one and one is three"),
        OSError(28, "No space left on device"),
        ValueError("bad_alloc"),
    ):
        with pytest.raises(type(error)) as caught, out_of_memory("use less"):
            raise error
        assert caught.value is error
