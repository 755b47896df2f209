"""Opset versions against the schemas of ONNX."""

import onnx
import pytest

from llmc.graph.domains import OPSET, SINCE, STANDARD


@pytest.mark.parametrize("operator", SINCE)
def test_an_operator_exists_since_its_opset_and_not_in_that_of_a_trace(operator: str) -> None:
    assert onnx.defs.get_schema(operator, SINCE[operator], STANDARD).since_version == SINCE[operator]
    with pytest.raises(onnx.defs.SchemaError):
        onnx.defs.get_schema(operator, SINCE[operator] - 1, STANDARD)
    assert SINCE[operator] > OPSET
