"""Features as a transformer of scikit-learn: images -> [N, D], at the head of a pipeline.

>>> classifier = make_pipeline(upstep_fast.Embedder("adapted/"), LogisticRegression())
>>> classifier.fit(paths, labels)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from upstep_fast.evaluation.feature_model import FeatureModel, load

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils.validation import check_is_fitted
except ModuleNotFoundError as error:
    raise ImportError("upstep_fast.Embedder needs scikit-learn; pip install 'upstep_fast[sklearn]'") from error


class Embedder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Transform images into features: unit vectors, fp32 [N, D], with whitened ones appended.

    X is what `FeatureModel.embed` takes: a list of paths, PIL images or arrays [H, W, C], an array [N, H, W, C], or a
    folder. model: the folder of a run of `adapt`, or the name of a model. whiten: append whitened features, fitted to
    the images of `fit`; their labels are not used. batch_size, num_workers: as for `FeatureModel.embed`. device,
    precision: as for `upstep_fast.load`. Attribute of a fitted transformer: `feature_model_`, a FeatureModel, which is
    pickled with its weights.
    """

    feature_model_: FeatureModel

    def __init__(
        self,
        model: str | Path = "vit_base_patch16_224",
        *,
        whiten: bool = True,
        batch_size: int = 256,
        num_workers: int | None = None,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        self.model = model
        self.whiten = whiten
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.device = device
        self.precision = precision

    def fit(self, X: Any, y: Any = None) -> Embedder:
        """Load the model and fit the whitening to images X. Raises ConfigError, DataError, RunFailedError."""
        model = load(self.model, whiten=False, device=self.device, precision=self.precision)
        self.feature_model_ = model.fit_whitening(X, self.batch_size, self.num_workers) if self.whiten else model
        return self

    def fit_transform(self, X: Any, y: Any = None, **fit_params: Any) -> np.ndarray:
        """Fit and transform with one pass of the images X through the model -> fp32 [N, D]. Raises as `fit`."""
        model = load(self.model, whiten=False, device=self.device, precision=self.precision)
        if not self.whiten:
            self.feature_model_ = model
            return self.transform(X)
        self.feature_model_, features = model.fit_embed(X, self.batch_size, self.num_workers)
        return features

    def transform(self, X: Any) -> np.ndarray:
        """Return the features of images X, fp32 [N, D]. Raises NotFittedError, DataError, RunFailedError."""
        check_is_fitted(self)
        return self.feature_model_.embed(X, self.batch_size, self.num_workers)

    @property
    def _n_features_out(self) -> int:
        return self.feature_model_.dim

    def __sklearn_tags__(self) -> Any:
        """Return the tags: X is neither a table nor checked by scikit-learn."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.string = False, True
        tags.transformer_tags.preserves_dtype = []  # fp32 whatever the images are
        tags.no_validation = True
        return tags
