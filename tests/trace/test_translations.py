"""Operators that llmc translates itself, against torch."""

import warnings

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from llmc.graph.domains import OPSET
from llmc.trace.translations import translations


def test_the_inverse_of_the_error_function() -> None:
    class Inverse(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.erfinv(x)

    x = torch.cat([torch.linspace(-0.999999, 0.999999, 401), torch.tensor([0.95, 1 - 1e-6])])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter uses what torch deprecates
        program = torch.onnx.export(
            torch.export.export(Inverse(), (x,)),
            opset_version=OPSET,
            custom_translation_table=translations(),
            verbose=False,
        )
    assert program is not None
    data = ir.to_proto(program.model).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, torch.erfinv(x.double()).numpy(), rtol=4e-6)
