"""CUDA kernels and their TensorRT plugins; vector kernels for the CPU."""
