"""Serve artifacts with ONNX Runtime and onnxruntime-genai: their files, and text generation."""
