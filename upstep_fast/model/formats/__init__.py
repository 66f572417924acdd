"""Checkpoint files and configurations of other libraries."""
