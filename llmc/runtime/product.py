"""Multiply two matrices on the first GPU, to find out whether it computes at all."""

from typing import Any

import numpy as np

from llmc.config import Provider
from llmc.runtime.libraries import load_onnxruntime, require_cuda
from llmc.runtime.ort_session import create_session

#: Largest error of a GPU that computes: of small integers, float32 holds every product and every sum exactly.
PRODUCT_BOUND = 1e-3
_SIZE = 32
#: Severity above which onnxruntime writes nothing to stderr: its errors are raised.
_SILENT = 4


def product_error() -> float:
    """Multiply two matrices of small integers with ONNX Runtime, and return the largest error.

    Raises:
        ResourceError: CUDA cannot be used, or the provider does not load.
    """
    require_cuda()
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    session = create_session(ort, _product_model(), options, Provider.CUDA)
    random = np.random.default_rng(5)
    a, b = (random.integers(-4, 5, (_SIZE, _SIZE)).astype(np.float32) for _ in range(2))
    (product,) = session.run(None, {"a": a, "b": b})
    return float(np.abs(product - a @ b).max())


def _product_model() -> Any:
    import onnx_ir as ir

    kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([_SIZE, _SIZE])
    a, b, product = (ir.Value(name=name, type=kind, shape=shape) for name in ("a", "b", "product"))
    node = ir.Node("", "MatMul", [a, b], outputs=[product])
    graph = ir.Graph([a, b], [product], nodes=[node], opset_imports={"": 21}, name="product")
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
