"""From PyTorch to ONNX and engines: export, precision, quantisation, parity, proof."""
