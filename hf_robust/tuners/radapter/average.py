# SPDX-License-Identifier: Apache-2.0
"""Averages of trained tensors that follow every step of an optimizer, in any training loop."""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Follower(Protocol):
    """What is told of steps."""

    def follow(self, stepped: set[int]) -> None:
        """Takes the step into its averages.

        Args:
            stepped: ids of the parameters that an optimizer has changed.
        """


_FOLLOWERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = count()  # in an order that all ranks share, as what follows shards gathers them


def tell_of_steps(follower: Follower) -> None:
    """Tells something, while it lives, of every step of an optimizer of this process.

    It hears of steps alone, so that nothing else that writes into parameters (loading, moving, a broadcast over ranks)
    is taken for one; and it need not know whose loop it is.

    Args:
        follower: what is told.
    """
    _FOLLOWERS[next(_NUMBERS)] = follower


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _FOLLOWERS:  # of every optimizer of the process
        return
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    stepped = {id(parameter) for parameter in parameters if parameter.grad is not None}
    for follower in list(_FOLLOWERS.values()):
        follower.follow(stepped)


register_optimizer_step_post_hook(_after_step)
