"""What quantization and pruning share: a model over a text, layer by layer, and the Hessian of its inputs."""
