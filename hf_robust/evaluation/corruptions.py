# SPDX-License-Identifier: Apache-2.0
"""Image corruptions made on the fly, the same for every order, batch size and number of workers.

Names and strengths are those of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261), computed with Pillow and
NumPy. The packages on PyPI that hold these functions (`imagecorruptions` and its forks) need OpenCV and draw from
NumPy's global random state, so that what an image becomes would depend on those before it. Of the 19 corruptions of
ImageNet-C these are the ten that need neither drawn textures nor convolutions with kernels of their own. Results are
not bit-identical with the published ImageNet-C, whose images were cropped first and stored as JPEG once more.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from ..errors import ConfigError, close_matches

SHORT_SIDE = 224  # of the images that the strengths were chosen for

Pixels = np.ndarray  # (height, width, 3), float, in [0, 1]


def corrupt(image: Image.Image, name: str, severity: int, seed: int, index: int) -> Image.Image:
    """Corrupts an image.

    It is resized to a short side of 224 pixels first, since noise, blur and blocks are measured in pixels: without
    this, a severity would mean something else for every image size.

    Args:
        image: in RGB.
        name: a key of `CORRUPTIONS`.
        severity: 1 (weak) to 5.
        seed: of the random draws, from 0.
        index: the image's row in its dataset, from 0. Noise depends on `seed` and `index` alone, so it is stronger at
            a higher severity but the same pattern.

    Returns:
        An RGB image with a short side of 224 pixels.

    Raises:
        ConfigError: no such corruption, or no such severity.

    Example:
        >>> corrupt(Image.new("RGB", (448, 672)), "gaussian_noise", severity=3, seed=0, index=7).size
        (224, 336)
    """
    check_corruption(name, severity)
    function, strengths = CORRUPTIONS[name]
    generator = np.random.default_rng([seed, index])
    return function(_resized(image), strengths[severity - 1], generator)


def check_corruption(name: str, severity: int) -> None:
    """Refuses a corruption that does not exist.

    Args:
        name: a key of `CORRUPTIONS`.
        severity: 1 to 5.

    Raises:
        ConfigError: no such corruption, or no such severity.
    """
    if name not in CORRUPTIONS:
        allowed = ", ".join(CORRUPTIONS)
        raise ConfigError(
            "unknown corruption", got=name, allowed=allowed, remedy=close_matches(str(name), [*CORRUPTIONS])
        )
    if isinstance(severity, bool) or not isinstance(severity, int) or not 1 <= severity <= 5:
        raise ConfigError("severity is out of range", where=name, got=severity, allowed="1, 2, 3, 4, 5")


def _resized(image: Image.Image) -> Image.Image:
    scale = SHORT_SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image) / 255


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))


def _gaussian_noise(image: Image.Image, deviation: float, generator: np.random.Generator) -> Image.Image:
    pixels = _pixels(image)
    return _image(pixels + deviation * generator.standard_normal(pixels.shape))


def _shot_noise(image: Image.Image, photons: float, generator: np.random.Generator) -> Image.Image:
    return _image(generator.poisson(_pixels(image) * photons) / photons)


def _impulse_noise(image: Image.Image, share: float, generator: np.random.Generator) -> Image.Image:
    pixels = _pixels(image)
    draws = generator.random(pixels.shape)
    return _image(np.where(draws < share / 2, 0.0, np.where(draws > 1 - share / 2, 1.0, pixels)))


def _speckle_noise(image: Image.Image, deviation: float, generator: np.random.Generator) -> Image.Image:
    pixels = _pixels(image)
    return _image(pixels + pixels * deviation * generator.standard_normal(pixels.shape))


def _gaussian_blur(image: Image.Image, deviation: float, generator: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(deviation))


def _zoom_blur(image: Image.Image, steps: tuple[float, float], generator: np.random.Generator) -> Image.Image:
    largest, step = steps
    factors = [1.0, *np.arange(1, largest, step)]  # the image itself counts twice, as in ImageNet-C
    width, height = image.size
    zoomed = []
    for factor in factors:
        left, top = (width - width / factor) / 2, (height - height / factor) / 2
        box = (left, top, width - left, height - top)
        zoomed.append(_pixels(image.resize(image.size, Image.Resampling.BILINEAR, box=box)))
    return _image(np.mean(zoomed, axis=0))


def _brightness(image: Image.Image, added: float, generator: np.random.Generator) -> Image.Image:
    pixels = _pixels(image)
    value = pixels.max(axis=2, keepdims=True)  # V of HSV; hue and saturation stay
    brighter = (value + added).clip(0, 1)
    return _image(np.where(value > 0, pixels * brighter / np.maximum(value, 1 / 255), brighter))


def _contrast(image: Image.Image, factor: float, generator: np.random.Generator) -> Image.Image:
    pixels = _pixels(image)
    mean = pixels.mean(axis=(0, 1), keepdims=True)  # (1, 1, 3)
    return _image((pixels - mean) * factor + mean)


def _pixelate(image: Image.Image, factor: float, generator: np.random.Generator) -> Image.Image:
    blocks = (int(image.width * factor), int(image.height * factor))
    return image.resize(blocks, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)


def _jpeg_compression(image: Image.Image, quality: int, generator: np.random.Generator) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


CORRUPTIONS: dict[str, tuple[Callable[..., Image.Image], tuple]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": (_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6)),
    "zoom_blur": (_zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_jpeg_compression, (25, 18, 15, 10, 7)),
}
