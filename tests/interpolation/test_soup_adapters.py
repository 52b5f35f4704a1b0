# SPDX-License-Identifier: Apache-2.0
"""Soups of adapters of one base."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, ShiraConfig, get_peft_model

from hf_robust import ACLIPConfig, RAdapterConfig, SAFTConfig, mask_summary
from hf_robust.errors import AdapterFileError, ConfigError, MergeError, NonFiniteError, SelectionError
from hf_robust.interpolation.adapters import wise_ft
from hf_robust.interpolation.soups import greedy_soup, uniform_soup
from hf_robust.tuners.saft.layer import saft_layers
from tests.interpolation.tuned import ACLIP, LORA, METHODS, RSLORA, SAFT, SHIRA, own, tuned
from tests.methods import CLIP, Method, add, assert_same, batch, outputs, train
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's own LN tuning
METRIC = "validation_accuracy"
OTHER_MASK = Method("SHiRA", lambda: ShiraConfig(r=1, target_modules=["q_proj", "fc2"], random_seed=1))
PLAIN_LORA = Method("LoRA", lambda: LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
SPARSER = Method("SAFT", lambda: SAFTConfig(density=0.01))
LOW_TO_FULL = Method("R-Adapter of half the rank", lambda: RAdapterConfig(r=16, average_decay=None))
BIASED = next(method for method in METHODS if method.name == "LoRA with bias")
EXACT = [LOW_TO_FULL, *(method for method in METHODS if method not in (LORA, BIASED))]
PAIRS = [(method, method) for method in EXACT] + [(SHIRA, OTHER_MASK), (SAFT, SPARSER)]


@functools.cache
def _two(first: Method, second: Method) -> PeftModel:
    model = tuned(first)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        add(second, model, CLIP, "b")
        model.set_adapter("b")
        train(model, batch(CLIP, 3))
    return model


def two(first: Method, second: Method | None = None) -> PeftModel:
    """A model with the adapters `default` and, active, `b`, trained on other data."""
    return copy.deepcopy(_two(first, second or first))


def merged(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    model.set_adapter(adapter)
    return {name: tensor.double() for name, tensor in model.merge_and_unload().state_dict().items()}


def state(model: PeftModel) -> tuple:
    trains = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    return own(model), trains, model.active_adapters, list(model.peft_config), {**model.peft_config}


def assert_unchanged(model: PeftModel, before: tuple) -> None:
    now = state(model)
    assert_same(now[0], before[0])
    assert now[1:] == before[1:]


@pytest.mark.parametrize("methods", PAIRS, ids=lambda pair: f"{pair[0].name}, {pair[1].name}")
def test_the_change_is_the_mean_of_the_changes(methods, tmp_path):
    model = two(*methods)
    before, first, second = own(model), merged(model, "default"), merged(model, "b")
    assert uniform_soup(["default", "b"], model) is model and model.active_adapters == ["soup"]
    soup = merged(model, "soup")
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-6, atol=3e-7)
    assert max((first[name] - second[name]).abs().max() for name in soup) > 1e-2
    after = own(model)
    assert_same({name: after[name] for name in before}, before)
    expected = outputs(model)
    model.save_pretrained(tmp_path, selected_adapters=["soup"], save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny_model(CLIP), tmp_path / "soup").eval()
    torch.testing.assert_close(outputs(loaded), expected, rtol=1e-6, atol=1e-6)
    losses = train(model, batch(CLIP))
    assert losses[-1] < losses[0]


def test_a_soup_of_saft_is_a_saft_adapter_with_the_union_of_the_entries():
    model = two(SAFT)
    uniform_soup(["default", "b"], model)
    counts = {}
    for layer in saft_layers(model):
        empty = torch.empty(0)
        names = "default", "b", "soup"
        held = {name: layer.saft_indices[name] if name in layer.saft_indices else empty for name in names}
        union = sorted(set(held["default"].tolist()) | set(held["b"].tolist()))
        assert held["soup"].tolist() == union
        if union:
            assert held["soup"].dtype == torch.int32 and layer.saft_values["soup"].requires_grad
        for name, indices in held.items():
            counts[name] = counts.get(name, 0) + len(indices)
    assert counts["soup"] > max(counts["default"], counts["b"])
    config = model.peft_config["soup"]
    assert config.density == pytest.approx(0.02 * counts["soup"] / counts["default"])
    assert mask_summary(model).selected == counts["soup"]


def test_equal_adapters_give_the_same_bits():
    model = two(ACLIP)
    parameters = dict(model.named_parameters())
    for name in [name for name in parameters if name.endswith(".b") or ".b." in name]:
        twin = name.removesuffix(".b") + ".default" if name.endswith(".b") else name.replace(".b.", ".default.")
        parameters[name].data.copy_(parameters[twin])
    uniform_soup(["default", "b"], model)
    assert_same(merged(model, "soup"), merged(model, "default"))


@pytest.mark.parametrize("method", [SAFT, RSLORA, SHIRA], ids=lambda method: method.name)
def test_a_soup_of_one_is_that_one(method):
    model = two(method)
    uniform_soup(["b"], model, "alone")
    found, expected = merged(model, "alone"), merged(model, "b")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=3e-7)


def test_a_soup_goes_part_of_the_way():
    model = two(SAFT)
    uniform_soup(["default", "b"], model)
    full, half = merged(model, "soup"), tiny_model(CLIP).state_dict()
    wise_ft(model, 0.5)
    for name, tensor in merged(model, "soup").items():
        torch.testing.assert_close(tensor, (full[name] + half[name].double()) / 2, rtol=1e-6, atol=3e-7)


def test_adapters_are_taken_as_they_stand():
    model = two(ACLIP)
    wise_ft(model, 0.25)  # of `b`, which is active
    first, second = merged(model, "default"), merged(model, "b")
    uniform_soup(["b", "default"], model)
    for name, tensor in merged(model, "soup").items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-6, atol=3e-7)
    model.set_adapter("b")
    wise_ft(model, 1.0)
    assert_same(merged(model, "b"), merged(two(ACLIP), "b"))


def test_greedy_adds_the_soup_of_what_helps():
    model = two(SAFT)
    add(SAFT, model, CLIP, "c")  # not trained: it changes nothing
    seen = []

    def evaluate(given):
        assert given is model and model.active_adapters == ["soup"]
        moved = sum(float(p.detach().norm()) for n, p in model.named_parameters() if n.endswith("saft_values.soup"))
        seen.append(moved)
        return {METRIC: moved}

    _, found = greedy_soup(["c", "default", "b"], evaluate, METRIC, model)
    assert [row["ingredient"] for row in found.rows][-1] == "c" and found.members[0] in (1, 2)
    assert len(found.members) == 1  # the mean is shorter than the longer of the two
    best = ["c", "default", "b"][found.members[0]]
    assert_same(merged(model, "soup"), merged(model, best))
    assert list(model.peft_config) == ["default", "b", "c", "soup"] and len(seen) == 5


@pytest.mark.parametrize("method", [SAFT, ACLIP, PLAIN_LORA], ids=lambda method: method.name)
def test_after_an_error_the_model_is_as_it_was(method):
    model = two(method)
    before, calls = state(model), []

    def evaluate(given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {METRIC: 1.0}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyboardInterrupt):
            greedy_soup(["default", "b"], evaluate, METRIC, model)
    assert_unchanged(model, before)


def refused(model, names, error, match, **settings):
    before = state(model)
    with pytest.raises(error, match=match):
        uniform_soup(names, model, **settings)
    assert_unchanged(model, before)


def test_adapters_that_have_no_exact_mean_are_refused():
    model = two(SAFT)
    refused(model, [], ConfigError, "no ingredients")
    with pytest.raises(ConfigError, match="no PeftModel.*CLIPModel"):
        uniform_soup(["default"], tiny_model(CLIP))
    refused(model, ["b", "b"], ConfigError, "twice.*'b'")
    refused(model, ["b", "defualt"], ConfigError, "no adapter of this name.*defualt.*allowed default.*load_adapter")
    refused(model, ["default", "b"], ConfigError, "has an adapter of this name.*'b'", adapter_name="b")
    refused(model, ["default", tiny_model(CLIP)], ConfigError, "no name of an adapter.*CLIPModel")
    model.add_adapter("new", SAFTConfig(density=0.02))
    refused(model, ["b", "new"], SelectionError, "not selected its entries.*'new'")
    model.add_adapter("vision", SAFTConfig(density=0.02, towers="vision"))
    refused(model, ["b", "vision"], MergeError, "'b' and 'vision' change different tensors.*towers.*both and vision")
    model.set_adapter("b")
    model.merge_adapter()
    refused(model, ["default", "b"], ConfigError, "adapters are merged")
    refused(two(LORA), ["default", "b"], ConfigError, "PEFT cannot lay.*modules_to_save.*Merge them")
    refused(two(BIASED), ["default", "b"], ConfigError, "PEFT cannot lay.*lora_bias")
    dora = get_peft_model(tiny_model(CLIP), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    refused(dora, ["default"], ConfigError, "DoraLinear.*not linear in B")
    product = get_peft_model(tiny_model(CLIP), LoHaConfig(r=2, target_modules=["q_proj"]))
    refused(product, ["default"], ConfigError, "changes by LOHA is not known to be one.*allowed SAFT, ACLIP")
    wide = get_peft_model(tiny_model(CLIP), ShiraConfig(r=19, target_modules=["fc1"], random_seed=0))
    wide.add_adapter("b", ShiraConfig(r=19, target_modules=["fc1"], random_seed=1))
    refused(wide, ["default", "b"], ConfigError, "SHiRA has as many entries in every module.*at most 1536")


def test_values_that_are_not_finite_are_refused():
    model = two(ACLIP)
    next(p for n, p in model.named_parameters() if n.endswith("aclip_weight.b")).data[0, 0] = float("inf")
    refused(model, ["default", "b"], NonFiniteError, "aclip|b, b")


def test_an_adapter_of_another_base_does_not_load(tmp_path):
    """So that a soup of two bases cannot be."""
    two(ACLIP).save_pretrained(tmp_path, save_embedding_layers=False)
    model = get_peft_model(tiny_model(CLIP, seed=1), ACLIPConfig(modules_to_save=["visual_projection"]))
    with pytest.raises(AdapterFileError, match="another base"):
        model.load_adapter(str(tmp_path / "b"), "b")
