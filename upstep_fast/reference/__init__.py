"""The same mathematics, eager and obvious: the oracle of tests, the baseline of bench."""
