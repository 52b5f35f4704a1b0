# SPDX-License-Identifier: Apache-2.0
"""OGEN's generator against its formula, sample by sample and head by head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_robust.errors import ConfigError
from hf_robust.ogen.generator import FeatureGenerator

DIM = 8
both_forms = pytest.mark.parametrize("layer_norm", [False, True], ids=["released", "layer_norm"])


def random_generator(layer_norm: bool = False, heads: int = 4, **settings: object) -> FeatureGenerator:
    """In float64 and eval mode, with biases and a LayerNorm that are not those of the initialisation."""
    generator = FeatureGenerator(DIM, heads=heads, layer_norm=layer_norm, **settings).double().eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)
    return generator


def triple(batch: int = 2, n: int = 3, m: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, length, DIM, dtype=dtype) for length in (n, m, m))


def attend(generator: FeatureGenerator, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Multi-head attention of one query `(dim,)` on keys and values `(m, dim)`."""
    attention = generator.attention
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (x @ weight.T + bias for x, weight, bias in zip((query, keys, values), weights, biases, strict=True))
    size = len(query) // attention.num_heads
    heads = []
    for head in range(attention.num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.stack([k[i, part] @ q[part] / math.sqrt(size) for i in range(len(keys))])
        shares = scores.exp() / scores.exp().sum()
        heads.append(sum(shares[i] * v[i, part] for i in range(len(keys))))
    return attention.out_proj.weight @ torch.cat(heads) + attention.out_proj.bias


def feed_forward(generator: FeatureGenerator, x: Tensor) -> Tensor:
    first, _, second = generator.feed_forward
    return second.weight @ (first.weight @ x + first.bias).clamp(min=0) + second.bias


def layer_normed(norm: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / ((centred**2).mean() + norm.eps).sqrt() * norm.weight + norm.bias


def generate(generator: FeatureGenerator, query: Tensor, keys: Tensor, values: Tensor, layer_norm: bool) -> Tensor:
    """The generator's formula for one query `(dim,)` and keys and values `(m, dim)`."""
    attended = attend(generator, query, keys, values)
    if layer_norm:
        feature = feed_forward(generator, layer_normed(generator.norm, values.mean(dim=0) + attended))
    else:
        feature = feed_forward(generator, query) + attended
    return feature / (feature @ feature).sqrt()


@both_forms
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("n", "m"), [(1, 3), (3, 1), (2, 5), (4, 4)])
def test_it_is_the_formula_written_out(layer_norm: bool, heads: int, n: int, m: int) -> None:
    generator = random_generator(layer_norm, heads)
    query, key, value = triple(batch=3, n=n, m=m)
    found = generator(query, key, value)
    assert found.shape == (3, n, DIM)
    for sample in range(3):
        for row in range(n):
            expected = generate(generator, query[sample, row], key[sample], value[sample], layer_norm)
            torch.testing.assert_close(found[sample, row], expected, rtol=0, atol=1e-12)


@both_forms
def test_its_gradients_are_those_of_the_formula(layer_norm: bool) -> None:
    generator = random_generator(layer_norm)
    tensors = [tensor.requires_grad_() for tensor in triple(batch=1, n=1)]
    wanted = [*tensors, *generator.parameters()]
    direction = torch.randn(DIM, dtype=torch.float64)
    by_hand = generate(generator, tensors[0][0, 0], tensors[1][0], tensors[2][0], layer_norm) @ direction
    expected = torch.autograd.grad(by_hand, wanted)
    found = torch.autograd.grad(generator(*tensors)[0, 0] @ direction, wanted)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@both_forms
def test_gradients_or_not_and_eval_or_train_without_dropout_the_numbers_are_the_same(layer_norm: bool) -> None:
    """PyTorch's attention has another code path for inference."""
    generator, inputs = random_generator(layer_norm, dropout=0.0), triple()
    with_gradient = generator(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(generator(*inputs), with_gradient.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(generator.train()(*inputs), with_gradient, rtol=0, atol=1e-12)


def test_with_a_single_key_attention_is_a_linear_map_of_the_value() -> None:
    generator = random_generator()
    query, key, value = triple(n=4, m=1)
    w_v, b_v = generator.attention.in_proj_weight[2 * DIM :], generator.attention.in_proj_bias[2 * DIM :]
    out = generator.attention.out_proj
    mapped = (value @ w_v.T + b_v) @ out.weight.T + out.bias  # (batch, 1, dim)
    feature = generator.feed_forward(query) + mapped
    expected = feature / feature.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(generator(query, key, value), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(generator(query, 7 * key + 1, value), expected, rtol=0, atol=1e-12)


def test_with_a_single_key_and_layer_norm_neither_query_nor_key_matter() -> None:
    generator = random_generator(layer_norm=True)
    query, key, value = triple(n=4, m=1)
    found = generator(query, key, value)
    torch.testing.assert_close(found, generator(-3 * query + 1, 7 * key, value), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, found[:, :1].expand_as(found), rtol=0, atol=1e-12)
    assert (found - generator(query, key, value + 1)).abs().max() > 1e-2


@both_forms
def test_the_order_of_key_and_value_pairs_does_not_matter_but_their_pairing_does(layer_norm: bool) -> None:
    generator = random_generator(layer_norm)
    query, key, value = triple(m=5)
    order = torch.tensor([3, 0, 4, 1, 2])
    found = generator(query, key, value)
    torch.testing.assert_close(generator(query, key[:, order], value[:, order]), found, rtol=0, atol=1e-12)
    assert (generator(query, key, value[:, order]) - found).abs().max() > 1e-2


@both_forms
def test_samples_and_queries_do_not_see_each_other(layer_norm: bool) -> None:
    generator = random_generator(layer_norm)
    query, key, value = triple(batch=3, n=3)
    found = generator(query, key, value)
    torch.testing.assert_close(generator(query[1:2, 2:], key[1:2], value[1:2]), found[1:2, 2:], rtol=0, atol=1e-12)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_features_have_unit_norm_in_float32_or_better(layer_norm: bool, dtype: torch.dtype) -> None:
    generator = random_generator(layer_norm).to(dtype)
    found = generator(*triple(dtype=dtype))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]
    torch.testing.assert_close(found.double().norm(dim=-1), torch.ones(2, 3).double(), rtol=0, atol=tolerance)


@both_forms
def test_all_parameters_get_gradients(layer_norm: bool) -> None:
    generator = FeatureGenerator(DIM, layer_norm=layer_norm)
    generator(*triple(dtype=torch.float32)).mul(torch.randn(DIM)).sum().backward()
    named = dict(generator.named_parameters())
    assert {"attention.in_proj_weight", "attention.out_proj.weight", "feed_forward.0.weight"} <= set(named)
    assert ("norm.weight" in named) == layer_norm
    assert [name for name, p in named.items() if p.grad is None or not p.grad.any()] == []
    query, key, value = named["attention.in_proj_weight"].grad.chunk(3)
    assert query.any() and key.any() and value.any()


@both_forms
def test_dropout_acts_in_train_mode_only(layer_norm: bool) -> None:
    generator, inputs = FeatureGenerator(DIM, dropout=0.5, layer_norm=layer_norm), triple(dtype=torch.float32)
    assert generator.training
    assert not torch.equal(generator(*inputs), generator(*inputs))
    generator.eval()
    assert torch.equal(generator(*inputs), generator(*inputs))


def test_the_parts_are_those_of_the_released_code() -> None:
    generator = FeatureGenerator(512)
    assert (generator.attention.num_heads, generator.attention.dropout) == (4, 0.1)
    assert generator.attention.batch_first
    assert [type(part).__name__ for part in generator.feed_forward] == ["Linear", "ReLU", "Linear"]
    shapes = [tuple(p.shape) for p in generator.feed_forward.parameters()]
    assert shapes == [(512, 512), (512,), (512, 512), (512,)]
    released = 3 * 512 * 512 + 3 * 512 + 3 * (512 * 512 + 512)  # in_proj, then out_proj and two Linear
    assert sum(p.numel() for p in generator.parameters()) == released


@both_forms
def test_the_seed_alone_decides_on_the_first_weights(layer_norm: bool) -> None:
    first = FeatureGenerator(DIM, layer_norm=layer_norm, seed=3).state_dict()
    torch.manual_seed(99)
    again = FeatureGenerator(DIM, layer_norm=layer_norm, seed=3).state_dict()
    other = FeatureGenerator(DIM, layer_norm=layer_norm, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name, tensor in first.items() if tensor.ndim == 2]
    assert len(matrices) == 4
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_making_one_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    FeatureGenerator(DIM, layer_norm=True, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_making_one_leaves_the_random_states_of_accelerators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` would reseed them all, and `fork_rng` gives back only those it is told of."""
    reseeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    FeatureGenerator(DIM, seed=7)
    assert reseeded == []


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"dim": 10, "heads": 4}, ["10", "4"]),
        ({"dim": 8, "heads": 0}, ["0"]),
        ({"dim": 8, "heads": -2}, ["-2"]),
        ({"dim": 8, "dropout": -0.1}, ["-0.1"]),
        ({"dim": 8, "dropout": 1.5}, ["1.5"]),
        ({"dim": 8, "dropout": math.nan}, ["nan"]),
    ],
)
def test_settings_out_of_range_are_refused_with_their_values(settings: dict, shown: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        FeatureGenerator(**settings)
    assert all(value in str(caught.value) for value in shown)
