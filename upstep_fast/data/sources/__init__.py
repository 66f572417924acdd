"""Sources: names and bytes of images by index, from folders, tars, lists and Hugging Face datasets."""

from upstep_fast.data.sources.source import open_source

__all__ = ["open_source"]
