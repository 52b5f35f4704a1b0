# SPDX-License-Identifier: Apache-2.0
"""OGEN's synthesised features and losses against the released formulas, one sample at a time, in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hf_robust.ogen.objective import classification_losses, generation_losses, synthesise
from hf_robust.ogen.prototypes import Prototypes
from tests.ogen.test_generator import DIM, generate, random_generator

BASE, NEW = 6, 5
TERMS = ["generation_base", "generation_reverse", "base_as_unknown", "reverse", "new"]
IMAGE_SIDE = ["images", "mean", "std", "noise"]
OF_A_LOGIT = {"base_as_unknown", "reverse", "new"}
both_noises = pytest.mark.parametrize("noise", ["batch", "sample"])
shapes = pytest.mark.parametrize(("batch", "k"), [(4, 3), (1, 1), (3, 3), (1, 3), (5, 2)])


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def task(batch: int = 4, k: int = 3, noise: str = "batch", layer_norm: bool = False) -> SimpleNamespace:
    """Everything a step needs; every tensor asks for a gradient, so that one too many shows."""
    t = SimpleNamespace(k=k, layer_norm=layer_norm, generator=random_generator(layer_norm))
    t.labels = torch.randint(BASE, (batch,))
    t.images, t.base, t.new = unit(batch, DIM), unit(BASE, DIM), unit(NEW, DIM)
    t.mean, t.std = torch.randn(BASE, DIM).double(), torch.rand(BASE, DIM).double()
    t.base_neighbours = torch.stack([torch.randperm(BASE - 1)[:k] for _ in range(BASE)])
    t.base_neighbours += t.base_neighbours >= torch.arange(BASE)[:, None]  # no class is its own neighbour
    t.new_neighbours = torch.stack([torch.randperm(NEW)[:k] for _ in range(BASE)])
    t.noise = torch.rand((DIM,) if noise == "batch" else (batch, 1, DIM), dtype=torch.float64)
    t.scale = torch.tensor(7.0, dtype=torch.float64)
    named = {name: getattr(t, name) for name in ("images", "base", "new", "mean", "std", "noise", "scale")}
    for tensor in named.values():
        tensor.requires_grad_()
    t.tensors = {**named, **dict(t.generator.named_parameters())}
    return t


def synthesised(t: SimpleNamespace) -> object:
    prototypes = Prototypes(mean=t.mean, std=t.std, counts=torch.ones(BASE, dtype=torch.long))
    neighbours = (t.base_neighbours, t.new_neighbours)
    return synthesise(t.generator, t.images, t.labels, t.base, t.new, prototypes, *neighbours, t.noise)


def losses(t: SimpleNamespace) -> dict[str, Tensor]:
    features = synthesised(t)
    found = generation_losses(features, t.images)
    return found | classification_losses(
        features, t.labels, lambda x: t.scale * x @ t.base.T, lambda x: t.scale * x @ t.new.T
    )


def features_by_hand(t: SimpleNamespace, sample: int) -> SimpleNamespace:
    """Uses (a), (b) and (c) of the generator for one image of the batch."""
    label, x = t.labels[sample].item(), t.images[sample].detach()
    noise = (t.noise if t.noise.ndim == 1 else t.noise[sample, 0]).detach()
    unknown = t.base[label].detach()  # Wq
    neighbours = t.base_neighbours[label].tolist()
    known = torch.stack([t.base[i].detach() for i in neighbours])  # Wk
    pictures = torch.stack([t.mean[i].detach() + noise * t.std[i].detach() for i in neighbours])  # Ik
    new_labels = t.new_neighbours[label].tolist()

    def g(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return generate(t.generator, query, keys, values, t.layer_norm)

    p1 = g(unknown, known, pictures)
    p2 = torch.stack([g(query, unknown[None], x[None]) for query in known])
    p3 = torch.stack([g(t.new[i], unknown[None], x[None]) for i in new_labels])
    return SimpleNamespace(
        p1=p1, p2=p2, p3=p3, x=x, pictures=pictures, label=label, neighbours=neighbours, new_labels=new_labels
    )


def cross_entropy(t: SimpleNamespace, feature: Tensor, classes: Tensor, label: int) -> Tensor:
    logits = [t.scale * (feature @ row) for row in classes]
    return torch.stack(logits).exp().sum().log() - logits[label]


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True))


def losses_by_hand(t: SimpleNamespace) -> dict[str, Tensor]:
    rows = {term: [] for term in TERMS}
    for sample in range(len(t.labels)):
        f = features_by_hand(t, sample)
        rows["generation_base"].append(squared_distance(f.p1, f.x))
        rows["base_as_unknown"].append(cross_entropy(t, f.p1, t.base, f.label))
        for i in range(t.k):
            rows["generation_reverse"].append(squared_distance(f.p2[i], f.pictures[i]))
            rows["reverse"].append(cross_entropy(t, f.p2[i], t.base, f.neighbours[i]))
            rows["new"].append(cross_entropy(t, f.p3[i], t.new, f.new_labels[i]))
    return {term: sum(values) / len(values) for term, values in rows.items()}


def gradients(term: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By name; zeros for a tensor the term does not depend on."""
    found = torch.autograd.grad(term, list(tensors.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(tensors.items(), found, strict=True)
    }


@both_noises
@shapes
@pytest.mark.parametrize("layer_norm", [False, True], ids=["released", "layer_norm"])
def test_features_are_those_of_a_loop(batch: int, k: int, noise: str, layer_norm: bool) -> None:
    t = task(batch, k, noise, layer_norm)
    found = synthesised(t)
    assert found.base_as_unknown.shape == (batch, DIM)
    assert found.reverse.shape == found.new.shape == found.neighbour_images.shape == (batch, k, DIM)
    assert found.neighbours.shape == found.new_labels.shape == (batch, k)
    for sample in range(batch):
        f = features_by_hand(t, sample)
        for got, want in (
            (found.base_as_unknown, f.p1),
            (found.reverse, f.p2),
            (found.new, f.p3),
            (found.neighbour_images, f.pictures),
        ):
            torch.testing.assert_close(got[sample], want, rtol=0, atol=1e-9)
        assert found.neighbours[sample].tolist() == f.neighbours
        assert found.new_labels[sample].tolist() == f.new_labels


@both_noises
@shapes
def test_all_terms_are_those_of_a_loop(batch: int, k: int, noise: str) -> None:
    t = task(batch, k, noise)
    found, expected = losses(t), losses_by_hand(t)
    assert set(found) == set(TERMS)
    for term in TERMS:
        assert found[term].shape == ()
        torch.testing.assert_close(found[term], expected[term], rtol=0, atol=1e-9)


@both_noises
@pytest.mark.parametrize("term", TERMS)
def test_gradients_of_text_generator_and_scale_are_those_of_a_loop(term: str, noise: str) -> None:
    t = task(noise=noise)
    trained = {name: tensor for name, tensor in t.tensors.items() if name not in IMAGE_SIDE}
    found, expected = gradients(losses(t)[term], trained), gradients(losses_by_hand(t)[term], trained)
    for name in trained:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    reached = {name for name, gradient in found.items() if gradient.abs().max() > 1e-9}
    assert ("base" in reached) == (term in {"base_as_unknown", "reverse"})
    assert ("new" in reached) == (term == "new")
    assert ("scale" in reached) == (term in OF_A_LOGIT)
    assert {"feed_forward.0.weight", "attention.out_proj.weight", "attention.in_proj_weight"} <= reached


@pytest.mark.parametrize("term", TERMS)
def test_the_image_side_gets_no_gradient(term: str) -> None:
    t = task(noise="sample")
    found = gradients(losses(t)[term], {name: t.tensors[name] for name in IMAGE_SIDE})
    assert [name for name, gradient in found.items() if gradient.any()] == []


def test_names_reach_the_generator_with_gradient_as_new_query_alone() -> None:
    """With class embeddings that are constants in the logits, only use (c) has a gradient into a class embedding."""
    t = task()
    base, new, scale = t.base.detach(), t.new.detach(), t.scale.detach()
    features = synthesised(t)
    terms = generation_losses(features, t.images)
    terms |= classification_losses(features, t.labels, lambda x: scale * x @ base.T, lambda x: scale * x @ new.T)
    for term in TERMS:
        found = gradients(terms[term], t.tensors)
        assert not found["base"].any()
        assert bool(found["new"].any()) == (term == "new")
    used = set(t.new_neighbours[t.labels].flatten().tolist())
    rows = gradients(terms["new"], t.tensors)["new"].abs().sum(dim=1)
    assert {index for index in range(NEW) if rows[index] > 0} == used


def test_generation_is_the_width_times_the_mean_squared_error() -> None:
    t = task()
    features = synthesised(t)
    found = generation_losses(features, t.images)
    mse = torch.nn.functional.mse_loss
    expected = DIM * mse(features.base_as_unknown, t.images), DIM * mse(features.reverse, features.neighbour_images)
    torch.testing.assert_close(found["generation_base"], expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found["generation_reverse"], expected[1], rtol=0, atol=1e-12)


def test_perfect_features_cost_nothing() -> None:
    t = task()
    features = synthesised(t)
    perfect = type(features)(
        base_as_unknown=t.images,
        reverse=features.neighbour_images,
        new=features.new,
        neighbour_images=features.neighbour_images,
        neighbours=features.neighbours,
        new_labels=features.new_labels,
    )
    assert [value.item() for value in generation_losses(perfect, t.images).values()] == [0.0, 0.0]


def test_images_of_one_class_share_their_neighbours_images_only_if_the_noise_is_the_batchs() -> None:
    for noise, shared in (("batch", True), ("sample", False)):
        t = task(batch=3, noise=noise)
        t.labels = torch.full((3,), 2)
        pictures = synthesised(t).neighbour_images
        assert torch.equal(pictures[0], pictures[1]) == shared
        t.noise = torch.zeros_like(t.noise)
        torch.testing.assert_close(synthesised(t).neighbour_images[0], t.mean[t.base_neighbours[2]].detach())


def test_logits_are_asked_for_over_base_and_over_new_classes_apart() -> None:
    t, seen = task(), []

    def logits(classes: Tensor, name: str, embeds: Tensor) -> Tensor:
        seen.append((name, embeds.shape[-1]))
        return embeds @ classes.T

    classification_losses(
        synthesised(t), t.labels, lambda x: logits(t.base, "base", x), lambda x: logits(t.new, "new", x)
    )
    assert set(seen) == {("base", DIM), ("new", DIM)}


def test_float32_in_float32_out() -> None:
    t = task()
    for name in ("images", "base", "new", "mean", "std", "noise", "scale"):
        setattr(t, name, getattr(t, name).detach().float())
    t.generator.float()
    features = synthesised(t)
    tensors = (features.base_as_unknown, features.reverse, features.new, features.neighbour_images)
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert {value.dtype for value in losses(t).values()} == {torch.float32}
