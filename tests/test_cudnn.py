"""Which operators need cuDNN, as ONNX Runtime's CUDA provider shows over the stub, which has none."""

import json
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir

from llmc.backends.onnxruntime.cudnn import needs_cudnn
from tests.cuda import stub_environment

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
    assert said == lacking
    assert 0 < len(lacking) < len(models)
