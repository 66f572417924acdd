"""What is learned; one package a method."""

from upstep_fast.methods.registry import Embedded, Method, build

__all__ = ["Embedded", "Method", "build"]
