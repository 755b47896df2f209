"""Compare genai_config.json with the original: end of text, special tokens, sizes, sampling."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.artifact.manifest import MODEL
from llmc.artifact.verdict import Measurement
from llmc.config import Metric
from llmc.graph.interface import Interface
from llmc.graph.serving import layer_types, runtime_type
from llmc.validate.measure import mismatches

_FILE = "genai_config.json"
_SAMPLING = ("temperature", "top_p", "repetition_penalty")


@dataclass(frozen=True)
class Original:
    """The original's settings for serving.

    Args:
        stop: Tokens that end a text.
        bos: Token at the beginning; None if there is none.
        sampling: Defaults of its generation config, by transformers' names.
    """

    stop: tuple[int, ...]
    bos: int | None
    sampling: dict[str, Any]


def describe_original(config: Any, generation_config: Any, tokenizer: Any) -> Original:
    """Read the original's special tokens and sampling defaults.

    The generation config decides, as in transformers' `generate`. Where nobody wrote one, the
    model's config does, and the tokenizer's end of text counts as well: a chat model's config often
    names only the end of a document.

    Args:
        generation_config: transformers `GenerationConfig`, made from the config if there is no file.
    """
    inner = config.get_text_config(decoder=True)
    vocabulary = inner.vocab_size
    stop = _first_ids((generation_config, config, inner), "eos_token_id")
    unstated = generation_config._from_model_config or not any(0 <= t < vocabulary for t in stop)
    if unstated and tokenizer.eos_token_id is not None:
        stop = (*stop, tokenizer.eos_token_id)
    bos = _first_ids((generation_config, config, inner), "bos_token_id")
    stated = {name: getattr(generation_config, name, None) for name in _SAMPLING}
    sampling = {name: value for name, value in stated.items() if value is not None}
    return Original(
        stop=tuple(dict.fromkeys(t for t in stop if 0 <= t < vocabulary)),
        bos=bos[0] if bos and 0 <= bos[0] < vocabulary else None,
        sampling=sampling | {"do_sample": bool(generation_config.do_sample)},
    )


def compare_settings(
    folder: Path, original: Original, interface: Interface, derived: Sequence[str] = ()
) -> Measurement:
    """Measure SERVING: the number of settings of genai_config.json that contradict the original or the graph.

    derived: Differences from what a build derives, a sentence each.
        derived: What is not what a build derives, a sentence each.
    """
    path = folder / _FILE
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        model, search = stated["model"], stated["search"]
        decoder = model["decoder"]
        differences = [*_differences(model, search, decoder, original, interface), *derived]
    except (OSError, ValueError, KeyError, TypeError) as error:
        differences = [f"{_FILE} cannot be read: {type(error).__name__}: {error}", *derived]
    fine = f"{_FILE}: end tokens {list(original.stop)}, special tokens, sizes, names and sampling"
    return mismatches(Metric.SERVING, differences, fine, "json, from the files")


def _differences(
    model: Any, search: Any, decoder: Any, original: Original, interface: Interface
) -> list[str]:
    differences: list[str] = []

    def expect(name: str, actual: object, expected: object) -> None:
        if actual != expected:
            differences.append(f"{name} is {actual}, it must be {expected}")

    eos = model["eos_token_id"]
    stop = set(eos) if isinstance(eos, list) else {eos}
    if original.stop or not stop:
        expect("model.eos_token_id", sorted(stop), sorted(original.stop))
    expect("model.bos_token_id", model.get("bos_token_id"), original.bos)
    logits = next(spec for spec in interface.outputs if spec.name == "logits")
    expect("model.vocab_size", model["vocab_size"], logits.shape[-1])
    if not 0 <= model["pad_token_id"] < model["vocab_size"]:
        differences.append(f"model.pad_token_id is {model['pad_token_id']}, outside of the vocabulary")
    expect("model.type", model["type"], runtime_type(interface))
    if interface.max_length is not None:
        expect("model.context_length", model["context_length"], interface.max_length)
    if search["max_length"] > model["context_length"]:
        differences.append(f"search.max_length is {search['max_length']}, beyond the context")
    expect("decoder.filename", decoder["filename"], MODEL)
    expect("decoder.num_hidden_layers", decoder["num_hidden_layers"], interface.last_layer + 1)
    expect("decoder.layer_types", decoder.get("layer_types"), layer_types(interface))
    for slot in interface.cache[:1]:
        expect("decoder.num_key_value_heads", decoder["num_key_value_heads"], slot.kv_heads)
        expect("decoder.head_size", decoder["head_size"], slot.key_width)
    for kind, tensors in interface.served_tensors.items():
        for part, when, names in (
            ("inputs", "past", [past for _, past, _ in tensors]),
            ("outputs", "present", [present for _, _, present in tensors]),
        ):
            pattern = f"{when}_{kind}_names"
            derived = [decoder[part][pattern].replace("%d", str(layer)) for layer, *_ in tensors]
            expect(f"decoder.{part}.{pattern}", derived, names)
    plain = {"input_ids", "attention_mask", "position_ids"} & {s.name for s in interface.inputs}
    expect("decoder.inputs", sorted(plain), sorted(plain & set(decoder["inputs"].values())))
    expect("decoder.outputs.logits", decoder["outputs"]["logits"], "logits")
    for name, value in original.sampling.items():
        expect(f"search.{name}", search.get(name), value)
    return differences


def _first_ids(sources: Sequence[Any], attribute: str) -> tuple[int, ...]:
    for source in sources:
        stated = getattr(source, attribute, None)
        if stated is not None:
            return tuple(stated) if isinstance(stated, list) else (stated,)
    return ()
