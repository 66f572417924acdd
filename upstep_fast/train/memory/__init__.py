"""How much memory a step needs, and which level and batch fit."""
