"""PyTorch to ONNX: export, precision, quantisation, parity."""
