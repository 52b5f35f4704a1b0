# SPDX-License-Identifier: Apache-2.0
"""What fine-tuning gained and what it cost: suites of datasets, protocols, measures and pictures."""

from pkgutil import iter_modules

import lazy_loader

_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
_file, *_ = lazy_loader.attach(__name__, [module.name for module in iter_modules(__path__)])


def __getattr__(name: str) -> object:
    return _name(name) if name in __all__ else _file(name)
