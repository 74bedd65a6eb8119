"""Nothing hangs, nothing grows: strange files, files that vanish, few file handles, forks, long runs, many paths."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sela_ext import Augment, Loader
from sela_ext.data import Source, open_source
from sela_ext.errors import DataError, ResourceError

PHOTOS = Path(os.environ.get("SELA_DATA_DIR", Path(__file__).parents[2].parent / "shared" / "data"))
# Of the programs that tests start.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def fill_folder(root, count, side=80):
    """JPEG files, and every fourth a PNG."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        image = small.resize((side + i % 50, side + i % 37), Image.Resampling.BICUBIC)
        image.save(root / f"{i:04d}.{'png' if i % 4 == 3 else 'jpg'}")
    return root


def run(program, *arguments, cwd, timeout=120):
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=cwd,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(60)
@pytest.mark.parametrize("threads", [1, 2])
def test_pipes_devices_sockets_and_folders_in_a_list_are_bad_images_and_never_block(tmp_path, threads):
    fill_folder(tmp_path, 20)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    strange = [tmp_path / "pipe.jpg", tmp_path / "folder.jpg", tmp_path / "loop.jpg", tmp_path / "gone.jpg"]
    strange += [Path(name) for name in ("/dev/zero", "/dev/random", "/dev/tty") if os.path.exists(name)]
    good = sorted(tmp_path.glob("0*"))
    paths = [path for pair in zip(good, [*strange, *good], strict=False) for path in pair]
    expected = [i for i, path in enumerate(paths) if path not in strange]
    loader = Loader(
        paths, batch_size=5, augment=Augment.sela(16), threads=threads, on_bad_image="skip", max_bad_fraction=0.5
    )
    found = sorted(int(i) for batch in loader.epoch(0) for i in batch.index)
    assert found == expected
    assert sorted(name for _, name, _ in loader.bad_images) == sorted(map(str, strange))
    with pytest.raises(DataError, match="not a regular file"):
        list(Loader([tmp_path / "pipe.jpg"], threads=threads).epoch(0))


def test_a_file_of_absurd_size_is_refused_before_it_is_read(tmp_path):
    fill_folder(tmp_path, 3)
    with open(tmp_path / "vast.jpg", "wb") as file:
        file.write(b"\xff\xd8\xff\xe0")
        file.truncate(1 << 42)  # takes no room
    source = open_source(tmp_path)
    at = source.names.index("vast.jpg")
    for read in (source.read, source.encoded_bytes):
        with pytest.raises(DataError, match=r"vast\.jpg: expected an image file of at most 1,073,741,824 bytes, found"):
            read(at)
    loader = Loader(tmp_path, batch_size=2, augment=Augment.sela(16), on_bad_image="skip", max_bad_fraction=0.5)
    assert sum(len(batch.index) for batch in loader.epoch(0)) == 3
    assert [name for _, name, _ in loader.bad_images] == ["vast.jpg"]


@pytest.mark.timeout(60)
def test_files_that_vanish_or_become_pipes_meanwhile_are_bad_images(tmp_path):
    fill_folder(tmp_path, 40)
    loader = Loader(
        tmp_path, batch_size=2, shuffle=False, augment=Augment.sela(16), threads=2, on_bad_image="skip",
        max_bad_fraction=0.5,
    )  # fmt: skip
    seen = []
    for batch in loader.epoch(0):
        seen += batch.index.tolist()
        if batch.position == 4:
            for i in (30, 31, 37):
                next(tmp_path.glob(f"{i:04d}.*")).unlink()
            (tmp_path / "0035.png").unlink()
            os.mkfifo(tmp_path / "0035.png")
    assert seen == [i for i in range(40) if i not in (30, 31, 35, 37)]
    assert [index for index, _, _ in loader.bad_images] == [30, 31, 35, 37]


FEW_HANDLES = """
import os, resource, sys
import numpy as np
from PIL import Image
from sela_ext import Augment, Loader
Image.init()
loader = Loader(sys.argv[1], batch_size=8, augment=Augment.sela(32), threads=4)
expected = {int(i): x.clone() for b in loader.epoch(1) for i, x in zip(b.index, b.images)}
used = len(os.listdir("/proc/self/fd"))
# One handle for each thread of the reader and of the fallback, and one to spare.
resource.setrlimit(resource.RLIMIT_NOFILE, (used + 9, used + 9))
for epoch in range(3):
    for b in loader.epoch(1):
        assert len(os.listdir("/proc/self/fd")) <= used + 10
        for i, x in zip(b.index, b.images):
            assert (expected[int(i)] == x).all()
assert len(os.listdir("/proc/self/fd")) <= used + 1
print("done")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_few_file_handles_are_enough(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    fill_folder(folder, 120)
    assert run(FEW_HANDLES, folder, cwd=tmp_path) == "done\n"


def test_no_file_handle_left_is_an_error_about_handles_and_not_a_bad_image(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")

    def refuse(*arguments, **options):
        raise OSError(24, "Too many open files")

    loader = Loader(tmp_path, on_bad_image="skip", max_bad_fraction=1.0)
    monkeypatch.setattr("sela_ext.data.safe_files.open_regular", refuse)
    with pytest.raises(ResourceError, match=r"a\.png: cannot be read: Too many open files; raise the limit"):
        list(loader.epoch(0))
    assert loader.bad_images == []


class Odd(Source):
    """A source of somebody else's, whose errors are its own."""

    channels = 3

    def __init__(self, parallel):
        self.parallel_reads = parallel

    def __len__(self):
        return 12

    @property
    def names(self):
        return [f"odd {i}" for i in range(12)]

    def read(self, index):
        if index == 3:
            raise KeyError("no such\nrecord")
        if index == 5:
            return np.zeros((4, 4), np.uint8)
        if index == 7:
            return np.zeros((4, 4, 3), np.float32)
        if index == 8:
            return None
        return np.full((4, 4, 3), index, np.uint8)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_source_may_raise_or_return_anything(parallel):
    loader = Loader(Odd(parallel), batch_size=5, threads=2, on_bad_image="skip", max_bad_fraction=0.5)
    assert sorted(int(i) for batch in loader.epoch(0) for i in batch.index) == [0, 1, 2, 4, 6, 9, 10, 11]
    reasons = {index: reason for index, _, reason in loader.bad_images}
    assert reasons[3] == "odd 3: cannot be read: KeyError: 'no such\\nrecord'"
    assert reasons[5] == "odd 5: expected pixels uint8 [H, W, 3], found uint8 [4, 4]"
    assert reasons[7] == "odd 7: expected pixels uint8 [H, W, 3], found float32 [4, 4, 3]"
    assert reasons[8] == "odd 8: expected pixels uint8 [H, W, 3], found NoneType []"
    with pytest.raises(DataError, match=r"odd 3: cannot be read: KeyError"):
        list(Loader(Odd(parallel), shuffle=False, batch_size=4).epoch(0))


@pytest.mark.parametrize("prefetch", [1, 4])
def test_an_image_found_bad_is_left_out_of_batches_that_were_begun_before(prefetch):
    class Moody(Odd):
        reads = 0

        def read(self, index):
            self.reads += index == 3
            if index == 3 and self.reads > 1:
                return np.zeros((4, 4, 3), np.uint8)
            return super().read(index)

    loader = Loader(Moody(False), batch_size=2, prefetch=prefetch, on_bad_image="skip", max_bad_fraction=0.5)
    batches = list(loader.epoch(0, order=[3, 0, 3, 1, 2, 3]))
    assert [batch.index.tolist() for batch in batches] == [[0], [1], [2]]
    assert len(loader.bad_images) == 1


def test_running_out_of_memory_is_no_bad_image():
    class Large(Odd):
        def read(self, index):
            raise MemoryError

    loader = Loader(Large(True), threads=2, on_bad_image="skip", max_bad_fraction=1.0)
    with pytest.raises(MemoryError):
        list(loader.epoch(0))


FORK = """
import os, sys
from sela_ext import Augment, Loader
loader = Loader(sys.argv[1], batch_size=8, augment=Augment.sela(16), threads=2)
expected = [float(b.images.double().sum()) for b in loader.epoch(2)]
child = os.fork()
if child == 0:
    found = [float(b.images.double().sum()) for b in loader.epoch(2)]
    os._exit(0 if found == expected else 1)
assert os.waitpid(child, 0)[1] == 0
assert [float(b.images.double().sum()) for b in loader.epoch(2)] == expected
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_loader_works_in_a_forked_process(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    fill_folder(folder, 30)
    assert run(FORK, folder, cwd=tmp_path, timeout=60) == "done\n"


def test_a_closed_loader_starts_again(tmp_path):
    fill_folder(tmp_path, 10)
    loader = Loader(tmp_path, augment=Augment.sela(16))
    (first,) = loader.epoch(0)
    loader.close()
    loader.close()
    (again,) = loader.epoch(0)
    assert torch.equal(first.images, again.images)


def test_leaving_epochs_early_again_and_again_leaves_nothing(tmp_path):
    fill_folder(tmp_path, 40)
    loader = Loader(tmp_path, batch_size=4, augment=Augment.sela(16), threads=2)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for epoch in range(20):
        batches = loader.epoch(epoch)
        next(batches)
        if epoch % 2:
            next(batches)
        batches.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= files + 2  # the index's file


FLAT = """
import gc, os, sys
from pathlib import Path
from sela_ext import Augment, Loader

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

folder, pattern, epochs, settled, batch, side = sys.argv[1:]
paths = sorted(Path(folder).glob(pattern))
loader = Loader(paths, batch_size=int(batch), augment=Augment.sela(int(side)), threads=2)
sizes = []
for epoch in range(int(epochs)):
    for b in loader.epoch(epoch):
        pass
    del b
    sizes.append(resident())
print(max(sizes[int(settled):]) / sizes[int(settled) - 1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_is_flat_from_the_fourth_epoch_on(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    fill_folder(folder, 60, side=130)
    assert float(run(FLAT, folder, "*.*", 24, 4, 16, 96, cwd=tmp_path)) < 1.02


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_is_flat_over_fifty_epochs_of_photographs(tmp_path):
    folder, pattern = PHOTOS, "*.JPEG"
    if not list(PHOTOS.glob(pattern)):
        folder, pattern = tmp_path / "images", "*.jpg"
        folder.mkdir()
        fill_folder(folder, 250, side=420)
    assert float(run(FLAT, folder, pattern, 50, 2, 32, 224, cwd=tmp_path, timeout=1100)) < 1.02


MILLION = """
import os, sys, time
from pathlib import Path
import torch
from sela_ext.data import Augment, Loader, open_source

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

root = sys.argv[1]
image = Path(root) / "a.jpg"
warm = Loader([image] * 2, batch_size=2, augment=Augment.sela(224))
list(warm.epoch(0))
paths = [f"{root}/n{i % 1000:08d}/../a.jpg" for i in range(1_000_000)]
before, began = resident(), time.process_time()
loader = Loader(paths, batch_size=64, augment=Augment.sela(224), threads=2)
batches = loader.epoch(0)
next(batches)
seconds, grown = time.process_time() - began, resident() - before
batches.close()
print(seconds, grown / 2**20)
assert len(loader) == 15625
assert loader.source.name(999_999) == paths[999_999]
"""


def test_a_million_paths_start_in_five_seconds_and_300_mb(tmp_path):
    for i in range(1000):
        (tmp_path / f"n{i:08d}").mkdir()
    Image.new("RGB", (40, 30), (1, 2, 3)).save(tmp_path / "a.jpg")
    seconds, megabytes = map(float, run(MILLION, tmp_path, cwd=tmp_path).split())
    assert seconds < 5
    assert megabytes < 300


def test_listing_many_files_takes_little_time_for_each(tmp_path):
    for group in range(20):
        (tmp_path / f"{group:02d}").mkdir()
        for i in range(1000):
            (tmp_path / f"{group:02d}" / f"{i:05d}.jpg").touch()
    began = time.process_time()
    source = open_source(tmp_path)
    seconds = time.process_time() - began
    assert len(source) == 20_000
    assert seconds < 1  # 50 s for a million
    assert source.name(19_999) == "19/00999.jpg"
