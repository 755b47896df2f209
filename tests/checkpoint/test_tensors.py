"""Every tensor of the store is the one that `from_pretrained` puts into the model."""

import json
import threading
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.core_model_loading import WeightRenaming

from llmc.checkpoint import Checkpoint, open_checkpoint
from llmc.checkpoint.configuration import load_config
from llmc.checkpoint.conversion import convert_store
from llmc.checkpoint.ranges import WholeValues
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.checkpoint.skeleton import build_skeleton
from tests.models import MODEL_TYPES, save_tiny_model


def assert_equals_reference(checkpoint: Checkpoint) -> None:
    state = {name: tensor.numpy() for name, tensor in checkpoint.load_reference().state_dict().items()}
    infos = checkpoint.tensors.infos()
    assert set(state) == set(infos) | set(checkpoint.tied)
    for name, info in infos.items():
        value = checkpoint.tensors.read(name)
        assert value.shape == info.shape
        assert value.dtype == info.dtype.numpy()
        np.testing.assert_array_equal(value.astype(np.float32), state[name], err_msg=name)
        np.testing.assert_array_equal(
            checkpoint.tensors.read(name, 1, 3).astype(np.float32), state[name][1:3]
        )
    for absent, stored in checkpoint.tied.items():
        np.testing.assert_array_equal(state[absent], state[stored])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_equals_from_pretrained(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model(model_type, tmp_path)))
    assert checkpoint.config.model_type == model_type
    assert checkpoint.unused == ()
    assert_equals_reference(checkpoint)


def test_experts_are_stored_apart_and_read_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model("mixtral", tmp_path)
    stored = SafetensorsStore.open(folder).infos()
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in stored
    checkpoint = open_checkpoint(str(folder))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    whole = checkpoint.tensors.read(name)
    assert whole.shape == (4, 192, 64)

    reads = []
    read = SafetensorsStore.read
    monkeypatch.setattr(
        SafetensorsStore, "read", lambda self, n, *rows: reads.append(n) or read(self, n, *rows)
    )
    np.testing.assert_array_equal(checkpoint.tensors.read(name, 2, 3), whole[2:3])
    assert sorted(reads) == [
        "model.layers.0.block_sparse_moe.experts.2.w1.weight",
        "model.layers.0.block_sparse_moe.experts.2.w3.weight",
    ]
    assert checkpoint.tensors.read(name, 4, 4).shape == (0, 192, 64)


def test_conversion_that_needs_the_whole_is_done_once_per_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model("hrm_text", tmp_path)))
    converted = {
        name for name in checkpoint.tensors.infos() if name not in SafetensorsStore.open(tmp_path).infos()
    }
    assert converted
    name = sorted(converted)[0]
    whole = checkpoint.tensors.read(name)
    reads = []
    read = SafetensorsStore.read
    monkeypatch.setattr(
        SafetensorsStore, "read", lambda self, n, *rows: reads.append(n) or read(self, n, *rows)
    )
    rows = [checkpoint.tensors.read(name, at, at + 8) for at in range(0, whole.shape[0], 8)]
    np.testing.assert_array_equal(np.concatenate(rows), whole)
    assert len(reads) == 1


def test_sharded(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path, max_shard_size=100_000)
    assert not (folder / "model.safetensors").exists()
    checkpoint = open_checkpoint(str(folder))
    assert len(checkpoint.weight_files) > 2
    assert_equals_reference(checkpoint)


def test_bfloat16_comes_as_it_is_stored(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model("mixtral", tmp_path, dtype=torch.bfloat16)))
    assert checkpoint.tensors.read("model.norm.weight").dtype == ml_dtypes.bfloat16
    assert checkpoint.tensors.read("model.layers.1.mlp.experts.down_proj", 1).dtype == ml_dtypes.bfloat16
    assert_equals_reference(checkpoint)


def test_absent_prefix_is_added(tmp_path: Path) -> None:
    folder = save_tiny_model("gpt2", tmp_path)
    old = {
        n.removeprefix("transformer."): value for n, value in load_file(folder / "model.safetensors").items()
    }
    old["h.0.attn.masked_bias"] = np.zeros((), np.float32)
    save_file(old, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert "transformer.h.0.ln_1.weight" in checkpoint.tensors.infos()
    assert checkpoint.unused == ("h.0.attn.masked_bias",)
    assert_equals_reference(checkpoint)


def test_old_names_are_renamed(tmp_path: Path) -> None:
    folder = save_tiny_model("bert", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    assert set(old) != set(tensors)
    save_file(old, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.unused == ()
    assert_equals_reference(checkpoint)


def test_tied_tensor_stored_twice_is_read_once(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path, tie_word_embeddings=True)
    assert open_checkpoint(str(folder)).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in checkpoint.tensors.infos()


def test_tied_tensor_stored_under_the_other_name(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.tied == {"model.embed_tokens.weight": "lm_head.weight"}
    assert_equals_reference(checkpoint)


def test_rename_that_leads_nowhere_leaves_the_name(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    model = build_skeleton(load_config(folder))
    mapping = [WeightRenaming(r"^model\.norm\.", "model.no_such_norm.")]
    converted = convert_store(SafetensorsStore.open(folder), model, mapping)
    assert converted.unused == {}
    assert "model.norm.weight" in converted.store.infos()


def test_parts_of_whole_values_are_kept_by_key_and_thread() -> None:
    values = WholeValues()
    made: list[str] = []

    def part(key: str, start: int, stop: int) -> list[int]:
        def compute() -> np.ndarray:
            made.append(f"{key} in {threading.current_thread().name}")
            return np.arange(4) + 10 * len(key)

        return list(values.rows(key, compute, start, stop))

    assert part("a", 0, 2) == [10, 11]
    assert part("bb", 0, 2) == [20, 21]
    assert part("bb", 2, 4) == [22, 23]
    assert made == ["a in MainThread", "bb in MainThread"]
    assert part("a", 0, 2) == [10, 11]
    other = threading.Thread(target=part, args=("a", 2, 4), name="other")
    other.start()
    other.join()
    assert part("a", 2, 4) == [12, 13]
    assert made[2:] == ["a in MainThread", "a in other"]


def test_two_threads_read_at_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model("hrm_text", tmp_path)))
    names = [n for n, info in checkpoint.tensors.infos().items() if len(info.shape) == 2]
    expected = {name: checkpoint.tensors.read(name) for name in names}
    wrong: list[str] = []

    def walk(order: list[str]) -> None:
        for name in order:
            for at in range(0, expected[name].shape[0], 16):
                if not np.array_equal(
                    checkpoint.tensors.read(name, at, at + 16), expected[name][at : at + 16]
                ):
                    wrong.append(name)

    threads = [threading.Thread(target=walk, args=(order,)) for order in (names, names[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_rows_come_from_their_bytes_alone(tmp_path: Path) -> None:
    """A sparse file of 8 GB: reading a few rows of it takes no memory of that order."""
    rows, columns = 1 << 20, 2048
    entry = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, rows * columns * 4]}
    header = json.dumps({"w": entry}).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.seek((rows - 1) * columns * 4, 1)
        stream.write(np.full(columns, 7, np.float32).tobytes())
    store = SafetensorsStore.open(tmp_path)
    tracemalloc.start()
    tail = store.read("w", rows - 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tail.shape == (2, columns)
    assert tail[0].max() == 0
    assert tail[1].min() == 7
    assert peak < 1 << 20
