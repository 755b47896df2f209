"""TensorRT and TensorRT-RTX: engines, and what it takes to build, load and execute them."""
