"""Weight files, indexes and headers that are missing or damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.errors import CheckpointError, UnsupportedError
from tests.checkpoint.refusals import refused

INDEX = "model.safetensors.index.json"


def test_no_weights(llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    (folder / "model.safetensors").unlink()
    refused(folder, "has neither model.safetensors nor model.safetensors.index.json")


def test_weights_of_another_name(llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    refused(folder, "has neither model.safetensors nor .*; it holds consolidated.safetensors")


def test_only_pickled_weights(llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refused(folder, "only pickled weights")
    assert "safetensors" in str(error.hint)


def test_missing_shard(sharded: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(sharded)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(folder, f"1 of . shards are missing in .*: {shard.name}")


def test_index_that_is_no_index(sharded: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(sharded)
    (folder / INDEX).write_text('{"weight_map": []}')
    refused(folder, "is not an index")


@pytest.mark.parametrize("name", [None, {"a": 1}, "x" * 300, "a\0b", "../model.safetensors", ""])
def test_index_whose_files_have_no_names(
    name: object, sharded: Path, damaged: Callable[[Path], Path]
) -> None:
    folder = damaged(sharded)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(folder, "names a file outside of its folder|is not an index")


def test_index_names_a_tensor_that_is_not_there(sharded: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(sharded)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = sorted(set(index["weight_map"].values()))[0]
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "places model.extra.weight in .*, which does not hold it")


def test_index_leads_outside(sharded: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(sharded)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "names a file outside of its folder")


def add_to_last_shard(folder: Path, name: str, value: float) -> Path:
    """Puts into the last shard what the index places in the first, or nowhere."""
    *_, shard = sorted(folder.glob("model-*.safetensors"))
    save_file({**load_file(shard), name: np.full((256, 64), value, np.float32)}, shard)
    return shard


def test_a_tensor_in_two_shards(sharded: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(sharded)
    name = "model.embed_tokens.weight"
    shard = add_to_last_shard(folder, name, 7.0)
    first = json.loads((folder / INDEX).read_text())["weight_map"][name]
    refused(folder, f"{shard} holds {name} with other values than {first}, where .* places it")


def test_a_tensor_that_the_index_does_not_name(sharded: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(sharded)
    shard = add_to_last_shard(folder, "model.stale.weight", 7.0)
    refused(folder, f"{shard} holds model.stale.weight, which {INDEX} does not name")


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "not a safetensors file, or is truncated within its header"),
        (500, "truncated within its header"),
        (-1000, "is truncated: .* bytes, its header describes"),
    ],
)
def test_truncated_weights(length: int, message: str, llama: Path, damaged: Callable[[Path], Path]) -> None:
    file = damaged(llama) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    refused(file.parent, message)


def test_damaged_header(llama: Path, damaged: Callable[[Path], Path]) -> None:
    file = damaged(llama) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20:24] = b"\xff\xff\xff\xff"
    file.write_bytes(data)
    refused(file.parent, "damaged header")


def write_header(file: Path, **entry: object) -> None:
    write_raw_header(file, json.dumps({"w": entry}))


def write_raw_header(file: Path, header: str) -> None:
    text = header.encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))


def test_header_whose_sizes_disagree(llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    write_header(folder / "model.safetensors", dtype="F32", shape=[4, 8], data_offsets=[0, 64])
    refused(folder, r"gives w 64 bytes, but F32 \[4, 8\] takes 128")


DOUBLE = ',"shape":[4,4]'


def entry(shape: str, begin: int, end: int, more: str = "") -> str:
    return f'{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]{more}}}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f'{{"a":{entry("[8]", 0, 32)},"b":{entry("[12]", 16, 64)}}}', "invalid offset"),
        (f'{{"a":{entry("[4]", 0, 16)},"b":{entry("[8]", 32, 64)}}}', "invalid offset"),
        (f'{{"a":{entry("[8]", 0, 32)},"a":{entry("[8]", 32, 64)}}}', "names a twice in its header"),
        (f'{{"a":{entry("[16.9]", 0, 64)}}}', "invalid type: floating point"),
        (f'{{"a":{entry("[-4, -4]", 0, 64)}}}', "invalid value"),
        (f'{{"a":{entry("[1e999]", 0, 64)}}}', "damaged header"),
        (f'{{"a":{entry("[16]", 0, 64, DOUBLE)}}}', "duplicate field"),
        ("[" * 100_000, "damaged header"),
    ],
)
def test_header_that_the_safetensors_library_refuses(header: str, message: str, tmp_path: Path) -> None:
    write_raw_header(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsStore.open(tmp_path)


def test_tensor_type_that_is_not_read(llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    write_header(folder / "model.safetensors", dtype="F4", shape=[64], data_offsets=[0, 32])
    refused(folder, "w in .* is stored as F4", UnsupportedError)


def test_fp8_without_its_scales(llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    write_header(folder / "model.safetensors", dtype="F8_E4M3", shape=[64], data_offsets=[0, 64])
    refused(folder, "w is stored as FLOAT8E4M3FN, but nothing in the folder says how", UnsupportedError)


def test_file_that_shrinks_after_open(llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    checkpoint = open_checkpoint(str(folder))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:4096])
    with pytest.raises(CheckpointError, match="it changed since it was opened"):
        checkpoint.tensors.read("model.norm.weight")
