"""UpStep (arXiv 2502.21313)."""
