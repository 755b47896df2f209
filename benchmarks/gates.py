"""Measure the quality gates on several models, to see whether one set of bounds fits them.

    python benchmarks/gates.py [--models demo,rescaled,gemma3-270m,gemma3-270m.gguf] [--targets NAME,…]

Each model is built and verified for each target, as `llmc build` does it. `demo.gguf` and `gemma3-270m.gguf`
are the files as published, whose codes are kept; `rescaled` and `gemma3-270m` are the same models as
floats off the grid of the files (benchmarks/models.py). Each line has the megabytes of the source and of the
artifact, KL divergence in nats per token, top-1 agreement, the ratio of perplexities, the ratio of the KL
divergence to that of plain rounding, the seconds that it took, and the gates that were missed.
"""

from pathlib import Path

from common.artifacts import show_progress
from common.machine import describe
from common.models import gemma_file
from common.options import add_cache, make_parser
from common.sources import NAMES, checkpoint

from llmc.artifact.manifest import REPORTS
from llmc.checkpoint import open_checkpoint
from llmc.config import Metric
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.report import read_report

FIGURES = (Metric.TEXT_KL_MEAN, Metric.TEXT_TOP1, Metric.TEXT_PERPLEXITY_RATIO, Metric.TEXT_KL_RATIO)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", default="demo.gguf,rescaled,gemma3-270m.gguf,gemma3-270m")
    parser.add_argument("--targets", default="cpu-int4,cpu-mixed-compiled,cpu-int8-compiled")
    add_cache(parser)
    options = parser.parse_args()
    print(describe())
    print("model, target: MB, MB; KL, top-1, perplexity ratio, KL ratio; seconds; missed")
    for name in options.models.split(","):
        model = locate(name, options.cache)
        for target in options.targets.split(","):
            print(f"{name}, {target}: {measure(model, target, options.cache)}", flush=True)


def locate(name: str, cache: Path) -> str:
    """Return the argument of `llmc build` for a model."""
    if name == "demo.gguf":
        return "demo"
    if name == "gemma3-270m.gguf":
        return str(gemma_file(cache))
    return str(checkpoint(name, cache)) if name in NAMES else name


def measure(model: str, target: str, cache: Path) -> str:
    """Build and verify a model, and read the figures of its report."""
    output = cache / f"gates-{Path(model).stem}-{target}"
    plan = plan_build(model, target=target, profile="local", output=output)
    result = build(plan, show_progress())
    source = sum(file.stat().st_size for file in open_checkpoint(model).weight_files)
    size = sum(file.bytes for file in result.manifest.files.values())
    values = {m.metric: m.value for m in read_report(result.path / REPORTS / "parity.json").measurements}
    figures = ", ".join("-" if values[m] is None else f"{values[m]:.4f}" for m in FIGURES)
    missed = ", ".join(c.metric.value for c in result.verdict.missed) if result.verdict is not None else "-"
    return f"{source / 1e6:.1f}, {size / 1e6:.1f}; {figures}; {result.seconds:.0f}; {missed or 'none'}"


if __name__ == "__main__":
    main()
