"""Refuse matrices that a format of checkpoints cannot hold, before anything is calibrated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.backends.checkpoint.formats.choice import format_of
from llmc.catalog import list_targets
from llmc.config import EngineScheme, ServedCheckpoint, Target, WeightRole, WeightScheme
from llmc.errors import ConfigError, UnsupportedError
from llmc.graph.linear import find_embeddings, find_linears
from llmc.graph.match import lazy_of
from llmc.quantize.linear import plan_matrices
from llmc.quantize.place import choose_scheme
from llmc.quantize.served_experts import Rules, expert_layers, find_experts, scheme_of_experts

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmc.backends.checkpoint.formats.base import Format
    from llmc.backends.written import WrittenFrom
    from llmc.graph.files import FileTensors
    from llmc.graph.model import Graph

_FLOAT = "give it a rule with scheme: null"
#: The last names of modules that servers join into one product (`packed_modules_mapping` of vLLM 0.32).
_JOINED = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"c_fc_0", "c_fc_1"}),
    frozenset({"in_proj_qkv", "in_proj_z"}),
    frozenset({"in_proj_b", "in_proj_a"}),
)


@dataclass(frozen=True)
class PlannedMatrix:
    """A matrix that a rule quantizes.

    Args:
        name: Name of its initializer.
        source: The parameter of the model.
        shape: (N, K).
        schemes: The schemes that it can get.
    """

    name: str
    source: str
    shape: tuple[int, int]
    schemes: tuple[WeightScheme | EngineScheme, ...]


def require_matrices(graph: Graph, target: Target, checkpoint: WrittenFrom) -> None:
    """Require that the target's format can hold every matrix that its rules quantize.

    Args:
        graph: The graph after its passes, before quantization.

    Raises:
        UnsupportedError: A matrix cannot be held, or servers do not read it quantized.
        ConfigError: The target has no section checkpoint, or none of its rules applies.
    """
    section = target.checkpoint
    if section is None:
        raise ConfigError(f"target {target.name} has no section checkpoint, which backend checkpoint needs")
    form = format_of(section)
    linear = set(checkpoint.linear_parameters())
    found: list[WeightScheme | EngineScheme] = []
    planned = list(planned_matrices(graph, target, section))
    for matrix in planned:
        _require_linear(matrix, graph, linear)
        for scheme in matrix.schemes:
            refusal = form.refusal(scheme, matrix.shape)
            if refusal is not None:
                raise UnsupportedError(
                    f"format {section.format.value} cannot hold {matrix.source}: {refusal}",
                    hint=_advise(target, section, form, planned),
                )
        found += matrix.schemes
    found += _require_experts(graph, target, section, form, checkpoint)
    _require_one_scheme({matrix.name: matrix for matrix in planned}, graph)
    mixed = form.mixed_refusal(found)
    if mixed is not None:
        raise UnsupportedError(
            f"format {section.format.value} cannot hold all schemes of target {target.name}: {mixed}",
            hint="copy the target and give all matrices one scheme, or use format compressed-tensors",
        )
    if not found:
        raise ConfigError(
            f"target {target.name} quantizes no matrix of this model",
            hint="its rules must match a linear layer: llmc targets show",
        )


def _advise(target: Target, section: ServedCheckpoint, form: Format, planned: Sequence[PlannedMatrix]) -> str:
    """Name a target that ships, writes the same format and can hold all matrices, or say what to change."""
    for each in list_targets():
        other, rules = each.document.checkpoint, each.document.quantize
        if other != section or rules is None or each.document.name == target.name:
            continue
        schemes = [rule.scheme for rule in rules.rules if rule.scheme is not None]
        if all(form.refusal(scheme, matrix.shape) is None for scheme in schemes for matrix in planned):
            return f"--target {each.document.name} can"
    return f"copy the target and change its rule, or {_FLOAT}"


def joined_weights(graph: Graph) -> list[list[str]]:
    """Return the weights of products that servers join, of each layer: they read the same activation."""
    joined: dict[tuple[object, frozenset[str]], list[str]] = {}
    for linear in find_linears(graph):
        name = str(linear.weight.name)
        last = name.removesuffix(".weight").rpartition(".")[2]
        together = next((each for each in _JOINED if last in each), None)
        if together is not None:
            joined.setdefault((linear.activation, together), []).append(name)
    return [names for names in joined.values() if len(names) > 1]


def _require_one_scheme(planned: Mapping[str, PlannedMatrix], graph: Graph) -> None:
    """Refuse products that servers join and that have different schemes, or some of them none.

    Raises:
        UnsupportedError: Two of them differ.
    """
    for names in joined_weights(graph):
        schemes = [planned[name].schemes if name in planned else None for name in names]
        other = next((name for name, each in zip(names, schemes, strict=True) if each != schemes[0]), None)
        if other is not None:
            raise UnsupportedError(
                f"servers join {names[0]} and {other}, and the target's rules store them differently",
                hint="give them one rule",
            )


def planned_matrices(graph: Graph, target: Target, section: ServedCheckpoint) -> Iterator[PlannedMatrix]:
    """Yield the matrices that the rules of a target quantize, in graph order."""
    if target.quantize is not None:
        choices = () if target.quantize.allocation is None else target.quantize.allocation.choices
        for plan in plan_matrices(graph, target.quantize, target.dtype):
            if plan.scheme is not None:
                open_choices = choices if plan.is_linear and not plan.kept else ()
                yield PlannedMatrix(plan.name, plan.sources[0], plan.shape, (plan.scheme, *open_choices))
        return
    for linear in find_linears(graph):
        name = str(linear.weight.name)
        scheme = choose_scheme(section.weights, linear.role, name)
        if scheme is not None:
            source = lazy_of(linear.weight).sources[0]
            yield PlannedMatrix(name, source, (linear.out_features, linear.in_features), (scheme,))
    for embedding in find_embeddings(graph):
        name = str(embedding.weight.name)
        scheme = choose_scheme(section.weights, WeightRole.EMBEDDING, name)
        if scheme is not None:
            rows, width = lazy_of(embedding.weight).shape.numpy()
            yield PlannedMatrix(name, lazy_of(embedding.weight).sources[0], (rows, width), (scheme,))


def _require_linear(matrix: PlannedMatrix, graph: Graph, linear: set[str]) -> None:
    """Refuse a matrix that servers do not read quantized.

    Raises:
        UnsupportedError: It is looked up by rows, has its inputs first, or is not the weight of a linear
            layer.
    """
    if matrix.name in {str(embedding.weight.name) for embedding in find_embeddings(graph)}:
        raise UnsupportedError(
            f"{matrix.source} is an embedding, whose rows servers read in float", hint=_FLOAT
        )
    if matrix.source in linear:
        return
    first = next((each for each in find_linears(graph) if str(each.weight.name) == matrix.name), None)
    what = "has its inputs first" if first is not None and not first.transposed else "is not a linear layer"
    raise UnsupportedError(f"{matrix.source} {what}, and servers do not read it quantized", hint=_FLOAT)


def _require_experts(
    graph: Graph, target: Target, section: ServedCheckpoint, form: Format, checkpoint: WrittenFrom
) -> list[WeightScheme | EngineScheme]:
    """Require that the matrices of experts can be written one by one; return their schemes.

    Raises:
        UnsupportedError: The files have them stacked, or the matrices of a layer have different schemes.
    """
    rules = _rules_of(target, section)
    for layer in expert_layers(graph):
        _require_one_scheme_of_experts(layer, rules)
    planned = list(planned_experts(graph, target, section, checkpoint.file_tensors()))
    found = {each.source for each in planned}
    for weight in find_experts(graph):
        source = lazy_of(weight).sources[0]
        if scheme_of_experts(rules, str(weight.name)) is not None and source not in found:
            raise UnsupportedError(
                f"{source} holds the matrices of all experts of a layer, and servers read each of them",
                hint="give experts a rule with scheme: null, or build from a folder that has them one by one",
            )
    for matrix in planned:
        refusal = form.refusal(matrix.schemes[0], matrix.shape)
        if refusal is not None:
            raise UnsupportedError(
                f"format {section.format.value} cannot hold the experts of {matrix.source}: {refusal}",
                hint="copy the target and change its rule, or give experts a rule with scheme: null",
            )
    return [matrix.schemes[0] for matrix in planned]


def planned_experts(
    graph: Graph, target: Target, section: ServedCheckpoint, files: FileTensors
) -> Iterator[PlannedMatrix]:
    """Yield the shapes of experts' matrices that the rules of a target quantize, each stack's in turn.

    A stack whose matrices the files do not have one by one is left out.
    """
    rules, infos = _rules_of(target, section), files.store.infos()
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, part in files.parts.items():
        if part.expert is not None:
            shapes.setdefault(part.parameter, set()).add(infos[name].shape)
    for weight in find_experts(graph):
        source, scheme = lazy_of(weight).sources[0], scheme_of_experts(rules, str(weight.name))
        if scheme is not None:
            for outputs, inputs in sorted(shapes.get(source, ())):
                yield PlannedMatrix(str(weight.name), source, (outputs, inputs), (scheme,))


def _rules_of(target: Target, section: ServedCheckpoint) -> Rules:
    return section.weights if target.quantize is None else target.quantize.rules


def _require_one_scheme_of_experts(layer: Sequence[ir.Value], rules: Rules) -> None:
    """Refuse a layer of experts whose stacks have different schemes: servers have one method for all of it.

    Raises:
        UnsupportedError: Two of them differ.
    """
    names = [str(weight.name) for weight in layer]
    schemes = [scheme_of_experts(rules, name) for name in names]
    other = next((name for name, each in zip(names, schemes, strict=True) if each != schemes[0]), None)
    if other is not None:
        raise UnsupportedError(
            f"servers compute {names[0]} and {other} by one method, and the target's rules store them "
            "differently",
            hint="give them one rule",
        )
