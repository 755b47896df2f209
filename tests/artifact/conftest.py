"""A manifest as a build of a small model writes it."""

from collections.abc import Callable

import pytest

from llmc.artifact.manifest import (
    CheckRecord,
    Declined,
    FileDigest,
    Manifest,
    ModelFacts,
    PassRecord,
    State,
    WeightRecord,
)
from llmc.artifact.verdict import CheckStatus
from llmc.config import Dtype, Gate, Metric, PassSpec, Provider, Target, WeightRole
from llmc.graph.interface import Interface, TensorSpec
from llmc.profile import Profile, ProfileKind

MakeManifest = Callable[..., Manifest]


@pytest.fixture
def make_manifest() -> MakeManifest:
    """Builds a manifest; keywords replace its fields, `files` maps names to contents' digests."""

    def make(**changes: object) -> Manifest:
        fields: dict[str, object] = {
            "llmc_version": "0.1.0",
            "model": ModelFacts(
                ref="demo", digest="0" * 64, architecture="LlamaForCausalLM", model_type="llama", parameters=9
            ),
            "target": Target(
                schema_version=1,
                name="cpu-fp32",
                summary="float on a CPU",
                backend="onnxruntime",
                provider=Provider.CPU,
                dtype=Dtype.FLOAT32,
                logits="all",
                passes=(PassSpec(name="rms_norm", per_layer=(1, 2)),),
                quantize=None,
                gates=(Gate(metric=Metric.PREFILL_MAX_ABS, max=1e-3, reason="rounding of sums in float"),),
            ),
            "profile": Profile(schema_version=1, name="local", kind=ProfileKind.CPU, device="any"),
            "interface": Interface(
                inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),),
                outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", "sequence", 8)),),
                cache=(),
                logits="all",
                position_ids=False,
                padding="any",
                max_length=64,
            ),
            "tools": {"python": "3.11.7", "onnxruntime": "1.31.1"},
            "files": {"model.onnx": FileDigest(sha256="a" * 64, bytes=3)},
            "passes": (
                PassRecord(
                    name="rms_norm",
                    applied=2,
                    declined=(Declined(code="axis", reason="axis 1", node="norm_3", count=1, layers=(3,)),),
                ),
            ),
            "weights": (
                WeightRecord(
                    name="lm_head.weight",
                    role=WeightRole.LM_HEAD,
                    shape=(8, 4),
                    bits=32,
                    block_size=None,
                    symmetric=None,
                    bytes=128,
                ),
            ),
            "state": State.VERIFIED,
            "checks": (
                CheckRecord(
                    metric=Metric.PREFILL_MAX_ABS, status=CheckStatus.PASS, where="onnxruntime 1.31.1"
                ),
            ),
        }
        return Manifest(**{**fields, **changes})

    return make
