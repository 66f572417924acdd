"""Inspection of all images before a run: copies, blank images, channel statistics."""
