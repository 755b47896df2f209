"""CUDA artifacts of every kind of layer, executed by ONNX Runtime's own CUDA code over the stub.

Kernels do nothing, so the tokens mean nothing; where nodes are, and what a token costs the host, is true.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.cuda import Counters, stub_environment
from tests.models import EOS, save_tiny_model
from tests.placement import Placement, place

#: Model types with different kinds of layers, each built for one of the targets.
TARGETS = {
    "llama": "cuda-int4",
    "gemma3_text": "cuda-fp16",  # windows
    "gpt2": "cuda-fp16",  # absolute positions
    "bloom": "cuda-int4",  # positions as biases of plain attention
    "qwen3_moe": "cuda-int4",  # experts
    "gpt_oss": "cuda-int4",  # sinks
    "deepseek_v3": "cuda-fp16",  # latent attention
    "qwen3_next": "cuda-int4",  # linear attention between attention
    "mamba": "cuda-fp16",  # no attention
}
#: Copies between host and device in the graph. Bloom counts positions from the number of earlier tokens, an
#: integer of the host's arithmetic of shapes.
COPIES = {"bloom": 1}
#: Where the step is not one CUDA graph: most kernels and products that the host starts for a token, and most
#: copies to the device. The chosen token is read without a copy.
BOUNDS = {"bloom": (100, 1), "deepseek_v3": (340, 0), "mamba": (155, 9)}
#: Most kernels besides that graph.
BESIDE_GRAPH = 11
FEW, MANY = 4, 20

# Generates with each artifact, few tokens and many, and prints what each call counted.
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


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build an artifact of each type."""
    folder = tmp_path_factory.mktemp("artifacts")
    built = {}
    for model_type, target in TARGETS.items():
        model = save_tiny_model(model_type, folder / model_type, tokenizer=True, eos_token_id=EOS)
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
def costs(
    artifacts: dict[str, Path], cuda_stub: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Counters]:
    """Generate with all of them in one process; what the tokens from `FEW` to `MANY` cost together."""
    count = tmp_path_factory.mktemp("counted") / "count"
    command = [sys.executable, "-c", _GENERATE % (FEW, MANY), str(count), *map(str, artifacts.values())]
    environment = stub_environment(cuda_stub, count=count)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    counted = [Counters(*map(int, line.split())) for line in ended.stdout.splitlines()]
    return {name: many - few for name, few, many in zip(artifacts, counted[::2], counted[1::2], strict=True)}


@pytest.mark.parametrize("model_type", TARGETS)
def test_all_but_arithmetic_of_shapes_is_on_cuda(placements: dict[str, Placement], model_type: str) -> None:
    placed = placements[model_type]
    assert placed.strays == ()
    assert len(placed.copies) == COPIES.get(model_type, 0), placed.copies
    assert placed.on_cuda > 20


@pytest.mark.parametrize("model_type", TARGETS)
def test_what_a_token_costs_the_host(costs: dict[str, Counters], model_type: str) -> None:
    cost, tokens = costs[model_type], MANY - FEW
    starts, to_device = BOUNDS.get(model_type, (BESIDE_GRAPH + 1, 0))
    assert cost.graphs == (0 if model_type in BOUNDS else tokens)
    assert 0 < cost.starts <= starts * tokens
    assert cost.to_device <= to_device * tokens
    assert cost.to_host == 0
    assert 0 < cost.syncs <= 3 * tokens


def test_the_command_line_runs_to_its_end(artifacts: dict[str, Path], cuda_stub: Path) -> None:
    command = [sys.executable, "-m", "llmc", "run", str(artifacts["llama"]), "Hello", "--max-tokens", "20"]
    ended = subprocess.run(
        command, env=stub_environment(cuda_stub), capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
