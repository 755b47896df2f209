"""Find targets and profiles by name.

The folders are searched in this order; the first that has the name wins:

1. the folder given with `--path`,
2. the folders of the environment variable LLMC_PATH (separated as in PATH),
3. the files that ship with llmc.

Each folder contains `targets/*.yaml` and `profiles/*.yaml`; the name inside a file is the file's own. A
target may extend another one, whose file is in the same folder or is found like any other; `_*.yaml` contain
what several targets share and are not targets themselves. The profile `local` is not a file: `llmc.machine`
describes the machine at hand.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from llmc.config import Metric, Target
from llmc.document import Extension, find_origins, load_document
from llmc.errors import ConfigError, did_you_mean
from llmc.machine import LOCAL, detect_profile
from llmc.profile import Profile, ProfileKind

PATH_VARIABLE = "LLMC_PATH"
#: The prefix of files with parts of targets.
_SHARED = "_"

Document = TypeVar("Document", Target, Profile)
_Kind = Literal["targets", "profiles"]


@dataclass(frozen=True)
class Listed(Generic[Document]):
    """The target or profile of one file, with that file."""

    document: Document
    file: Path


def shipped_folder() -> Path:
    """Return the folder of the shipped `targets/` and `profiles/`: a wheel's package, else the checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package, package.parent):
        if (folder / "targets").is_dir() and (folder / "profiles").is_dir():
            return folder
    raise ConfigError(
        f"the targets and profiles that ship with llmc are neither in {package} nor in {package.parent}",
        hint="the installation is incomplete: install llmc again",
    )


def search_folders(path: Path | None = None) -> tuple[Path, ...]:
    """Return the folders in the order of the search; ConfigError for one that has neither kind."""
    named = [(path, "--path")] if path is not None else []
    listed = os.environ.get(PATH_VARIABLE, "").split(os.pathsep)
    named += [(Path(entry), PATH_VARIABLE) for entry in listed if entry]
    for folder, origin in named:
        if not ((folder / "targets").is_dir() or (folder / "profiles").is_dir()):
            raise ConfigError(
                f"{folder} (from {origin}) has neither a folder targets nor a folder profiles",
                hint="name their parent folder",
            )
    return (*(folder for folder, _ in named), shipped_folder())


def list_targets(path: Path | None = None) -> tuple[Listed[Target], ...]:
    """Load every target that can be named, sorted by name."""
    files = _find("targets", search_folders(path))
    return tuple(Listed(_load_target(file, path), file) for _, file in sorted(files.items()))


def list_profiles(path: Path | None = None) -> tuple[Listed[Profile], ...]:
    """Load every profile that can be named except `local`, sorted by name."""
    files = _find("profiles", search_folders(path))
    return tuple(Listed(_load(file, Profile), file) for _, file in sorted(files.items()))


def load_target(name: str, path: Path | None = None) -> Target:
    """Load the target of this name; ConfigError if there is none or its file is not valid."""
    return _load_target(_file_of(name, "targets", path), path)


def read_target(named: str, path: Path | None = None) -> Target:
    """Load a target by its YAML file or by its name.

    Args:
        named: A file that ends in .yaml or .yml, or the name of a target.
        path: Folder of the user's own targets, as for `search_folders`.

    Raises:
        ConfigError: No target has this name, or its file is not valid.
    """
    if named.endswith((".yaml", ".yml")):
        return _load_target(Path(named), path)
    return load_target(named, path)


def find_target(name: str, path: Path | None = None) -> Target | None:
    """Load the target of this name; None if there is none."""
    file = _find("targets", search_folders(path)).get(name)
    return None if file is None else _load_target(file, path)


def find_target_origins(name: str, path: Path | None = None) -> dict[tuple[str, ...], Path]:
    """Return the file that states each value of a target, as `llmc.document.find_origins` does."""
    return find_origins(_file_of(name, "targets", path), _extension(path))


def load_profile(name: str, path: Path | None = None) -> Profile:
    """Load the profile of this name; `local` describes this machine's GPU, or its CPU if it has none."""
    if name == LOCAL:
        return detect_profile()
    return _load(_file_of(name, "profiles", path), Profile)


def load_profile_for(target: Target, name: str, path: Path | None = None) -> Profile:
    """Load the profile of this name, which must have the kind of hardware that the target runs on.

    `local` describes the CPU for a CPU target. For a CUDA target it describes the GPU, or without a GPU the
    CPU of the building machine: such an artifact is built but not executed. A checkpoint fits either.
    """
    kind = target.hardware
    if name == LOCAL:
        return detect_profile(gpu=kind is not ProfileKind.CPU)
    profile = load_profile(name, path)
    if kind is not None and profile.kind is not kind:
        raise ConfigError(
            f"target {target.name} runs on a {kind.value.upper()} and profile {name} describes a "
            f"{profile.kind.value.upper()}",
            hint="llmc profiles lists the profiles with their kind",
        )
    return profile


def _file_of(name: str, kind: _Kind, path: Path | None, *, shared: bool = False) -> Path:
    """Return the file of this name; with `shared` also a file with a part of targets."""
    files = _find(kind, search_folders(path), shared=shared)
    if name not in files:
        known = [*files, LOCAL] if kind == "profiles" else list(files)
        raise ConfigError(f"no {kind.removesuffix('s')} is named {name}", hint=did_you_mean(name, known))
    return files[name]


def _find(kind: _Kind, folders: Sequence[Path], *, shared: bool = False) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for folder in folders:
        here: dict[str, Path] = {}
        for file in sorted((folder / kind).glob("*")):
            if file.suffix not in (".yaml", ".yml") or (file.name.startswith(_SHARED) and not shared):
                continue
            if file.stem in here:
                raise ConfigError(f"{file} and {here[file.stem].name} both define {file.stem}")
            here[file.stem] = file
        if kind == "profiles" and LOCAL in here:
            raise ConfigError(
                f"{here[LOCAL]} has the name {LOCAL}, which is reserved for the machine at hand",
                hint="give the file another name",
            )
        files = here | files
    return files


def _load_target(file: Path, path: Path | None) -> Target:
    return _load(file, Target, _extension(path))


def _extension(path: Path | None) -> Extension:
    """Return how a target is merged with the target that it extends: gates by their metric."""

    def find(name: str, file: Path) -> Path:
        beside = [file.parent / (name + suffix) for suffix in (".yaml", ".yml")]
        named = Path(name).name == name  # not a path
        sibling = next((each for each in beside if named and each.is_file()), None)
        return _file_of(name, "targets", path, shared=True) if sibling is None else sibling

    return Extension(find, {"gates": ("metric", [metric.value for metric in Metric])})


def _load(file: Path, model: type[Document], extension: Extension | None = None) -> Document:
    document = load_document(file, model, extension)
    if document.name != file.stem:
        raise ConfigError(
            f"{file}: name is {document.name} and the file is named {file.stem}",
            hint="a file is named after the target or profile that it defines",
        )
    return document
