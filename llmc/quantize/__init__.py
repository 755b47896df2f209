"""Weight-only block quantization: which tensor gets which bits, and the codes themselves."""
