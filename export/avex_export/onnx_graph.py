"""ONNX: by torch.export, with a dynamic batch, our names, and the metadata that other tools read."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.compose
import torch
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from torch import Tensor

from avex_export.graph import Graph
from avex_export.passes import CONSTANTS, EXTERNAL_DATA
from avex_export.passes.transformers import MergedAttention
from avex_export.tracing import dynamic_axes, quiet_tracing
from avex_serve.bundles.manifest import DATA_SUFFIX
from avex_serve.errors import ExportError

# Beyond so many bytes of weights they go into a file of their own, which is mapped instead of read twice.
_LARGE = 8 * 2**20


def write_onnx(
    graph: Graph,
    example: Sequence[Tensor],
    path: Path,
    input_names: Sequence[str],
    metadata: Mapping[str, str],
    without: Collection[str] = (),
) -> None:
    """Export the graph on example inputs and write it.

    The batch is dynamic, and so is time if the graph takes any length.

    Args:
        graph: what to export.
        example: a batch (B, …) of each input.
        path: the file; weights that are large in all go into a file beside it.
        input_names: of the graph.
        metadata: the graph's properties.
        without: passes to leave out, of those that are about the file; see `avex_export.passes`.

    Raises:
        ExportError: the graph can't be exported.
    """
    with quiet_tracing(), _attention_in_parts(graph):
        # No optimiser: onnxscript's deletes additions of small constants, which silence needs. Most of the rest
        # onnxruntime does better, for the machine that it is on.
        try:
            program = torch.onnx.export(
                graph,
                tuple(example),
                dynamo=True,
                dynamic_shapes=dynamic_axes(graph, example),
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
        _name_turned_weights(program.model.graph)
        fold_constants(program.model)
        remove_unused_nodes(program.model)
    model = _rename_outputs(program.model_proto, graph.outputs)
    _forget_where_it_was_made(model.graph)
    onnx.helper.set_model_props(model, dict(metadata))
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if EXTERNAL_DATA not in without and size > _LARGE:
        data = path.with_name(path.name + DATA_SUFFIX)
        onnx.save_model(model, path, save_as_external_data=True, location=data.name)
        data.chmod(path.stat().st_mode)  # onnx makes it readable for its writer alone
    else:
        onnx.save_model(model, path)
    onnx.checker.check_model(path)


@contextlib.contextmanager
def _attention_in_parts(graph: Graph) -> Iterator[None]:
    parts = [part for part in graph.modules() if isinstance(part, MergedAttention)]
    for part in parts:
        part.fused = False
    try:
        yield
    finally:
        for part in parts:
            part.fused = True


def _name_turned_weights(graph: Iterable[Any]) -> None:
    """Call what is folded into a weight after it, so that weights are found in the graph by their layers' names."""
    turned = {
        node.inputs[0].name: node
        for node in graph
        if node.op_type in ("Transpose", "Reshape")
        and node.inputs[0] is not None
        and node.inputs[0].is_initializer()
    }
    for name, node in turned.items():
        node.outputs[0].name = f"{name}.{node.op_type.lower()}d"


def _rename_outputs(model: onnx.ModelProto, names: tuple[str, ...]) -> onnx.ModelProto:
    # Inner values are called after torch's operators, "embedding" for one: a prefix keeps ours free.
    model = onnx.compose.add_prefix(model, "g/", rename_inputs=False)
    renamed = {output.name: name for output, name in zip(model.graph.output, names, strict=True)}
    for output in model.graph.output:
        output.name = renamed[output.name]
    for node in model.graph.node:
        node.output[:] = [renamed.get(name, name) for name in node.output]
        node.input[:] = [renamed.get(name, name) for name in node.input]
    return model


def _forget_where_it_was_made(graph: onnx.GraphProto) -> None:
    # torch notes with each node where in which file it comes from: a megabyte, and paths of the exporting machine.
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
