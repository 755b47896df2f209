"""Define the graph that every station works on: an ONNX model, its KV cache and its lazy weights."""
