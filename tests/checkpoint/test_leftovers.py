"""Tensors of the files that the model does not take: each is left out with a note, or refused by name."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmc.checkpoint import Checkpoint, open_checkpoint
from llmc.errors import CheckpointError
from tests.checkpoint import tiny_gguf
from tests.checkpoint.refusals import edit_config, refused
from tests.models import save_tiny_model

LAYER = "model.layers.0.self_attn"
VECTOR = np.arange(1, 65, dtype=np.float32)
MATRIX = np.ones((4, 64), np.float32)

Arrays = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_tiny_model(model_type, tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return of


@pytest.fixture
def with_tensors(models: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Copies a tiny model with further tensors in its file."""

    def put(model_type: str, tensors: Arrays) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(models(model_type), folder)
        file = folder / "model.safetensors"
        save_file({**load_file(file), **tensors}, file)
        return folder

    return put


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("model_type", "tensors", "told"),
    [
        ("llama", {"model.layers.3.enorm.weight": VECTOR, "model.layers.3.mlp.x": MATRIX}, "multi-token"),
        ("llama", {"mtp.layers.0.mlp.up_proj.weight": MATRIX}, "multi-token"),
        ("llama", {f"{LAYER}.rotary_emb.inv_freq": VECTOR[:8]}, "rotary tables"),
        ("llama", {f"{LAYER}.rotary_emb.cos_cached": VECTOR[:8]}, "rotary tables"),
        ("llama", {f"{LAYER}.q_proj.bias": 0 * VECTOR}, "biases that are zero"),
        ("llama", {"model.vision_tower.patch.weight": MATRIX}, "language model"),
        (
            "gpt_neox",
            {
                "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 8, 8), np.bool_),
                "gpt_neox.layers.0.attention.masked_bias": np.array(-1e9, np.float32),
            },
            "causal masks",
        ),
        ("gpt2", {"transformer.h.1.attn.bias": np.ones((1, 1, 8, 8), np.uint8)}, "causal masks"),
    ],
)
def test_left_out_with_a_note(
    model_type: str, tensors: Arrays, told: str, with_tensors: Callable[..., Path]
) -> None:
    checkpoint = opened(with_tensors(model_type, tensors))
    (note,) = checkpoint.notes
    assert told in note
    assert next(iter(tensors)) in note
    assert set(checkpoint.unused) == set(tensors)


@pytest.mark.parametrize(
    ("tensors", "fact", "hint"),
    [
        ({f"{LAYER}.q_proj.bias": VECTOR}, f"hold biases .*{LAYER}.q_proj.bias", "attention_bias"),
        ({"model.layers.3.mlp.up_proj.weight": MATRIX}, "have 4 decoder layers, .* says 3", "config.json"),
        ({f"{LAYER}.q_proj.lora_A.weight": MATRIX}, "hold an adapter beside the model", "merge"),
        ({f"{LAYER}.q_proj.weight_scale": VECTOR}, "parts of quantized weights", "quantization_config"),
        (
            {"v_head.summary.weight": MATRIX},
            "LlamaForCausalLM has no parameter for v_head.summary",
            "same model",
        ),
        ({f"{LAYER}.attn.bias": VECTOR}, "hold biases", "attention_bias"),
        ({"norm.weight": VECTOR}, "are the same parameter of the model", "remove the tensor"),
    ],
)
def test_refused_by_name(tensors: Arrays, fact: str, hint: str, with_tensors: Callable[..., Path]) -> None:
    assert hint in str(refused(with_tensors("llama", tensors), fact, CheckpointError).hint)


def test_half_of_the_layers(models: Callable[[str], Path], with_tensors: Callable[..., Path]) -> None:
    refused(edit_config(with_tensors("gpt2", {}), n_layer=2), "have 3 decoder layers, but config.json says 2")


def test_shards_beside_the_whole_file(with_tensors: Callable[..., Path]) -> None:
    folder = with_tensors("llama", {})
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"")
    (note,) = opened(folder).notes
    assert "model-00001-of-00001.safetensors, since model.safetensors" in note


def test_a_copy_of_a_parameter_is_no_leftover(with_tensors: Callable[..., Path]) -> None:
    folder = with_tensors("llama", {})
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    assert (opened(folder).unused, opened(folder).notes) == ((), ())


WRAPPED: list[Callable[[str], str]] = [
    lambda name: f"module.{name}",
    lambda name: f"module._orig_mod.{name}",
    lambda name: f"base_model.model.{name}",
    lambda name: f"transformer.{name}",
    lambda name: name.replace(".layers.1.", ".layers.1._fsdp_wrapped_module."),
]


def renamed(folder: Path, name_of: Callable[[str], str]) -> Path:
    file = folder / "model.safetensors"
    save_file({name_of(name): value for name, value in load_file(file).items()}, file)
    return folder


@pytest.mark.parametrize("wrap", WRAPPED)
def test_prefixes_of_wrappers(wrap: Callable[[str], str], with_tensors: Callable[..., Path]) -> None:
    folder = with_tensors("llama", {})
    plain = opened(folder)
    wrapped = opened(renamed(folder, wrap))
    assert wrapped.tensors.infos() == plain.tensors.infos()
    assert "a wrapper was saved with the model" in wrapped.notes[0]


@pytest.mark.parametrize("wrap", WRAPPED[:3])
def test_a_wrapper_of_another_model(wrap: Callable[[str], str], with_tensors: Callable[..., Path]) -> None:
    folder = renamed(with_tensors("llama", {f"{LAYER}.q_proj.lora_A.weight": MATRIX}), wrap)
    refused(folder, f"begin like {wrap('lm_head.weight')}: a wrapper was saved", CheckpointError)


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_a_gguf_tensor_that_transformers_has_no_name_for(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = {**tiny_gguf.LAYER[architecture], "attn_twist.weight": (64,)}
    monkeypatch.setitem(tiny_gguf.LAYER, architecture, layer)
    file = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", architecture)
    refused(file, r"has no parameter for blk\.0\.attn_twist\.weight and 1 more")
