# SPDX-License-Identifier: Apache-2.0
"""What holds for the whole package."""

from __future__ import annotations

import pickle
import socket

import pytest
from huggingface_hub import constants
from peft.utils import PeftType
from pytest_socket import SocketConnectBlockedError

import hf_robust
from hf_robust import errors
from hf_robust.peft_types import RobustPeftType


def test_no_network_in_tests() -> None:
    assert constants.HF_HUB_OFFLINE
    with socket.socket() as connection, pytest.raises((SocketConnectBlockedError, UserWarning)):
        connection.connect(("192.0.2.1", 80))  # an address reserved for documentation


def test_public_names_are_documented() -> None:
    public = [value for name, value in vars(hf_robust).items() if not name.startswith("_") and callable(value)]
    assert hf_robust.RobustTrainer in public
    for value in public:
        assert value.__doc__ and "Example" in value.__doc__ + str(value.__init__.__doc__), value


@pytest.mark.parametrize("kind", [e for e in vars(errors).values() if isinstance(e, type)])
def test_errors_survive_pickling(kind: type[errors.HfRobustError]) -> None:
    """A DataLoader worker sends its error through a pipe."""
    error = kind("what", where="there", got=1.5, allowed="(0, 1]", remedy="Do it so.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and str(copy) == str(error) == "what (at there): got 1.5; allowed (0, 1]. Do it so."
    assert (copy.where, copy.got, copy.allowed, copy.remedy) == ("there", 1.5, "(0, 1]", "Do it so.")


def test_method_names_are_their_values_and_not_pefts() -> None:
    """PEFT looks its mappings up with the string from the file, and an Enum hashes by its name."""
    for member in RobustPeftType:
        assert member.name == member.value and hash(member) == hash(member.value)
        assert member.name not in PeftType.__members__
