"""Search by features: the nearest images of an image, exact or by an index."""
