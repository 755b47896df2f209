"""Steps that several commands share, from a checkpoint to the files of an artifact."""
