"""ONNX Runtime's own CUDA code executes artifacts of every kind of layer over the stub.

Kernels do nothing, so the tokens mean nothing; where nodes are, and what a token costs the host, is true.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from llmc.errors import ExitCode
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.cuda import Counters, stub_environment
from tests.models import EOS, save_tiny_model
from tests.placement import Placement, place

#: Model types with different kinds of layers, each built for one of the targets.
TARGETS = {
    "llama": "cuda-int4",
    "gemma3_text": "cuda-fp16",  # windows; its embedding is the language-model head, too
    "gpt2": "cuda-fp16",  # absolute positions
    "bloom": "cuda-int4",  # positions as biases of plain attention
    "qwen3_moe": "cuda-int4",  # experts
    "gpt_oss": "cuda-int4",  # sinks
    "deepseek_v3": "cuda-fp16",  # latent attention
    "qwen3_next": "cuda-int4",  # linear attention between attention
    "mamba": "cuda-fp16",  # no attention
}
#: Fields of their configs that differ from `tests.models`: one matrix is embedding and head, and experts have
#: widths that CUDA's kernels of quantized experts take.
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 64},
}
#: Copies between host and device in the graph. Bloom counts positions from the number of earlier tokens, an
#: integer of the host's arithmetic of shapes.
COPIES = {"bloom": 1}
#: Where the step is not one CUDA graph: most kernels and products that the host starts for a token, and most
#: copies to the device. The chosen token is read without a copy.
BOUNDS = {"bloom": (100, 1), "deepseek_v3": (340, 0), "mamba": (155, 0)}
#: Most kernels besides that graph.
BESIDE_GRAPH = 11
FEW, MANY = 4, 20
#: Bytes of tokens, masks and sums of codes' zero points that go to the device beside the weights.
FEW_BYTES = 4096

# Loads each artifact and generates few tokens, then the same with many, and prints what each call counted.
_GENERATE = """
import json, sys
from dataclasses import astuple
from pathlib import Path
from llmc.backends.onnxruntime.generate import generate_tokens
from tests.cuda import read_counters
count = Path(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    for steps in (%d, %d):
        before = read_counters(count)
        tokens = generate_tokens(folder, [5, 9, 17], steps)
        assert len(tokens) == steps, tokens
        print(*astuple(read_counters(count) - before))
"""

# Prints what to do about an artifact that this machine cannot run.
_REFUSED = """
import sys
from pathlib import Path
from llmc.backends.onnxruntime.generate import generate_tokens
from llmc.errors import ResourceError
try:
    generate_tokens(Path(sys.argv[1]), [5, 9, 17], 4)
except ResourceError as error:
    print(error.hint)
"""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build an artifact of each type."""
    folder = tmp_path_factory.mktemp("artifacts")
    built = {}
    for model_type, target in TARGETS.items():
        fields = FIELDS.get(model_type, {})
        model = save_tiny_model(model_type, folder / model_type, tokenizer=True, eos_token_id=EOS, **fields)
        output = built[model_type] = folder / f"{model_type}-{target}"
        plan = plan_build(str(model), target=target, profile="l4", output=output, verify=False)
        build(plan, SilentProgress())
    return built


@pytest.fixture(scope="module")
def placements(
    artifacts: dict[str, Path], cuda_stub: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Placement]:
    """Open all of them in one process."""
    models = [folder / "model.onnx" for folder in artifacts.values()]
    placed = place(models, stub_environment(cuda_stub), tmp_path_factory.mktemp("placed"))
    return dict(zip(artifacts, placed, strict=True))


@pytest.fixture(scope="module")
def counted(
    artifacts: dict[str, Path], cuda_stub: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Counters, Counters]]:
    """Generate with all of them in one process; count what loading and `FEW` or `MANY` tokens take."""
    count = tmp_path_factory.mktemp("counted") / "count"
    command = [sys.executable, "-c", _GENERATE % (FEW, MANY), str(count), *map(str, artifacts.values())]
    environment = stub_environment(cuda_stub, count=count)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    counters = [Counters(*map(int, line.split())) for line in ended.stdout.splitlines()]
    return dict(zip(artifacts, zip(counters[::2], counters[1::2], strict=True), strict=True))


@pytest.mark.parametrize("model_type", TARGETS)
def test_all_but_arithmetic_of_shapes_is_on_cuda(placements: dict[str, Placement], model_type: str) -> None:
    placed = placements[model_type]
    assert placed.strays == ()
    assert len(placed.copies) == COPIES.get(model_type, 0), placed.copies
    assert placed.shared == ()
    assert placed.on_cuda > 20


@pytest.mark.parametrize("model_type", TARGETS)
def test_what_a_token_costs_the_host(counted: dict[str, tuple[Counters, Counters]], model_type: str) -> None:
    few, many = counted[model_type]
    cost, tokens = many - few, MANY - FEW
    starts, to_device = BOUNDS.get(model_type, (BESIDE_GRAPH + 1, 0))
    assert cost.graphs == (0 if model_type in BOUNDS else tokens)
    assert 0 < cost.starts <= starts * tokens
    assert cost.to_device <= to_device * tokens
    assert cost.to_host == 0
    assert 0 < cost.syncs <= 3 * tokens


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_the_device_gets_one_copy_of_every_weight(
    artifacts: dict[str, Path], counted: dict[str, tuple[Counters, Counters]], model_type: str
) -> None:
    stored = (artifacts[model_type] / "model.onnx.data").stat().st_size
    entry = {"llama": 32, "gemma3_text": 128}[model_type]  # bytes of a row of the embedding, which has 256
    assert 256 * entry > FEW_BYTES
    assert counted[model_type][0].bytes_to_device < stored + FEW_BYTES


def test_experts_are_codes_that_cuda_takes(artifacts: dict[str, Path]) -> None:
    graph = onnx.load(artifacts["qwen3_moe"] / "model.onnx", load_external_data=False).graph
    experts = [node for node in graph.node if node.op_type == "QMoE"]
    assert len(experts) == 3
    for node in experts:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes["expert_weight_bits"], attributes["block_size"]) == (4, 32)
        assert all(node.input[11:13])  # zero points


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
    command = [sys.executable, "-c", _BATCHES, str(artifacts["llama"])]
    ended = subprocess.run(
        command, env=stub_environment(cuda_stub), capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.splitlines() == [
        "3 1 served",
        "1 1 served",
        "1 2 Graph capture is not supported with past_present_share_buffer set to false.",
    ], ended.stderr


def run(artifact: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Ask an artifact for 20 tokens by the command line."""
    command = [sys.executable, "-m", "llmc", "run", str(artifact), "Hello", "--max-tokens", "20"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_command_line_runs_to_its_end(artifacts: dict[str, Path], cuda_stub: Path) -> None:
    ended = run(artifacts["llama"], stub_environment(cuda_stub))
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("machine", "fact", "hint"),
    [
        ({"without": ("libcuda.so.1",)}, "no NVIDIA GPU, or no driver", "libcuda.so.1"),
        ({"driver": 12040}, "driver supports CUDA 12.4", "driver 580 or newer"),
        ({"without": ("libcufft.so.12",)}, "libcufft.so.12", "pip install 'nvidia-cufft'"),
        (
            {"capability": "10.0,9.0"},
            "no code for CUDA stub 10.0",
            "CUDA_VISIBLE_DEVICES=GPU-00000000-0000-0000-0000-000000000002",
        ),
        ({"visible": ""}, "CUDA_VISIBLE_DEVICES='' leaves no GPU", "unset it"),
        ({"memory": 1 << 20}, "memory", "a shorter context"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_machine_that_cannot_run_it_is_told(
    artifacts: dict[str, Path], cuda_stub: Path, machine: dict[str, Any], fact: str, hint: str
) -> None:
    settings = {key: value for key, value in machine.items() if key != "visible"}
    environment = stub_environment(cuda_stub, **settings)
    if "visible" in machine:
        environment["CUDA_VISIBLE_DEVICES"] = machine["visible"]
    ended = run(artifacts["llama"], environment)
    assert ended.returncode == ExitCode.RESOURCES, ended.stderr
    assert ended.stdout.strip() == ""
    assert "Traceback" not in ended.stderr
    error, advice = ended.stderr.rstrip().rsplit("\n", 1)
    assert error.startswith("error: ")
    assert fact in error
    assert advice.startswith("hint: ")
    assert hint in advice


def test_experts_on_an_old_gpu_are_told(artifacts: dict[str, Path], cuda_stub: Path) -> None:
    ended = run(artifacts["qwen3_moe"], stub_environment(cuda_stub, capability="7.5"))
    assert ended.returncode == ExitCode.RESOURCES, ended.stderr
    assert "hint: experts need a GPU of compute capability 8.0 or newer" in ended.stderr


def test_an_operator_that_needs_cudnn_is_told(
    artifacts: dict[str, Path], cuda_stub: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(artifacts["llama"], tmp_path / "artifact")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    head = next(node for node in model.graph.node if "logits" in node.output)
    head.output[0] = "raw"
    model.graph.node.extend([
        onnx.helper.make_node("ReduceMax", ["raw"], ["most"], keepdims=1),
        onnx.helper.make_node("Sub", ["raw", "most"], ["logits"]),
    ])  # fmt: skip
    onnx.save(model, folder / "model.onnx")
    command = [sys.executable, "-c", _REFUSED, str(folder)]
    environment = stub_environment(cuda_stub)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout.startswith("pip install nvidia-cudnn-cu13"), ended.stderr
