"""What reads and writes artifacts and caches on disk; the records in them are in `llmc.artifact`."""
