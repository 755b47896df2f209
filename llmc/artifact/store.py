"""Artifacts on disk: written beside their place and swapped in whole, opened, checked.

Beside an output `NAME` there may be, while a build runs or after it was killed:
`.NAME.lock`, `.NAME.staging-*` (being written) and `.NAME.previous` (what the swap replaces);
and `NAME.failed`, an artifact that was kept though it failed its gates.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmc.artifact.disk import access_errors, require_space, space_errors
from llmc.artifact.lock import output_lock
from llmc.artifact.manifest import MANIFEST, REPORTS, FileDigest, Manifest, parse_manifest
from llmc.errors import ConfigError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk: its directory and its manifest."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Staging:
    """A directory that will be an artifact.

    Args:
        path: Write the files here.
        output: Where the artifact will be.
    """

    path: Path
    output: Path

    def commit(self, manifest: Manifest) -> Artifact:
        """Write the manifest, and put the directory in the place of whatever was there before.

        Raises:
            ResourceError: No space for the manifest; what was there before is untouched.
        """
        return self._finish(manifest, self.output)

    def keep_failed(self, manifest: Manifest) -> Artifact:
        """Keep the directory as `<output>.failed` for inspection; the output itself is untouched."""
        return self._finish(manifest, failed_path(self.output))

    def _finish(self, manifest: Manifest, place: Path) -> Artifact:
        with space_errors(place):
            _write_synced(self.path / MANIFEST, manifest.to_json())
            _sync_directory(self.path)
            _swap(self.path, place)
            _sync_directory(place.parent)
        return Artifact(place, manifest)


def failed_path(output: Path) -> Path:
    """Where an artifact is kept that failed its gates."""
    return output.with_name(f"{output.name}.failed")


@contextmanager
def staging(output: Path, needed: int = 0) -> Iterator[Staging]:
    """A directory beside `output` to write an artifact in, removed unless it was committed or kept.

    Cleans up after builds of the same output that were killed.

    Args:
        output: Where the artifact will be: absent, empty, or an artifact to replace.
        needed: Estimate of the bytes to be written.

    Raises:
        ConfigError: Another build uses `output`; it is a file or a directory that is no artifact;
            or it cannot be written to.
        ResourceError: The file system has less than `needed` bytes free.
    """
    output = output.resolve()
    if not output.name:
        raise ConfigError(f"{output} cannot be an output directory", hint="name a directory below it")
    with space_errors(output), ExitStack() as stack:
        with access_errors(output):
            _make_parent(output)
            stack.enter_context(output_lock(output.with_name(f".{output.name}.lock"), output))
            _recover(output)
            _refuse_foreign(output)
            _refuse_foreign(failed_path(output))
            require_space(output.parent, needed)
            path = output.with_name(f"{_staging_prefix(output)}{os.getpid()}")
            path.mkdir()
        try:
            yield Staging(path, output)
        finally:
            if path.exists():
                shutil.rmtree(path)


def open_artifact(path: Path) -> Artifact:
    """Read the manifest of the artifact in directory `path`.

    Raises:
        ConfigError: No such directory, no manifest in it, a damaged one, or one of a newer schema.
    """
    manifest = path / MANIFEST
    if not path.is_dir():
        raise ConfigError(f"there is no artifact at {path}", hint="llmc build makes one")
    if not manifest.is_file():
        raise ConfigError(
            f"{path} is not an artifact: it has no {MANIFEST}",
            hint="name the directory that llmc build wrote",
        )
    try:
        text = manifest.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{manifest} is damaged: it is not UTF-8 at byte {error.start}", hint="build the artifact again"
        ) from error
    return Artifact(path, parse_manifest(text, str(manifest)))


def update_manifest(artifact: Artifact, manifest: Manifest) -> Artifact:
    """Put `manifest` in the place of the artifact's own, at once.

    Raises:
        ConfigError: Another build uses the artifact.
        ResourceError: No space for it; the one that was there is untouched.
    """
    path = artifact.path.resolve()
    new = path / f".{MANIFEST}.new"
    with output_lock(path.with_name(f".{path.name}.lock"), path), space_errors(path):
        _write_synced(new, manifest.to_json())
        new.replace(path / MANIFEST)
        _sync_directory(path)
    return Artifact(artifact.path, manifest)


def check_files(artifact: Artifact) -> None:
    """Compare every file with the manifest.

    Raises:
        ConfigError: Files are missing or changed; all are named.
    """
    if wrong := damaged_files(artifact):
        raise ConfigError(f"{artifact.path} is damaged: {'; '.join(wrong)}", hint="build the artifact again")


def damaged_files(artifact: Artifact) -> list[str]:
    """What is wrong with the files of an artifact by its manifest, one sentence each."""
    wrong = []
    for name, recorded in sorted(artifact.manifest.files.items()):
        path = artifact.path / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif (size := path.stat().st_size) != recorded.bytes:
            wrong.append(f"{name} has {size} bytes instead of {recorded.bytes}")
        elif digest_file(path).sha256 != recorded.sha256:
            wrong.append(f"{name} has changed")
    return wrong


def digest_files(folder: Path, known: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
    """Digests of all files below `folder` but `reports/` and the manifest, for `Manifest.files`.

    Args:
        known: Digests that were computed while writing; these files are not read again.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and not name.startswith(f"{REPORTS}/"):
            found[name] = known[name] if name in known else digest_file(path)
    return found


def digest_file(path: Path) -> FileDigest:
    """sha256 and size of one file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileDigest(sha256=digest.hexdigest(), bytes=size)


def _make_parent(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{output} cannot be an output directory: {error.filename} is a file") from error


def _recover(output: Path) -> None:
    """Undo what a killed build left; only ever called under the output's lock."""
    for place in (output, failed_path(output)):
        previous = _previous_path(place)
        if not previous.exists():
            continue
        if place.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(place)
    prefix = _staging_prefix(output)
    for entry in list(output.parent.iterdir()):
        if entry.name.startswith(prefix):
            shutil.rmtree(entry)


def _staging_prefix(output: Path) -> str:
    return f".{output.name}.staging-"


def _refuse_foreign(place: Path) -> None:
    """Never replace what was not made by a build."""
    if not place.exists():
        return
    if not place.is_dir():
        raise ConfigError(f"output {place} is a file", hint="choose a directory")
    if any(place.iterdir()) and not _looks_built(place / MANIFEST):
        raise ConfigError(
            f"output directory {place} is not empty and is not an artifact",
            hint="choose another output, or remove it yourself",
        )


def _looks_built(manifest: Path) -> bool:
    if not manifest.is_file():
        return False
    try:
        data = json.loads(manifest.read_bytes())
    except ValueError:
        return False
    return isinstance(data, dict) and {"schema_version", "llmc_version"} <= data.keys()


def _previous_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.previous")


def _swap(new: Path, place: Path) -> None:
    """Rename `new` to `place`; on any failure what was at `place` is there again."""
    previous = _previous_path(place)
    if place.exists():
        place.rename(previous)
    try:
        new.rename(place)
    except BaseException:
        if previous.exists():
            previous.rename(place)
        raise
    if previous.exists():
        shutil.rmtree(previous)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
