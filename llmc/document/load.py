"""A document read into a strict pydantic model, with errors that name file, line and key.

It is validated as JSON, so that lists become tuples while types stay strict.
"""

import json
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmc.document.extension import Extension, compose_extended
from llmc.document.nodes import compose, construct
from llmc.errors import ConfigError, did_you_mean

Document = TypeVar("Document", bound=BaseModel)


def load_document(path: Path, model: type[Document], extension: Extension | None = None) -> Document:
    """Read the file as a `model`.

    Raises:
        ConfigError: The file is not valid; the message states file, line and dotted key.
    """
    node = compose(path) if extension is None else compose_extended(path, extension)
    data = construct(path, node)
    try:
        return model.model_validate_json(json.dumps(data, allow_nan=False))
    except ValidationError as error:
        raise _config_error(path, node, model, error) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} contains a value that JSON cannot express: {error}") from error


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
