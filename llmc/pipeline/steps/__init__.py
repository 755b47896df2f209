"""Implement the steps that several commands share, from a checkpoint to the files of an artifact."""
