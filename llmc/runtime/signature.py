"""Hold the inputs and outputs of an onnxruntime session against those of the interface."""

from typing import Any

from llmc.errors import ParityError
from llmc.graph.interface import Interface, TensorSpec

_STEP_INPUTS = ("input_ids", "attention_mask", "position_ids")


def require_fed(interface: Interface, past: set[str]) -> None:
    """Require that a session can feed every input of the interface, and that no input or output is missing.

    Args:
        past: Inputs of the KV cache and of states.

    Raises:
        ParityError: An input is not fed, or an input or output is missing.
    """
    fed = past | set(_STEP_INPUTS[: 3 if interface.position_ids else 2])
    names = {spec.name for spec in interface.inputs}
    if names != fed:
        raise ParityError(
            f"the interface has inputs {sorted(names - fed)} that nothing feeds"
            f" and lacks {sorted(fed - names)}"
        )
    present = {n for slot in interface.cache for n in (slot.present_key, slot.present_value)}
    present |= {state.present for state in interface.states}
    missing = (present | {"logits"}) - {spec.name for spec in interface.outputs}
    if missing:
        raise ParityError(f"the interface lacks the outputs {sorted(missing)}")


def compare_signature(kind: str, specs: tuple[TensorSpec, ...], arguments: Any) -> None:
    """Require that a session's inputs or outputs match the interface by name, type and static size.

    Args:
        kind: input or output.
        arguments: What `InferenceSession.get_inputs` or `get_outputs` returns.

    Raises:
        ParityError: They differ.
    """
    actual = {arg.name: arg for arg in arguments}
    expected = {spec.name for spec in specs}
    if missing := sorted(expected - set(actual)):
        raise ParityError(f"the graph lacks the {kind} {', '.join(missing)}")
    if extra := sorted(set(actual) - expected):
        raise ParityError(f"the graph has the {kind} {', '.join(extra)}, which the interface does not name")
    for spec in specs:
        arg = actual[spec.name]
        dtype = {"float": "float32", "double": "float64"}.get(arg.type[7:-1], arg.type[7:-1])
        if dtype != spec.dtype:
            raise ParityError(f"{kind} {spec.name} is {dtype}, but the interface says {spec.dtype}")
        if len(arg.shape) != len(spec.shape):
            raise ParityError(
                f"{kind} {spec.name} has shape {arg.shape}, but the interface says {spec.shape}"
            )
        for size, stated in zip(arg.shape, spec.shape, strict=True):
            if isinstance(size, int) and isinstance(stated, int) and size != stated:
                raise ParityError(
                    f"{kind} {spec.name} has shape {arg.shape}, but the interface says {list(spec.shape)}"
                )


def require_shape(name: str, shape: list[int], expected: tuple[int, ...]) -> None:
    """Require the shape of an output.

    Raises:
        ParityError: It differs.
    """
    if tuple(shape) != expected:
        raise ParityError(f"output {name} has shape {list(shape)}, but it must be {list(expected)}")
