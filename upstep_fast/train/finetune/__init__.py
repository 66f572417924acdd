"""Supervised fine-tuning: the loop, its state and the classifier it writes."""
