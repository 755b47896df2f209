"""Derive tiny configurations from the default ones of transformers, with every kind of layer that they have.

The default model of a type is built on the meta device, without memory. Its layers are compared by their
classes and switches, and the shortest prefix that has every kind is kept; where that is long, one layer of
each kind in its order. Sizes are made small by their names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llmc.architecture import auto_class, building, language_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

#: Fewest layers, so that a layer stands between others, and most layers of a prefix.
FEWEST, MOST = 3, 8
#: Most combinations of counts that are tried.
MOST_TRIES = 100
#: Fields that state which layers there are; whoever states one has no need of the default config's.
LAYOUT = frozenset(
    {"layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "attn_layer_indices"}
)
#: Names under which configurations state the number of layers of the language model.
DEPTHS = frozenset({
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "depth", "decoder_layers",
    "num_decoder_layers",
})  # fmt: skip

_COUNTS = re.compile(r"layer|dense|period|offset|interval|step|freq")
_POSITION = re.compile(r"(^|_)(idx|index|id|number)$|layer_(idx|index|id|number)")

Kind = frozenset[tuple[object, ...]]


def causal_types() -> tuple[str, ...]:
    """Return every type that transformers lists as causal LM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def language_model_types() -> tuple[str, ...]:
    """Return every type that transformers lists as causal LM or as image-text-to-text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return tuple(sorted({*causal_types(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}))


def default_config(model_type: str) -> PreTrainedConfig | None:
    """Return the default config of a type, as a decoder; None if it does not describe a model."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    try:
        config = kind(**({"is_decoder": True} if "is_decoder" in stated_values(kind()) else {}))
        build_on_meta(config)
    except Exception:  # noqa: BLE001 - transformers raises any type of error
        return None
    return config


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of `config` without memory for its parameters."""
    import torch
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights(), building():
        model: PreTrainedModel = auto_class(config).from_config(config)
    return model


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the elements of the longest list of modules in the language model."""
    within = [part for part in (language_model(model), model) if _lists_in(part)]
    lists = _lists_in(within[0]) if within else []
    return max(lists, key=lambda layers: (_has_index(layers), len(layers)), default=[])


def _lists_in(part: torch.nn.Module) -> list[list[torch.nn.Module]]:
    import torch

    return [list(module) for module in part.modules() if isinstance(module, torch.nn.ModuleList)]


def _has_index(layers: list[torch.nn.Module]) -> bool:
    """Whether the layers know their index, as those do that keep a cache; those of a tower do not."""
    return any(hasattr(module, "layer_idx") for layer in layers for module in layer.modules())


def kinds_of_layers(model: PreTrainedModel) -> list[Kind]:
    """Return for each layer what distinguishes it from others, whatever its sizes are.

    That is the class of every module, its switches (truth values, words, whether a number is given, zero or
    positive) and its parts of the configuration's lists.
    """
    layers = layers_of(model)
    fields = vars(model.config.get_text_config(decoder=True))
    kinds = []
    for index, layer in enumerate(layers):
        stated = {k: v[index] for k, v in fields.items() if _is_per_layer(v, len(layers)) and _is_choice(v)}
        kind = {("config", *switch) for switch in _switches(stated)}
        for name, module in layer.named_modules():
            path = re.sub(r"\d+", "*", name)
            kind.add((path, type(module).__name__))
            kind |= {(path, *switch) for switch in _switches(vars(module))}
            kind |= {(path, key, value is None) for key, value in module._parameters.items()}
        kinds.append(frozenset(kind))
    return kinds


def lacking(full: PreTrainedModel, tiny: PreTrainedModel) -> list[str]:
    """Return the module classes of the language model, and the kinds of its layers, that `tiny` lacks."""
    classes = [
        {type(part).__name__ for part in language_model(model).modules() if part is not model}
        for model in (full, tiny)
    ]
    wanted, present = kinds_of_layers(full), set(kinds_of_layers(tiny))
    absent = [kind for kind in dict.fromkeys(wanted) if kind not in present]
    nearest = [min((sorted(kind - other, key=str) for other in present), key=len) for kind in absent]
    return [*sorted(classes[0] - classes[1]), *(" ".join(map(str, near[0])) for near in nearest if near)]


def _switches(values: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    for key, value in values.items():
        if key == "training" or _POSITION.search(key):
            continue
        if value is None or isinstance(value, (bool, str)):
            yield (key, value)
        elif isinstance(value, int):
            yield (key, value > 0)


def _is_per_layer(value: Any, layers: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == layers > 1


def _is_choice(values: list[Any]) -> bool:
    """Whether a list has a word, a truth value, 0 or 1 for each layer, rather than sizes or indices."""
    return all(value is None or isinstance(value, str) or value in (0, 1) for value in values)


def choose_layers(kinds: list[Kind]) -> list[int]:
    """Return the layers to keep: a prefix with every kind, or if that is long, the first of each kind."""
    first: dict[Kind, int] = {}
    for index, kind in enumerate(kinds):
        first.setdefault(kind, index)
    length = max(first.values(), default=0) + 1
    if length <= MOST:
        return list(range(min(max(length, FEWEST), len(kinds))))
    chosen = sorted(first.values())
    rest = (index for index in range(len(kinds)) if index not in first.values())
    return sorted([*chosen, *itertools.islice(rest, max(FEWEST - len(chosen), 0))])


def cut(full: PreTrainedConfig, depth: int, chosen: list[int]) -> Iterator[dict[str, Any]]:
    """Yield fields that reduce the `depth` layers of `full` to those chosen, the most likely ones first.

    Lists with an entry for each layer are reduced alike. A count of the first or of the last layers, such as
    `num_kv_shared_layers`, is replaced by their number among those chosen; which counts are of this kind is
    tried.
    """
    part, text = _text_part(full)
    stated = vars(text)
    counts = {
        name: list(
            dict.fromkeys((value, sum(i < value for i in chosen), sum(i >= depth - value for i in chosen)))
        )
        for name, value in stated.items()
        if _COUNTS.search(name) and type(value) is int and 0 < value < depth and name not in DEPTHS
    }
    shallow = {name: len(chosen) for name in DEPTHS if stated.get(name) == depth}
    lists = {k: [v[i] for i in chosen] for k, v in stated.items() if _is_per_layer(v, depth)}
    yield _in_part(part, shallow)
    for values in itertools.product(*counts.values()):
        yield _in_part(part, {**shallow, **lists, **dict(zip(counts, values, strict=True))})


def states_layout(full: PreTrainedConfig, fields: Mapping[str, Any]) -> bool:
    """Whether `fields` state which layers the language model of `full` has, or how many."""
    part, _ = _text_part(full)
    return not fields.get(part, fields if not part else {}).keys().isdisjoint(LAYOUT | DEPTHS)


def stated_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that the class of `config` declares, with their values."""
    declared = {name for base in type(config).__mro__ for name in getattr(base, "__annotations__", {})}
    stored = {name: config.attribute_map.get(name, name) for name in declared}
    return {name: vars(config)[key] for name, key in stored.items() if key in vars(config)}


def parts_of(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """Return the configurations inside of `config` by their names."""
    parts = {name: vars(config).get(name) for name in type(config).sub_configs}
    return {name: part for name, part in parts.items() if part is not None and not isinstance(part, dict)}


def at_depth(full: PreTrainedConfig, layers: int) -> dict[str, Any]:
    """Return the fields that state the number of layers of the language model of `full`."""
    part, text = _text_part(full)
    return _in_part(part, {name: layers for name in DEPTHS if name in vars(text)})


def _text_part(full: PreTrainedConfig) -> tuple[str, PreTrainedConfig]:
    """Return the config of the language model, and its name in `full`; empty if it is `full` itself."""
    text = full.get_text_config(decoder=True)
    return next(((name, part) for name, part in parts_of(full).items() if part is text), ("", full))


def _in_part(part: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {part: fields} if part else fields


def derive_layers(
    kind: type[PreTrainedConfig], small: Mapping[str, Any], features: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields `small` with those that keep every kind of layer of the default config.

    Args:
        small: Sizes, and what the type needs besides.
        features: What of `small` is more than sizes; the default model has it, too.
    """
    try:
        wanted = kinds_of_layers(build_on_meta(kind(**features)))
    except Exception:  # noqa: BLE001 - a default config may lack sizes; transformers raises any type
        wanted = kinds_of_layers(build_on_meta(kind(**small)))
    full = kind(**small)
    missed: list[tuple[int, dict[str, Any]]] = []
    for fields in itertools.islice(cut(full, len(wanted), choose_layers(wanted)), MOST_TRIES):
        candidate = merge(small, fields)
        try:
            present = kinds_of_layers(build_on_meta(kind(**candidate)))
        except Exception as error:  # noqa: BLE001 - the next candidate may fit
            failure = error
            continue
        missed.append((len(set(wanted) - set(present)), candidate))
        if missed[-1][0] == 0:
            break
    if not missed:
        raise failure
    return min(missed, key=lambda pair: pair[0])[1]


def merge(fields: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return `fields` replaced by `more`, mappings merged key by key."""
    both = {
        k: merge(fields[k], more[k]) for k in fields.keys() & more.keys() if _are_parts(fields[k], more[k])
    }
    return {**fields, **more, **both}


def _are_parts(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)
