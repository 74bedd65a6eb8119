"""The self-check: at a CUDA device's first use, its kernels against the CPU's on a few dozen rows and images.

A device that fails is refused: one warning says what was compared, and the pure-torch twin of the Sinkhorn pass and the
CPU's augmentation do the work. Verdicts are kept on disk, per device, driver and build.

A kernel that never returns cannot be stopped from inside its process. After a minute this is said, and noted in a mark
that lies on disk while a check runs: once its process is gone, the next one refuses the device instead of hanging too.
A process that ends in the middle of a check for another reason (a crash in the driver, or a signal that has nothing to
do with it) leaves its mark as well; the next one tries once more, and only the second such end refuses the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sela_ext import _core
from sela_ext.errors import OptionError, ResourceError, SelaError
from sela_ext.kernels import check_anderson, check_candidates, check_cases, check_jpeg, check_newton, device
from sela_ext.kernels.device import CudaDevice

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from sela_ext.kernels.augment import Augment
    from sela_ext.kernels.jpeg import Box
    from sela_ext.kernels.jpeg_cuda import DevicePlanes
    from sela_ext.kernels.newton_device import DeviceRows
    from sela_ext.kernels.rounding import Candidates
    from sela_ext.kernels.sinkhorn_sums import SinkhornSums

State = Literal["passed", "failed", "unsupported", "absent", "off"]
# Said when one case takes longer, in seconds.
PATIENCE = 60.0
# The same where the driver compiles the kernels first, for an architecture that the build has no machine code for.
PATIENCE_COMPILING = 600.0
# Checks of a device that ended with their process, one after the other, before it is refused.
ENDS = 2
# Errors that tell of the moment, not of the device: no verdict comes of them.
PASSING = ("out of memory", "captur", "busy or unavailable")
# A mark by a process on another machine, whose life cannot be seen from here, counts when it is older.
OTHER_MACHINES = 3600.0


class RefusedDeviceWarning(UserWarning):
    """The CUDA kernels of this package are not used on a device; torch and the CPU do their work."""


@dataclass(frozen=True)
class Verdict:
    """Whether this build's kernels are used on a device, and why.

    Attributes:
        state: "passed"; "failed": a result differed from the CPU's, or a launch failed; "unsupported": the build has
            no code for this architecture, or the driver is too old for the build; "absent": it has no CUDA kernels at
            all; "off": SELA_SELF_CHECK=off.
        reason: what was compared, expected and found; empty when passed.
        place: "cuda:0".
        card: its name, architecture and driver, in words.
        kept: whether the verdict was on disk already.
        lost: the check broke the device for this process.
    """

    state: State
    reason: str
    place: str
    card: str
    kept: bool = False
    lost: bool = False

    @property
    def usable(self) -> bool:
        """Whether the kernels are used."""
        return self.state in ("passed", "off")

    def __str__(self) -> str:
        what = {
            "passed": "self-check passed" + (" before" if self.kept else ""),
            "failed": "self-check FAILED"
            + (" before" if self.kept else "")
            + f": {self.reason}; torch and the CPU do the work",
            "off": "not checked (SELA_SELF_CHECK=off)",
        }.get(self.state, f"{self.reason}; torch and the CPU do the work")
        return f"{self.place}: {self.card}: {what}"


class OnCard:
    """A CUDA device as the cases see it: host arrays in, host arrays out."""

    def __init__(self, card: CudaDevice) -> None:
        self.card = card

    def sinkhorn_pass(
        self,
        logits: torch.Tensor,
        potential: Any,
        *,
        scale: float,
        row_weights: Any,
        reference: Any,
        want_labels: bool,
    ) -> SinkhornSums:
        """The CUDA kernels on a copy of the logits that has the same strides and offset."""
        from sela_ext.kernels.sinkhorn import pass_on_device
        from sela_ext.kernels.sinkhorn_sums import SinkhornSums

        sums = pass_on_device(
            self.card,
            self._copy(logits),
            potential,
            scale=scale,
            row_weights=row_weights,
            reference=reference,
            want_labels=want_labels,
        )
        self.card.synchronize()
        labels = None if sums.labels is None else sums.labels.cpu()
        return SinkhornSums(sums.column_sums.cpu(), sums.objective, sums.weight, sums.lse.cpu(), labels, sums.masked)

    def _copy(self, logits: torch.Tensor) -> torch.Tensor:
        """On the card, with the same strides and offset; NaN lies between the rows."""
        import torch

        offset, stride = logits.storage_offset(), logits.stride(0)
        room = torch.full((offset + len(logits) * stride,), float("nan"), dtype=logits.dtype, device=self.card.place)
        return room.as_strided(logits.shape, logits.stride(), offset).copy_(logits)

    def find_candidates(
        self, logits: torch.Tensor, prices: Any, labels: npt.NDArray[np.int32], **options: Any
    ) -> Candidates:
        """The CUDA kernel on a copy of the logits that has the same strides and offset."""
        from sela_ext.kernels.logits import check_logits
        from sela_ext.kernels.rounding_device import candidates_on_device

        name, copy = check_logits(logits), self._copy(logits)
        found = candidates_on_device(self.card, copy, name, prices=prices, labels=labels, **options)
        self.card.synchronize()
        return found

    def column_margins(
        self, logits: torch.Tensor, prices: Any, labels: npt.NDArray[np.int32], **options: Any
    ) -> npt.NDArray[np.float32]:
        """Likewise."""
        from sela_ext.kernels.logits import check_logits
        from sela_ext.kernels.rounding_device import margins_on_device

        name, copy = check_logits(logits), self._copy(logits)
        found = margins_on_device(self.card, copy, name, prices=prices, labels=labels, **options)
        self.card.synchronize()
        return found

    def anderson_steps(self, target: npt.NDArray[np.float64], unit: float, accelerate: bool) -> check_anderson.Step:
        """Iterations by the CUDA kernel: from integer column sums and their potential to the next one."""
        import torch

        from sela_ext.kernels.anderson_device import STATE

        card, core, cols = self.card, self.card.core, len(target)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=card.place)

        vectors = zeros(core.ANDERSON_VECTORS, cols)
        state = zeros(STATE.itemsize // 8 + core.ANDERSON_MEMORY**2)
        shares = torch.from_numpy(target).to(card.place)

        def step(units: npt.NDArray[np.int64], g: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            sums, point, following = (torch.from_numpy(units).to(card.place), torch.from_numpy(g.copy()), zeros(cols))
            point = point.to(card.place)
            with card.current():
                core.anderson_step_cuda(
                    *(tensor.data_ptr() for tensor in (sums, point, following, shares, vectors, state)),
                    *(cols, unit, 1e-9, 3.0, 1e9, accelerate, False, card.stream()),
                )
            card.synchronize()
            found: npt.NDArray[np.float64] = following.cpu().numpy()
            return found

        return step

    def newton_rows(self, arrays: dict[str, Any]) -> DeviceRows:
        """Rows of candidates for the CUDA kernels."""
        import torch

        from sela_ext.kernels.device_candidates import DeviceCandidates
        from sela_ext.kernels.newton_device import CudaRows

        place = self.card.place
        offsets, columns, values, weights = (
            torch.from_numpy(arrays[name]).to(place) for name in ("offsets", "columns", "values", "weights")
        )
        rows = len(offsets) - 1
        given = weights if len(weights) else None
        return CudaRows(
            self.card,
            DeviceCandidates(16.0, len(values), False, rows, arrays["cols"], offsets, columns, values, given),
        )

    def candidates(self, logits: torch.Tensor, potential: Any, *, kind: str, **options: Any) -> SinkhornSums:
        """A pass with candidates; with a kind, of a copy that the CUDA kernel stores in 16 bits first."""
        from sela_ext.kernels.logits import store_on_device
        from sela_ext.kernels.sinkhorn import pass_on_device

        there: Any = self._copy(logits)
        if kind:
            there = store_on_device(self.card, there, kind, lam=check_cases.SCALE)
        sums = pass_on_device(self.card, there, potential, **options)
        self.card.synchronize()
        kept: Any = sums.candidates
        kept = replace(kept, offsets=kept.offsets.cpu(), columns=kept.columns.cpu(), values=kept.values.cpu())
        return replace(sums, column_sums=sums.column_sums.cpu(), lse=sums.lse.cpu(), candidates=kept)

    def store_logits(
        self, logits: torch.Tensor, kind: str
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float32], int]:
        """Values, maxima and saturated entries as the CUDA kernel stores logits."""
        from sela_ext.kernels.logits import bits_of, store_on_device

        stored = store_on_device(self.card, self._copy(logits), kind, lam=check_cases.SCALE)
        self.card.synchronize()
        return bits_of(stored.values).view("uint16"), stored.maxima.cpu().numpy(), stored.saturated

    def sample_parameters(
        self, augment: Augment, height: int, width: int, index: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.void]:
        """What the CUDA kernel draws with a fixed key."""
        import torch

        from sela_ext.kernels.augment import PARAMETERS, augment_options
        from sela_ext.kernels.augment_resident import as_records

        card, rows = self.card, torch.from_numpy(index).to(self.card.place)
        drawn = torch.empty(len(index), PARAMETERS.itemsize // 4, dtype=torch.int32, device=card.place)
        with card.current():
            card.core.sample_parameters_cuda(
                augment_options(augment, 3),
                height,
                width,
                rows.data_ptr(),
                len(rows),
                *check_cases.KEY,
                drawn.data_ptr(),
                card.stream(),
            )
        card.synchronize()
        return as_records(drawn)

    def augment(
        self,
        images: npt.NDArray[np.uint8],
        index: npt.NDArray[np.int64],
        augment: Augment,
        params: npt.NDArray[np.void] | None,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> tuple[torch.Tensor, npt.NDArray[np.void]]:
        """The CUDA kernel on a copy of the images, with a fixed key or the given parameters."""
        import torch

        from sela_ext.kernels.augment_resident import as_records, run_cuda

        resident = torch.from_numpy(images).to(self.card.place)
        key, want = check_cases.KEY, params is None
        result, drawn = run_cuda(
            self.card, resident, index, augment, key, params, None, None, dtype, channels_last, want_parameters=want
        )
        self.card.synchronize()
        return result.cpu(), as_records(drawn)

    def decode_planes(
        self, files: Sequence[bytes], indexes: Sequence[bytes], boxes: Sequence[Box | None]
    ) -> list[DevicePlanes]:
        """The CUDA kernels on these files."""
        from sela_ext.kernels.jpeg_cuda import run_cuda

        return run_cuda(self.card, files, indexes, boxes)

    def augment_uploaded(
        self,
        images: list[Any],
        augment: Augment,
        params: npt.NDArray[np.void],
        effects: npt.NDArray[np.void] | None,
        exact: bool,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> torch.Tensor:
        """The CUDA kernels on copies of images of different sizes, or of `Planes`."""
        from sela_ext.kernels.augment_device import put_images, put_planes, run_uploaded
        from sela_ext.kernels.augment_planes import Planes

        planar = isinstance(images[0], Planes)
        if planar:
            there = put_planes(self.card, self.card.place, images)
        else:
            there = put_images(self.card, self.card.place, images, images[0].shape[2])
        result = run_uploaded(self.card, there, params, augment, effects, exact, None, dtype, channels_last)
        self.card.synchronize()
        return result.cpu()


_lock = threading.RLock()
_verdicts: dict[Any, tuple[CudaDevice, Verdict]] = {}


def device_verdict(where: Any = "cuda") -> Verdict:
    """Tell whether this build's kernels are used on a CUDA device; at its first use this runs the self-check.

    Args:
        where: "cuda" (the current device), "cuda:1", 1 or a torch.device.

    Returns:
        Verdict.

    Raises:
        OptionError: not a CUDA device, or SELA_SELF_CHECK holds another word than on, off and again.
        ResourceError: there is no such device, or it has no memory left for the check.
    """
    return _judged(device.place_of(where))[1]


def first_use(place: torch.device) -> CudaDevice | None:
    """The device if its kernels may be used; else None, after a warning.

    Raises:
        ResourceError: the check broke the device for this process, or it has no memory left for it.
    """
    card, verdict = _judged(place)
    if verdict.usable:
        return card
    if verdict.lost:
        raise ResourceError(
            f"{verdict.place}: {verdict.card}: {verdict.reason}; the device cannot be used any more in this process. "
            "Start again: the verdict is kept, and torch and the CPU will do the work"
        )
    warnings.warn(_advice(verdict), RefusedDeviceWarning, stacklevel=4)
    return None


def _advice(verdict: Verdict) -> str:
    where = f"{verdict.place}: {verdict.card}"
    if verdict.state != "failed":
        return f"{where}: {verdict.reason}. Torch and the CPU do their work: correct, but slower"
    return (
        f"{where} failed the self-check of sela_ext {_core.build_info()['version']}: {verdict.reason}. Its kernels are "
        "not used, torch and the CPU do their work: correct, but slower. Please report this line. "
        "SELA_SELF_CHECK=again checks once more, SELA_SELF_CHECK=off uses the kernels unchecked"
    )


def _judged(place: torch.device) -> tuple[CudaDevice, Verdict]:
    with _lock:  # two threads at once: the second one waits for the verdict of the first
        if place not in _verdicts:
            try:
                card = open_device(place)
            except (RuntimeError, AssertionError) as error:
                raise _no_verdict(place, device.first_line(error)) from error
            card.refuse_capture("self-check of the device")
            _verdicts[place] = card, judge(card)
        return _verdicts[place]


def _no_verdict(place: torch.device, message: str) -> ResourceError:
    """An error that says nothing of the kernels: it is of the moment, or of what ran before."""
    if "out of memory" in message.lower():
        return ResourceError(f"{place}: no memory left on the device for its self-check; free some, or use the CPU")
    return ResourceError(
        f"{place}: expected a device that torch can work on, found an error that is none of sela_ext's kernels': "
        f"{message}; see that torch itself works there, or use the CPU"
    )


def open_device(place: torch.device) -> CudaDevice:
    """The device at a place."""
    return device.cards.open(place)


def judge(card: CudaDevice) -> Verdict:
    """The verdict on a device: from what the build holds, from the environment, from the cache, or by the check.

    Raises:
        OptionError: SELA_SELF_CHECK holds an unknown word.
        ResourceError: no memory left on the device, or it was out of order before the check.
    """
    wish = os.environ.get("SELA_SELF_CHECK", "on").strip().lower() or "on"
    if wish not in ("on", "off", "again"):
        raise OptionError(f"SELA_SELF_CHECK: expected on, off or again, found {wish!r}")
    major, minor = card.capability
    place, words = str(card.place), f"{card.name}, architecture {major}.{minor}, driver {card.driver}"
    if not _core.build_info()["cuda"]:
        reason = "this build of sela_ext has no CUDA kernels; install it again with nvcc on the PATH"
        return Verdict("absent", reason, place, words)
    if not device.runs_on(major, minor, device.built_architectures()):
        reason = (
            f"its architecture {major}.{minor} is not among those this build has code for "
            f"({device.describe_built()}); install again with SELA_CUDA_ARCHS={major}{minor}"
        )
        return Verdict("unsupported", reason, place, words)
    if not card.reachable():
        reason = (
            f"torch sees it, CUDA {_core.build_info()['cuda_version']} inside sela_ext does not: its driver is older "
            "than that, or it is no NVIDIA device; update the driver, or install sela_ext again with an older nvcc"
        )
        return Verdict("unsupported", reason, place, words)
    if wish == "off":
        return Verdict("off", "", place, words)

    kept = _Kept(card)
    saved = None if wish == "again" else kept.read()
    if saved is not None:
        return Verdict(*saved, place, words, kept=True)
    ends, unfinished = kept.unfinished()
    if unfinished and wish != "again":
        kept.write("failed", unfinished)
        return Verdict("failed", unfinished, place, words)
    trouble = card.trouble()
    if trouble:  # of another's making: an earlier kernel's error comes out now, the card is taken, or full
        raise _no_verdict(card.place, trouble)
    with kept.marked(ends) as mark:
        reason, lost = _check(card, mark)
    state: State = "failed" if reason else "passed"
    kept.write(state, reason)
    return Verdict(state, reason, place, words, lost=lost)


def _check(card: CudaDevice, mark: _Mark | None = None) -> tuple[str, bool]:
    """(what went wrong, or nothing; whether the device is lost for this process)."""
    mark = mark or _Mark(None)
    machine_code = [name for name in device.built_architectures() if name.endswith("-real")]
    patience = PATIENCE if device.runs_on(*card.capability, machine_code) else PATIENCE_COMPILING
    for what, differs in check_cases.cases(OnCard(card)):
        try:
            with _watched(card, what, patience, mark):
                difference = differs()
        except (SelaError, RuntimeError) as error:
            message = device.first_line(error)
            if any(words in message.lower() for words in PASSING):
                raise _no_verdict(card.place, message) from error
            return f"{what}: expected a result, found an error: {message}", bool(card.trouble())
        if difference is not None:
            return f"{what}: {difference}", False
    return "", False


@contextlib.contextmanager
def _watched(card: CudaDevice, what: str, patience: float, mark: _Mark) -> Iterator[None]:
    """Speaks up, and notes it in the mark, when what is done in this context does not come to its end."""

    def speak() -> None:
        mark.note(what)
        logging.getLogger("sela_ext").warning(
            "self-check of %s: %s has not returned after %g s. A kernel that hangs cannot be stopped from inside: end "
            "this process; the next one will leave the device's kernels alone",
            card.place,
            what,
            patience,
        )

    watch = threading.Timer(patience, speak)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
    mark.note("")  # it came to its end after all


class _Kept:
    """Verdicts on disk: one small file per device, driver and build, which replaces itself in one step."""

    def __init__(self, card: CudaDevice) -> None:
        self.key = {
            "name": card.name,
            "capability": list(card.capability),
            "uuid": card.uuid,
            "driver": card.driver,
            "build": build_identity(card.core),
        }
        name = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:32]
        folder = cache_folder()
        self.path = None if folder is None else folder / "self_check" / f"{name}.json"

    def read(self) -> tuple[State, str] | None:
        """The verdict, or None when there is none, or none that can be read."""
        if self.path is None:
            return None
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            state, reason = saved["state"], saved["reason"]
            intact = saved["key"] == self.key and isinstance(reason, str)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not intact or state not in ("passed", "failed"):
            return None
        return state, reason

    def write(self, state: State, reason: str) -> None:
        """Keep a verdict; without a folder to write to it holds for this process only."""
        if self.path is None:
            return
        saved = {"key": self.key, "state": state, "reason": reason, "time": time.time()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".draft")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(saved, file, indent=1)
                os.replace(draft, self.path)
            except BaseException:
                os.unlink(draft)
                raise
        except OSError:
            return

    def marked(self, ends: int) -> _Mark:
        """A mark on disk while a check runs, after so many that have ended with their process."""
        if self.path is None:
            return _Mark(None)
        return _Mark(self.path.with_name(f"{self.path.stem}.{os.getpid()}.running"), ends)

    def unfinished(self) -> tuple[int, str]:
        """How many checks one after the other ended with their process, and why that refuses the device, if it does.

        The marks of processes that are gone are removed.
        """
        ends, reason = 0, ""
        if self.path is None:
            return ends, reason
        try:
            marks = sorted(self.path.parent.glob(f"{self.path.stem}.*.running"))
        except OSError:
            return ends, reason
        for mark in marks:
            before, stuck = 0, ""
            try:
                saved = json.loads(mark.read_text(encoding="utf-8"))
                host, pid, began = str(saved["host"]), int(saved["pid"]), float(saved["time"])
                before, stuck = int(saved["ends"]), str(saved["stuck"])
            except FileNotFoundError:
                continue  # its process has just finished
            except (OSError, ValueError, KeyError, TypeError):
                host, pid, began = "", 0, _written(mark)  # damaged, or just being written
            if _runs(pid) if host == socket.gethostname() else time.time() - began < OTHER_MACHINES:
                continue
            ends = max(ends, before + 1)  # several at once may have been ended together
            if stuck:
                reason = f"an earlier check did not come to its end (process {pid}): {stuck} had not returned"
            elif ends >= ENDS:
                reason = reason or (
                    f"{ends} earlier checks did not come to their end (the last one in process {pid}): a kernel may "
                    "have crashed there"
                )
            with contextlib.suppress(OSError):
                mark.unlink(missing_ok=True)
        return ends, reason


class _Mark:
    """A file that exists while a check runs; a process that is killed leaves it behind.

    It tells how many checks before ended with their process, and what has been running for too long.
    """

    def __init__(self, path: Path | None, ends: int = 0) -> None:
        self.path = path
        self.says = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "ends": ends, "stuck": ""}
        self.lock = threading.Lock()

    def __enter__(self) -> _Mark:
        with self.lock:
            self._write()
        return self

    def note(self, stuck: str) -> None:
        """Write down what has not returned for too long; empty: it has."""
        with self.lock:
            if self.says["stuck"] != stuck:
                self.says["stuck"] = stuck
                self._write()

    def _write(self) -> None:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps(self.says), encoding="utf-8")
            except OSError:
                self.path = None

    def __exit__(self, *error: object) -> None:
        with self.lock:
            path, self.path = self.path, None
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _written(path: Path) -> float:
    """When a file was written; now, if that cannot be told."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _runs(pid: int) -> bool:
    """Whether another process of this machine with that number is alive."""
    if pid == os.getpid():
        return False  # this process has made no mark yet: it is of an earlier one with the same number
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return pid > 0


def cache_folder() -> Path | None:
    """Where verdicts are kept: SELA_CACHE_DIR, or sela_ext in XDG_CACHE_HOME or ~/.cache; None without a home."""
    given = os.environ.get("SELA_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "sela_ext"
    try:
        return Path.home() / ".cache" / "sela_ext"
    except RuntimeError:
        return None


def build_identity(core: Any) -> str:
    """The version, and a hash of the compiled module and of what is checked."""
    digest = hashlib.sha256()
    checks = (check_cases, check_newton, check_anderson, check_candidates, check_jpeg)
    for path in (core.__file__, *(module.__file__ for module in checks)):
        digest.update(Path(path).read_bytes())
    return f"{_core.build_info()['version']}+{digest.hexdigest()[:16]}"
