"""ONNX Runtime and onnxruntime-genai: the files by which they serve an artifact, and text from it."""
