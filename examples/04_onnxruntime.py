"""An exported model in plain ONNX Runtime, without sanrt: `python examples/04_onnxruntime.py MODEL.onnx PICTURE RESULT`.

`sanrt export --scale 4` writes models/san_x4.onnx, `sanrt info` tells its names, shapes and range.
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image

model, source, result = sys.argv[1:4]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

pixels = np.asarray(Image.open(source).convert("RGB"), np.float32)  # RGB, 0..255
x = pixels.transpose(2, 0, 1)[None]  # (1, 3, height, width), each side at least 4
(y,) = session.run(["output"], {"input": x})
large = y[0].transpose(1, 2, 0).clip(0, 255).round().astype(np.uint8)  # the network clips nothing itself
Image.fromarray(large).save(result)
print(f"{pixels.shape} -> {large.shape}")
