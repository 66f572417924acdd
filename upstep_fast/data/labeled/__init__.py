"""Labeled images and clips: classes, splits, batches."""
