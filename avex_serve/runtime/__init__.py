"""What serves: numpy, soundfile, soxr and a backend. Torch is reached by one module only, `torch_backend`."""
