"""A YAML file as nodes, which know the file and their lines.

The file is parsed by the core schema of YAML 1.2 (so `1e-3` is a number and `no` a word), without
duplicate keys.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from llmc.errors import ConfigError

_LARGEST = 1 << 20  # bytes of a file; the largest file that ships has 6,000
_MOST_NODES = 100_000  # keys and values of a document


class _CoreLoader(yaml.SafeLoader):
    """The SafeLoader with the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as the base class has it


for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def compose(path: Path) -> yaml.Node:
    """Return the nodes of a file, which record the file and their lines."""
    loader = _CoreLoader(_read_text(path))
    loader.name = str(path)
    try:
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{path} is empty", hint="copy one that ships and edit it")
        _refuse_duplicate_keys(path, node)
        _refuse_expansion(path, node)
        return node
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, error) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply", hint="copy one that ships and edit it") from error
    finally:
        loader.dispose()


def construct(path: Path, node: yaml.Node) -> Any:
    """Return the values of composed nodes."""
    try:
        return _CoreLoader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, error) from error
    except (yaml.YAMLError, ValueError) as error:  # an integer of thousands of digits is a ValueError
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply", hint="copy one that ships and edit it") from error


def children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _syntax_error(path: Path, error: yaml.MarkedYAMLError) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
    problem = ", ".join(part for part in (error.context, error.problem) if part)
    return ConfigError(f"{place} is not valid YAML: {problem}")


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise ConfigError(f"{path} has {size:,} bytes, and the maximum is {_LARGEST:,}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _refuse_expansion(path: Path, root: yaml.Node) -> None:
    """Refuse aliases that expand to more than a document may hold, or to what they are part of.

    A short file of aliases of aliases expands to gigabytes; nodes are counted here without expanding them.
    """
    counts: dict[int, int] = {}
    open_nodes: set[int] = set()

    def count(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: this node is an alias of itself")
        if id(node) not in counts:
            open_nodes.add(id(node))
            counts[id(node)] = 1 + sum(map(count, children(node)))
            open_nodes.remove(id(node))
        return counts[id(node)]

    total = count(root)
    if total > _MOST_NODES:
        raise ConfigError(
            f"{path} has {total:,} values with its aliases expanded; the maximum is {_MOST_NODES:,}",
            hint="write out what the aliases are meant to repeat",
        )


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
                        raise ConfigError(f"{path}:{line}: key {key.value} was already given in line {first}")
                    lines[key.value] = line
                children.append(value)
        elif isinstance(node, yaml.SequenceNode):
            children.extend(node.value)
        for child in children:
            if id(child) not in visited:
                visited.add(id(child))
                pending.append(child)
