"""Which check catches which sabotage, as a Markdown table.

    python benchmarks/sabotage.py

Takes the artifacts and the sabotages of the test suite: tiny models, broken one way at a time.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmc.artifact.verdict import CheckStatus
from llmc.pipeline import verify
from llmc.progress import SilentProgress
from tests.pipeline.sabotage import SABOTAGES, copy_artifact, reseal
from tests.pipeline.sabotage_contents import CONTENT_SABOTAGES
from tests.pipeline.sabotage_files import FILE_SABOTAGES
from tests.pipeline.test_sabotage import TEXT, build_good

HEADER = """# What was done to a good artifact, and which checks failed

From `python benchmarks/sabotage.py`: a tiny mistral with a sliding window of 8, as `cpu-fp32` (float), as
`cpu-int4` and as `cpu-int4-compiled` (compiled). The test suite holds that the checks in bold fail. Unless a
row says otherwise the manifest was made to describe the changed files, so that no digest gives the change
away.

| sabotage | artifact | checks that failed |
|---|---|---|"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
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
            verdict = verify(
                folder, None, (str(root / "text"),), SilentProgress(), every=True, own_gates=True
            ).report.verdict
            failed = [c.metric for c in verdict.missed if c.status is CheckStatus.FAIL]
            named = ", ".join(f"**{m}**" if m in sabotage.caught else m.value for m in failed)
            how = "" if sabotage.sealed else " (manifest untouched)"
            print(f"| {sabotage.name}{how} | {sabotage.artifact} | {named} |", flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
