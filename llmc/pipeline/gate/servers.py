"""Ask servers about an artifact in the gate: each in its own environment, held to the target's gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from platform import machine
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from llmc.arrays import Array
from llmc.artifact.served import Deed, ServerRecord
from llmc.backends import backend_of
from llmc.checkpoint.cache_rounding import read_cache_scales
from llmc.config import Family, Target, WeightRole
from llmc.data import prompts
from llmc.errors import ConfigError, ParityError, UnsupportedError
from llmc.machine import detect_cpu, detect_gpu, release_memory
from llmc.pipeline.gate.parity import Extra
from llmc.pipeline.steps.stored import read_weights
from llmc.servers.answer import Answer
from llmc.servers.client import SECONDS, ask
from llmc.servers.edgellm_graph import exported_matrices
from llmc.servers.environment import Server, find_server, known_recipe, parse_environments
from llmc.servers.recipes import RECIPES
from llmc.servers.support import of_experts, schemes_of, treatments, why_not
from llmc.servers.support_models import ServedModel, of_model
from llmc.servers.support_terms import Runtime, Status
from llmc.validate.servers import (
    Figures,
    Matrix,
    broken_server,
    idle_record,
    measure_exported,
    measure_server,
    merge_figures,
    plan_questions,
    server_record,
)

if TYPE_CHECKING:
    from llmc.pipeline.gate.run import Run


@dataclass(frozen=True)
class Servers:
    """The servers that a user asks about an artifact.

    Args:
        servers: Each installed here.
        seconds: The most that each may take.
    """

    servers: tuple[Server, ...] = ()
    seconds: float = SECONDS

    def extra(self, target: Target) -> Extra:
        """Return the step of the gate that asks them, with the target's gates on their metrics."""
        gates = tuple(gate for gate in target.gates if gate.metric.family is Family.SERVER)
        return Extra(Family.SERVER.metrics, gates, self.measure)

    def measure(self, run: Run) -> None:
        """Ask every server, then the references, so that only one model is in memory at a time."""
        questions = plan_questions(
            run.text,
            run.tokens,
            prompts(),
            run.tokenizer,
            run.stated.stop,
            run.subject.interface.max_length,
            run.subject.interface.vocabulary,
        )
        request = questions.request(run.subject.threads)
        answers: dict[str, Answer] = {}
        found: dict[str, Figures] = {}
        idle: dict[str, str] = {}
        with TemporaryDirectory(prefix="llmc-servers-") as temporary:
            for server in self.servers:
                if (why := _why_idle(server, run)) is not None:
                    idle[server.name] = why
                    run.servers.append(idle_record(server.name, server.version))
                    run.progress.note(f"{server.name} was not started: {why}")
                    continue
                scratch = Path(temporary) / server.name
                scratch.mkdir()
                title = f"{server.name} {server.version}"
                with run.progress.stage(title):
                    try:
                        answers[title] = ask(
                            server,
                            run.subject.folder,
                            replace(request, gpu_only=_needs_gpu(server, run.subject.target)),
                            scratch,
                            seconds=self.seconds,
                            advance=run.progress.advance,
                        )
                    except ParityError as error:
                        found[title] = broken_server(error)
                        run.servers.append(_broken_record(server))
            release_memory()
            with run.progress.stage("original for servers"):
                known = questions.distributions()
                run.original.prepare(known, run.progress.advance)
                run.own.prepare([*known, *questions.followed(list(answers.values()))], run.progress.advance)
                run.own.release()
                run.original.release()
            matrix, scales = _matrices(run), read_cache_scales(run.subject.folder)
            for title, answer in answers.items():
                found[title] = measure_server(answer, questions, run.original, run.own, matrix, scales)
                if answer.graph is not None:
                    exported = exported_matrices(answer.graph)
                    found[title] |= measure_exported(exported, matrix, _quantized(run))
                run.servers.append(server_record(answer, found[title]))
        reading = [title for title, answer in answers.items() if answer.logits is None]
        run.found += merge_figures(found, reading, idle)


@dataclass(frozen=True)
class Runtimes:
    """The servers that a user names.

    Args:
        names: Their names.
        environments: `NAME=FOLDER`, where the environment of a server is.
        seconds: The most that each may take.
    """

    names: Sequence[str] = ()
    environments: Sequence[str] = ()
    seconds: float = SECONDS

    def extras(self, target: Target, thresholds: Target) -> list[Extra]:
        """Return the step of the gate that asks them, each installed here; none if none is named.

        Args:
            target: The target of the artifact.
            thresholds: The target whose gates apply.

        Raises:
            ConfigError: A server is unknown, or only its environment is named.
            ResourceError: One is not installed.
            UnsupportedError: The target's artifacts are not checkpoints, or one of the servers is known to
                refuse their format, or to read it wrongly.
        """
        stated = parse_environments(self.environments)
        if not self.names:
            if stated:
                raise ConfigError(
                    f"--environment names the environment of {', '.join(stated)}, which is not asked",
                    hint="ask a server by --runtime NAME",
                )
            return []
        if backend_of(target).writes_graph:
            raise UnsupportedError(
                f"artifacts of target {target.name} are graphs, which {' and '.join(self.names)} cannot load",
                hint="servers load artifacts of targets with backend checkpoint; llmc targets lists them",
            )
        for name in (known_recipe(each).name for each in self.names):
            if (reason := why_not(Runtime(name), target)) is not None:
                raise UnsupportedError(
                    f"{name} does not serve artifacts of target {target.name}: {reason}",
                    hint=f"llmc check MODEL --target {target.name} --runtime {name} says what is known",
                )
        found = tuple(find_server(name, stated.get(name)) for name in dict.fromkeys(self.names))
        return [Servers(found, self.seconds).extra(thresholds)]


def _needs_gpu(server: Server, target: Target) -> bool:
    """Return whether a server is known to have no kernels for a CPU for what a target builds."""
    found = treatments(Runtime(server.name), target)
    return any(treatment.status is Status.GPU_ONLY for treatment in found)


def _why_idle(server: Server, run: Run) -> str | None:
    """Return why a server is known to end while it loads the artifact; None if nothing is known."""
    compiled = run.subject.compiled
    config = compiled.config.get_text_config(decoder=True)
    model = ServedModel(config, compiled.architecture, tuple(_quantized(run)))
    for found in of_model(Runtime(server.name), model):
        if found.refuses or (found.status is Status.GPU_ONLY and detect_gpu() is None):
            return f"{found.subject}: {found.reason} [{found.where}]"
    return _no_kernels(server, run)


def _no_kernels(server: Server, run: Run) -> str | None:
    """Return why a server cannot compute the artifact's experts on this machine; None if nothing is known.

    vLLM ends while it loads, before it has read any tensor; its kernels for some experts need AMX on x86.
    """
    subject = run.subject
    coded = any(record.role is WeightRole.EXPERTS and record.bits < 16 for record in subject.weights)
    if not coded or server.name != Runtime.VLLM.value or detect_gpu() is not None:
        return None
    if machine() != "x86_64" or "amx_tile" in detect_cpu().isa:
        return None
    found = (of_experts(Runtime.VLLM, subject.target, scheme) for scheme in schemes_of(subject.target))
    first = next((each for each in found if each.status is Status.GPU_ONLY), None)
    return None if first is None else f"{first.subject}: {first.reason} [{first.where}]"


def _matrices(run: Run) -> Matrix:
    """Return a function that reads a matrix of the artifact by the name of its module."""
    subject = run.subject
    single = {name: rows for name, rows in subject.sources.items() if len(rows.sources) == 1}
    stored = read_weights(subject.folder, subject.backend, single)
    by_module = {single[name].sources[0].removesuffix(".weight"): each for name, each in stored.items()}

    def read(module: str) -> Array | None:
        found = by_module.get(module)
        return None if found is None else found.whole()

    return read


def _quantized(run: Run) -> list[str]:
    """Return the modules of the matrices that the artifact stores in fewer bits."""
    sources = run.subject.sources
    stored = [
        sources[record.name] for record in run.subject.weights if record.name in sources and record.bits < 16
    ]
    return [rows.sources[0].removesuffix(".weight") for rows in stored if len(rows.sources) == 1]


def records_of_all(found: Sequence[ServerRecord], target: Target) -> tuple[ServerRecord, ...]:
    """Return the records, and one of every server that was not asked and could load the artifact."""
    if backend_of(target).writes_graph:
        return tuple(found)
    asked = {record.name for record in found}
    others = [name for name in RECIPES if name not in asked]
    return (*found, *(ServerRecord(name=name, version=None, deed=Deed.NOT_ASKED) for name in others))


def _broken_record(server: Server) -> ServerRecord:
    return ServerRecord(name=server.name, version=server.version, deed=Deed.FAILED)
