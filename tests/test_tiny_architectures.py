"""Tiny configs have every kind of layer of the default config that they are derived from."""

import pytest

from tests.architectures import (
    FEWEST,
    MOST,
    Kind,
    build_on_meta,
    choose_layers,
    default_config,
    kinds_of_layers,
    lacking,
    layers_of,
)
from tests.models import MODEL_TYPES, build_tiny_model, tiny_config

# Experts after dense layers, two kinds of attention, attention between states, shared keys, inner models.
MIXED = (
    "deepseek_v3",
    "cohere2",
    "qwen3_next",
    "jamba",
    "nemotron_h",
    "recurrent_gemma",
    "minimax",
    "gemma3n_text",
    "llama4",
    "qwen3_vl_moe",
    "gemma3",
    "mamba2",
    "falcon_h1",
    "zamba2",
)


def lacks(model_type: str, **overrides: object) -> list[str]:
    default = default_config(model_type)
    assert default is not None
    return lacking(build_on_meta(default), build_on_meta(tiny_config(model_type, **overrides)))


@pytest.mark.parametrize("model_type", MIXED)
def test_a_tiny_config_has_every_kind_of_layer_of_its_default(model_type: str) -> None:
    assert lacks(model_type) == []
    assert len(layers_of(build_on_meta(tiny_config(model_type)))) <= MOST


@pytest.mark.parametrize(
    ("model_type", "overrides", "lack"),
    [
        ("deepseek_v3", {"num_hidden_layers": 3}, "DeepseekV3MoE"),
        ("qwen3_next", {"num_hidden_layers": 3}, "Qwen3NextAttention"),
        ("cohere2", {"num_hidden_layers": 3}, "full_attention"),  # the same classes, another mask
        ("gemma3n_text", {"num_kv_shared_layers": 0}, "is_kv_shared_layer True"),
        (
            "smollm3",
            {"no_rope_layers": [1, 1, 1], "layer_types": ["full_attention"] * 3},
            "no_rope_layers False",
        ),
    ],
)
def test_a_kind_that_is_left_out_is_named(model_type: str, overrides: dict[str, object], lack: str) -> None:
    assert lack in "\n".join(lacks(model_type, **overrides))


@pytest.mark.parametrize(
    ("model_type", "classes"),
    [
        ("lfm2", {"Lfm2ShortConv", "Lfm2Attention"}),
        ("bamba", {"BambaMixer", "BambaAttention"}),
        ("granitemoehybrid", {"GraniteMoeHybridMambaLayer", "GraniteMoeHybridAttention"}),
    ],
)
def test_a_kind_that_only_released_models_have_is_added_by_hand(model_type: str, classes: set[str]) -> None:
    model = build_on_meta(tiny_config(model_type))
    assert classes <= {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "bloom", "gpt_oss"])
def test_a_layer_stands_between_others(model_type: str) -> None:
    assert len(kinds_of_layers(build_on_meta(tiny_config(model_type)))) == FEWEST


def kinds(letters: str) -> list[Kind]:
    return [frozenset({(letter,)}) for letter in letters]


@pytest.mark.parametrize(
    ("letters", "chosen"),
    [
        ("aaaaaa", [0, 1, 2]),
        ("aaabaaab", [0, 1, 2, 3]),
        ("a", [0]),
        ("aaaaaaaaab", [0, 1, 9]),
        ("aaaaabaaaaabcd", [0, 5, 12, 13]),
    ],
)
def test_the_shortest_prefix_or_one_layer_of_each_kind(letters: str, chosen: list[int]) -> None:
    assert choose_layers(kinds(letters)) == chosen


@pytest.mark.parametrize("model_type", ["dots3_note_text", "fast_vlm", "gemma3n", "perception_lm"])
def test_sizes_of_a_part_or_a_layer_are_small_too(model_type: str) -> None:
    # widths by layer; towers of packages that are not installed
    model = build_on_meta(tiny_config(model_type))
    assert sum(parameter.numel() for parameter in model.parameters()) < 4_000_000


def test_a_gain_calms_the_matrices_and_norms_of_layers() -> None:
    plain, drawn = (build_tiny_model("llama", gain=gain).state_dict() for gain in (None, 0.5))
    inside = {"self_attn.q_proj": 64, "mlp.down_proj": 96}
    for name, inputs in inside.items():
        deviation = float(drawn[f"model.layers.1.{name}.weight"].std())
        assert deviation == pytest.approx(0.5 * inputs**-0.5, rel=0.1)
    norm = "model.layers.1.input_layernorm.weight"
    assert float(drawn[norm].mean() / plain[norm].mean()) == pytest.approx(0.5, rel=0.1)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert drawn[name].equal(plain[name])
