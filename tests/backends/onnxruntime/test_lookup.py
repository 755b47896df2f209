"""Prompt lookup decoding: the text without drafts, token by token, over tiny models of random weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from transformers import GenerationConfig, LlamaConfig

from llmc.artifact.store.folder import open_artifact
from llmc.artifact.text import TextRecord
from llmc.backends.model_file import write_model
from llmc.backends.onnxruntime.genai import write_genai_config
from llmc.backends.onnxruntime.generate import Generated, generate_text, generate_tokens
from llmc.backends.onnxruntime.lookup import piece_length, require_draft, verifying_model
from llmc.config import Provider
from llmc.errors import ConfigError, UnsupportedError
from llmc.graph.interface import Interface
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.runtime.ort_model import OrtModel
from tests.models import EOS, VOCAB_SIZE, save_tiny_model

DRAFT = 7
CONTEXT = 256
#: A pattern that goes on, one that does not, and prompts shorter than what must repeat.
PROMPTS = (
    [5, 9, 17, 33, 5, 9, 17, 33, 5, 9, 17],
    list(range(3, 40)),
    [7],
    [7, 8],
    [7, 7, 7],
)
MakeCounter = Callable[..., tuple[ir.Model, Interface]]


@pytest.fixture(scope="module", params=["gpt2", "falcon"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, where the length of a step moves numbers by less than what is between two tokens here."""
    folder = tmp_path_factory.mktemp("lookup")
    model = save_tiny_model(request.param, folder / "model", tokenizer=True, eos_token_id=EOS)
    plan = plan_build(str(model), target="cpu-fp32", profile="local", output=folder / "out", verify=False)
    return build(plan, SilentProgress()).path


def both(folder: Path, prompt: list[int], count: int) -> tuple[list[int], list[int]]:
    return generate_tokens(folder, prompt, count), generate_tokens(folder, prompt, count, DRAFT)


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: str(len(p)))
def test_the_text_is_that_without_drafts(artifact: Path, prompt: list[int]) -> None:
    plain, drafted = both(artifact, prompt, 120)
    assert len(plain) == 120
    assert drafted == plain


def test_it_ends_where_it_would_without(artifact: Path) -> None:
    for count in (1, 2, 3, 6, 11):
        plain, drafted = both(artifact, PROMPTS[0], count)
        assert drafted == plain


def test_the_context_ends_it(artifact: Path) -> None:
    prompt = [5, 9, 17, 33] * ((CONTEXT - 10) // 4)
    plain, drafted = both(artifact, prompt, 50)
    assert len(plain) == CONTEXT - len(prompt)
    assert drafted == plain
    with pytest.raises(ConfigError, match=f"the prompt has {CONTEXT} tokens"):
        generate_tokens(artifact, [5] * CONTEXT, 1, DRAFT)


def test_a_stop_token_ends_it_inside_of_what_was_drafted(artifact: Path, tmp_path: Path) -> None:
    prompt = PROMPTS[0]
    plain = generate_tokens(artifact, prompt, 100)
    copy = shutil.copytree(artifact, tmp_path / "copy")
    config = json.loads((copy / "genai_config.json").read_text())
    ends = sorted({plain.index(token) for token in plain})
    for end in ends[:4]:
        config["model"]["eos_token_id"] = [EOS, plain[end]]
        (copy / "genai_config.json").write_text(json.dumps(config))
        assert generate_tokens(copy, prompt, 100, DRAFT) == plain[:end] == generate_tokens(copy, prompt, 100)


def test_a_stop_token_that_was_drafted(tmp_path: Path, make_counter: MakeCounter) -> None:
    model, interface = make_counter()
    write_model(model, tmp_path)
    generation = GenerationConfig(eos_token_id=16, pad_token_id=1)
    write_genai_config(tmp_path, LlamaConfig(), generation, interface, Provider.CPU, 1, share_cache=False)
    prompt = [
        1,
        2,
        4,
        8,
        16,
        0,
        0,
        5,
        29,
    ]  # its sum is 1 modulo 32, so that all of it but the last comes again
    assert (
        both(tmp_path, prompt, 9) == ([1, 2, 4, 8],) * 2
    )  # 16 stands in the midst of what is drafted after 4


def test_logits_of_all_tokens_serve_as_they_are(tmp_path: Path, make_counter: MakeCounter) -> None:
    model, interface = make_counter()
    write_model(model, tmp_path)
    generation = GenerationConfig(eos_token_id=31, pad_token_id=1)
    write_genai_config(tmp_path, LlamaConfig(), generation, interface, Provider.CPU, 1, share_cache=False)
    assert verifying_model(tmp_path / "model.onnx") is None
    assert both(tmp_path, [1, 2, 3], 30) == ([6, 12, 24, 16, *[0] * 26],) * 2


def test_logits_of_the_last_token_by_another_way_are_refused(
    tmp_path: Path, make_counter: MakeCounter
) -> None:
    model, interface = make_counter(logits="last")
    write_model(model, tmp_path)
    generation = GenerationConfig(eos_token_id=31, pad_token_id=0)
    write_genai_config(tmp_path, LlamaConfig(), generation, interface, Provider.CPU, 1, share_cache=False)
    with pytest.raises(UnsupportedError, match="computes only the logits of the last token") as caught:
        generate_tokens(tmp_path, [1, 2, 3], 4, DRAFT)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("run it without lookup")


def test_what_was_drafted_is_counted(artifact: Path) -> None:
    made: list[Generated] = []
    texts: list[str] = []
    for lookup in (None, DRAFT):
        pieces: list[str] = []
        made.append(
            generate_text(artifact, "the river the river the", 120, pieces.append, TextRecord(), lookup)
        )
        texts.append("".join(pieces))
    plain, drafted = made
    assert texts[0] == texts[1]
    assert plain.tokens == drafted.tokens
    assert (plain.drafted, plain.accepted) == (0, 0)
    assert 0 < drafted.accepted <= drafted.drafted
    assert drafted.steps < plain.steps


def test_the_graph_gives_the_logits_of_the_last_tokens(artifact: Path, tmp_path: Path) -> None:
    data = verifying_model(artifact / "model.onnx")
    assert data is not None
    copy = shutil.copytree(artifact, tmp_path / "copy")
    (copy / "model.onnx").write_bytes(data)
    own = open_artifact(artifact).manifest.interface
    logits = next(spec for spec in own.outputs if spec.name == "logits")
    wide = logits.model_copy(update={"shape": ("batch", "sequence", VOCAB_SIZE)})
    outputs = tuple(wide if spec.name == "logits" else spec for spec in own.outputs)
    every = own.model_copy(update={"outputs": outputs, "logits": "all"})
    ids = np.random.default_rng(0).integers(3, VOCAB_SIZE, (1, 40))
    found = OrtModel(copy, every, threads=1, share_buffer=False).prefill(ids, steps=0)
    alone = OrtModel(artifact, own, threads=1, share_buffer=False)
    expected = [alone.prefill(ids[:, :1], steps=40), *(alone.decode(ids[:, i : i + 1]) for i in range(1, 40))]
    np.testing.assert_array_equal(found[:, :8], 0)
    np.testing.assert_allclose(found[:, 8:], np.concatenate(expected, axis=1)[:, 8:], atol=1e-4)


@pytest.mark.parametrize(
    ("draft", "compiled", "message", "hint"),
    [
        (0, False, "0 tokens are to be drafted in a step", "request 1 or more"),
        (-3, True, "-3 tokens are to be drafted in a step", "request 1 or more"),
        (17, False, "17 tokens .*; onnxruntime-genai verifies at most 16", "request 1 to 16"),
        (
            8,
            True,
            "8 tokens .*; compiled kernels give a token the same results as alone",
            "request 1 to 7",
        ),
    ],
)
def test_drafts_have_a_length(draft: int, compiled: bool, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        require_draft(draft, compiled=compiled)
    assert caught.value.hint == hint


def test_no_piece_of_a_prompt_is_as_short_as_a_step() -> None:
    for tokens in range(1, 3000):
        piece = piece_length(tokens)
        assert 256 <= piece < 512
        assert tokens <= 8 or tokens % piece == 0 or tokens % piece > 8


def test_the_runtime_reads_it_from_the_artifact(tmp_path: Path, make_counter: MakeCounter) -> None:
    import onnxruntime_genai as og

    model, interface = make_counter()
    write_model(model, tmp_path)
    generation = GenerationConfig(eos_token_id=31, pad_token_id=1)
    call = (tmp_path, LlamaConfig(), generation, interface, Provider.CPU, 1)
    write_genai_config(*call, share_cache=False, lookup=5)
    assert json.loads((tmp_path / "genai_config.json").read_text())["speculative"] == {
        "max_draft_tokens": 5,
        "ngram_chained_lookup": True,
        "ngram_size": 4,
    }
    served = og.Model(str(tmp_path))
    params = og.GeneratorParams(served)
    params.set_search_options(max_length=30, do_sample=False)
    generator = og.Generator(served, params)
    generator.append_tokens(np.array([1, 2, 3], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == [1, 2, 3, 6, 12, 24, 16, *[0] * 23]
    assert generator.get_speculative_stats()["draft_tokens_accepted"] > 5
    with pytest.raises(ConfigError, match="17 tokens are to be drafted"):
        write_genai_config(*call, share_cache=False, lookup=17)


def test_onnxruntime_takes_the_graph(artifact: Path) -> None:
    data = verifying_model(artifact / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(artifact.resolve())
    )
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    assert next(o for o in session.get_outputs() if o.name == "logits").shape[1:] == ["sequence", VOCAB_SIZE]
