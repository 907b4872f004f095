"""The formats of a graph: ONNX, TorchScript and PT2. The size of the batch is dynamic in each."""

import contextlib
import io
import logging
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
import torch
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from torch import Tensor
from torch.jit import TracerWarning  # type: ignore[attr-defined]

from avex_export.graph import Graph
from avex_export.passes import CONSTANTS, EXTERNAL_DATA
from avex_serve.bundles.manifest import DATA_SUFFIX
from avex_serve.errors import ExportError

# Weights of more bytes than this are written to a separate file, which is mapped instead of read twice.
_LARGE = 8 * 2**20
# Fields in which torch.export records the source file of each node.
_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


@contextlib.contextmanager
def _quiet_tracing() -> Iterator[None]:
    """Run without gradients, without torch's transformer fast path, and without warnings of torch's exporters.

    The fast path is one opaque operator that neither ONNX nor the meta device has.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), torch.no_grad():
        # TorchScript is deprecated, but it loads on CUDA without compilation.
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        # torch's own layers check sizes, which hold for every input of the traced shape.
        warnings.filterwarnings("ignore", category=TracerWarning, module=r"torch\.nn\.")
        # An LSTM keeps its weights in a list, which torch.export reports.
        warnings.filterwarnings("ignore", r"The tensor attributes .*_flat_weights", UserWarning)
        warnings.filterwarnings("ignore", "_check_is_size will be removed", FutureWarning)
        # Raised by torch.export's own code.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            logger.setLevel(logging.ERROR)  # it reports every optional package that is not installed
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            logger.setLevel(level)


def _dynamic_axes(graph: Graph, example: Sequence[Tensor], time: Any) -> tuple[dict[int, Any], ...]:
    """The axes of each input that torch.export keeps dynamic: the batch, and time if the graph takes any length."""
    batch = torch.export.Dim.DYNAMIC
    return tuple({0: batch, 1: time} if graph.any_length else {0: batch} for _ in example)


# -- ONNX ---------------------------------------------------------------------------------------------------------


def write_onnx(
    graph: Graph,
    example: Sequence[Tensor],
    path: Path,
    input_names: Sequence[str],
    metadata: Mapping[str, str],
    without: Collection[str] = (),
) -> None:
    """Export the graph by torch.export and write it; large weights are written to a second file next to it.

    Args:
        graph: the graph.
        example: a batch (B, …) of each input.
        path: the file.
        input_names: of the graph.
        metadata: properties of the file.
        without: passes to leave out; only `CONSTANTS` and `EXTERNAL_DATA` have an effect here.

    Raises:
        ExportError: the graph can't be exported.
    """
    with _quiet_tracing():
        # Not optimised: onnxscript's optimiser deletes additions of small constants, without which the logarithm of
        # silence is not finite. onnxruntime does most of its other work better, for the machine that it runs on.
        try:
            program = torch.onnx.export(
                graph,
                tuple(example),
                dynamo=True,
                dynamic_shapes=_dynamic_axes(graph, example, torch.export.Dim.DYNAMIC),
                input_names=list(input_names),
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = str(error.__cause__ or error).strip().splitlines()
            raise ExportError(
                f"the model can't be written as ONNX: {cause[0] if cause else error}. A forward pass may use no "
                "numbers that depend on the batch, such as len(x) (use x.shape[0]); or export --format torchscript"
            ) from error
    assert program is not None
    if CONSTANTS not in without:
        _name_transposed_weights(program.model.graph)
        fold_constants(program.model)
        remove_unused_nodes(program.model)
    model = _rename_outputs(program.model_proto, graph.outputs)
    _drop_provenance(model.graph)
    onnx.helper.set_model_props(model, dict(metadata))
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if EXTERNAL_DATA not in without and size > _LARGE:
        data = path.with_name(path.name + DATA_SUFFIX)
        onnx.save_model(model, path, save_as_external_data=True, location=data.name)
        data.chmod(path.stat().st_mode)  # onnx makes it readable for its owner only
    else:
        onnx.save_model(model, path)
    onnx.checker.check_model(path)


def _name_transposed_weights(graph: Iterable[Any]) -> None:
    """Name a folded weight after the weight that it was made from, so that its name contains the layer's name."""
    transposed = {
        node.inputs[0].name: node
        for node in graph
        if node.op_type in ("Transpose", "Reshape")
        and node.inputs[0] is not None
        and node.inputs[0].is_initializer()
    }
    for name, node in transposed.items():
        node.outputs[0].name = f"{name}.{node.op_type.lower()}d"


def _rename_outputs(model: onnx.ModelProto, names: tuple[str, ...]) -> onnx.ModelProto:
    # Inner values have the names of torch's operators, such as "embedding". The prefix avoids a conflict with ours.
    model = onnx.compose.add_prefix(model, "g/", rename_inputs=False)
    renamed = {output.name: name for output, name in zip(model.graph.output, names, strict=True)}
    for output in model.graph.output:
        output.name = renamed[output.name]
    for node in model.graph.node:
        node.output[:] = [renamed.get(name, name) for name in node.output]
        node.input[:] = [renamed.get(name, name) for name in node.input]
    return model


def _drop_provenance(graph: onnx.GraphProto) -> None:
    # torch records the source file and line of each node: a megabyte, and paths of the exporting machine.
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


# -- TorchScript --------------------------------------------------------------------------------------------------


def write_torchscript(graph: Graph, example: Sequence[Tensor], path: Path) -> None:
    """Trace the graph on example inputs, (B, …) each, and write it. The file runs on any device."""
    with _quiet_tracing():
        # The trace is not checked here: verification compares it on more inputs than the example.
        traced = torch.jit.trace(graph, tuple(example), check_trace=False)  # type: ignore[no-untyped-call]
        archive = io.BytesIO()
        torch.jit.save(traced, archive)
    # The archive is a zip file. It records the source file of each operation, which nobody needs to run it.
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w") as target:
        for record in source.infolist():
            if not record.filename.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(record.filename), source.read(record))


def meta_shapes(path: Path, example: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Output shapes of the traced module on the meta device; RuntimeError if a device is fixed in it."""
    with _quiet_tracing():
        module = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
        # Loading onto meta directly fails in torch itself, which compares constants by value.
        for part in module.modules():
            for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                setattr(part, name, tensor.to("meta"))
        return [tuple(output.shape) for output in module(*(each.to("meta") for each in example))]


# -- PT2 ----------------------------------------------------------------------------------------------------------


def write_pt2(graph: Graph, example: Sequence[Tensor], path: Path) -> None:
    """Export the graph by torch.export and write it, for compilation (AOTInductor) or for torch.

    A dynamic time axis is fixed if torch.export finds a reason.
    """
    axes = _dynamic_axes(graph, example, torch.export.Dim.AUTO)
    with _quiet_tracing():
        program = torch.export.export(graph, tuple(example), dynamic_shapes=axes, strict=False)
        for node in program.graph.nodes:
            for key in _PROVENANCE:
                node.meta.pop(key, None)
        archive = io.BytesIO()
        torch.export.save(program, archive)
    path.write_bytes(archive.getvalue())


class Pt2Backend:
    """Runs an exported program without compilation, to verify it; see `avex_serve.inference.backend.Backend`."""

    device = "cpu"
    format = "pt2"
    max_batch = 1

    def __init__(self, path: Path, output_names: list[str]) -> None:
        """Load the program."""
        with _quiet_tracing():
            self._module = torch.export.load(path).module()
        self._output_names = output_names

    @torch.inference_mode()
    def run(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name for the inputs, (B, …) each."""
        outputs = self._module(*map(torch.from_numpy, inputs))
        return {name: tensor.numpy() for name, tensor in zip(self._output_names, outputs, strict=True)}
