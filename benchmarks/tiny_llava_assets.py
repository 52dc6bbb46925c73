"""Makes condense_kernels/tiny_llava/assets from what the packages of the extra `vision` bring: what is in that folder
came from here, and nowhere else.

    python benchmarks/tiny_llava_assets.py
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from condense_kernels.cli.dinov2 import installed_file
from condense_kernels.tiny_llava.scenes import ASSETS, BACKGROUNDS

HEIGHT, LEAST_WIDTH = 224, 256  # of a photograph, in pixels
FILES = {
    "cat": ("scikit-image", "skimage/data/chelsea.png"),
    "coffee": ("scikit-image", "skimage/data/coffee.png"),
    "brick": ("scikit-image", "skimage/data/brick.png"),
    "grass": ("scikit-image", "skimage/data/grass.png"),
    "gravel": ("scikit-image", "skimage/data/gravel.png"),
    "stars": ("scikit-image", "skimage/data/hubble_deep_field.jpg"),
    "eye": ("scikit-image", "skimage/data/retina.jpg"),
    "rocket": ("scikit-image", "skimage/data/rocket.jpg"),
    "paper": ("scikit-image", "skimage/data/text.png"),
    "man": ("scikit-image", "skimage/data/camera.png"),
    "flower": ("scikit-learn", "sklearn/datasets/images/flower.jpg"),
    "temple": ("scikit-learn", "sklearn/datasets/images/china.jpg"),
}


def photograph(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    scale = max(HEIGHT / image.height, LEAST_WIDTH / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    top = (image.height - HEIGHT) // 2
    return image.crop((0, top, image.width, top + HEIGHT))


def main() -> None:
    ASSETS.mkdir(exist_ok=True)
    for name in BACKGROUNDS:
        photograph(installed_file(*FILES[name])).save(ASSETS / f"{name}.jpg", quality=90, optimize=True)
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)  # [1797, 8, 8] of 0 to 16
    np.savez_compressed(ASSETS / "digits.npz", images=images, labels=labels)


if __name__ == "__main__":
    main()
