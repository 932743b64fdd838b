"""CUDA kernels and their TensorRT plugins."""
