# SPDX-License-Identifier: Apache-2.0
"""Fine-tune CLIP-like models without forgetting: robust fine-tuning methods as a PEFT extension."""

from importlib.metadata import version

import lazy_loader

from . import tuners as tuners  # from here on PEFT knows the methods

__version__ = version("hf_robust")
# Names and rooms are loaded when they are first used; the stub lists them, for type checkers too
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
