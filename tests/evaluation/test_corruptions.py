# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from hf_robust.errors import ConfigError
from hf_robust.evaluation.corruptions import CORRUPTIONS, corrupt
from tests.tiny_models import synthetic_picture

all_corruptions = pytest.mark.parametrize("name", CORRUPTIONS)
NOISE = ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"]


def picture(size=224):
    """Stripes, blotches and edges, none of them at a border of blocks."""
    image = synthetic_picture(2, 5, 40, seed=3).resize((size, size), Image.Resampling.BICUBIC)
    image.paste((250, 30, 60), (61, 45, 130, 151))
    return image


def grey(value, size=224):
    return Image.new("RGB", (size, size), (value, value, value))


def pixels(image):
    return np.asarray(image).astype(float)


def one(image, name, severity=3, seed=0, index=0):
    return corrupt(image, name, severity, seed, index)


@all_corruptions
def test_a_higher_severity_changes_an_image_more(name):
    clean = pixels(picture())
    damage = [np.abs(pixels(one(picture(), name, severity)) - clean).mean() for severity in range(1, 6)]
    assert damage[0] > 0.5
    assert all(more > less for less, more in zip(damage, damage[1:], strict=False)), damage


@all_corruptions
@pytest.mark.parametrize(("size", "expected"), [((448, 672), (224, 336)), ((60, 40), (336, 224)), ((224, 224),) * 2])
def test_images_of_any_size_end_with_a_short_side_of_224(name, size, expected):
    result = one(picture().resize(size), name)
    assert result.size == expected and result.mode == "RGB"


@all_corruptions
def test_the_result_depends_on_nothing_but_image_seed_and_index(name):
    first = one(picture(), name, seed=4, index=9)
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    assert one(picture(), name, seed=4, index=9) == first
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@all_corruptions
def test_the_given_image_stays_as_it_is(name):
    given = picture()
    one(given, name)
    assert given == picture()


@all_corruptions
def test_seed_and_index_change_noise_and_nothing_else(name):
    first = one(picture(), name, seed=0, index=1)
    others = [one(picture(), name, seed=0, index=2), one(picture(), name, seed=1, index=1)]
    others.append(one(picture(), name, seed=1, index=0))
    assert [other != first for other in others] == [name in NOISE] * 3


def test_gaussian_noise_has_the_published_deviation():
    for severity, deviation in zip(range(1, 6), (0.08, 0.12, 0.18, 0.26, 0.38), strict=True):
        noise = (pixels(one(grey(128), "gaussian_noise", severity)) - 128) / 255
        inside = np.abs(noise) < 0.49  # the rest is clipped to black or white
        assert inside.mean() == pytest.approx(1 if deviation < 0.1 else _within(0.49 / deviation), abs=0.01)
        middle = np.abs(noise) < deviation  # 68.3 % of a normal distribution
        assert middle.mean() == pytest.approx(0.683, abs=0.02)


def _within(deviations):
    from math import erf, sqrt

    return erf(deviations / sqrt(2))


def test_speckle_noise_grows_with_brightness():
    dark, bright = (pixels(one(grey(value), "speckle_noise", 1)).std() for value in (40, 120))
    assert bright / dark == pytest.approx(3, rel=0.05) and dark == pytest.approx(0.15 * 40, rel=0.05)


def test_shot_noise_counts_photons():
    """Poisson: variance = mean / photons, in units of full brightness."""
    noisy = pixels(one(grey(51), "shot_noise", 1)) / 255
    assert noisy.mean() == pytest.approx(0.2, abs=0.002)
    assert noisy.var() == pytest.approx(0.2 / 60, rel=0.05)


def test_impulse_noise_sets_the_published_share_to_black_and_white():
    noisy = pixels(one(grey(100), "impulse_noise", 5))
    assert (noisy == 0).mean() == pytest.approx(0.135, abs=0.005)
    assert (noisy == 255).mean() == pytest.approx(0.135, abs=0.005)
    assert set(np.unique(noisy)) == {0, 100, 255}


def test_brightness_adds_to_the_value_and_keeps_hue_and_saturation():
    image = Image.new("RGB", (224, 224), (100, 50, 0))
    image.paste((0, 0, 0), (0, 0, 112, 224))
    image.paste((255, 0, 51), (0, 0, 10, 224))
    result = pixels(one(image, "brightness", 2))
    np.testing.assert_array_equal(result[0, 200], [151, 76, 0])  # 100 + 51; half of it; nothing
    np.testing.assert_array_equal(result[0, 100], [51, 51, 51])  # black has no hue
    np.testing.assert_array_equal(result[0, 5], [255, 0, 51])  # cannot be brighter


def test_contrast_pulls_every_channel_to_its_mean():
    image = Image.new("RGB", (224, 224), (200, 100, 0))
    image.paste((100, 100, 0), (0, 0, 112, 224))
    result = pixels(one(image, "contrast", 1))
    np.testing.assert_array_equal(result[0, 0], [130, 100, 0])  # 150 - 0.4 * 50
    np.testing.assert_array_equal(result[0, 200], [170, 100, 0])


def test_pixelate_leaves_as_many_blocks_as_published():
    image = Image.fromarray((np.arange(224 * 224 * 3).reshape(224, 224, 3) % 251).astype(np.uint8))
    result = pixels(one(image, "pixelate", 5))  # 56 blocks of 4 pixels
    blocks = result.reshape(56, 4, 56, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert abs(blocks[:, 0, :, 0] - pixels(image).reshape(56, 4, 56, 4, 3).mean(axis=(1, 3))).max() <= 1


def test_jpeg_and_blur_are_pillows_own():
    stream = io.BytesIO()
    picture().save(stream, "JPEG", quality=15)
    assert one(picture(), "jpeg_compression", 3) == Image.open(stream).convert("RGB")
    assert one(picture(), "gaussian_blur", 4) == picture().filter(ImageFilter.GaussianBlur(4))


def test_zoom_blur_smears_the_edges_and_not_the_middle():
    image = grey(0)
    image.paste((255, 255, 255), (104, 104, 120, 120))
    image.paste((255, 255, 255), (0, 0, 224, 8))
    result = pixels(one(image, "zoom_blur", 5))
    assert (result[110:114, 110:114] == 255).all()
    assert 0 < result[4, 112].max() < 128  # the bar at the border has left the picture in most of the zoomed images


@pytest.mark.parametrize(
    ("name", "severity"), [("gaussian_nois", 1), ("contrast", 0), ("contrast", 6), ("contrast", True)]
)
def test_unknown_corruptions_and_severities_are_refused(name, severity):
    with pytest.raises(ConfigError, match="gaussian_noise|severity is out of range"):
        one(picture(), name, severity)
