"""What is learned; one package a method."""

from upstep_fast.methods.method import Embeddings, Method
from upstep_fast.methods.registry import build

__all__ = ["Embeddings", "Method", "build"]
