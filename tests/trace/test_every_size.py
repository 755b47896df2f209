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


class Blocks(torch.nn.Module):
    """Counts tokens in blocks of 16, of which the example has one."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        rows, total = attention_mask.shape
        count = (total + 15) // 16
        place = torch.arange(count * 16)[None] + input_ids[:, :1] * 0
        seen = (place < total).long().reshape(rows, count, 16)
        return seen.sum(dim=2).amax(dim=1)


def test_a_size_that_is_one_in_the_example_may_be_larger() -> None:
    batch, sequence, total = (torch.export.Dim(name) for name in ("batch", "sequence", "total"))
    example = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
    program = export_all_sizes(Blocks(), example, ({0: batch, 1: sequence}, {0: batch, 1: total}))
    ids, mask = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 40, dtype=torch.long)
    assert program.module(check_guards=False)(ids, mask).tolist() == [16, 16, 16]
