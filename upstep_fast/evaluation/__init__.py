"""Quality of features: k-NN, linear probe, whitening and label-free scores."""

from upstep_fast.evaluation.embeddings import embed
from upstep_fast.evaluation.labeled import evaluate

__all__ = ["embed", "evaluate"]
