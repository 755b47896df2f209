"""Checkpoints are split over ranks by the model's own plan, and every rank has its exact part."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmc.artifact.ranks import LAYOUT, Piece, RankLayout, RankTensor, SourceTensor, rank_file
from llmc.backends.checkpoint.shards import write_ranks
from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.ranks import RankStore, find_differences
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.checkpoint.skeleton import build_skeleton
from llmc.checkpoint.splits import require_ranks, split_tensors
from llmc.errors import CheckpointError, ConfigError, UnsupportedError
from tests.checkpoint.quantized_folders import (
    Pack,
    compressed_config,
    gptq_config,
    pack_awq,
    pack_compressed,
    pack_gptq,
    write_codes,
)
from tests.models import save_tiny_model, tiny_config


def split(folder: Path, ranks: int) -> RankLayout:
    """Write the files of ranks into a folder, and return the layout."""
    whole = SafetensorsStore.open(folder)
    layout = split_tensors(build_skeleton(open_checkpoint(str(folder)).config), whole, ranks)
    write_ranks(folder, layout, whole)
    return layout


FORMATS: dict[str, tuple[dict[str, object], Pack]] = {
    "compressed-tensors": (
        compressed_config("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16),
        pack_compressed,
    ),
    "gptq": (gptq_config(group_size=16), pack_gptq()),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, pack_awq),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_rank_reads_its_part_of_every_quantized_matrix(tmp_path: Path, name: str) -> None:
    config, pack = FORMATS[name]
    values = write_codes(tmp_path, {**config}, pack, group=16)
    split(tmp_path, 2)
    assert list(find_differences(tmp_path, SafetensorsStore.open(tmp_path))) == []
    assert (tmp_path / rank_file(0)).stat().st_size < 0.6 * (tmp_path / "model.safetensors").stat().st_size
    for rank in range(2):
        tensors = open_checkpoint(str(tmp_path), rank=rank).tensors
        for parameter, whole in values.items():
            axis = 1 if "o_proj" in parameter or "down_proj" in parameter else 0
            part = np.split(tensors.read(parameter), 2, axis)[rank]
            np.testing.assert_array_equal(part, np.split(whole, 2, axis)[rank])


def test_all_ranks_together_have_the_whole_weights(tmp_path: Path) -> None:
    save_tiny_model("qwen3", tmp_path, tokenizer=True)
    split(tmp_path, 2)
    ranks, whole = RankStore.open(tmp_path), SafetensorsStore.open(tmp_path)
    assert ranks.infos() == whole.infos()
    for name in whole.infos():
        np.testing.assert_array_equal(ranks.read(name), whole.read(name))
        np.testing.assert_array_equal(ranks.read(name, 1, 3), whole.read(name, 1, 3))


def test_exchanged_ranks_are_found(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, tokenizer=True)
    split(tmp_path, 2)
    first, second = (tmp_path / rank_file(rank) for rank in range(2))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    found = list(find_differences(tmp_path, SafetensorsStore.open(tmp_path)))
    assert "rank 0 has another model.layers.0.mlp.down_proj.weight than the whole weights" in found
    assert not any("norm" in sentence for sentence in found)


def stale_part(folder: Path) -> None:
    shutil.copy(folder / rank_file(0), folder / rank_file(0).replace("part-0", "part-1"))


def stale_rank(folder: Path) -> None:
    shutil.copy(folder / rank_file(1), folder / rank_file(2))


def lost_source(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (stale_part, "ranks/model-rank-0-part-1.safetensors is not written by a build"),
        (stale_rank, "ranks/model-rank-2-part-0.safetensors is not written by a build"),
        (lost_source, "ranks/layout.json does not state model.norm.weight as the weights have it"),
    ],
)
def test_what_an_earlier_build_left_is_found(
    tmp_path: Path, change: Callable[[Path], None], sentence: str
) -> None:
    save_tiny_model("llama", tmp_path, tokenizer=True)
    split(tmp_path, 2)
    change(tmp_path)
    assert sentence in list(find_differences(tmp_path, SafetensorsStore.open(tmp_path)))


def test_padding_and_small_values_are_compared(tmp_path: Path) -> None:
    whole = {"padded": np.ones((3, 2), np.float32), "small": np.ones(2, np.float32)}
    pieces = (Piece(source="padded", start=(0, 0), size=(3, 2), at=(0, 0), extent=(3, 2)),)
    rank = {"padded": RankTensor(dtype="float32", shape=(4, 2), pieces=pieces)}

    def differences(small: float, padding: float) -> list[str]:
        sources = {
            "padded": SourceTensor(dtype="float32", shape=(3, 2)),
            "small": SourceTensor(dtype="float32", shape=(2,), values=(1.0, small)),
        }
        folder = tmp_path / f"{small}-{padding}"
        folder.mkdir()
        save_file(whole, folder / "model.safetensors")
        store = SafetensorsStore.open(folder)
        write_ranks(folder, RankLayout(names="none", tensors=sources, ranks=(rank,)), store)
        stored = load_file(folder / rank_file(0))
        stored["padded"][3] = padding
        save_file(stored, folder / rank_file(0))
        return list(find_differences(folder, store))

    assert differences(1.0, 0.0) == []
    assert differences(1.0, 0.5) == ["rank 0 has another padded than the whole weights"]
    assert differences(2.0, 0.0) == ["ranks/layout.json does not state small as the weights have it"]


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, tokenizer=True)
    split(tmp_path, 2)
    tensors = load_file(tmp_path / rank_file(1))
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].copy()
    save_file(tensors, tmp_path / rank_file(1))
    with pytest.raises(CheckpointError, match=r"rank-1.* does not have model\.norm\.weight"):
        RankStore.open(tmp_path)
    (tmp_path / rank_file(1)).unlink()
    with pytest.raises(CheckpointError, match=r"lacks .* the file of rank 1"):
        RankStore.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("[0,0]", "[0,9999]"), "from outside of"),
        (('"names"', '"nouns"'), "is not a layout of ranks"),
    ],
)
def test_a_damaged_layout_is_refused(tmp_path: Path, change: tuple[str, str], match: str) -> None:
    save_tiny_model("llama", tmp_path, tokenizer=True)
    split(tmp_path, 2)
    text = (tmp_path / LAYOUT).read_text()
    (tmp_path / LAYOUT).write_text(text.replace(change[0], change[1], 1))
    with pytest.raises(CheckpointError, match=match):
        RankStore.open(tmp_path)


def test_a_folder_that_is_not_split_has_no_ranks(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, tokenizer=True)
    with pytest.raises(CheckpointError, match="is not split"):
        open_checkpoint(str(tmp_path), rank=0)


def test_sizes_that_do_not_divide_are_refused_with_those_that_do(tmp_path: Path) -> None:
    fields = {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 16, "hidden_size": 192}
    save_tiny_model("llama", tmp_path, tokenizer=True, intermediate_size=96, vocab_size=264, **fields)
    checkpoint = open_checkpoint(str(tmp_path))
    model, infos = build_skeleton(checkpoint.config), checkpoint.tensors.infos()
    with pytest.raises(ConfigError, match="6 key-value heads cannot be split over 4 ranks") as refused:
        require_ranks(model, infos, 4)
    assert refused.value.hint == "numbers of ranks that fit: 2-3, 6"
    with pytest.raises(ConfigError, match="groups of 32 inputs cannot be split over 2") as refused:
        require_ranks(model, infos, 2, group=32)
    assert refused.value.hint == "numbers of ranks that fit: 3"
    with pytest.raises(ConfigError, match="does not split anything"):
        require_ranks(model, infos, 1)


def test_a_model_without_a_plan_is_refused() -> None:
    model = build_skeleton(tiny_config("opt"))
    with pytest.raises(UnsupportedError, match="no tensor-parallel plan for OPTForCausalLM"):
        require_ranks(model, {}, 2)
