# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from hf_robust import SAFTConfig, mask_summary, saft_unselected, select_saft
from hf_robust.errors import NonFiniteError, SelectionError
from hf_robust.tuners.saft.selection import _budget, _top, find_layers

from .zoo import batches, exact_loss, oracle_masks, zoo


def selected(model: nn.Module, name: str = "default") -> dict[str, list[int]]:
    return {
        layer.unit: layer.saft_indices[name].tolist()
        for layer in find_layers(model, name)[0]
        if name in layer.saft_indices
    }


def selection(config: SAFTConfig, data: list | None = None, model: nn.Module | None = None) -> dict[str, list[int]]:
    model = get_peft_model(model or zoo(), config)
    select_saft(model, data or batches(), exact_loss)
    return selected(model)


def in_batches_of(size: int) -> list[dict[str, torch.Tensor]]:
    joined = {key: torch.cat([batch[key] for batch in batches()]) for key in batches()[0]}
    return [{key: value[i : i + size] for key, value in joined.items()} for i in range(0, 12, size)]


def oracle_scores(score: str) -> dict[str, torch.Tensor]:
    """The score of every entry from the gradient of each image alone."""
    model = zoo()
    gradients = []
    for batch in in_batches_of(1):
        model.zero_grad()
        exact_loss(model, batch).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if n != "scale"})
    reduce = {
        "signed_mean": lambda g: g.mean(0).abs(),
        "abs_mean": lambda g: g.abs().mean(0),
        "fisher": lambda g: g.square().mean(0),
        "magnitude": lambda g: g,
    }[score]
    if score == "magnitude":
        return {n: p.detach().abs() for n, p in model.named_parameters() if n != "scale"}
    return {n: reduce(torch.stack([g[n] for g in gradients])) for n in gradients[0]}


def expected_selection(scores: dict[str, torch.Tensor], count: int) -> dict[str, list[int]]:
    """The `count` largest of all scores, as positions in the units of the zoo."""
    flat = [
        (-float(v), order, name, i)
        for order, (name, s) in enumerate(scores.items())
        for i, v in enumerate(s.flatten())
    ]
    units: dict[str, list[int]] = {}
    offsets: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for name, score in scores.items():
        unit = next(u for u in ZOO_UNITS if name.startswith(u + "."))
        offsets[name] = sizes.get(unit, 0)
        sizes[unit] = offsets[name] + score.numel()
    for _, _, name, i in sorted(flat)[:count]:
        unit = next(u for u in ZOO_UNITS if name.startswith(u + "."))
        units.setdefault(unit, []).append(offsets[name] + i)
    return {unit: sorted(positions) for unit, positions in units.items()}


ZOO_UNITS = (
    "tower.tokens",
    "tower.patches",
    "tower.block.norm",
    "tower.block.twice",
    "tower.block.attention",
    "tower.head",
    "tower.positions",
)


@pytest.mark.parametrize("score", ["signed_mean", "abs_mean", "fisher", "magnitude"])
def test_scores_are_those_of_single_images(score: str) -> None:
    scores = oracle_scores(score)
    numel = sum(s.numel() for s in scores.values())
    found = selection(SAFTConfig(density=0.1, score=score), in_batches_of(1))
    assert found == expected_selection(scores, numel // 10)


def test_scores_of_single_images_refuse_larger_batches() -> None:
    model = get_peft_model(zoo(), SAFTConfig(score="fisher"))
    with pytest.raises(SelectionError, match="'fisher'.*got 'a batch of 4 images'.*batches of one image"):
        select_saft(model, batches(), exact_loss)


def test_random_needs_no_data_and_follows_its_seed() -> None:
    models = [get_peft_model(zoo(), SAFTConfig(density=0.1, score="random", seed=seed)) for seed in (1, 1, 2)]
    state = torch.get_rng_state()
    for model in models:
        select_saft(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert selected(models[0]) == selected(models[1]) != selected(models[2])


def test_exactly_floor_of_density_times_parameters_and_never_none() -> None:
    numel = sum(p.numel() for n, p in zoo().named_parameters() if n != "scale")
    for density in (0.001, 0.0123, 0.29, 1e-9):
        found = selection(SAFTConfig(density=density, score="magnitude"))
        assert sum(map(len, found.values())) == max(1, int(Fraction(str(density)) * numel))
    assert _budget(0.29, 100) == 29  # 28.999999999999996 in binary


def test_per_tensor_gives_every_tensor_its_share() -> None:
    model = get_peft_model(zoo(), SAFTConfig(density=0.05, scope="per_tensor", score="magnitude"))
    select_saft(model)
    counts = {kind.kind: kind.count for kind in mask_summary(model).kinds}
    assert counts == {n: max(1, int(0.05 * p.numel())) for n, p in zoo().named_parameters() if n != "scale"}


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_the_batch_size_does_not_matter(size: int) -> None:
    assert selection(SAFTConfig(density=0.1), in_batches_of(size)) == selection(SAFTConfig(density=0.1))


def test_checkpointing_does_not_matter() -> None:
    for reentrant in (True, False):
        model = zoo()
        model.tower.checkpointing = reentrant
        assert selection(SAFTConfig(density=0.1), model=model) == selection(SAFTConfig(density=0.1))


def test_mask_of_the_oracle() -> None:
    masks = oracle_masks(zoo(), batches(), 0.1, ("scale",))
    model = get_peft_model(zoo(), SAFTConfig(density=0.1))
    select_saft(model, batches(), exact_loss)
    assert {k.kind: k.count for k in mask_summary(model).kinds} == {
        n: int(m.sum()) for n, m in masks.items() if m.any()
    }


def test_rounding_noise_is_not_selected() -> None:
    """The keys' bias has no gradient in exact arithmetic, and padding rows of an embedding have none at all."""
    model = get_peft_model(zoo(), SAFTConfig(density=1.0))
    with pytest.raises(SelectionError, match=r"fewer entries.*got '\d+ of \d+'.*Lower density below 0\.\d+"):
        select_saft(model, batches(), exact_loss)
    found = selection(SAFTConfig(density=1.0, scope="per_tensor"))
    attention = zoo().tower.block.attention
    keys = range(attention.in_proj_weight.numel() + 8, attention.in_proj_weight.numel() + 16)
    assert not set(found["tower.block.attention"]) & set(keys)
    assert min(found["tower.tokens"]) >= 8  # row 0 is padding


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_ties_go_to_the_lowest_positions(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    assert _top(torch.tensor(values, dtype=torch.float32), count).tolist() == expected


def test_the_model_is_left_as_it_was() -> None:
    model = get_peft_model(zoo(), SAFTConfig(density=0.1))
    model.train()
    model.base_model.model.tower.head.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    base = copy.deepcopy({n: p for n, p in model.named_parameters()})
    state = torch.get_rng_state()
    select_saft(model, batches(), lambda m, b: exact_loss(m, b) + torch.rand(()))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: model.get_submodule(name).training for name in flags} == flags
    assert not model.base_model.model.tower.head.training and model.base_model.model.tower.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == ("saft_values" in name)
        if name in base:
            assert torch.equal(parameter, base[name])


def test_an_error_in_the_loss_leaves_the_model_usable() -> None:
    model = get_peft_model(zoo(), SAFTConfig(density=0.1))

    def broken(model: nn.Module, batch: dict) -> torch.Tensor:
        exact_loss(model, batch).backward()
        raise RuntimeError("no more images")

    with pytest.raises(RuntimeError, match="no more images"):
        select_saft(model, batches(), broken)
    assert saft_unselected(model)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    select_saft(model, batches(), exact_loss)
    assert selected(model) == selection(SAFTConfig(density=0.1))


def test_dropout_plays_no_part() -> None:
    def with_dropout() -> nn.Module:
        model = zoo()
        model.tower.head = nn.Sequential(nn.Dropout(0.5), model.tower.head)
        return model

    first, second = (get_peft_model(with_dropout(), SAFTConfig(density=0.1)) for _ in range(2))
    for model in (first, second):
        model.train()
        select_saft(model, batches(), exact_loss)
    assert selected(first) == selected(second)


def test_nan_and_zero_gradients_are_refused() -> None:
    data = batches()
    data[1]["pixel_values"][0, 0, 0, 0] = float("nan")
    model = get_peft_model(zoo(), SAFTConfig(density=0.1))
    with pytest.raises(NonFiniteError, match=r"tower\."):
        select_saft(model, data, exact_loss)
    with pytest.raises(SelectionError, match="all gradients are zero"):
        select_saft(model, batches(), lambda m, b: exact_loss(m, b) * 0)
    with pytest.raises(SelectionError, match="loss has no gradient .at loss_fn.*detach"):
        select_saft(model, batches(), lambda m, b: exact_loss(m, b).detach())
    with pytest.raises(SelectionError, match="no batch"):
        select_saft(model, [], exact_loss)
    with pytest.raises(SelectionError, match="needs data"):
        select_saft(model)
    assert saft_unselected(model)


def test_selecting_twice_or_without_an_adapter_is_an_error() -> None:
    model = get_peft_model(zoo(), SAFTConfig(density=0.1, score="random"))
    select_saft(model)
    with pytest.raises(SelectionError, match="selected its entries already"):
        select_saft(model)
    with pytest.raises(SelectionError, match="no SAFT adapter"):
        select_saft(zoo(), batches(), exact_loss)
    assert not saft_unselected(zoo())


def test_training_before_the_selection_is_an_error_that_says_what_to_call() -> None:
    model = get_peft_model(zoo(), SAFTConfig())
    model.train()
    with pytest.raises(SelectionError, match=r"select_saft\(model, batches, loss_fn\)"):
        exact_loss(model, batches()[0])
    with torch.no_grad():
        exact_loss(model, batches()[0])
    model.eval()
    assert torch.equal(exact_loss(model, batches()[0]), exact_loss(zoo(), batches()[0]))
    with pytest.raises(SelectionError, match="select_saft"):
        mask_summary(model)
