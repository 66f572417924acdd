"""From bytes to views: sources, decode, views, loader."""
