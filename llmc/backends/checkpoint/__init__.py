"""Write a Hugging Face folder with quantized safetensors, which servers load."""
