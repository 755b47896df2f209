"""Configs that are damaged, contradictory or of a model that is not compiled."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.purpose import refuse_both_directions
from llmc.checkpoint.sizes import refuse_impossible
from llmc.errors import CheckpointError, LlmcError, UnsupportedError
from llmc.strict_json import parse_json
from tests.checkpoint.refusals import edit_config, refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "has no model_type"),
        (
            '{"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 9}',
            "num_experts_per_tok 9, but there are only 4 experts",
        ),
        ('{"model_type": "llama", "text_config": {"hidden_size": 64}}', "has a text_config, but a model of"),
        ("[" * 100_000, "nested too deeply"),
        (
            '{"model_type": "llama", "hidden_size": 64, "hidden_size": 128}',
            "hidden_size is given twice, as 64",
        ),
        ('{"model_type": "llama", "rms_norm_eps": NaN}', "rms_norm_eps is nan"),
        ('{"model_type": "llama", "rms_norm_eps": 1e999}', "rms_norm_eps is inf"),
        ('{"model_type": "gpt2", "n_layer": 1000000}', "n_layer 1,000,000, but no model"),
        (
            '{"model_type": "llama", "num_attention_heads": 0}',
            "num_attention_heads 0, but it must be at least 1",
        ),
        ('{"model_type": "llama", "rope_theta": 0.0}', "rope_theta of .* is 0.0, but frequencies"),
        ('{"model_type": "llama", "rope_scaling": {"factor": -1, "type": "linear"}}', "factor of .* is -1"),
        ('{"text_config": {"num_experts": 1000000}, "model_type": "x"}', "text_config.num_experts 1,000,000"),
        (f'{{"model_type": "llama", "vocab_size": {10**30}}}', "vocab_size of 31 digits"),
        ('{"model_type": "llama", "num_hidden_layers": "many"}', "is not a valid config of llama"),
    ],
)
def test_damaged_config(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, message)


def test_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lama", "auto_map": {"AutoConfig": "x.Y"}}')
    error = refused(tmp_path, "model_type lama", UnsupportedError)
    assert "llama" in str(error.hint)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "encoder-only"),
        ({"model_type": "deberta-v2"}, "no causal language model for deberta-v2"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "flaubert"}, "no causal language model for flaubert; it has flaubert for masked lm"),
        ({"model_type": "clip_vision_model"}, "clip_vision_model, which is a part of other models"),
        ({"model_type": "qwen2_5_omni"}, "thinker: Qwen2_5OmniThinker.* and has no forward pass of its own"),
        ({"model_type": "blip-2"}, "does not run on text alone: it requires pixel_values"),
    ],
)
def test_other_than_causal(config: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, message, UnsupportedError)


@pytest.mark.parametrize("model_type", ["paligemma", "gemma3", "doge"])
def test_what_transformers_has_by_default_is_possible(model_type: str) -> None:
    """Tokens of PaliGemma's image see each other, which its config calls bidirectional."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    refuse_both_directions(config)
    refuse_impossible(model_type, parse_json(config.to_json_string(use_diff=False)))


def test_settings_of_running_and_storing_are_left_out(llama: Path, damaged: Callable[[Path], Path]) -> None:
    how = {"attn_implementation": "owner/repo", "dtype": "int8", "return_dict": False}
    config = open_checkpoint(str(edit_config(damaged(llama), **how))).config
    assert config._attn_implementation == "sdpa"
    assert config.return_dict


def test_config_that_builds_no_model(llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = edit_config(damaged(llama), hidden_act="no_such_function")
    message = r"cannot build a causal language model .*: it fails at activations.py:\d+ \("
    error = refused(folder, message, UnsupportedError)
    assert "config.json" in str(error.hint)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 9000}, "num_hidden_layers is 9,000 in .*, whose files hold 30 tensors"),
        ({"hidden_size": 1 << 40, "head_dim": 16}, "hidden_size is 1,099,511,627,776 in .*, but no tensor"),
    ],
)
def test_sizes_that_the_files_do_not_have(
    sizes: dict[str, int], message: str, llama: Path, damaged: Callable[[Path], Path]
) -> None:
    refused(edit_config(damaged(llama), **sizes), message)


@pytest.mark.parametrize(
    ("scaling", "message", "kind"),
    [
        ({"rope_type": ["linear"]}, r"has rope_type \['linear'\]", UnsupportedError),
        ({"type": "su2", "factor": 2.0}, "rope_type su2, .* it has .*linear, llama3", UnsupportedError),
        (
            {"type": "linear", "rope_type": "yarn", "factor": 4.0},
            "rope_scaling of .* says type linear and rope_type yarn",
            CheckpointError,
        ),
    ],
)
def test_rope_type(
    scaling: dict[str, object],
    message: str,
    kind: type[LlmcError],
    llama: Path,
    damaged: Callable[[Path], Path],
) -> None:
    folder = edit_config(damaged(llama), rope_parameters=None, rope_scaling=scaling, rope_theta=1e4)
    refused(folder, message, kind)


def test_rope_type_in_two_spellings(llama: Path, damaged: Callable[[Path], Path]) -> None:
    scaling = {"type": "linear", "rope_type": "linear", "factor": 4.0}
    folder = edit_config(damaged(llama), rope_parameters=None, rope_scaling=scaling, rope_theta=1e4)
    assert open_checkpoint(str(folder)).config.rope_parameters["rope_type"] == "linear"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"eos_token_id": "two"}', "eos_token_id = two, which must be a token id"),
        ('{"eos_token_id": [[2]]}', "which must be a token id or a list of them"),
        ('{"temperature": -1.0}', "temperature = -1.0, which must be a number of 0 or above"),
        ('{"top_k": 1e30}', "top_k = 1e.30, which must be a whole number"),
        ('{"top_p": 2}', "top_p = 2, which must be a number between 0 and 1"),
        ("[1]", "generation_config.json holds a list"),
    ],
)
def test_settings_of_generation(
    settings: str, message: str, llama: Path, damaged: Callable[[Path], Path]
) -> None:
    folder = damaged(llama)
    (folder / "generation_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder)).generation_config()
