"""Prune within a build: return a checkpoint without the parts that the target removes.

Each recipe runs the model on calibration text, one layer in memory at a time, and returns a checkpoint with a
smaller config whose tensors are selected as they are read. All later stages compile that checkpoint. The
decisions are stored in the artifact, so that the same weights can be selected again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact.manifest import PruneRecord
from llmc.artifact.store.decisions import read_decisions
from llmc.config import NeuronPruning, Pruning, Target
from llmc.errors import ConfigError, ParityError, UnsupportedError
from llmc.pipeline.steps.calibrate import PreparedModel, prepare, walking
from llmc.pipeline.steps.compile import trace
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.arrays import Array
    from llmc.calibration.walk import LayerTask
    from llmc.checkpoint import Checkpoint
    from llmc.checkpoint.pruned import Selection
    from llmc.prune.tasks import UnitChoice
    from llmc.prune.units import Units

#: Key of the remaining layers among the decisions.
_LAYERS = "layers"
_SHELF = "pruning"


@dataclass(frozen=True)
class Pruned:
    """A checkpoint without the parts that a target removes.

    Args:
        checkpoint: The checkpoint to compile.
        record: What was removed; None if the target removes nothing.
        decisions: Indices that remain, int64: of layers, and of units by the parameter that reads them.
        influence: How much each layer of the original turns the hidden states; empty if not measured.
    """

    checkpoint: Checkpoint
    record: PruneRecord | None = None
    decisions: Mapping[str, Array] = field(default_factory=dict)
    influence: tuple[float, ...] = ()


def prune(
    checkpoint: Checkpoint,
    target: Target,
    progress: Progress,
    decided: Mapping[str, Array] | None = None,
) -> Pruned:
    """Remove from a model what the target states.

    Args:
        decided: `Pruned.decisions` of an earlier run; None to decide anew.

    Raises:
        ConfigError: Nothing or everything would remain, or the calibration text is too short.
        UnsupportedError: The model cannot be run layer by layer, its layers have no distinguishable units, or
            its config cannot describe the rest.
        CheckpointError: Weights or activations are not finite.
        ResourceError: The disk is full.
    """
    if target.prune is None:
        return Pruned(checkpoint)
    spec = target.prune
    with progress.stage("prune"):
        pruned = walking(lambda: _Recipes(target, spec, progress, decided).run(checkpoint), _SHELF)
    if pruned.record is not None:
        progress.note(f"prune: {pruned.record.render()}")
    return pruned


def reopen(checkpoint: Checkpoint, target: Target, folder: Path, progress: Progress) -> Checkpoint:
    """Restore the checkpoint from which the artifact in `folder` was compiled, by its stored decisions.

    Raises:
        ParityError: The decisions cannot be read.
        As `prune`.
    """
    if target.prune is None:
        return checkpoint
    return prune(checkpoint, target, progress, read_decisions(folder)).checkpoint


def count_parameters(checkpoint: Checkpoint) -> int:
    """Count the parameters, tied ones once."""
    return sum(math.prod(info.shape) for info in checkpoint.tensors.infos().values())


class _Recipes:
    """The recipes of a target, in order: layers, heads and neurons, sparsity."""

    def __init__(
        self, target: Target, spec: Pruning, progress: Progress, decided: Mapping[str, Array] | None
    ) -> None:
        self._target = target
        self._spec = spec
        self._progress = progress
        self._decided = decided
        self._decisions: dict[str, Array] = {}
        self._influence: tuple[float, ...] = ()
        self._neurons: tuple[int, int] | None = None
        self._kv_groups: tuple[int, int] | None = None
        self._dropped: tuple[int, ...] = ()
        self._sparse = 0

    def run(self, checkpoint: Checkpoint) -> Pruned:
        """Run all of them; see `prune` for errors."""
        before = int(checkpoint.config.get_text_config(decoder=True).num_hidden_layers)
        current = checkpoint
        if self._spec.layers:
            current = self._drop_layers(current)
        if self._spec.mlp is not None or self._spec.kv_groups:
            current = self._drop_units(current)
        if self._spec.sparsity is not None:
            current = self._sparsify(current)
        record = PruneRecord(
            dropped=self._dropped,
            layers=before,
            neurons=self._neurons,
            kv_groups=self._kv_groups,
            sparse=self._sparse,
            repaired=self._spec.repair if self._sparse or self._neurons or self._kv_groups else None,
            parameters=count_parameters(current),
        )
        return Pruned(current, record, self._decisions, self._influence)

    def _drop_layers(self, checkpoint: Checkpoint) -> Checkpoint:
        import numpy as np
        from safetensors.numpy import load_file

        from llmc.checkpoint.pruned import drop_layers
        from llmc.prune.tasks import INFLUENCE, InfluenceTask

        subject = prepare(checkpoint, self._spec.calibration, "influence", {}, _SHELF)
        count = len(subject.layers)
        if self._spec.layers >= count:
            raise ConfigError(
                f"{self._spec.layers} layers are to be dropped, but the model has {count}",
                hint="copy the target and drop fewer",
            )
        if self._decided is not None:
            indices = _require_indices(self._decided.get(_LAYERS), count - self._spec.layers, count, "layers")
        else:
            files = self._walk(checkpoint, subject, InfluenceTask())
            self._influence = tuple(float(load_file(file)[INFLUENCE][0]) for file in files[:count])
            order = np.argsort(np.array(self._influence), kind="stable")
            indices = np.sort(order[self._spec.layers :])
        remaining = [int(i) for i in indices]
        self._decisions[_LAYERS] = np.array(remaining, np.int64)
        self._dropped = tuple(i for i in range(count) if i not in remaining)
        return drop_layers(checkpoint, subject.layers, remaining)

    def _drop_units(self, checkpoint: Checkpoint) -> Checkpoint:
        """Remove heads and neurons, chosen in one walk: neither changes the inputs of the other."""
        from llmc.checkpoint.pruned import head_entries, narrow, size_entries
        from llmc.prune.tasks import UnitChoice
        from llmc.prune.units import find_units, require_units

        structure = find_units(trace(checkpoint, self._target.dtype, self._progress))
        layers = int(checkpoint.config.get_text_config(decoder=True).num_hidden_layers)
        removals: list[tuple[tuple[Units, ...], int]] = []
        if self._spec.kv_groups:
            require_units(structure.groups, layers, structure, "groups of heads")
            count = structure.groups[0].count
            keep = _kept_groups(count, self._spec.kv_groups)
            self._kv_groups = (count, keep)
            removals.append((structure.groups, keep))
        if self._spec.mlp is not None:
            require_units(structure.neurons, layers, structure, "neurons")
            count = structure.neurons[0].count
            keep = _kept_neurons(count, self._spec.mlp)
            self._neurons = (count, keep)
            removals.append((structure.neurons, keep))
        choices = [UnitChoice(each, keep) for units, keep in removals for each in units]
        subject, files = self._choose(checkpoint, choices)
        narrowed = checkpoint
        for units, keep in removals:
            first = units[0]
            config = checkpoint.config
            if first.heads:
                sizes = ((first.count * first.heads, first.count), (keep * first.heads, keep))
                entries = head_entries(config, *sizes, first.reader.width // first.heads)
            else:
                entries = size_entries(config, first.count, keep)
            selections = self._select(checkpoint, units, files)
            change = f"{subject.folder.name} {first.reader.parameter}"
            narrowed = narrow(narrowed, subject.layers, selections, entries, change)
        return narrowed

    def _choose(
        self, checkpoint: Checkpoint, choices: Sequence[UnitChoice]
    ) -> tuple[PreparedModel, dict[str, Path]]:
        """Choose the units that remain; return them with the file of the walk for each projection.

        If the choice differs from earlier decisions, the earlier decisions are used: another processor adds
        in another order, and units that matter equally little may change places.
        """
        import numpy as np

        walked = self._walk_units(checkpoint, choices)
        if self._decided is not None:
            earlier = [self._earlier(choice) for choice in choices]
            chosen = [self._decisions[choice.units.reader.parameter] for choice in choices]
            if not all(np.array_equal(a, b) for a, b in zip(earlier, chosen, strict=True)):
                fixed = [replace(c, decided=units) for c, units in zip(choices, earlier, strict=True)]
                walked = self._walk_units(checkpoint, fixed)
        return walked

    def _earlier(self, choice: UnitChoice) -> Array:
        """Return the units that remain according to the earlier decisions.

        Raises:
            ParityError: The decisions do not say.
        """
        name = choice.units.reader.parameter
        indices = None if self._decided is None else self._decided.get(name)
        return _require_indices(indices, choice.keep, choice.units.count, f"units of {name}")

    def _walk_units(
        self, checkpoint: Checkpoint, choices: Sequence[UnitChoice]
    ) -> tuple[PreparedModel, dict[str, Path]]:
        from safetensors.numpy import load_file

        from llmc.prune.tasks import KEPT, UnitTask

        facts = {
            "repair": self._spec.repair,
            "units": [
                [
                    c.units.reader.parameter,
                    c.units.count,
                    c.keep,
                    None if c.decided is None else c.decided.tolist(),
                ]
                for c in choices
            ],
        }
        subject = prepare(checkpoint, self._spec.calibration, "units", facts, _SHELF)
        by_layer: dict[str, list[UnitChoice]] = {}
        for choice in choices:
            by_layer.setdefault(subject.layers[choice.units.layer], []).append(choice)
        task = UnitTask(by_layer, _dtypes(checkpoint), repair=self._spec.repair)
        files: dict[str, Path] = {}
        for path in self._walk(checkpoint, subject, task):
            for key, value in load_file(path).items():
                if key.endswith(KEPT):
                    name = key.removesuffix(KEPT)
                    files[name], self._decisions[name] = path, value
        return subject, files

    def _select(
        self, checkpoint: Checkpoint, units: Sequence[Units], files: Mapping[str, Path]
    ) -> dict[str, Selection]:
        """Return the selection from every tensor that contains the units."""
        import numpy as np

        from llmc.checkpoint.pruned import Selection
        from llmc.prune.tasks import WEIGHTS

        infos = checkpoint.tensors.infos()
        stay: dict[tuple[str, int], Array] = {}
        for each in units:
            gone = np.setdiff1d(np.arange(each.count), self._decisions[each.reader.parameter])
            for part in each.parts:
                name = _stored(checkpoint, part.parameter)
                here = stay.setdefault((name, part.axis), np.ones(infos[name].shape[part.axis], bool))
                here[part.indices(gone)] = False
        readers = {_stored(checkpoint, u.reader.parameter): u.reader.parameter for u in units}
        selections: dict[str, Selection] = {}
        for (name, axis), mask in stay.items():
            remaining = {axis: np.flatnonzero(mask)}
            reader = readers.get(name) if self._spec.repair else None
            selections[name] = (
                Selection(remaining)
                if reader is None
                else Selection(remaining, files[reader], f"{reader}{WEIGHTS}")
            )
        return selections

    def _sparsify(self, checkpoint: Checkpoint) -> Checkpoint:
        from safetensors import safe_open

        from llmc.checkpoint.pruned import Selection, narrow
        from llmc.prune.tasks import WEIGHTS, SparseTask
        from llmc.prune.units import find_matrices

        matrices = find_matrices(trace(checkpoint, self._target.dtype, self._progress))
        if not matrices:
            raise UnsupportedError(
                f"the layers of {checkpoint.architecture} have no matrices that can be made sparse",
                hint="leave sparsity out of the target",
            )
        facts = {"repair": self._spec.repair, "matrices": dict(matrices)}
        subject = prepare(checkpoint, self._spec.calibration, "sparsity", facts, _SHELF)
        by_layer = {
            layer: {name: first for name, first in matrices.items() if name.startswith(f"{layer}.")}
            for layer in subject.layers
        }
        task = SparseTask(by_layer, _dtypes(checkpoint), repair=self._spec.repair)
        selections = {}
        for path in self._walk(checkpoint, subject, task):
            with safe_open(path, "np") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    selections[_stored(checkpoint, key.removesuffix(WEIGHTS))] = Selection({}, path, key)
        self._sparse = len(selections)
        return narrow(checkpoint, subject.layers, selections, [{}], subject.folder.name)

    def _walk(self, checkpoint: Checkpoint, subject: PreparedModel, task: LayerTask) -> list[Path]:
        from llmc.calibration.walk import LayerWalk

        tied = dict(checkpoint.tied)
        walk = LayerWalk(subject.model, subject.layers, checkpoint.tensors, tied, subject.folder)
        return walk.run(subject.windows, task, lambda line: self._progress.note(f"prune: {line}"))


def _require_indices(indices: Array | None, keep: int, count: int, what: str) -> Array:
    """Require `keep` ascending indices below `count`.

    Raises:
        ParityError: `indices` is something else.
    """
    import numpy as np

    if indices is None or indices.shape != (keep,) or not (np.diff([-1, *indices, count]) > 0).all():
        raise ParityError(
            f"the artifact does not say which {keep} of {count} {what} stay", hint="build the artifact again"
        )
    return indices


def _kept_neurons(count: int, pruning: NeuronPruning) -> int:
    """Return how many neurons remain, rounded to the nearest multiple.

    Raises:
        ConfigError: None or all would remain.
    """
    keep = round(count * (1 - pruning.fraction) / pruning.multiple) * pruning.multiple
    if not 0 < keep < count:
        left = "nothing" if keep <= 0 else "all"
        raise ConfigError(
            f"of {count} neurons without a fraction of {pruning.fraction:g}, in multiples of "
            f"{pruning.multiple}, {left} would be left",
            hint="copy the target and state another fraction or multiple",
        )
    return keep


def _kept_groups(count: int, gone: int) -> int:
    """Return how many groups remain.

    Raises:
        ConfigError: None would remain.
    """
    if gone >= count:
        raise ConfigError(
            f"{gone} heads of keys and values are to be dropped, but each layer has {count}",
            hint="copy the target and drop fewer",
        )
    return count - gone


def _dtypes(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return NumPy's type of every parameter as stored, by each of its names."""
    dtypes = {name: info.dtype.numpy() for name, info in checkpoint.tensors.infos().items()}
    return dtypes | {name: dtypes[stored] for name, stored in checkpoint.tied.items() if stored in dtypes}


def _stored(checkpoint: Checkpoint, parameter: str) -> str:
    return checkpoint.tied.get(parameter, parameter)
