"""Artifacts: the records of which their files consist; `store` reads and writes the files."""
