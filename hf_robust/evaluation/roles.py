# SPDX-License-Identifier: Apache-2.0
"""The part that a dataset plays in an evaluation."""

from __future__ import annotations

from typing import Literal, get_args

# the distribution trained on; its classes in other circumstances; classes not trained on; tasks that may be forgotten
Role = Literal["id", "ood", "new", "other"]
ROLES: tuple[Role, ...] = get_args(Role)
