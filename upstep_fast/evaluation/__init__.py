"""How good features are: k-NN, linear probe, whitening, label-free scores."""

from upstep_fast.evaluation.labelled import embed, evaluate

__all__ = ["embed", "evaluate"]
