"""Tell errors of memory that ran out from others, whichever library raised them."""

import re

from llmc.errors import LlmcError, ParityError, ResourceError

#: Texts of C++, torch, CUDA and the allocators of onnxruntime.
_NO_MEMORY = re.compile(
    r"out of memory|failed to allocate memory|can't allocate memory|smaller than requested bytes|bad.alloc",
    re.IGNORECASE,
)
#: What to do where a device has not enough memory.
MEMORY_HINT = "run fewer rows or a shorter context, take a smaller model, or end what else uses the memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def typed_error(error: Exception, fact: str) -> LlmcError:
    """Return the typed error of a runtime's: of resources where memory ran out, otherwise of parity.

    Args:
        fact: What failed.
    """
    if is_out_of_memory(error):
        return ResourceError(f"{fact}: out of memory: {error}", hint=MEMORY_HINT)
    return ParityError(f"{fact}: {error}")
