"""The original's side of a comparison: its text in tokens, and its answers, remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact.store.cache import StageCache, default_cache_folder
from llmc.artifact.store.folder import Artifact, open_artifact
from llmc.errors import ConfigError
from llmc.graph.switches import rope_switches
from llmc.validate.reference import TorchModel, sliding_window
from llmc.validate.remembered import RememberedModel

if TYPE_CHECKING:
    from llmc.checkpoint import Checkpoint

#: Most bytes of the original's answers that are kept, over all models.
CACHE_BYTES = 6 << 30


def tokenize(tokenizer: Any, text: str) -> tuple[Any, tuple[int, ...]]:
    """Token ids of `text`, (n,) int64, and what the tokenizer puts before any text.

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


def remember(
    checkpoint: Checkpoint, model_digest: str, weights_digest: str, load: Callable[[], TorchModel]
) -> RememberedModel:
    """The original whose answers are kept below the cache folder.

    Args:
        model_digest: Of the checkpoint.
        weights_digest: Of weights that `load` puts in the place of its own; empty for none.
    """
    from importlib.metadata import version

    facts = {
        "model": model_digest,
        "weights": weights_digest,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "arithmetic": "float32 eager",
    }
    cache = StageCache(default_cache_folder() / "reference", CACHE_BYTES)
    config = checkpoint.config
    return RememberedModel(load, cache, facts, sliding_window(config), rope_switches(config))


def open_pair(
    path: Path, against: str | None, *, force: bool, adapter: str | None = None
) -> tuple[Artifact, Checkpoint, str]:
    """An artifact, the original it is to be compared with, and the original's digest.

    Args:
        against: The original; None for the one that the manifest names.
        force: Take an original of another digest than the manifest's.
        adapter: What is merged into the original: a folder or hub id, `none` for nothing; None for what the
            manifest names.

    Raises:
        ConfigError: There is no artifact, or the original is not the artifact's.
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
            f" the manifest says {manifest.model.digest[:12]}…",
            hint="name the original with --against, or compare them all the same with --force",
        )
    return artifact, checkpoint, digest
