"""Kernels for adapting a frozen Vision Transformer. Copy this folder into another project and it works there."""
