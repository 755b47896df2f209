"""One runner of `serving.py` in a process of its own: serves a folder with onnxruntime-genai.

Reads one JSON request a line from stdin and answers each with one line:
{"prompt": n, "steps": m} -> {"ttft_ms": t, "step_ms": [m figures], "peak_bytes": b}
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from llmc.validate.footprint import resident_bytes


def main(folder: Path, threads: int) -> None:
    config = og.Config(str(folder))
    session = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(serve(model, request["prompt"], request["steps"])), flush=True)


def serve(model: "og.Model", prompt: int, steps: int) -> dict[str, object]:
    """One prompt of tokens from all over the vocabulary, then `steps` tokens one by one."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=prompt + steps + 1, min_length=prompt + steps + 1, do_sample=False)
    generator = og.Generator(model, params)
    ids = (np.arange(prompt, dtype=np.int64) * 7919 % 40000 + 100).astype(np.int32)
    start = time.perf_counter()
    generator.append_tokens(ids)
    generator.generate_next_token()
    ttft = time.perf_counter() - start
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        generator.generate_next_token()
        times.append(1e3 * (time.perf_counter() - start))
    return {"ttft_ms": 1e3 * ttft, "step_ms": times, "peak_bytes": resident_bytes()[0] or 0}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
