"""Find and open an adapter on disk, and distinguish it from a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llmc.checkpoint import location, tokenizer
from llmc.checkpoint.adapter.config import CONFIG, PICKLED, WEIGHTS, LoraConfig, base_of, read_adapter_config
from llmc.checkpoint.digest import digest_files
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.errors import CheckpointError
from llmc.graph.weights import Rows, StoredRows, WeightStore


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk; none of its tensors has been read.

    Args:
        ref: The reference as the user wrote it: folder, or hub id with optional @revision.
        path: Folder of the adapter.
    """

    ref: str
    path: Path
    config: LoraConfig
    tensors: WeightStore

    @property
    def has_tokenizer(self) -> bool:
        """Whether the adapter's folder contains a tokenizer."""
        return tokenizer.has_tokenizer(self.path)

    @cached_property
    def digest(self) -> str:
        """The sha256 (hex) over the adapter's config, tensors and tokenizer files."""
        files = [self.path / CONFIG, self.path / WEIGHTS, *tokenizer.tokenizer_files(self.path)]
        return digest_files(files)

    def require_vocabulary(self, rows: int) -> None:
        """Check that the adapter's tokenizer has no more tokens than the model's embedding has rows.

        Raises:
            CheckpointError: It has more tokens, or cannot be read.
        """
        vocabulary = tokenizer.load_tokenizer(self.path).get_vocab()
        token = max(vocabulary, key=lambda each: vocabulary[each], default="")
        if token and vocabulary[token] >= rows:
            raise CheckpointError(
                f"the tokenizer of the adapter {self.path} has {vocabulary[token] + 1} tokens, up to "
                f"{token!r}, but the base's embedding has only {rows} rows",
                hint="tokens were added in training: give the base rows for them (resize_token_embeddings), "
                "or remove the tokenizer's files from the adapter's folder",
            )

    def rows(self, name: str) -> Rows:
        """Return the rows of a tensor in the adapter's file."""
        return StoredRows(self.tensors, self.tensors.infos()[name])


def open_adapter(ref: str) -> Adapter:
    """Open the adapter that `ref` names; reads only its config and the header of its file.

    Raises:
        CheckpointError: The adapter is missing, pickled or damaged.
        UnsupportedError: The kind of adapter is not supported.
    """
    path = location.locate_adapter(ref)
    config = read_adapter_config(path)
    if not (path / WEIGHTS).is_file():
        if (path / PICKLED).is_file():
            raise CheckpointError(
                f"{path} holds only pickled weights ({PICKLED}), which are not loaded",
                hint="load it with peft once and `save_pretrained` it as safetensors",
            )
        raise CheckpointError(
            f"{path} has no {WEIGHTS}", hint="finish the download, or save the adapter again"
        )
    tensors = SafetensorsStore.open_file(path / WEIGHTS)
    if not tensors.infos():
        raise CheckpointError(f"{path / WEIGHTS} holds no tensors", hint="save the adapter again")
    return Adapter(ref, path, config, tensors)


def refuse_adapter_beside(path: Path, ref: str, adapter: Adapter | None) -> None:
    """Check that the model in `path` is not an adapter, and has no adapter beside it that would be ignored.

    Where peft is installed, transformers also loads an adapter beside a model; without the adapter, the
    folder would be a different model than its owner knows.

    Raises:
        CheckpointError: The folder is an adapter or holds one, and the user does not name it.
    """
    if not (path / CONFIG).is_file():
        return
    base = base_of(path) or "BASE"
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is an adapter of {base}, not a model by itself",
            hint=f"llmc build {base} --adapter {ref}",
        )
    if adapter is None or adapter.path.resolve() != path.resolve():
        raise CheckpointError(
            f"{path} holds a model and an adapter ({CONFIG}), which transformers loads where peft is "
            "installed",
            hint=f"--adapter {ref} builds it with the adapter; remove {CONFIG} to build the model alone",
        )
