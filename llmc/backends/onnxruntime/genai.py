"""Write genai_config.json, by which onnxruntime-genai serves an artifact.

The keys are those that onnxruntime-genai 0.18 parses (its src/config.h); it refuses unknown ones.
The behaviour of the runtime, as observed with 0.18.0:
- `model.type` must be on its list; "decoder" accepts any decoder-only graph, without the special cases for
  some architectures. Two special cases are needed for models that have them: "phimoe" and "phi3small"
  recompute the KV cache of a single sequence when its length passes 4,096 or 8,192, and "lfm2" feeds states
  of convolutions without recurrences (`llmc.graph.serving`).
- A batch of unequal prompts is padded on the right. `attention_mask` is 0 there and gets a 1 for each
  new token; `position_ids`, fed only if the graph has them, count from 0 in each row, are 0 at padding,
  and continue from the row's own length.
- If the graph's padding is not on the right, only a batch of one or of equal prompts is served correctly;
  the interface says so, and tracing notes it.
- Only logits of the last position are read if their second dimension is the constant 1.
- KV heads and head size of each layer are read from the shapes of the graph's past keys; past values
  must have the same shape.
- A section `speculative` turns n-gram decoding on, which refuses batches and graphs with logits of only the
  last position.
- `num_hidden_layers` bounds the numbers of layers; a layer without a tensor of some kind is left out of that
  kind. States of fixed size start with zeros, and are each step's outputs and the next one's inputs.
- Every end-of-sequence id must be inside of the vocabulary, and there must be at least one.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llmc.artifact.manifest import MODEL
from llmc.backends.onnxruntime.lookup import require_draft, require_rewinding, speculative_options
from llmc.backends.special_tokens import special_tokens
from llmc.config import Provider
from llmc.errors import GraphError, UnsupportedError
from llmc.graph.domains import COMPILED
from llmc.graph.interface import CACHE_SLOTS, Interface, TensorSpec
from llmc.graph.serving import layer_types, runtime_type
from llmc.runtime.libraries import CUDA_ENTRIES

GENAI_CONFIG = "genai_config.json"

_INPUTS = ("input_ids", "attention_mask", "position_ids")
#: Context length of a model without a bound on positions, since the runtime needs one.
_UNBOUNDED_CONTEXT = 1 << 20
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


def shares_cache(model: ir.Model, interface: Interface) -> bool:
    """Return whether past and present of all layers may share one buffer of the maximum length.

    They may if only `GroupQueryAttention` and compiled kernels read a past: these read the valid length from
    `seqlens_k`, whereas a concatenation would use the shape. `CACHE_SLOTS` is meant to be its length.
    """
    past = {name for slot in interface.cache for name in slot.pasts}
    readers = [node for value in model.graph.inputs if value.name in past for node in value.consumers()]
    return bool(readers) and all(
        node.op_type == "GroupQueryAttention"
        or node.domain == COMPILED
        or node.outputs[0].name == CACHE_SLOTS
        for node in readers
    )


def write_genai_config(
    folder: Path,
    config: Any,
    generation_config: Any,
    interface: Interface,
    provider: Provider,
    threads: int | None,
    *,
    share_cache: bool,
    cuda_graph: bool = False,
    library: str | None = None,
    lookup: int | None = None,
) -> None:
    """Write genai_config.json for the model.onnx and the tokenizer files in `folder`.

    Args:
        config: transformers `PreTrainedConfig` of the model.
        generation_config: transformers `GenerationConfig`; None if the checkpoint has none. Its
            sampling settings become the defaults for serving the artifact.
        threads: Intra-op threads; None for the runtime's default.
        share_cache: Result of `shares_cache`.
        cuda_graph: Whether steps of one token are captured as a CUDA graph.
        library: File in `folder` with custom operators that the graph uses.
        lookup: Number of tokens to draft in a step by prompt lookup; None for no lookup.

    Raises:
        ConfigError: So many tokens cannot be drafted in a step.
        UnsupportedError: onnxruntime-genai cannot serve the graph: it has no cache, inputs or states that the
            runtime does not feed, values of another width than keys or names without a pattern; or there is
            no end-of-sequence token.
    """
    if not interface.served_tensors:
        raise UnsupportedError("onnxruntime-genai serves only graphs with a cache, but this one has none")
    logits = _logits(interface)
    vocab = logits.shape[-1]
    if not isinstance(vocab, int):
        raise GraphError(f"the vocabulary's size must be known; logits have shape {logits.shape}")
    options: dict[str, object] = {"log_id": "llmc", "provider_options": []}
    if provider is Provider.CUDA:
        options |= CUDA_ENTRIES
        options["provider_options"] = [{"cuda": {"enable_cuda_graph": str(int(cuda_graph))}}]
    if threads is not None:
        options["intra_op_num_threads"] = threads
    if library is not None:
        options["custom_ops_library"] = library
    context = interface.max_length or _UNBOUNDED_CONTEXT
    model = serving_tokens(folder, config, generation_config, vocab) | {
        "type": runtime_type(interface),
        "vocab_size": vocab,
        "context_length": context,
        "decoder": {
            "session_options": options,
            "filename": MODEL,
            "num_hidden_layers": interface.last_layer + 1,
            "inputs": _inputs(interface),
            "outputs": _outputs(interface, logits),
            **_heads(interface),
            **({} if (types := layer_types(interface)) is None else {"layer_types": types}),
        },
    }
    search = _search(generation_config, vocab) | {
        "max_length": context,
        "past_present_share_buffer": share_cache,
    }
    sections: dict[str, object] = {"model": model, "search": search}
    if lookup is not None:
        require_draft(lookup, compiled=library is not None)
        require_rewinding(interface)
        sections["speculative"] = speculative_options(lookup)
    text = json.dumps(sections, indent=2, sort_keys=True) + "\n"
    (folder / GENAI_CONFIG).write_text(text, encoding="utf-8")


def _heads(interface: Interface) -> dict[str, int]:
    """Return the sizes of the first KV cache; a graph with none leaves them to the runtime."""
    slot = next(iter(interface.cache), None)
    return {} if slot is None else {"head_size": slot.key_width, "num_key_value_heads": slot.kv_heads}


def serving_tokens(
    folder: Path, config: Any, generation_config: Any, vocab: int
) -> dict[str, list[int] | int]:
    """Return `special_tokens`, with an end of the sequence, which the runtime needs.

    Raises:
        UnsupportedError: No file names a token that ends a text.
    """
    tokens = special_tokens(folder, config, generation_config, vocab)
    if "eos_token_id" not in tokens:
        raise UnsupportedError(
            "onnxruntime-genai needs an end-of-sequence token, but neither generation_config.json nor "
            f"config.json nor the tokenizer has one inside of the vocabulary of {vocab}",
            hint="set eos_token_id in the checkpoint's generation_config.json",
        )
    return tokens


def _search(generation_config: Any, vocab: int) -> dict[str, object]:
    if generation_config is None:
        return {"do_sample": False}
    stated = {name: getattr(generation_config, name) for name in _SAMPLING}
    search: dict[str, object] = {name: value for name, value in stated.items() if value is not None}
    search["do_sample"] = bool(generation_config.do_sample)
    search["top_k"] = min(stated["top_k"] if stated["top_k"] is not None else 50, vocab)
    return search


def _inputs(interface: Interface) -> dict[str, str]:
    names = {spec.name for spec in interface.inputs}
    cache = {past for tensors in interface.served_tensors.values() for _, past, _ in tensors}
    others = sorted(names - cache - set(_INPUTS))
    if others:
        raise UnsupportedError(
            f"onnxruntime-genai does not feed input {', '.join(others)}",
            hint="it feeds input_ids, attention_mask, position_ids, the KV cache and states of fixed size",
        )
    for slot in interface.cache:
        if slot.key_width != slot.value_width:
            raise UnsupportedError(
                f"onnxruntime-genai allocates values as wide as keys, but "
                f"layer {slot.layer} has keys of {slot.key_width} and values of {slot.value_width}"
            )
    return {name: name for name in _INPUTS if name in names} | {
        f"past_{kind}_names": _pattern([(layer, past) for layer, past, _ in tensors])
        for kind, tensors in interface.served_tensors.items()
    }


def _outputs(interface: Interface, logits: TensorSpec) -> dict[str, str]:
    if interface.logits == "last" and logits.shape[1] != 1:
        raise GraphError(
            f"logits of the last position have shape {logits.shape}, "
            "but onnxruntime-genai needs the constant 1 as the second dimension"
        )
    return {"logits": logits.name} | {
        f"present_{kind}_names": _pattern([(layer, present) for layer, _, present in tensors])
        for kind, tensors in interface.served_tensors.items()
    }


def _logits(interface: Interface) -> TensorSpec:
    cache = {present for tensors in interface.served_tensors.values() for _, _, present in tensors}
    others = [spec for spec in interface.outputs if spec.name not in cache]
    if len(others) != 1 or len(others[0].shape) != 3:
        raise UnsupportedError(
            "onnxruntime-genai reads logits (batch, sequence, vocabulary) and the KV cache, but the graph "
            f"has outputs {', '.join(f'{o.name} {o.shape}' for o in others) or 'only of the cache'}"
        )
    return others[0]


def _pattern(names: Sequence[tuple[int, str]]) -> str:
    """Return the name of all layers with %d in place of the layer's number."""
    layer, name = names[0]
    for match in re.finditer(rf"(?<!\d){layer}(?!\d)", name):
        before, after = name[: match.start()], name[match.end() :]
        if all(other == f"{before}{index}{after}" for index, other in names):
            return f"{before}%d{after}"
    raise UnsupportedError(
        f"onnxruntime-genai needs cache names that differ only in the layer number, but these are "
        f"{', '.join(n for _, n in names)}"
    )
