"""The inputs of experts, observed while the model's own code runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from llmc.calibration.expert_products import stacked_parameters, visiting_experts
from llmc.config import WeightFormat
from llmc.errors import CheckpointError
from llmc.quantize.expert_inputs import ExpertInput, ExpertInputs, describe_tokens, read_expert_ranges
from tests.models import build_tiny_model

IDS = torch.arange(3, 51)[None]
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


@contextmanager
def _routed(module: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """What an experts module is given: hidden states, and the experts chosen for each."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    yield seen
    handle.remove()


def _sorted(rows: torch.Tensor) -> torch.Tensor:
    """The same rows in an order of their own: code that runs expert by expert has another."""
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("code", ["eager", "grouped_mm"])
def test_an_expert_reads_the_tokens_that_are_sent_to_it(model_type: str, code: str) -> None:
    model = build_tiny_model(model_type)
    model.set_experts_implementation(code)
    path = next(n.rpartition(".")[0] for n, _ in model.named_parameters() if n.endswith(f"{UP}"))
    module = model.get_submodule(path)
    rows: dict[tuple[str, int], torch.Tensor] = {}

    def visit(name: str, expert: int, given: torch.Tensor) -> None:
        rows[name, expert] = given.clone()

    with torch.inference_mode(), _routed(module) as seen:
        expected = model(input_ids=IDS, use_cache=False).logits
        with visiting_experts(stacked_parameters(path, module), visit):
            found = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(found, expected)
    states, chosen = seen[0]
    for expert in range(4):
        own = states[(chosen == expert).any(-1)]
        if len(own):
            assert torch.equal(_sorted(rows[f"{path}.gate_up_proj", expert]), _sorted(own))
            assert rows[f"{path}.down_proj", expert].shape[0] == len(own)


def test_rows_of_zeros_are_tokens_of_other_experts() -> None:
    """Llama 4 multiplies all tokens by all experts at once, those of other experts as zeros."""
    stack = {"w": torch.randn(2, 3, 4)}
    rows = torch.randn(2, 5, 3)
    rows[1, 2:] = 0
    counts: dict[int, int] = {}

    def double(_: str, expert: int, given: torch.Tensor) -> torch.Tensor:
        counts[expert] = len(given)
        return 2 * given

    with visiting_experts(stack, double):
        found = torch.bmm(rows, stack["w"])
    assert counts == {0: 5, 1: 2}
    assert torch.allclose(found, 2 * torch.einsum("enk,ekm->enm", rows, stack["w"]))


def test_all_experts_have_the_range_of_their_layer() -> None:
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.randn(3, 8, 16), requires_grad=False)
    inputs = ExpertInputs([ExpertInput("layer.w", WeightFormat.NVFP4)])
    rows = torch.randn(6, 16)
    with inputs.watch("layer", module):
        torch.nn.functional.linear(rows, module.w[0])
        torch.nn.functional.linear(3 * rows, module.w[2])
    ranges = read_expert_ranges(inputs.conclude())
    found = ranges["layer.w"]
    assert found.peak == pytest.approx(float(3 * rows.abs().max()))
    assert list(found.tokens) == [6, 0, 6]
    assert 15 < found.snr_db < 30
    assert "1 of 3 matrices are of experts that no token" in next(describe_tokens(ranges))


def test_inputs_that_are_not_finite_are_refused() -> None:
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.ones(1, 4, 16), requires_grad=False)
    inputs = ExpertInputs([ExpertInput("layer.w", WeightFormat.FP8)])
    with inputs.watch("layer", module):
        torch.nn.functional.linear(torch.full((2, 16), np.nan), module.w[0])
        torch.nn.functional.linear(torch.ones(2, 16), module.w[0])
    with pytest.raises(CheckpointError, match=r"inputs of layer\.w"):
        inputs.conclude()
