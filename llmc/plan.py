"""Resolve a user's request to a complete `BuildPlan`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llmc.backends import backend_of
from llmc.catalog import load_profile_for, load_target
from llmc.config import BuildPlan
from llmc.errors import ConfigError
from llmc.evaluation import EvaluationText, read_text, shipped_text


def plan_build(
    model: str,
    *,
    target: str,
    profile: str,
    output: Path | None = None,
    verify: bool = True,
    eval_text: EvaluationText | None = None,
    path: Path | None = None,
    chat_template: Path | None = None,
    token_ids: bool = False,
    adapter: str | None = None,
    every_check: bool = False,
    seed: int | None = None,
    budget: float | None = None,
    shards: int | None = None,
    shards_for: Literal["vllm", "transformers"] | None = None,
) -> BuildPlan:
    """Resolve names to a target and a profile; ConfigError if one is unknown or they do not match.

    Args:
        profile: One name, or several separated by commas.
        eval_text: The text that the gate measures quality on; None for the text that ships.
        output: Directory of the artifact; None for `artifacts/<model>/<target>@<profile>`.
        path: Folder of the user's own targets and profiles, searched first.
        chat_template: File with a Jinja template that replaces the checkpoint's own.
        token_ids: Whether to build although onnxruntime-genai's tokenizer does not give the model's tokens.
        adapter: Folder or hub id of a LoRA adapter that is merged into the model.
        every_check: Whether to measure everything although a cheap check has missed its gate.
        seed: Seed of the positions that the gate verifies; None for the artifact's own.
        budget: Seconds of the forecast that decides how many positions are drawn; None for the default.
        shards: Ranks of tensor parallelism for which files are written; None for none.
        shards_for: Whose names the tensors of ranks have; None for vLLM's.
    """
    if not model.strip():
        raise ConfigError("MODEL is empty", hint="name a folder, a hub id, a GGUF file or demo")
    resolved = load_target(target, path)
    names = profile.split(",")
    if len(names) > 1 and not backend_of(resolved).several_profiles:
        raise ConfigError(
            f"target {target} is built for one profile, and {len(names)} are named: {profile}",
            hint="targets of backend tensorrt accept several",
        )
    if len(set(names)) != len(names) or "" in names:
        raise ConfigError(f"--profile {profile} names a profile twice, or has an empty name")
    if shards is not None and backend_of(resolved).writes_graph:
        raise ConfigError(
            f"target {target} writes a graph, which --shards does not split",
            hint="targets with backend checkpoint are split; llmc targets lists them",
        )
    if shards is None and shards_for is not None:
        raise ConfigError(
            f"--shards-for {shards_for} names tensors of ranks, and no ranks are asked for",
            hint="give their number by --shards N",
        )
    first, *also = (load_profile_for(resolved, name, path) for name in names)
    return BuildPlan(
        model=model,
        adapter=adapter,
        target=resolved,
        profile=first,
        also=tuple(also),
        output=output if output is not None else default_output(model, target, profile, adapter),
        verify=verify,
        eval_text=shipped_text() if eval_text is None else eval_text,
        chat_template=None if chat_template is None else _read_template(chat_template),
        token_ids=token_ids,
        every_check=every_check,
        seed=seed,
        budget=budget,
        shards=shards,
        shards_for=shards_for or "vllm",
    )


def read_eval_text(names: Sequence[str], *, verify: bool) -> EvaluationText:
    """Read the evaluation text of a build, once for every plan that is made of the request.

    Args:
        names: Files of evaluation text, `-` for standard input; none for the text that ships.
        verify: Whether the gates are to run; if not, the files must be there and are not read.

    Raises:
        ConfigError: A file is not there, or is not text in UTF-8.
    """
    for name in names:
        if name != "-" and not Path(name).is_file():
            raise ConfigError(f"evaluation text {name} is not a file")
    return read_text(names if verify else ())


def _read_template(file: Path) -> str:
    try:
        template = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat template {file} cannot be read: {error}") from error
    if not template.strip():
        raise ConfigError(f"chat template {file} is empty", hint="name a file with a Jinja template")
    return template


def default_output(model: str, target: str, profile: str, adapter: str | None = None) -> Path:
    """Return `artifacts/<model>/<target>@<profile>`; the model is the last part of its path, or its hub id.

    A model with an adapter is `<model>+<adapter>`.

    A hub id keeps its owner and revision: `org/name@rev` becomes `org--name@rev`; several profiles
    are joined by plus signs.
    """
    name = _name_of(model) if adapter is None else f"{_name_of(model)}+{_name_of(adapter)}"
    safe = re.sub(r"[^\w.@+-]+", "-", name).strip("-.") or "model"
    return Path("artifacts") / safe / f"{target}@{profile.replace(',', '+')}"


def _name_of(ref: str) -> str:
    """Return the last part of a path, or a whole hub id with its slash as two dashes."""
    local = Path(ref)
    if local.is_dir():
        return local.resolve().name
    if local.suffix.lower() != ".gguf":
        return ref.replace("/", "--")
    return re.sub(r"-\d{5}-of-\d{5}$", "", local.stem)  # a part of a split model
