"""Mask rules by probing: what transformers asks for, and what no attribute of attention can say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils as masks

from llmc.errors import UnsupportedError
from llmc.trace.mask import MaskRule, Visible, classify_mask

COUNT = 200
Rule = Callable[..., Any]


def fake(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A tensor without values, as tracing has it."""
    with FakeTensorMode():
        return torch.zeros(shape, dtype=dtype)


def causal_and(other: Rule) -> Rule:
    return masks.and_masks(masks.causal_mask_function, other)


@pytest.mark.parametrize(
    ("rule", "visible"),
    [
        (masks.causal_mask_function, Visible()),
        (masks.sliding_window_causal_mask_function(7), Visible(window=7)),
        (masks.sliding_window_causal_mask_function(1), Visible(window=1)),
        (masks.chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.int64)), Visible(chunk=8)),
        (masks.chunked_causal_mask_function(9, fake(2)), Visible(chunk=9)),
        (causal_and(lambda b, h, q, k: q - k < 30), Visible(window=30)),
        (causal_and(lambda b, h, q, k: q // 32 == k // 32), Visible(chunk=32)),
    ],
)
def test_causal_masks_windows_and_chunks_are_found(rule: Rule, visible: Visible) -> None:
    assert classify_mask(rule, COUNT) == visible


@pytest.mark.parametrize(
    "rule",
    [
        masks.or_masks(masks.causal_mask_function, lambda b, h, q, k: k < 5),  # a prefix in both directions
        lambda b, h, q, k: q // 8 == k // 8,  # blocks in both directions
        lambda b, h, q, k: q >= k - 1,  # one token ahead
        causal_and(lambda b, h, q, k: (q - k) % 4 == 0),  # strided
        causal_and(lambda b, h, q, k: (q - k < 6) | (k < 2)),  # a window, and the first tokens
        causal_and(lambda b, h, q, k: q // 8 - k // 8 < 2),  # two chunks
        causal_and(lambda b, h, q, k: (q // 8 == k // 8) & (q - k < 4)),  # a window inside of chunks
        causal_and(lambda b, h, q, k: q != k),  # no token sees itself
        masks.chunked_causal_mask_function(8, torch.tensor([3])),  # chunks that begin elsewhere
    ],
)
def test_other_masks_are_not(rule: Rule) -> None:
    assert classify_mask(rule, COUNT) is None


def test_rows_that_do_not_begin_where_a_tensor_says_are_not_chunks() -> None:
    lengths = fake(2)
    rule = causal_and(lambda b, h, q, k: (k + lengths[b]) // 8 == (q + lengths[b]) // 8)
    assert classify_mask(rule, COUNT) is None


def test_a_window_need_not_be_stated() -> None:
    rule = MaskRule(causal_and(lambda b, h, q, k: q - k < 5000), 0)
    assert rule.visible() == Visible(window=5000)


def test_a_rule_that_reads_a_tensor_by_position_is_refused_by_name() -> None:
    blocks = fake(2, 40)
    rule = MaskRule(masks.blockwise_overlay(blocks), 0)
    with pytest.raises(UnsupportedError, match=r"blockwise_overlay.* depends on more than positions"):
        rule.visible()


def test_what_is_none_of_them_is_refused_by_name() -> None:
    rule = MaskRule(masks.bidirectional_mask_function, 0)
    with pytest.raises(UnsupportedError, match="bidirectional_mask_function is neither causal nor a sliding"):
        rule.visible()
