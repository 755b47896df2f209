"""Run a server in its own environment: answer one request of `llmc.servers.client` over pipes.

This program and the modules that it loads are executed by the interpreter of that environment, which has no
llmc: they import the standard library, numpy and the server only. `python -P worker.py NAME` loads the module
worker_NAME.py beside it, reads one line of JSON from standard input, the request, and writes one line of
JSON for each event to what was standard output when it started. Libraries print to standard error instead.

A request has `folder` (the checkpoint), `scratch` (a folder for arrays), `sequences` (token ids whose
log-probabilities are asked), `prompts` (texts to encode), `continue` (token ids to continue greedily),
`new_tokens`, `dtype` (`auto` for the checkpoint's own, or `float32`), `threads`, and `gpu_only`: then it is
enough that the server reads the checkpoint.

Events, each an object with `event`:

- `version`: `version` of the server, and `where` it computes.
- `loaded`: `taken`, the number of tensors of the files that the server took; `skipped`, the names of those
  that it did not take; `unfilled`, the names of its parameters that no tensor filled; `dtype`.
- `progress`: `done` and `total`.
- `answer`: `token_ids` of each prompt by the server's own tokenizer, `greedy` token ids after each of
  `continue`, `logits` and `log_probabilities`, the names of files in `scratch`, one for each sequence:
  (tokens - 1, vocabulary) and (tokens - 1,), float32; `products`, what the server's matrices make of given
  inputs; `graph`, a file that was exported. A part that the server cannot give is null.

A product has `modules`, the names of matrices whose outputs stand one after the other, and the files `inputs`
(rows, inputs) and `outputs` (rows, outputs), float32: the inputs times the matrices, without their bias.
The inputs are signs, so that no quantization of activations changes them, and only the weights are seen.
- `failure`: `phase` (`start`, `load` or `answer`), `kind` and `message`.
"""

import ctypes
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1
#: Rows of the inputs of a product.
PROBES = 8


class Channel:
    """The pipe to the client, on which a worker reports events.

    Args:
        stream: Where the lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.phase = "start"

    def send(self, event: str, **values: Any) -> None:
        """Write one event as a line of JSON."""
        self._stream.write(json.dumps({"event": event, **values}) + "\n")
        self._stream.flush()

    def save(self, scratch: str, name: str, array: Any) -> str:
        """Write an array as float32 into the folder for arrays, and return its name."""
        import numpy as np

        np.save(Path(scratch) / name, np.ascontiguousarray(array, np.float32))
        return name

    def probe(self, inputs: int) -> Any:
        """Return inputs for a product, (PROBES, inputs) float32: signs, which every format holds exactly."""
        import numpy as np

        return np.random.default_rng(inputs).integers(0, 2, (PROBES, inputs)).astype(np.float32) * 2 - 1

    def version(self, version: str, where: str) -> None:
        """Report the server's version and the device that it computes on; loading begins after it."""
        self.send("version", version=version, where=where)
        self.phase = "load"

    def loaded(self, taken: int, skipped: list[str], unfilled: list[str], dtype: str) -> None:
        """Report which tensors were taken; answering begins after it."""
        self.send("loaded", taken=taken, skipped=skipped, unfilled=unfilled, dtype=dtype)
        self.phase = "answer"


def main() -> None:
    """Read a request, and let the server's module answer it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    channel = Channel(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    module = _load(sys.argv[1])
    try:
        module.main(request, channel)
    except Exception as error:
        channel.send("failure", phase=channel.phase, kind=type(error).__name__, message=str(error))
        raise


def _load(name: str) -> Any:
    file = Path(__file__).with_name(f"worker_{name}.py")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
