"""A network as an ONNX graph, compared with torch before it is written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from sela_ext.data.messages import first_line
from sela_ext.errors import NumericsError, OptionError
from sela_ext.export.destination import Exported, write_bytes
from sela_ext.export.network import Outputs, Plain, load_plain
from sela_ext.export.optional import optional_package
from sela_ext.export.request import Request

OPSETS = (18, 23)
# Largest difference to torch's features and logits, of the largest value among them.
TOLERANCE = 1e-4
# Batches that are compared: none has the size of the one that the graph is made with.
_BATCHES = (1, 5)
# A message of protocol buffers is at most 2 GiB.
_MOST_BYTES = (1 << 31) - 1


def write_onnx(path: Path, request: Request, *, overwrite: bool) -> Exported:
    """Write a graph from inputs to features, and to logits and labels of the heads that are asked for.

    Raises:
        OptionError: packages that are not installed, an opset that there is not, or a network that cannot be exported.
        NumericsError: what the graph gives is not what torch gives; nothing is written.
    """
    low, high = OPSETS
    opset = request.opset
    if isinstance(opset, bool) or not isinstance(opset, int) or not low <= opset <= high:
        raise OptionError(f"opset: expected a number in {low} .. {high}, found {opset!r}")
    for package in ("onnx", "onnxscript"):
        optional_package(package, "onnx", 'format "onnx"')
    plain = load_plain(request, "none")
    outputs = Outputs(plain).eval()
    proto = _graph(plain, outputs, opset)
    found = {one.domain: one.version for one in proto.opset_import}
    if found.get("") != opset:
        raise OptionError(f"opset: expected {opset}, found that torch wrote {found.get('')}; name that one")
    for key, value in plain.strings().items():
        proto.metadata_props.add(key=key, value=value)
    size = proto.ByteSize()
    if size > _MOST_BYTES:
        raise OptionError(f"run: expected a network below 2 GiB for one ONNX file, found {size:,} bytes")
    data = proto.SerializeToString()
    facts = plain.facts() | {"opset": opset, "outputs": outputs.names}
    lines = [
        f"{plain.model}: opset {opset}, {len(data):,} bytes",
        *plain.told(graph=True),
        f"outputs: {', '.join(outputs.names)}",
    ]
    try:
        runtime = optional_package("onnxruntime", "onnx", "checking")
    except OptionError as error:
        lines.append(f"not compared with torch: {error}")
    else:
        difference = compare(runtime, data, outputs, plain.shape)
        facts["max_difference"] = difference
        lines.append(f"largest difference to torch in onnxruntime {runtime.__version__}: {difference:.1e} (relative)")
    write_bytes(path, data, overwrite=overwrite)
    return Exported(path, "onnx", lines, facts)


def _graph(plain: Plain, outputs: Outputs, opset: int) -> Any:
    """The graph, without what tells of this machine's files."""
    inputs = torch.zeros(2, *plain.shape)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own making
            program = torch.onnx.export(
                outputs,
                (inputs,),
                dynamo=True,
                input_names=["images" if plain.mean else "vectors"],
                output_names=outputs.names,
                dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
                opset_version=opset,
                verbose=False,
            )
        assert program is not None
        proto = program.model_proto
    except Exception as error:  # the exporter raises many kinds, for layers that it does not know
        raise OptionError(f"format: {plain.model} cannot be written as ONNX: {first_line(error)}") from error
    # Every node tells the source lines it comes from, and where they lie.
    for part in (proto.graph, *proto.functions):
        for node in part.node:
            del node.metadata_props[:]
            node.doc_string = ""
    return proto


def compare(runtime: Any, graph: bytes, outputs: Outputs, shape: tuple[int, ...]) -> float:
    """The largest difference between a graph and torch, of the largest value of an output; labels must agree.

    Args:
        runtime: the module onnxruntime.
        graph: an ONNX file's content.
        outputs: the network in torch.
        shape: of one input.

    Raises:
        NumericsError: above `TOLERANCE`, or the graph does not run.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of the runtime's own kinds
        raise NumericsError(
            f"onnx: onnxruntime does not take the graph: {first_line(error)}; try another opset"
        ) from error
    largest = 0.0
    draws = torch.Generator().manual_seed(0)
    name = session.get_inputs()[0].name
    for count in _BATCHES:
        inputs = torch.randn(count, *shape, generator=draws)
        with torch.no_grad():
            expected = outputs(inputs)
        found = session.run(None, {name: inputs.numpy()})
        for which, ours, theirs in zip(outputs.names, expected, found, strict=True):
            if ours.dtype == torch.int64:
                continue  # labels follow from the logits, and may differ only where two are equal
            scale = max(float(ours.abs().max()), float(torch.finfo(torch.float32).tiny))
            difference = float((torch.from_numpy(theirs) - ours).abs().max()) / scale
            if not difference <= TOLERANCE:
                raise NumericsError(
                    f"onnx: expected {which} as torch gives them within {TOLERANCE:g} (relative), found "
                    f"{difference:.1e}; nothing was written; try another opset"
                )
            largest = max(largest, difference)
    return largest
