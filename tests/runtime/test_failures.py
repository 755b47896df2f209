"""Errors of memory that ran out are told from others by the texts of each library."""

import pytest

from llmc.errors import ParityError, ResourceError
from llmc.runtime.failures import MEMORY_HINT, is_out_of_memory, missing_resource, typed_error


@pytest.mark.parametrize(
    "text",
    [
        "std::bad_alloc",
        "bad allocation",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA failure 2: out of memory ; GPU=0",
        "Failed to allocate memory for requested buffer of size 8",
        "Available memory of 0 is smaller than requested bytes of 8",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
    ],
)
def test_memory_that_ran_out(text: str) -> None:
    assert is_out_of_memory(text)
    error = typed_error(RuntimeError(f"{text}\n"), "a step failed")
    assert isinstance(error, ResourceError)
    assert (error.fact, error.hint) == (f"a step failed: out of memory: {text}", MEMORY_HINT)


def test_other_errors() -> None:
    assert is_out_of_memory(MemoryError())
    assert missing_resource("an illegal memory access was encountered") is None
    assert isinstance(typed_error(RuntimeError("shapes differ"), "a step failed"), ParityError)
    cudnn = typed_error(RuntimeError("cuDNN is unavailable"), "a step failed")
    assert isinstance(cudnn, ResourceError)
    assert str(cudnn.hint).startswith("pip install nvidia-cudnn-cu13")
