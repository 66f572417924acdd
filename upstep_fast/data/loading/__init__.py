"""Loading: decoded batches, read ahead, in an order that a resumed run repeats."""
