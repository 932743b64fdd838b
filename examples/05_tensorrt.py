"""An engine by hand, without sanrt: `python examples/05_tensorrt.py MODEL.engine PICTURE RESULT`. Never run on hardware yet.

`sanrt build models/san_x4.onnx --fp16` writes the engine, as TensorRT made it, for the kind of GPU that it was built on.
"""

import sys
from pathlib import Path

import numpy as np
import tensorrt as trt  # or tensorrt_rtx, whichever built it
import torch  # for memory on the GPU
from PIL import Image

path, source, result = sys.argv[1:4]
runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
engine = runtime.deserialize_cuda_engine(Path(path).read_bytes())
context = engine.create_execution_context()

pixels = np.asarray(Image.open(source).convert("RGB"), np.float32)  # RGB, 0..255
x = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous().cuda()  # (1, 3, height, width), float32
if not context.set_input_shape("input", tuple(x.shape)):
    sys.exit(f"{source}: the engine's profiles take no {tuple(x.shape)}; see `sanrt info {path}`")
y = torch.empty(tuple(context.get_tensor_shape("output")), dtype=torch.float32, device="cuda")
context.set_tensor_address("input", x.data_ptr())
context.set_tensor_address("output", y.data_ptr())

stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())  # x is copied there
if not context.execute_async_v3(stream.cuda_stream):
    sys.exit("TensorRT refused to run")
stream.synchronize()
large = y[0].permute(1, 2, 0).clamp(0, 255).round().byte().cpu().numpy()  # the network clips nothing itself
Image.fromarray(large).save(result)
