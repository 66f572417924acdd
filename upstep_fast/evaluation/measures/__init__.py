"""Measures of `eval --measures` from features and classes: retrieval, few-shot, clusters, one row a class."""
