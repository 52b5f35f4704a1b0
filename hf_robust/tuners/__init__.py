# SPDX-License-Identifier: Apache-2.0
"""The methods that say where the change to a model may live, each a PEFT tuner."""

from pkgutil import iter_modules

import lazy_loader

from . import aclip as aclip  # each enters itself into PEFT
from . import radapter as radapter
from . import saft as saft

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, [module.name for module in iter_modules(__path__)])
