"""ExPLoRA (arXiv 2406.10973): extended pre-training with DINOv2's or MAE's objective."""
