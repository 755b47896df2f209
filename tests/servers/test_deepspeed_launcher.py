"""The launcher for DeepSpeed cuts embeddings and reads every rank's slices; AutoTP is run by a benchmark."""

import copy
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from llmc.arrays import Array
from llmc.backends.checkpoint.shards import write_ranks
from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.checkpoint.skeleton import build_skeleton
from llmc.checkpoint.splits import split_tensors
from llmc.servers.deepspeed_launcher import Folder, Weights, cut_table, hollow, place, put_memory, put_nothing
from tests.checkpoint.quantized_folders import (
    Pack,
    compressed_config,
    gptq_config,
    pack_awq,
    pack_compressed,
    pack_gptq,
    pack_int8,
    write_codes,
    write_folder,
)

GROUPS = compressed_config("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16)
CHANNELS = compressed_config("int-quantized", num_bits=8, type="int", strategy="channel")
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
FORMATS: dict[str, tuple[dict[str, object], Pack, dict[str, object]]] = {
    "packed": (GROUPS, pack_compressed, {"group": 16}),
    "packed-symmetric": (GROUPS, pack_compressed, {"group": 16, "symmetric": True}),
    "int8": (CHANNELS, pack_int8, {"bits": 8, "group": -1, "symmetric": True}),
    "gptq": (gptq_config(group_size=16), pack_gptq(), {"group": 16}),
    "gptq-v2": (gptq_config(group_size=16, checkpoint_format="gptq_v2"), pack_gptq(0), {"group": 16}),
    "awq": (AWQ, pack_awq, {"group": 16}),
}


def require_slices(weights: Weights, values: dict[str, Array], rank: int) -> None:
    """Compare the halves of a rank, and a box that begins within a word, with the values."""
    for name, whole in values.items():
        assert weights.shape(name) == whole.shape
        outputs, inputs = whole.shape
        boxes = [
            ([rank * outputs // 2, 0], [outputs // 2, inputs]),
            ([0, rank * inputs // 2], [outputs, inputs // 2]),
            ([3, 5], [7, 21]),
        ]
        for (row, column), (rows, columns) in boxes:
            found = weights.read(name, [row, column], [rows, columns]).numpy()
            expected = whole[row : row + rows, column : column + columns]
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FORMATS)
def test_slices_are_dequantized(tmp_path: Path, name: str) -> None:
    config, pack, drawn = FORMATS[name]
    values = write_codes(tmp_path, config, pack, **drawn)
    require_slices(Weights(Folder(tmp_path, 1), config), values, 1)


def test_slices_come_from_the_files_of_ranks_alone(tmp_path: Path) -> None:
    values = write_codes(tmp_path, GROUPS, pack_compressed, group=16)
    whole = SafetensorsStore.open(tmp_path)
    model = build_skeleton(open_checkpoint(str(tmp_path)).config)
    write_ranks(tmp_path, split_tensors(model, whole, 2), whole)
    (tmp_path / "model.safetensors").unlink()
    for place_ in (tmp_path, tmp_path / "ranks"):
        require_slices(Weights(Folder(place_, 1), GROUPS), values, 1)


def test_codes_of_other_formats_are_refused(tmp_path: Path) -> None:
    def pack(module: str, shape: tuple[int, int]) -> tuple[dict[str, Array], Array]:
        scale = np.ones((shape[0], shape[1] // 16), ml_dtypes.float8_e4m3fn)
        return {"weight": np.zeros((shape[0], shape[1] // 2), np.uint8), "weight_scale": scale}, np.zeros(
            shape
        )

    write_folder(tmp_path, {"quant_method": "modelopt"}, pack)
    weights = Weights(Folder(tmp_path, 0), {"quant_method": "modelopt"})
    with pytest.raises(SystemExit, match=r"is stored as torch\.uint8"):
        weights.read("model.layers.0.mlp.up_proj.weight", [0, 0], [2, 2])
    with pytest.raises(SystemExit, match=r"lacks model\.none"):
        weights.shape("model.none")


def test_a_model_takes_no_memory_until_it_is_filled() -> None:
    with hollow():
        model = torch.nn.Linear(1 << 14, 1 << 14)
    put_nothing(model)
    assert model.weight.untyped_storage().nbytes() == 4
    assert model.weight[:, : 1 << 13].shape == (1 << 14, 1 << 13)
    small = torch.nn.Linear(2, 3)
    put_nothing(small)
    put_memory(small)
    assert small.weight.untyped_storage().nbytes() == 24


@pytest.mark.parametrize("kind", [torch.nn.Embedding, Gemma3TextScaledWordEmbedding])
def test_an_embedding_is_the_sum_over_ranks(kind: type[torch.nn.Embedding]) -> None:
    """Eleven tokens are cut into ranges of 4, 4 and 3; a scale of rows, and the padding token, stay right."""
    torch.manual_seed(0)
    scale = {} if kind is torch.nn.Embedding else {"embed_scale": 3.0}
    whole = kind(11, 6, padding_idx=0, **scale)
    tokens, parts = torch.arange(11).reshape(1, 11).flip(1), list[torch.Tensor]()
    for start, count in ((0, 4), (4, 4), (8, 3)):
        part = copy.deepcopy(whole)
        cut_table(part, start, count, parts.append)
        part(tokens[:, :5])
        part(tokens)
        assert part.weight.shape == (count, 6)
    torch.testing.assert_close(torch.stack(parts[1::2]).sum(0), whole(tokens))
    torch.testing.assert_close(torch.stack(parts[::2]).sum(0), whole(tokens[:, :5]))


def test_the_place_of_a_slice_is_known_from_all_ranks() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 4), "b": torch.nn.Bilinear(2, 2, 2)})
    assert place(model, "a.weight", (4, 6), [(4, 2), (4, 3), (4, 1)], 2) == [0, 5]
    assert place(model, "a.weight", (4, 6), [(4, 6), (4, 6)], 1) == [0, 0]
    with pytest.raises(SystemExit, match=r"AutoTP cuts a\.weight"):
        place(model, "a.weight", (4, 6), [(4, 2), (4, 2)], 1)
    with pytest.raises(SystemExit, match="as Bilinear, which is not a range"):
        place(model, "b.weight", (2, 2, 2), [(2, 2, 1), (2, 2, 1)], 1)
