"""Run the stations in order: what each command does, from a model to an artifact and its verdict.

Only this package imports all stations. As a rule, modules that load onnx_ir, torch or a runtime are imported
inside functions, and everything else at the top of each file.
"""

from llmc.pipeline.bench import bench
from llmc.pipeline.bisect import bisect
from llmc.pipeline.build import build
from llmc.pipeline.check import check
from llmc.pipeline.check_servers import check_servers, parse_runtimes
from llmc.pipeline.compare import compare
from llmc.pipeline.explain import explain
from llmc.pipeline.inspect import inspect
from llmc.pipeline.reports import report
from llmc.pipeline.resume import resume
from llmc.pipeline.run import run
from llmc.pipeline.support import support
from llmc.pipeline.tune.plan import plan_tune
from llmc.pipeline.tune.tune import tune
from llmc.pipeline.verify import verify

__all__ = [
    "bench",
    "bisect",
    "build",
    "check",
    "check_servers",
    "compare",
    "explain",
    "inspect",
    "parse_runtimes",
    "plan_tune",
    "report",
    "resume",
    "run",
    "support",
    "tune",
    "verify",
]
