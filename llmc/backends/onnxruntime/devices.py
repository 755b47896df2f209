"""Check in a build for CUDA that ONNX Runtime has kernels for the GPU of its profile."""

from llmc.backends.tensorrt.support import targets_for
from llmc.catalog import list_targets
from llmc.errors import UnsupportedError
from llmc.gpu import selecting_hint
from llmc.graph.domains import MICROSOFT
from llmc.graph.model import Graph
from llmc.machine import LOCAL
from llmc.profile import Profile
from llmc.runtime.device_code import RELEASE, published_capabilities, published_for

#: Operators for experts, and the first compute capability that they have kernels for. Code for 7.5 is in the
#: wheels, but ends with "Arch unsupported for MoE GEMM".
_EXPERTS, _FIRST_WITH_EXPERTS = ("MoE", "QMoE"), 8


def require_device_kernels(target: str, profile: Profile) -> None:
    """Require that some wheel of the tested onnxruntime-gpu has code for a profile's GPU.

    A profile without a compute capability is accepted: it describes a host without a GPU, which only builds.

    Raises:
        UnsupportedError: No wheel has code for it; the error names targets that run there, or another GPU of
            this machine.
    """
    capability = profile.compute_capability
    if capability is None or published_for(capability):
        return
    others = targets_for(capability, (listed.document for listed in list_targets()))
    here = profile.name == LOCAL
    select = selecting_hint(lambda gpu: bool(published_for(gpu.capability))) if here else None
    raise UnsupportedError(
        f"target {target} cannot run on profile {profile.name}: onnxruntime-gpu {RELEASE} has no code for "
        f"compute capability {capability}, only for {', '.join(published_capabilities())}",
        hint=select
        or (f"for {profile.name} use {' or '.join(others)}" if others else "name a profile of another GPU"),
    )


def require_expert_kernels(graph: Graph, profile: Profile) -> None:
    """Require that a profile's GPU can run the layers of experts of a graph, if it has any.

    Raises:
        UnsupportedError: It cannot.
    """
    capability = profile.compute_capability
    if capability is None or int(capability.partition(".")[0]) >= _FIRST_WITH_EXPERTS:
        return
    if any(node.domain == MICROSOFT and node.op_type in _EXPERTS for node in graph.graph):
        raise UnsupportedError(
            f"the experts of this model cannot run on profile {profile.name}: onnxruntime-gpu {RELEASE} has "
            f"no kernels of {' and '.join(_EXPERTS)} for compute capability {capability}",
            hint=f"build for a GPU of {_FIRST_WITH_EXPERTS}.0 or newer; llmc inspect MODEL --support lists "
            "the targets that take the model",
        )
