"""Define what a build leaves behind: its manifest, how it is written and read, and the cache of stages."""
