"""Curation: copies, outliers, wrong classes, and copies across train and test in a set of images."""
