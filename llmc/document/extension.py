"""Documents that extend another one: the key `extends` names it, and the two are merged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from llmc.document.nodes import children, compose
from llmc.errors import ConfigError


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


def find_origins(path: Path, extension: Extension) -> dict[tuple[str, ...], Path]:
    """Return the file that states each value of a document.

    Returns:
        Files by the path of keys: for each value at the top level, for each entry of a merged list by the
        value of its key, and for each value in a mapping at the top level.

    Raises:
        ConfigError: As for `load_document`, except for values that are not valid.
    """
    origins: dict[tuple[str, ...], Path] = {}
    for key, value in compose_extended(path, extension).value:
        origins[(key.value,)] = Path(key.start_mark.name)
        if key.value in extension.lists:
            by, _ = extension.lists[key.value]
            for name, entry in _entries(value, by).items():
                origins[(key.value, name)] = Path(entry.start_mark.name)
        elif isinstance(value, yaml.MappingNode):
            for inner, _ in value.value:
                origins[(key.value, inner.value)] = Path(inner.start_mark.name)
    return origins


def compose_extended(path: Path, extension: Extension, above: tuple[Path, ...] = ()) -> yaml.Node:
    """Return the nodes of a file merged with those of the files that it extends."""
    if path in above:
        chain = " extends ".join(str(each) for each in (*above, path))
        raise ConfigError(f"a document extends itself: {chain}")
    node = compose(path)
    if not isinstance(node, yaml.MappingNode):
        return node
    stated = next((pair for pair in node.value if pair[0].value == "extends"), None)
    if stated is None:
        return node
    key, name = stated
    if not isinstance(name, yaml.ScalarNode) or not name.value:
        raise ConfigError(f"{path}:{key.start_mark.line + 1}: extends needs the name of one document")
    try:
        base = compose_extended(extension.find(name.value, path), extension, (*above, path))
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
    for entry in children(node):
        if isinstance(entry, yaml.MappingNode):
            names = [v.value for k, v in entry.value if k.value == by and isinstance(v, yaml.ScalarNode)]
            mappings.update(dict.fromkeys(names, entry))
    return mappings
