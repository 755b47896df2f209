"""Define the records in an artifact's files; `store` reads and writes the files."""
