"""Lengths at which a model switches, by its configuration."""

import pytest

from llmc.graph.switches import crosses, rope_switches, trained_lengths
from tests.models import longrope, tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("rope", "switches", "trained"),
    [(None, (), ()), (LLAMA3, (), (64,)), (longrope(64), (64,), (64,))],
    ids=["none", "llama3", "longrope"],
)
def test_only_longrope_switches(
    rope: dict[str, object] | None, switches: tuple[int, ...], trained: tuple[int, ...]
) -> None:
    config = tiny_config("llama", rope_parameters=rope)
    assert (rope_switches(config), trained_lengths(config)) == (switches, trained)


def test_layers_of_one_type_may_switch() -> None:
    rope = {"full_attention": longrope(64), "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert rope_switches(tiny_config("gemma3_text", rope_parameters=rope)) == (64,)


@pytest.mark.parametrize(
    ("pieces", "total", "crossed"),
    [((), 80, False), ((60,), 64, False), ((60,), 65, True), ((64,), 65, True), ((65,), 80, False)],
)
def test_steps_cross_a_switch_after_the_first(pieces: tuple[int, ...], total: int, crossed: bool) -> None:
    assert crosses(pieces, total, (64,)) is crossed
