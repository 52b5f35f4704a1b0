# SPDX-License-Identifier: Apache-2.0
"""What a dual encoder is: families and embeddings, prompts, class embeddings, learned context."""
