"""The self-check end to end: the kernels' own source behind the calls that a user's first pass makes."""

import ctypes

import numpy as np
import pytest

pytestmark = pytest.mark.plain_only


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def play(torch, simt, request):
    """A card whose kernels run on the runner: `play()`, or `play(core)` with some of its functions replaced."""
    card = request.getfixturevalue("host_card")
    as_cuda = request.getfixturevalue("as_cuda")

    def start(core=simt):
        from sela_ext.kernels import check_cases, check_jpeg

        patch = request.getfixturevalue("monkeypatch")
        patch.setattr(check_cases, "MANY_ROWS", 1601)  # more than the 6 blocks take at once
        patch.setattr(check_cases, "MANY_IMAGES", 111)
        patch.setattr(check_jpeg, "MANY_FILES", 33)
        patch.setattr(check_cases, "MANY_LARGE_IMAGES", 9)
        card.core = core
        simt.set_device(3, 2)
        return as_cuda(card)

    yield start
    simt.set_device(2, 2)


class Changed:
    """The module with one function replaced."""

    def __init__(self, simt, **functions):
        self.simt, self.functions = simt, functions
        self.__file__ = simt.__file__

    def __getattr__(self, name):
        return self.functions.get(name) or getattr(self.simt, name)


@pytest.mark.parametrize("seed", [0, 5])
def test_every_kernel_passes_in_any_order_of_threads(simt, play, seed):
    from sela_ext.kernels import self_check

    card = play()
    simt.set_schedule(seed)
    try:
        assert self_check._check(card) == ("", False)
    finally:
        simt.set_schedule(0)


def test_a_first_pass_checks_the_kernels_and_is_done_by_them(torch, simt, play):
    from sela_ext import kernels
    from sela_ext.kernels import check_cases, reference, self_check

    card = play()
    logits = torch.randn(70, 300, generator=torch.Generator().manual_seed(0))
    before = simt.statistics()["launches"]
    found = kernels.sinkhorn_pass(logits, np.zeros(300), scale=5.0, want_labels=True)
    count = sum(1 for _ in check_cases.cases(self_check.OnCard(card)))
    assert simt.statistics()["launches"] - before > count
    expected = reference.sinkhorn_pass(logits, np.zeros(300), scale=5.0, want_labels=True)
    torch.testing.assert_close(found.column_sums, expected.column_sums, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.labels, expected.labels)
    assert self_check._judged(card.place)[1].state == "passed"

    before = simt.statistics()["launches"]
    kernels.sinkhorn_pass(logits, np.zeros(300))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8))
    kernels.augment_resident(images, [3, 1], kernels.Augment.cifar(32), seed=0, epoch=0)
    assert simt.statistics()["launches"] == before + 2


def drops_the_last_row(simt):
    def sinkhorn_pass_cuda(logits, name, rows, *rest):
        simt.sinkhorn_pass_cuda(logits, name, rows - 1 if name == "bfloat16" else rows, *rest)

    return {"sinkhorn_pass_cuda": sinkhorn_pass_cuda}


def forgets_the_weights(simt):
    def sinkhorn_pass_cuda(*arguments):
        arguments = list(arguments)
        arguments[7] = 0
        simt.sinkhorn_pass_cuda(*arguments)

    return {"sinkhorn_pass_cuda": sinkhorn_pass_cuda}


def leaves_columns_of_the_last_mapping(simt):
    def sinkhorn_pass_cuda(logits, name, rows, cols, *rest):
        simt.sinkhorn_pass_cuda(logits, name, rows, cols - 1 if cols > 8192 else cols, *rest)

    return {"sinkhorn_pass_cuda": sinkhorn_pass_cuda}


def draws_of_another_view(simt):
    def augment_resident_cuda(*arguments):
        arguments = list(arguments)
        arguments[10] += 1
        simt.augment_resident_cuda(*arguments)

    return {"augment_resident_cuda": augment_resident_cuda}


def swaps_images(simt):
    def augment_resident_cuda(options, images, total, height, width, channels, *rest):
        shift = height * width * channels if channels == 1 else 0
        simt.augment_resident_cuda(options, images + shift, total - (channels == 1), height, width, channels, *rest)

    return {"augment_resident_cuda": augment_resident_cuda}


def spoils_a_sample(simt):
    def decode_jpeg_cuda(batch, upload, workspace, planes, status, stream):
        simt.decode_jpeg_cuda(batch, upload, workspace, planes, status, stream)
        (ctypes.c_uint8 * batch.plane_bytes).from_address(planes)[batch.plane_bytes // 2 + 5] ^= 1

    return {"decode_jpeg_cuda": decode_jpeg_cuda}


def launch_fails(simt):
    def sinkhorn_pass_cuda(*arguments):
        raise RuntimeError("fused_kernel (one warp): launch failed: too many resources requested for launch")

    return {"sinkhorn_pass_cuda": sinkhorn_pass_cuda}


@pytest.mark.parametrize(
    ("corruption", "words"),
    [
        (drops_the_last_row, r"bfloat16 \[131, 1\], .*: (weight|log-sum-exp of row 130): expected"),
        (forgets_the_weights, "second pass, with weights and reference: weight: expected"),
        (leaves_columns_of_the_last_mapping, r"\[67, 8193\]"),
        (draws_of_another_view, "drawn parameters: parameter"),
        (swaps_images, "28 x 28 x 1 to 28, float32, NCHW"),
        (spoils_a_sample, r"decode_planes, .*: image \d+: sample \(\d+, \d+\) of plane \d: expected"),
        (launch_fails, "found an error: fused_kernel .one warp.: launch failed: too many resources"),
    ],
)
def test_a_corrupted_kernel_is_refused_and_the_work_goes_on(torch, simt, play, monkeypatch, corruption, words):
    from sela_ext import kernels
    from sela_ext.kernels import check_cases, reference

    monkeypatch.setattr(check_cases, "COLUMNS", (1, 8193))
    monkeypatch.setattr(check_cases, "IMAGES", 5)
    play(Changed(simt, **corruption(simt)))
    logits = torch.randn(70, 300, generator=torch.Generator().manual_seed(0))
    with pytest.warns(kernels.RefusedDeviceWarning, match=words):
        found = kernels.sinkhorn_pass(logits, np.zeros(300), want_labels=True)
    before = simt.statistics()["launches"]
    expected = reference.sinkhorn_pass(logits, np.zeros(300), want_labels=True)
    assert torch.equal(found.column_sums, expected.column_sums)
    assert torch.equal(found.labels, expected.labels)
    kernels.sinkhorn_pass(logits, np.zeros(300))
    assert simt.statistics()["launches"] == before
