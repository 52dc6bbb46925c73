"""Photographs that come inside wheels, found without importing those packages; nothing is downloaded."""

from pathlib import Path
from typing import NamedTuple

from .dinov2 import installed_file


class Photograph(NamedTuple):
    package: str
    file: str
    credit: str  # who made it, and under which terms it may be shown

    @property
    def path(self) -> Path:
        return installed_file(self.package, self.file)

    @property
    def name(self) -> str:
        return Path(self.file).name


SKIMAGE, SKLEARN = "skimage/data", "sklearn/datasets/images"
HOPPER = Photograph("matplotlib", "matplotlib/mpl-data/sample_data/grace_hopper.jpg", "US Navy, public domain")
PHOTOGRAPHS = (
    HOPPER,
    Photograph("scikit-image", f"{SKIMAGE}/astronaut.png", "NASA, public domain"),
    Photograph("scikit-image", f"{SKIMAGE}/chelsea.png", "Stéfan van der Walt, CC0"),
    Photograph("scikit-learn", f"{SKLEARN}/flower.jpg", "vultilion, CC BY 2.0"),
    Photograph("scikit-learn", f"{SKLEARN}/china.jpg", "danielbuechele, CC BY 2.0"),
    Photograph("scikit-image", f"{SKIMAGE}/camera.png", "Lav Varshney, CC0"),
    Photograph("scikit-image", f"{SKIMAGE}/coffee.png", "Rachel Michetti, CC0"),
    Photograph("scikit-image", f"{SKIMAGE}/rocket.jpg", "SpaceX, public domain"),
)
