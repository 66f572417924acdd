"""A look at all images before a run: copies, blanks, statistics of the channels."""
