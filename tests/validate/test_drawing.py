"""What a plan looks at, over many seeds: every kind of place, within its budget, the same for one seed."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from llmc.artifact.manifest import FileDigest
from llmc.graph.interface import CacheSlot, Interface, TensorSpec
from llmc.validate.costs import Costs
from llmc.validate.positions import Plan, seed_of

from .levels import plan_of

TEXT = np.arange(3, 200)
#: A tiny model, one of 135 M parameters and one of 8 B.
TINY = Costs(parameters=20_000, scores=2, width=16, cache_bytes=128)
SMALL = Costs(parameters=135_000_000, scores=270, width=64, cache_bytes=46_080)
LARGE = Costs(parameters=8_000_000_000, scores=1024, width=128, cache_bytes=131_072)


def interface(
    limit: int, vocabulary: int = 256, window: int | None = None, dtype: str = "float32"
) -> Interface:
    names = {"past_key": "k", "past_value": "v", "present_key": "pk", "present_value": "pv"}
    slot = CacheSlot(layer=0, kv_heads=1, key_width=16, value_width=16, window=window, **names)
    specs = [TensorSpec(name=n, dtype=dtype, shape=("batch", 1, "past", 16)) for n in ("k", "v")]
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch", 1, vocabulary))
    return Interface(
        inputs=tuple(specs),
        outputs=(logits,),
        cache=(slot,),
        logits="last",
        position_ids=False,
        padding="right",
        max_length=limit,
    )


def looked_at(plan: Plan) -> set[tuple[int, int, int]]:
    """(total tokens, new tokens, tokens before them) of every run with one row that is compared."""
    runs = {(n, n, 0) for n in plan.prompts}
    ends = np.cumsum((plan.first, *plan.pieces)).tolist()
    runs |= {(b, b - a, a) for a, b in pairwise(ends)}
    runs |= {(at + size, size, at) for at, size in plan.turns}
    runs |= {(at + 1, 1, at) for at in plan.steps}
    return runs


@pytest.mark.parametrize("costs", [TINY, SMALL], ids=["tiny", "small"])
def test_every_kind_of_place_is_looked_at_by_every_seed(costs: Costs) -> None:
    for seed in range(20):
        plan = plan_of(interface(8192, 49152), TEXT, seed=seed, costs=costs)
        runs = looked_at(plan)
        assert max(total for total, *_ in runs) == len(plan.tokens) == 8192
        assert {size for _, size in plan.turns} >= {2, 4, 8, 16}
        assert set(range(8184, 8192)) <= set(plan.steps)
        for start in range(0, 8192, 410):  # any 5 % of the context
            assert any(start <= total < start + 410 for total, new, _ in runs if new == 1)
            assert sum(start <= total < start + 820 for total, *_ in runs) > 2
        assert {total % 16 for total, new, _ in runs if new == 1} == set(range(16))
        assert any(past > 70 and new > 1 for _, new, past in runs)
        assert any(max(batch.prompts) > 170 for batch in plan.batches)


def test_a_small_model_is_verified_at_every_position() -> None:
    plan = plan_of(interface(4096), TEXT, costs=TINY)
    assert plan.steps == tuple(range(1, 4096))
    ids = {i for b in plan.batches for row, n in zip(b.tokens, b.prompts, strict=True) for i in row[:n]}
    assert ids == set(range(256))
    assert sum(1 for n in plan.prompts if n > 1800) > 20


def test_a_token_without_a_position_is_not_drawn() -> None:
    plan = plan_of(interface(4096), TEXT, costs=TINY, padding=7)
    ids = {i for b in plan.batches for row in b.tokens for i in row}
    assert ids == set(range(256)) - {7}


def test_one_seed_gives_one_plan_and_another_another() -> None:
    first, again, other = (plan_of(interface(4096), TEXT, seed=seed, costs=SMALL) for seed in (1, 1, 2))
    assert (first.prompts, first.steps, first.turns) == (again.prompts, again.steps, again.turns)
    assert first.steps != other.steps
    files = {"a": FileDigest(sha256="1" * 64, bytes=1), "b": FileDigest(sha256="2" * 64, bytes=1)}
    assert seed_of(files) == seed_of(dict(reversed(files.items()))) != seed_of({"a": files["b"]})


def test_a_larger_budget_reaches_further() -> None:
    reached = [
        len(plan_of(interface(131072), TEXT, costs=LARGE, budget=b).tokens) for b in (80.0, 4000.0, 40000.0)
    ]
    assert reached[0] == 640
    assert reached == sorted(set(reached))


@pytest.mark.parametrize("costs", [TINY, LARGE], ids=["tiny", "large"])
def test_both_sides_of_a_window_and_of_a_switch_wherever_they_lie(costs: Costs) -> None:
    plan = plan_of(interface(8192, window=4096), TEXT, costs=costs, window=4096, switches=(3000,))
    assert {4094, 4095, 4096, 4097} < set(plan.windows[4096])
    assert {3000, 3001} <= set(plan.prompts)
    assert {2999, 3000, 3001} <= set(plan.steps)
    assert [sum(q.pieces) for q in plan.passes()] == [len(plan.tokens)] * 2


def test_what_the_budget_does_not_reach_is_told() -> None:
    plan = plan_of(interface(131072), TEXT, costs=LARGE, lengths=(8192,))
    assert plan.unreached == (8192,)


def test_a_graph_with_all_logits_is_given_no_more_than_memory_holds() -> None:
    every = interface(1 << 15, 262_144).model_copy(update={"logits": "all"})
    assert len(plan_of(every, TEXT).tokens) == 1024


def test_only_a_narrow_cache_is_looked_at_for_what_it_loses() -> None:
    assert plan_of(interface(4096), TEXT).cache_steps == 0
    assert plan_of(interface(4096, dtype="int8"), TEXT).cache_steps == 128


def test_attention_in_plain_operators_is_verified_at_fewer_long_rows() -> None:
    def longest(costs: Costs) -> int:
        return max(max(batch.prompts) for batch in plan_of(interface(8192), TEXT, costs=costs).batches)

    plain = replace(TINY, scores=12, plain=12)
    assert longest(replace(plain, plain=0)) > 4 * longest(plain)
    assert plain.original(8192) > 20 * replace(plain, plain=0).original(8192)
