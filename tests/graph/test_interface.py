"""Names of a KV cache's inputs and outputs."""

from llmc.graph.interface import CacheSlot


def test_pasts_stand_before_presents_and_keys_before_values() -> None:
    slot = CacheSlot(
        layer=0,
        past_key="pk",
        past_value="pv",
        present_key="k",
        present_value="v",
        kv_heads=1,
        key_width=2,
        value_width=2,
        window=None,
    )
    assert slot.pasts == ("pk", "pv")
    assert slot.names == ("pk", "pv", "k", "v")
    assert slot.pairs == (("pk", "k"), ("pv", "v"))
    assert "pairs" not in slot.model_dump()
