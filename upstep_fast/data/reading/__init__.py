"""What an image file declares about its values and axes, and how they become pixels of 8 bits."""
