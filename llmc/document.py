"""Read a YAML file into a strict pydantic model, with errors that name file, line and key.

The file is parsed by the core schema of YAML 1.2 (so `1e-3` is a number and `no` a word), without
duplicate keys, and validated as JSON, so that lists become tuples while types stay strict. A file may
extend another one; see `Extension`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmc.errors import ConfigError, did_you_mean

Document = TypeVar("Document", bound=BaseModel)

_LARGEST = 1 << 20  # bytes of a file; the largest file that ships has 6,000
_UNFOLDED = 1 << 20  # characters of a line; prevents that a comment gets into a value
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


@dataclass(frozen=True)
class Extension:
    """The rules for merging a document whose key `extends` names another one with that document.

    Mappings are merged key by key, and the values of the document itself win. Lists are replaced, except
    those named in `lists`, whose entries are merged by one of their keys.

    Args:
        find: Returns the file of the extended document, from the name and the file that state it.
        lists: By name of a list at the top level: the key by which entries are merged, and the values of
            that key in the order of the merged list's entries.
    """

    find: Callable[[str, Path], Path]
    lists: Mapping[str, tuple[str, Sequence[str]]]


def load_document(path: Path, model: type[Document], extension: Extension | None = None) -> Document:
    """Read the file as a `model`.

    Raises:
        ConfigError: The file is not valid; the message states file, line and dotted key.
    """
    node = _compose(path) if extension is None else _compose_extended(path, extension)
    data = _construct(path, node)
    try:
        return model.model_validate_json(json.dumps(data, allow_nan=False))
    except ValidationError as error:
        raise _config_error(path, node, model, error) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} contains a value that JSON cannot express: {error}") from error


def find_origins(path: Path, extension: Extension) -> dict[tuple[str, ...], Path]:
    """Return the file that states each value of a document.

    Returns:
        Files by the path of keys: for each value at the top level, for each entry of a merged list by the
        value of its key, and for each value in a mapping at the top level.

    Raises:
        ConfigError: As for `load_document`, except for values that are not valid.
    """
    origins: dict[tuple[str, ...], Path] = {}
    for key, value in _compose_extended(path, extension).value:
        origins[(key.value,)] = Path(key.start_mark.name)
        if key.value in extension.lists:
            by, _ = extension.lists[key.value]
            for name, entry in _entries(value, by).items():
                origins[(key.value, name)] = Path(entry.start_mark.name)
        elif isinstance(value, yaml.MappingNode):
            for inner, _ in value.value:
                origins[(key.value, inner.value)] = Path(inner.start_mark.name)
    return origins


def _compose_extended(path: Path, extension: Extension, above: tuple[Path, ...] = ()) -> yaml.Node:
    """Return the nodes of a file merged with those of the files that it extends."""
    if path in above:
        chain = " extends ".join(str(each) for each in (*above, path))
        raise ConfigError(f"a document extends itself: {chain}")
    node = _compose(path)
    if not isinstance(node, yaml.MappingNode):
        return node
    stated = next((pair for pair in node.value if pair[0].value == "extends"), None)
    if stated is None:
        return node
    key, name = stated
    if not isinstance(name, yaml.ScalarNode) or not name.value:
        raise ConfigError(f"{path}:{key.start_mark.line + 1}: extends needs the name of one document")
    try:
        base = _compose_extended(extension.find(name.value, path), extension, (*above, path))
    except ConfigError as error:
        place = f"{path}:{key.start_mark.line + 1}: extends {name.value}"
        raise ConfigError(f"{place}: {error.fact}", hint=error.hint) from error
    if not isinstance(base, yaml.MappingNode):
        return node
    own = [pair for pair in node.value if pair is not stated]
    return _merge(base, yaml.MappingNode(node.tag, own, node.start_mark, node.end_mark), extension.lists)


def _merge(
    base: yaml.MappingNode, own: yaml.MappingNode, lists: Mapping[str, tuple[str, Sequence[str]]]
) -> yaml.MappingNode:
    for key, _ in (*base.value, *own.value):
        if not isinstance(key, yaml.ScalarNode):
            mark = key.start_mark
            raise ConfigError(f"{mark.name}:{mark.line + 1}: a key of this document is a list or a mapping")
    pairs = {key.value: (key, value) for key, value in base.value}
    for key, value in own.value:
        below = pairs[key.value][1] if key.value in pairs else None
        merged = value
        if isinstance(value, yaml.MappingNode) and isinstance(below, yaml.MappingNode):
            merged = _merge(below, value, {})
        elif (
            key.value in lists
            and isinstance(below, yaml.SequenceNode)
            and isinstance(value, yaml.SequenceNode)
        ):
            merged = _merge_list(below, value, *lists[key.value])
        pairs[key.value] = (key, merged)
    return yaml.MappingNode(own.tag, list(pairs.values()), own.start_mark, own.end_mark)


def _merge_list(
    base: yaml.SequenceNode, own: yaml.SequenceNode, by: str, order: Sequence[str]
) -> yaml.SequenceNode:
    above = _entries(own, by)
    if len(above) < len(own.value):
        place = f"{own.start_mark.name}:{own.start_mark.line + 1}"
        raise ConfigError(f"{place}: each entry of this list needs a {by} of its own")
    entries = _entries(base, by)
    for name, entry in above.items():
        entries[name] = _merge(entries[name], entry, {}) if name in entries else entry
    places = {name: place for place, name in enumerate(order)}
    ordered = sorted(entries, key=lambda name: places.get(name, len(places)))
    return yaml.SequenceNode(own.tag, [entries[name] for name in ordered], own.start_mark, own.end_mark)


def _entries(node: yaml.Node, by: str) -> dict[str, yaml.MappingNode]:
    """Return the mappings of a list by the value of one of their keys."""
    mappings = {}
    for entry in _children(node):
        if isinstance(entry, yaml.MappingNode):
            names = [v.value for k, v in entry.value if k.value == by and isinstance(v, yaml.ScalarNode)]
            mappings.update(dict.fromkeys(names, entry))
    return mappings


def _construct(path: Path, node: yaml.Node) -> Any:
    """Return the values of composed nodes."""
    try:
        return _CoreLoader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, error) from error
    except (yaml.YAMLError, ValueError) as error:  # an integer of thousands of digits is a ValueError
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply", hint="copy one that ships and edit it") from error


def _syntax_error(path: Path, error: yaml.MarkedYAMLError) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
    problem = ", ".join(part for part in (error.context, error.problem) if part)
    return ConfigError(f"{place} is not valid YAML: {problem}")


def _compose(path: Path) -> yaml.Node:
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
            counts[id(node)] = 1 + sum(map(count, _children(node)))
            open_nodes.remove(id(node))
        return counts[id(node)]

    total = count(root)
    if total > _MOST_NODES:
        raise ConfigError(
            f"{path} has {total:,} values with its aliases expanded; the maximum is {_MOST_NODES:,}",
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
                        raise ConfigError(f"{path}:{line}: key {key.value} was already given in line {first}")
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
    # A misspelt key is also a missing one: the misspelling is more informative.
    first = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    mark, dotted = _place(root, first)
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
    file = Path(mark.name)
    extended = "" if file == path else f", which {path} extends"
    return ConfigError(f"{file}:{mark.line + 1}: {what}{more}{extended}", hint=hint)


def _place(root: yaml.Node, problem: ErrorDetails) -> tuple[yaml.Mark, list[str]]:
    """Return the place of a problem, and its path of keys.

    pydantic's location also names branches of unions, which the file does not have: these are
    left out, except for a last part that names a missing key.
    """
    node, mark, dotted = root, root.start_mark, []
    for depth, part in enumerate(problem["loc"]):
        child: tuple[yaml.Node, yaml.Node] | None = None
        if isinstance(node, yaml.MappingNode):
            child = next(((k, v) for k, v in node.value if k.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            child = (node.value[part], node.value[part])
        if child is not None:
            key, node = child
            mark = key.start_mark
            dotted.append(str(part))
        elif problem["type"] == "missing" and depth == len(problem["loc"]) - 1:
            dotted.append(str(part))
    return mark, dotted


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


def render_document(document: BaseModel, origins: Mapping[tuple[str, ...], Path] | None = None) -> str:
    """Write a document as YAML, without the values that it leaves at their defaults.

    Args:
        origins: Files as from `find_origins`; a comment then names the file of each value.
    """
    data = json.loads(document.model_dump_json(exclude_defaults=True))
    if origins is None:
        return _dump(data)
    lines: list[str] = []
    for key, value in data.items():
        first, *rest = _dump({key: value}, width=_UNFOLDED).split("\n")
        parts = any(len(origin) > 1 and origin[0] == key for origin in origins)
        lines.append(first if parts else _noted(first, origins, key))
        lines += [_noted(line, origins, key, _name_of(line)) for line in rest]
    return "\n".join(lines)


def _dump(data: Any, width: int = 110) -> str:
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=width)
    return text.rstrip("\n")


def _noted(line: str, origins: Mapping[tuple[str, ...], Path], *keys: str) -> str:
    """Return a line with the file that states its value in a comment, if that is known."""
    file = origins.get(keys)
    return line if file is None else f"{line}  # {file.name}"


def _name_of(line: str) -> str:
    """Return the last key under which `find_origins` has a line's value: an inner key, or an entry's name."""
    entry = re.match(r"- \w+: (\S+)$", line)
    if entry is not None:
        return entry[1]
    key = re.match(r"  (\w+):", line)
    return "" if key is None else key[1]
