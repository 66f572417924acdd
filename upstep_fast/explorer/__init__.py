"""The explorer: a local web page to look through the images of a run, and its server."""
