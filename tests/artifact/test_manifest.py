"""Manifest: text and back, and what it refuses."""

import json
import re
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from llmc.artifact.manifest import CheckRecord, FileDigest, Manifest, State, parse_manifest
from llmc.artifact.provenance import tool_versions
from llmc.artifact.verdict import CheckStatus
from llmc.config import Metric
from llmc.errors import ConfigError, ExitCode

MakeManifest = Callable[..., Manifest]

FAILED = CheckRecord(metric=Metric.DECODE_MAX_ABS, status=CheckStatus.FAIL, where="onnxruntime 1.31.1")
UNDECIDED = CheckRecord(metric=Metric.TEXT_KL_MEAN, status=CheckStatus.UNDECIDED, where="onnxruntime 1.31.1")


def test_a_manifest_survives_its_json(make_manifest: MakeManifest) -> None:
    manifest = make_manifest()
    assert parse_manifest(manifest.to_json(), "here") == manifest


def test_json_has_sorted_keys_and_ends_with_a_newline(make_manifest: MakeManifest) -> None:
    text = make_manifest(tools={"z": "1", "a": "2"}).to_json()
    assert text.endswith("}\n")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("[" * 100_000, r"m\.json is damaged: it is nested too deeply"),
        (f"[{'1' * 5000}]", r"m\.json is damaged: Exceeds the limit"),
        ("{", r"m\.json is damaged: Expecting property name .* at line 1, column 2"),
        ("[]", r"m\.json is not the manifest of an artifact: it has no schema_version"),
        ('{"schema_version": "1"}', r"it has no schema_version"),
        (
            '{"schema_version": 2}',
            r"m\.json has schema version 2, but this version of llmc reads only up to 1",
        ),
        ('{"schema_version": 1}', r"m\.json is damaged: llmc_version: Field required"),
        ('{"state": 1, "state": 2}', r"m\.json is damaged: state is given twice, as 1 and 2"),
    ],
)
def test_damaged_json_is_a_typed_error(text: str, fact: str) -> None:
    with pytest.raises(ConfigError, match=fact) as caught:
        parse_manifest(text, "m.json")
    assert caught.value.exit_code is ExitCode.USAGE


def test_a_later_schema_says_how_to_go_on() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_manifest('{"schema_version": 9}', "m.json")
    assert caught.value.hint == "update llmc, or build the artifact again with this version"


def test_an_unknown_key_is_damage(make_manifest: MakeManifest) -> None:
    data = json.loads(make_manifest().to_json()) | {"timings": {}}
    with pytest.raises(ConfigError, match="timings: Extra inputs are not permitted"):
        parse_manifest(json.dumps(data), "m.json")


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"checks": (FAILED,)}, r"state is verified, but decode\.max_abs did not pass"),
        ({"checks": (UNDECIDED,)}, r"state is verified, but text\.kl_mean did not pass"),
        ({"checks": ()}, "state is verified without any check"),
        ({"state": State.FAILED}, "state is failed, but every check passed"),
        ({"state": State.FAILED, "checks": ()}, "state is failed without any check"),
        ({"state": State.NOT_VERIFIED}, "state is 'built, not verified', but checks ran"),
        ({"state": State.NOT_EXECUTED}, "state is 'built, not executed', but checks ran"),
    ],
)
def test_the_state_must_fit_the_checks(
    make_manifest: MakeManifest, changes: dict[str, object], fact: str
) -> None:
    with pytest.raises(ValidationError, match=fact):
        make_manifest(**changes)


@pytest.mark.parametrize("name", ["/etc/passwd", "../model.onnx", "a/../../b", "a\\b", ""])
def test_file_names_stay_inside_of_the_artifact(make_manifest: MakeManifest, name: str) -> None:
    with pytest.raises(ValidationError, match="is not a path inside the artifact"):
        make_manifest(files={name: FileDigest(sha256="a" * 64, bytes=1)})


def test_tool_versions_are_those_installed() -> None:
    import numpy
    import torch

    versions = tool_versions()
    assert versions["numpy"] == numpy.__version__
    assert versions["torch"] == torch.__version__
    assert re.fullmatch(r"3\.\d+\.\d+", versions["python"])
    assert any(name.startswith("onnxruntime") for name in versions)
