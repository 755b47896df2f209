"""`llmc run`: text out of an artifact."""

from collections.abc import Callable
from pathlib import Path


def run(path: Path, prompt: str, max_tokens: int, emit: Callable[[str], None]) -> None:
    """Generate text greedily through onnxruntime-genai, as it comes.

    Args:
        path: An artifact.
        prompt: The user's message; put into the chat template where the artifact has one.
        max_tokens: New tokens at most.
        emit: Takes each piece of text.

    Raises:
        ConfigError: No artifact there, or a damaged one.
        ResourceError: The runtime or the GPU that it needs is missing.
    """
    from llmc.artifact.store import open_artifact
    from llmc.backends.generate import generate_text
    from llmc.pipeline.engines import require_no_engine

    artifact = open_artifact(path)
    require_no_engine(artifact.manifest)
    generate_text(artifact.path, prompt, max_tokens, emit, chat=True)
