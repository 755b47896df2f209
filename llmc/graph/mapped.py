"""Limit the memory that tensors mapped from their files take."""

import mmap

import onnx_ir as ir

#: Number of bytes read before pages are dropped.
_MOST = 512 << 20


class MappedPages:
    """Drops the pages of a graph's tensors from the process once enough of them have been read.

    onnx_ir maps a file separately for each of its tensors, and keeps the map as long as the tensor. Dropped
    pages are read again on access, from the system's page cache if it still holds them.

    Args:
        graph: The graph, whose initializers are in files.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._read = 0

    def count(self, size: int) -> None:
        """Report that `size` more bytes were read."""
        self._read += size
        if self._read < _MOST:
            return
        self._read = 0
        for value in self._graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None:
                tensor.raw.madvise(mmap.MADV_DONTNEED)
