# SPDX-License-Identifier: Apache-2.0
"""The methods that say where the change to a model may live, each a PEFT tuner."""
