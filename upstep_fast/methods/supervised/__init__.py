"""Methods that learn from labels: LoSA and the baselines."""
