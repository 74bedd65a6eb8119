"""CUDA devices as the kernels meet them: who they are, how work reaches them, and which of them may be used."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sela_ext import _core
from sela_ext.errors import OptionError, ResourceError

if TYPE_CHECKING:
    import torch

_DRIVER_VERSION_FILE = Path("/sys/module/nvidia/version")


class CudaDevice:
    """One CUDA device: what tells it from others, and its current stream.

    Attributes:
        place: where its tensors live, with an index.
        core: the compiled module whose `..._cuda` functions run on it.
        name: the card's name.
        capability: compute capability (major, minor).
        uuid: of the card, or of the part of a card that this process sees.
        driver: version of the driver.
    """

    core: Any = _core

    def __init__(self, place: torch.device) -> None:
        import torch

        properties = torch.cuda.get_device_properties(place)
        self.place = place
        self.name: str = properties.name
        self.capability: tuple[int, int] = (properties.major, properties.minor)
        self.uuid = str(getattr(properties, "uuid", "unknown"))
        self.driver = driver_version()

    def current(self) -> AbstractContextManager[Any]:
        """A context in which this is the current device."""
        import torch

        return torch.cuda.device(self.place)

    def stream(self) -> int:
        """The current stream, as the launchers take it."""
        import torch

        return int(torch.cuda.current_stream(self.place).cuda_stream)

    def synchronize(self) -> None:
        """Wait for the device; errors of what ran on it come out here."""
        import torch

        torch.cuda.synchronize(self.place)

    def free_memory(self) -> int:
        """Bytes that can still be had there: what the driver has left, and what torch holds without using it."""
        import torch

        unused = torch.cuda.memory_reserved(self.place) - torch.cuda.memory_allocated(self.place)
        return int(torch.cuda.mem_get_info(self.place)[0]) + max(0, unused)

    def mark(self) -> Any:
        """A mark behind all that the current stream was given so far, for `follow`."""
        import torch

        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.place))
        return event

    def follow(self, mark: Any) -> None:
        """Have what the current stream is given from now on wait, on the device, for what lies before a mark."""
        import torch

        torch.cuda.current_stream(self.place).wait_event(mark)

    def hold(self, *tensors: torch.Tensor) -> None:
        """Have the memory of tensors stay theirs until the current stream has done what it was given so far.

        Tensors of another stream need it; those of the current one lose nothing by it.
        """
        import torch

        stream = torch.cuda.current_stream(self.place)
        for tensor in tensors:
            tensor.record_stream(stream)

    def trouble(self) -> str:
        """What keeps torch from working on it, in one line; empty when nothing does.

        Some errors of a kernel break the device for the whole process, and come out at whatever is called next.
        """
        import torch

        try:
            self.synchronize()
            found = float(torch.ones(2, device=self.place).sum())
        except RuntimeError as error:
            return first_line(error)
        return "" if found == 2.0 else f"1 + 1 gives {found:g}"

    def reachable(self) -> bool:
        """Whether the CUDA runtime inside the compiled module sees it too: it may need a newer driver than torch's."""
        return int(self.core.cuda_device_count()) > (self.place.index or 0)

    def refuse_capture(self, what: str) -> None:
        """Kernels whose results are read back on the host cannot be part of a CUDA graph: say so before any harm.

        Raises:
            ResourceError: the current stream is being captured.
        """
        import torch

        with self.current():  # torch asks the current device's stream, and that may be another device
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            raise ResourceError(
                f"{what}: expected a stream that is not being captured, found a CUDA graph in the making; "
                "call it outside of the graph, it reads results back on the host"
            )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Cards:
    """The CUDA devices: which places are such, and how one is opened.

    Whatever asks where tensors live asks `cards`, so that a test can put a device of its own in its place.
    """

    def has(self, place: torch.device) -> bool:
        """Whether kernels for tensors there are CUDA kernels."""
        return place.type == "cuda"

    def count(self) -> int:
        """How many there are."""
        import torch

        return torch.cuda.device_count()

    def open(self, place: torch.device) -> CudaDevice:
        """The device at a place that it has."""
        return CudaDevice(place)


cards = Cards()
_usable: dict[Any, CudaDevice | None] = {}


def on_card(place: torch.device) -> bool:
    """Whether kernels for tensors at a place are CUDA kernels."""
    return cards.has(place)


def free_memory(place: torch.device) -> int:
    """Bytes that can still be had on a CUDA device."""
    return cards.open(indexed(place)).free_memory()


def indexed(place: torch.device) -> torch.device:
    """A device as its tensors name it: "cuda" is the current one of the CUDA devices."""
    import torch

    named = place.type != "cuda" or place.index is not None
    return place if named else torch.device("cuda", torch.cuda.current_device())


def is_tensor(value: object) -> bool:
    """Whether value is a torch tensor, of a subclass too; torch is not imported for the answer."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and isinstance(value, tensor)


def cuda_place(value: Any) -> torch.device | None:
    """Where a CUDA tensor lives; None for a tensor elsewhere, and for what is no tensor."""
    if not is_tensor(value) or not cards.has(value.device):
        return None
    place: torch.device = value.device
    return place


def usable(place: torch.device) -> CudaDevice | None:
    """The device, when its kernels may be used; None, and one warning per process, when torch is to do their work.

    A device is judged at its first use; after that this is a look into a dict.

    Raises:
        ResourceError: the check broke the device for this process.
    """
    try:
        return _usable[place]
    except KeyError:
        pass
    from sela_ext.kernels import self_check  # it uses the kernels, which use this module

    card = self_check.first_use(place)
    _usable[place] = card
    return card


@functools.cache
def driver_version() -> str:
    """Version of the NVIDIA driver: its own number where the system tells it, and the CUDA version it is made for."""
    words = []
    with contextlib.suppress(OSError, ValueError):  # not Linux, or a container that hides it
        words.append(_DRIVER_VERSION_FILE.read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError, AttributeError):
        number = ctypes.c_int(0)
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if library.cuDriverGetVersion(ctypes.byref(number)) == 0:
            words.append(f"CUDA {number.value // 1000}.{number.value % 1000 // 10}")
    return ", ".join(words) or "unknown"


@functools.cache
def cache_and_multiprocessors(place: torch.device) -> tuple[int, int]:
    """Bytes of a CUDA device's second-level cache, and how many multiprocessors it has; (0, 1) for what is none."""
    import torch

    if place.type != "cuda":
        return 0, 1
    properties = torch.cuda.get_device_properties(place)
    return int(getattr(properties, "L2_cache_size", 4 << 20)), int(properties.multi_processor_count)


def place_of(device: Any) -> torch.device:
    """A CUDA device with its index, from "cuda", "cuda:1", 1 or a torch.device.

    Raises:
        OptionError: not a CUDA device.
        ResourceError: no such device here.
    """
    import torch

    try:
        place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f'device: expected "cuda" or "cuda:N", found {device!r}') from error
    if not cards.has(place):
        raise OptionError(f'device: expected "cuda" or "cuda:N", found {device!r}')
    count = cards.count()
    if count == 0 or (place.index or 0) >= count:
        raise ResourceError(f"device: {place} is not there, {count} CUDA devices are; use the CPU")
    return indexed(place)


def built_architectures() -> list[str]:
    """What this build has code for, in CMake's words: "90-real" is machine code, "120-virtual" is PTX."""
    info = _core.build_info()
    return [f"{name}-real" for name in info["cuda_archs"]] + [f"{name}-virtual" for name in info["cuda_ptx"]]


def runs_on(major: int, minor: int, built: list[str]) -> bool:
    """Whether code built for these CMake architectures runs on compute capability major.minor."""
    for entry in built:
        name, _, kind = entry.partition("-")
        number = name.rstrip("af")
        if not number.isdigit():
            continue
        have = divmod(int(number), 10)
        if name != number:  # 90a, 100f: for that architecture (or its family) and no other
            exact = have == (major, minor)
            family = name.endswith("f") and have[0] == major and have[1] <= minor
            if exact or family:
                return True
            continue
        if kind != "virtual" and have[0] == major and have[1] <= minor:  # machine code: later minors of its major
            return True
        if kind != "real" and have <= (major, minor):  # PTX: anything later
            return True
    return False


def describe_built() -> str:
    """The built architectures in words, for a message."""
    info = _core.build_info()
    words = [str(name) for name in info["cuda_archs"]] + [f"PTX {name}" for name in info["cuda_ptx"]]
    return ", ".join(words) or "none"
