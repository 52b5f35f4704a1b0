# SPDX-License-Identifier: Apache-2.0
"""`python -m hf_robust` is the command `hf-robust`."""

from .cli import main

if __name__ == "__main__":
    main()
