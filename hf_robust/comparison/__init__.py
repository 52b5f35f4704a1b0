# SPDX-License-Identifier: Apache-2.0
"""Which method for which task: all of them trained on one, their settings chosen on validation data alone."""
