"""Where errors become words and exit codes, and what may be imported for a help page."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

import llmc
import llmc.doctor
from llmc.cli import main
from llmc.doctor import DoctorReport, Finding
from llmc.errors import (
    CheckpointError,
    ConfigError,
    LatencyError,
    LlmcError,
    ParityError,
    ResourceError,
    UnsupportedError,
)

COMMANDS = (
    "build",
    "verify",
    "bench",
    "compare",
    "report",
    "bisect",
    "tune",
    "run",
    "inspect",
    "targets",
    "profiles",
    "servers",
    "doctor",
)


class Outcome:
    def __init__(self, code: object, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Call = Callable[..., Outcome]
Fail = Callable[[BaseException], None]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        captured = capsys.readouterr()
        return Outcome(caught.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """`llmc doctor` raises what is asked for."""

    def fail(error: BaseException) -> None:
        def examine(*_: object) -> DoctorReport:
            raise error

        monkeypatch.setattr(llmc.doctor, "examine", examine)

    return fail


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, 2),
        (CheckpointError, 2),
        (UnsupportedError, 3),
        (ResourceError, 4),
        (ParityError, 5),
        (LatencyError, 6),
    ],
)
def test_an_error_is_a_fact_a_hint_and_a_code(
    error: type[LlmcError], code: int, call: Call, failing: Fail
) -> None:
    failing(error("the disk has 3 MB", hint="free some"))
    outcome = call("doctor")
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err == "error: the disk has 3 MB\nhint: free some\n"


def test_no_hint_no_line(call: Call, failing: Fail) -> None:
    failing(ConfigError("so it is"))
    assert call("doctor").err == "error: so it is\n"


def test_an_interruption(call: Call, failing: Fail) -> None:
    failing(KeyboardInterrupt())
    outcome = call("doctor")
    assert outcome.code == 130
    assert outcome.err.strip().endswith("error: interrupted")


def test_an_internal_error_keeps_its_traceback_for_debug(call: Call, failing: Fail) -> None:
    failing(RuntimeError("a bug"))
    outcome = call("doctor")
    assert outcome.code == 1
    assert outcome.err.startswith(
        "error: internal error: RuntimeError: a bug\nhint: run again as `llmc --debug"
    )
    assert "Traceback" not in outcome.err
    outcome = call("--debug", "doctor")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert "in examine" in outcome.err


def test_a_typed_error_has_a_traceback_for_debug(call: Call, failing: Fail) -> None:
    failing(ConfigError("so it is"))
    assert "Traceback" in call("--debug", "doctor").err


def test_data_comes_out_even_if_the_verdict_is_bad(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    report = DoctorReport(checks=(Finding(name="gguf", status="problem", detail="not installed"),))
    monkeypatch.setattr(llmc.doctor, "examine", lambda _: report)
    outcome = call("doctor", "--json")
    assert outcome.code == 4
    assert json.loads(outcome.out)["checks"][0]["name"] == "gguf"
    assert outcome.err == "error: a CPU build cannot work here: gguf\n"


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (("buld",), "No such command 'buld'. Did you mean 'build'?"),
        (("build",), "Missing argument"),
        (("build", "demo", "--taget", "x"), "No such option: --taget"),
        (("run", "x", "y", "--max-tokens", "0"), "Invalid value for '--max-tokens'"),
        (("run", "x", "y", "--max-tokens", "many"), "Invalid value for '--max-tokens'"),
    ],
)
def test_usage(arguments: tuple[str, ...], fact: str, call: Call) -> None:
    outcome = call(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {fact}")
    assert "hint: llmc --help" in outcome.err


def test_no_command_shows_the_help(call: Call) -> None:
    outcome = call()
    assert (outcome.code, outcome.out) == (2, "")
    assert "Usage: llmc" in outcome.err


def test_version(call: Call) -> None:
    outcome = call("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"llmc {llmc.__version__}\n", "")


@pytest.mark.parametrize(
    "command", [(), *((name,) for name in COMMANDS), ("profiles", "detect"), ("targets", "show")]
)
def test_every_help_page_has_examples(command: tuple[str, ...], call: Call) -> None:
    outcome = call(*command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("Usage: llmc")
    lines = outcome.out.splitlines()
    examples = [line.strip() for line in lines[lines.index("  Examples:") + 1 :] if line.strip()]
    assert examples
    assert all(line.startswith("llmc ") for line in examples)


@pytest.mark.parametrize(("arguments", "fine"), [(["--help"], set()), (["build", "--help"], {"pydantic"})])
def test_help_imports_nothing_heavy(arguments: list[str], fine: set[str]) -> None:
    """`llmc --help` answers within 0.3 s of a bare Python start; these alone would break that.

    typer takes pydantic for the options of a command, not for the list of commands.
    """
    code = (
        "import sys\n"
        "from llmc.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit:\n"
        "    print(','.join(sys.modules), file=sys.stderr)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in answer.stderr.strip().split(",")}
    assert "typer" in loaded
    heavy = {
        *(
            "torch",
            "transformers",
            "onnxruntime",
            "onnxruntime_genai",
            "optimum",
            "tensorrt",
            "onnx",
            "onnx_ir",
        ),
        *("onnxscript", "numpy", "pydantic", "yaml", "rich", "gguf", "safetensors", "accelerate"),
    }
    assert loaded & heavy <= fine
