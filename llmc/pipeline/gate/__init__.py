"""Run the gate: what is measured of an artifact, against which original, and the verdict."""
