"""Run llmc's own commands on the GPU, each in a process of its own."""

from __future__ import annotations

import json

from gpu_checks.checks import Check, Found
from gpu_checks.room import Room
from gpu_checks.subjects import checkpoint_of, reason, run_llmc
from llmc.errors import ExitCode, ParityError, ResourceError, UnsupportedError


def check_doctor(room: Room, check: Check) -> Found:
    """Ask `llmc doctor` what would load here."""
    done = run_llmc("doctor", "--json")
    checks = json.loads(done.stdout)["checks"]
    told = {each["name"]: f"{each['status']}: {each['detail']}" for each in checks}
    return Found({"exit_code": done.returncode, "checks": told})


def check_verify(room: Room, check: Check) -> Found:
    """Run the gates of an artifact by `llmc verify`."""
    return _measure(room, check, "verify", ExitCode.PARITY)


def check_bench(room: Room, check: Check) -> Found:
    """Time an artifact by `llmc bench`; a gate on speed that it misses is told, and fails nothing."""
    return _measure(room, check, "bench", None)


def _measure(room: Room, check: Check, command: str, failing: ExitCode | None) -> Found:
    subject, artifacts = check.subject, room.settings.artifacts
    if subject.is_seeded(artifacts):
        raise UnsupportedError("its weights are drawn from a seed, so it has no original to be compared with")
    against = checkpoint_of(subject.source, artifacts)
    done = run_llmc(command, str(subject.folder(artifacts)), "--against", against, "--json")
    code, why = done.returncode, reason(done.stderr)
    if code == ExitCode.RESOURCES:
        raise ResourceError(why)
    if code not in (ExitCode.OK, ExitCode.PARITY, ExitCode.LATENCY) or not done.stdout.strip():
        raise ParityError(f"exit code {code}: {why}")
    report = json.loads(done.stdout)
    checks = report["verdict"]["checks"]
    figures = {
        "exit_code": code,
        "measured": report["measured"],
        "missed": [each["metric"] for each in checks if each["status"] != "pass"],
        "values": {each["metric"]: each["value"] for each in report["measurements"]},
        "latency": report["latency"],
    }
    return Found(figures, f"llmc {command}: {why}" if code == failing else None)
