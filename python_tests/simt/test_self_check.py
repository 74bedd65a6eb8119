"""The self-check end to end: the kernels' own source behind the calls that a user's first pass makes."""

import ctypes
import re

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


def at(address, kind):
    """One number at an address."""
    return np.frombuffer((ctypes.c_char * np.dtype(kind).itemsize).from_address(address), kind)


def after(function, spoil):
    """A corruption: a function of the module, and what is then done to its outputs, given its arguments."""

    def functions(simt):
        def changed(*arguments):
            getattr(simt, function)(*arguments)
            spoil(*arguments)

        return {function: changed}

    return functions


def before(function, change):
    """A corruption: a function of the module with changed arguments."""

    def functions(simt):
        def changed(*arguments):
            arguments = list(arguments)
            change(arguments)
            getattr(simt, function)(*arguments)

        return {function: changed}

    return functions


def value_of_a_candidate(*arguments):
    at(arguments[-2], np.float32)[:] += 0.01


def column_of_a_candidate(*arguments):
    at(arguments[-3], np.int32)[:] += 1


def maxima_of_stored_rows(arguments):
    if arguments[22]:
        arguments[23] *= 1.01


def bit_of_a_stored_value(*arguments):
    at(arguments[7], np.uint16)[:] ^= 1


def entries_too_far_down(*arguments):
    at(arguments[10], np.int64)[:] += 1


def value_of_a_list(*arguments):
    at(arguments[17], np.float32)[:] += 0.5


def loss_of_a_label(*arguments):
    at(arguments[19], np.float32)[:] += 0.5


def last_of_many_lists(*arguments):
    if arguments[2] == 1601 and not arguments[10]:
        at(arguments[19] + 4 * 1600, np.float32)[:] += 0.5


def smallest_loss(*arguments):
    at(arguments[10], np.float32)[:] = -1.0


def weight_of_single_rows(*arguments):
    at(arguments[4], np.int64)[:] += int(arguments[0][7] / 8)


def value_of_a_kept_entry(*arguments):
    at(arguments[6], np.float32)[:] += 0.25


def newton_sum(*arguments):
    at(arguments[3][0], np.int64)[:] += int(arguments[0][7] / 64)


def newton_sum_of_many(*arguments):
    if arguments[0][5] == 5:
        newton_sum(*arguments)


def newton_diagonal(*arguments):
    at(arguments[3][0] + 8 * arguments[0][5], np.int64)[:] += int(arguments[0][7] / 64)


def newton_objective(*arguments):
    at(arguments[3][1], np.float64)[:] += 0.125


def newton_plan(*arguments):
    at(arguments[3][2], np.float32)[:] += 1e-3


def newton_product(*arguments):
    at(arguments[3][0], np.int64)[:] += int(arguments[0][7]) >> 10


def following_point(*arguments):
    at(arguments[2] + 8 * (arguments[6] - 1), np.float64)[:] += 1e-2


def drawn_parameter(*arguments):
    at(arguments[8] + 4, np.uint8)[:] ^= 1


def pixel_of_many(*arguments):
    if arguments[7] == 111:
        at(arguments[13] + 2 * (111 * 48 - 1), np.uint16)[:] ^= 0x4000


def view(arguments):
    arguments[15] += 1


def pixel_after_tones(*arguments):
    if arguments[12][1]:
        at(arguments[20] + 40, np.uint16)[:] ^= 0x4000


def pixel_of_a_crop(*arguments):
    if arguments[4]:
        at(arguments[20] + 40, np.uint16)[:] ^= 0x4000


def exactness(arguments):
    arguments[6] = not arguments[6]


def sample_of_many(batch, upload, workspace, planes, status, stream):
    if batch.image_count == 33:
        place = batch.images()[32]["planes"][0]["offset"]
        at(planes + place, np.uint8)[:] ^= 1


def status_of_a_file(batch, upload, workspace, planes, status, stream):
    at(status + 4, np.int32)[:] = 1


CORRUPTIONS = [
    ("candidates of", after("sinkhorn_candidates_cuda", value_of_a_candidate), r"log p of the candidate in row \d+"),
    (
        "candidates of",
        after("sinkhorn_candidates_cuda", column_of_a_candidate),
        r"candidates?( in row \d+|: expected rows)",
    ),
    ("candidates of float16", before("sinkhorn_pass_cuda", maxima_of_stored_rows), None),
    (
        "candidates of float32 [131, 31] stored in",
        before("sinkhorn_pass_cuda", maxima_of_stored_rows),
        "stored in fixed16: (with a reference: )?(weight|log-sum-exp|column|candidate|log p|objective|masked)",
    ),
    ("float32 [67, 1000] stored in", after("store_logits_cuda", bit_of_a_stored_value), "row 0: expected the bits"),
    ("float32 [67, 1000] stored in", after("store_logits_cuda", entries_too_far_down), "entries too far down"),
    ("find_candidates", after("find_candidates_cuda", value_of_a_list), r"lists of \d+: values at place 0"),
    ("find_candidates", after("find_candidates_cuda", loss_of_a_label), r"lists of \d+: loss at place 0"),
    (
        "find_candidates",
        after("find_candidates_cuda", last_of_many_lists),
        r"\[1601, 3\]: lists of 3: loss at place 1600",
    ),
    ("column_margins", after("column_margins_cuda", smallest_loss), "loss 0 of column 0"),
    ("newton", after("newton_count_cuda", weight_of_single_rows), "single rows 0"),
    ("newton", after("newton_compact_cuda", value_of_a_kept_entry), "(objective|column sum 0|plan of entry 0)"),
    ("newton", after("newton_sums_cuda", newton_sum), "column sum 0"),
    ("newton", after("newton_sums_cuda", newton_sum_of_many), "1601 rows of 1 to 3 candidates: column sum 0"),
    ("newton", after("newton_sums_cuda", newton_diagonal), "diagonal 0"),
    ("newton", after("newton_sums_cuda", newton_objective), "objective"),
    ("newton", after("newton_sums_cuda", newton_plan), "(plan of entry 0|product)"),
    ("newton", after("newton_product_cuda", newton_product), "product in column 0"),
    ("anderson_step", after("anderson_step_cuda", following_point), r"step 0, column 4"),
    ("sample_parameters", after("sample_parameters_cuda", drawn_parameter), "parameter"),
    (
        "augment, random box of 4 x 4",
        after("augment_resident_cuda", pixel_of_many),
        r"111 images: pixel \[110, 2, 3, 3\]",
    ),
    ("augment", before("augment_device_cuda", view), "effects: parameter"),
    ("augment", after("augment_device_cuda", pixel_after_tones), "effects: pixel"),
    (
        "augment, uploaded",
        after("augment_device_cuda", pixel_of_a_crop),
        "uploaded images of several sizes to 66: pixel",
    ),
    ("augment_planes", before("augment_device_cuda", exactness), "2 x 2 pixels per sample: pixel"),
    ("decode_planes", after("decode_jpeg_cuda", sample_of_many), "image 32: expected the samples of image 0"),
    ("decode_planes", after("decode_jpeg_cuda", status_of_a_file), "image 1: expected planes, found the status"),
]


@pytest.mark.parametrize(
    ("cases", "corruption", "words"),
    CORRUPTIONS,
    ids=[f"{i} {case}" for i, (case, _, _) in enumerate(CORRUPTIONS)],
)
def test_each_kind_of_case_finds_what_is_wrong(torch, simt, play, monkeypatch, cases, corruption, words):
    """As above, with only the cases of this kind: the kernel is refused by them, and by what they compare."""
    from sela_ext import kernels
    from sela_ext.kernels import check_cases

    every = check_cases.cases
    monkeypatch.setattr(
        check_cases, "cases", lambda runs: ((what, call) for what, call in every(runs) if what.startswith(cases))
    )
    play(Changed(simt, **corruption(simt)))
    verdict = kernels.device_verdict("cpu")
    if words is None:
        assert verdict.state == "passed"
        return
    assert verdict.state == "failed"
    assert verdict.reason.startswith(cases)
    assert re.search(words, verdict.reason), verdict.reason
