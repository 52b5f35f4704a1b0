# SPDX-License-Identifier: Apache-2.0
"""LDIFS: its layers in every family, its norms, and what it holds."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from hf_robust import FLYP, FeatureLoss
from hf_robust.errors import ConfigError
from hf_robust.losses.features import AXES, feature_distance, layers_by_depth
from tests.losses.classifiers import batch, check_zero_at_the_start, move, with_terms
from tests.tiny_models import FAMILIES, tiny_model

FIRST = {"clip": "pre_layrnorm", "metaclip_2": "pre_layrnorm"}


def oracle(tuned, reference, axis, reduction):
    """The definition, number by number."""
    batch, tokens, width = tuned.shape
    total = 0.0
    for image in range(batch):
        for token in range(tokens):
            for channel in range(width):
                along = (image, slice(None), channel) if axis == "token" else (image, token, slice(None))
                place = (image, token, channel)
                n, n0 = (one[place] / (one[along].square().sum().sqrt() + 1e-10) for one in (tuned, reference))
                total += (n - n0).item() ** 2 / batch
    return total / (tokens * width) if reduction == "mean" else total


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_the_distance_as_defined(axis, reduction):
    tuned, reference = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    value = feature_distance(tuned, reference, AXES[axis], reduction)
    assert value.item() == pytest.approx(oracle(tuned, reference, axis, reduction), rel=1e-12)


@pytest.mark.parametrize("axis", AXES)
def test_it_does_not_see_lengths_and_is_bounded_as_documented(axis):
    tuned, reference = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    how = AXES[axis], "mean"
    value = feature_distance(tuned, reference, *how)
    assert feature_distance(3 * tuned, 5 * reference, *how).item() == pytest.approx(value.item(), rel=1e-8)
    most = 4 / tuned.shape[AXES[axis]]
    assert feature_distance(tuned, -tuned, *how).item() == pytest.approx(most, rel=1e-8) and value < most


def test_states_of_zero_have_no_gradient_that_is_nan():
    tuned = torch.zeros(1, 2, 3, requires_grad=True)
    feature_distance(tuned, torch.zeros(1, 2, 3), 1, "mean").backward()
    assert tuned.grad.count_nonzero() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_and_it_is_zero_at_the_start_in_every_family(family):
    task = with_terms(FeatureLoss(), family=family)
    blocks = "layers" if family == "vision-text-dual-encoder" else "encoder.layers"
    expected = [FIRST.get(family, "embeddings"), f"{blocks}.0", f"{blocks}.1"]
    assert task.terms["features"].layers == tuple(f"vision_model.{name}" for name in expected)
    check_zero_at_the_start(task, "features", family)


def test_layers_lie_at_quarters_of_the_depth():
    with torch.device("meta"):
        for depth, expected in ((12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (6, [1, 2, 4, 5]), (1, [0])):
            clip = CLIPModel(CLIPConfig(vision_config={"num_hidden_layers": depth}))
            found = [int(name.split(".")[-1]) for name in layers_by_depth(clip)[1:]]
            assert found == expected


def test_reductions_and_named_layers():
    layers = ["vision_model.encoder.layers.0", "vision_model.encoder.layers.1"]
    mean, total = (move(with_terms(FeatureLoss(layers, reduction=one, weight=1))) for one in ("mean", "sum"))
    mean, total = (task(**batch()).terms["features"].item() for task in (mean, total))
    assert total == pytest.approx(mean * 2 * 5 * 32, rel=1e-5)  # layers, tokens, width
    alone = [move(with_terms(FeatureLoss([one], weight=1)))(**batch()).terms["features"].item() for one in layers]
    assert mean == pytest.approx(sum(alone) / 2, rel=1e-5)
    assert FeatureLoss(layers).settings()["layers"] == tuple(layers)


def test_padding_does_not_count():
    task, images = move(with_terms(FeatureLoss(), family="siglip2")), batch("siglip2")
    assert not images["pixel_attention_mask"].all()
    noise = 9 * torch.randn(images["pixel_values"].shape)
    padded = torch.where(images["pixel_attention_mask"][:, :, None] > 0, images["pixel_values"], noise)
    expected = task(**images).terms["features"].item()
    assert task(**{**images, "pixel_values": padded}).terms["features"].item() == pytest.approx(expected, rel=1e-4)


def test_in_autocast_it_is_float32():
    task = move(with_terms(FeatureLoss()))
    exact = task(**batch()).terms["features"]
    with torch.autocast("cpu", torch.bfloat16):
        value = task(**batch()).terms["features"]
    assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), rel=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "vision_model"}, "no layers to compare.*a list of names"),
        ({"layers": []}, "no layers to compare"),
        ({"layers": 5}, "no layers to compare"),
        ({"layers": [0, 6, 11]}, "no layers to compare.*names of modules"),
        ({"norm_axis": "tokens"}, "unknown norm_axis.*'token', 'channel'"),
        ({"reduction": "max"}, "unknown reduction.*'mean', 'sum'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FeatureLoss(**settings)


def test_what_has_no_hidden_states_is_refused():
    with pytest.raises(ConfigError, match="no hidden states of tokens.*features, visual_projection.*4, 24"):
        with_terms(FeatureLoss(["visual_projection"]))(**batch())
    with pytest.raises(ConfigError, match="no hidden states of tokens.*features, vision_model.*OutputWithPooling"):
        with_terms(FeatureLoss(["vision_model"]))(**batch())
    with pytest.raises(ConfigError, match="no such layer"):
        with_terms(FeatureLoss(["vision_model.encoder.layers.7"]))
    with pytest.raises(ConfigError, match="embedded in chunks"):
        with_terms(FeatureLoss(), cls=FLYP, contrastive_chunk_size=2)(**batch())
    with pytest.raises(ConfigError, match="no forward.*would be spared"):
        with_terms(FeatureLoss(), cached=True)
    model = tiny_model("clip")
    model.vision_model.encoder.layers = torch.nn.ModuleList([*model.vision_model.encoder.layers, torch.nn.Identity()])
    with pytest.raises(ConfigError, match="blocks of the vision tower cannot be told.*Name layers"):
        with_terms(FeatureLoss(), model=model)
