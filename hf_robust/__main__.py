# SPDX-License-Identifier: Apache-2.0
"""`python -m hf_robust` is the command `hf-robust`."""

import sys

from .cli import main

sys.exit(main())
