"""Memory that tensors take which are mapped from their files."""

import mmap

import onnx_ir as ir

#: Bytes that are read before pages are dropped.
_MOST = 512 << 20


class MappedPages:
    """Drops the pages of a graph's tensors from the process once enough of them was read.

    onnx_ir maps a file anew for each of its tensors, and keeps the map as long as the tensor. Pages of files
    that are dropped are read again when they are asked for, from the system's cache if it still has them.

    Args:
        graph: Its initializers are in files.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._read = 0

    def count(self, size: int) -> None:
        """Say that `size` bytes more were read."""
        self._read += size
        if self._read < _MOST:
            return
        self._read = 0
        for value in self._graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None:
                tensor.raw.madvise(mmap.MADV_DONTNEED)
