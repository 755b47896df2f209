"""Store artifacts on disk: write them beside their place and put them there complete, open and check them.

Beside an output `NAME` there may be `NAME.unverified`, a finished artifact whose gates are not decided while
another one is at `NAME`; and `NAME.failed`, one that was kept although it failed its gates. For the files
that are there while a build runs, see `llmc.artifact.store.workplace`.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.artifact.manifest import MANIFEST, REPORTS, FileDigest, Manifest, State, parse_manifest
from llmc.artifact.store.disk import access_errors, require_space, space_errors
from llmc.artifact.store.workplace import Place, holding, make_work_folder, move, tidy, write_manifest
from llmc.errors import ConfigError

_CHUNK = 1 << 20
#: Suffixes of the files that llmc writes below `reports/`.
REPORT_SUFFIXES = (".html", ".json", ".md", ".xml")


@dataclass(frozen=True)
class Artifact:
    """The directory of an artifact on disk, and its manifest."""

    path: Path
    manifest: Manifest


@dataclass
class Staging:
    """The directory that will be an artifact.

    Args:
        path: Directory for the files; the artifact's directory after it was kept or committed.
        output: Directory for a verified artifact.
        work: The work folder.
    """

    path: Path
    output: Path
    work: Path

    def keep_unverified(self, manifest: Manifest) -> Artifact:
        """Keep the directory, which is finished except for its gates.

        It is at the output if nothing is there, or only an artifact whose gates were never decided; otherwise
        at `<output>.unverified`, so that what is at the output stays.

        Raises:
            ResourceError: No space for the manifest.
        """
        free = not self.output.exists() or not any(self.output.iterdir()) or _is_unfinished(self.output)
        return self._put(manifest, Place.OUTPUT if free else Place.UNVERIFIED)

    def commit(self, manifest: Manifest) -> Artifact:
        """Write the manifest, and replace whatever was there before by the directory.

        Raises:
            ResourceError: No space for the manifest; what was there before is untouched.
        """
        return self._put(manifest, Place.OUTPUT)

    def keep_failed(self, manifest: Manifest) -> Artifact:
        """Keep the directory as `<output>.failed` for inspection; no other artifact is touched."""
        return self._put(manifest, Place.FAILED)

    def restate(self, manifest: Manifest) -> Artifact:
        """Replace the manifest of the artifact in its directory.

        Raises:
            ResourceError: No space for the manifest; the earlier one is untouched.
        """
        with space_errors(self.path), access_errors(self.path):
            write_manifest(self.path, manifest.to_json())
        return Artifact(self.path, manifest)

    def _put(self, manifest: Manifest, place: Place) -> Artifact:
        destination = place.beside(self.output)
        if self.path == destination:
            return self.restate(manifest)
        with space_errors(destination), access_errors(destination):
            self.path = move(self.path, self.work, self.output, place, manifest.to_json())
        return Artifact(self.path, manifest)


@contextmanager
def staging(output: Path, needed: int = 0) -> Iterator[Staging]:
    """Provide a directory beside `output` to write an artifact in; remove it unless it was committed or kept.

    Cleans up after builds of the same output that were killed.

    Args:
        output: Directory for the artifact: absent, empty, or an artifact to replace.
        needed: Estimate of the bytes to be written.

    Raises:
        ConfigError: Another build uses `output`; it is a file or a directory that is not an artifact;
            or it cannot be written to.
        ResourceError: The file system has less than `needed` bytes free.
    """
    output = output.resolve()
    if not output.name:
        raise ConfigError(f"{output} cannot be an output directory", hint="name a directory below it")
    with access_errors(output):
        is_mount = output.is_mount()
    if is_mount:
        raise ConfigError(
            f"output {output} is a mount point, which cannot be replaced atomically",
            hint="name a directory below it",
        )
    with space_errors(output), ExitStack() as stack:
        with access_errors(output):
            _make_parent(output)
            stack.enter_context(holding(output))
            _refuse_foreign(output)
            require_space(output.parent, needed)
            work = make_work_folder(output)
        stack.callback(shutil.rmtree, work)
        draft = Staging(work / "new", output, work)
        draft.path.mkdir()
        yield draft


@contextmanager
def reopened(artifact: Artifact) -> Iterator[Staging]:
    """Reopen an artifact whose gates were not decided, to be committed or kept as failed.

    Raises:
        ConfigError: It is being built, it has changed since it was opened, or it cannot be written to.
    """
    path = artifact.path.resolve()
    beside = f".{Place.UNVERIFIED.value}"
    output = path.with_name(path.name.removesuffix(beside)) if path.name != beside else path
    with space_errors(output), ExitStack() as stack:
        with access_errors(output):
            stack.enter_context(holding(output))
            _refuse_foreign(output)
            if open_artifact(path).manifest != artifact.manifest:
                raise ConfigError(f"{path} has changed in the meantime", hint="run the command again")
            work = make_work_folder(output)
        stack.callback(shutil.rmtree, work)
        yield Staging(path, output, work)


def open_artifact(path: Path) -> Artifact:
    """Read the manifest of the artifact in directory `path`.

    Raises:
        ConfigError: The directory or its manifest does not exist, or the manifest is damaged or newer.
    """
    tidy(path)
    manifest = path / MANIFEST
    if not path.is_dir():
        raise ConfigError(f"there is no artifact at {path}", hint="create one with llmc build")
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
    """Replace the artifact's manifest by `manifest` atomically.

    Raises:
        ConfigError: Another build uses the artifact.
        ResourceError: No space for it; the existing one is untouched.
    """
    path = artifact.path.resolve()
    with space_errors(path), access_errors(path), holding(path):
        write_manifest(path, manifest.to_json())
    return Artifact(artifact.path, manifest)


def digest_folder(folder: Path, known: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
    """Return digests of all files below `folder` except `reports/` and the manifest, for `Manifest.files`.

    Args:
        known: Digests that were computed while writing; these files are not read again.
    """
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and not name.startswith(f"{REPORTS}/"):
            digests[name] = known[name] if name in known else digest_file(path)
    return digests


def digest_file(path: Path) -> FileDigest:
    """Return the sha256 and size of one file."""
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


def _refuse_foreign(output: Path) -> None:
    """Refuse to replace anything that was not written by a build of this output.

    A folder beside it belongs to it only if its manifest says so: it may be the output of another build.
    """
    for place in Place:
        path = place.beside(output)
        if not path.exists():
            continue
        if not path.is_dir():
            raise ConfigError(f"output {path} is a file", hint="choose a directory")
        if any(path.iterdir()) and not _looks_built(path):
            raise ConfigError(
                f"output directory {path} is not empty and is not an artifact",
                hint="choose another output, or remove it yourself",
            )
        foreign = (place is Place.UNVERIFIED and not _is_unfinished(path)) or (
            place is Place.FAILED and _stated(path).get("state") != State.FAILED.value
        )
        if any(path.iterdir()) and foreign:
            raise ConfigError(
                f"{path} is another artifact, in the place where a build of {output} keeps one that "
                f"{'is not verified' if place is Place.UNVERIFIED else 'failed'}",
                hint="choose another output, or move it elsewhere",
            )


def _looks_built(folder: Path) -> bool:
    return {"schema_version", "llmc_version"} <= _stated(folder).keys()


def _is_unfinished(folder: Path) -> bool:
    """Return whether the gates of the artifact in `folder` were to run, and were not decided."""
    return _looks_built(folder) and _stated(folder).get("unfinished") is not None


def _stated(folder: Path) -> dict[str, Any]:
    """Return what the manifest in `folder` states, unchecked; empty if there is none."""
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
    except (ValueError, RecursionError, FileNotFoundError, IsADirectoryError):
        return {}
    return data if isinstance(data, dict) else {}
