"""Changes of the folder of a checkpoint for servers, as a wrong writer would make them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .sabotage import edit_json

Tensors = dict[str, torch.Tensor]
FILE = "model.safetensors"


def tensors(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    """Return what changes the tensors of a folder."""

    def apply(folder: Path) -> None:
        stored = load_file(folder / FILE)
        change(stored)
        save_file({name: t.contiguous() for name, t in stored.items()}, folder / FILE, {"format": "pt"})

    return apply


def config(*place: str, value: Any) -> Callable[[Path], None]:
    """Return what sets a field of quantization_config."""

    def change(data: Any) -> None:
        data = data["quantization_config"]
        for key in place[:-1]:
            data = data[key]
        data[place[-1]] = value

    return lambda folder: edit_json(folder / "config.json", change)


def scale(name: str, factor: float) -> Callable[[Tensors], None]:
    def change(stored: Tensors) -> None:
        stored[name] = (stored[name].float() * factor).to(stored[name].dtype)

    return change


def flip(name: str, bit: int) -> Callable[[Tensors], None]:
    def change(stored: Tensors) -> None:
        stored[name].view(-1)[7] ^= bit

    return change


def swap(first: str, second: str) -> Callable[[Tensors], None]:
    """Exchange all tensors of two modules."""

    def change(stored: Tensors) -> None:
        for name in [name for name in stored if name.startswith(f"{first}.")]:
            other = name.replace(first, second)
            stored[name], stored[other] = stored[other], stored[name]

    return change


def exchange(first: str, second: str) -> Callable[[Tensors], None]:
    def change(stored: Tensors) -> None:
        stored[first], stored[second] = stored[second], stored[first]

    return change


def rename(name: str, other: str) -> Callable[[Tensors], None]:
    def change(stored: Tensors) -> None:
        stored[other] = stored.pop(name)

    return change


def add(stored: Tensors) -> None:
    stored["model.layers.0.mlp.extra.weight"] = torch.ones(4, 4)


def other_tokenizer(folder: Path) -> None:
    """The tokenizer of a model of the same vocabulary, which joins no characters."""
    edit_json(folder / "tokenizer.json", lambda data: data["model"].update(merges=[]))


def truncate(folder: Path) -> None:
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:-100])


def add_old(name: str) -> Callable[[Path], None]:
    """Return what leaves a file of an earlier folder beside the weights."""

    def apply(folder: Path) -> None:
        (folder / name).write_text("{}")

    return apply


def other_theta(folder: Path) -> None:
    edit_json(folder / "config.json", lambda data: data["rope_parameters"].update(rope_theta=5e4))
