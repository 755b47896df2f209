"""The order of the stations: what each command does, from a model to an artifact and its verdict.

Only this package knows all stations. Its functions import them when they are called, so that the
command line stays instant.
"""


__all__ = ["bench", "build", "inspect", "run", "verify"]
