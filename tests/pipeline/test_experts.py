"""A mixture of experts built for every shipped target that has an operator for it: what is stored."""

from pathlib import Path

import onnx_ir as ir
import pytest

from llmc.artifact.manifest import MODEL
from llmc.config import Metric, WeightRole
from llmc.pipeline import build, verify
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.models import EOS, save_tiny_model

LAYERS, EXPERTS, HIDDEN, INNER = 3, 4, 64, 128
#: Numbers in one layer's experts.
NUMBERS = EXPERTS * 3 * HIDDEN * INNER


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(
        "mixtral",
        tmp_path_factory.mktemp("mixture") / "model",
        tokenizer=True,
        eos_token_id=EOS,
        intermediate_size=INNER,
    )


@pytest.mark.parametrize("target", ["cpu-int4", "cpu-int4-compiled", "cuda-int4"])
def test_no_experts_are_stored_in_float(mixture: Path, tmp_path: Path, target: str) -> None:
    plan = plan_build(
        str(mixture),
        target=target,
        profile="l4" if target.startswith("cuda") else "local",
        output=tmp_path / "out",
        verify=False,
    )
    manifest = build(plan, SilentProgress()).manifest
    graph = ir.load(tmp_path / "out" / MODEL).graph
    assert [node.op_type for node in graph].count("QMoE") == LAYERS
    wide = [
        value.name
        for value in graph.initializers.values()
        if value.const_value is not None
        and value.const_value.size >= HIDDEN * INNER
        and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    ]
    assert wide == []
    stored = [t for t in manifest.weights if t.role is WeightRole.EXPERTS]
    # 4 bits, and for each block of 32 a scale of 32 bits and a zero point, whose rows fill whole bytes.
    assert sum(t.bytes for t in stored) <= LAYERS * NUMBERS * (4 + (32 + 8) / 32) / 8
    routers = [t for t in manifest.weights if t.role is WeightRole.ROUTER]
    assert {t.bits for t in routers} <= {16, 32}
    assert len(routers) == LAYERS
    if manifest.kernels is not None:
        left = {each.operator for each in manifest.kernels.outside}
        assert {"QMoE", "TopK", "Softmax"} <= left


def test_experts_in_float16_are_verified_on_a_cpu(mixture: Path, tmp_path: Path) -> None:
    plan = plan_build(str(mixture), target="cuda-fp16", profile="l4", output=tmp_path / "out")
    path = build(plan, SilentProgress()).path
    graph = ir.load(path / MODEL).graph
    assert [node.op_type for node in graph].count("MoE") == LAYERS
    assert not [node for node in graph if node.op_type == "Experts"]
    text = tmp_path / "text"
    text.write_text("The mill turns as long as there is water in the river. " * 30)
    verdict = verify(path, None, (str(text),), SilentProgress()).report.verdict
    assert {c.metric for c in verdict.missed if not c.metric.value.startswith("text.")} == set()
    values = {c.metric: c.value for c in verdict.checks}
    assert (values[Metric.RAGGED_MAX_ABS] or 1) < 0.2
    assert (values[Metric.DECODE_TOP1] or 0) > 0.98
