"""Kernels and weights of ONNX Runtime's CUDA provider are tried over the stub, which has no cuDNN."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from llmc.backends.onnxruntime.cudnn import needs_cudnn
from tests.cuda import read_counters, stub_environment

# Runs models on CUDA, and prints for each whether cuDNN is what it lacks.
_RUN = """
import json, sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 4
lacking = []
for model in sys.argv[1:]:
    session = ort.InferenceSession(model, options, providers=["CUDAExecutionProvider"])
    feeds = {each.name: np.ones(each.shape, np.float16) for each in session.get_inputs()}
    try:
        session.run(None, feeds)
    except Exception as error:
        assert "cuDNN is unavailable" in str(error), error
        lacking.append(model)
print(json.dumps(lacking))
"""


# Runs a graph of one operator.
_SESSION = """
import numpy as np, onnxruntime as ort
from onnx import TensorProto, helper
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
graph = helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "exp", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
options = ort.SessionOptions()
options.log_severity_level = 4
session = ort.InferenceSession(model.SerializeToString(), options, providers=["CUDAExecutionProvider"])
try:
    print(session.get_providers()[0], session.run(None, {"x": np.ones(2, np.float32)})[0].tolist())
except Exception as error:
    print(error)
"""


def printed(script: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return ended.stdout


def model_of(call: str, inputs: str) -> ir.Model:
    text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        single ({inputs}) => (float16 out) {{ {call} }}
    """
    return ir.from_onnx_text(text)


X, Y = "float16[2, 3, 4] x", "float16[2, 4, 5] y"
CALLS = [
    *((f"axes = Constant <value_ints = [{axes}]> () out = {name} (x, axes)", X)
      for name in ("ReduceMax", "ReduceMean", "ReduceSum", "ReduceL2", "ReduceMin", "ReduceSumSquare")
      for axes in ("-1", "2", "0", "1", "0, 2", "-2, -1", "0, 1")),
    ('out = Conv <group = 4> (x, y)', "float16[1, 4, 8] x, float16[4, 1, 3] y"),
    ('out = Einsum <equation = "bij,bjk->bik"> (x, y)', f"{X}, {Y}"),
    ("out = AveragePool <kernel_shape = [2]> (x)", X),
    ("out = Softmax (x)", X),
    *((f"sum = Add ({order}) out = Softmax <axis = {axis}> (sum)", f"{X}, float16[{sizes}] bias")
      for order in ("x, bias", "bias, x")
      for axis, sizes in ((-1, "2, 3, 4"), (2, "2, 3, 4"), (-1, "1, 3, 4"), (-1, "3, 4"), (-1, "4"),
                          (-1, "2, 1, 4"), (-1, "1, 1, 4"), (-1, "2, 3, 1"), (1, "2, 3, 4"))),
    ("sum = Add (x, x) out = Softmax (sum)", X),
    ("out = MatMul (x, y)", f"{X}, {Y}"),
]  # fmt: skip


def test_operators_that_need_cudnn(tmp_path: Path, cuda_stub: Path) -> None:
    said, models = set(), []
    for number, (call, inputs) in enumerate(CALLS):
        model = model_of(call, inputs)
        models.append(str(tmp_path / f"{number}.onnx"))
        ir.save(model, models[-1])
        if needs_cudnn(model) is not None:
            said.add(models[-1])
    command = [sys.executable, "-c", _RUN, *models]
    environment = stub_environment(cuda_stub)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    lacking = set(json.loads(ended.stdout))
    assert said == lacking, ort.__version__
    assert 0 < len(lacking) < len(models)


def test_kernels_do_nothing(cuda_stub: Path, tmp_path: Path) -> None:
    environment = stub_environment(cuda_stub, count=tmp_path / "count")
    assert printed(_SESSION, environment) == "CUDAExecutionProvider [0.0, 0.0]\n"
    counted = read_counters(tmp_path / "count")
    assert (counted.launches, counted.to_device, counted.to_host) == (1, 1, 1)


@pytest.mark.parametrize(("capability", "runs"), [("8.7", True), ("10.0", False), ("12.1", False)])
def test_kernels_need_code_for_the_gpu(cuda_stub: Path, capability: str, runs: bool) -> None:
    said = printed(_SESSION, stub_environment(cuda_stub, capability=capability))
    assert ("no kernel image is available" not in said) is runs


_OPEN = """
import sys
from pathlib import Path
from llmc.config import Provider
from llmc.runtime.ort_session import open_session
open_session(Path(sys.argv[1]), 1, provider=Provider.CUDA)
"""


def test_weights_take_no_more_memory_than_their_size(tmp_path: Path, cuda_stub: Path) -> None:
    weight = np.ones((1024, 2304), np.float32)  # 9.4 MB, for which an arena takes 16 MB
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, size])
        for name, size in (("x", 1024), ("y", 2304))
    ]
    stored = [onnx.numpy_helper.from_array(weight, "w")]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], stored)
    opsets = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    count = tmp_path / "count"
    command = [sys.executable, "-c", _OPEN, str(tmp_path)]
    subprocess.run(command, env=stub_environment(cuda_stub, count=count), timeout=120, check=True)
    assert weight.nbytes <= read_counters(count).allocated_peak < 1.2 * weight.nbytes
