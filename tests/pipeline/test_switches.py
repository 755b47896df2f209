"""Artifacts whose rotary embedding switches to other frequencies within their context."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.artifact.store.folder import open_artifact
from llmc.artifact.verdict import CheckStatus
from llmc.backends.onnxruntime.generate import generate_tokens
from llmc.config import Dtype, Metric
from llmc.errors import UnsupportedError
from llmc.evaluation import read_text
from llmc.graph.serial import load_graph
from llmc.passes import registered_passes
from llmc.pipeline import build, verify
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.validate.reference import TorchModel
from tests.caches import own_cache, shared_trace
from tests.models import build_tiny_model, longrope, save_tiny_model
from tests.state_store import StateStore, run_steps

from .sabotage import Edit, copy_artifact, reseal

#: Beyond the lengths that the gates look at for any model, of 256.
SWITCH = 192
LLAMA = {"rope_parameters": longrope(SWITCH), "num_hidden_layers": 2}
NEW = 8
TEXT = "The river bends twice before the mill; a compiler reads a model and writes a program. " * 30


class Notes(SilentProgress):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def make(model: Path, output: Path, target: str, *, verify: bool = False) -> tuple[Path, list[str]]:
    progress = Notes()
    text = (str(model.parent / "text"),) if verify else ()
    plan = plan_build(str(model), target=target, profile="local", output=output, verify=verify)
    plan = plan.model_copy(update={"eval_text": read_text(text)})
    result = build(plan, progress)
    assert result.failure() is None
    return result.path, progress.notes


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", own_cache(root / "cache"))
        (root / "text").write_text(TEXT, encoding="utf-8")
        save_tiny_model("llama", root / "model", tokenizer=True, **LLAMA)
        make(root / "model", root / "cpu-fp32", "cpu-fp32", verify=True)
        make(root / "model", root / "cpu-int8-compiled", "cpu-int8-compiled")
        yield root


def original(folder: Path) -> TorchModel:
    from transformers import AutoModelForCausalLM

    return TorchModel(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"))


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, 250, length).tolist()


@pytest.mark.parametrize("length", [SWITCH - 4, SWITCH, SWITCH + 1])
def test_text_across_the_switch_is_that_of_generate(length: int, llama: Path) -> None:
    made = generate_tokens(llama / "cpu-fp32", prompt(length), NEW)
    assert made == original(llama / "model").generate(np.array(prompt(length)), NEW, (2,)).tolist()


def passed(folder: Path, text: Path) -> set[bool]:
    """Whether prefill and decode keep the target's bounds."""
    checks = verify(folder, None, (str(text),), SilentProgress(), every=True).report.verdict.checks
    levels = (Metric.PREFILL_MAX_ABS, Metric.DECODE_MAX_ABS)
    return {c.status is CheckStatus.PASS for c in checks if c.metric in levels}


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8-compiled"])
def test_short_factors_beyond_the_switch_are_caught(target: str, llama: Path, tmp_path: Path) -> None:
    folder, text = copy_artifact(llama / target, tmp_path / "out"), llama / "text"
    reseal(folder)
    assert target == "cpu-fp32" or passed(folder, text) == {True}  # the other was verified when it was built
    with Edit(folder) as edit:
        for name in [t.name for t in edit.graph.initializer if t.name.startswith("rotary_")]:
            table = edit.array(name)
            table[SWITCH : 2 * SWITCH] = table[:SWITCH]
            edit.replace(name, table)
    reseal(folder)
    assert passed(folder, text) == {False}


def test_kernels_take_the_whole_model(llama: Path) -> None:
    record = open_artifact(llama / "cpu-int8-compiled").manifest.kernels
    assert record is not None
    assert record.regions == 1


@cache
def early() -> tuple[Any, bytes]:
    """A model that switches beyond 8 tokens, and its trace."""
    model = build_tiny_model("llama", rope_parameters=longrope(8), num_hidden_layers=2)
    return model, shared_trace(model.config, Dtype.FLOAT32)


@pytest.mark.parametrize("passes", [(), ("rotary",), ("rotary", "group-query-attention")])
def test_a_batch_switches_with_its_longest_row(passes: tuple[str, ...]) -> None:
    import torch

    model, traced = early()
    graph = load_graph(traced)
    graph.bind(StateStore(model), {})
    for name in passes:
        assert registered_passes()[name].run(graph).refusals == ()
    ids = np.array([prompt(12), prompt(12)[::-1]])
    mask = np.ones_like(ids)
    mask[1, 3:6] = 0  # the prompt has 6 tokens, that of the second row 3
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    made = run_steps(graph, ids, mask, positions, 6)
    past: Any = None
    for start, stop in [(0, 6), *((i, i + 1) for i in range(6, 12))]:
        step, seen, places = (
            torch.from_numpy(a) for a in (ids[:, start:stop], mask[:, :stop], positions[:, start:stop])
        )
        with torch.inference_mode():
            out = model(step, attention_mask=seen, position_ids=places, cache=past)
        past = out.cache
        real = mask[:, start:stop] > 0
        np.testing.assert_allclose(made[:, start:stop][real], out.logits.numpy()[real], atol=1e-4)


@pytest.mark.parametrize(
    ("switch", "context", "kind"), [(64, 64, "decoder"), (4096, 4352, "phimoe"), (256, 256, "decoder")]
)
def test_a_cache_that_generate_computes_anew(switch: int, context: int, kind: str, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "original_max_position_embeddings": switch}
    fields = sizes | {"rope_parameters": longrope(switch), "max_position_embeddings": max(context, 256)}
    model = save_tiny_model("phi3", tmp_path / "model", tokenizer=True, **fields)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    folder, notes = make(model, tmp_path / "out", "cpu-fp32", verify=switch == 64)
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    assert (config["model"]["context_length"], config["model"]["type"]) == (context, kind)
    assert any("the context ends at 64 tokens of 256" in note for note in notes) == (switch == 64)
    if kind == "phimoe":
        tokens = prompt(switch - 2)
        expected = original(model).generate(np.array(tokens), NEW, (2,)).tolist()
        assert generate_tokens(folder, tokens, NEW) == expected


def test_an_engine_ends_before_the_switch(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, **LLAMA)
    plan = plan_build(str(model), target="tensorrt-fp16", profile="h100-sxm", output=tmp_path / "out")
    engine = plan.target.engine
    assert engine is not None
    target = plan.target.model_copy(update={"engine": engine.model_copy(update={"kv_capacity": 256})})
    with pytest.raises(UnsupportedError, match="the context ends at 192 tokens of 256"):
        build(plan.model_copy(update={"target": target}), SilentProgress())
