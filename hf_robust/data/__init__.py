# SPDX-License-Identifier: Apache-2.0
"""What a row of data is: sources, images, batches, embeddings kept on disk."""
