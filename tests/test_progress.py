"""What is said about stages, and where."""

import io
import re
import time

import pytest
from rich.console import Console

from llmc.progress import (
    PlainProgress,
    Progress,
    SilentProgress,
    TerminalProgress,
    peak_rss_bytes,
    printable,
)


def terminal() -> tuple[TerminalProgress, io.StringIO]:
    text = io.StringIO()
    return TerminalProgress(Console(file=text, force_terminal=True, width=100, highlight=False)), text


def work(progress: Progress) -> None:
    with progress.stage("build"):
        with progress.stage("trace"):
            progress.note("30 layers [bold] of one kind")
        with progress.stage("write"):
            pass


@pytest.mark.parametrize("make", [SilentProgress, PlainProgress, lambda: terminal()[0]])
def test_records_are_kept(make: type[Progress], capsys: pytest.CaptureFixture[str]) -> None:
    progress = make()
    work(progress)
    assert [record.name for record in progress.records] == ["trace", "write", "build"]
    build = progress.records[-1]
    assert build.seconds >= sum(record.seconds for record in progress.records[:-1])
    assert build.peak_rss_bytes == pytest.approx(peak_rss_bytes(), rel=0.2)
    assert capsys.readouterr().out == ""


def test_plain_lines() -> None:
    text = io.StringIO()
    work(PlainProgress(text))
    note, *stages = text.getvalue().splitlines()
    assert note == "30 layers [bold] of one kind"
    assert [line.split("  ")[0] for line in stages] == ["trace", "write", "build"]
    assert all(re.fullmatch(r"\w+  \d+\.\d s(  peak \d+\.\d\d GB)?", line) for line in stages)


def test_plain_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    work(PlainProgress())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "trace" in captured.err


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    work(SilentProgress())
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_terminal_shows_how_far_the_innermost_stage_is() -> None:
    progress, text = terminal()
    with progress.stage("build"), progress.stage("write"):
        progress.advance(30, 90)
        time.sleep(0.3)  # the spinner draws about ten times a second
    progress.advance(1, 2)  # nothing runs, nothing is shown
    assert "write  30 of 90" in text.getvalue()
    assert "1 of 2" not in text.getvalue()


def test_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of a log are half a minute apart; a count that starts anew has a pace of its own."""
    now = [0.0]
    monkeypatch.setattr("llmc.progress.time.perf_counter", lambda: now[0])
    text = io.StringIO()
    progress = PlainProgress(text)
    with progress.stage("original"):
        for at, done in ((0, 0), (20, 2), (40, 4), (50, 5), (80, 0), (120, 8)):
            now[0] = float(at)
            progress.advance(done, 64)
    assert text.getvalue().splitlines()[:-1] == [
        "original  4 of 64, about 10 min left",
        "original  0 of 64",
        "original  8 of 64, about 5 min left",
    ]


def test_a_terminal_shows_what_runs_and_what_is_done() -> None:
    progress, text = terminal()
    work(progress)
    assert "✓ trace" in text.getvalue()
    assert "30 layers [bold] of one kind" in text.getvalue()
    assert text.getvalue().count("\x1b[?25l") == text.getvalue().count("\x1b[?25h"), (
        "the cursor is left hidden"
    )


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_a_stage_that_stops_is_no_record(interruption: type[BaseException]) -> None:
    text = io.StringIO()
    progress = PlainProgress(text)
    with pytest.raises(interruption), progress.stage("trace"):
        raise interruption
    assert progress.records == ()
    assert text.getvalue().startswith("trace  stopped after 0.0 s")


def test_a_terminal_is_left_clean_after_a_stop() -> None:
    progress, text = terminal()
    with pytest.raises(ValueError, match="no"), progress.stage("build"), progress.stage("trace"):
        raise ValueError("no")
    assert "✗ trace" in text.getvalue()
    assert text.getvalue().rstrip().endswith("\x1b[?25h") or text.getvalue().count(
        "\x1b[?25l"
    ) == text.getvalue().count("\x1b[?25h")


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_rss_bytes()
    if before is None:
        pytest.fail("this system does not tell: the record says None")
    held = bytearray(before + 50_000_000)
    held[::4096] = b"x" * len(held[::4096])
    assert (peak_rss_bytes() or 0) > before + 40_000_000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model\x1b[2J\x1b]0;title\x07", r"model\x1b[2J\x1b]0;title\x07"),
        ("back\rspace\b and \x9b31m", r"back\x0dspace\x08 and \x9b31m"),
        ("turned \u202etxt.exe", r"turned \u202etxt.exe"),
        ("two\nlines,\ta tab, 日本 👩\u200d👧 é", "two\nlines,\ta tab, 日本 👩\u200d👧 é"),
    ],
)
def test_names_do_not_steer_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown.replace(r"\x0d", r"\r")
    stream, (rich, written) = io.StringIO(), terminal()
    PlainProgress(stream).note(text)
    rich.note(text)
    assert "\x1b[2J" not in stream.getvalue() + written.getvalue()
