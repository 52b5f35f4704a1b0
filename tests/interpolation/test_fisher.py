# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from hf_robust.errors import ConfigError, DataError, NonFiniteError
from hf_robust.interpolation.arithmetic import interpolate_tensor
from hf_robust.interpolation.checkpoints import interpolate_checkpoints
from hf_robust.interpolation.fisher import diagonal_fisher
from hf_robust.tasks.class_names import ZeroShotClassifier
from tests.interpolation.folders import load
from tests.tiny_models import FAMILIES, tiny_batch, tiny_lora, tiny_model, tiny_processor

NAMES = ["red", "green", "blue"]


def classifier(family="clip", head="live", model=None):
    return ZeroShotClassifier(model or tiny_model(family), tiny_processor(family), NAMES, head=head)


def batches(family="clip", n_images=5, at_once=2):
    whole = tiny_batch(family, n_images)
    starts = range(0, n_images, at_once)
    return [{name: tensor[start : start + at_once] for name, tensor in whole.items()} for start in starts]


def plain_loop(model, family, n_images, seed):
    """Backward for one image after the other, in float64."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: one for name, one in model.model.named_parameters() if one.requires_grad}
    sums = {name: torch.zeros_like(one) for name, one in parameters.items()}
    for image in batches(family, n_images, at_once=1):
        image = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in image.items()}
        model.zero_grad(set_to_none=True)
        logits = model(**image).logits
        label = torch.multinomial(F.softmax(logits[0].detach(), dim=0), 1, generator=generator)
        (-F.log_softmax(logits[0], dim=0)[label.item()]).backward()
        for name, parameter in parameters.items():
            sums[name] += 0 if parameter.grad is None else parameter.grad**2
    return {name: total / n_images for name, total in sums.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["live", "frozen", "trainable"])
def test_equals_a_plain_loop(family, head):
    fisher = diagonal_fisher(classifier(family, head), batches(family), seed=3)
    expected = plain_loop(classifier(family, head).double(), family, 5, seed=3)
    assert fisher.keys() == expected.keys() and any(tensor.any() for tensor in fisher.values())
    largest = max(float(tensor.max()) for tensor in expected.values())
    for name, tensor in fisher.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-3, atol=1e-6 * largest)


def test_labels_are_drawn_by_the_seed_alone_and_batches_do_not_matter():
    model = classifier()
    state = torch.random.get_rng_state()
    first = diagonal_fisher(model, batches(at_once=5), seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    labelled = [{**batch, "labels": torch.zeros(len(batch["pixel_values"])).long()} for batch in batches(at_once=1)]
    again, other = diagonal_fisher(model, labelled, seed=0), diagonal_fisher(model, labelled, seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_model_is_left_as_it_was():
    model = classifier().train()
    model.model.vision_model.eval()
    model.model.text_model.requires_grad_(False)
    projection = model.model.visual_projection.weight
    projection.grad = torch.ones_like(projection)
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        fisher = diagonal_fisher(model, batches())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    grads = {name for name, one in model.named_parameters() if one.grad is not None}
    assert grads == {"model.visual_projection.weight"}
    assert torch.equal(
        model.model.visual_projection.weight.grad, torch.ones_like(model.model.visual_projection.weight)
    )
    assert not any(name.startswith("text_model") for name in fisher) and "logit_scale" in fisher


def test_half_precision_is_summed_in_float32():
    fisher = diagonal_fisher(classifier(model=tiny_model("clip").bfloat16()), batches(n_images=1))
    assert {tensor.dtype for tensor in fisher.values()} == {torch.float32}


def test_its_files_weight_a_merge_of_checkpoints(tmp_path):
    models = [tiny_model("clip", seed) for seed in (0, 1)]
    fishers = [diagonal_fisher(classifier(model=model), batches()) for model in models]
    files = tmp_path / "f0.safetensors", tmp_path / "f1.safetensors"
    for name, model, fisher, file in zip("ab", models, fishers, files, strict=True):
        model.save_pretrained(tmp_path / name)
        save_file(fisher, file)
    interpolate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out", 0.5, fishers=files)
    first, second = (model.state_dict() for model in models)
    assert fishers[0].keys() == first.keys()
    for name, tensor in load(tmp_path / "out").items():
        weights = fishers[0][name], fishers[1][name]
        assert torch.equal(tensor, interpolate_tensor(first[name], second[name], 0.5, weights))


def test_bad_input():
    with pytest.raises(ConfigError, match="that of a plain model.*Merge the adapter"):
        diagonal_fisher(classifier(model=tiny_lora(tiny_model("clip"))), batches())
    with pytest.raises(DataError, match="no images"):
        diagonal_fisher(classifier(), [])
    model = classifier()
    with pytest.raises(NonFiniteError, match="at logits"):
        diagonal_fisher(model, [{"pixel_values": torch.full((1, 3, 32, 32), float("nan"))}])
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter"):
        diagonal_fisher(model, batches())
