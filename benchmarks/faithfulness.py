"""Measure what a target's weights cost: NLL, KL divergence and top-1 agreement over stored bits per weight.

    python benchmarks/faithfulness.py [--checkpoint rescaled|demo] [--targets cpu-int4,cpu-mixed]

8 windows of 512 tokens of the evaluation text are measured; 32 tokens of each are prefilled and the rest is
decoded one by one, all windows as one batch. Differences are to PyTorch in float32; bits count every matrix
with its scales and zero points. The build itself reports its time and peak memory, without verification.
"""

import numpy as np
from common.artifacts import build_target, open_model
from common.fidelity import PREFIX, WINDOW, compare_logits, cut_windows, reference
from common.machine import describe
from common.options import add_checkpoint, make_parser
from common.sources import checkpoint

from llmc.artifact.store.folder import Artifact, open_artifact
from llmc.checkpoint import open_checkpoint


def main() -> None:
    parser = make_parser(__doc__)
    add_checkpoint(parser, "rescaled", ("demo", "rescaled"))
    parser.add_argument("--targets", default="cpu-int4,cpu-int4-gptq,cpu-mixed")
    options = parser.parse_args()
    source = open_checkpoint(str(checkpoint(options.checkpoint, options.cache)))
    windows = cut_windows(source)
    original = reference(source, windows, options.cache / f"{options.checkpoint}-logits.npy")
    print(describe())
    for name in options.targets.split(","):
        result = build_target(source.path, name, options.cache)
        figures = compare(open_artifact(result.path), windows, original)
        memory = (result.peak_rss_bytes or 0) / 1e9
        print(f"{name:16} {figures}, built in {result.seconds:.0f} s, {memory:.2f} GB", flush=True)


def compare(artifact: Artifact, windows: np.ndarray, original: np.ndarray) -> str:
    """Return the figures of one artifact."""
    weights = artifact.manifest.weights
    bits = 8 * sum(w.bytes for w in weights) / sum(int(np.prod(w.shape)) for w in weights)
    model = open_model(artifact.path)
    logits = np.empty_like(original)
    logits[:, 0] = model.prefill(windows[:, :PREFIX], steps=WINDOW - PREFIX)[:, -1]
    for step in range(1, WINDOW - PREFIX):
        logits[:, step] = model.decode(windows[:, PREFIX + step - 1 : PREFIX + step])[:, -1]
    nll, kl, top1 = compare_logits(logits, windows, original)
    return f"{bits:.2f} bits, dNLL {nll:+.4f}, KL {kl:.4f}, top-1 {top1:.3f}"


if __name__ == "__main__":
    main()
