"""Decoding: bytes to pixels."""

from upstep_fast.data.decode.image import decode

__all__ = ["decode"]
