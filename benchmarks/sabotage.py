"""Print which check catches which sabotage, as a Markdown table.

    python benchmarks/sabotage.py

Uses the artifacts and the sabotages of the test suite: tiny models, broken in one way at a time.
"""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from common.options import make_parser

from llmc.artifact.verdict import CheckStatus
from llmc.config import Metric
from llmc.pipeline import verify
from llmc.progress import SilentProgress
from llmc.report import Report
from tests.pipeline.sabotage import SABOTAGES, copy_artifact, reseal
from tests.pipeline.sabotage_contents import CONTENT_SABOTAGES
from tests.pipeline.sabotage_files import FILE_SABOTAGES
from tests.pipeline.sabotage_positions import CONTEXT, FAULTS, Fault
from tests.pipeline.test_sabotage import TEXT, build_good
from tests.pipeline.test_sabotage_positions import LEVELS, build_long, verify_long

HEADER = """# What was done to a good artifact, and which checks failed

From `python benchmarks/sabotage.py`: a tiny mistral with a sliding window of 8, as `cpu-fp32` (float), as
`cpu-int4` and as `cpu-int4-compiled` (compiled). The test suite holds that the checks in bold fail. Unless a
row says otherwise the manifest was made to describe the changed files, so that no digest gives the change
away. Faults of the compiled kernels themselves are in [trust.md](trust.md#compiled-kernels).

| sabotage | artifact | checks that failed |
|---|---|---|"""

LONG_HEADER = """
## In some places of the context alone

A tiny llama of one layer with {context:,} positions, with seed 7 and a budget of 34 s. Where a row says
nothing else, all logits of such steps are negated. Levels alone are listed; `graph.mismatches` fails in every
row.

| sabotage | cpu-fp32 | cpu-int4 | cpu-int4-compiled |
|---|---|---|---|"""


def main() -> None:
    make_parser(__doc__).parse_args()
    print(HEADER)
    with TemporaryDirectory() as place:
        root = Path(place)
        os.environ["LLMC_CACHE"] = str(root / "cache")
        good = build_good(root)
        (root / "text").write_text(TEXT, encoding="utf-8")
        for sabotage in (*SABOTAGES, *CONTENT_SABOTAGES, *FILE_SABOTAGES):
            folder = copy_artifact(good[sabotage.artifact], root / "broken")
            sabotage.apply(folder)
            if sabotage.sealed:
                reseal(folder)
            report = verify(
                folder, None, (str(root / "text"),), SilentProgress(), every=True, own_gates=True
            ).report
            how = "" if sabotage.sealed else " (manifest untouched)"
            named = ", ".join(f"**{m}**" if m in sabotage.caught else m.value for m in _failed(report))
            print(f"| {sabotage.name}{how} | {sabotage.artifact} | {named} |", flush=True)
            shutil.rmtree(folder)
        print(LONG_HEADER.format(context=CONTEXT))
        long = build_long(root / "long")
        for fault in FAULTS:
            cells = [_look(fault, folder, root / "long") for folder in long.values()]
            print(f"| {fault.name} | {' | '.join(cells)} |", flush=True)


def _look(fault: Fault, good: Path, root: Path) -> str:
    """Return the levels that an artifact with a fault fails, in bold those that the test suite requires."""
    folder = copy_artifact(good, root / "broken")
    fault.apply(folder)
    reseal(folder)
    failed = _failed(verify_long(folder, root))
    shutil.rmtree(folder)
    assert Metric.GRAPH in failed
    levels = [m for m in failed if m.value.partition(".")[0] in LEVELS]
    return ", ".join(f"**{m}**" if m.value.partition(".")[0] in fault.caught else m.value for m in levels)


def _failed(report: Report) -> list[Metric]:
    return [c.metric for c in report.verdict.missed if c.status is CheckStatus.FAIL]


if __name__ == "__main__":
    main()
