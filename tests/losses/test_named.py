# SPDX-License-Identifier: Apache-2.0
"""Terms by name: from a list, from a YAML file, and what is refused."""

from __future__ import annotations

import pytest
import torch

from hf_robust.errors import ConfigError
from hf_robust.losses import SimilarityLoss, Term
from hf_robust.losses.named import terms_of
from hf_robust.ogen import OGENLoss

KNOWN = {"similarity": SimilarityLoss, "ogen": OGENLoss}


class Own(Term):
    name = "own"

    def __init__(self, temperature, weight=2.0):
        super().__init__(weight)
        self.temperature = temperature


def test_a_mapping_and_a_list_give_the_same_in_their_order():
    given = {"own": {"temperature": 3}, "similarity": {"weight": 10, "distance": "l2"}}
    by_name = terms_of(given, {**KNOWN, "own": Own})
    listed = terms_of([Own(3), SimilarityLoss(10.0, "l2")], KNOWN)
    assert list(by_name) == list(listed) == ["own", "similarity"]
    for name, settings in given.items():
        assert by_name[name].settings() == listed[name].settings()
        assert settings.items() <= by_name[name].settings().items()
    assert by_name["own"].settings() == {"temperature": 3, "weight": 2.0}
    assert terms_of({"similarity": None}, KNOWN)["similarity"].settings() == SimilarityLoss().settings()
    assert terms_of(None, KNOWN) == terms_of([], KNOWN) == {}


def test_the_settings_of_ogen_are_those_of_its_config():
    settings = {"new_class_names": ["cat", "dog", "owl"], "warmup": 0.5}
    loss = terms_of({"ogen": settings}, KNOWN)["ogen"]
    assert loss.config.warmup == 0.5 and settings.items() <= loss.settings().items()


def without_name():
    return type("Nameless", (Term,), {})()


class Unmade(Term):
    name = "unmade"

    def __init__(self):
        self.margin = 0.1


REFUSED = {
    "unknown name": ({"similarty": {}}, "no such loss.*'similarty'.*Did you mean 'similarity'"),
    "unknown setting": ({"similarity": {"wieght": 1.0}}, "losses, similarity.*'wieght'.*Did you mean 'weight'"),
    "unknown setting of OGEN": ({"ogen": {"neighbors": 3}}, "losses, ogen.*'neighbors'.*'neighbours'"),
    "missing setting": ({"ogen": {"warmup": 0.5}}, "lacks settings.*losses, ogen.*new_class_names"),
    "value": ({"similarity": {"weight": -1}}, "weight is out of range.*-1"),
    "no mapping": ({"similarity": 10.0}, "no settings of a loss.*losses, similarity.*10.0"),
    "no terms": (SimilarityLoss(), "these are no losses.*a list"),
    "a name in a list": (["similarity"], "these are no losses.*'similarity'"),
    "a module": ([torch.nn.MSELoss()], "these are no losses"),
    "twice": ([SimilarityLoss(), SimilarityLoss(2.0)], "there twice.*'similarity'.*another `name`"),
    "without name": ([without_name()], "no name to log it by.*Nameless"),
    "a name with a point": ([type("Dotted", (Term,), {"name": "a.b"})()], "no name.*'a.b'"),
    "a name that PyTorch takes": (
        [type("Taken", (Term,), {"name": "items"})()],
        "attribute of nn.ModuleDict.*'items'",
    ),
    "without super().__init__": ([Unmade()], "without Term.__init__.*Unmade.*super"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_none_is_one_error(case):
    given, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        terms_of(given, KNOWN)
