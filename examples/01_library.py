"""An array in, an array four times as large out: `python examples/01_library.py [PICTURE [RESULT]]`."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sanrt import Upscaler

source = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("cat.png")
result = sys.argv[2] if len(sys.argv) > 2 else "large.png"

small = Image.open(source).convert("RGB")
with Upscaler.load(4) as upscaler:
    print(upscaler)
    large = upscaler(small)  # a Pillow picture, a NumPy array, a torch tensor: uint8, uint16 or float32 in 0..1
    thumbnails = upscaler([np.asarray(small)[:16, :16], np.zeros((5, 7), np.uint16)])  # a list gives a list

print(f"{small.size} -> {large.shape} {large.dtype}; {[each.shape for each in thumbnails]}")
Image.fromarray(large).save(result)
