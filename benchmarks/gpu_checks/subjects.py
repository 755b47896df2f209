"""Define the artifacts that are checked, and build them below one folder.

FOLDER/checkpoints/SOURCE     checkpoints with random weights
FOLDER/configs/SOURCE         their configs and the demo's, for models of the same shape
FOLDER/SOURCE-TARGET          artifacts
FOLDER/SOURCE-TARGET.npz      the original's logits, by `llmc` on the CPU (gpu_checks.original)
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_checks.seeded import SEEDED, draw_weights, lacks_weights
from llmc.errors import ExitCode, ParityError, ResourceError, UnsupportedError

#: The sources that are not tiny: SmolLM2-135M-Instruct, and TinyLlama-1.1B's shape with random weights.
DEMO, LARGE = "demo", "llama-1b"
#: A tiny llama with as many positions as engines have slots.
ENGINE = "llama-long"
#: Exit codes of `llmc build` that say that a part is missing, or that the model does not build.
_MISSING = (ExitCode.USAGE, ExitCode.UNSUPPORTED, ExitCode.RESOURCES)


@dataclass(frozen=True)
class Subject:
    """An artifact of a checkpoint for a target.

    Args:
        source: DEMO, LARGE, ENGINE, or a type of `tests.models` with tiny random weights.
        target: Target that it is built for.
    """

    source: str
    target: str

    @property
    def name(self) -> str:
        """Return the name of the artifact's folder."""
        return f"{self.source}-{self.target}"

    @property
    def tiny(self) -> bool:
        """Return whether it has three layers of 64 channels or the like."""
        return self.source not in (DEMO, LARGE)

    def folder(self, artifacts: Path) -> Path:
        """Return the artifact's folder."""
        return artifacts / self.name

    def is_built(self, artifacts: Path) -> bool:
        """Return whether the artifact exists with its weights and its engines."""
        folder = self.folder(artifacts)
        exists = (folder / "manifest.json").is_file() and not lacks_weights(folder)
        return exists and not _is_pending(folder)

    def is_seeded(self, artifacts: Path) -> bool:
        """Return whether its weights are drawn from a seed, so that it says nothing of its checkpoint."""
        return (self.folder(artifacts) / SEEDED).is_file()

    def digest(self, artifacts: Path) -> str | None:
        """Return a digest of the artifact's files as the manifest and the drawn weights state them.

        None if it does not exist.
        """
        folder = self.folder(artifacts)
        if not self.is_built(artifacts):
            return None
        files = _manifest(folder)["files"]
        digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode())
        if (folder / SEEDED).is_file():
            digest.update((folder / SEEDED).read_bytes())
        return digest.hexdigest()[:16]


def checkpoint_of(source: str, artifacts: Path) -> str:
    """Return the model argument of `llmc build`; write the checkpoint if it has random weights."""
    from common.models import make_llama_1b

    from tests.models import EOS, save_tiny_model

    if source == DEMO:
        return source
    folder = artifacts / "checkpoints" / source
    if not (folder / "config.json").is_file():
        if source == LARGE:
            make_llama_1b(folder, positions=16384)
        else:
            kind, more = (source, {}) if source != ENGINE else ("llama", {"max_position_embeddings": 4096})
            save_tiny_model(kind, folder, tokenizer=True, eos_token_id=EOS, **more)
    return str(folder)


def config_of(source: str, artifacts: Path) -> Any:
    """Return the config of a checkpoint; it is kept beside the artifacts, where the checkpoint may not be."""
    from transformers import AutoConfig

    from llmc.checkpoint import open_checkpoint

    folder = artifacts / "configs" / source
    if not (folder / "config.json").is_file():
        config = open_checkpoint(checkpoint_of(source, artifacts)).config
        if hasattr(config, "quantization_config"):  # of the demo's GGUF file
            del config.quantization_config
        config.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


def build_subject(subject: Subject, artifacts: Path, profile: str) -> None:
    """Build an artifact without its gates, in a process of its own; if only its weights lack, draw them.

    Raises:
        ResourceError, UnsupportedError: It cannot be built here, or not for this target.
        ParityError: The build fails otherwise.
    """
    output = subject.folder(artifacts)
    if lacks_weights(output):
        draw_weights(output)
        return
    if not (output / "manifest.json").is_file():
        model = checkpoint_of(subject.source, artifacts)
        config_of(subject.source, artifacts)
        more = ["--target", subject.target, "--profile", profile, "--no-verify", "-o", str(output)]
        _build(subject.name, model, *more)
    if _is_pending(output):
        _build(subject.name, "--resume", str(output))


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def _is_pending(folder: Path) -> bool:
    """Return whether an engine is still to be built on its GPU."""
    return any(engine["file"] is None for engine in _manifest(folder)["engines"])


def run_llmc(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of llmc in a process of its own."""
    command = [sys.executable, "-m", "llmc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _build(name: str, *arguments: str) -> None:
    done = run_llmc("build", *arguments)
    if done.returncode == ExitCode.OK:
        return
    fact = f"{name} does not build: {reason(done.stderr)}"
    if done.returncode == ExitCode.UNSUPPORTED:
        raise UnsupportedError(fact)
    raise ResourceError(fact) if done.returncode in _MISSING else ParityError(fact)


def reason(stderr: str) -> str:
    """Return the error in what `llmc` wrote, without its hint."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["no message"])[-1].removeprefix("error:").strip()
