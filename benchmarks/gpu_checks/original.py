"""Compute an artifact's logits in PyTorch, with the artifact's own weights; kept in a file beside it.

The file is made where the artifact is prepared, so that the machine with the GPU needs no checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpu_checks.subjects import Subject, checkpoint_of
from gpu_checks.walk import walk_original, walk_tokens
from llmc.artifact.store.folder import Artifact, open_artifact
from llmc.errors import UnsupportedError
from llmc.progress import SilentProgress


def expected_logits(subject: Subject, artifacts: Path) -> dict[str, np.ndarray]:
    """Return the logits of `walk` that PyTorch computes in float32; computed at the first call.

    Raises:
        UnsupportedError: The weights are drawn from a seed, or cannot be read back.
    """
    file = artifacts / f"{subject.name}.npz"
    digest = subject.digest(artifacts)
    if file.is_file():
        with np.load(file) as stored:
            if str(stored["digest"]) == digest:
                return {name: stored[name] for name in stored.files if name != "digest"}
    if subject.is_seeded(artifacts):
        raise UnsupportedError("its weights are drawn from a seed, so PyTorch has no such model")
    artifact = open_artifact(subject.folder(artifacts))
    logits = _compute(artifact, checkpoint_of(subject.source, artifacts))
    np.savez(file, allow_pickle=False, digest=np.array(digest), **logits)
    return logits


def _compute(artifact: Artifact, model: str) -> dict[str, np.ndarray]:
    """Run the original with the artifact's weights in place of its own."""
    from llmc.pipeline.steps.original import open_pair
    from llmc.pipeline.steps.rebuild import rebuild
    from llmc.validate.reference import TorchModel
    from llmc.validate.stored import read_stored
    from llmc.validate.weights import compare_weights, parameters

    manifest, path = artifact.manifest, artifact.path
    _, checkpoint, _ = open_pair(path, model, force=False)
    sources = rebuild(checkpoint, manifest.target, manifest.weights, path, SilentProgress()).sources
    weights = compare_weights(read_stored(path, sources), sources)
    if weights.unread:
        raise UnsupportedError(f"{len(weights.unread)} weights cannot be read back, as {weights.unread[0]}")
    original = TorchModel(checkpoint.fill_reference())
    changed = {name: sources[name] for name in weights.changed}
    for name, matrix in read_stored(path, changed).items():
        original.set_parameters(dict(parameters(changed[name], matrix.whole())))
    return walk_original(lambda ids, keep: original.logits(ids, keep=keep), walk_tokens(manifest))
