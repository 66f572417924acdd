"""Labelled images and clips: classes, splits, batches."""
