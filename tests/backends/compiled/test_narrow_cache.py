"""The type of a KV cache that kernels do not read."""

import pytest

from llmc.backends.compiled.cache import narrow_cache
from llmc.config import CacheType
from llmc.errors import KernelError
from tests.passes.harness import latent_attention, run_pass


def test_latents_stay_in_float32() -> None:
    graph = latent_attention()
    run_pass("latent-attention", graph)
    slots = graph.cache
    narrow_cache(graph, CacheType.FLOAT16, frozenset(), {})
    assert graph.cache == slots
    assert {s.dtype for s in graph.interface().inputs if s.name.startswith("past")} == {"float32"}
    assert graph.notes[-1].startswith("the KV cache stays in float32, not float16")


def test_other_layers_are_refused() -> None:
    with pytest.raises(KernelError, match=r"a KV cache in int8 needs compiled attention .* 3 of 3 stay"):
        narrow_cache(latent_attention(), CacheType.INT8, frozenset(), {})
