"""Assign each tensor of an adapter to a tensor of the base, and check that the two fit."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from llmc.artifact.manifest import AdapterRecord
from llmc.checkpoint.adapter.config import ALL_LINEAR
from llmc.checkpoint.adapter.folder import Adapter
from llmc.checkpoint.adapter.low_rank import (
    ExpertLowRankRows,
    LowRankRows,
    MagnitudeRows,
    SumRows,
    TokenRows,
)
from llmc.checkpoint.adapter.merge import Change, Merge
from llmc.checkpoint.adapter.names import Adapted, BaseTensor, Names, Part, sort_tensors
from llmc.checkpoint.conversion import model_mapping, rename_to_model
from llmc.errors import CheckpointError, UnsupportedError
from llmc.graph.weights import WeightStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan_merge(adapter: Adapter, ref: str, model: PreTrainedModel, files: WeightStore) -> Merge:
    """Assign each tensor of an adapter to a tensor of the base, and check that they fit.

    Args:
        ref: The base, as the user wrote it.
        model: The base's model, without weights.
        files: The base's tensors as stored in the files, dequantized.

    Raises:
        CheckpointError: The adapter does not belong to this base, or is incomplete.
        UnsupportedError: It changes a module in an unsupported way.
    """
    planner = _Planner(adapter, model, files)
    modules, whole = sort_tensors(adapter.tensors.infos())
    for name, stored in whole.items():
        planner.replace(name, stored)
    for module in modules:
        planner.adapt(module)
    planner.require_all()
    record = AdapterRecord(
        ref=adapter.ref,
        digest=adapter.digest,
        base=adapter.config.base,
        ranks=tuple(sorted({rank for rank, _ in planner.sizes})),
        alphas=tuple(sorted({alpha for _, alpha in planner.sizes})),
        rslora=adapter.config.rslora,
        dora=adapter.config.dora,
        merged=dict(sorted(Counter(name.rpartition(".")[2] for name in planner.merged).items())),
        replaced=tuple(sorted(planner.replaced)),
    )
    return Merge(adapter, planner.changes[False], planner.changes[True], record, _notes(adapter, ref))


def _notes(adapter: Adapter, ref: str) -> tuple[str, ...]:
    """Return a note for the user if the adapter names its base differently."""
    name, revision = ref.partition("@")[::2]
    base = adapter.config.base
    if base and base.rstrip("/").rpartition("/")[2].lower() != name.rstrip("/").rpartition("/")[2].lower():
        return (f"The adapter {adapter.ref} names {base} as its base; it is merged into {ref}.",)
    if adapter.config.revision and revision and adapter.config.revision != revision:
        return (f"The adapter was trained on revision {adapter.config.revision} of {name}, not {revision}.",)
    return ()


class _Planner:
    """Collects the changes of one adapter, by whether they apply to a tensor in the files."""

    def __init__(self, adapter: Adapter, model: PreTrainedModel, files: WeightStore) -> None:
        self._adapter, self._model, self._config = adapter, model, adapter.config
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._names = Names(frozenset(self._shapes), rename_to_model(model, model_mapping(model)), files)
        self.changes: dict[bool, dict[str, Change]] = {False: {}, True: {}}
        self.sizes: set[tuple[int, float]] = set()
        self.merged: set[str] = set()
        self.replaced: set[str] = set()

    def replace(self, name: str, stored: str) -> None:
        """Use a whole tensor, such as a bias or one of `modules_to_save`."""
        place = self._names.require(name, self._whose)
        rows = self._adapter.rows(stored)
        self._require(stored, rows.shape, self._shape(place), place.name)
        self.replaced.add(place.name)
        self._add(place, lambda _: rows)

    def adapt(self, module: Adapted) -> None:
        """Add the stored changes of one module."""
        if Part.TOKENS in module.parts:
            self._take_tokens(module)
            return
        if Part.A not in module.parts or Part.B not in module.parts:
            raise CheckpointError(
                f"{self._whose} has only {' and '.join(module.parts)} of {module.module}",
                hint="the file is incomplete: save or download the adapter again",
            )
        place, key, transposed = self._place_of(module)
        shape = self._shape(place)
        self._require_named(key)
        rank, scale = self._config.rank_of(key), self._config.scale_of(key)
        a, b = (self._adapter.rows(module.parts[part]) for part in (Part.A, Part.B))
        self.sizes.add((rank, self._config.alpha_of(key)))
        self.merged.add(key)
        if len(shape) == 3:
            self._add_experts(place, module, shape, rank, scale, transposed=transposed)
            return
        outputs, inputs = reversed(shape) if transposed else shape
        self._require(module.parts[Part.A], a.shape, (rank, inputs), place.name)
        self._require(module.parts[Part.B], b.shape, (outputs, rank), place.name)
        self._add(place, lambda rows: LowRankRows(rows, a, b, scale, transposed))
        if Part.MAGNITUDE in module.parts:
            magnitude = self._adapter.rows(module.parts[Part.MAGNITUDE])
            self._add(place, lambda rows: MagnitudeRows(rows, magnitude, transposed))
        elif self._config.dora:
            raise CheckpointError(f"{self._whose} uses DoRA but has no magnitudes for {module.module}")
        if Part.B_BIAS in module.parts:
            bias = self._adapter.rows(module.parts[Part.B_BIAS])
            place = self._names.require(f"{module.module}.bias", self._whose)
            self._add(place, lambda rows: SumRows(rows, bias, scale))

    def _require_named(self, key: str) -> None:
        """Check that the config names a module that has matrices: peft ignores others."""
        if self._config.targets and not self._config.adapts(key) and not self._names_parameter(key):
            raise CheckpointError(
                f"{self._whose} has matrices for {key}, which its target_modules and layers_to_transform do "
                "not name",
                hint="adapter_config.json and the matrices must come from one run: save the adapter again",
            )

    def require_all(self) -> None:
        """Check that every module that the config names has matrices.

        Raises:
            CheckpointError: A module has none, so the base is a larger model.
        """
        import torch
        from transformers.pytorch_utils import Conv1D

        linear: tuple[type, ...] = (torch.nn.Linear, Conv1D)
        head = self._model.get_output_embeddings()  # type: ignore[no-untyped-call]
        every = self._config.targets == ALL_LINEAR
        kinds = linear if every else (*linear, torch.nn.Embedding)
        for name, module in self._model.named_modules():
            candidate = isinstance(module, kinds) and not (every and module is head)
            if candidate and name not in self.merged and self._config.adapts(name):
                raise CheckpointError(
                    f"{self._whose} has nothing for {name}, which its target_modules name",
                    hint="an adapter only fits the model that it was trained on",
                )

    @property
    def _whose(self) -> str:
        return f"the adapter {self._adapter.path}"

    def _place_of(self, module: Adapted) -> tuple[BaseTensor, str, bool]:
        """Return a module's weight, the name that patterns match, and whether outputs are its columns."""
        place = self._names.find(f"{module.module}.weight")
        if place is None:
            return self._parameter_of(module)
        if place.in_files:
            return place, module.module, False
        own = place.name.removesuffix(".weight")
        kind = type(self._model.get_submodule(own)).__name__
        if module.embedding != ("Embedding" in kind):
            raise UnsupportedError(
                f"{self._whose} has matrices {'of an embedding' if module.embedding else 'of a product'} for "
                f"{own}, which is a {kind}"
            )
        return place, own, module.embedding or kind == "Conv1D"

    def _parameter_of(self, module: Adapted) -> tuple[BaseTensor, str, bool]:
        """Find the parameter of a module without a weight, by the order in which peft wraps several."""
        try:
            owner: Any = self._model.get_submodule(module.module)
        except AttributeError:
            owner = None
        names = [] if owner is None else [n for n, _ in owner.named_parameters(recurse=False)]
        names = [n for n in names if self._names_parameter(f"{module.module}.{n}")]
        if module.depth >= len(names):
            self._names.require(f"{module.module}.weight", self._whose)
        name = f"{module.module}.{names[len(names) - 1 - module.depth]}"
        return BaseTensor(name), name, bool(getattr(owner, "is_transposed", False))

    def _names_parameter(self, name: str) -> bool:
        return any(name == each or name.endswith(f".{each}") for each in self._config.parameters)

    def _add_experts(
        self,
        place: BaseTensor,
        module: Adapted,
        shape: tuple[int, ...],
        rank: int,
        scale: float,
        *,
        transposed: bool,
    ) -> None:
        a, b = (self._adapter.rows(module.parts[part]) for part in (Part.A, Part.B))
        experts, outputs, inputs = shape if not transposed else (shape[0], shape[2], shape[1])
        self._require(module.parts[Part.A], a.shape, (rank * experts, inputs), place.name)
        self._require(module.parts[Part.B], b.shape, (outputs, rank * experts), place.name)
        self._add(place, lambda rows: ExpertLowRankRows(rows, a, b, scale, transposed))

    def _take_tokens(self, module: Adapted) -> None:
        own = module.module.rpartition(".")[2]
        tokens = self._config.tokens
        indices = next((v for k, v in tokens.items() if module.module.endswith(k) or k == own), None)
        place = self._names.require(f"{module.module}.weight", self._whose)
        stored = module.parts[Part.TOKENS]
        rows = self._adapter.rows(stored)
        count, width = self._shape(place)
        if indices is None or max(indices, default=0) >= count:
            raise CheckpointError(
                f"{self._whose} replaces rows {indices} of {place.name}, which has {count}",
                hint="an adapter only fits the model that it was trained on",
            )
        self._require(stored, rows.shape, (len(indices), width), place.name)
        self.replaced.add(f"{place.name} ({len(indices)} rows)")
        self._add(place, lambda before: TokenRows(before, indices, rows))

    def _add(self, place: BaseTensor, change: Change) -> None:
        changes = self.changes[place.in_files]
        earlier = changes.get(place.name)
        changes[place.name] = change if earlier is None else lambda rows: change(earlier(rows))

    def _shape(self, place: BaseTensor) -> tuple[int, ...]:
        return self._names.files.infos()[place.name].shape if place.in_files else self._shapes[place.name]

    def _require(self, stored: str, own: tuple[int, ...], shape: tuple[int, ...], name: str) -> None:
        if own == shape:
            return
        hint = "an adapter only fits the model that it was trained on"
        if len(own) == len(shape) == 2 and own[1:] == shape[1:] and own[0] > shape[0]:
            hint = f"if tokens were added, give the base {own[0]} rows first: resize_token_embeddings"
        raise CheckpointError(
            f"{stored} of {self._whose} has shape {list(own)}, but its config and {name} of the base "
            f"imply {list(shape)}",
            hint=hint,
        )
