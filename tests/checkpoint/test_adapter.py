"""LoRA adapters in peft's layout, against formulas of its documentation, written out here in float64."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmc.arrays import Array
from llmc.artifact.manifest import AdapterRecord
from llmc.checkpoint import Checkpoint, open_checkpoint
from llmc.errors import CheckpointError, LlmcError, UnsupportedError
from tests.checkpoint.quantized_folders import gptq_config, pack_gptq, write_codes
from tests.models import save_tiny_model, save_tiny_tokenizer, tiny_multimodal_fields

Q = "model.layers.{}.self_attn.q_proj"
RANK, ALPHA = 4, 16


def values(*shape: int, seed: int = 0) -> Array:
    random = np.random.default_rng((seed, *shape))
    return (0.1 * random.standard_normal(shape)).astype(np.float32)


def save_adapter(folder: Path, tensors: Mapping[str, Array], **fields: Any) -> Path:
    """Write adapter_config.json and adapter_model.safetensors as peft does."""
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps({**usual, "target_modules": None, **fields}))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


def low_rank(module: str, outputs: int, inputs: int, rank: int = RANK) -> dict[str, Array]:
    """Matrices of one module, with the prefix that peft saves."""
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": values(rank, inputs),
        f"{prefix}.lora_B.weight": values(outputs, rank, seed=1),
    }


def product(tensors: Mapping[str, Array], module: str) -> Array:
    a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
    made: Array = b @ a
    return made


def on_q(layers: int = 3, rank: int = RANK) -> dict[str, Array]:
    return {k: v for i in range(layers) for k, v in low_rank(Q.format(i), 64, 64, rank).items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def merged(base: Path, adapter: Path) -> Checkpoint:
    return open_checkpoint(str(base), str(adapter))


def record(checkpoint: Checkpoint) -> AdapterRecord:
    assert checkpoint.adapter is not None
    return checkpoint.adapter


def assert_weight(checkpoint: Checkpoint, name: str, expected: Array) -> None:
    """Whole and by parts of rows."""
    found = checkpoint.tensors.read(name)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(checkpoint.tensors.read(name, 5, 9), found[5:9])
    assert checkpoint.tensors.infos()[name].dtype.numpy() == np.float32


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 4.0),
        ({"use_rslora": True}, 8.0),
        ({"lora_alpha": 2, "alpha_pattern": {"layers.1.self_attn.q_proj": 6}}, 1.5),
        ({"alpha_pattern": {r"^model.*\.q_proj": 1}}, 0.25),
        ({"r": 16, "rank_pattern": {"q_proj": 4}}, 4.0),
    ],
)
def test_scales(fields: dict[str, Any], scale: float, llama: Path, tmp_path: Path) -> None:
    tensors = on_q()
    checkpoint = merged(llama, save_adapter(tmp_path, tensors, **fields))
    before = load_file(llama / "model.safetensors")
    name = Q.format(1)
    assert_weight(checkpoint, f"{name}.weight", before[f"{name}.weight"] + scale * product(tensors, name))
    other = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(checkpoint.tensors.read(other), before[other])
    assert record(checkpoint).merged == {"q_proj": 3}


@pytest.mark.parametrize(
    "spelled",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace(".weight", ".mine.weight"),
    ],
)
def test_prefixes_and_names_of_the_adapter(spelled: Any, llama: Path, tmp_path: Path) -> None:
    usual = merged(llama, save_adapter(tmp_path / "usual", on_q()))
    other = merged(llama, save_adapter(tmp_path / "other", {spelled(k): v for k, v in on_q().items()}))
    name = f"{Q.format(2)}.weight"
    np.testing.assert_array_equal(usual.tensors.read(name), other.tensors.read(name))


def test_dora_gives_rows_the_norms_that_it_stores(llama: Path, tmp_path: Path) -> None:
    magnitudes = {f"base_model.model.{Q.format(i)}.lora_magnitude_vector": values(64) + 1 for i in range(3)}
    tensors = on_q()
    checkpoint = merged(llama, save_adapter(tmp_path, {**tensors, **magnitudes}, use_dora=True))
    name = Q.format(0)
    sums = load_file(llama / "model.safetensors")[f"{name}.weight"] + 4 * product(tensors, name)
    expected = sums / np.linalg.norm(sums, axis=1, keepdims=True) * (values(64) + 1)[:, None]
    assert_weight(checkpoint, f"{name}.weight", expected)


@pytest.mark.parametrize("dora", [False, True])
def test_inputs_are_rows_of_gpt2s_products(dora: bool, tmp_path: Path) -> None:
    base = save_tiny_model("gpt2", tmp_path / "base")
    names = [f"transformer.h.{i}.attn.c_attn" for i in range(3)]
    tensors = {k: v for name in names for k, v in low_rank(name, 192, 64).items()}
    magnitudes = {f"base_model.model.{n}.lora_magnitude_vector.weight": values(192) + 1 for n in names}
    saved = {**tensors, **(magnitudes if dora else {})}
    fields = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": dora}
    checkpoint = merged(base, save_adapter(tmp_path / "lora", saved, **fields))
    before = load_file(base / "model.safetensors")["transformer.h.1.attn.c_attn.weight"]
    expected = before + 4 * product(tensors, names[1]).T
    if dora:
        expected = expected / np.linalg.norm(expected, axis=0) * (values(192) + 1)
    assert_weight(checkpoint, f"{names[1]}.weight", expected)


def test_embeddings_and_biases_and_whole_modules(tmp_path: Path) -> None:
    base = save_tiny_model("qwen2", tmp_path / "base")
    head, bias = values(256, 64), values(64, seed=3)
    embedding = {"lora_embedding_A": values(RANK, 256), "lora_embedding_B": values(64, RANK, seed=1)}
    prefix = "base_model.model."
    tensors = {
        **{f"{prefix}model.embed_tokens.{name}": value for name, value in embedding.items()},
        f"{prefix}{Q.format(0)}.base_layer.bias": bias,
        f"{prefix}lm_head.modules_to_save.weight": head,
    }
    checkpoint = merged(
        base, save_adapter(tmp_path / "lora", tensors, bias="all", modules_to_save=["lm_head"])
    )
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    delta = embedding["lora_embedding_B"] @ embedding["lora_embedding_A"]
    assert_weight(checkpoint, "model.embed_tokens.weight", before + 4 * delta.T)
    np.testing.assert_array_equal(checkpoint.tensors.read("lm_head.weight"), head)
    np.testing.assert_array_equal(checkpoint.tensors.read(f"{Q.format(0)}.bias"), bias)
    assert record(checkpoint).replaced == ("lm_head.weight", f"{Q.format(0)}.bias")


def test_rows_of_tokens_are_replaced_in_both_of_two_tied_matrices(tied: Path, tmp_path: Path) -> None:
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": values(2, 64)}
    checkpoint = merged(tied, save_adapter(tmp_path, rows, trainable_token_indices={"embed_tokens": [7, 5]}))
    expected = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    expected[[7, 5]] = values(2, 64)
    assert_weight(checkpoint, "model.embed_tokens.weight", expected)
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_head_that_only_the_adapter_changes_is_not_tied_any_more(tied: Path, tmp_path: Path) -> None:
    tensors = low_rank("lm_head", 256, 64)
    checkpoint = merged(tied, save_adapter(tmp_path, tensors))
    before = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    assert_weight(checkpoint, "lm_head.weight", before + 4 * product(tensors, "lm_head"))
    np.testing.assert_array_equal(checkpoint.tensors.read("model.embed_tokens.weight"), before)
    assert checkpoint.tied == {}
    assert "are no longer tied: the adapter changes lm_head.weight" in checkpoint.notes[-1]
    model = checkpoint.fill_reference()
    np.testing.assert_array_equal(
        model.get_output_embeddings().weight.detach().numpy(), checkpoint.tensors.read("lm_head.weight")
    )


@pytest.mark.parametrize("tie", [False, True])
def test_both_of_two_tied_matrices_stay_one(tie: bool, tied: Path, tmp_path: Path) -> None:
    names = ["model.embed_tokens"] if tie else ["model.embed_tokens", "lm_head"]
    tensors = {f"base_model.model.{name}.weight": values(256, 64) for name in names}
    checkpoint = merged(tied, save_adapter(tmp_path, tensors, ensure_weight_tying=tie))
    np.testing.assert_array_equal(checkpoint.tensors.read("model.embed_tokens.weight"), values(256, 64))
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize(("model_type", "transposed"), [("mixtral", False), ("gpt_oss", True)])
def test_stacked_experts(model_type: str, transposed: bool, tmp_path: Path) -> None:
    base = save_tiny_model(model_type, tmp_path / "base")
    name = "model.layers.1.mlp.experts"
    plain = open_checkpoint(str(base)).tensors
    up, down = plain.infos()[f"{name}.gate_up_proj"].shape, plain.infos()[f"{name}.down_proj"].shape
    tensors = {}
    for path, shape in ((f"{name}.base_layer", up), (name, down)):
        outputs, inputs = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        tensors |= low_rank(path, outputs, inputs, RANK * shape[0])
        tensors[f"base_model.model.{path}.lora_B.weight"] = values(outputs, RANK * shape[0], seed=1)
    fields = {"target_parameters": ["experts.gate_up_proj", "mlp.experts.down_proj"]}
    checkpoint = merged(base, save_adapter(tmp_path / "lora", tensors, **fields))
    for path, parameter in ((f"{name}.base_layer", "gate_up_proj"), (name, "down_proj")):
        before = plain.read(f"{name}.{parameter}")
        a, b = (tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        for e in range(len(before)):
            delta = b.reshape(len(b), RANK, -1)[:, :, e] @ a[e * RANK : (e + 1) * RANK]
            expected = before[e] + 4 * (delta.T if transposed else delta)
            found = checkpoint.tensors.read(f"{name}.{parameter}", e, e + 1)[0]
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_experts_that_the_files_have_one_by_one(tmp_path: Path) -> None:
    base = save_tiny_model("mixtral", tmp_path / "base")
    name = "model.layers.0.block_sparse_moe.experts.2.w2"
    before = load_file(base / "model.safetensors")[f"{name}.weight"]
    tensors = low_rank(name, *before.shape)
    checkpoint = merged(base, save_adapter(tmp_path / "lora", tensors))
    found = checkpoint.tensors.read("model.layers.0.mlp.experts.down_proj", 2, 3)[0]
    np.testing.assert_allclose(found, before + 4 * product(tensors, name), atol=1e-6)


def test_names_of_an_earlier_transformers(tmp_path: Path) -> None:
    base = save_tiny_model("llava", tmp_path / "base", **tiny_multimodal_fields("llava"))
    name = "language_model.model.layers.1.self_attn.q_proj"
    tensors = low_rank(name, 64, 64)
    checkpoint = merged(base, save_adapter(tmp_path / "lora", tensors))
    expected = load_file(base / "model.safetensors")[f"{name}.weight"] + 4 * product(tensors, name)
    assert_weight(checkpoint, "model.language_model.layers.1.self_attn.q_proj.weight", expected)


def test_codes_of_a_matrix_that_changes_are_not_kept(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_codes(base, gptq_config(), pack_gptq())
    plain = open_checkpoint(str(base)).tensors
    checkpoint = merged(base, save_adapter(tmp_path / "lora", low_rank(Q.format(0), 64, 64)))
    name, other = f"{Q.format(0)}.weight", "model.layers.0.self_attn.k_proj.weight"
    delta = 4 * product(low_rank(Q.format(0), 64, 64), Q.format(0))
    assert_weight(checkpoint, name, plain.read(name) + delta)
    changed, kept = (checkpoint.tensors.infos()[n].codes for n in (name, other))
    assert changed is not None
    assert changed() == "an adapter changes its values"
    assert kept is not None
    assert not isinstance(kept(), str)


def test_the_digest_is_of_both(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", on_q())
    digests = [open_checkpoint(str(llama)).digest(), merged(llama, adapter).digest()]
    save_adapter(adapter, on_q(), lora_alpha=17)
    digests.append(merged(llama, adapter).digest())
    assert len(set(digests)) == 3
    assert merged(llama, adapter.rename(tmp_path / "b")).digest() == digests[2]


def test_a_base_by_another_name_is_told(llama: Path, tmp_path: Path) -> None:
    notes = merged(llama, save_adapter(tmp_path / "a", on_q())).notes
    assert notes == (f"The adapter {tmp_path / 'a'} names org/base as its base; it is merged into {llama}.",)
    own = save_adapter(tmp_path / "b", on_q(), base_model_name_or_path=f"org/{llama.name}")
    assert merged(llama, own).notes == ()


def test_the_tokenizer_of_an_adapter_is_taken_and_told(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", on_q(), base_model_name_or_path=llama.name)
    save_tiny_tokenizer(adapter)
    checkpoint = merged(llama, adapter)
    assert checkpoint.notes == (f"The tokenizer and its chat template come from the adapter {adapter}.",)
    assert tmp_path / "out" / "tokenizer.json" in checkpoint.save_tokenizer(tmp_path / "out")


def refused(
    base: Path | str, adapter: Path | None, message: str, kind: type[LlmcError] = CheckpointError
) -> str:
    with pytest.raises(kind, match=message) as caught:
        open_checkpoint(str(base), None if adapter is None else str(adapter))
    return str(caught.value.hint)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "ADALORA"}, "is of kind ADALORA; only LORA is supported"),
        ({"peft_type": "PROMPT_TUNING"}, "of kind PROMPT_TUNING"),
        ({"peft_type": None, "fine_tune_type": "lora"}, "not in peft's layout: it has no peft_type"),
        ({"task_type": "SEQ_CLS"}, "was trained for SEQ_CLS"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialized by pissa_niter_4, which also changes the base"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication, which llmc cannot merge"),
        ({"something_new": True}, "uses something_new"),
    ],
)
def test_kinds_that_are_not_merged(fields: dict[str, Any], message: str, llama: Path, tmp_path: Path) -> None:
    hint = refused(llama, save_adapter(tmp_path, on_q(), **fields), message, UnsupportedError)
    assert "merge_and_unload" in hint or "task_type" in fields


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        (on_q(4), {}, "changes model.layers.3.self_attn.q_proj.weight, which the base does not have"),
        (on_q(2), {"target_modules": ["q_proj"]}, "has nothing for model.layers.2.self_attn.q_proj"),
        (on_q(2), {"target_modules": r".*\.q_proj"}, "has nothing for model.layers.2.self_attn.q_proj"),
        (on_q(), {"target_modules": "all-linear"}, "has nothing for model.layers.0.self_attn.k_proj"),
        (
            on_q(),
            {"target_modules": ["q_proj"], "layers_to_transform": [1]},
            "has matrices for model.layers.0.self_attn.q_proj, which its target_modules",
        ),
        (on_q(), {"r": 8}, r"lora_A.weight of .* has shape \[4, 64\], but .* imply \[8, 64\]"),
        (low_rank(Q.format(0), 64, 32), {}, r"has shape \[4, 32\], but .* imply \[4, 64\]"),
        ({k: v for k, v in on_q().items() if "lora_A" in k}, {}, "has only lora_A of model.layers.0"),
        (on_q(), {"use_dora": True}, "uses DoRA but has no magnitudes"),
        (on_q(), {"r": 0}, "adapter_config.json is damaged: ValueError: rank 0"),
        ({"base_model.model.score.weight": values(2, 64)}, {}, "changes score.weight"),
        ({}, {}, "holds no tensors"),
    ],
)
def test_an_adapter_of_another_base(
    tensors: dict[str, Array], fields: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    refused(llama, save_adapter(tmp_path, tensors, **fields), message)


@pytest.mark.parametrize(
    "fields", [{"layers_to_transform": [0, 1]}, {"exclude_modules": ["layers.2.self_attn.q_proj"]}]
)
def test_layers_that_were_not_trained(fields: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path, on_q(2), target_modules=["q_proj"], **fields)
    assert record(merged(llama, adapter)).merged == {"q_proj": 2}


def test_added_tokens(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    larger = {"base_model.model.model.embed_tokens.weight": values(260, 64)}
    message = r"has shape \[260, 64\], but .* imply \[256, 64\]"
    hint = refused(llama, save_adapter(tmp_path / "a", larger), message)
    assert "resize_token_embeddings" in hint
    adapter = save_adapter(tmp_path / "b", on_q())
    save_tiny_tokenizer(adapter)
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_tokens([f"<{i}>" for i in range(300 - len(tokenizer))])
    tokenizer.save_pretrained(adapter)
    refused(llama, adapter, r"has 300 tokens, up to '<\d+>', but the base's embedding has only 256 rows")


def test_an_adapter_is_not_a_model(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "lora", on_q())
    hint = refused(adapter, None, "lora is an adapter of org/base, not a model by itself")
    assert hint == f"llmc build org/base --adapter {adapter}"
    refused(llama, llama, "is not an adapter: it has no adapter_config.json")


def test_an_adapter_beside_a_model_is_named_or_refused(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_adapter(tmp_path, on_q())
    hint = refused(tmp_path, None, "holds a model and an adapter")
    assert hint.startswith(f"--adapter {tmp_path} builds it with the adapter; remove adapter_config.json")
    assert record(merged(tmp_path, tmp_path)).merged == {"q_proj": 3}


def test_files_that_are_missing(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "run" / "best", on_q())
    assert refused(llama, tmp_path / "run", "it has no adapter_config.json") == f"give {adapter}"
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "save_pretrained" in refused(llama, adapter, "only pickled weights .adapter_model.bin")
    (adapter / "adapter_model.bin").unlink()
    refused(llama, adapter, "has no adapter_model.safetensors")
    refused(llama, tmp_path / "lora.gguf", "lora.gguf does not exist")
