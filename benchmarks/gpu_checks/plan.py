"""List the checks in their order: cheap ones and those that decide most come first."""

from __future__ import annotations

from gpu_checks.build import check_build
from gpu_checks.checks import Check, Point, Settings
from gpu_checks.commands import check_bench, check_doctor, check_verify
from gpu_checks.engines import check_engine
from gpu_checks.genai import check_genai
from gpu_checks.machine import check_environment, check_probe
from gpu_checks.memory import check_energy, check_memory
from gpu_checks.parity import check_original, check_parity
from gpu_checks.placement import check_placement
from gpu_checks.speed import check_compiled, check_decode, check_ttft
from gpu_checks.subjects import DEMO, ENGINE, LARGE, Subject
from llmc.backends.tensorrt.support import BUILDS_FOR
from llmc.catalog import load_profile

INT4, FP16 = "cuda-int4", "cuda-fp16"
#: Types whose tiny models are compared: dense, with windows, with experts, and with each kind of state.
TINY = ("llama", "gemma3_text", "qwen3_moe", "qwen3_next", "mamba", "lfm2")
BATCHES, CONTEXTS = (1, 8, 32), (128, 1024, 8192)
#: What the first minutes are for.
FIRST = (Point(1, 128), Point(1, 1024))
ENGINES = ("tensorrt-fp16", "tensorrt-int4")


def list_subjects() -> list[Subject]:
    """Return the artifacts for CUDA."""
    sources = (*TINY, DEMO, LARGE)
    return [Subject(source, target) for source in sources for target in (FP16, INT4)]


def list_checks(settings: Settings) -> list[Check]:
    """Return all checks in their order; builds stand first and are only run for checks that need them."""
    cuda = list_subjects()
    engines = _engines(settings)
    builds = [_build(subject) for subject in (*cuda, *engines)]
    return [
        *builds,
        Check("environment", check_environment, seconds=5, computed=False),
        Check("probe", check_probe, seconds=5),
        Check("doctor", check_doctor, seconds=15, gpu=False, computed=False),
        *_numbers(cuda),
        *_first_speeds(),
        *_against_pytorch(cuda),
        *(Check("engine", check_engine, subject, seconds=15) for subject in engines),
        *_further_speeds(),
        *(Check("verify", check_verify, Subject(DEMO, t), seconds=60, fresh=True) for t in (INT4, FP16)),
        Check("bench", check_bench, Subject(DEMO, INT4), seconds=60, fresh=True),
        *_further_compiled(),
    ]


def _build(subject: Subject) -> Check:
    seconds = 10 if subject.tiny else 45 if subject.source == DEMO else 90
    return Check("build", check_build, subject, seconds=seconds, gpu=False, computed=False)


def _numbers(subjects: list[Subject]) -> list[Check]:
    """Return the checks of numbers and of placement; the larger shape is for speed alone."""
    compared = [subject for subject in subjects if subject.source != LARGE]
    return [
        *(Check("parity", check_parity, s, seconds=4 if s.tiny else 20) for s in compared),
        *(Check("placement", check_placement, s, seconds=2 if s.tiny else 8) for s in compared),
        *_overheads(),
        Check("genai", check_genai, Subject("llama", INT4), seconds=5, gpu=False),
        Check("genai", check_genai, Subject(DEMO, INT4), seconds=10),
    ]


def _overheads() -> list[Check]:
    """Return the checks of speed, memory and energy of a tiny model: what a step costs beside its weights."""
    tiny = Subject("llama", INT4)
    return [
        Check("decode", check_decode, tiny, FIRST[0], seconds=5),
        Check("ttft", check_ttft, tiny, FIRST[0], seconds=3),
        Check("energy", check_energy, tiny, FIRST[0], seconds=10),
        Check("memory", check_memory, tiny, FIRST[0], seconds=8, fresh=True),
    ]


def _against_pytorch(subjects: list[Subject]) -> list[Check]:
    """Return the comparisons with PyTorch; without a GPU, only of tiny models."""
    compared = [subject for subject in subjects if subject.source != LARGE]
    return [
        Check("pytorch", check_original, s, seconds=4 if s.tiny else 30, gpu=not s.tiny) for s in compared
    ]


def _first_speeds() -> list[Check]:
    """Return the checks of speed that matter most: 4-bit weights, one row."""
    checks = []
    for source in (DEMO, LARGE):
        subject = Subject(source, INT4)
        checks += [Check("decode", check_decode, subject, point, seconds=10) for point in FIRST]
        checks.append(Check("compiled", check_compiled, subject, FIRST[0], seconds=45))
        checks.append(Check("ttft", check_ttft, subject, FIRST[1], seconds=6))
    return checks


def _further_speeds() -> list[Check]:
    """Return all other checks of speed, memory and energy, small batches first."""
    subjects = [Subject(source, target) for target in (INT4, FP16) for source in (DEMO, LARGE)]
    first = {check.id for check in _first_speeds()}
    checks = [Check("memory", check_memory, s, FIRST[1], seconds=10, fresh=True) for s in subjects]
    checks += [Check("energy", check_energy, s, FIRST[0], seconds=12) for s in subjects]
    checks += [Check("genai", check_genai, s, seconds=10) for s in subjects if s != Subject(DEMO, INT4)]
    for point in _points():
        checks += [Check("decode", check_decode, s, point, seconds=8) for s in subjects]
        if point.batch == 1:
            checks += [Check("ttft", check_ttft, s, point, seconds=5) for s in subjects]
    return [check for check in checks if check.id not in first]


def _further_compiled() -> list[Check]:
    """Return the other comparisons with torch.compile, which compiles anew for each point."""
    first = {check.id for check in _first_speeds()}
    pairs = [(Subject(source, INT4), point) for point in _points() for source in (DEMO, LARGE)]
    pairs += [(Subject(source, FP16), point) for point in FIRST for source in (DEMO, LARGE)]
    checks = [Check("compiled", check_compiled, subject, point, seconds=45) for subject, point in pairs]
    return [check for check in checks if check.id not in first]


def _points() -> list[Point]:
    return [Point(batch, context) for batch in BATCHES for context in CONTEXTS]


def _engines(settings: Settings) -> list[Subject]:
    """Return the artifacts with engines; none where no TensorRT builds for this GPU."""
    capability = load_profile(settings.profile).compute_capability
    if not any(capability in known for known in BUILDS_FOR.values()):
        return []
    return [Subject(source, target) for source in (ENGINE, DEMO) for target in ENGINES]
