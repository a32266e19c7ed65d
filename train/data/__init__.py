"""Images on their way to the network: sources, decoding, splits and classes, order, batches, transforms."""
