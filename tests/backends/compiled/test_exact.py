"""Faults planted in the kernels of a tiny decoder, and which figure of the gate finds each of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.artifact.store.folder import open_artifact
from llmc.artifact.verdict import Measurement
from llmc.backends.compiled import lower
from llmc.checkpoint import open_checkpoint
from llmc.config import Family, Metric
from llmc.pipeline import build
from llmc.pipeline.steps.compile import lower_graph
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.runtime.arithmetic import Arithmetic
from llmc.runtime.ort_model import OrtModel
from llmc.validate.gates import evaluate
from llmc.validate.measure import max_abs, measured
from llmc.validate.paired import Paired, chooses_experts
from llmc.validate.reference import TorchModel
from llmc.validate.served_attention import measure_cache
from llmc.validate.stored import read_stored
from llmc.validate.weights import parameters
from tests.backends.compiled.graphs import Array
from tests.models import EOS, VOCAB_SIZE, save_tiny_model
from tests.pipeline.sabotage import Edit, copy_artifact
from tests.validate.levels import plan_of

LENGTHS = (1, 2, 5, 7, 8, 9, 17, 40, 65, 66, 70, 129)
M = Metric

_SWITCH = """#include <cstdint>
#include <cstdlib>
#include <cstring>
namespace llmc {
inline bool fault(const char* name) {
  const char* planted = std::getenv("LLMC_TEST_FAULT");
  return planted != nullptr && std::strcmp(planted, name) == 0;
}
template <class Op>
float half(const Op& op, int64_t group) {
  return fault("output") && op.n == VOCABULARY && group == 3 ? 0.5f : 1.0f;
}
}  // namespace llmc
"""
#: By header: what is replaced in it. Each fault is there while the environment variable has its name.
FAULTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "program.h": (("#pragma once\n", "#pragma once\n" + _SWITCH.replace("VOCABULARY", str(VOCAB_SIZE))),),
    "rows.h": (("sum(second) / W + op.x", 'sum(second) / W + (fault("epsilon") ? 100 : 1) * op.x'),),
    "attention.h": (
        ("* all(op.x))", '* all(fault("head") && h == 1 ? 1.1f * op.x : op.x))'),
        ("stop > op.window ? stop - op.window", 'stop > op.window ? stop - op.window + fault("window")'),
        (" : 0, stop};", ' : fault("eight") && run.sequence == 8, stop};'),
    ),
    "attention_prefill.h": (
        (
            "inverse(row.peak, key_bits)",
            '(inverse(row.peak, key_bits) * (fault("key") && t + i == 63 ? 0.5f : 1))',
        ),
        ("int t = 0; t < (length + 1) / 2; t++", 'int t = fault("pair"); t < (length + 1) / 2; t++'),
    ),
    "cache.h": (("uint16_t*>(row) + i)", 'uint16_t*>(row) + i) * all(fault("rows") ? 1.02f : 1)'),),
    "matmul.h": (
        ("for (; row < stop; row++) many<2, 1>", 'for (; row < stop && !fault("tail"); row++) many<2, 1>'),
        (
            "for (int j = 0; j < registers; j += 2)",
            'for (int j = fault("inputs") ? 2 : 0; j < registers; j += 2)',
        ),
        ("F scale = scales(group, b);\n", "F scale = scales(group, b) * all(half(op, g));\n"),
    ),
}


@dataclass(frozen=True)
class Case:
    """An artifact with the switches of all faults in its kernels, and its original with the same weights."""

    folder: Path
    reference: TorchModel


def plant(sources: Mapping[str, str]) -> dict[str, str]:
    planted = dict(sources)
    for name, changes in FAULTS.items():
        for before, after in changes:
            assert planted[name].count(before) == 1, before
            planted[name] = planted[name].replace(before, after)
    return planted


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("exact")
    model = str(save_tiny_model("mistral", folder / "model", tokenizer=True, eos_token_id=EOS))
    compile_library = lower.compile_library
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "compile_library", lambda c, s, *rest: compile_library(c, plant(s), *rest))
        plan = plan_build(
            model, target="cpu-int4-compiled", profile="local", output=folder / "artifact", verify=False
        )
        build(plan, SilentProgress())
    return Case(folder / "artifact", original(model, folder / "artifact"))


def original(model: str, folder: Path) -> TorchModel:
    """The original with the weights of an artifact."""
    checkpoint = open_checkpoint(model)
    sources = lower_graph(checkpoint, open_artifact(folder).manifest.target, SilentProgress()).sources
    reference = TorchModel(checkpoint.fill_reference())
    for name, matrix in read_stored(folder, sources).items():
        reference.set_parameters(dict(parameters(sources[name], matrix.whole())))
    return reference


def open_as(folder: Path, arithmetic: Arithmetic) -> OrtModel:
    interface = open_artifact(folder).manifest.interface
    return OrtModel(folder, interface, threads=1, share_buffer=True, arithmetic=arithmetic)


def measure(folder: Path, reference: TorchModel) -> dict[Metric, Measurement]:
    """Prompts of several lengths and a step after each; and attention as it is served."""
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, sum(LENGTHS) + len(LENGTHS))
    exact, served, products = (
        open_as(folder, arithmetic)
        for arithmetic in (Arithmetic.EXACT, Arithmetic.SERVED, Arithmetic.PRODUCTS)
    )
    plan = plan_of(products.interface, tokens, compiled=True)
    pair, worst = Paired(exact, served, chooses_experts(folder)), 0.0
    for length in LENGTHS:
        text, tokens = tokens[: length + 1], tokens[length + 1 :]
        found = [pair.prefill(text[None, :length], steps=1)[0, -1], pair.decode(text[None, length:])[0, -1]]
        worst = max(worst, max_abs(np.stack(found), reference.logits(text, keep=2), "prompt"))
    level = measured(M.PREFILL_MAX_ABS, worst, "prompts", "here")
    return {m.metric: m for m in (level, *pair.measure(), *measure_cache(products, reference, plan))}


def missed(case: Case, folder: Path | None = None) -> set[Metric]:
    found = measure(folder or case.folder, case.reference)
    gates = [g for g in open_artifact(case.folder).manifest.target.gates if g.metric in found]
    assert len(gates) == 1 + len(Family.ROUNDING.metrics) - 1 + 2  # rounding.kl_mean has no bound of its own
    return {check.metric for check in evaluate(gates, list(found.values())).missed}


def test_a_right_program_passes(case: Case) -> None:
    assert missed(case) == set()


@pytest.mark.parametrize(
    ("fault", "metric"),
    [
        ("epsilon", M.PREFILL_MAX_ABS),
        ("head", M.PREFILL_MAX_ABS),
        ("window", M.PREFILL_MAX_ABS),
        ("eight", M.PREFILL_MAX_ABS),
        ("key", M.CACHE_KL_MEAN),
        ("rows", M.CACHE_KL_MEAN),
        ("pair", M.ROUNDING_KL_RATIO),
        ("tail", M.ROUNDING_POSITION_RATIO),
        ("inputs", M.ROUNDING_NOISE_RATIO),
        ("output", M.ROUNDING_TOKEN_RATIO),
    ],
)
def test_a_fault_of_the_kernels_is_found(
    fault: str, metric: Metric, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMC_TEST_FAULT", fault)
    assert metric in missed(case)


def test_a_rope_base_ten_percent_off_is_found(case: Case, tmp_path: Path) -> None:
    folder = copy_artifact(case.folder, tmp_path / "off")
    with Edit(folder) as edit:
        for name in [t.name for t in edit.graph.initializer if t.name.startswith("rotary_")]:
            edit.replace(name, turned(np.cos if "_cos_" in name else np.sin, edit.array(name)))
    assert M.PREFILL_MAX_ABS in missed(case, folder)


def turned(function: Any, table: Array) -> Array:
    """A rotary table (positions, half) with 11,000 as its base instead of 10,000."""
    half = table.shape[1]
    angles = np.outer(np.arange(len(table)), 11_000.0 ** -(np.arange(half) / half))
    return function(angles).astype(np.float32)
