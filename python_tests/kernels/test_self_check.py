"""The first-use check of a CUDA device, on devices played by the host: good ones, broken ones, unknown ones."""

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext import _core, kernels
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels import RefusedDeviceWarning, check_cases, check_jpeg, device, reference, self_check
from sela_ext.kernels.device import runs_on

LOGITS = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
EXPECTED = reference.sinkhorn_pass(LOGITS, np.zeros(12), want_labels=True)


@pytest.fixture
def few_cases(monkeypatch):
    monkeypatch.setattr(check_cases, "COLUMNS", (1, 31, 257))
    monkeypatch.setattr(check_cases, "IMAGES", 5)
    monkeypatch.setattr(check_cases, "MANY_ROWS", 140)
    monkeypatch.setattr(check_cases, "MANY_IMAGES", 11)
    monkeypatch.setattr(check_jpeg, "MANY_FILES", 7)
    monkeypatch.setattr(check_cases, "MANY_LARGE_IMAGES", 9)


def played_card():
    return sys.modules["played_card"]


def one_pass():
    return kernels.sinkhorn_pass(LOGITS, np.zeros(12), want_labels=True)


def assert_correct(sums):
    torch.testing.assert_close(sums.column_sums, EXPECTED.column_sums, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums.lse, EXPECTED.lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(sums.labels, EXPECTED.labels)
    assert sums.masked == EXPECTED.masked
    assert sums.weight == EXPECTED.weight
    assert sums.objective == pytest.approx(EXPECTED.objective, rel=1e-6)


def cache_files(tmp_path):
    folder = tmp_path / "cache" / "self_check"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def forget(monkeypatch):
    """A new process, as far as verdicts are concerned."""
    monkeypatch.setattr(device, "_usable", {})
    monkeypatch.setattr(self_check, "_verdicts", {})


def test_every_case_passes_on_a_device_that_does_as_the_cpu_does(host_card):
    ran = [what for what, differs in check_cases.cases(self_check.OnCard(host_card)) if differs() is None]
    assert len(ran) == len(set(ran)) == len(list(check_cases.cases(self_check.OnCard(host_card))))
    for words in ("float32", "float16", "bfloat16", "float64", ", 8193]", "unaligned", "without labels"):
        assert any(words in what for what in ran)
    for words in (
        f"float16 [{check_cases.MANY_ROWS}, 3]",
        f"augment, random box of 4 x 4 x 3 to 4, float16, NCHW, drawn parameters, {check_cases.MANY_IMAGES} images",
        "decode_planes, 4:2:0, boxes",
        f"decode_planes, grey 16 x 8, {check_jpeg.MANY_FILES} images",
        "sample_parameters, ",
        "augment, random box of 64 x 64 x 3",
        "x 1 to 28, bfloat16, NHWC, given",
        "NCHW",
    ):
        assert any(words in what for what in ran)


def test_aligned_cases_are_aligned_and_the_others_are_not(host_core, host_card):
    seen = set()
    run = host_core.sinkhorn_pass_cuda

    def look(*arguments):
        address, name, _, _, stride = arguments[:5]
        size = {"float64": 8, "float32": 4}.get(name, 2)
        seen.add((address % 16 == 0, stride * size % 16 == 0))
        run(*arguments)

    host_core.sinkhorn_pass_cuda = look
    assert self_check._check(host_card) == ("", False)
    assert seen == {(True, True), (False, False)}


def test_a_good_device_is_checked_once_and_used(as_cuda, host_card, host_core, few_cases, tmp_path):
    as_cuda(host_card)
    assert_correct(one_pass())
    checks = host_core.calls - 1
    assert checks > 30
    assert_correct(one_pass())
    assert host_core.calls == checks + 2
    verdict = self_check._judged(host_card.place)[1]
    assert (verdict.state, verdict.reason, verdict.usable, verdict.kept) == ("passed", "", True, False)
    assert "Played Card, architecture 9.0, driver 550.54, CUDA 12.4: self-check passed" in str(verdict)
    (kept,) = cache_files(tmp_path)
    assert json.loads(kept.read_text())["state"] == "passed"


def test_a_kept_verdict_saves_the_check(as_cuda, host_card, host_core, few_cases, monkeypatch):
    as_cuda(host_card)
    one_pass()
    forget(monkeypatch)
    host_core.calls = 0
    assert_correct(one_pass())
    assert host_core.calls == 1
    assert self_check._judged(host_card.place)[1].kept


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("driver", "560.1"),
        ("uuid", "GPU-1"),
        ("name", "Other Card"),
        ("capability", (9, 1)),
    ],
)
def test_another_driver_card_or_architecture_is_checked_again(
    as_cuda, host_card, host_core, few_cases, monkeypatch, tmp_path, change, value
):
    as_cuda(host_card)
    one_pass()
    forget(monkeypatch)
    host_core.calls = 0
    setattr(host_card, change, value)
    one_pass()
    assert host_core.calls > 30
    assert len(cache_files(tmp_path)) == 2


def test_another_build_is_checked_again(as_cuda, host_card, host_core, few_cases, monkeypatch, tmp_path):
    as_cuda(host_card)
    one_pass()
    forget(monkeypatch)
    host_core.calls = 0
    other = tmp_path / "core.so"
    other.write_bytes(b"another build")
    monkeypatch.setattr(type(host_core), "__file__", str(other))
    one_pass()
    assert host_core.calls > 30


def of_a_pass(spoil):
    """Leaves what the image kernels give alone."""
    return functools.wraps(spoil)(lambda outputs: spoil(outputs) if "columns" in outputs else None)


@of_a_pass
def column(outputs):
    outputs["columns"][-1] += int(2.0 / _core.sinkhorn_resolution(131, 2.0))


@of_a_pass
def label(outputs):
    if outputs["labels"] is not None:
        outputs["labels"][0] = (outputs["labels"][0] + 1) % max(2, len(outputs["columns"]))


@of_a_pass
def label_of_a_masked_row(outputs):
    if outputs["labels"] is not None:
        outputs["labels"][3] = 0


@of_a_pass
def label_out_of_range(outputs):
    if outputs["labels"] is not None:
        outputs["labels"][0] = -7


@of_a_pass
def nan_row(outputs):
    outputs["lse"][0] = np.nan


@of_a_pass
def unmasked_row(outputs):
    outputs["lse"][3] = 1.0


@of_a_pass
def shifted_row(outputs):
    outputs["lse"][2] += 1e-3


@of_a_pass
def masked(outputs):
    outputs["masked"][0] += 1


@of_a_pass
def objective(outputs):
    outputs["totals"][0, 0] += 0.5


@of_a_pass
def nan_objective(outputs):
    outputs["totals"][0, 0] = np.nan


@of_a_pass
def weight(outputs):
    outputs["totals"][1, 0] += 1


@of_a_pass
def columns_swapped_in_bfloat16(outputs):
    if outputs["type"] == "bfloat16":
        outputs["columns"][:] = outputs["columns"][::-1].copy()


@of_a_pass
def nothing_written(outputs):
    for name in ("totals", "masked", "columns", "lse"):
        outputs[name][:] = 0


def drawn_left(outputs):
    if "sampled" in outputs:
        outputs["sampled"]["left"][7] += 1


def drawn_hue_in_the_last_bit(outputs):
    if "sampled" in outputs:
        hue = outputs["sampled"]["hue"]
        hue[:] = np.nextafter(hue, np.float32(9))


def drawn_order_with_the_images(outputs):
    if "params" in outputs and not outputs["given"]:
        outputs["params"]["order"][9] = outputs["params"]["order"][9][::-1].copy()


def pixel(outputs):
    if "out" in outputs and outputs["dtype"] == "float32":
        pixels = played_card().array_at(outputs["out"], np.float32, 3 * 32 * 32)
        pixels[5] += 0.001


def pixel_of_given_parameters_in_half(outputs):
    if "out" in outputs and outputs["dtype"] == "float16" and outputs["given"]:
        played_card().array_at(outputs["out"], np.uint16, 3 * 32 * 32)[33] ^= 0x0010


def nan_pixel(outputs):
    if "out" in outputs and outputs["dtype"] == "bfloat16":
        played_card().array_at(outputs["out"], np.uint16, 3)[2] = 0x7FC0


SPOILED = {
    column: r"float32 \[131, 1\].*column sum 0: expected",
    label: r"with labels: label of row 0: expected",
    label_of_a_masked_row: r"label of row 3: expected -1, found 0",
    label_out_of_range: r"label of row 0: expected 0, found -7",
    nan_row: r"log-sum-exp of row 0: expected .*, found nan",
    unmasked_row: r"log-sum-exp of row 3: expected nan, found 1",
    shifted_row: r"log-sum-exp of row 2: expected",
    masked: r"masked rows: expected 4, found 5",
    objective: r"objective: expected",
    nan_objective: r"objective: expected .*, found 1\.5",
    weight: r"weight: expected",
    columns_swapped_in_bfloat16: r"bfloat16 \[131, 31\].*column sum",
    nothing_written: r"masked rows: expected 4, found 0",
    drawn_left: r"sample_parameters, random box of 32 x 32 x 3 to 32: parameter left of image 7: expected",
    drawn_hue_in_the_last_bit: r"sample_parameters, .*: parameter hue of image 0: expected",
    drawn_order_with_the_images: r"augment, .*, drawn parameters: parameter order of image 9: expected",
    pixel: r"augment, .*, float32, NCHW, drawn parameters: pixel \[0, 0, 0, 5\] of the output: expected",
    pixel_of_given_parameters_in_half: r"float16, NCHW, given parameters: pixel \[0, 0, 1, 1\] of the output: expected",
    nan_pixel: r"bfloat16, NCHW, drawn parameters: pixel \[0, 0, 0, 2\] of the output: expected .*, found nan",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_wrong_result_refuses_the_device_and_torch_goes_on(
    as_cuda, host_card, host_core, few_cases, monkeypatch, tmp_path, spoil
):
    as_cuda(host_card)
    host_core.spoil = spoil
    with pytest.warns(RefusedDeviceWarning, match=SPOILED[spoil]) as caught:
        assert_correct(one_pass())
    (warning,) = caught
    text = str(warning.message)
    assert "\n" not in text
    for words in (
        "Played Card",
        "9.0",
        "driver 550.54",
        "expected",
        "found",
        "report",
        "SELA_SELF_CHECK=again",
        "=off",
    ):
        assert words in text
    calls = host_core.calls
    assert_correct(one_pass())  # no second warning: it would be an error here
    assert host_core.calls == calls

    # The next process knows, warns too, and leaves the kernels alone.
    forget(monkeypatch)
    with pytest.warns(RefusedDeviceWarning, match=SPOILED[spoil]):
        assert_correct(one_pass())
    assert host_core.calls == calls
    # Checked again on demand, when the cause is gone.
    forget(monkeypatch)
    monkeypatch.setenv("SELA_SELF_CHECK", "again")
    host_core.spoil = lambda outputs: None
    assert_correct(one_pass())
    assert host_core.calls > calls + 30
    forget(monkeypatch)
    monkeypatch.delenv("SELA_SELF_CHECK")
    calls = host_core.calls
    assert_correct(one_pass())
    assert host_core.calls == calls + 1


def test_a_spoiled_case_with_weights_and_reference_says_so(host_card, host_core, few_cases):
    @of_a_pass
    def spoil(outputs):
        outputs["columns"][0] += int(1.0 / _core.sinkhorn_resolution(131, 2.0)) if host_core.calls % 2 == 0 else 0

    host_core.spoil = spoil
    reason, lost = self_check._check(host_card)
    assert "second pass, with weights and reference: column sum 0" in reason
    assert not lost


def failing(message):
    def spoil(outputs):
        raise RuntimeError(message)

    return spoil


def test_a_failed_launch_refuses_the_device_with_its_message(as_cuda, host_card, host_core, few_cases):
    as_cuda(host_card)
    host_core.spoil = failing("fused_kernel: invalid device function\nmore lines")
    words = r"sinkhorn_pass, float32.*expected a result, found an error: fused_kernel: invalid device function\. Its"
    with pytest.warns(RefusedDeviceWarning, match=words):
        assert_correct(one_pass())


def test_a_device_that_the_check_broke_is_an_error_that_says_to_start_again(
    as_cuda, host_card, host_core, few_cases, monkeypatch
):
    as_cuda(host_card)
    host_core.spoil = failing("an illegal memory access was encountered")
    troubles = iter(["", "an illegal memory access was encountered"])  # before the check, and after its failure
    monkeypatch.setattr(host_card, "trouble", lambda: next(troubles))
    for _ in range(2):
        with pytest.raises(ResourceError, match=r"illegal memory access.*cannot be used any more.*Start again"):
            one_pass()
    calls = host_core.calls
    forget(monkeypatch)
    with pytest.warns(RefusedDeviceWarning, match="illegal memory access"):
        assert_correct(one_pass())
    assert host_core.calls == calls


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("CUDA out of memory. Tried to allocate 2 MiB", "no memory left on the device for its self-check"),
        ("CUDA error: operation not permitted when stream is capturing", "torch can work on, found .* is capturing"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", "torch can work on, found .* are busy"),
    ],
)
def test_errors_of_the_moment_are_no_verdict(as_cuda, host_card, host_core, few_cases, tmp_path, message, words):
    as_cuda(host_card)
    host_core.spoil = failing(message)
    with pytest.raises(ResourceError, match=words):
        one_pass()
    assert cache_files(tmp_path) == []
    host_core.spoil = lambda outputs: None
    assert_correct(one_pass())


@pytest.mark.parametrize("message", ["CUDA error: device-side assert triggered", "CUDA out of memory."])
def test_a_device_that_was_broken_before_the_check_is_no_verdict(
    as_cuda, host_card, host_core, few_cases, tmp_path, message
):
    as_cuda(host_card)
    host_card.in_trouble = message
    words = "no memory left" if "memory" in message else "torch can work on, found .* device-side assert triggered; see"
    with pytest.raises(ResourceError, match=words):
        one_pass()
    assert host_core.calls == 0
    assert cache_files(tmp_path) == []
    host_card.in_trouble = ""
    assert_correct(one_pass())


def test_a_device_that_cannot_be_opened_is_an_error_in_one_line(as_cuda, host_card, monkeypatch):
    as_cuda(host_card)

    def no_device(place):
        raise RuntimeError("CUDA driver initialization failed\nmore lines")

    monkeypatch.setattr(self_check, "open_device", no_device)
    with pytest.raises(ResourceError, match=r"torch can work on, found .*: CUDA driver initialization failed; see"):
        one_pass()


def test_a_driver_too_old_for_the_kernels_is_no_failure_of_theirs(as_cuda, host_card, host_core, tmp_path):
    as_cuda(host_card)
    host_core.devices = 0
    with pytest.warns(RefusedDeviceWarning, match=r"torch sees it, CUDA .* does not.*update the driver") as caught:
        assert_correct(one_pass())
    assert "report" not in str(caught[0].message)
    assert host_core.calls == 0
    assert cache_files(tmp_path) == []
    assert self_check._judged(host_card.place)[1].state == "unsupported"


def test_an_architecture_without_code_is_named_beside_the_built_ones(as_cuda, host_card, host_core, tmp_path):
    as_cuda(host_card)
    host_card.capability = (7, 0)
    words = r"architecture 7.0 is not among those this build has code for \(80, 90, PTX 90\).*SELA_CUDA_ARCHS=70"
    with pytest.warns(RefusedDeviceWarning, match=words) as caught:
        assert_correct(one_pass())
    assert "report" not in str(caught[0].message)
    assert host_core.calls == 0
    assert cache_files(tmp_path) == []
    assert self_check._judged(host_card.place)[1].state == "unsupported"


def test_a_build_without_cuda_kernels_names_the_remedy(as_cuda, host_card, host_core, monkeypatch):
    as_cuda(host_card)
    monkeypatch.setattr(_core, "build_info", lambda: {"cuda": False, "version": "0", "cpu_isa": "generic"})
    with pytest.warns(RefusedDeviceWarning, match="no CUDA kernels; install it again with nvcc"):
        assert_correct(one_pass())
    assert host_core.calls == 0


def test_off_uses_the_kernels_unchecked(as_cuda, host_card, host_core, monkeypatch, tmp_path):
    as_cuda(host_card)
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    assert_correct(one_pass())
    assert host_core.calls == 1
    assert cache_files(tmp_path) == []
    assert "not checked (SELA_SELF_CHECK=off)" in str(self_check._judged(host_card.place)[1])


def test_an_unknown_wish_is_refused(as_cuda, host_card, monkeypatch):
    as_cuda(host_card)
    monkeypatch.setenv("SELA_SELF_CHECK", "never")
    with pytest.raises(OptionError, match="SELA_SELF_CHECK: expected on, off or again, found 'never'"):
        one_pass()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"passed"', '"fine"'),
        lambda text: text.replace("550.54", "551.00"),
        lambda text: text.replace('"reason": ""', '"reason": 3'),
        lambda text: "\udcff",
    ],
)
def test_a_damaged_cache_is_checked_again_and_mended(
    as_cuda, host_card, host_core, few_cases, monkeypatch, tmp_path, damage
):
    as_cuda(host_card)
    one_pass()
    (kept,) = cache_files(tmp_path)
    good = json.loads(kept.read_text())
    kept.write_bytes(damage(kept.read_text()).encode("utf-8", "surrogateescape"))
    forget(monkeypatch)
    host_core.calls = 0
    assert_correct(one_pass())
    assert host_core.calls > 30
    mended = json.loads(kept.read_text())
    assert {**mended, "time": 0} == {**good, "time": 0}
    assert cache_files(tmp_path) == [kept]


@pytest.mark.parametrize("kind", ["a file in the way", "a folder that cannot be made", "no home"])
def test_without_a_place_for_the_cache_the_verdict_holds_for_the_process(
    as_cuda, host_card, host_core, few_cases, monkeypatch, tmp_path, kind
):
    as_cuda(host_card)
    if kind == "a file in the way":
        (tmp_path / "cache").write_text("")
    elif kind == "a folder that cannot be made":
        monkeypatch.setenv("SELA_CACHE_DIR", "/proc/nowhere/cache")
    else:
        monkeypatch.delenv("SELA_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(self_check.Path, "home", staticmethod(lambda: (_ for _ in ()).throw(RuntimeError())))
    assert_correct(one_pass())
    calls = host_core.calls
    assert calls > 30
    assert_correct(one_pass())
    assert host_core.calls == calls + 1
    forget(monkeypatch)
    assert_correct(one_pass())
    assert host_core.calls > calls + 30


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SELA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert self_check.cache_folder() == tmp_path / ".cache" / "sela_ext"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not valid by the specification: as if it were not set
    assert self_check.cache_folder() == tmp_path / ".cache" / "sela_ext"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert self_check.cache_folder() == tmp_path / "xdg" / "sela_ext"
    monkeypatch.setenv("SELA_CACHE_DIR", str(tmp_path / "own"))
    assert self_check.cache_folder() == tmp_path / "own"


def test_two_threads_at_once_check_once(as_cuda, host_card, host_core, few_cases):
    as_cuda(host_card)
    assert self_check._check(host_card) == ("", False)
    alone = host_core.calls
    host_core.calls = 0
    host_core.spoil = lambda outputs: time.sleep(0.001)
    start, results = threading.Barrier(4), []

    def work():
        start.wait()
        results.append(one_pass())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert host_core.calls == alone + 4
    for sums in results:
        assert_correct(sums)


def write_many(card, count):
    for i in range(count):
        kept = self_check._Kept(card)
        kept.write("passed" if i % 2 else "failed", "" if i % 2 else "reason " * 50)


def test_processes_that_write_at_once_leave_one_whole_verdict(as_cuda, host_card, tmp_path):
    as_cuda(host_card)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(host_card, 100)) for _ in range(3)]
    kept = self_check._Kept(host_card)
    kept.write("passed", "")
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert kept.read() in (("passed", ""), ("failed", "reason " * 50))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert cache_files(tmp_path) == [kept.path]


STUCK = "sinkhorn_pass, float32 [131, 31], aligned rows, with labels"


def leave_a_mark(card, **mark):
    kept = self_check._Kept(card)
    path = kept.path.with_name(f"{kept.path.stem}.7.running")
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"host": socket.gethostname(), "pid": 7, "time": time.time(), "ends": 0, "stuck": STUCK}
    path.write_text(json.dumps({**whole, **mark}))
    return path


def dead_process():
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(done.stdout)


def test_a_check_that_never_ended_refuses_the_device(as_cuda, host_card, host_core, few_cases, monkeypatch):
    as_cuda(host_card)
    pid = dead_process()
    mark = leave_a_mark(host_card, pid=pid)
    words = rf"did not come to its end \(process {pid}\): sinkhorn_pass, float32 \[131, 31\].* had not returned"
    with pytest.warns(RefusedDeviceWarning, match=words):
        assert_correct(one_pass())
    assert host_core.calls == 0
    assert not mark.exists()
    forget(monkeypatch)  # and so it stays
    with pytest.warns(RefusedDeviceWarning, match="did not come to its end"):
        assert_correct(one_pass())
    forget(monkeypatch)  # until somebody asks
    monkeypatch.setenv("SELA_SELF_CHECK", "again")
    assert_correct(one_pass())
    assert host_core.calls > 30


@pytest.mark.parametrize(
    ("mark", "refused"),
    [
        ({"pid": os.getppid()}, False),  # at it right now
        ({"pid": os.getpid()}, True),  # an earlier process with our number
        ({"pid": 1}, False),  # somebody else's process
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "time": 0.0}, True),
        ({"pid": "seven"}, False),  # damaged, young
    ],
)
def test_a_mark_counts_when_its_process_is_gone(as_cuda, host_card, few_cases, mark, refused):
    as_cuda(host_card)
    leave_a_mark(host_card, **mark)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_correct(one_pass())
    assert len(caught) == refused


def test_a_check_that_ended_early_with_its_process_is_tried_once_more(
    as_cuda, host_card, host_core, few_cases, monkeypatch, tmp_path
):
    as_cuda(host_card)
    pid = dead_process()
    leave_a_mark(host_card, pid=pid, stuck="")
    seen = []

    def look(outputs):
        seen.extend(json.loads(path.read_text())["ends"] for path in cache_files(tmp_path) if not seen)

    host_core.spoil = look
    assert_correct(one_pass())
    assert seen == [1]  # the next process is to know of both
    assert [path.suffix for path in cache_files(tmp_path)] == [".json"]

    cache_files(tmp_path)[0].unlink()
    forget(monkeypatch)
    leave_a_mark(host_card, pid=pid, stuck="", ends=1)
    with pytest.warns(RefusedDeviceWarning, match=rf"2 earlier checks .*process {pid}\): a kernel may have crashed"):
        assert_correct(one_pass())


def killed_in_its_check(tmp_path, when):
    process = multiprocessing.get_context("fork").Process(target=one_pass)
    process.start()
    for _ in range(2000):
        marks = [path for path in cache_files(tmp_path) if path.name.endswith(f".{process.pid}.running")]
        with contextlib.suppress(OSError, ValueError):
            if marks and when(json.loads(marks[0].read_text())):
                break
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return process.pid


def test_the_mark_of_a_killed_check_is_found_by_the_next_process(
    as_cuda, host_card, host_core, few_cases, monkeypatch, tmp_path
):
    as_cuda(host_card)
    host_core.spoil = lambda outputs: time.sleep(60)
    killed_in_its_check(tmp_path, lambda mark: mark["ends"] == 0)
    pid = killed_in_its_check(tmp_path, lambda mark: mark["ends"] == 1)
    with pytest.warns(RefusedDeviceWarning, match=f"2 earlier checks .*process {pid}"):
        assert_correct(one_pass())
    (kept,) = cache_files(tmp_path)
    assert json.loads(kept.read_text())["state"] == "failed"


def test_one_hanging_kernel_is_enough(as_cuda, host_card, host_core, few_cases, monkeypatch, tmp_path):
    as_cuda(host_card)
    monkeypatch.setattr(self_check, "PATIENCE", 0.05)
    host_core.spoil = lambda outputs: time.sleep(60)
    pid = killed_in_its_check(tmp_path, lambda mark: mark["stuck"])
    with pytest.warns(RefusedDeviceWarning, match=rf"process {pid}\): sinkhorn_pass, float32 \[131, 1\].* returned"):
        assert_correct(one_pass())
    (kept,) = cache_files(tmp_path)
    assert json.loads(kept.read_text())["state"] == "failed"


def test_an_interrupted_check_leaves_no_mark(as_cuda, host_card, host_core, few_cases, tmp_path):
    as_cuda(host_card)

    def interrupt(outputs):
        raise KeyboardInterrupt

    host_core.spoil = interrupt
    with pytest.raises(KeyboardInterrupt):
        one_pass()
    assert cache_files(tmp_path) == []
    host_core.spoil = lambda outputs: None
    assert_correct(one_pass())


def test_a_check_that_takes_too_long_is_spoken_of(as_cuda, host_card, host_core, few_cases, monkeypatch, caplog):
    as_cuda(host_card)
    monkeypatch.setattr(self_check, "PATIENCE", 0.05)
    monkeypatch.setattr(check_cases, "COLUMNS", (1,))
    monkeypatch.setattr(check_cases, "cases", check_cases._sinkhorn_cases)  # others take longer than that by themselves
    host_core.spoil = lambda outputs: time.sleep(0.3) if host_core.calls == 3 else None
    with caplog.at_level(logging.WARNING, "sela_ext"):
        assert self_check._check(host_card) == ("", False)
    (record,) = caplog.records
    host_card.capability = (12, 0)  # by PTX alone, which the driver compiles first
    host_core.calls = 0
    with caplog.at_level(logging.WARNING, "sela_ext"):
        assert self_check._check(host_card) == ("", False)
    assert caplog.records == [record]
    assert "sinkhorn_pass, float32 [131, 1], aligned rows, without labels has not returned" in record.getMessage()
    assert "cannot be stopped from inside" in record.getMessage()


def test_a_captured_stream_is_refused_before_the_check(as_cuda, host_card, host_core):
    as_cuda(host_card)
    host_card.capturing = True
    with pytest.raises(AssertionError):
        one_pass()
    assert host_core.calls == 0


def test_refused_devices_have_their_images_augmented_all_the_same(
    as_cuda, host_card, host_core, few_cases, monkeypatch
):
    options = kernels.Augment.cifar(24)
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 30, 3), dtype=np.uint8)
    index = np.array([3, 3, 19, 0])
    expected, drawn = kernels.augment_resident(images, index, options, seed=1, epoch=2, view=3, return_parameters=True)
    as_cuda(host_card)
    host_core.spoil = pixel
    resident = torch.from_numpy(images)
    with pytest.warns(RefusedDeviceWarning, match="torch and the CPU do their work"):
        found, params = kernels.augment_resident(
            resident, index, options, seed=1, epoch=2, view=3, return_parameters=True
        )
    calls = host_core.calls
    assert torch.equal(found, expected)
    assert params.tobytes() == drawn.tobytes()
    out = torch.empty(4, 3, 24, 24, dtype=torch.float16, memory_format=torch.channels_last)
    given = kernels.augment(resident, drawn, options, rows=index, out=out, channels_last=True)
    assert given is out
    torch.testing.assert_close(out.float(), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(DataError, match=r"index: expected image numbers in \[0, 20\), found 20"):
        kernels.augment_resident(resident, [20], options, seed=1, epoch=2)
    assert host_core.calls == calls

    host_core.spoil = lambda outputs: None
    forget(monkeypatch)
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    assert torch.equal(kernels.augment_resident(resident, index, options, seed=1, epoch=2, view=3), expected)
    assert torch.equal(kernels.augment(resident, drawn, options, rows=index), expected)
    assert host_core.calls == calls + 2


def test_the_verdict_of_what_is_no_device_is_refused():
    for wrong in ("cpu", "tpu", 1.5, None):
        with pytest.raises(OptionError, match='expected "cuda" or "cuda:N"'):
            kernels.device_verdict(wrong)
    with pytest.raises(ResourceError, match="is not there"):
        kernels.device_verdict("cuda:1000")


def test_the_torch_fallback_in_blocks_is_the_twin(as_cuda, host_card, host_core, few_cases, monkeypatch):
    as_cuda(host_card)
    host_core.spoil = nan_row
    monkeypatch.setattr(check_cases, "COLUMNS", (1,))
    monkeypatch.setattr("sela_ext.kernels.sinkhorn._TWIN_ENTRIES", 12 * 7)  # 6 blocks, the last one of 5 rows
    logits, weights = LOGITS.clone(), np.linspace(0, 2, 40)
    logits[11, 3] = float("nan")
    whole = reference.sinkhorn_pass(logits, np.arange(12.0), scale=3.0, row_weights=weights, want_labels=True)
    with pytest.warns(RefusedDeviceWarning):
        found = kernels.sinkhorn_pass(
            logits, np.arange(12.0), scale=3.0, row_weights=weights, want_labels=True, reference=torch.zeros(40)
        )
    torch.testing.assert_close(found.column_sums, whole.column_sums)
    torch.testing.assert_close(found.lse, whole.lse, equal_nan=True)
    assert torch.equal(found.labels, whole.labels)
    assert (found.masked, found.weight) == (1, pytest.approx(whole.weight))
    assert found.objective == pytest.approx(whole.objective)
    empty = kernels.sinkhorn_pass(logits[:0], np.arange(12.0), want_labels=True)
    assert empty.column_sums.tolist() == [0.0] * 12
    assert empty.labels.shape == (0,)


def test_a_device_is_told_from_the_architectures_built():
    built = ["75-real", "80-real", "86-real", "90-real", "100-real", "120"]
    assert runs_on(8, 0, built)
    assert runs_on(8, 9, built)  # runs code of 8.6
    assert runs_on(12, 1, built)
    assert runs_on(13, 0, built)  # compiles the PTX of 12.0
    assert not runs_on(7, 0, built)
    assert not runs_on(11, 0, built)  # 10.0 machine code is for 10.x, the PTX is for 12.0 and later
    assert not runs_on(9, 0, [])
    assert not runs_on(10, 0, ["90a-real"])
    assert runs_on(9, 0, ["90a-real"])
    assert runs_on(12, 1, ["120f-virtual"])
    assert not runs_on(8, 0, ["90-virtual"])


def test_what_is_built_is_read_as_machine_code_and_ptx(monkeypatch):
    info = {"cuda": True, "cuda_archs": ["75", "100"], "cuda_ptx": ["120"]}
    monkeypatch.setattr(_core, "build_info", lambda: info)
    built = device.built_architectures()
    assert built == ["75-real", "100-real", "120-virtual"]
    assert not runs_on(9, 0, built)
    assert device.describe_built() == "75, 100, PTX 120"


def test_assign_says_which_backend_did_the_work(as_cuda, host_card, host_core, few_cases, monkeypatch):
    as_cuda(host_card)
    assert sela_ext.assign(LOGITS).backend == "cuda"
    forget(monkeypatch)
    monkeypatch.setenv("SELA_SELF_CHECK", "again")
    host_core.spoil = column
    with pytest.warns(RefusedDeviceWarning):
        refused = sela_ext.assign(LOGITS)
    assert refused.backend == "torch"
    monkeypatch.undo()
    own = sela_ext.assign(LOGITS)
    assert own.backend.startswith("cpu-")
    assert torch.equal(own.labels, refused.labels)
