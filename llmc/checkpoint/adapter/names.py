"""Names of an adapter's tensors: what of a module each is, and which tensor of the base it changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from llmc.errors import CheckpointError
from llmc.graph.weights import WeightStore


class Part(StrEnum):
    """What a tensor of an adapter is to its module."""

    A = "lora_A"
    B = "lora_B"
    B_BIAS = "lora_B.bias"
    MAGNITUDE = "lora_magnitude_vector"
    TOKENS = "trainable_tokens_delta"


#: peft's names after the module's: with the adapter's own name, where a trainer has kept it, or without.
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
    """The tensors of one adapted module, by the name that each has in the adapter's file.

    Args:
        module: Name of the module, without what peft puts before and into it.
        depth: How many other adapted parameters of the module lie around this one.
        embedding: The matrices are those of an embedding.
    """

    module: str
    depth: int
    embedding: bool = False
    parts: dict[Part, str] = field(default_factory=dict)


def sort_tensors(names: Iterable[str]) -> tuple[list[Adapted], dict[str, str]]:
    """The adapted modules, and the tensors that are stored whole by the name that they have in the base."""
    modules: dict[tuple[str, int], Adapted] = {}
    whole: dict[str, str] = {}
    for name in sorted(names):
        own = name.removeprefix(_WRAPPER)
        found = next(((m, part, emb) for p, part, emb in _PARTS if (m := p.search(own))), None)
        if found is None:
            plain = re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", own)
            whole[plain] = name
            continue
        match, part, embedding = found
        path = own[: match.start()]
        module, depth = path.replace(".base_layer", ""), path.count(".base_layer")
        adapted = modules.setdefault((module, depth), Adapted(module, depth))
        adapted.embedding |= embedding
        adapted.parts[part] = name
    return list(modules.values()), whole


@dataclass(frozen=True)
class Place:
    """A tensor of the base.

    Args:
        name: Its name.
        in_files: It is one of the files' tensors, of which transformers makes its own; else it is a
            parameter of transformers' model.
    """

    name: str
    in_files: bool = False


@dataclass(frozen=True)
class Names:
    """The names under which the base has its tensors.

    Args:
        own: Of transformers' model.
        rename: The name in that model of a name that an earlier version of transformers used; None if no
            parameter stands for that one alone.
        files: Tensors as the files have them.
    """

    own: frozenset[str]
    rename: Callable[[str], str | None]
    files: WeightStore

    def find(self, name: str) -> Place | None:
        """The tensor that an adapter calls `name`; None if the base has none."""
        for candidate in (name, self.rename(name)):
            if candidate in self.own:
                return Place(str(candidate))
        return Place(name, in_files=True) if name in self.files.infos() else None

    def require(self, name: str, whose: str) -> Place:
        """The tensor that an adapter calls `name`.

        Raises:
            CheckpointError: The base has none.
        """
        place = self.find(name)
        if place is None:
            raise CheckpointError(
                f"{whose} changes {name}, which the base does not have",
                hint="an adapter fits the model that it was trained on",
            )
        return place
