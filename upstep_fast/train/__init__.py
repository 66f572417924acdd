"""The training loop and all that runs in it."""
