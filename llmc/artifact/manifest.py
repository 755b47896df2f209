"""Define `Manifest`: what an artifact is, what it was built from, and the outcome of its checks.

It is written as manifest.json, last, so that a directory without one is not an artifact. It has no
timings and no measured figures: the same inputs give the same bytes.
"""

import json
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from llmc.artifact.engine import EngineRecord
from llmc.artifact.text import TextRecord
from llmc.artifact.verdict import MISSED, CheckStatus
from llmc.config import Metric, Target, WeightRole
from llmc.errors import ConfigError
from llmc.graph.interface import Interface
from llmc.profile import Profile
from llmc.records import Strict
from llmc.strict_json import parse_json

MANIFEST = "manifest.json"
#: The file of the graph.
MODEL = "model.onnx"
#: The folder of measurements and their timings, which the manifest's digests do not cover.
REPORTS = "reports"
#: The file with the layers and units of a pruned model that stay.
PRUNING = "decisions/pruning.safetensors"
SCHEMA_VERSION: Literal[1] = 1

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileDigest(Strict):
    """The sha256 (hexadecimal) and size in bytes of one file."""

    sha256: Digest
    bytes: int


class ModelFacts(Strict):
    """The checkpoint that was compiled.

    Args:
        ref: Reference as the user wrote it.
        digest: sha256 over its configuration, weights and tokenizer.
        architecture: Class of the transformers model, such as LlamaForCausalLM.
        model_type: transformers' name of the configuration, such as llama.
        parameters: Number of parameters, tied ones counted once.
        notes: What was left out of the input or read in an unusual way, a sentence each.
        adapter: The adapter that was merged into it.
    """

    ref: str
    digest: str
    architecture: str
    model_type: str
    parameters: int
    notes: tuple[str, ...] = ()
    adapter: "AdapterRecord | None" = None


class AdapterRecord(Strict):
    """The LoRA adapter that was merged into the model.

    Args:
        ref: Reference as the user wrote it.
        digest: sha256 over its config, tensors and tokenizer.
        base: The model that it was trained on, as its config names it.
        ranks: Ranks of its matrices, each once.
        alphas: Alphas, each once.
        rslora: Whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        dora: Whether merged weights have the norms that the adapter stores.
        merged: Number of modules that its matrices were added to, by the last part of their names.
        replaced: Tensors that it replaces entirely.
    """

    ref: str
    digest: Digest
    base: str | None
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    rslora: bool
    dora: bool
    merged: dict[str, int]
    replaced: tuple[str, ...]

    def render(self) -> str:
        """Return a human-readable description."""
        parts = []
        if self.merged:
            sizes = f"rank {_listed(self.ranks)}, alpha {_listed(self.alphas)}"
            kind = f"{'DoRA' if self.dora else 'LoRA'} of {sizes}{', rslora' if self.rslora else ''}"
            counts = ", ".join(f"{name} {count}" for name, count in self.merged.items())
            parts.append(f"{kind} merged into {_count(sum(self.merged.values()), 'module')} ({counts})")
        if self.replaced:
            parts.append(f"{_count(len(self.replaced), 'tensor')} replaced")
        return f"adapter {self.ref}: {'; '.join(parts)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(numbers: tuple[float, ...]) -> str:
    return " and ".join(f"{number:g}" for number in numbers)


class Declined(Strict):
    """The places where a pass nearly applied, and did not for one kind of reason.

    Args:
        code: Stable identifier of the reason.
        reason: The fact with its values, at the first place.
        node: The first place.
        count: Number of places.
        layers: Decoder layers that they are in, each once; places outside of the layers are in none.
    """

    code: str
    reason: str
    node: str
    count: int
    layers: tuple[int, ...]


class PassRecord(Strict):
    """The count of how often a pass applied, and the places where it declined."""

    name: str
    applied: int
    declined: tuple[Declined, ...] = ()


class WeightRecord(Strict):
    """The storage of one matrix.

    Args:
        name: Parameter name.
        role: Purpose of the matrix.
        shape: (output features, input features).
        bits: Bits of one element; 16 or 32 for a matrix left in float.
        block_size: Number of input features that share a scale; None in float.
        symmetric: Whether the zero point is fixed; None in float.
        bytes: Bytes of codes, scales and zero points together.
        origin: How codes that the checkpoint has for it were handled: `kept` bit for bit, or `quantized
            again` or `made floats`; None if the checkpoint has floats.
    """

    name: str
    role: WeightRole
    shape: tuple[int, ...]
    bits: int
    block_size: int | None
    symmetric: bool | None
    bytes: int
    origin: str | None = None


class PruneRecord(Strict):
    """The parts that were left out of the model; the file PRUNING has the units that stay.

    Args:
        dropped: Decoder layers by their index in the original.
        layers: Decoder layers of the original.
        neurons: Neurons of each MLP, before and after; None if none were removed.
        kv_groups: Heads of keys and values of each layer, before and after; None if none were removed.
        sparse: Number of matrices with 2:4 sparsity.
        repaired: Whether the weights of remaining layers compensate for the removed ones; None if all stay.
        parameters: Number of parameters that remain, tied ones counted once; zeros count.
    """

    dropped: tuple[int, ...]
    layers: int
    neurons: tuple[int, int] | None
    kv_groups: tuple[int, int] | None
    sparse: int
    repaired: bool | None
    parameters: int

    def render(self) -> str:
        """Return a human-readable description."""
        parts = []
        if self.dropped:
            parts.append(f"layers {', '.join(map(str, self.dropped))} of {self.layers} dropped")
        for what, sizes in (("neurons", self.neurons), ("heads of keys and values", self.kv_groups)):
            if sizes is not None:
                parts.append(f"{sizes[1]} of {sizes[0]} {what} left in each layer")
        if self.sparse:
            parts.append(f"2:4 sparsity in {self.sparse} matrices")
        repaired = {None: "", True: ", repaired", False: ", not repaired"}[self.repaired]
        return f"pruned: {'; '.join(parts)}{repaired}; {self.parameters / 1e6:.1f} M parameters left"


class LeftOutside(Strict):
    """The operators that compiled kernels did not take, the reason, and their number."""

    operator: str
    reason: str
    count: int


class KernelRecord(Strict):
    """The facts of compiled kernels.

    Args:
        library: File with the operators; ONNX Runtime loads it through RegisterCustomOps.
        isa: Instruction set that a CPU needs for it.
        compiler: Name and version that the compiler reports.
        source: sha256 of the generated source.
        regions: Number of operators that replace parts of the graph.
        nodes: Number of operators of ONNX Runtime that they replaced.
    """

    library: str
    isa: str
    compiler: str
    source: Digest
    regions: int
    nodes: int
    outside: tuple[LeftOutside, ...] = ()


class State(StrEnum):
    """The state of knowledge about an artifact's numbers."""

    VERIFIED = "verified"
    NOT_VERIFIED = "built, not verified"
    NOT_EXECUTED = "built, not executed"
    ENGINE_PENDING = "engine pending"
    FAILED = "failed"


class CheckRecord(Strict):
    """The outcome of one gate, and the runtime and provider it was measured on."""

    metric: Metric
    status: CheckStatus
    where: str


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
        raise ValueError(f"{name!r} is not a path inside the artifact")
    return name


FileName = Annotated[str, AfterValidator(_inside)]


class Manifest(Strict):
    """The complete description of an artifact except its figures.

    Args:
        llmc_version: Version of the compiler.
        tools: Versions by name, such as torch and onnxruntime.
        files: Digests of all files by path inside the artifact, without `reports/` and the manifest.
        also: Further hardware for which the artifact is built.
        text: How text becomes tokens, and whether onnxruntime-genai's tokenizer does the same.
        pruned: The removed parts, for targets that prune.
        kernels: The compiled kernels, for targets that have them.
        engines: TensorRT engines, built or pending.
        checks: The verdict's outcomes; empty unless the gates ran. For engines that were not executed they
            describe the graph from which the engines are parsed, and each states where it was measured.
        unfinished: Why the gates that were to run have no outcome; None if they have one or were not to run.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    llmc_version: str
    model: ModelFacts
    target: Target
    profile: Profile
    also: tuple[Profile, ...] = ()
    interface: Interface
    tools: dict[str, str]
    files: dict[FileName, FileDigest]
    passes: tuple[PassRecord, ...]
    weights: tuple[WeightRecord, ...]
    text: TextRecord = TextRecord()
    pruned: PruneRecord | None = None
    kernels: KernelRecord | None = None
    engines: tuple[EngineRecord, ...] = ()
    state: State
    checks: tuple[CheckRecord, ...] = ()
    unfinished: str | None = None

    @model_validator(mode="after")
    def _state_fits_checks(self) -> "Manifest":
        missed = ", ".join(check.metric.value for check in self.checks if check.status in MISSED)
        if self.checks and self.unfinished is not None:
            raise ValueError(f"checks ran, but are recorded as unfinished: {self.unfinished}")
        match self.state:
            case State.VERIFIED if missed:
                raise ValueError(f"state is verified, but {missed} did not pass")
            case State.VERIFIED | State.FAILED if not self.checks:
                raise ValueError(f"state is {self.state.value} without any check")
            case State.FAILED if not missed:
                raise ValueError("state is failed, but every check passed")
            case State.NOT_VERIFIED if self.checks:
                raise ValueError(f"state is '{self.state.value}', but checks ran")
            case State.NOT_EXECUTED | State.ENGINE_PENDING if missed:
                raise ValueError(f"state is '{self.state.value}', but {missed} did not pass")
            case State.NOT_EXECUTED if self.checks and not self.engines:
                raise ValueError(f"state is '{self.state.value}', but checks ran")
        pending = [", ".join(engine.sms) for engine in self.engines if engine.file is None]
        if self.state is not State.FAILED and bool(pending) != (self.state is State.ENGINE_PENDING):
            raise ValueError(
                f"state is '{self.state.value}', but the pending engines are {pending or 'none'}"
            )
        return self

    @property
    def executed(self) -> dict[str, str]:
        """The files with code that its records name, and what each is."""
        files = {engine.file: "engine" for engine in self.engines if engine.file is not None}
        return files if self.kernels is None else {**files, self.kernels.library: "library"}

    def to_json(self) -> str:
        """Return JSON with sorted keys and a newline at the end: the same manifest gives the same text."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def parse_manifest(text: str, source: str) -> Manifest:
    """Read a manifest's JSON.

    Args:
        source: Origin of `text`, for the messages.

    Raises:
        ConfigError: It is not JSON, has a newer schema, or does not match the schema.
    """
    try:
        data = parse_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{source} is damaged: {error.msg} at line {error.lineno}, column {error.colno}",
            hint="build the artifact again",
        ) from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or deep nesting
        raise ConfigError(f"{source} is damaged: {error}", hint="build the artifact again") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise ConfigError(f"{source} is not the manifest of an artifact: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"{source} has schema version {version}, but this version of llmc reads only up to "
            f"{SCHEMA_VERSION}",
            hint="update llmc, or build the artifact again with this version",
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the manifest"
        raise ConfigError(
            f"{source} is damaged: {place}: {first['msg']}", hint="build the artifact again"
        ) from error
