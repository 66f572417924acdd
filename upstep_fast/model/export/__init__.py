"""Writes adapted models for other libraries."""
