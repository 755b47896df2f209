"""Models split into several GGUF files: opened together from any part, or refused with what is missing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from llmc.checkpoint import Checkpoint, open_checkpoint
from llmc.checkpoint.gguf_header import GgufHeader
from llmc.checkpoint.ranges import read_range
from llmc.errors import CheckpointError, UnsupportedError
from llmc.plan import default_output
from tests.checkpoint.tiny_gguf import write_gguf


def split(file: Path, count: int = 3, total: int | None = None) -> list[Path]:
    """Cut a file as llama.cpp's gguf-split does: the metadata in the first part, tensors in all but it."""
    header = GgufHeader.parse(file)
    paths = [file.with_name(f"{file.stem}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    raw = file.read_bytes()
    for number, path in enumerate(paths):
        writer = GGUFWriter(str(path), "")
        writer.kv_data[0].clear()
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(header.tensors) if total is None else total)
        for tensor in header.tensors[number - 1 :: count - 1] if number else ():
            rows = (tensor.shape[0], tensor.row_bytes)
            values = read_range(file, tensor.offset, np.dtype(np.uint8), rows, 0, None)
            writer.add_tensor(tensor.name, values, raw_dtype=GGMLQuantizationType(tensor.type_id))
            writer.tensors[0][tensor.name].shape = tensor.shape
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if number == 0:  # the metadata, as the whole file has it
            pairs = b"".join(raw[start:end] for start, end in header.spans.values())
            made = path.read_bytes()
            pair_count = int.from_bytes(made[16:24], "little") + len(header.spans)
            path.write_bytes(made[:16] + pair_count.to_bytes(8, "little") + pairs + made[24:])
    file.unlink()
    return paths


def facts(checkpoint: Checkpoint) -> tuple[Any, ...]:
    config = checkpoint.config.to_dict()
    return checkpoint.name, checkpoint.digest(), config, sorted(checkpoint.tensors.infos())


def test_any_part_opens_the_whole_model(tmp_path: Path) -> None:
    whole = open_checkpoint(str(write_gguf(tmp_path / "m.gguf")))
    values = {name: whole.tensors.read(name) for name in whole.tensors.infos()}
    parts = split(tmp_path / "m.gguf")
    opened = [open_checkpoint(str(part)) for part in parts]
    assert facts(opened[0]) == facts(opened[1]) == facts(opened[2])
    assert (opened[0].name, opened[0].config.to_dict()) == ("m", whole.config.to_dict())
    assert opened[0].weight_files == tuple(parts)
    for name, expected in values.items():
        np.testing.assert_array_equal(opened[0].tensors.read(name), expected)
    state = opened[2].load_reference().state_dict()
    np.testing.assert_array_equal(state["model.norm.weight"].numpy(), values["model.norm.weight"])
    opened[1].require_tokenizer()


def test_digest_is_of_all_parts(tmp_path: Path) -> None:
    *_, last = split(write_gguf(tmp_path / "m.gguf"))
    before = open_checkpoint(str(last)).digest()
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    assert open_checkpoint(str(last)).digest() != before


@pytest.mark.parametrize("named", [0, 1])
@pytest.mark.parametrize("missing", [0, 2])
def test_missing_part_is_named(named: int, missing: int, tmp_path: Path) -> None:
    parts = split(write_gguf(tmp_path / "m.gguf"))
    parts[missing].unlink()
    expected = rf"{parts[missing].name}.*(is missing|does not exist)|does not exist"
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(str(parts[named]))


def test_part_under_another_name(tmp_path: Path) -> None:
    first = split(write_gguf(tmp_path / "m.gguf"))[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="its name is not the name of a part"):
        open_checkpoint(str(first))


def test_parts_in_another_order(tmp_path: Path) -> None:
    first, second, third = split(write_gguf(tmp_path / "m.gguf"))
    second.rename(tmp_path / "x")
    third.rename(second)
    (tmp_path / "x").rename(third)
    with pytest.raises(CheckpointError, match=r"is part 2 of 3 by split\.no .* and part 1 of 3 by its name"):
        open_checkpoint(str(first))


def test_count_of_tensors(tmp_path: Path) -> None:
    first, *_ = split(write_gguf(tmp_path / "m.gguf"), total=40)
    with pytest.raises(CheckpointError, match=r"have 20 tensors, and split\.tensors\.count is 40"):
        open_checkpoint(str(first))


def test_name_of_the_whole_beside_its_parts(tmp_path: Path) -> None:
    split(write_gguf(tmp_path / "m.gguf"))
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        open_checkpoint(str(tmp_path / "m.gguf"))
    assert caught.value.hint is not None
    assert "m-00001-of-00003.gguf" in caught.value.hint


def test_folder_names_its_models(tmp_path: Path) -> None:
    split(write_gguf(tmp_path / "m.gguf"))
    write_gguf(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"has no config\.json; its GGUF models: 2") as caught:
        open_checkpoint(str(tmp_path))
    assert caught.value.hint == f"give the file: {tmp_path}/m-00001-of-00003.gguf (or other.gguf)"


def test_config_without_weights_names_the_model(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    open_checkpoint(str(file)).config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has neither model") as caught:
        open_checkpoint(str(tmp_path))
    assert caught.value.hint == f"give the GGUF file: {file}"


def test_output_is_named_after_the_model() -> None:
    assert default_output("a/m-00002-of-00003.gguf", "t", "p") == Path("artifacts/m/t@p")


def edit(file: Path, offset: int, data: bytes) -> Path:
    raw = bytearray(file.read_bytes())
    raw[offset : offset + len(data)] = data
    file.write_bytes(raw)
    return file


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ((3).to_bytes(4, "big"), "is a big-endian GGUF file"),
        ((1).to_bytes(4, "little"), "is GGUF version 1; supported are 2 and 3"),
    ],
)
def test_byte_order_and_version(version: bytes, message: str, tmp_path: Path) -> None:
    file = edit(write_gguf(tmp_path / "m.gguf"), 4, version)
    with pytest.raises(UnsupportedError, match=message) as caught:
        open_checkpoint(str(file))
    assert caught.value.hint is not None
