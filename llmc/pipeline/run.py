"""`llmc run`: text out of an artifact."""

from collections.abc import Callable
from pathlib import Path

from llmc.progress import Progress


def run(path: Path, prompt: str, max_tokens: int, emit: Callable[[str], None], progress: Progress) -> None:
    """Generate text greedily, as it comes: through onnxruntime-genai, or by the artifact's engine.

    Args:
        path: An artifact.
        prompt: The user's message; put into the chat template where the artifact has one.
        max_tokens: New tokens at most.
        emit: Takes each piece of text.

    Raises:
        ConfigError: No artifact there, or a damaged one.
        ResourceError: The runtime, the GPU or the CPU that it needs is missing.
        ParityError: The engine fails, or is not what the manifest says.
    """
    from llmc.artifact.store import open_artifact
    from llmc.backends.generate import generate_text
    from llmc.backends.greedy import stream_text
    from llmc.backends.special_tokens import read_stop_tokens
    from llmc.backends.tensorrt_session import EngineSession
    from llmc.checkpoint.tokenizer import load_tokenizer
    from llmc.pipeline.engines import require_engine
    from llmc.pipeline.kernels import require_kernels

    artifact = open_artifact(path)
    manifest = artifact.manifest
    require_kernels(artifact)
    if not manifest.engines:
        generate_text(path, prompt, max_tokens, emit, chat=True)
        return
    session = EngineSession(path, require_engine(manifest), manifest.interface)
    stop = read_stop_tokens(path)
    stream_text(session, load_tokenizer(path), path, prompt, max_tokens, stop, emit)
    for note in session.notes:
        progress.note(note)
