"""Objectives as pure functions."""
