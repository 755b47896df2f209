"""Serve a `Runner` of runners.py in a separate process, in the environment of its runtime.

    python worker.py genai|llama|openvino MODEL THREADS

Reads one JSON request per line from stdin and answers each with one line:
{"prompt": n, "steps": m, "batch": k} -> {"ttft_ms": t, "step_ms": [m figures], "peak_bytes": b}, for k
prompts of n tokens at once; only genai supports more than one.
{"score": IDS, "prefix": n, "into": FILE} -> {}: IDS is a file of (windows, length) tokens; FILE gets the
logits of positions n - 1 to length - 2, (windows, length - n, vocabulary) float32, each window's first n
tokens prefilled and the rest decoded one by one.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


class Genai:
    """The runner of a folder of onnxruntime-genai."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai

        self._og = onnxruntime_genai
        config = self._og.Config(str(folder))
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = self._og.Model(config)
        self._generator: Any = None

    def begin(self, length: int, batch: int = 1) -> None:
        """Forget the previous sequence; up to `length` tokens follow."""
        self._generator = None  # releases its cache before the next one is created
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=batch)
        self._generator = self._og.Generator(self._model, params)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Feed tokens (n,) int32; return the logits after the last, (vocabulary,)."""
        self._generator.append_tokens(ids)
        logits: np.ndarray = self._generator.get_output("logits")[0, -1]
        return logits

    def time(self, ids: np.ndarray, steps: int) -> tuple[float, list[float]]:
        """Return the seconds to the first token of prompts (batch, n), and of each of `steps` after it."""
        self.begin(ids.shape[1] + steps + 1, len(ids))
        start = time.perf_counter()
        self._generator.append_tokens(ids)
        self._generator.generate_next_token()
        first = time.perf_counter() - start
        return first, [clocked(self._generator.generate_next_token) for _ in range(steps)]


class Llama:
    """The runner of a GGUF file with llama.cpp."""

    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp

        self._cpp = llama_cpp
        self._open = lambda length: llama_cpp.Llama(
            str(file), n_ctx=length, n_threads=threads, n_threads_batch=threads, n_batch=2048, verbose=False
        )
        self._model = self._open(2048)

    def begin(self, length: int) -> None:
        if length > self._model.n_ctx():
            self._model = self._open(length)
        self._model.reset()

    def feed(self, ids: np.ndarray) -> np.ndarray:
        self._model.eval(ids.tolist())
        pointer = self._cpp.llama_get_logits_ith(self._model.ctx, -1)
        return np.ctypeslib.as_array(pointer, (self._model.n_vocab(),))

    def time(self, ids: np.ndarray, steps: int) -> tuple[float, list[float]]:
        (prompt,) = ids
        self.begin(len(prompt) + steps + 1)
        start = time.perf_counter()
        token = self.feed(prompt).argmax()
        first = time.perf_counter() - start
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            token = self.feed(np.array([token], np.int32)).argmax()
            times.append(time.perf_counter() - start)
        return first, times


class OpenVino:
    """The runner of a folder of optimum-intel: openvino-genai's pipeline for times, the model for logits."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder = folder
        self._settings = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline: Any = None
        self._request: Any = None
        self._past = 0

    def begin(self, length: int) -> None:
        import openvino

        if self._request is None:
            model = openvino.Core().compile_model(self._folder / "openvino_model.xml", "CPU", self._settings)
            self._request = model.create_infer_request()
        self._request.reset_state()
        self._past = 0

    def feed(self, ids: np.ndarray) -> np.ndarray:
        past, self._past = self._past, self._past + len(ids)
        answer = self._request.infer(
            {
                "input_ids": ids[None].astype(np.int64),
                "attention_mask": np.ones((1, self._past), np.int64),
                "position_ids": np.arange(past, self._past)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        logits: np.ndarray = answer["logits"][0, -1]
        return logits

    def time(self, ids: np.ndarray, steps: int) -> tuple[float, list[float]]:
        import openvino
        import openvino_genai

        if self._pipeline is None:
            self._pipeline = openvino_genai.LLMPipeline(str(self._folder), "CPU", **self._settings)
        config = openvino_genai.GenerationConfig(max_new_tokens=steps + 1, ignore_eos=True, do_sample=False)
        (prompt,) = ids
        tokens = openvino.Tensor(prompt[None].astype(np.int64))
        start, stamps = time.perf_counter(), []

        class Clock(openvino_genai.StreamerBase):  # type: ignore[misc]
            def write(self, _: Any) -> Any:
                stamps.append(time.perf_counter())
                return openvino_genai.StreamingStatus.RUNNING

            def end(self) -> None:
                """Do nothing: no text is held back."""

        self._pipeline.generate(
            openvino_genai.TokenizedInputs(tokens, openvino.Tensor(np.ones((1, len(prompt)), np.int64))),
            config,
            Clock(),
        )
        return stamps[0] - start, np.diff(stamps).tolist()


RUNTIMES = {"genai": Genai, "llama": Llama, "openvino": OpenVino}


def clocked(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def score(runner: Any, windows: np.ndarray, prefix: int, into: Path) -> None:
    """Write the logits that the runner returns for a text."""
    logits_file = None
    for at, window in enumerate(windows.astype(np.int32)):
        runner.begin(len(window))
        for step in range(len(window) - prefix):
            part = window[:prefix] if step == 0 else window[prefix + step - 1 : prefix + step]
            logits = runner.feed(part)
            if logits_file is None:
                shape = (len(windows), windows.shape[1] - prefix, len(logits))
                logits_file = np.lib.format.open_memmap(into, "w+", np.float32, shape)
            logits_file[at, step] = logits


def main(runtime: str, model: Path, threads: int) -> None:
    runner = RUNTIMES[runtime](model, threads)
    print("ready", flush=True)
    for count, line in enumerate(sys.stdin):
        request = json.loads(line)
        answer: dict[str, object] = {}
        if "score" in request:
            score(runner, np.load(request["score"]), request["prefix"], Path(request["into"]))
        else:
            # Each prompt is different, since a runtime may reuse the cache of a known prompt.
            starts = 31 * (count + np.arange(request["batch"]))
            ids = np.arange(request["prompt"], dtype=np.int64) * 7919 + starts[:, None]
            first, steps = runner.time((ids % 40000 + 100).astype(np.int32), request["steps"])
            answer = {"ttft_ms": 1e3 * first, "step_ms": [1e3 * s for s in steps], "peak_bytes": peak_bytes()}
        print(json.dumps(answer), flush=True)


def peak_bytes() -> int:
    """Return the peak resident set of this process (VmHWM of proc(5)); rusage includes the parent's."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
