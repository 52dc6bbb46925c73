"""The pictures of the tiny LLaVA: handwritten digits in six colours, one a quarter at most, on darkened photographs.

Both are real: the digits were written by 13 people, the photographs come from scikit-image and scikit-learn
(assets/README.md names them and their terms). Training sees the first 1297 digits and the left part of each photograph,
test the last 500 digits and the right part: nothing that is asked about in the test was drawn before.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ASSETS = Path(__file__).parent / "assets"
SIDE, PATCH = 96, 8  # pixels
GRID = SIDE // PATCH  # 12 x 12 = 144 patches
HALF = SIDE // 2
SIZES = (16, 24, 32)  # of a digit, in pixels
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 255),
    "yellow": (250, 230, 50),
    "purple": (200, 60, 220),
    "white": (250, 250, 250),
}
QUARTERS = ("top-left", "top-right", "bottom-left", "bottom-right")
CREDITS = {  # of the photographs, by what the model calls them
    "cat": "Stéfan van der Walt, CC0",
    "coffee": "Rachel Michetti, CC0",
    "brick": "CC0 Textures, CC0",
    "grass": "linolafett, CC0",
    "gravel": "CC0 Textures, CC0",
    "stars": "NASA and ESA, public domain",
    "eye": "Mikael Häggström, CC0",
    "rocket": "SpaceX, public domain",
    "paper": "Wikipedia, public domain",
    "man": "Lav Varshney, CC0",
    "flower": "vultilion, CC BY 2.0",
    "temple": "danielbuechele, CC BY 2.0",
}
BACKGROUNDS = tuple(CREDITS)
TRAINING_DIGITS = 1297  # of 1797
TRAINING_WIDTH = 0.58  # of a photograph
VARIANTS = 12  # of each digit in training: turned, sheared, larger and smaller
INK = 0.1  # share of a patch that makes it a digit's


class Digit(NamedTuple):
    label: int
    colour: int  # in COLOURS
    quarter: int  # in QUARTERS
    top: int  # pixels
    left: int
    size: int


class Scene(NamedTuple):
    pixels: np.ndarray  # [SIDE, SIDE, 3] uint8
    digits: tuple[Digit, ...]
    background: int  # in BACKGROUNDS
    owner: np.ndarray  # [GRID * GRID] int64, the digit whose ink is in the patch, -1 where none is


@functools.cache
def photograph(name: str) -> np.ndarray:  # [H, W, 3] float32
    return np.asarray(Image.open(ASSETS / f"{name}.jpg").convert("RGB"), dtype=np.float32)


@functools.cache
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """[1797, 8, 8] of 0 to 16, and [1797] labels."""
    with np.load(ASSETS / "digits.npz") as digits:
        return digits["images"], digits["labels"].astype(np.int64)


def drawn(image: np.ndarray, size: int, tilt: float, shear: float, zoom: float) -> np.ndarray:
    """[8, 8] of 0 to 16 -> [size, size] of 0 to 255, about its middle."""
    large = Image.fromarray((image * 15.9375).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    if not (tilt or shear) and zoom == 1:
        return np.asarray(large)
    c, s, middle = zoom * np.cos(tilt), np.sin(tilt), (size - 1) / 2
    a, b, d, e = c, shear - s, s, c
    x, y = middle - a * middle - b * middle, middle - d * middle - e * middle
    turned = large.transform((size, size), Image.Transform.AFFINE, (a, b, x, d, e, y), Image.Resampling.BILINEAR)
    return np.asarray(turned)


@functools.cache
def alphabet(split: str) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """{size: [digits, variants, size, size] uint8} and [digits] labels."""
    images, labels = handwriting()
    of_split = slice(None, TRAINING_DIGITS) if split == "train" else slice(TRAINING_DIGITS, None)
    rng = np.random.default_rng(7)
    found = {}
    for size in SIZES:
        plain = [[drawn(image, size, 0.0, 0.0, 1.0)] for image in images[of_split]]
        if split == "train":
            for image, variants in zip(images[of_split], plain, strict=True):
                for _ in range(VARIANTS - 1):
                    tilt, shear, zoom = rng.uniform((-0.25, -0.2, 0.9), (0.25, 0.2, 1.2))
                    variants.append(drawn(image, size, tilt, shear, zoom))
        found[size] = np.array(plain)
    return found, labels[of_split]


class Scenes:
    """An endless row. ``split``: "train" or "test"; ``step``: between digits' places, PATCH for the patch grid."""

    def __init__(self, split: str, seed: int, step: int = PATCH) -> None:
        self.split, self.step, self.rng = split, step, np.random.default_rng(seed)
        self.alphabet, labels = alphabet(split)
        self.members = [np.flatnonzero(labels == label) for label in range(10)]

    def canvas(self, background: int) -> np.ndarray:
        """A crop of the split's part of a photograph, darkened, so that every colour stands out."""
        whole = photograph(BACKGROUNDS[background])
        border = int(whole.shape[1] * TRAINING_WIDTH)
        part = whole[:, :border] if self.split == "train" else whole[:, border:]
        y, x = (int(self.rng.integers(part.shape[axis] - SIDE + 1)) for axis in (0, 1))
        crop = part[y : y + SIDE, x : x + SIDE]
        flipped = crop[:, ::-1] if self.rng.random() < 0.5 else crop
        return flipped * self.rng.uniform(0.35, 0.6)

    def scene(self, crowded: bool = False, region: tuple[int, ...] | None = None) -> Scene:
        """``crowded``: four digits, otherwise one to four; ``region``: quarters of which one has a digit."""
        rng = self.rng
        background = int(rng.integers(len(BACKGROUNDS)))
        canvas = self.canvas(background)
        count = 4 if crowded else int(rng.integers(1, 5))
        quarters = rng.permutation(4)
        if region is not None and quarters[0] not in region:
            at = int(np.flatnonzero(quarters == rng.choice(region))[0])
            quarters[0], quarters[at] = quarters[at], quarters[0]
        digits, cover = [], np.zeros((4, SIDE, SIDE), dtype=np.float32)
        chosen = zip(quarters[:count], rng.permutation(len(COLOURS))[:count], rng.permutation(10)[:count], strict=True)
        for number, (quarter, colour, label) in enumerate(chosen):
            size = int(rng.choice(SIZES))
            dy, dx = self.step * rng.integers(0, (HALF - size) // self.step + 1, size=2)
            top, left = int(quarter // 2 * HALF + dy), int(quarter % 2 * HALF + dx)
            digit = Digit(int(label), int(colour), int(quarter), top, left, size)
            cover[number] = self.draw(canvas, digit)
            digits.append(digit)
        inked = cover.reshape(4, GRID, PATCH, GRID, PATCH).mean(axis=(2, 4)).reshape(4, -1)
        owner = np.where(inked.max(axis=0) > INK, inked.argmax(axis=0), -1)
        return Scene(canvas.clip(0, 255).astype(np.uint8), tuple(digits), background, owner)

    def draw(self, canvas: np.ndarray, digit: Digit) -> np.ndarray:
        """Into the canvas; returns [SIDE, SIDE], how much of each pixel is ink."""
        hands = self.alphabet[digit.size]
        hand, variant = self.rng.choice(self.members[digit.label]), self.rng.integers(hands.shape[1])
        alpha = hands[hand, variant].astype(np.float32) / 255
        ink = np.array(tuple(COLOURS.values())[digit.colour], dtype=np.float32) * self.rng.uniform(0.85, 1.0)
        spot = slice(digit.top, digit.top + digit.size), slice(digit.left, digit.left + digit.size)
        canvas[spot] = canvas[spot] * (1 - alpha[..., None]) + ink * alpha[..., None]
        cover = np.zeros((SIDE, SIDE), dtype=np.float32)
        cover[spot] = alpha
        return cover
