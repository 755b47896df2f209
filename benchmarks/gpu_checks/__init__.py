"""Check on a GPU what cannot be known without one; benchmarks/gpu.py runs these checks."""
