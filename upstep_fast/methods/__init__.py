"""Adaptation methods; one package each."""

from upstep_fast.methods.embeddings import Embeddings
from upstep_fast.methods.method import Method
from upstep_fast.methods.registry import build

__all__ = ["Embeddings", "Method", "build"]
