"""Upscale pictures by a Triton server: `python upscale_by_triton.py MODEL SOURCE RESULT [--url HOST:PORT]`.

Needs `pip install 'tritonclient[grpc]' numpy pillow`. An example to begin from: 8-bit RGB alone; the server's limits on
sizes are in the model's `config.pbtxt`, which this reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

Facts = dict[str, int]
Infer = Callable[["np.ndarray[Any, Any]"], "np.ndarray[Any, Any]"]


def facts_of(config: Any) -> Facts:
    """Scale, value range and sizes, as sanrt wrote them into the model's configuration."""
    return {
        name: int(config.parameters[f"sanrt.{name}"].string_value)
        for name in ("scale", "value_range", "min_side", "multiple")
    }


def upscale(pixels: np.ndarray[Any, Any], facts: Facts, infer: Infer) -> np.ndarray[Any, Any]:
    """uint8 RGB (H, W, 3) -> (scale * H, scale * W, 3); `infer` maps float (1, 3, h, w) to (1, 3, scale * h, scale * w)."""
    height, width = pixels.shape[:2]
    padded = [
        (0, -(-max(side, facts["min_side"]) // facts["multiple"]) * facts["multiple"] - side) for side in (height, width)
    ]
    pixels = np.pad(pixels, [*padded, (0, 0)], mode="edge")
    planes = pixels.transpose(2, 0, 1)[None] * np.float32(facts["value_range"] / 255)
    result = infer(np.ascontiguousarray(planes, np.float32))[0].astype(np.float32) * np.float32(255 / facts["value_range"])
    cropped = result[:, : facts["scale"] * height, : facts["scale"] * width]
    larger: np.ndarray[Any, Any] = np.rint(cropped.clip(0, 255)).astype(np.uint8).transpose(1, 2, 0)
    return larger


def main() -> None:
    """One picture."""
    import tritonclient.grpc as triton
    from PIL import Image
    from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("source")
    parser.add_argument("result")
    parser.add_argument("--url", default="localhost:8001")
    asked = parser.parse_args()
    client = triton.InferenceServerClient(asked.url)
    config = client.get_model_config(asked.model).config
    dtype = triton_to_np_dtype(client.get_model_metadata(asked.model).inputs[0].datatype)

    def infer(planes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        given = triton.InferInput("input", list(planes.shape), np_to_triton_dtype(dtype))
        given.set_data_from_numpy(planes.astype(dtype))
        found: np.ndarray[Any, Any] = client.infer(asked.model, [given]).as_numpy("output")
        return found

    pixels = np.asarray(Image.open(asked.source).convert("RGB"))
    Image.fromarray(upscale(pixels, facts_of(config), infer)).save(asked.result)


if __name__ == "__main__":
    main()
