"""Names and bytes of images by index: folders, tars, lists, Hugging Face data sets."""

from upstep_fast.data.sources.source import open_source

__all__ = ["open_source"]
