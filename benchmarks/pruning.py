"""Measure what pruning costs: NLL, KL divergence and top-1 agreement by recipe, with and without repair.

    python benchmarks/pruning.py [--checkpoint rescaled|demo] [--recipes layers-1,mlp-10,…] [--windows 20]

The model runs in PyTorch in float32 before and after, without quantization, on 8 windows of 512 tokens of the
evaluation text. Remaining parameters count the embedding once; zeros of 2:4 sparsity count as parameters.
"""

import time

import numpy as np
from common.artifacts import show_progress
from common.fidelity import PREFIX, WINDOW, compare_logits, cut_windows, reference
from common.machine import describe
from common.options import add_checkpoint, make_parser
from common.sources import checkpoint

from llmc.catalog import load_target
from llmc.checkpoint import open_checkpoint
from llmc.config import CalibrationText, NeuronPruning, Pruning
from llmc.pipeline.steps.prune import Pruned, count_parameters, prune
from llmc.validate.reference import TorchModel

MULTIPLE = 64
_LAYERS = ("layers-1", "layers-2", "layers-4")
_REPAIRED = ("mlp-10", "mlp-20", "mlp-30", "heads-1", "2:4")
RECIPES = (*_LAYERS, *(f"{name}{end}" for name in _REPAIRED for end in ("", "-plain")))


def main() -> None:
    parser = make_parser(__doc__)
    add_checkpoint(parser, "rescaled", ("demo", "rescaled"))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--windows", type=int, default=20, help="of calibration text, 512 tokens each")
    options = parser.parse_args()
    source = open_checkpoint(str(checkpoint(options.checkpoint, options.cache)))
    windows = cut_windows(source)
    original = reference(source, windows, options.cache / f"{options.checkpoint}-logits.npy")
    base = load_target("tensorrt-fp16")
    print(describe())
    for name in options.recipes.split(","):
        begun = time.perf_counter()
        target = base.model_copy(update={"prune": recipe(name, options.windows)})
        pruned = prune(source, target, show_progress())
        seconds = time.perf_counter() - begun
        print(f"{name:14} {compare(pruned, windows, original)}, pruned in {seconds:.0f} s", flush=True)


def recipe(name: str, windows: int) -> Pruning:
    """Parse `layers-2`, `mlp-20`, `heads-1` or `2:4`; the suffix `-plain` switches repair off."""
    kind, _, amount = name.removesuffix("-plain").partition("-")
    match kind:
        case "layers":
            what = {"layers": int(amount)}
        case "mlp":
            what = {"mlp": NeuronPruning(fraction=int(amount) / 100, multiple=MULTIPLE)}
        case "heads":
            what = {"kv_groups": int(amount)}
        case _:
            what = {"sparsity": kind}
    text = CalibrationText(window_tokens=WINDOW, max_windows=windows)
    return Pruning(calibration=text, repair=not name.endswith("-plain"), **what)


def compare(pruned: Pruned, windows: np.ndarray, original: np.ndarray) -> str:
    """Return the figures of one pruned model."""
    model = TorchModel(pruned.checkpoint.fill_reference())
    figures = []
    for i, row in enumerate(windows):
        logits = model.logits(row[:-1], keep=WINDOW - PREFIX)
        figures.append(compare_logits(logits[None], windows[i : i + 1], original[i : i + 1]))
    nll, kl, top1 = np.mean(figures, axis=0)
    parameters = count_parameters(pruned.checkpoint) / 1e6
    return f"{parameters:6.1f} M parameters, dNLL {nll:+.4f}, KL {kl:.4f}, top-1 {top1:.3f}"


if __name__ == "__main__":
    main()
