"""The kernels as torch operators `sela::...`, for compiled functions. Importing this module registers them.

An operator is opaque to `torch.compile`: it runs the very function that is called without compilation, on the device of
its tensors, and what surrounds it is compiled. The functions here call the operators; they serve in and out of compiled
functions. `sela::assign_batch` is registered by `sela_ext.assign.ops`.

None of the operators has a gradient: outputs are detached, as those of the plain functions are.
"""

from __future__ import annotations

import ast
import functools
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import device
from sela_ext.kernels.augment import Augment, check_key
from sela_ext.kernels.augment_resident import augment_resident as resident_kernel
from sela_ext.kernels.logits import (
    KINDS,
    StoredLogits,
    check_kind,
    check_logits,
    check_store,
    device_stride,
    launch_store,
    tensor_type,
)
from sela_ext.kernels.logits import store_logits as store_kernel
from sela_ext.kernels.sinkhorn import sinkhorn_pass as pass_kernel
from sela_ext.kernels.vectors import TYPES, VectorView
from sela_ext.kernels.vectors import vector_rows as rows_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

OUTPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def define(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], *, capturable: bool = False
) -> Callable[..., Any]:
    """Register `sela::name` and return it: outputs are fresh tensors, arguments stay as they are, there is no gradient.

    Args:
        name: without the namespace.
        schema: in torch's notation, "(Tensor x, ...) -> Tensor".
        run: what it does, on real tensors of any device.
        fake: the same for tensors without data: it checks shapes and returns empty tensors.
        capturable: whether it may become part of a CUDA graph; if not, `torch.compile` leaves it out of its graphs,
            where the version of torch knows how to.
    """
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    known = "tags" in inspect.signature(torch.library.custom_op).parameters
    tags: dict[str, Any] = {"tags": (unsafe,)} if known and unsafe is not None and not capturable else {}
    operator = torch.library.custom_op(f"sela::{name}", run, mutates_args=(), schema=schema, **tags)
    operator.register_fake(fake)
    operator.register_autograd(_no_backward, setup_context=_detach_outputs)
    packet: Any = getattr(torch.ops.sela, name)
    found: Callable[..., Any] = packet.default
    return found


def _detach_outputs(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def _no_backward(ctx: Any, *gradients: Any) -> Any:
    raise OptionError(
        "sela operators: expected no backward pass through them, they have no gradient; detach their inputs"
    )


def same_device(**tensors: torch.Tensor | None) -> None:
    """Refuse tensors on several devices; the first one says which it is to be.

    Raises:
        OptionError: a tensor elsewhere.
    """
    (first, model), *others = tensors.items()
    for name, tensor in others:
        if model is not None and tensor is not None and tensor.device != model.device:
            raise OptionError(
                f"{name}: expected a tensor on {model.device} as {first}, found {tensor.device}; move it with "
                f'.to("{model.device}")'
            )


def _shape(name: str, tensor: torch.Tensor | None, model: str, *wanted: Any) -> None:
    if tensor is not None and tuple(tensor.shape) != wanted:
        raise OptionError(f"{name}: expected shape {list(wanted)} as {model} has it, found {list(tensor.shape)}")


# The Sinkhorn pass


class PassTensors(NamedTuple):
    """What one pass over logits [N, K] gives, all on their device; see `sela_ext.kernels.SinkhornSums`.

    Attributes:
        column_sums: float64 [K].
        objective: float64 [], nats.
        weight: float64 [], sum of the row weights that entered.
        lse: [N], float32 (float64 for float64 logits).
        labels: int32 [N]; [0] when not asked for.
        masked: int64 [], number of masked rows.
    """

    column_sums: torch.Tensor
    objective: torch.Tensor
    weight: torch.Tensor
    lse: torch.Tensor
    labels: torch.Tensor
    masked: torch.Tensor


def _pass(
    logits: torch.Tensor,
    potential: torch.Tensor,
    scale: float = 1.0,
    row_weights: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    want_labels: bool = False,
    threads: int = 0,
) -> tuple[torch.Tensor, ...]:
    same_device(logits=logits, potential=potential, row_weights=row_weights, reference=reference)
    sums = pass_kernel(
        logits,
        potential,
        scale=scale,
        row_weights=row_weights,
        reference=reference,
        want_labels=want_labels,
        threads=threads,
    )
    place = logits.device
    return (
        sums.column_sums,
        torch.tensor(sums.objective, dtype=torch.float64, device=place),
        torch.tensor(sums.weight, dtype=torch.float64, device=place),
        sums.lse,
        torch.empty(0, dtype=torch.int32, device=place) if sums.labels is None else sums.labels,
        torch.tensor(sums.masked, dtype=torch.int64, device=place),
    )


def _pass_fake(
    logits: torch.Tensor,
    potential: torch.Tensor,
    scale: float = 1.0,
    row_weights: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    want_labels: bool = False,
    threads: int = 0,
) -> tuple[torch.Tensor, ...]:
    name = check_logits(logits)
    same_device(logits=logits, potential=potential, row_weights=row_weights, reference=reference)
    rows, cols = logits.shape
    _shape("potential", potential, "the columns of the logits", cols)
    _shape("row_weights", row_weights, "the rows of the logits", rows)
    _shape("reference", reference, "the rows of the logits", rows)

    def empty(dtype: torch.dtype, *shape: Any) -> torch.Tensor:
        return logits.new_empty(shape, dtype=dtype)

    return (
        empty(torch.float64, cols),
        empty(torch.float64),
        empty(torch.float64),
        empty(torch.float64 if name == "float64" else torch.float32, rows),
        empty(torch.int32, rows if want_labels else 0),
        empty(torch.int64),
    )


_pass_operator = define(
    "sinkhorn_pass",
    "(Tensor logits, Tensor potential, float scale=1.0, Tensor? row_weights=None, Tensor? reference=None, "
    "bool want_labels=False, SymInt threads=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pass,
    _pass_fake,
)


def sinkhorn_pass(
    logits: torch.Tensor,
    potential: torch.Tensor,
    *,
    scale: float = 1.0,
    row_weights: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    want_labels: bool = False,
    threads: int = 0,
) -> PassTensors:
    """`sela_ext.kernels.sinkhorn_pass` over a whole matrix, with all results as tensors: `sela::sinkhorn_pass`.

    On a CUDA device its results are read back on the host once, so it cannot be captured in a CUDA graph.

    Args:
        logits: [N, K] float32, float16, bfloat16 or float64; rows may be strided.
        potential: [K] log beta in nats, finite, on the device of the logits, as are the others.
        scale: lambda > 0.
        row_weights: [N] >= 0, or None for ones.
        reference: [N] log-sum-exp of an earlier pass, which makes this one faster.
        want_labels: also return labels.
        threads: CPU threads, 0 for all.

    Returns:
        PassTensors.

    Raises:
        DataError: logits of a wrong shape or type.
        OptionError: another argument of a wrong shape or value, or on another device.
        ResourceError: a launch on a CUDA device that failed, or a call while a CUDA graph is captured.
        torch.OutOfMemoryError: no memory for the results on a CUDA device.

    Example:
        >>> sums = sinkhorn_pass(torch.zeros(4, 2), torch.zeros(2), want_labels=True)
        >>> sums.column_sums.tolist(), sums.labels.tolist(), int(sums.masked)
        ([2.0, 2.0], [0, 0, 0, 0], 0)

    Source: SeLa, section 3.2, equations 5-6, in the log domain.
    """
    return PassTensors(*_pass_operator(logits, potential, scale, row_weights, reference, want_labels, threads))


# Logits in 16 bits


class StoredTensors(NamedTuple):
    """Logits [N, K] in 16 bits each, on their device; see `sela_ext.kernels.StoredLogits`.

    Attributes:
        values: [N, K] int16 (the bits of uint16) for fixed16, float16 or bfloat16; on a CUDA device rows begin at
            multiples of 16 bytes.
        maxima: float32 [N].
        saturated: int64 [].
    """

    values: torch.Tensor
    maxima: torch.Tensor
    saturated: torch.Tensor


def _stored(
    logits: torch.Tensor, kind: str = "fixed16", lam: float = 1.0, threads: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    place = device.cuda_place(logits)
    card = None if place is None else device.usable(place)
    if card is not None:
        check_logits(logits)
        check_store(kind, lam, threads)
        out, count = launch_store(card, logits, kind, lam=float(lam))
        return out.values, out.maxima, count[0]
    if place is not None:  # the logits visit the CPU
        device.cards.open(device.indexed(place)).refuse_capture("store_logits")
    stored = store_kernel(logits, kind, lam=lam, threads=threads)
    values, maxima = stored.values, stored.maxima
    if place is None:
        maxima = torch.from_numpy(maxima)
        values = torch.from_numpy(values if kind == "float16" else values.view(np.int16)).view(tensor_type(kind))
    return values, maxima, torch.tensor(stored.saturated, dtype=torch.int64, device=logits.device)


def _stored_fake(
    logits: torch.Tensor, kind: str = "fixed16", lam: float = 1.0, threads: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_logits(logits)
    check_kind(kind)
    rows, cols = logits.shape
    stride = device_stride(cols) if device.on_card(logits.device) else cols
    return (
        logits.new_empty_strided((rows, cols), (stride, 1), dtype=tensor_type(kind)),
        logits.new_empty((rows,), dtype=torch.float32),
        logits.new_empty((), dtype=torch.int64),
    )


_store_operator = define(
    "store_logits",
    '(Tensor logits, str kind="fixed16", float lam=1.0, SymInt threads=0) -> (Tensor, Tensor, Tensor)',
    _stored,
    _stored_fake,
)


def store_logits(logits: torch.Tensor, kind: str = "fixed16", *, lam: float = 1.0, threads: int = 0) -> StoredTensors:
    """`sela_ext.kernels.store_logits` of a tensor into new tensors: `sela::store_logits`.

    On a CUDA device nothing is waited for: how many saturated stays there, too. `stored_logits` makes of the result
    what a pass or a solve takes.

    Args:
        logits: [N, K] float32, float16, bfloat16 or float64, of any strides.
        kind: "fixed16", "float16" or "bfloat16".
        lam: lambda, > 0; fixed16 holds lam * logits.
        threads: CPU threads, 0 for all.

    Returns:
        StoredTensors.

    Raises:
        DataError: logits of a wrong shape or type.
        OptionError: another argument of a wrong value.
        ResourceError: a launch on a CUDA device that failed, or, on a device whose kernels are not used, a call while
            a CUDA graph is captured.
        torch.OutOfMemoryError: no memory for the results on a CUDA device.

    Example:
        >>> stored = store_logits(torch.tensor([[1.0, 0.5, -torch.inf]]), lam=2.0)
        >>> stored.values.tolist(), stored.maxima.tolist(), int(stored.saturated)
        ([[0, 64, -1]], [1.0], 0)
    """
    return StoredTensors(*_store_operator(logits, kind, lam, threads))


def stored_logits(tensors: StoredTensors, *, lam: float = 1.0) -> StoredLogits:
    """What `sela_ext.kernels.sinkhorn_pass` and solves take, of the same memory; reads `saturated` back.

    Args:
        tensors: what `store_logits` returned.
        lam: that it was called with.

    Returns:
        StoredLogits, on the host or the CUDA device of the tensors.

    Raises:
        OptionError: tensors of other types than `store_logits` returns.

    Example:
        >>> stored = stored_logits(store_logits(torch.zeros(4, 2), lam=10.0), lam=10.0)
        >>> stored.kind, stored.shape, stored.lam
        ('fixed16', (4, 2), 10.0)
    """
    kinds = {tensor_type(kind): kind for kind in KINDS}
    values: Any = tensors.values
    maxima: Any = tensors.maxima
    if values.dtype not in kinds:
        raise OptionError(f"values: expected int16, float16 or bfloat16 of `store_logits`, found {values.dtype}")
    kind = kinds[values.dtype]
    if device.cuda_place(values) is None:
        values = values.numpy() if kind == "float16" else values.view(torch.int16).numpy().view(np.uint16)
        maxima = maxima.numpy()
    return StoredLogits(values, kind, maxima, int(tensors.saturated), float(lam))


# Augmentation of images where they lie


@functools.lru_cache(maxsize=64)
def _augment_of(text: str) -> Augment:
    try:
        return Augment(*ast.literal_eval(text))
    except (SyntaxError, ValueError, TypeError) as error:
        raise OptionError(f"augment: expected the text of an Augment, found {text!r}") from error


def _augmented(
    images: torch.Tensor,
    index: torch.Tensor,
    augment: str,
    seed: int,
    epoch: int,
    view: int = 0,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    threads: int = 0,
) -> torch.Tensor:
    _check_index_device(images, index)
    return resident_kernel(
        images,
        index,
        _augment_of(augment),
        seed=seed % 2**64,
        epoch=epoch,
        view=view,
        dtype=dtype,
        channels_last=channels_last,
        threads=threads,
    )


def _augmented_fake(
    images: torch.Tensor,
    index: torch.Tensor,
    augment: str,
    seed: int,
    epoch: int,
    view: int = 0,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    threads: int = 0,
) -> torch.Tensor:
    what = _augment_of(augment)
    _check_index_device(images, index)
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] not in (1, 3):
        raise DataError(
            f"images: expected uint8 [N, H, W, C] with C = 1 or 3, found {images.dtype} {list(images.shape)}"
        )
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise DataError(f"index: expected integers, found {index.dtype}")
    kind = torch.float32 if dtype is None else dtype
    if kind not in OUTPUT_TYPES or (what.sobel and kind == torch.uint8):
        raise OptionError(f"dtype: expected torch.float32, bfloat16, float16 or, without sobel, uint8, found {kind}")
    return torch.empty(
        (index.numel(), what.output_channels(int(images.shape[3])), what.size, what.size),
        dtype=kind,
        device=images.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _check_index_device(images: torch.Tensor, index: torch.Tensor) -> None:
    if index.device.type != "cpu":
        same_device(images=images, index=index)


_augment_operator = define(
    "augment_resident",
    "(Tensor images, Tensor index, str augment, SymInt seed, SymInt epoch, SymInt view=0, ScalarType? dtype=None, "
    "bool channels_last=False, SymInt threads=0) -> Tensor",
    _augmented,
    _augmented_fake,
)


def augment_resident(
    images: torch.Tensor,
    index: torch.Tensor,
    augment: Augment,
    *,
    seed: int,
    epoch: int,
    view: int = 0,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    threads: int = 0,
) -> torch.Tensor:
    """`sela_ext.kernels.augment_resident` of a tensor of images into a new tensor: `sela::augment_resident`.

    The operator takes `augment` as the text of its fields, and a seed from 2^63 on as that less 2^64.

    Args:
        images: uint8 [N, H, W, C] with C = 1 or 3; contiguous on CUDA.
        index: integers [B] in [0, N), on the device of the images or on the CPU.
        augment: what may be drawn, and the output's size.
        seed: the key, [0, 2^64).
        epoch: [0, 2^32).
        view: [0, 256).
        dtype: torch.float32, bfloat16 or float16, or uint8 on the CPU; None: float32.
        channels_last: NHWC memory (the shape stays NCHW).
        threads: CPU threads, 0 for all.

    Returns:
        [B, C, size, size] tensor on the device of the images.

    Raises:
        DataError: images or index that do not fit together.
        OptionError: another argument out of range, or an index on another device.
        ResourceError: a launch on a CUDA device that failed.
        torch.OutOfMemoryError: no memory for the results on a CUDA device.

    Example:
        >>> images = torch.zeros(5, 32, 32, 3, dtype=torch.uint8)
        >>> augment_resident(images, torch.tensor([4, 0, 4]), Augment.cifar(32), seed=0, epoch=1).shape
        torch.Size([3, 3, 32, 32])
    """
    check_key(seed, epoch, view)
    signed = seed - 2**64 if seed >= 2**63 else seed
    found: torch.Tensor = _augment_operator(
        images, index, augment.text, signed, epoch, view, dtype, channels_last, threads
    )
    return found


# Rows of feature vectors


def _vectors(
    rows: torch.Tensor,
    index: torch.Tensor,
    mean: torch.Tensor | None,
    noise: torch.Tensor | None,
    dropout: float,
    seed: int,
    epoch: int,
    number: torch.Tensor | None = None,
    view_number: int = 0,
    threads: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_vectors(rows, index, mean, noise, number)
    view = None
    if mean is not None:
        deviation = torch.zeros_like(mean) if noise is None else noise
        view = VectorView(mean.detach().numpy(), deviation.detach().numpy(), dropout)
    elif noise is not None or dropout:
        raise OptionError("mean: expected a tensor with noise or dropout, found None")
    found, finite = rows_kernel(
        rows.detach().numpy(),
        index.numpy(),
        view,
        seed=seed % 2**64,
        epoch=epoch,
        number=None if number is None else number.numpy(),
        view_number=view_number,
        threads=threads,
    )
    return torch.from_numpy(found), torch.from_numpy(finite)


def _vectors_fake(
    rows: torch.Tensor,
    index: torch.Tensor,
    mean: torch.Tensor | None,
    noise: torch.Tensor | None,
    dropout: float,
    seed: int,
    epoch: int,
    number: torch.Tensor | None = None,
    view_number: int = 0,
    threads: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_vectors(rows, index, mean, noise, number)
    count = index.shape[0]
    return rows.new_empty((count, rows.shape[1]), dtype=torch.float32), rows.new_empty((count,), dtype=torch.bool)


def _check_vectors(rows: torch.Tensor, index: torch.Tensor, *others: torch.Tensor | None) -> None:
    mean, noise, number = others
    for name, tensor in {"rows": rows, "index": index, "mean": mean, "noise": noise, "number": number}.items():
        if tensor is not None and tensor.device.type != "cpu":
            raise OptionError(f"{name}: expected a tensor on cpu, found {tensor.device}; move it with .cpu()")
    if rows.dim() != 2 or str(rows.dtype).removeprefix("torch.") not in TYPES:
        raise OptionError(f"rows: expected [N, D] of {', '.join(TYPES)}, found {rows.dtype} {list(rows.shape)}")
    for name, numbers in {"index": index, "number": number}.items():
        if numbers is not None and (numbers.dim() != 1 or numbers.dtype not in (torch.int32, torch.int64)):
            raise OptionError(f"{name}: expected int64 [B], found {numbers.dtype} {list(numbers.shape)}")
    for name, values in {"mean": mean, "noise": noise}.items():
        if values is not None and values.dtype != torch.float32:
            raise OptionError(f"{name}: expected float32, found {values.dtype}")
        _shape(name, values, "the columns of the rows", rows.shape[1])


_vectors_operator = define(
    "vector_rows",
    "(Tensor rows, Tensor index, Tensor? mean, Tensor? noise, float dropout, SymInt seed, SymInt epoch, "
    "Tensor? number=None, SymInt view_number=0, SymInt threads=0) -> (Tensor, Tensor)",
    _vectors,
    _vectors_fake,
)


def vector_rows(
    rows: torch.Tensor,
    index: torch.Tensor,
    mean: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    dropout: float = 0.0,
    *,
    seed: int = 0,
    epoch: int = 0,
    number: torch.Tensor | None = None,
    view_number: int = 0,
    threads: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sela_ext.kernels.vector_rows` of CPU tensors: `sela::vector_rows`.

    Args:
        rows: [N, D] float16, float32 or float64, contiguous, on the CPU as all others.
        index: int64 [B] in 0 .. N - 1.
        mean: float32 [D], what a left-out feature becomes; None: rows as they are.
        noise: float32 [D], deviation of the noise of every feature, >= 0; None: none.
        dropout: probability that a feature is left out, in [0, 1).
        seed: the key, [0, 2^64).
        epoch: [0, 2^32).
        number: int64 [B] in [0, 2^40), what the draws of each row are keyed by; None: `index`.
        view_number: [0, 256).
        threads: CPU threads, 0 for all.

    Returns:
        float32 [B, D], and bool [B]: whether all numbers of the row are finite in float32 (before noise).

    Raises:
        OptionError: another type, shape, memory order or device, or a key out of range.

    Example:
        >>> rows = torch.arange(6.0).reshape(3, 2)
        >>> vector_rows(rows, torch.tensor([2, 0]))[0].tolist()
        [[4.0, 5.0], [0.0, 1.0]]
    """
    check_key(seed, epoch, view_number)
    signed = seed - 2**64 if seed >= 2**63 else seed
    found: tuple[torch.Tensor, torch.Tensor] = _vectors_operator(
        rows, index, mean, noise, dropout, signed, epoch, number, view_number, threads
    )
    return found
