"""Provide the original's side of a comparison: the text as its tokens, and its cached results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact.provenance import code_digest
from llmc.artifact.store.cache import StageCache, default_cache_folder
from llmc.artifact.store.folder import Artifact, open_artifact
from llmc.errors import ConfigError
from llmc.graph.switches import rope_switches
from llmc.memory import available_memory
from llmc.validate.reference import TorchModel, sliding_window
from llmc.validate.remembered import RememberedModel

if TYPE_CHECKING:
    from llmc.checkpoint import Checkpoint

#: Largest size in bytes of the cache of the original's results, over all models.
CACHE_BYTES = 6 << 30


def tokenize(tokenizer: Any, text: str) -> tuple[Any, tuple[int, ...]]:
    """Return the token ids of `text`, (n,) int64, and those that the tokenizer puts before any text.

    Raises:
        ConfigError: The text has no tokens.
    """
    import numpy as np

    ids: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ConfigError("the evaluation text is empty", hint="use a text of at least a few hundred words")
    whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    before = whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)]
    return np.array(ids, dtype=np.int64), tuple(before)


def is_large(checkpoint: Checkpoint) -> bool:
    """Return whether the model of a checkpoint in float32 would need more than half of the free memory."""
    free = available_memory()
    return free is not None and checkpoint.reference_bytes() > free // 2


def remember(
    checkpoint: Checkpoint, model_digest: str, weights_digest: str, load: Callable[[], TorchModel]
) -> RememberedModel:
    """Return the original with its results cached in the cache folder.

    Args:
        model_digest: Digest of the checkpoint.
        weights_digest: Digest of the weights by which `load` replaces its own; empty for none.
    """
    from importlib.metadata import version

    facts = {
        "model": model_digest,
        "weights": weights_digest,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "arithmetic": "float32 eager",
        "code": code_digest("llmc.validate.weights", "llmc.graph.weights") if weights_digest else "",
    }
    cache = StageCache(default_cache_folder() / "reference", CACHE_BYTES)
    config = checkpoint.config
    return RememberedModel(load, cache, facts, sliding_window(config), rope_switches(config))


def open_pair(
    path: Path, against: str | None, *, force: bool, adapter: str | None = None
) -> tuple[Artifact, Checkpoint, str]:
    """Open an artifact and the original to compare it with, and compute the original's digest.

    Args:
        against: The original; None for the model that the manifest names.
        force: Accept an original whose digest differs from the manifest's.
        adapter: Adapter to merge into the original: a folder or hub id, `none` for no adapter; None for the
            one that the manifest names.

    Raises:
        ConfigError: There is no artifact, or the original is another one than the artifact's.
        CheckpointError: The original cannot be opened.
    """
    from llmc.checkpoint import open_checkpoint

    artifact = open_artifact(path)
    manifest = artifact.manifest
    merged = manifest.model.adapter
    named = adapter if adapter is not None or merged is None else merged.ref
    checkpoint = replace(
        open_checkpoint(against or manifest.model.ref, None if named == "none" else named),
        chat_template=manifest.text.chat_template,
    )
    digest = checkpoint.digest()
    if digest != manifest.model.digest and not force:
        raise ConfigError(
            f"{checkpoint.ref} is not the model that {path} was built from: its digest is {digest[:12]}…,"
            f" but the manifest says {manifest.model.digest[:12]}…",
            hint="name the original with --against, or compare them anyway with --force",
        )
    return artifact, checkpoint, digest
