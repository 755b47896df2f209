"""Implement `llmc tune`: candidates, the order in which they are tried, and their measurements."""
