"""CUDA kernels, compiled with NVRTC when they are first used: as PyTorch operators and as TensorRT plugins."""
