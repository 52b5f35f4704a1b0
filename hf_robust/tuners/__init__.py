# SPDX-License-Identifier: Apache-2.0
"""The methods that say where the change to a model may live, each a PEFT tuner."""

from . import aclip as aclip  # each enters itself into PEFT
from . import radapter as radapter
from . import saft as saft
