"""Make, find and list the environments of servers.

An environment is a folder with a virtual environment of Python. It lies below the cache folder, or where the
user says: by an option, or by the variable LLMC_<SERVER>_ENVIRONMENT. A file in it lists the calls of pip
that are done, so that an interrupted installation is continued and never taken for a whole one.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmc.artifact.store.cache import default_cache_folder
from llmc.artifact.store.disk import access_errors, replace_text
from llmc.artifact.store.lock import output_lock
from llmc.children import run_apart
from llmc.errors import ConfigError, ResourceError, did_you_mean
from llmc.progress import Progress
from llmc.servers.recipes import RECIPES, PipCall, Recipe

_DONE = "llmc-installed.json"
_MADE = "environment"
#: The most that one call of pip may take: it can build a package, or download gigabytes.
_PIP_SECONDS = 7200
_ASK_SECONDS = 120
#: Variables that would let another installation into the environment.
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


@dataclass(frozen=True)
class Server:
    """A server that can be started here.

    Args:
        name: Its name.
        version: The version of its package, as installed.
        command: The command line of its worker, which speaks the protocol of `llmc.servers.worker`.
        executes: Whether it computes here, or only reads the checkpoint.
    """

    name: str
    version: str
    command: tuple[str, ...]
    executes: bool = True


def known_recipe(name: str) -> Recipe:
    """Return the recipe of a server.

    Raises:
        ConfigError: The name is unknown.
    """
    if name not in RECIPES:
        raise ConfigError(f"server {name} is unknown", hint=did_you_mean(name, RECIPES))
    return RECIPES[name]


def environment_folder(recipe: Recipe, stated: Path | None = None) -> Path:
    """Return the folder of a server's environment: as stated, as its variable says, or below the cache."""
    named = os.environ.get(variable_of(recipe))
    return (stated or (Path(named) if named else default_cache_folder() / "servers" / recipe.name)).absolute()


def variable_of(recipe: Recipe) -> str:
    """Return the name of the environment variable that names a server's environment."""
    return f"LLMC_{re.sub(r'[^A-Z0-9]', '_', recipe.name.upper())}_ENVIRONMENT"


def parse_environments(stated: Sequence[str]) -> dict[str, Path]:
    """Read `NAME=FOLDER` options, the environments of servers by name.

    Raises:
        ConfigError: One has another form, or its server is unknown.
    """
    found = {}
    for each in stated:
        name, equals, folder = each.partition("=")
        if not equals or not folder:
            raise ConfigError(f"--environment {each} is not NAME=FOLDER", hint=f"known: {', '.join(RECIPES)}")
        found[known_recipe(name).name] = Path(folder).expanduser()
    return found


def find_server(name: str, stated: Path | None = None) -> Server:
    """Return an installed server.

    Args:
        stated: The folder of its environment; None for the folder that the user's variable names, or
            the folder that `install_server` made.

    Raises:
        ConfigError: The server is unknown.
        ResourceError: It is not installed, not completely, or too old.
    """
    recipe = known_recipe(name)
    folder = environment_folder(recipe, stated)
    hint = install_hint(recipe, stated)
    if not python_of(folder).exists():
        raise ResourceError(f"{name} is not installed: {folder} has no Python", hint=hint)
    if (left := unfinished_calls(recipe, folder)) and (folder / _DONE).exists():
        raise ResourceError(
            f"the installation of {name} in {folder} is not complete: {left[0].title}", hint=hint
        )
    version = installed_version(recipe, folder)
    if version is None:
        raise ResourceError(f"{folder} is an environment without {recipe.package}", hint=hint)
    if _release(version) < _release(recipe.version):
        raise ResourceError(
            f"{recipe.package} {version} in {folder} is older than {recipe.version}", hint=hint
        )
    worker = Path(__file__).with_name("worker.py")
    return Server(name, version, (str(python_of(folder)), "-P", "-B", str(worker), name), recipe.executes)


def install_hint(recipe: Recipe, stated: Path | None) -> str:
    """Return the command that makes or continues an environment, elsewhere if llmc did not make the folder.

    Args:
        stated: The folder of the environment, where an option names it.
    """
    command, folder = f"llmc servers install {recipe.name}", environment_folder(recipe, stated)
    if folder.exists() and not (folder / _DONE).is_file():
        return f"{command} --environment {recipe.name}=FOLDER makes one in a folder that is empty"
    return command if stated is None else f"{command} --environment {recipe.name}={shlex.quote(str(folder))}"


@dataclass(frozen=True)
class ServerState:
    """The state of a server's environment: `installed`, `incomplete`, `unusable` or `not installed`."""

    recipe: Recipe
    folder: Path
    status: str
    detail: str

    def as_json(self) -> dict[str, str]:
        """Return the facts as JSON values."""
        return {
            "name": self.recipe.name,
            "version": self.recipe.version,
            "folder": str(self.folder),
            "status": self.status,
            "detail": self.detail,
        }


def list_servers(environments: Sequence[str] = ()) -> tuple[ServerState, ...]:
    """Return every server with the state of its environment.

    Args:
        environments: `NAME=FOLDER`, where an environment is.

    Raises:
        ConfigError: As `parse_environments`.
    """
    stated = parse_environments(environments)
    return tuple(_look(recipe, stated.get(name)) for name, recipe in RECIPES.items())


def _look(recipe: Recipe, stated: Path | None) -> ServerState:
    folder = environment_folder(recipe, stated)
    if not folder.is_dir():
        return ServerState(recipe, folder, "not installed", install_hint(recipe, stated))
    if (folder / _DONE).is_file() and unfinished_calls(recipe, folder):
        detail = f"{install_hint(recipe, stated)} continues in {folder}"
        return ServerState(recipe, folder, "incomplete", detail)
    try:
        server = find_server(recipe.name, folder)
    except ResourceError as error:
        return ServerState(recipe, folder, "unusable", error.fact)
    does = "" if recipe.executes else ", which reads checkpoints here and executes nothing"
    return ServerState(recipe, folder, "installed", f"{server.version} in {folder}{does}")


def install_server(
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    *,
    python: str = sys.executable,
    pip_arguments: Sequence[str] = (),
) -> None:
    """Make an environment, or continue where an interrupted call ended.

    Args:
        python: The interpreter that it is made from.
        pip_arguments: Arguments of every `pip install`, such as an index.

    Raises:
        ConfigError: Something else lies in `folder`, or it cannot be written.
        ResourceError: Python or pip failed; the error has its last lines.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"no environment can be made in {folder}: {error.strerror}",
            hint=f"llmc servers install {recipe.name} --environment {recipe.name}=FOLDER makes it elsewhere",
        ) from error
    with access_errors(folder), output_lock(folder.with_name(f".{folder.name}.lock"), folder):
        _install(recipe, folder, progress, python, pip_arguments)


def _install(
    recipe: Recipe, folder: Path, progress: Progress, python: str, pip_arguments: Sequence[str]
) -> None:
    if any(folder.iterdir()) and not (folder / _DONE).is_file():
        raise ConfigError(
            f"{folder} exists, and llmc did not make it",
            hint=f"{install_hint(recipe, folder)}; {variable_of(recipe)} names one that is used as it is",
        )
    done = _done(folder)
    if _MADE not in done:
        _record(folder, done)
        with progress.stage(f"environment in {folder}"):
            _call([python, "-m", "venv", str(folder)], {}, f"{python} cannot make an environment")
        done.append(_MADE)
        _record(folder, done)
    for call, digest in zip(recipe.calls, recipe.digests, strict=True):
        if digest in done:
            continue
        extra = pip_arguments if call.arguments[0] == "install" else ()
        with progress.stage(call.title):
            command = [str(python_of(folder)), "-P", "-m", "pip", "--disable-pip-version-check", "--no-input"]
            hint = f"{install_hint(recipe, folder)} continues; --pip-args is for pip, such as an index"
            _call([*command, *call.arguments, *extra], call.variables, f"{call.title} failed", hint=hint)
        done.append(digest)
        _record(folder, done)


def unfinished_calls(recipe: Recipe, folder: Path) -> tuple[PipCall, ...]:
    """Return the calls of pip that an environment still needs; none for one that llmc did not make."""
    if not (folder / _DONE).is_file():
        return () if python_of(folder).exists() else recipe.calls
    done = _done(folder)
    pairs = zip(recipe.calls, recipe.digests, strict=True)
    return tuple(call for call, digest in pairs if digest not in done)


def python_of(folder: Path) -> Path:
    """Return the path of the interpreter of an environment."""
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def installed_version(recipe: Recipe, folder: Path) -> str | None:
    """Return the version of a server's package in an environment; None if it is not there."""
    code = (
        "import sys\nfrom importlib import metadata\n"
        "try: print(metadata.version(sys.argv[1]))\n"
        "except metadata.PackageNotFoundError: print('')"
    )
    command = [str(python_of(folder)), "-P", "-c", code, recipe.package]
    output = _call(command, {}, f"{python_of(folder)} does not run", _ASK_SECONDS)
    return output.strip() or None


def clean_variables(more: Mapping[str, str]) -> dict[str, str]:
    """Return this process's variables without those that lead Python to other installations, and `more`."""
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN} | dict(more)


def _done(folder: Path) -> list[str]:
    try:
        stored = json.loads((folder / _DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(each) for each in stored] if isinstance(stored, list) else []


def _record(folder: Path, done: Sequence[str]) -> None:
    replace_text(folder / _DONE, json.dumps(list(done)) + "\n")


def _call(
    command: Sequence[str],
    variables: Mapping[str, str],
    failure: str,
    seconds: float = _PIP_SECONDS,
    hint: str | None = None,
) -> str:
    try:
        result = run_apart(command, Path.cwd(), seconds, clean_variables(variables))
    except subprocess.TimeoutExpired as error:
        raise ResourceError(f"{failure}: it did not end within {seconds:.0f} s", hint=hint) from error
    except OSError as error:
        raise ResourceError(f"{failure}: {error.strerror}") from error
    if result.returncode != 0:
        last = [line.strip() for line in (result.stderr or result.stdout).strip().splitlines()[-3:]]
        raise ResourceError(f"{failure}: {' / '.join(last) or 'without a message'}", hint=hint)
    return result.stdout


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
