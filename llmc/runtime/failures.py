"""Tell errors of memory that ran out from others, whichever library raised them."""

import re

from llmc.errors import LlmcError, ParityError, ResourceError

#: Texts of C++, torch, CUDA, its libraries and the allocators of onnxruntime.
_NO_MEMORY = re.compile(
    r"out of memory|failed to allocate memory|can't allocate memory|smaller than requested bytes|bad.alloc"
    r"|STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
#: What to do where a device has not enough memory.
MEMORY_HINT = "run fewer rows or a shorter context, take a smaller model, or end what else uses the memory"
#: What onnxruntime says of a failed call of CUDA or of a library over it, among paths of its own source.
_FAILED_CALL = re.compile(r"\b(?:CUDA|CUBLAS|CUBLASLT|CUDNN|CURAND|CUFFT) (?:failure|error)\b[^;\n]*")
#: Text of ONNX Runtime's CUDA provider, and what to do.
_NO_CUDNN = "cuDNN is unavailable"
_CUDNN_HINT = "pip install nvidia-cudnn-cu13: an operator of this graph needs cuDNN 9"

#: Text of ONNX Runtime's kernels for experts, and what to do.
_NO_EXPERTS = "Arch unsupported for MoE GEMM"
_EXPERTS_HINT = "experts need a GPU of compute capability 8.0 or newer"


def is_out_of_memory(error: BaseException | str) -> bool:
    """Return whether an error, or the text of one, says that memory ran out."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def failed_call(error: BaseException) -> str | None:
    """Return what an error of onnxruntime says of a failed call of CUDA; None if it is of something else."""
    found = _FAILED_CALL.search(str(error))
    return None if found is None else found[0].strip()


def missing_resource(error: BaseException | str) -> str | None:
    """Return what to do about an error that says what the machine lacks; None if it says something else.

    Args:
        error: The error, or its text from another process.
    """
    if is_out_of_memory(error):
        return MEMORY_HINT
    hints = {_NO_CUDNN: _CUDNN_HINT, _NO_EXPERTS: _EXPERTS_HINT}
    return next((hint for text, hint in hints.items() if text in str(error)), None)


def typed_error(error: Exception, fact: str) -> LlmcError:
    """Return the typed error of a runtime's: of resources where the machine lacks some, otherwise of parity.

    Args:
        fact: What failed.
    """
    text = str(error).strip()
    if is_out_of_memory(error):
        return ResourceError(f"{fact}: out of memory: {text}", hint=MEMORY_HINT)
    if (hint := missing_resource(error)) is not None:
        return ResourceError(f"{fact}: {text}", hint=hint)
    return ParityError(f"{fact}: {text}")
