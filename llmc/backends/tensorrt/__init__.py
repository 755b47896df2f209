"""Build, load and execute engines of TensorRT and TensorRT-RTX."""
