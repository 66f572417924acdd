"""What is learned; one package a method."""

from upstep_fast.methods.method import Embedded, Method
from upstep_fast.methods.registry import build

__all__ = ["Embedded", "Method", "build"]
