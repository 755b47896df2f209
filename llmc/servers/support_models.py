"""Say which models a server refuses in any format, by what its code asserts of their configuration."""

from typing import Any

from llmc.servers.support_terms import Evidence, Runtime, Status, Treatment

#: Types whose class in vLLM is a Qwen2Model, which has one window for all layers.
_ONE_WINDOW = frozenset({"qwen2", "qwen3", "mimo"})
_QWEN2 = "vllm/model_executor/models/qwen2.py"


def of_model(runtime: Runtime, config: Any) -> Treatment | None:
    """Return why a runtime refuses a model, in vLLM 0.32; None if nothing is known.

    Args:
        config: transformers configuration of the language model.
    """
    if runtime is not Runtime.VLLM or config.model_type not in _ONE_WINDOW:
        return None
    layers = set(getattr(config, "layer_types", None) or ())
    first, count = getattr(config, "max_window_layers", None), config.num_hidden_layers
    if len(layers) < 2 or first == count:
        return None
    subject = f"a {config.model_type} with a sliding window in some of its layers"
    reason = f"its code asserts that max_window_layers, {first}, is the number of layers, {count}"
    return Treatment(runtime, subject, Status.REFUSED, reason, f"{Evidence.SOURCE.value}: {_QWEN2}")
