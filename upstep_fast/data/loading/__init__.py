"""Batches in order, read ahead and resumable."""
