"""What sessions of CUDA artifacts load and serve, by the runtimes' own CUDA code over the stub."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.cuda import Counters, read_counters, stub_environment
from tests.models import EOS, save_tiny_model

#: What is built: target, model type and fields of its config.
ARTIFACTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "floats": ("cuda-fp16", "llama", {"tie_word_embeddings": True}),
    "codes": ("cuda-int4", "llama", {"tie_word_embeddings": True}),
    "experts": ("cuda-int4", "qwen3_moe", {"hidden_size": 128, "moe_intermediate_size": 64}),
}
#: Bytes of tokens, masks and sums of codes' zero points that go to the device beside the weights.
FEW_BYTES = 4096

_GENERATE = """
import sys
from dataclasses import astuple
from pathlib import Path
from llmc.backends.onnxruntime.generate import generate_tokens
from tests.cuda import read_counters
count = Path(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    before = read_counters(count)
    assert len(generate_tokens(folder, [5, 9, 17], 4)) == 4
    print(*astuple(read_counters(count) - before))
"""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    built = {}
    for name, (target, model_type, fields) in ARTIFACTS.items():
        model = save_tiny_model(
            model_type, folder / f"{name}-model", tokenizer=True, eos_token_id=EOS, **fields
        )
        built[name] = folder / name
        plan = plan_build(str(model), target=target, profile="l4", output=built[name], verify=False)
        build(plan, SilentProgress())
    return built


@pytest.fixture(scope="module")
def loaded(
    artifacts: dict[str, Path], cuda_stub: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Counters]:
    """Load each, and generate four tokens."""
    count = tmp_path_factory.mktemp("counted") / "count"
    command = [sys.executable, "-c", _GENERATE, str(count), *map(str, artifacts.values())]
    environment = stub_environment(cuda_stub, count=count)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    counted = [Counters(*map(int, line.split())) for line in ended.stdout.splitlines()]
    return dict(zip(artifacts, counted, strict=True))


@pytest.mark.parametrize("name", ["floats", "codes"])
def test_the_device_gets_one_copy_of_every_weight(
    artifacts: dict[str, Path], loaded: dict[str, Counters], name: str
) -> None:
    stored = (artifacts[name] / "model.onnx.data").stat().st_size
    entry = {"floats": 128, "codes": 32}[name]  # bytes of a row of the embedding, of which there are 256
    assert 256 * entry > FEW_BYTES
    assert loaded[name].bytes_to_device < stored + FEW_BYTES


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


def test_experts_are_codes_that_cuda_takes(artifacts: dict[str, Path], loaded: dict[str, Counters]) -> None:
    graph = onnx.load(artifacts["experts"] / "model.onnx", load_external_data=False).graph
    experts = [node for node in graph.node if node.op_type == "QMoE"]
    assert len(experts) == 3
    for node in experts:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes["expert_weight_bits"], attributes["block_size"]) == (4, 32)
        assert all(node.input[11:13])  # zero points
    assert loaded["experts"].graphs == 3  # of four tokens, the first is of the prompt


_BATCHES = """
import sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)
for prompts, beams in ((["Hello", "Hello there, how are you?", "Hi"], 1), (["Hello"], 1), (["Hello"], 2)):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=64, batch_size=len(prompts), num_beams=beams)
    try:
        generator = og.Generator(model, params)
        generator.append_tokens(tokenizer.encode_batch(prompts))
        for _ in range(5):
            generator.generate_next_token()
        print(len(prompts), beams, "served")
    except Exception as error:
        print(len(prompts), beams, error)
"""


def test_ragged_batches_are_served_with_a_cuda_graph(artifacts: dict[str, Path], cuda_stub: Path) -> None:
    command = [sys.executable, "-c", _BATCHES, str(artifacts["codes"])]
    ended = subprocess.run(
        command, env=stub_environment(cuda_stub), capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.splitlines() == [
        "3 1 served",
        "1 1 served",
        "1 2 Graph capture is not supported with past_present_share_buffer set to false.",
    ], ended.stderr
