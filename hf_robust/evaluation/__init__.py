# SPDX-License-Identifier: Apache-2.0
"""What fine-tuning gained and what it cost: suites of datasets, protocols, measures and pictures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
