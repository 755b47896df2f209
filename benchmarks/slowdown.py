"""Measure how often the latency gate fails without cause, and whether it detects a slow-down of 10 %.

    python benchmarks/slowdown.py --artifact artifacts/demo/cpu-int4@local

An artifact is timed twenty times each against itself as an earlier release, unchanged and with every step
made longer by 10 %, and compared with its target's gate on `latency.previous_ratio`.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common.options import make_parser
from common.timing import seconds_of

from llmc.artifact.store.folder import open_artifact
from llmc.artifact.verdict import CheckStatus
from llmc.config import Metric
from llmc.data import eval_text
from llmc.pipeline.steps.original import tokenize
from llmc.runtime.ort_model import OrtModel, shares_buffer
from llmc.validate.gates import evaluate
from llmc.validate.rival import CONTEXT, Pairing, measure_rival


class Slowed(OrtModel):
    """The same artifact with every step made longer by a fraction of its own time."""

    slower = 0.0

    def next_tokens(self, tokens: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        chosen = super().next_tokens(tokens)
        until = start + (1 + self.slower) * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass
        return chosen


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--slower", type=float, nargs="+", default=[0.0, 0.10])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    from transformers import AutoTokenizer

    manifest = open_artifact(options.artifact).manifest
    tokens, _ = tokenize(AutoTokenizer.from_pretrained(options.artifact), eval_text())
    gates = [g for g in manifest.target.gates if g.metric is Metric.PREVIOUS_RATIO]
    if not gates:
        parser.error(
            f"the target {manifest.target.name} of {options.artifact} has no gate on {Metric.PREVIOUS_RATIO}"
        )
    settings: dict[str, Any] = {"threads": options.threads, "share_buffer": shares_buffer(options.artifact)}
    previous = partial(OrtModel, options.artifact, manifest.interface, **settings)
    model = partial(Slowed, options.artifact, manifest.interface, **settings)
    prompt = tokens[:CONTEXT]
    fast = fastest_step(previous(), prompt)
    print(f"a step takes {1e3 * fast:.2f} ms at best; gate {gates[0].max}", flush=True)
    for extra in options.slower:
        name = f"{100 * extra:.0f} % slower" if extra else "A/A"
        Slowed.slower = extra
        failures = []
        for _ in range(options.runs):
            start = time.perf_counter()
            ratio = measure_rival(model, previous, prompt, Pairing())
            failed = evaluate(gates, [ratio]).checks[0].status is CheckStatus.FAIL
            failures.append(failed)
            seconds = time.perf_counter() - start
            print(f"  {name}: {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}), {ratio.detail},"
                  f" {seconds:.0f} s, {'FAILS' if failed else 'passes'}", flush=True)  # fmt: skip
        print(f"{name}: {sum(failures)} of {len(failures)} runs fail the gate", flush=True)


def fastest_step(model: OrtModel, prompt: np.ndarray) -> float:
    """Return the seconds of the fastest of 64 steps."""
    model.prefill(prompt[None], steps=64)
    return min(seconds_of(lambda: model.decode(np.array([[1]]))) for _ in range(64))


if __name__ == "__main__":
    main()
