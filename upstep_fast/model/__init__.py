"""A pretrained ViT, its adapter and its file formats."""
