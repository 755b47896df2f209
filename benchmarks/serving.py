"""Compare decode speed, time to first token, size, memory and fidelity with the tools that others would use.

    python benchmarks/serving.py [--checkpoint demo|rescaled|llama-1b] [--target cpu-int4 …]
        [--peer genai-int4 llama-Q4_0 openvino-int4 …] [--batch 1] [--json FILE]

Builds the artifacts and the peers' models from one Hugging Face folder. Every runner is a separate process,
with onnxruntime-genai for llmc's; they are asked in turn, so that noise of the machine affects all alike.
Ratios are ours / the peer's, of the medians over all rounds, with the range over the rounds. A batch consists
of as many prompts at once, in ours and in onnxruntime-genai's; its tokens per second are the sum.

Fidelity is measured on what is served: windows of 512 tokens of the evaluation text, 32 tokens of each
prefilled and the rest decoded one by one, compared with PyTorch in float32. dNLL and KL divergence are in
nats per token; sizes are those of the model's files, including its graph.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from common.fidelity import PREFIX, WINDOW, WINDOWS, compare_logits, cut_windows, reference
from common.machine import describe
from common.options import add_checkpoint, add_timing, make_parser
from common.peers import NAMES as PEERS
from common.peers import build_peer
from common.runners import Runner, build_ours, take_turns
from common.sources import checkpoint
from common.timing import ratio

from llmc.checkpoint import open_checkpoint


def main() -> None:
    parser = make_parser(__doc__)
    add_checkpoint(parser)
    parser.add_argument("--target", action="append", help="default: cpu-int4; may be given several times")
    parser.add_argument("--peer", choices=PEERS, nargs="*", default=["genai-int4"])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 1024])
    add_timing(parser)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--no-quality", action="store_true", help="skip fidelity")
    parser.add_argument("--path", type=Path, help="a folder with targets/ of your own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.batch > 1 and any(not name.startswith("genai") for name in options.peer):
        parser.error("only peers of onnxruntime-genai support a batch")

    source = checkpoint(options.checkpoint, options.cache)
    targets = options.target or ["cpu-int4"]
    ours = [build_ours(source, name, options) for name in targets]
    built = {name: build_peer(name, source, options.cache) for name in options.peer}
    peers = [Runner(name, p.model, p.bytes, p.runtime, p.python) for name, p in built.items()]
    runners = [*ours, *peers]
    if not options.no_quality:
        measure(source, runners, options)
    take_turns(runners, options.prompts, options)
    report(ours, peers, options)


def measure(source: Path, runners: list[Runner], options: argparse.Namespace) -> None:
    """Measure the fidelity of each runner, in a separate process each."""
    origin = open_checkpoint(str(source))
    windows = cut_windows(origin)
    original = reference(origin, windows, options.cache / f"{source.name}-logits.npy")
    with tempfile.TemporaryDirectory(dir=options.cache) as scratch:
        ids, logits = Path(scratch) / "ids.npy", Path(scratch) / "logits.npy"
        np.save(ids, windows)
        for runner in runners:
            runner.start(options.threads)
            runner.request(score=str(ids), prefix=PREFIX, into=str(logits))
            runner.stop()
            runner.quality = compare_logits(np.load(logits, mmap_mode="r"), windows, original)
            print(f"{runner.name}: {figures(runner)}", file=sys.stderr)


def figures(runner: Runner) -> list[str]:
    return ["-"] * 3 if runner.quality is None else [f"{value:.4f}" for value in runner.quality]


def report(ours: list[Runner], peers: list[Runner], options: argparse.Namespace) -> None:
    print(describe())
    print(
        f"{options.checkpoint}, {options.threads} threads, batch {options.batch}, "
        f"{options.rounds} rounds of {options.steps} steps"
        + ("" if options.no_quality else f"; fidelity on {WINDOWS} windows of {WINDOW} tokens")
    )
    header = ["", "MB", "dNLL", "KL", "top-1", "peak MB"]
    header += [f"TTFT {p}" for p in options.prompts] + [f"tok/s @{p}" for p in options.prompts]
    rows = [header]
    for runner in [*ours, *peers]:
        row = [runner.name, f"{runner.bytes / 1e6:.1f}", *figures(runner), f"{runner.peak_bytes / 1e6:.0f}"]
        row += [f"{np.median(runner.ttft_ms[p]):.0f} ms" for p in options.prompts]
        row += [f"{1e3 * options.batch / np.median(runner.step_ms[p]):.1f}" for p in options.prompts]
        rows.append(row)
    for runner in ours:
        for peer in peers:
            row = [f"{runner.name} / {peer.name}", f"{runner.bytes / peer.bytes:.3f}", "", "", ""]
            row.append(f"{runner.peak_bytes / peer.peak_bytes:.2f}")
            row += [ratio(runner.ttft_ms[p], peer.ttft_ms[p]) for p in options.prompts]
            row += [ratio(peer.step_ms[p], runner.step_ms[p]) for p in options.prompts]
            rows.append(row)
    widths = [max(len(r[i]) for r in rows) for i in range(len(header))]
    for row in rows:
        cells = (
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells))
    if options.json:
        hidden = ("process", "model", "python")
        records = [{k: v for k, v in vars(r).items() if k not in hidden} for r in [*ours, *peers]]
        options.json.write_text(json.dumps({"machine": describe(), "runners": records}, indent=1))


if __name__ == "__main__":
    main()
