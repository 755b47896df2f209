"""Check before any file of an artifact is opened that the files are those in its manifest.

Code needs more than a digest. A library is executed only if the manifest names it as the artifact's
kernels, and nothing in the artifact may name a file outside of its folder: not genai_config.json, whose
`custom_ops_library` onnxruntime-genai loads from any path, not the external data of a graph, and no
symbolic link. A checkpoint may consist of links, as the hub's cache does; an artifact may not.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from llmc.artifact.manifest import MANIFEST, REPORTS, FileDigest, Manifest
from llmc.artifact.store.cache import StageCache, content_key, default_cache_folder
from llmc.artifact.store.folder import Artifact, digest_file
from llmc.errors import ConfigError

if TYPE_CHECKING:
    from google.protobuf.message import Message

_GENAI_CONFIG = "genai_config.json"
_LIBRARY_KEY = "custom_ops_library"
#: Options of a session that a build states; others load, write and share what the manifest does not cover.
_OPTIONS = {
    *("log_id", "provider_options", "intra_op_num_threads", _LIBRARY_KEY),
    "session.use_device_allocator_for_initializers",
}
_PROVIDERS = {"cuda"}
_LIBRARIES = (".so", ".dll", ".dylib", ".engine", ".plan")
_REPORTS = (".html", ".json", ".md", ".xml")
#: Size in bytes below which a file is read each time.
_REMEMBERED_BYTES = 1 << 20
#: Seconds after a change during which a file may change again within the resolution of its times.
_SETTLED_SECONDS = 2.0
_CACHE_BYTES = 4 << 20


@dataclass(frozen=True)
class Damage:
    """The errors in an artifact's files, a sentence each.

    Args:
        files: Files that are missing, changed, not listed or not inside the folder.
        code: Code or files outside that would be executed or read although the manifest does not cover them:
            such an artifact is not opened, whatever the user allows.
    """

    files: tuple[str, ...] = ()
    code: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """The sentences of `files` and `code` together."""
        return self.files + self.code


def require_intact(artifact: Artifact) -> None:
    """Compare every file with the manifest before an artifact is executed.

    Raises:
        ConfigError: Files are missing or changed, or are or point outside; the message names all.
    """
    damage = find_damage(artifact, remember=True)
    if damage.all:
        raise ConfigError(
            f"{artifact.path} is damaged: {'; '.join(damage.all)}", hint="build the artifact again"
        )


def require_vouched(artifact: Artifact) -> None:
    """Compare what would be executed with the manifest; other files may differ from it.

    Raises:
        ConfigError: A library or a path is not the manifest's; the message names all.
    """
    code = find_damage(artifact, remember=True).code
    if code:
        raise ConfigError(
            f"{artifact.path} is not opened, because it names code or files that its manifest does not list: "
            f"{'; '.join(code)}",
            hint="build the artifact again",
        )


def find_damage(artifact: Artifact, *, remember: bool = False) -> Damage:
    """Compare an artifact with its manifest: sizes, links, code and small files first.

    Args:
        remember: Whether to use the digest of a large file from the cache if its inode, size and times are
            those at its last computation, and to compute none if something else is wrong.
    """
    folder, recorded = artifact.path, artifact.manifest.files
    files: list[str] = []
    code: list[str] = []
    large: list[str] = []
    for name in sorted(recorded):
        wrong = _compare(folder, name, recorded[name])
        executed = _is_library(name) or name in artifact.manifest.executed
        if wrong is None and recorded[name].bytes >= _REMEMBERED_BYTES and not executed:
            large.append(name)
        elif (wrong := wrong or _compare_digest(folder, name, recorded[name])) is not None:
            (code if executed else files).append(wrong)
    files += _unlisted(artifact)
    code += _unvouched(folder, artifact.manifest)
    if not (remember and (files or code)):
        changed = (_compare_digest(folder, name, recorded[name], remember=remember) for name in large)
        files += [wrong for wrong in changed if wrong is not None]
    return Damage(tuple(files), tuple(code))


def _unlisted(artifact: Artifact) -> Iterator[str]:
    """Yield files that the manifest does not list, except itself and reports; and links to the outside."""
    for path in sorted(artifact.path.rglob("*")):
        name = path.relative_to(artifact.path).as_posix()
        if name in artifact.manifest.files:
            continue
        if _leaves(artifact.path, name):
            yield f"{name} is a link to a place outside of the artifact"
        elif not path.is_dir() and name != MANIFEST and not _is_report(name):
            yield f"{name} is not listed in the manifest"


def _is_report(name: str) -> bool:
    """Return whether a file is one that llmc writes below `reports/`, judged by its place and its suffix."""
    return name.startswith(f"{REPORTS}/") and name.endswith(_REPORTS)


def _compare(folder: Path, name: str, recorded: FileDigest) -> str | None:
    """Describe what is wrong with one file before it is read; None if nothing is."""
    path = folder / name
    if _leaves(folder, name):
        return f"{name} is a link to a file outside of the artifact"
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    return None if size == recorded.bytes else f"{name} has {size} bytes instead of {recorded.bytes}"


def _compare_digest(folder: Path, name: str, recorded: FileDigest, *, remember: bool = False) -> str | None:
    """Describe what is wrong with the contents of one file; None if nothing is."""
    path = folder / name
    try:
        digest = _remembered_digest(path) if remember else digest_file(path).sha256
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if digest == recorded.sha256 else f"{name} has changed"


def _leaves(folder: Path, name: str) -> bool:
    """Return whether a link on the path of a file leads out of the folder."""
    return not Path(os.path.realpath(folder / name)).is_relative_to(os.path.realpath(folder))


def _remembered_digest(path: Path) -> str:
    """Return the sha256 of a file, from the cache if it was not written to since."""
    cache = StageCache(default_cache_folder() / "digests", _CACHE_BYTES)
    before = _identity(path)
    key = content_key("digest", before)
    cached = cache.get(key)
    if cached is not None:
        return cached.decode()
    digest = digest_file(path).sha256
    if _identity(path) == before and time.time() - path.stat().st_ctime > _SETTLED_SECONDS:
        cache.put(key, digest.encode())
    return digest


def _identity(path: Path) -> dict[str, int]:
    """Return what changes with any write to a file: no program can set the time of its last status change."""
    status = path.stat()
    names = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
    return {name: int(getattr(status, name)) for name in names}


def _unvouched(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield what the files name but the manifest does not cover."""
    if (folder / _GENAI_CONFIG).is_file() and not _leaves(folder, _GENAI_CONFIG):
        yield from _named_by_config(folder / _GENAI_CONFIG, manifest)
    for name, kind in manifest.executed.items():
        if name not in manifest.files:
            yield f"the manifest has no digest of {kind} {name}"
    for name in manifest.files:
        if name.endswith(".onnx") and (folder / name).is_file() and not _leaves(folder, name):
            yield from _external_data(folder, name, manifest)


def _named_by_config(path: Path, manifest: Manifest) -> Iterator[str]:
    """Yield paths in genai_config.json that lead elsewhere, and libraries that are not the kernels."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    except (OSError, ValueError, RecursionError) as error:
        yield f"{path.name} cannot be read: {error}"
        return
    vouched = None if manifest.kernels is None else manifest.kernels.library
    for key, value in _strings(pairs):
        if key == _LIBRARY_KEY or _is_library(value):
            if value != vouched:
                yield f"{path.name} names the library {value}, which the manifest does not name"
        elif _is_outside(value):
            yield f"{path.name} names {value} as {key}, outside of the artifact"
        elif key.endswith("filename") and value not in manifest.files:
            yield f"{path.name} names {value} as {key}, which the manifest does not list"
    for kind, allowed in (("session_options", _OPTIONS), ("provider_options", _PROVIDERS)):
        for key in sorted(set(_keys(pairs, kind)) - allowed):
            yield f"{path.name} has {key} among its {kind}, which no build writes"


def _keys(node: Any, parent: str, inside: bool = False) -> Iterator[str]:
    """Yield keys of every object under a key, also of objects in a list there."""
    if not isinstance(node, list):
        return
    for item in node:
        if isinstance(item, tuple):
            if inside:
                yield item[0]
            yield from _keys(item[1], parent, item[0] == parent)
        else:
            yield from _keys(item, parent, inside)


def _strings(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text of a JSON document with its key, also those of keys that occur twice."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, list):
        for item in node:
            if isinstance(item, tuple):
                yield from _strings(item[1], item[0])
            else:
                yield from _strings(item, key)


def _external_data(folder: Path, name: str, manifest: Manifest) -> Iterator[str]:
    """Yield files from which tensors of a graph are read and that the manifest does not list."""
    for location in _locations(folder / name):
        inside = str(PurePosixPath(name).parent / location)
        if _is_outside(location):
            yield f"{name} reads tensors from {location}, outside of the artifact"
        elif inside not in manifest.files:
            yield f"{name} reads tensors from {location}, which the manifest does not list"


def _locations(path: Path) -> Iterable[str]:
    """Return the files of the tensors of an ONNX file, each once; they are cached by the file's digest."""
    cache = StageCache(default_cache_folder() / "digests", _CACHE_BYTES)
    try:
        key = content_key("external data", {"graph": digest_file(path).sha256})
    except OSError:  # the file itself is reported elsewhere
        return []
    cached = cache.get(key)
    if cached is not None:
        return [str(location) for location in json.loads(cached)]
    from google.protobuf.message import DecodeError
    from onnx import load

    try:
        model = load(path, load_external_data=False)
    except DecodeError:  # the execution of the graph reports why it cannot be read
        return []
    locations = list(dict.fromkeys(_entries(model)))
    cache.put(key, json.dumps(locations).encode())
    return locations


def _entries(message: "Message") -> Iterator[str]:
    """Yield values of `location` in the external data of every tensor of a protobuf message, however deep.

    This follows TensorProto of onnx.proto; subgraphs, functions and sparse tensors are messages like any
    other.
    """
    from google.protobuf.message import Message

    for field, value in message.ListFields():
        if field.name == "external_data":
            yield from (entry.value for entry in value if entry.key == "location")
        elif field.message_type is not None:
            for inner in (value,) if isinstance(value, Message) else value:
                yield from _entries(inner)


def _is_library(name: str) -> bool:
    return name.lower().endswith(_LIBRARIES) or ".so." in name.lower()


def _is_outside(name: str) -> bool:
    """Return whether a path is absolute or leads upwards, by the rules of any system."""
    windows = PureWindowsPath(name)
    return bool(windows.anchor) or name.startswith("/") or ".." in windows.parts
