"""Share what quantization and pruning need: a layer-by-layer walk over a text, and the inputs' Hessian."""
