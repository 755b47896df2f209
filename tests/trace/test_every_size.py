"""Conditions on sizes that torch cannot prove, which hold for every size, and which do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.exc import UserError

from llmc.trace.every_size import export_all_sizes


class Step(torch.nn.Module):
    def __init__(self, condition: Callable[[Any, Any], bool]) -> None:
        super().__init__()
        self.condition = condition

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        sequence, total = input_ids.shape[1], attention_mask.shape[1]
        return input_ids + (1 if self.condition(sequence, total) else 2) + attention_mask.sum()


def export(condition: Callable[[Any, Any], bool]) -> torch.export.ExportedProgram:
    batch, sequence, total = (torch.export.Dim(name) for name in ("batch", "sequence", "total"))
    example = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
    return export_all_sizes(Step(condition), example, ({0: batch, 1: sequence}, {0: batch, 1: total}))


def test_a_condition_that_always_holds_is_no_obstacle() -> None:
    program = export(lambda n, _: n * torch.sym_min(64, 64 * n) == 64 * n)
    assert not program.module(check_guards=False)(*program.example_inputs[0]).eq(10).any()
    ids, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    assert program.module(check_guards=False)(ids, mask).item() == 5


@pytest.mark.parametrize(
    "condition",
    [lambda n, _: n > 2, lambda n, total: total - n > 0, lambda n, total: n * torch.sym_min(2, n) == 2 * n],
    ids=["several tokens", "a past", "several tokens, in a form that torch cannot solve"],
)
def test_a_condition_that_some_size_breaks_is_one(condition: Callable[[Any, Any], bool]) -> None:
    with pytest.raises(UserError, match="Constraints violated"):
        export(condition)
