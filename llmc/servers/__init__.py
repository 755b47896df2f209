"""Ask the servers that load checkpoints: each runs in an environment of its own, as a worker over pipes."""
