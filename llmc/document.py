"""A YAML file read into a strict pydantic model, with errors that name file, line and key.

The file is parsed by the core schema of YAML 1.2 (so `1e-3` is a number and `no` a word), without
duplicate keys, and validated as JSON, so that lists become tuples while types stay strict.
"""

import json
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmc.errors import ConfigError, did_you_mean

Document = TypeVar("Document", bound=BaseModel)

_LARGEST = 1 << 20  # bytes of a file; the largest that ships has 6,000
_MOST_NODES = 100_000  # keys and values of a document


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as the base class has it


for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def load_document(path: Path, model: type[Document]) -> Document:
    """The file as a `model`; ConfigError with file, line and dotted key if it is not one."""
    loader = _CoreLoader(_read_text(path))
    try:
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{path} is empty", hint="copy one that ships and edit it")
        _refuse_duplicate_keys(path, node)
        _refuse_expansion(path, node)
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{place} is not valid YAML: {problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # an integer of thousands of digits is a ValueError
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply", hint="copy one that ships and edit it") from error
    finally:
        loader.dispose()
    try:
        return model.model_validate_json(json.dumps(data, allow_nan=False))
    except ValidationError as error:
        raise _config_error(path, node, model, error) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} holds what JSON cannot express: {error}") from error


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise ConfigError(f"{path} has {size:,} bytes, and such a file has {_LARGEST:,} at most")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _refuse_expansion(path: Path, root: yaml.Node) -> None:
    """Refuse aliases that stand for more than a document may hold, or for what they are part of.

    A short file of aliases of aliases stands for gigabytes; nodes are counted here without expanding them.
    """
    counts: dict[int, int] = {}
    open_nodes: set[int] = set()

    def count(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: this node is an alias of itself")
        if id(node) not in counts:
            open_nodes.add(id(node))
            counts[id(node)] = 1 + sum(map(count, _children(node)))
            open_nodes.remove(id(node))
        return counts[id(node)]

    total = count(root)
    if total > _MOST_NODES:
        raise ConfigError(
            f"{path} stands for {total:,} values with its aliases expanded; {_MOST_NODES:,} is the most",
            hint="write out what the aliases are meant to repeat",
        )


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refuse_duplicate_keys(path: Path, root: yaml.Node) -> None:
    pending, visited = [root], {id(root)}
    while pending:
        node = pending.pop()
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode):
                    if key.value in lines:
                        first = lines[key.value]
                        raise ConfigError(f"{path}:{line}: key {key.value} was given in line {first} already")
                    lines[key.value] = line
                children.append(value)
        elif isinstance(node, yaml.SequenceNode):
            children.extend(node.value)
        for child in children:
            if id(child) not in visited:
                visited.add(id(child))
                pending.append(child)


def _config_error(path: Path, root: yaml.Node, model: type[BaseModel], error: ValidationError) -> ConfigError:
    problems = error.errors(include_url=False)
    # A misspelt key is also a missing one: the misspelling says more.
    first = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    line, dotted = _place(root, first)
    key = ".".join(dotted)
    hint = None
    match first["type"]:
        case "extra_forbidden":
            what = f"unknown key {key}"
            hint = did_you_mean(str(first["loc"][-1]), _known_keys(model, first["loc"][:-1]))
        case "missing":
            what = f"key {key} is missing"
        case "enum" | "literal_error":
            what = f"{key} is {first['input']!r}, which is not known"
            hint = did_you_mean(str(first["input"]), re.findall(r"'([^']*)'", first["msg"]))
        case _:
            message = first["msg"].removeprefix("Value error, ")
            shown = repr(first["input"])
            value = f" is {shown}" if len(shown) <= 60 else ""
            what = f"{key or 'the document'}{value}: {message}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return ConfigError(f"{path}:{line}: {what}{more}", hint=hint)


def _place(root: yaml.Node, problem: ErrorDetails) -> tuple[int, list[str]]:
    """Line, counted from 1, and the path of keys of a problem.

    pydantic's location also names branches of unions, which the file does not have: these are
    left out, but for a last part that names what is missing.
    """
    node, line, dotted = root, root.start_mark.line + 1, []
    for depth, part in enumerate(problem["loc"]):
        child: tuple[yaml.Node, yaml.Node] | None = None
        if isinstance(node, yaml.MappingNode):
            child = next(((k, v) for k, v in node.value if k.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            child = (node.value[part], node.value[part])
        if child is not None:
            key, node = child
            line = key.start_mark.line + 1
            dotted.append(str(part))
        elif problem["type"] == "missing" and depth == len(problem["loc"]) - 1:
            dotted.append(str(part))
    return line, dotted


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            inner = _model_of(model.model_fields[part].annotation)
            if inner is not None:
                model = inner
    return list(model.model_fields)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_of, get_args(annotation)) if m is not None), None)


def render_document(document: BaseModel) -> str:
    """The document as YAML, without what it does not state."""
    data = json.loads(document.model_dump_json(exclude_defaults=True))
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)
    return text.rstrip("\n")
