"""Dense features: patch tokens on their grid, as files, for segmentation by nearest neighbors, and as pictures."""
