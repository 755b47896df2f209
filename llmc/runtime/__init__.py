"""What executes graphs: sessions of ONNX Runtime, and what all sessions have in common."""
