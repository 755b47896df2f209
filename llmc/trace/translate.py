"""Translate an exported program to ONNX, with named dimensions, and weights that have no data."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import onnx_ir as ir

from llmc.errors import UnsupportedError
from llmc.graph.domains import OPSET
from llmc.graph.model import Placeholder
from llmc.trace.failure import root_cause
from llmc.trace.translations import translations


def translate(
    program: Any, inputs: Sequence[str], outputs: Sequence[str], dimensions: Sequence[Sequence[str | None]]
) -> ir.Model:
    """Translate an exported program to ONNX.

    Args:
        program: A `torch.export.ExportedProgram`.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        dimensions: Names of the dynamic dimensions of the first inputs, None for the others.

    Raises:
        UnsupportedError: ONNX has no operator for a part of it.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            onnx_program = torch.onnx.export(
                program,
                args=(),
                input_names=list(inputs),
                output_names=list(outputs),
                optimize=False,
                opset_version=OPSET,
                custom_translation_table=translations(),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = str(root_cause(error)).strip().splitlines() or ["no message"]
            raise UnsupportedError(
                f"the traced model cannot be expressed in ONNX: {cause[0]}",
                hint="run with --debug for the full traceback",
            ) from error
    if onnx_program is None:
        raise UnsupportedError("torch.onnx.export returned no model")
    model = onnx_program.model
    _rename_dimensions(model, dimensions)
    return model


def _rename_dimensions(model: ir.Model, dimensions: Sequence[Sequence[str | None]]) -> None:
    names: dict[str, str] = {}
    for value, dims in zip(model.graph.inputs, dimensions, strict=False):
        for dim, name in zip(value.shape or (), dims, strict=True):
            if name is not None:
                names[str(dim)] = name
    pattern = re.compile("|".join(rf"\b{re.escape(n)}\b" for n in names))

    def rename(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dim, int) or dim.value is None:
            return dim
        return ir.SymbolicDim(pattern.sub(lambda m: names[m.group()], str(dim.value)))

    values = [*model.graph.inputs, *(o for node in model.graph for o in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([rename(d) for d in value.shape])


def name_weights(graph: ir.Graph, weights: Collection[str], prefix: str) -> None:
    """Name initializers like the model's parameters, and drop the exporter's fake data.

    Args:
        weights: Names of those without data.
        prefix: Beginning of the initializers' names that is not part of the model's names.
    """
    for old, value in list(graph.initializers.items()):
        del graph.initializers[old]
        name = old.removeprefix(prefix)
        value.name = name
        if name in weights:
            tensor = value.const_value
            if tensor is None:
                raise UnsupportedError(f"the exporter left parameter {name} without a type")
            value.const_value = Placeholder(name, tensor.dtype, tuple(tensor.shape.numpy()))
            value.shape = ir.Shape(tensor.shape.numpy())
            value.type = ir.TensorType(tensor.dtype)
        graph.initializers[name] = value
