"""A checkpoint without some of its layers, and parts of its tensors."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.pruned import (
    PrunedStore,
    Selection,
    drop_layers,
    head_entries,
    narrow,
    require_alike,
    size_entries,
)
from llmc.errors import CheckpointError, UnsupportedError
from llmc.trace.stamp import find_layers
from tests.models import save_tiny_model, tiny_config

LAYERS = tuple(f"model.layers.{i}" for i in range(3))


def test_layers_take_what_the_config_says_of_them_along(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model("smollm3", tmp_path)))  # layers 0 and 2 have no rotation
    made = drop_layers(checkpoint, LAYERS, [1, 2])
    assert made.config.num_hidden_layers == 2
    assert made.config.no_rope_layers == checkpoint.config.no_rope_layers[1:]
    assert made.config.layer_types == checkpoint.config.layer_types[1:]
    name = "self_attn.q_proj.weight"
    np.testing.assert_array_equal(
        made.tensors.read(f"model.layers.0.{name}"), checkpoint.tensors.read(f"model.layers.1.{name}")
    )
    assert f"model.layers.2.{name}" not in made.tensors.infos()
    assert made.digest() != checkpoint.digest()
    assert made.digest() != drop_layers(checkpoint, LAYERS, [0, 2]).digest()
    model = made.load_reference()
    assert find_layers(model, made.config, stamp=False).names == LAYERS[:2]


def test_layers_that_the_config_would_make_others_of_are_refused(tmp_path: Path) -> None:
    # The first layer alone is dense, which the config says by a number.
    folder = save_tiny_model("deepseek_v3", tmp_path / "dense", first_k_dense_replace=1)
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(
        UnsupportedError, match=r"model\.layers\.0\.mlp\.\S+ is .* by the config, but missing"
    ):
        drop_layers(checkpoint, LAYERS, [1, 2])
    assert drop_layers(checkpoint, LAYERS, [0, 2]).config.num_hidden_layers == 2


def test_layers_that_compute_something_else_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model("granite", tmp_path)))
    config = copy.deepcopy(checkpoint.config)
    config.attention_multiplier = 0.5
    store = PrunedStore(checkpoint.tensors, {n: n for n in checkpoint.tensors.infos()}, {})
    other = replace(checkpoint, config=config, tensors=store)
    with pytest.raises(
        UnsupportedError, match=r"model\.layers\.0\.self_attn of the pruned model would differ from"
    ):
        require_alike(checkpoint, other, {n: n for n in LAYERS}, sizes=True)


def test_parts_of_tensors_are_read_by_rows(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model("llama", tmp_path / "model")))
    name = "model.layers.1.mlp.up_proj.weight"
    whole = checkpoint.tensors.read(name)
    rows, columns = np.array([1, 2, 5, 40, 95]), np.array([0, 63])
    save_file({"new": whole[:7]}, tmp_path / "new.safetensors")
    file = tmp_path / "new.safetensors"
    by_name = {
        "rows": Selection({0: rows}),
        "both": Selection({0: rows, 1: columns}),
        "new": Selection({0: np.arange(7)}, file, "new"),
    }
    store = PrunedStore(checkpoint.tensors, dict.fromkeys(by_name, name), by_name)
    assert {n: info.shape for n, info in store.infos().items()} == {
        "rows": (5, 64),
        "both": (5, 2),
        "new": (7, 64),
    }
    np.testing.assert_array_equal(store.read("rows"), whole[rows])
    np.testing.assert_array_equal(store.read("rows", 2, 4), whole[rows[2:4]])
    assert store.read("rows", 5, 5).shape == (0, 64)
    np.testing.assert_array_equal(store.read("both", 1), whole[rows[1:]][:, columns])
    np.testing.assert_array_equal(store.read("new", 2, 5), whole[2:5])
    file.unlink()
    with pytest.raises(CheckpointError, match="pruned weights cannot be read"):
        store.read("new")


def test_a_config_that_cannot_say_it_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model("llama", tmp_path)))
    odd = {"model.layers.0.mlp.up_proj.weight": Selection({0: np.arange(64)})}
    entries = size_entries(checkpoint.config, 96, 64)
    assert entries == [{"intermediate_size": 64}]
    with pytest.raises(
        UnsupportedError, match=r"the llama config cannot state the pruned model: model\.layers\.\d\.mlp"
    ):
        narrow(checkpoint, LAYERS, odd, entries, "odd")
    with pytest.raises(UnsupportedError, match="it has no entry for the size"):
        narrow(checkpoint, LAYERS, odd, size_entries(checkpoint.config, 97, 64), "odd")


def test_what_configs_may_have_to_say_of_heads() -> None:
    first = head_entries(tiny_config("llama"), (4, 2), (2, 1), 16)[0]
    assert first == {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    assert {"num_attention_heads": 2, "num_kv_heads": 1} in head_entries(
        tiny_config("falcon"), (4, 2), (2, 1), 16
    )
