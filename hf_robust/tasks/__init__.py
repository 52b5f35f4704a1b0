# SPDX-License-Identifier: Apache-2.0
"""What is learned, around a dual encoder."""
