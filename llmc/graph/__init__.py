"""The graph that every station works on: an ONNX model, its KV cache, its lazy weights."""
