"""Checkpoints that are missing, damaged or of a kind that is not compiled."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.purpose import refuse_both_directions
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.checkpoint.sizes import refuse_impossible
from llmc.checkpoint.tokenizer import require_tokenizer
from llmc.errors import CheckpointError, ExitCode, LlmcError, ResourceError, UnsupportedError
from llmc.strict_json import parse_json
from tests.models import save_tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("sharded"), max_shard_size=150_000)


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder so that a test may damage it."""

    def copy(folder: Path) -> Path:
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return copy


def refused(ref: Path | str, message: str, kind: type[LlmcError] = CheckpointError) -> LlmcError:
    with pytest.raises(LlmcError, match=message) as caught:
        open_checkpoint(str(ref))
    assert type(caught.value) is kind
    expected = ExitCode.UNSUPPORTED if kind is UnsupportedError else ExitCode.USAGE
    assert caught.value.exit_code == expected
    return caught.value


def edit_config(folder: Path, **fields: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_no_such_folder(tmp_path: Path) -> None:
    error = refused(tmp_path / "nowhere", "nowhere does not exist")
    assert "hub id" in str(error.hint)


def test_no_such_gguf() -> None:
    refused("models/nowhere.gguf", "does not exist")


def test_file_that_is_no_gguf(llama: Path) -> None:
    refused(llama / "config.json", "is a file but not a .gguf")


def test_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path, "has no config.json")


def test_folder_with_only_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    error = refused(tmp_path, "has no config.json")
    assert error.hint == f"give the file: {tmp_path / 'a.gguf'}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "has no model_type"),
        (
            '{"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 9}',
            "num_experts_per_tok 9, but there are only 4 experts",
        ),
        ('{"model_type": "llama", "text_config": {"hidden_size": 64}}', "has a text_config, but a model of"),
        ("[" * 100_000, "nested too deeply"),
        (
            '{"model_type": "llama", "hidden_size": 64, "hidden_size": 128}',
            "hidden_size is given twice, as 64",
        ),
        ('{"model_type": "llama", "rms_norm_eps": NaN}', "rms_norm_eps is nan"),
        ('{"model_type": "llama", "rms_norm_eps": 1e999}', "rms_norm_eps is inf"),
        ('{"model_type": "gpt2", "n_layer": 1000000}', "n_layer 1,000,000, but no model"),
        (
            '{"model_type": "llama", "num_attention_heads": 0}',
            "num_attention_heads 0, but it must be at least 1",
        ),
        ('{"model_type": "llama", "rope_theta": 0.0}', "rope_theta of .* is 0.0, but frequencies"),
        ('{"model_type": "llama", "rope_scaling": {"factor": -1, "type": "linear"}}', "factor of .* is -1"),
        ('{"text_config": {"num_experts": 1000000}, "model_type": "x"}', "text_config.num_experts 1,000,000"),
        (f'{{"model_type": "llama", "vocab_size": {10**30}}}', "vocab_size of 31 digits"),
        ('{"model_type": "llama", "num_hidden_layers": "many"}', "is not a valid config of llama"),
    ],
)
def test_damaged_config(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, message)


def test_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lama", "auto_map": {"AutoConfig": "x.Y"}}')
    error = refused(tmp_path, "model_type lama", UnsupportedError)
    assert "llama" in str(error.hint)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "encoder-only"),
        ({"model_type": "deberta-v2"}, "no causal language model"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "voxtral"}, "no causal language model"),
        ({"model_type": "blip-2"}, "does not run on text alone: it requires pixel_values"),
    ],
)
def test_other_than_causal(config: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, message, UnsupportedError)


@pytest.mark.parametrize(
    ("model_type", "name", "purpose"),
    [
        ("llama", "LlamaForSequenceClassification", "classifies texts or scores them"),
        ("qwen2", "Qwen2ForRewardModel", "reward model"),
        ("qwen2", "Qwen2ForTokenClassification", "classifies tokens"),
        ("mistral", "MistralModel", "no language model head"),
        ("llama", "SomeCrossEncoder", "ranks texts"),
        ("llama", "LlamaBidirectionalModel", "reads a text in both directions"),
        ("mistral", "MistralBiForMNTP", "reads a text in both directions"),
    ],
)
def test_other_purpose_by_architecture(model_type: str, name: str, purpose: str, tmp_path: Path) -> None:
    config = {"model_type": model_type, "architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, f"holds a {name}, which .*{purpose}", UnsupportedError)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen2", "is_causal": False},
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
    ],
)
def test_attention_in_both_directions(fields: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    refused(tmp_path, "attends in both directions", UnsupportedError)


@pytest.mark.parametrize("model_type", ["paligemma", "gemma3", "doge"])
def test_what_transformers_has_by_default_is_possible(model_type: str) -> None:
    """Tokens of PaliGemma's image see each other, which its config calls bidirectional."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    refuse_both_directions(config)
    refuse_impossible(model_type, parse_json(config.to_json_string(use_diff=False)))


def test_settings_of_running_and_storing_are_left_out(llama: Path, damaged: Callable[[Path], Path]) -> None:
    how = {"attn_implementation": "owner/repo", "dtype": "int8", "return_dict": False}
    config = open_checkpoint(str(edit_config(damaged(llama), **how))).config
    assert config._attn_implementation == "sdpa"
    assert config.return_dict


@pytest.mark.parametrize(
    "file", ["modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"]
)
def test_embedding_model_by_its_files(file: str, llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("[]")
    refused(folder, f"sentence-transformers .it has {file}", UnsupportedError)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"model_type": "mllama", "text_config": {"cross_attention_layers": [3, 8]}}, "layers 3, 8"),
        ({"model_type": "mllama"}, "layers 3, 8, 13"),
        ({"model_type": "idefics", "num_hidden_layers": 4, "cross_layer_interval": 2}, "layers 0, 2"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "every layer"),
    ],
)
def test_cross_attention(config: dict[str, object], layers: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, f"{config['model_type']} has cross-attention in {layers}", UnsupportedError)


@pytest.mark.parametrize(
    ("scaling", "message", "kind"),
    [
        ({"rope_type": ["linear"]}, r"has rope_type \['linear'\]", UnsupportedError),
        ({"type": "su2", "factor": 2.0}, "rope_type su2, .* it has .*linear, llama3", UnsupportedError),
        (
            {"type": "linear", "rope_type": "yarn", "factor": 4.0},
            "rope_scaling of .* says type linear and rope_type yarn",
            CheckpointError,
        ),
    ],
)
def test_rope_type(
    scaling: dict[str, object],
    message: str,
    kind: type[LlmcError],
    llama: Path,
    damaged: Callable[[Path], Path],
) -> None:
    folder = edit_config(damaged(llama), rope_parameters=None, rope_scaling=scaling, rope_theta=1e4)
    refused(folder, message, kind)


def test_rope_type_in_two_spellings(llama: Path, damaged: Callable[[Path], Path]) -> None:
    scaling = {"type": "linear", "rope_type": "linear", "factor": 4.0}
    folder = edit_config(damaged(llama), rope_parameters=None, rope_scaling=scaling, rope_theta=1e4)
    assert open_checkpoint(str(folder)).config.rope_parameters["rope_type"] == "linear"


def test_config_that_builds_no_model(llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = edit_config(damaged(llama), hidden_act="no_such_function")
    error = refused(folder, "cannot build a causal language model", UnsupportedError)
    assert "config.json" in str(error.hint)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 9000}, "num_hidden_layers is 9,000 in .*, whose files hold 30 tensors"),
        ({"hidden_size": 1 << 40, "head_dim": 16}, "hidden_size is 1,099,511,627,776 in .*, but no tensor"),
    ],
)
def test_sizes_that_the_files_do_not_have(
    sizes: dict[str, int], message: str, llama: Path, damaged: Callable[[Path], Path]
) -> None:
    refused(edit_config(damaged(llama), **sizes), message)


def test_no_weights(llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    (folder / "model.safetensors").unlink()
    refused(folder, "has neither model.safetensors nor model.safetensors.index.json")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs(file: str, llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    (folder / file).write_text(LFS)
    assert "git lfs pull" in str(refused(folder, f"{file} is a Git LFS pointer").hint)


def test_weights_that_are_a_link_to_nothing(llama: Path, damaged: Callable[[Path], Path]) -> None:
    file = damaged(llama) / "model.safetensors"
    file.unlink()
    file.symlink_to("../blobs/abc")
    refused(file.parent, "model.safetensors is a link to ../blobs/abc, which does not exist")


def test_weights_of_another_name(llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    refused(folder, "has neither model.safetensors nor .*; it holds consolidated.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"eos_token_id": "two"}', "eos_token_id = two, which must be a token id"),
        ('{"eos_token_id": [[2]]}', "which must be a token id or a list of them"),
        ('{"temperature": -1.0}', "temperature = -1.0, which must be a number of 0 or above"),
        ('{"top_k": 1e30}', "top_k = 1e.30, which must be a whole number"),
        ('{"top_p": 2}', "top_p = 2, which must be a number between 0 and 1"),
        ("[1]", "generation_config.json holds a list"),
    ],
)
def test_settings_of_generation(
    settings: str, message: str, llama: Path, damaged: Callable[[Path], Path]
) -> None:
    folder = damaged(llama)
    (folder / "generation_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder)).generation_config()


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


def test_codes_that_nothing_describes(llama: Path, damaged: Callable[[Path], Path]) -> None:
    file = damaged(llama) / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, file)
    error = refused(
        file.parent, r"layers\.0\S+ and 20 more .* integers \(INT8\) .* has floats", UnsupportedError
    )
    assert "quantization_config" in str(error.hint)


def test_tensor_missing(llama: Path, damaged: Callable[[Path], Path]) -> None:
    file = damaged(llama) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    refused(file.parent, r"the files lack model\.layers\.1\.mlp\.up_proj\.weight, which LlamaForCausalLM has")


def test_tensor_of_the_wrong_shape(llama: Path, damaged: Callable[[Path], Path]) -> None:
    refused(
        edit_config(damaged(llama), intermediate_size=80),
        r"mlp\.\w+\.weight has shape \[96, 64\] in the files \(from .*\), but the config implies \[80, 64\]"
        r"|mlp\.\w+\.weight has shape \[64, 96\] in the files \(from .*\), but the config implies \[64, 80\]",
    )


def test_expert_missing(tmp_path: Path) -> None:
    file = save_tiny_model("mixtral", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    save_file(tensors, file)
    refused(tmp_path, r"model\.layers\.0\.mlp\.experts\.gate_up_proj cannot be made from .*7 tensors")


def test_tied_tensors_that_differ(tmp_path: Path) -> None:
    file = save_tiny_model("llama", tmp_path, tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(1)
    save_file(tensors, file)
    refused(tmp_path, "embed_tokens.weight and lm_head.weight differ in the files")


def test_file_that_shrinks_after_open(llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    checkpoint = open_checkpoint(str(folder))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:4096])
    with pytest.raises(CheckpointError, match="it changed since it was opened"):
        checkpoint.tensors.read("model.norm.weight")


def test_sentencepiece_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ResourceError, match=r"is a SentencePiece model, but .* not installed") as caught:
        require_tokenizer(tmp_path)
    assert caught.value.hint == "pip install sentencepiece"
    (tmp_path / "tokenizer.model").write_text("IQ== 0\n")  # tiktoken's
    require_tokenizer(tmp_path)


def test_hub_is_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    error = refused(
        "nobody/no-such-model@v1", "nobody/no-such-model is not a local folder, and the hub cannot be reached"
    )
    assert "HF_HUB_OFFLINE" in str(error.hint)


def test_hub_snapshot_in_the_cache(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A repository that was downloaded before opens without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    for file in llama.iterdir():
        (repository / "snapshots" / commit / file.name).write_bytes(file.read_bytes())
    checkpoint = open_checkpoint("someone/tiny@v1")
    assert checkpoint.name == "tiny"
    assert checkpoint.path == repository / "snapshots" / commit
