"""funcpipe: JAX-style parallel training for PyTorch."""
