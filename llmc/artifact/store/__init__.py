"""Read and write artifacts and caches on disk; their records are in `llmc.artifact`."""
