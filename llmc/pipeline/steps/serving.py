"""The file by which a runtime serves an artifact: genai_config.json, or generation_config.json of engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmc.backends.special_tokens import write_generation_config
from llmc.config import Backend, Target

if TYPE_CHECKING:
    from llmc.checkpoint import Checkpoint
    from llmc.graph.model import Graph


def write_serving(
    folder: Path,
    target: Target,
    threads: int | None,
    checkpoint: Checkpoint,
    graph: Graph,
    library: str | None,
) -> None:
    """Write the file beside the tokenizer's files in `folder`.

    Args:
        threads: Intra-op threads; None leaves them to the runtime.
        checkpoint: What was compiled.
        graph: As it is written.
        library: File with custom operators that the graph uses; None for none.

    Raises:
        UnsupportedError: onnxruntime-genai cannot serve the graph.
    """
    from llmc.backends.onnxruntime.genai import shares_cache, write_genai_config

    interface = graph.interface()
    config, settings = checkpoint.config, checkpoint.generation_config()
    if target.backend is not Backend.ONNXRUNTIME:
        write_generation_config(folder, config, settings, interface.vocabulary)
        return
    write_genai_config(
        folder,
        config,
        settings,
        interface,
        target.provider,
        threads,
        share_cache=shares_cache(graph.model, interface),
        library=library,
        lookup=target.lookup,
    )
