"""Which server takes which target, and what is refused before anything is built."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from llmc.catalog import list_targets, load_target
from llmc.config import BackendName, CheckpointFormat, EngineScheme, Target, WeightRole, WeightScheme
from llmc.errors import ConfigError
from llmc.quantize.place import choose_scheme
from llmc.servers.support import (
    Matrix,
    describe_takers,
    kind_of,
    of_experts,
    schemes_of,
    takers,
    treatments,
    why_not,
    write_table,
)
from llmc.servers.support_models import ServedModel, of_model
from llmc.servers.support_table import FOLDERS, SCHEMES, VERSIONS
from llmc.servers.support_terms import MatrixKind, Runtime, Status

TARGETS = [
    listed.document.name for listed in list_targets() if listed.document.backend is BackendName.CHECKPOINT
]


def scheme(bits: int = 4, size: int = 128, *, symmetric: bool = True) -> WeightScheme:
    fields = {"bits": bits, "block_size": size, "symmetric": symmetric, "method": "rtn"}
    return WeightScheme.model_validate(fields)


def integers(form: str, *schemes: WeightScheme) -> Target:
    """A target of integers by group; each scheme has a rule."""
    base = load_target("vllm-w4a16").model_dump(mode="json")
    base["checkpoint"] |= {"format": form}
    rules = [{"match": f"*{n}*", "scheme": each.model_dump(mode="json")} for n, each in enumerate(schemes)]
    base["quantize"] |= {"rules": rules, "calibration": None}
    return Target.model_validate_json(json.dumps(base))


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_that_ships_has_a_server(name: str) -> None:
    target = load_target(name)
    found = takers(target)
    assert found[Status.SERVED] or found[Status.GPU_ONLY]
    said = describe_takers(target)
    assert all(runtime.value in said for runtimes in found.values() for runtime in runtimes)


def test_rows_have_sources_and_reasons() -> None:
    assert set(VERSIONS) == set(Runtime)
    assert {form for _, form in SCHEMES} == set(CheckpointFormat)
    for kinds in SCHEMES.values():
        for row in kinds.values():
            assert row.where
            assert row.reason or row.status in (Status.SERVED, Status.GPU_ONLY)
            assert row.zero_points_reason or row.zero_points not in (Status.REFUSED, Status.WRONG)
    for folder in FOLDERS.values():
        assert folder.mixed_reason or folder.mixed in (Status.SERVED, Status.GPU_ONLY)


def test_what_a_server_reads_wrongly_is_refused() -> None:
    said = why_not(Runtime.EDGELLM, load_target("vllm-w4a16"))
    assert said is not None
    assert said.startswith("int4 weights by groups of 128 is read wrongly by edgellm: it does not know")
    assert "do not give it to edgellm" in describe_takers(load_target("vllm-w4a16"))
    assert why_not(Runtime.EDGELLM, load_target("gptq-int4")) is None


def test_scales_of_the_cache_are_a_matter_of_the_server() -> None:
    said = why_not(Runtime.TENSORRT_LLM, load_target("vllm-fp8-kv8"))
    assert str(said).startswith("scales of a KV cache in fp8 is read wrongly by tensorrt-llm: it has a cache")
    for name, runtime in (("vllm-fp8", Runtime.TENSORRT_LLM), ("modelopt-fp8-kv8", Runtime.TENSORRT_LLM)):
        assert why_not(runtime, load_target(name)) is None
    assert takers(load_target("vllm-fp8-kv8"))[Status.SERVED] == (Runtime.TRANSFORMERS, Runtime.VLLM)


def test_zero_points_are_a_matter_of_the_server() -> None:
    asymmetric = integers("awq", scheme(symmetric=False))
    assert why_not(Runtime.VLLM, asymmetric) is None
    assert "with zero points is read wrongly by edgellm" in str(why_not(Runtime.EDGELLM, asymmetric))
    said = why_not(Runtime.VLLM, integers("gptq", scheme(symmetric=False)))
    assert "is refused by vllm: Unsupported quantization config: bits=4, sym=False" in str(said)


def test_sizes_of_groups_are_a_matter_of_the_server() -> None:
    fine = integers("gptq", scheme(size=64))
    assert why_not(Runtime.VLLM, fine) is None
    assert str(why_not(Runtime.LMDEPLOY, fine)).endswith("refused by lmdeploy: it takes groups of 128")


def test_mixed_schemes_in_a_folder() -> None:
    mixed = integers("gptq", scheme(4), scheme(8))
    found = {treatment.subject: treatment.status for treatment in treatments(Runtime.EDGELLM, mixed)}
    assert found == {
        "int4 weights by groups of 128": Status.GPU_ONLY,
        "int8 weights by groups of 128": Status.REFUSED,
        "several schemes in one folder": Status.REFUSED,
    }


def test_shapes_are_a_matter_of_the_server() -> None:
    target = integers("gptq", scheme())
    matrices = [Matrix(f"layers.{n}.up_proj.weight", (96, 256), scheme()) for n in range(3)]
    assert why_not(Runtime.VLLM, target, matrices) is None
    odd = [Matrix("up_proj.weight", (72, 256), scheme())]
    assert treatments(Runtime.VLLM, target, odd)[-1].status is Status.GPU_ONLY
    assert why_not(Runtime.EDGELLM, target, matrices) == (
        "layers.0.up_proj.weight and 2 more is refused by edgellm: 96 outputs and 256 inputs must be "
        "multiples of 64"
    )


def test_a_server_that_was_not_tried_is_not_refused() -> None:
    found = treatments(Runtime.DEEPSPEED, load_target("vllm-nvfp4"))
    assert {treatment.status for treatment in found} == {Status.UNKNOWN}
    assert why_not(Runtime.DEEPSPEED, load_target("vllm-nvfp4")) is None


def test_every_scheme_has_a_kind() -> None:
    kinds = {kind_of(scheme(4)), kind_of(scheme(8))}
    for form, activations in (("int8", "float dynamic static"), ("fp8", "float dynamic static")):
        for each in activations.split():
            kinds.add(kind_of(EngineScheme.model_validate({"format": form, "activations": each})))
    for each in ("float", "dynamic"):
        kinds.add(kind_of(EngineScheme.model_validate({"format": "nvfp4", "activations": each})))
    fields = {"format": "fp8", "activations": "static", "scale_per": "tensor"}
    kinds.add(kind_of(EngineScheme.model_validate(fields)))
    assert kinds == set(MatrixKind)


def test_a_target_of_another_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="target cpu-int8 makes no checkpoint") as caught:
        schemes_of(load_target("cpu-int8"))
    assert caught.value.hint == "llmc targets lists the targets of backend checkpoint"


def test_the_documentation_has_the_table(tmp_path: Path) -> None:
    published = Path(__file__).parents[2] / "docs" / "server-checkpoints.md"
    copy = tmp_path / published.name
    copy.write_text(published.read_text(encoding="utf-8"), encoding="utf-8")
    write_table(str(copy))
    assert copy.read_text(encoding="utf-8") == published.read_text(encoding="utf-8"), "make servers writes it"


def test_servers_differ_in_what_they_do_with_experts() -> None:
    target = load_target("vllm-fp8")
    (scheme,) = schemes_of(target)
    experts = Matrix("model.layers.0.mlp.experts.gate_up_proj", (64, 64), scheme, is_expert=True)
    (dense,) = treatments(Runtime.VLLM, target)
    assert dense.status is Status.SERVED
    found = treatments(Runtime.VLLM, target, [experts, experts])[-1]
    assert found == of_experts(Runtime.VLLM, target, scheme)
    assert found.subject == "experts in fp8, activations by token"
    assert found.status is Status.GPU_ONLY
    assert "no kernel for such experts" in found.reason
    assert of_experts(Runtime.LMDEPLOY, target, scheme).status is Status.UNKNOWN
    assert Runtime.VLLM in takers(target)[Status.SERVED]
    assert takers(target, [experts])[Status.GPU_ONLY] == (Runtime.VLLM,)
    assert "do not give it to edgellm" in describe_takers(target, [experts])


@pytest.mark.parametrize(
    ("kind", "fields", "refused"),
    [
        ("qwen3", {"max_window_layers": 1, "use_sliding_window": True}, "max_window_layers, 1"),
        ("qwen3", {"max_window_layers": 3, "use_sliding_window": True}, None),
        ("qwen3", {"max_window_layers": 1, "use_sliding_window": False}, None),
        ("falcon", {"hidden_size": 64, "ffn_hidden_size": 128}, "an MLP of 256, and it has 128"),
        ("falcon", {"hidden_size": 64}, None),
        ("lfm2", {}, "config.json lacks conv_dim and block_dim"),
        ("lfm2", {"conv_dim": 64, "block_dim": 64}, None),
        ("deepseek_v3", {}, "config.json lacks topk_method"),
        ("deepseek_v3", {"topk_method": "noaux_tc"}, None),
    ],
)
def test_vllm_refuses_models_by_their_settings(
    kind: str, fields: dict[str, Any], refused: str | None
) -> None:
    config = AutoConfig.for_model(kind, num_hidden_layers=3, sliding_window=8, **fields)
    found = of_model(Runtime.VLLM, ServedModel(config))
    assert [each.refuses for each in found] == ([] if refused is None else [True])
    assert refused is None or refused in found[0].reason
    assert of_model(Runtime.SGLANG, ServedModel(config)) == ()


def test_vllm_has_modules_that_it_keeps_in_float() -> None:
    jamba, qwen = (AutoConfig.for_model(kind) for kind in ("jamba", "qwen3_next"))
    names = ("layers.0.mamba.in_proj", "layers.0.mlp.shared_expert_gate", "layers.1.mamba.in_proj")
    refused = of_model(Runtime.VLLM, ServedModel(qwen, quantized=names))
    assert [each.subject for each in refused] == ["layers.0.mlp.shared_expert_gate"]
    refused = of_model(Runtime.VLLM, ServedModel(jamba, quantized=names[::2]))
    assert [each.status for each in refused] == [Status.REFUSED, Status.GPU_ONLY]
    assert 'match: "*.mamba.*"' in refused[0].reason
    target = load_target("vllm-fp8")
    assert Runtime.VLLM in takers(target, (), ServedModel(qwen))[Status.SERVED]
    assert Runtime.VLLM in takers(target, (), ServedModel(jamba))[Status.GPU_ONLY]
    unknown = ServedModel(AutoConfig.for_model("mpt"), "MptForCausalLM")
    assert Runtime.VLLM not in sum(takers(target, (), unknown).values(), ())


@pytest.mark.parametrize("name", TARGETS)
def test_targets_that_ship_keep_the_gate_of_shared_experts(name: str) -> None:
    target = load_target(name)
    rules = target.checkpoint.weights if target.quantize is None else target.quantize.rules  # type: ignore[union-attr]
    assert choose_scheme(rules, WeightRole.LINEAR, "model.layers.0.mlp.shared_expert_gate.weight") is None
