"""Answer a request by the exporter of TensorRT Edge-LLM, which needs no GPU; `worker.py` runs this there.

The exporter reads the checkpoint, packs its weights as its kernels want them, and writes an ONNX graph. The
kernels need a GPU, so that nothing is executed: the answer is what was read, and the graph.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmc.servers.worker import Channel


class _Count(logging.Handler):
    """The tensors that the exporter's loader says it loaded and skipped."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.taken = 0
        self.skipped = 0
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        arguments = record.args if isinstance(record.args, tuple) else ()
        if str(record.msg).startswith("Loaded %d tensors"):
            self.taken += int(str(arguments[0]))
            self.skipped += int(str(arguments[1]))
        elif str(record.msg).startswith("Key not found"):
            self.names.append(str(arguments[0]))

    def all_skipped(self) -> list[str]:
        """Return the names of skipped tensors, and a placeholder for each that the loader does not name."""
        return self.names + [f"tensor {n + 1} without a name" for n in range(self.skipped - len(self.names))]


def main(request: dict[str, Any], channel: Channel) -> None:
    """Export the folder, and name the graph."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from importlib import metadata

    from tensorrt_edgellm.scripts import export

    channel.version(metadata.version("tensorrt-edgellm"), "exporter on the CPU")
    count = _Count()
    logger = logging.getLogger("tensorrt_edgellm.checkpoint.loader")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(count)
    output = Path(request["scratch"]) / "exported"
    sys.argv = ["export", request["folder"], str(output)]
    try:
        export.main()
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError(f"the exporter ended with exit code {end.code}") from end
    channel.loaded(count.taken, count.all_skipped(), [], "float16")
    channel.send(
        "answer",
        token_ids=None,
        logits=None,
        log_probabilities=None,
        greedy=None,
        graph=str((output / "llm" / "model.onnx").relative_to(request["scratch"])),
    )
