"""Leave out tensors in the files that the config's model does not use, with a note, or refuse them.

`KINDS` lists everything that may be left out. A tensor of no such kind is refused, because the model without
it may be a different model: biases, half of the layers, the scales of quantized weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.arrays import Array
from llmc.errors import CheckpointError, count_names
from llmc.graph.weights import TensorInfo, WeightStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Leftover:
    """A tensor that the model does not use.

    Args:
        name: The tensor's name in the files.
        target: The name that transformers' renamings give it.
        files: Every tensor in the files.
        model: The model of the config, without weights.
    """

    name: str
    target: str
    files: WeightStore
    model: PreTrainedModel

    @property
    def info(self) -> TensorInfo:
        """The shape and type of the tensor."""
        return self.files.infos()[self.name]

    def read(self) -> Array:
        """Read the values of the tensor."""
        return self.files.read(self.name)

    @cached_property
    def beyond(self) -> tuple[str, int, int] | None:
        """The list of modules that is too short for this tensor's module: (name, its length, this index)."""
        return _list_that_ends(self.target, self.model)


@dataclass(frozen=True)
class Kind:
    """A kind of tensor that the model does not need.

    Args:
        what: Description of the kind and the reason why it is not needed, for the note to the user.
        pattern: Regular expression that is searched in the tensor's name.
        holds: Further condition on the tensor.
    """

    what: str
    pattern: str
    holds: Callable[[Leftover], bool] = lambda _: True

    def has(self, tensor: Leftover) -> bool:
        """Return whether `tensor` is of this kind."""
        return re.search(self.pattern, tensor.name) is not None and self.holds(tensor)


def _is_mask(tensor: Leftover) -> bool:
    """Return whether a tensor is a mask, (1, 1, n, n), or a scalar for masked scores; a bias is a vector."""
    shape = tensor.info.shape
    return not shape or (len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3])


def _is_zero_vector(tensor: Leftover) -> bool:
    return len(tensor.info.shape) == 1 and not np.any(tensor.read())


def _predicts_further(tensor: Leftover) -> bool:
    """Return whether the tensor belongs to a module that predicts more than the next token.

    Such a module has its own name, or is a layer after the config's last one. A layer counts only if it has
    the norm of its embedding input, which no other decoder layer has.
    """
    if any(re.search(r"(^|\.)(mtp|mtp_\w+|nextn)\.", name) for name in (tensor.name, tensor.target)):
        return True
    if tensor.beyond is None:
        return False
    layer, separator, _ = tensor.name.partition(f".{tensor.beyond[2]}.")
    stored = tensor.files.infos()
    return any(f"{layer}{separator}{own}" in stored for own in ("enorm.weight", "eh_proj.weight"))


def _is_ignored_by_transformers(tensor: Leftover) -> bool:
    """Return whether the model's class lists the tensor; layers and biases need their own kind."""
    ignored = tensor.model._keys_to_ignore_on_load_unexpected or ()
    certain = tensor.beyond is None and not tensor.name.endswith(".bias")
    return certain and any(re.search(p, n) for p in ignored for n in (tensor.name, tensor.target))


#: What may be left out. The note names the first kind that matches a tensor.
KINDS: tuple[Kind, ...] = (
    Kind("layers for multi-token prediction, which only speculative decoding uses", "", _predicts_further),
    Kind(
        "stored rotary tables, which the config determines",
        r"(^|\.)(rotary_\w*emb\.((original_)?inv_freq|(cos|sin)_cached)|attn_rot_embd(\.weight)?)$",
    ),
    Kind(
        "causal masks, which the model computes itself",
        r"(^|\.)\w*(attn|attention)\.(masked_)?bias$|(^|\.)causal_mask$",
        _is_mask,
    ),
    Kind("position indices, which the model computes itself", r"(^|\.)position_ids$"),
    Kind("version numbers of modules", r"(^|\.)(encoder|decoder)\.version$"),
    Kind("biases that are zero", r"\.bias$", _is_zero_vector),
    Kind(
        "scales of quantized activations; the artifact uses only the weights",
        r"\.(input|output|act|activation)(_global)?_(scale|scale_ub|zero_point|amax)$",
    ),
    Kind(
        "scales of a quantized KV cache; the artifact uses only the weights",
        r"\.(k|v|q|kv|prob|k_cache|v_cache|kv_cache)_(scale|zero_point|scaling_factor)$",
    ),
    Kind(
        "encoders of images or sound; the artifact contains only the language model",
        r"^(model\.)?(vision_tower|vision_model|visual|vision_encoder|vision_embed_tokens|multi_modal_projector"
        r"|audio_tower|audio_model|embed_vision|embed_audio|talker|token2wav|code2wav)\.",
    ),
    Kind(
        "tensors that the model's class in transformers leaves out as well", "", _is_ignored_by_transformers
    ),
)


def explain_leftovers(
    unused: Mapping[str, str], files: WeightStore, model: PreTrainedModel, kinds: Sequence[Kind] = KINDS
) -> tuple[str, ...]:
    """Explain each kind of tensor that is left out in one sentence.

    Args:
        unused: Names in the files that no parameter uses -> the name after transformers' renamings.
        files: Every tensor in the files.
        model: The model of the config, without weights.
        kinds: What may be left out.

    Raises:
        CheckpointError: A tensor is of none of these kinds.
    """
    names_by_kind: dict[str, list[str]] = {}
    refused: list[Leftover] = []
    for name, target in unused.items():
        tensor = Leftover(name, target, files, model)
        kind = next((kind for kind in kinds if kind.has(tensor)), None)
        if kind is None:
            refused.append(tensor)
        else:
            names_by_kind.setdefault(kind.what, []).append(name)
    if refused:
        raise _refusal(refused)
    return tuple(f"Not used: {count_names(names)} ({what})." for what, names in names_by_kind.items())


def _refusal(tensors: Sequence[Leftover]) -> CheckpointError:
    """Build the error for tensors that may not be left out, with the most likely cause."""
    names = [tensor.name for tensor in tensors]
    listed = count_names(names)
    for explain in (_too_many_modules, _adapter, _quantized, _biases):
        error = explain(tensors, listed)
        if error is not None:
            return error
    return CheckpointError(
        f"{type(tensors[0].model).__name__} has no parameter for {listed} in the files",
        hint="config and weights must belong to the same model",
    )


def _too_many_modules(tensors: Sequence[Leftover], listed: str) -> CheckpointError | None:
    beyond = [tensor.beyond for tensor in tensors if tensor.beyond is not None]
    if not beyond:
        return None
    layers, length, _ = beyond[0]
    most = 1 + max(index for name, _, index in beyond if name == layers)
    decoder = layers.rpartition(".")[2] in {"layers", "h", "blocks", "block", "layer"}
    what = "decoder layers" if decoder and layers.count(".") <= 2 else f"modules {layers}.N"
    return CheckpointError(
        f"the files have {most} {what}, but config.json says {length}; {listed} would be left out",
        hint="take the config.json that belongs to these weights",
    )


def _adapter(tensors: Sequence[Leftover], listed: str) -> CheckpointError | None:
    if not any(re.search(r"\.lora_|\.(adapter|ia3|oft|vera|hada)_|modules_to_save", t.name) for t in tensors):
        return None
    return CheckpointError(
        f"the files hold an adapter beside the model: {listed}",
        hint="merge it first with peft's merge_and_unload(), or remove its tensors from the files",
    )


def _quantized(tensors: Sequence[Leftover], listed: str) -> CheckpointError | None:
    part = r"\.(\w*scales?(_inv|_2)?|qzeros|qweight|g_idx|SCB|absmax|quant_map|\w*zero_point|weight_packed)$"
    if not any(re.search(part, tensor.name) for tensor in tensors):
        return None
    return CheckpointError(
        f"the files hold parts of quantized weights that config.json does not describe: {listed}",
        hint="add the quantization_config to config.json, or compile the original checkpoint in float",
    )


def _biases(tensors: Sequence[Leftover], listed: str) -> CheckpointError | None:
    if not all(tensor.name.endswith(".bias") for tensor in tensors):
        return None
    stated = tensors[0].model.config.get_text_config(decoder=True).to_dict()
    switches = sorted(key for key, value in stated.items() if "bias" in key and value is False)
    return CheckpointError(
        f"the files hold biases that the model of config.json does not have: {listed}",
        hint=f"set {' or '.join(switches)} to true in config.json"
        if switches
        else "config and weights must belong to the same model",
    )


def _list_that_ends(target: str, model: PreTrainedModel) -> tuple[str, int, int] | None:
    for match in re.finditer(r"\.(\d+)(?=\.)", target):
        name, index = target[: match.start()], int(match[1])
        try:
            modules: Any = model.get_submodule(name)
        except AttributeError:
            return None
        children = [int(child) for child, _ in modules.named_children() if child.isdigit()]
        if children and index > max(children):
            return name, len(children), index
    return None
