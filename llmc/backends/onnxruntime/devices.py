"""Check before a build for CUDA that ONNX Runtime has kernels for the GPU of its profile."""

from llmc.backends.tensorrt.support import targets_for
from llmc.catalog import list_targets
from llmc.errors import UnsupportedError
from llmc.profile import Profile
from llmc.runtime.device_code import RELEASE, published_capabilities, published_for


def require_device_kernels(target: str, profile: Profile) -> None:
    """Require that some wheel of the tested onnxruntime-gpu has code for a profile's GPU.

    A profile without a compute capability is accepted: it describes a host without a GPU, which only builds.

    Raises:
        UnsupportedError: No wheel has code for it; the error names targets that run there.
    """
    capability = profile.compute_capability
    if capability is None or published_for(capability):
        return
    others = targets_for(capability, (listed.document for listed in list_targets()))
    raise UnsupportedError(
        f"target {target} cannot run on profile {profile.name}: onnxruntime-gpu {RELEASE} has no code for "
        f"compute capability {capability}, only for {', '.join(published_capabilities())}",
        hint=f"for {profile.name} use {' or '.join(others)}" if others else "name a profile of another GPU",
    )
