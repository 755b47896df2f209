"""Derive every file of an artifact except its weights from the original again, and compare them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from llmc.artifact.manifest import MODEL, PRUNING
from llmc.backends import backend_of
from llmc.backends.model_file import DATA
from llmc.errors import LlmcError
from llmc.pipeline.steps.prune import count_parameters
from llmc.pipeline.steps.text import derive_text
from llmc.validate.file_differences import compare_file, json_differences

if TYPE_CHECKING:
    from llmc.artifact.manifest import Manifest
    from llmc.artifact.text import TextRecord
    from llmc.checkpoint import Checkpoint
    from llmc.pipeline.steps.rebuild import Rebuilt

#: Facts of a text record that a runtime decides; `derive_text` does not test them.
_BY_RUNTIME = ("served", "reason", "adds_special_tokens", "exceptions")


@dataclass(frozen=True)
class Derived:
    """The differences between an artifact and what a build derives, a sentence each.

    Args:
        settings: Differences in the files and facts for serving.
        text: Differences in the files and facts of its tokenizer.
    """

    settings: tuple[str, ...] = ()
    text: tuple[str, ...] = ()


#: The result if nothing differs.
NOTHING = Derived()


def compare_derived(
    path: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    compiled: Checkpoint,
    rebuilt: Rebuilt,
    otherwise: str | None,
) -> Derived:
    """Derive the files of an artifact in a temporary folder, and compare them key by key.

    Args:
        checkpoint: The original.
        compiled: The checkpoint that was compiled.
        otherwise: Why a build here may give other files; then only copies of the original's files and the
            facts of the manifest are compared. None if it gives the same.
    """
    backend = backend_of(manifest.target)
    settings = list(_interface_differences(manifest, rebuilt))
    text: list[str] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            record = derive_text(checkpoint, path, folder, manifest.target)
            backend.write_serving(
                folder,
                manifest.target,
                manifest.profile.threads,
                compiled,
                compiled.generation_config(),
                rebuilt.graph,
            )
            if otherwise is None:
                settings += backend.differences(path, manifest, rebuilt.lowered)
                settings += _recorded_differences(manifest, checkpoint, rebuilt)
        except LlmcError as error:
            return Derived((*settings, f"its files cannot be derived: {error.fact}"))
        text += _record_differences(manifest.text, record)
        derived = sorted(file.name for file in folder.iterdir() if file.is_file())
        for each in derived:
            if otherwise is not None and not _is_copy(folder / each, checkpoint):
                continue
            differences = settings if backend.serves_by(each) else text
            differences += compare_file(path / each, folder / each)
    settings += [
        f"{each} is not written by a build"
        for each in sorted(manifest.files)
        if not _is_known(each, derived, manifest)
    ]
    return Derived(tuple(settings), tuple(text))


def _recorded_differences(manifest: Manifest, checkpoint: Checkpoint, rebuilt: Rebuilt) -> Iterator[str]:
    """Describe where the manifest differs from a build of its matrices, its passes and its model."""
    model = manifest.model
    facts = {
        "architecture": model.architecture,
        "model_type": model.model_type,
        "parameters": model.parameters,
    }
    yield from json_differences(facts, _describe(checkpoint), "manifest: model")
    for name, stated, rebuilt_records in (
        ("weights", manifest.weights, rebuilt.records),
        ("passes", manifest.passes, rebuilt.passes),
    ):
        actual, expected = (
            [record.model_dump(mode="json") for record in records] for records in (stated, rebuilt_records)
        )
        yield from json_differences(actual, expected, f"manifest: {name}")


def _describe(checkpoint: Checkpoint) -> dict[str, str | int]:
    return {
        "architecture": checkpoint.architecture,
        "model_type": checkpoint.config.model_type,
        "parameters": count_parameters(checkpoint),
    }


def _is_copy(file: Path, checkpoint: Checkpoint) -> bool:
    """Return whether the original has the same file."""
    for folder in {checkpoint.tokenizer_path or checkpoint.path, checkpoint.path}:
        source = folder / file.name
        if folder.is_dir() and source.is_file() and source.read_bytes() == file.read_bytes():
            return True
    return False


def _is_known(name: str, derived: Sequence[str], manifest: Manifest) -> bool:
    """Return whether a build writes a file of this name."""
    from llmc.quantize.activations import SMOOTHING

    names = {*derived, MODEL, DATA, SMOOTHING, PRUNING}
    return name in names | backend_of(manifest.target).own_files(manifest)


def _record_differences(stated: TextRecord, derived: TextRecord) -> Iterator[str]:
    actual, expected = (
        record.model_dump(mode="json", exclude=set(_BY_RUNTIME)) for record in (stated, derived)
    )
    yield from json_differences(actual, expected, "manifest: text")


def _interface_differences(manifest: Manifest, rebuilt: Rebuilt) -> Iterator[str]:
    interfaces = (manifest.interface, rebuilt.graph.interface())
    actual, expected = (interface.model_dump(mode="json") for interface in interfaces)
    yield from json_differences(actual, expected, "manifest: interface")
