"""What a pass says about its run: where it applied, and where it declined and why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """One place where a pass nearly applied.

    Args:
        code: Stable identifier of the reason, such as `value-width`; targets may accept it.
        reason: The fact with its values.
        node: Name of the node.
        layer: Decoder layer of the node; None outside of the layers.
    """

    code: str
    reason: str
    node: str
    layer: int | None


@dataclass(frozen=True)
class PassReport:
    """The result of one pass over one graph.

    Args:
        name: The pass.
        applied: The layer of every application, None outside of the layers.
        refusals: Near misses.
    """

    name: str
    applied: tuple[int | None, ...]
    refusals: tuple[Refusal, ...] = ()

    def in_layer(self, layer: int, accept: tuple[str, ...] = ()) -> int:
        """Applications in `layer`, with refusals of the accepted codes counted in."""
        declined = sum(r.layer == layer and r.code in accept for r in self.refusals)
        return self.applied.count(layer) + declined
