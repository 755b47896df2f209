"""Which candidate of a tuning is best, which goes on, and which is taken."""

from llmc.artifact.tuning import Candidate, Constraints
from llmc.pipeline.tune.choosing import choose, find_front, nearest, survives


def _candidate(kl: float, step: float, size: int = 10, *, spread: float = 0.0) -> Candidate:
    return Candidate(
        digest=f"{kl} {step} {size}",
        label="",
        level=0,
        kl=kl,
        kl_low=kl - spread,
        kl_high=kl + spread,
        step_ratio=step,
        step_low=step,
        step_high=step,
        first_ratio=1.0,
        tokens_per_s=100 / step,
        first_ms=1.0,
        bytes=size,
        model={},
    )


def test_the_front_and_what_is_taken() -> None:
    good, fast, small, bad = (
        _candidate(0.1, 1.0),
        _candidate(0.3, 0.5),
        _candidate(0.4, 1.5, 5),
        _candidate(0.4, 1.1),
    )
    everything = [bad, small, fast, good]
    assert find_front(everything) == [good, fast, small]
    assert choose(everything, Constraints()) == good
    assert choose(everything, Constraints(max_bytes=7)) == small
    assert choose(everything, Constraints(min_tokens_per_s=150)) == fast
    assert choose(everything, Constraints(max_kl=0.35)) == fast
    assert choose(everything, Constraints(max_kl=0.5, min_tokens_per_s=60)) == small
    unsure = _candidate(0.34, 0.4, spread=0.02)
    assert choose([*everything, unsure], Constraints(max_kl=0.35)) == fast  # its interval ends beyond
    asked = Constraints(max_kl=0.29, max_bytes=9)
    assert choose(everything, asked) is None
    assert nearest(everything, asked) == good


def test_the_better_half_goes_on() -> None:
    line = [_candidate(kl, kl) for kl in (1.0, 2.0, 3.0, 4.0)]
    assert [survives(c, line, Constraints()) for c in line] == [True, True, False, False]
    front = [_candidate(kl, 1 / kl) for kl in (1.0, 2.0, 3.0, 4.0)]
    assert all(survives(c, front, Constraints()) for c in front)
    assert survives(line[3], [line[3]], Constraints())
    assert not survives(line[3], [line[3]], Constraints(max_kl=3.5))
    assert survives(line[3], line, Constraints(max_kl=3.5)) is False
    assert survives(line[2], line[2:], Constraints(max_kl=3.5))
