"""From sources of text to packed batches, in an order that can be resumed."""
