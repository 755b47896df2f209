"""genai_config.json, held against onnxruntime-genai itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from transformers import GenerationConfig, LlamaConfig

from llmc.backends.model_file import write_model
from llmc.backends.onnxruntime.genai import shares_cache, write_genai_config
from llmc.backends.onnxruntime.generate import generate_tokens
from llmc.config import Provider
from llmc.errors import ExitCode, GraphError, UnsupportedError
from llmc.graph.interface import Interface

MakeCounter = Callable[..., tuple[ir.Model, Interface]]

END = GenerationConfig(eos_token_id=31, pad_token_id=0)


def write(folder: Path, interface: Interface, generation: Any = END, **changes: Any) -> dict[str, Any]:
    """The parsed genai_config.json; `changes` go into the model's config or the call."""
    call = {"provider": Provider.CPU, "threads": None, "share_cache": False}
    call |= {name: changes.pop(name) for name in list(changes) if name in call}
    config = LlamaConfig(**{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changes})
    write_genai_config(folder, config, generation, interface, **call)
    loaded: dict[str, Any] = json.loads((folder / "genai_config.json").read_text())
    return loaded


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"logits": "last"},
        {"layers": ((1, 4), (2, 4), (1, 8))},
        {"numbers": (2, 5)},
    ],
    ids=["all logits", "last logits", "layers of other geometry", "layers without a cache between"],
)
def test_the_runtime_serves_it(tmp_path: Path, make_counter: MakeCounter, variant: dict[str, Any]) -> None:
    model, interface = make_counter(**variant)
    write_model(model, tmp_path)
    write(tmp_path, interface)
    assert generate_tokens(tmp_path, [1, 2, 3], 4) == [6, 12, 24, 16]


def test_the_runtime_counts_positions_from_the_start(tmp_path: Path, make_counter: MakeCounter) -> None:
    model, interface = make_counter(position_ids=True)
    write_model(model, tmp_path)
    config = write(tmp_path, interface)
    assert config["model"]["decoder"]["inputs"]["position_ids"] == "position_ids"
    # Token plus position: 1 + 0, 2 + 1, 3 + 2 are 9; then 9 + (9 + 3) is 21; then 21 + (21 + 4) is 46.
    assert generate_tokens(tmp_path, [1, 2, 3], 3) == [9, 21, 46 % 32]


def test_a_ragged_batch_is_padded_right_and_masked(tmp_path: Path, make_counter: MakeCounter) -> None:
    import onnxruntime_genai as og

    model, interface = make_counter(position_ids=True)
    write_model(model, tmp_path)
    write(tmp_path, interface)
    served = og.Model(str(tmp_path))
    params = og.GeneratorParams(served)
    params.set_search_options(batch_size=2, max_length=5)
    generator = og.Generator(served, params)
    generator.append_tokens(np.array([[1, 2, 3], [5, 0, 0]], dtype=np.int32))
    for _ in range(2):
        generator.generate_next_token()
    assert generator.get_input("attention_mask").tolist() == [[1, 1, 1, 1], [1, 0, 0, 1]]
    assert generator.get_input("position_ids").tolist() == [[3], [1]]
    assert [int(i) for i in generator.get_sequence(1)][3:] == [5, 11]


def test_the_names_of_the_graph_are_stated(tmp_path: Path, make_counter: MakeCounter) -> None:
    _, interface = make_counter()
    decoder = write(tmp_path, interface, threads=2)["model"]["decoder"]
    assert decoder == {
        "session_options": {"log_id": "llmc", "provider_options": [], "intra_op_num_threads": 2},
        "filename": "model.onnx",
        "head_size": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def test_cuda_and_shared_buffers_are_stated(tmp_path: Path, make_counter: MakeCounter) -> None:
    _, interface = make_counter()
    config = write(tmp_path, interface, provider=Provider.CUDA, share_cache=True)
    options = config["model"]["decoder"]["session_options"]
    assert options["provider_options"] == [{"cuda": {"enable_cuda_graph": "0"}}]
    assert options["session.use_device_allocator_for_initializers"] == "1"
    assert config["search"]["past_present_share_buffer"] is True
    assert config["search"]["max_length"] == config["model"]["context_length"] == 64


def test_two_writes_give_the_same_bytes(tmp_path: Path, make_counter: MakeCounter) -> None:
    _, interface = make_counter()
    write(tmp_path, interface)
    first = (tmp_path / "genai_config.json").read_bytes()
    write(tmp_path, interface)
    assert (tmp_path / "genai_config.json").read_bytes() == first


@pytest.mark.parametrize(
    ("generation", "config", "eos", "pad"),
    [
        ({"eos_token_id": [31, 7], "pad_token_id": 3}, {"eos_token_id": 5}, [31, 7], 3),
        ({}, {"eos_token_id": 5, "pad_token_id": 0}, [5], 0),
        ({"eos_token_id": 9}, {}, [9], 9),
        ({"eos_token_id": [9, 32, 50256]}, {"pad_token_id": -1}, [9], 9),
        ({"pad_token_id": 4}, {}, [4], 4),
    ],
    ids=["generation config first", "then config", "pad is eos", "outside of the vocabulary", "eos is pad"],
)
def test_special_tokens(
    tmp_path: Path,
    make_counter: MakeCounter,
    generation: dict[str, Any],
    config: dict[str, Any],
    eos: list[int],
    pad: int,
) -> None:
    _, interface = make_counter()
    model = write(tmp_path, interface, GenerationConfig(**generation), **config)["model"]
    assert (model["eos_token_id"], model["pad_token_id"]) == (eos, pad)


def test_the_tokenizer_adds_its_end_where_nobody_wrote_a_generation_config(
    tmp_path: Path, make_counter: MakeCounter, tokenizer_files: Callable[..., None]
) -> None:
    _, interface = make_counter()
    tokenizer_files(tmp_path)
    assert write(tmp_path, interface, None, eos_token_id=5)["model"]["eos_token_id"] == [5, 31]
    assert write(tmp_path, interface, None)["model"]["eos_token_id"] == [31]
    derived = GenerationConfig.from_model_config(LlamaConfig(eos_token_id=5))
    assert write(tmp_path, interface, derived)["model"]["eos_token_id"] == [5, 31]
    written = GenerationConfig(eos_token_id=5)
    assert write(tmp_path, interface, written)["model"]["eos_token_id"] == [5]


def test_no_end_of_sequence_is_unsupported(tmp_path: Path, make_counter: MakeCounter) -> None:
    _, interface = make_counter()
    fact = "nor the tokenizer has one inside of the vocabulary of 32"
    with pytest.raises(UnsupportedError, match=fact) as caught:
        write(tmp_path, interface, None, eos_token_id=50256)
    assert caught.value.exit_code is ExitCode.UNSUPPORTED
    assert caught.value.hint == "set eos_token_id in the checkpoint's generation_config.json"


def test_sampling_settings_are_carried_over_and_sampling_runs(
    tmp_path: Path, make_counter: MakeCounter
) -> None:
    import onnxruntime_genai as og

    model, interface = make_counter()
    write_model(model, tmp_path)
    generation = GenerationConfig(eos_token_id=31, do_sample=True, temperature=0.6, top_p=0.9)
    search = write(tmp_path, interface, generation)["search"]
    assert search == {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 32,
        "max_length": 64,
        "past_present_share_buffer": False,
    }
    served = og.Model(str(tmp_path))
    generator = og.Generator(served, og.GeneratorParams(served))
    generator.append_tokens(np.array([1, 2, 3], dtype=np.int32))
    generator.generate_next_token()
    assert write(tmp_path, interface, None, eos_token_id=31)["search"]["do_sample"] is False


def test_a_model_without_a_bound_gets_a_large_context(tmp_path: Path, make_counter: MakeCounter) -> None:
    model, interface = make_counter()
    write_model(model, tmp_path)
    config = write(tmp_path, interface.model_copy(update={"max_length": None}))
    assert config["model"]["context_length"] == 1 << 20
    assert generate_tokens(tmp_path, [1] * 100, 1) == [100 % 32]


def renamed(interface: Interface, **changes: Any) -> Interface:
    first = interface.cache[0].model_copy(update=changes)
    return interface.model_copy(update={"cache": (first, *interface.cache[1:])})


def extended(interface: Interface, field: str, name: str) -> Interface:
    specs = getattr(interface, field)
    return interface.model_copy(update={field: (*specs, specs[0].model_copy(update={"name": name}))})


@pytest.mark.parametrize(
    ("variant", "change", "fact"),
    [
        ({"value_width": 6}, lambda i: i, "layer 0 has keys of 4 and values of 6"),
        ({}, lambda i: extended(i, "inputs", "past_conv.0"), r"does not feed input past_conv\.0"),
        ({}, lambda i: extended(i, "outputs", "hidden"), r"the graph has outputs logits .*, hidden"),
        ({}, lambda i: i.model_copy(update={"cache": ()}), "graphs with a cache, but this one has none"),
        (
            {"numbers": (0, 1)},
            lambda i: renamed(i, layer=7),
            r"names that differ only in the layer number, but these are past_key_values\.0\.key",
        ),
    ],
)
def test_graphs_that_the_runtime_cannot_serve_are_unsupported(
    tmp_path: Path,
    make_counter: MakeCounter,
    variant: dict[str, Any],
    change: Callable[[Interface], Interface],
    fact: str,
) -> None:
    _, interface = make_counter(**variant)
    with pytest.raises(UnsupportedError, match=fact):
        write(tmp_path, change(interface))
    assert not (tmp_path / "genai_config.json").exists()


def test_last_logits_must_have_length_one(tmp_path: Path, make_counter: MakeCounter) -> None:
    _, interface = make_counter()
    with pytest.raises(GraphError, match=r"have shape \('batch', 'sequence', 32\).*constant 1"):
        write(tmp_path, interface.model_copy(update={"logits": "last"}))


def test_only_a_cache_read_by_attention_alone_is_shared(make_counter: MakeCounter) -> None:
    model, interface = make_counter()
    assert not shares_cache(model, interface)
    for node in model.graph:
        if node.op_type == "Concat":
            node.op_type, node.domain = "GroupQueryAttention", "com.microsoft"
    assert shares_cache(model, interface)
    past = next(v for v in model.graph.inputs if v.name == interface.cache[1].past_value)
    model.graph.append(ir.Node("", "Shape", [past], num_outputs=1))
    assert not shares_cache(model, interface)
    assert not shares_cache(model, interface.model_copy(update={"cache": ()}))
