"""Rotary embeddings of GGUF files: the frequencies of llama.cpp reach the model, or the file is refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.checkpoint import open_checkpoint
from llmc.errors import CheckpointError, UnsupportedError
from tests.checkpoint.tiny_gguf import HEADS, HIDDEN, write_gguf

PAIRS = HIDDEN // HEADS // 2
PLAIN = 10000.0 ** (-np.arange(PAIRS) / PAIRS)
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}


def ramp(context: int = 64, fast: float = 32.0, slow: float = 1.0) -> np.ndarray:
    """Share of each frequency that YaRN leaves alone, written anew after ggml's rope_yarn."""
    pair = [PAIRS * math.log(context / (n * 2 * math.pi)) / math.log(10000.0) for n in (fast, slow)]
    low, high = max(0, math.floor(pair[0])), min(2 * PAIRS - 1, math.ceil(pair[1]))
    return 1 - np.clip((np.arange(PAIRS) - low) / max(high - low, 0.001), 0, 1)


def rotary(file: Path) -> tuple[np.ndarray, float, Any]:
    """Frequencies, factor on cosine and sine, and config of the original that the gate compares with."""
    checkpoint = open_checkpoint(str(file))
    module: Any = checkpoint.fill_reference().model.rotary_emb
    return module.inv_freq.double().numpy(), module.attention_scaling, checkpoint.config


MIX = ramp()
GROWN = 0.1 * math.log(4.0) + 1
CASES: dict[str, tuple[dict[str, Any], np.ndarray, float]] = {
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, PLAIN, 1.0),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, PLAIN / 4, 1.0),
    "factor alone": ({"rope.scaling.factor": 2.0}, PLAIN / 2, 1.0),
    "older key": ({"rope.scale_linear": 8.0}, PLAIN / 8, 1.0),
    "other base": ({"rope.freq_base": 500.0}, 500.0 ** (-np.arange(PAIRS) / PAIRS), 1.0),
    "yarn": (YARN, PLAIN / 4 * (1 - MIX) + PLAIN * MIX, GROWN),
    "yarn with its own attention": (
        YARN | {"rope.scaling.attn_factor": 0.5},
        PLAIN / 4 * (1 - MIX) + PLAIN * MIX,
        GROWN / 2,
    ),
    "yarn of other bounds": (
        YARN | {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0},
        PLAIN / 4 * (1 - ramp(64, 8, 2)) + PLAIN * ramp(64, 8, 2),
        GROWN,
    ),
    "yarn in part": (
        YARN | {"rope.scaling.yarn_ext_factor": 0.5},
        PLAIN / 4 * (1 - MIX / 2) + PLAIN * MIX / 2,
        GROWN,
    ),
    "yarn with a logarithm": (
        YARN | {"rope.scaling.yarn_log_multiplier": 0.5},
        PLAIN / 4 * (1 - MIX) + PLAIN * MIX,
        GROWN / (0.05 * math.log(4.0) + 1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_llama_cpp(case: str, tmp_path: Path) -> None:
    facts, frequencies, attention = CASES[case]
    found, scaling, _ = rotary(write_gguf(tmp_path / "x.gguf", facts=facts))
    np.testing.assert_allclose(found, frequencies, rtol=2e-6)
    assert scaling == pytest.approx(attention, rel=1e-6)


def llama3_factors(factor: float, low: float, high: float, context: int) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1."""
    made = []
    for frequency in PLAIN:
        length = 2 * math.pi / frequency
        smooth = (context / length - low) / (high - low)
        inside = 1 / ((1 - smooth) / factor + smooth)
        made.append(1.0 if length < context / high else factor if length > context / low else inside)
    return np.array(made, np.float32)


@pytest.mark.parametrize(
    ("factors", "kind"),
    [
        (llama3_factors(32.0, 1.0, 4096.0, 8192), "llama3"),
        (np.linspace(1, 8, PAIRS, dtype=np.float32), "longrope"),
    ],
)
def test_factors_of_frequencies_reach_the_model(factors: np.ndarray, kind: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", tensors={"rope_freqs.weight": factors})
    found, scaling, config = rotary(file)
    np.testing.assert_allclose(found, PLAIN / factors, rtol=2e-6)
    assert (scaling, config.rope_parameters["rope_type"]) == (1.0, kind)


def test_factors_change_no_frequency_within_the_context(tmp_path: Path) -> None:
    """Parameters with a switch are the way to state any frequencies; the switch is never reached."""
    factors = np.linspace(1, 8, PAIRS, dtype=np.float32)
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors={"rope_freqs.weight": factors})))
    parameters = checkpoint.config.rope_parameters
    assert parameters["short_factor"] == parameters["long_factor"]
    assert parameters["original_max_position_embeddings"] == checkpoint.config.max_position_embeddings


def test_long_and_short_factors(tmp_path: Path) -> None:
    short, long = (np.linspace(1, end, PAIRS, dtype=np.float32) for end in (2, 9))
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    facts = {"rope.scaling.attn_factor": 1.25, "rope.scaling.original_context_length": 64}
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", facts=facts, tensors=tensors)))
    module: Any = checkpoint.fill_reference().model.rotary_emb
    for length, factors in ((64, short), (65, long)):
        module(torch.zeros(1, 1), torch.arange(length)[None])
        np.testing.assert_allclose(module.inv_freq.double().numpy(), PLAIN / factors, rtol=2e-6)
    assert module.attention_scaling == 1.25


def test_gemma3_scales_its_global_layers_alone(tmp_path: Path) -> None:
    facts = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base": 1000.0}
    facts |= {"attention.sliding_window_pattern": 2}
    config = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", "gemma3", facts=facts))).config
    assert config.rope_parameters["full_attention"] == {
        "rope_type": "linear",
        "rope_theta": 1000.0,
        "factor": 8.0,
    }
    assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"rope.scaling.type": "dynamic"}, r"rope\.scaling\.type = dynamic, but llama\.cpp has"),
        ({"rope.scaling.alpha": 3.0}, r"llama\.rope\.scaling\.alpha = 3\.0, which llmc does not know"),
        ({"rope.dimension_sections": [2, 3, 3, 0]}, r"rope\.dimension_sections = "),
        ({"rope.freq_base_swa": 500.0}, r"rope\.freq_base_swa = 500\.0 but a base of 10000"),
        ({"rope.dimension_count": HIDDEN // HEADS // 2}, "computes other frequencies"),
    ],
)
def test_what_the_model_cannot_take_is_refused(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(str(write_gguf(tmp_path / "x.gguf", facts=facts)))


def test_factors_of_another_model(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", tensors={"rope_freqs.weight": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight in .* has shape \[3\]; 16 rotated"):
        open_checkpoint(str(file))


def test_scaling_beside_factors_of_longrope(tmp_path: Path) -> None:
    ones = np.ones(PAIRS, np.float32)
    tensors = {"rope_factors_short.weight": ones, "rope_factors_long.weight": ones}
    with pytest.raises(UnsupportedError, match="would scale twice"):
        open_checkpoint(str(write_gguf(tmp_path / "x.gguf", facts=YARN, tensors=tensors)))
    del tensors["rope_factors_long.weight"]
    with pytest.raises(CheckpointError, match="does not have both rope_factors_short"):
        open_checkpoint(str(write_gguf(tmp_path / "y.gguf", tensors=tensors)))
