"""Execute graphs: sessions of ONNX Runtime, and the common part of all sessions."""
