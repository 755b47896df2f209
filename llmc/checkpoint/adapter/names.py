"""Map the names of an adapter's tensors to their role in a module and to the base's tensors they change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from llmc.errors import CheckpointError
from llmc.graph.weights import WeightStore


class Part(StrEnum):
    """The role of an adapter's tensor in its module."""

    A = "lora_A"
    B = "lora_B"
    B_BIAS = "lora_B.bias"
    MAGNITUDE = "lora_magnitude_vector"
    TOKENS = "trainable_tokens_delta"


#: peft's suffixes after the module's name, with or without the adapter's own name, which some trainers keep.
_PARTS = (
    (re.compile(r"\.lora_A(\.\w+)?\.weight$"), Part.A, False),
    (re.compile(r"\.lora_B(\.\w+)?\.weight$"), Part.B, False),
    (re.compile(r"\.lora_B(\.\w+)?\.bias$"), Part.B_BIAS, False),
    (re.compile(r"\.lora_embedding_A(\.\w+)?$"), Part.A, True),
    (re.compile(r"\.lora_embedding_B(\.\w+)?$"), Part.B, True),
    (re.compile(r"\.lora_magnitude_vector(\.\w+){0,2}$"), Part.MAGNITUDE, False),
    (re.compile(r"(\.token_adapter)?\.trainable_tokens_delta(\.\w+)?$"), Part.TOKENS, False),
)
_WRAPPER = "base_model.model."


@dataclass
class Adapted:
    """The tensors of one adapted module, by their names in the adapter's file.

    Args:
        module: Name of the module, without the parts that peft puts before and into it.
        depth: Number of other adapted parameters of the module that are wrapped around this one.
        embedding: Whether the matrices belong to an embedding.
    """

    module: str
    depth: int
    embedding: bool = False
    parts: dict[Part, str] = field(default_factory=dict)


def sort_tensors(names: Iterable[str]) -> tuple[list[Adapted], dict[str, str]]:
    """Return the adapted modules, and the tensors stored whole by their name in the base."""
    modules: dict[tuple[str, int], Adapted] = {}
    whole: dict[str, str] = {}
    for name in sorted(names):
        own = name.removeprefix(_WRAPPER)
        recognized = next(((m, part, emb) for p, part, emb in _PARTS if (m := p.search(own))), None)
        if recognized is None:
            plain = re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", own)
            whole[plain] = name
            continue
        match, part, embedding = recognized
        path = own[: match.start()]
        module, depth = path.replace(".base_layer", ""), path.count(".base_layer")
        adapted = modules.setdefault((module, depth), Adapted(module, depth))
        adapted.embedding |= embedding
        adapted.parts[part] = name
    return list(modules.values()), whole


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base.

    Args:
        name: Name of the tensor.
        in_files: Whether it is a tensor in the files, from which transformers makes its own; otherwise it is
            a parameter of transformers' model.
    """

    name: str
    in_files: bool = False


@dataclass(frozen=True)
class Names:
    """The names of the base's tensors.

    Args:
        own: Names in transformers' model.
        rename: Returns the name in that model for a name from an earlier version of transformers; None if no
            parameter corresponds to it alone.
        files: Tensors as stored in the files.
    """

    own: frozenset[str]
    rename: Callable[[str], str | None]
    files: WeightStore

    def find(self, name: str) -> BaseTensor | None:
        """Return the tensor that an adapter calls `name`; None if the base does not have it."""
        for candidate in (name, self.rename(name)):
            if candidate in self.own:
                return BaseTensor(str(candidate))
        return BaseTensor(name, in_files=True) if name in self.files.infos() else None

    def require(self, name: str, whose: str) -> BaseTensor:
        """Return the tensor that an adapter calls `name`.

        Raises:
            CheckpointError: The base does not have it.
        """
        place = self.find(name)
        if place is None:
            raise CheckpointError(
                f"{whose} changes {name}, which the base does not have",
                hint="an adapter only fits the model that it was trained on",
            )
        return place
