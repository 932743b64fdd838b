"""TensorRT and TensorRT-RTX through one code path."""
