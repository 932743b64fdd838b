"""`make demo`: upscale real photographs with the bundled weights and draw them beside bicubic and the original.

The photographs come with scikit-image (public domain or CC0: astronaut, NASA; cat, Stefan van der Walt; coffee,
Rachel Michetti; rocket, SpaceX), read out of its wheel. Each is made four times smaller as the
paper does it, then `sanrt run` enlarges it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import numpy.typing as npt
import pyvips

from sanrt.export.metrics import y_psnr
from training.degrade import bicubic, degrade

Picture = npt.NDArray[np.uint8]
SCALE = 4
PHOTOGRAPHS = {"astronaut": "astronaut.png", "cat": "chelsea.png", "coffee": "coffee.png", "rocket": "rocket.jpg"}
OUT = Path("demo")
WHEEL = "scikit-image>=0.25,<1"


def main() -> None:
    """Make the small pictures, run sanrt on their folder, draw and score the comparisons."""
    (OUT / "originals").mkdir(parents=True, exist_ok=True)
    with ZipFile(wheel(OUT)) as archive:
        originals = {name: original(archive, file) for name, file in PHOTOGRAPHS.items()}
    (OUT / "input").mkdir(parents=True, exist_ok=True)
    for name, picture in originals.items():
        save(degrade(picture, SCALE), OUT / "input" / f"{name}.png")
    words = [str(OUT / "input"), str(OUT / "output"), "--scale", str(SCALE), "--overwrite"]
    subprocess.run([sys.executable, "-m", "sanrt", "run", *words], check=True)
    print(f"\n{'Y-PSNR, dB':<12}{'bicubic':>9}{'sanrt':>9}")
    for name, picture in originals.items():
        enlarged = {
            "bicubic": bicubic(degrade(picture, SCALE), SCALE),
            "sanrt": read(OUT / "output" / f"{name}.png"),
        }
        scores = {label: y_psnr(output, picture, shave=SCALE) for label, output in enlarged.items()}
        labelled = [(f"{label} {scores[label]:.2f} dB", output) for label, output in enlarged.items()]
        side_by_side([*labelled, ("original", picture)]).write_to_file(OUT / f"{name}.png")
        print(f"{name:<12}{scores['bicubic']:>9.2f}{scores['sanrt']:>9.2f}")
    print(f"\nside by side: {', '.join(str(OUT / f'{name}.png') for name in originals)}")


def wheel(folder: Path) -> Path:
    """scikit-image's wheel, downloaded into the folder unless it is there."""
    if not list(folder.glob("scikit_image-*.whl")):
        words = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    return next(folder.glob("scikit_image-*.whl"))


def original(archive: ZipFile, file: str) -> Picture:
    """A photograph of scikit-image's, cropped so that the scale divides its sides."""
    path = OUT / "originals" / file
    path.write_bytes(archive.read(f"skimage/data/{file}"))
    picture = read(path)
    height, width = (side // SCALE * SCALE for side in picture.shape[:2])
    return picture[:height, :width]


def read(path: Path) -> Picture:
    """A picture file as uint8 (H, W, 3)."""
    array: Picture = pyvips.Image.new_from_file(str(path))[:3].numpy()
    return array


def save(picture: Picture, path: Path) -> None:
    """Write uint8 (H, W, 3) by the path's suffix."""
    pyvips.Image.new_from_array(picture).write_to_file(str(path))


def side_by_side(pictures: list[tuple[str, Picture]]) -> pyvips.Image:
    """Labelled pictures of one size in a row."""
    cells = []
    for label, picture in pictures:
        image = pyvips.Image.new_from_array(picture)
        caption = pyvips.Image.text(label, font="sans 12", dpi=96).gravity("centre", image.width, 28)
        cells.append(caption.bandjoin([caption, caption]).join(image, "vertical"))
    return pyvips.Image.arrayjoin(cells, shim=8, across=len(cells))


if __name__ == "__main__":
    main()
