"""Plant three faults, and report what `llmc bisect` says about them.

    python benchmarks/faults.py --model demo

The faults are in the files of the artifact, in a pass, and between the original and the trace.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from common.options import make_parser

import llmc.passes
from llmc.checkpoint import Checkpoint
from llmc.pipeline import bisect, build
from llmc.plan import plan_build
from llmc.progress import SilentProgress, peak_rss_bytes
from tests.pipeline.sabotage import WrongNorms, copy_artifact, other_attention_scale, reseal


@contextmanager
def in_the_files(artifact: Path) -> Iterator[Path]:
    """The attention scale of layer 1 is changed in model.onnx."""
    with TemporaryDirectory() as place:
        folder = copy_artifact(artifact, Path(place) / "broken")
        other_attention_scale(folder)
        reseal(folder)
        yield folder


@contextmanager
def in_a_pass(artifact: Path) -> Iterator[Path]:
    """The pass for norms gives layer 7 another epsilon."""
    passes = {**llmc.passes.registered_passes(), "rms-norm": WrongNorms(7)}
    with patch.object(llmc.passes, "registered_passes", lambda: passes):
        yield artifact


@contextmanager
def in_the_trace(artifact: Path) -> Iterator[Path]:
    """The up projection of layer 3 is 5 % larger in the original than in the traced model."""
    load = Checkpoint.fill_reference

    def other(self: Checkpoint, *arguments: Any) -> Any:
        model: Any = load(self, *arguments)
        model.model.layers[3].mlp.up_proj.weight.data *= 1.05
        return model

    with patch.object(Checkpoint, "fill_reference", other):
        yield artifact


FAULTS: tuple[Callable[[Path], Any], ...] = (in_the_files, in_a_pass, in_the_trace)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    with TemporaryDirectory() as place:
        output = Path(place) / "artifact"
        plan = plan_build(options.model, target="cpu-int4", profile="local", output=output, verify=False)
        artifact = build(plan, SilentProgress()).path
        for fault in FAULTS:
            with fault(artifact) as folder:
                start = time.perf_counter()
                where = bisect(folder, None, SilentProgress())
            seconds, peak = time.perf_counter() - start, (peak_rss_bytes() or 0) / 1e9
            print(f"{fault.__doc__}\n{where.render().splitlines()[-1]}\n {seconds:.0f} s, peak {peak:.2f} GB",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
