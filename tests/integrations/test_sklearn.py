"""The transformer of scikit-learn, by scikit-learn's own checks as far as they apply to images.

`check_estimator` makes tables, [N, F] of numbers, and leaves out estimators whose tags say that they take none. So it
runs on `OfRows`, which turns a row into a gray image. What then does not apply to images:

- checks of a table's validation (NaN, complex, sparse, 1-D, empty, n_features_in_, feature names, array-likes) hold
  for `validate_data` in OfRows, not for Embedder, whose images are checked by `FeatureModel.embed`: its own test
- check_transformer_preserve_dtypes: not run, features are fp32 whatever the images are (tag preserves_dtype = [])
- check_array_api_input: not run, images are read on the CPU
"""

import pickle
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import estimator_checks_generator
from sklearn.utils.validation import check_is_fitted, validate_data

import upstep_fast
from upstep_fast import Embedder
from upstep_fast.errors import DataError

CPU = dict(device="cpu", precision="fp32", num_workers=0)
# of those that need no data, or are about the state of an estimator; all of them: the long test
QUICK = (
    *("check_estimator_cloneable", "check_estimator_repr", "check_no_attributes_set_in_init", "check_set_params"),
    *("check_do_not_raise_errors_in_init_or_set_params", "check_parameters_default_constructible"),
    *("check_get_params_invariance", "check_valid_tag_types", "check_estimator_tags_renamed", "check_mixin_order"),
    *("check_estimators_unfitted", "check_transformers_unfitted", "check_fit_check_is_fitted"),
    *("check_dict_unchanged", "check_dont_overwrite_parameters", "check_estimators_fit_returns_self"),
    *("check_fit_idempotent", "check_estimators_pickle", "check_methods_subset_invariance"),
)


class OfRows(Embedder):
    """Takes tables: row x becomes the gray image x^T 1, its values squashed to 0..1."""

    def fit(self, X, y=None):
        return super().fit(self._images(X, True))

    def fit_transform(self, X, y=None, **fit_params):
        return super().fit_transform(self._images(X, True))

    def transform(self, X):
        check_is_fitted(self)
        return super().transform(self._images(X, False))

    def _images(self, X, reset):
        x = 1 / (1 + np.exp(-validate_data(self, X, reset=reset, dtype=np.float64)))
        return np.broadcast_to(x[:, None, :, None], (*x.shape, x.shape[1], 1))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.no_validation = True, False
        return tags


@pytest.fixture(scope="module")
def paths(photos):
    return sorted(map(str, photos.iterdir()))


@pytest.fixture(scope="module")
def fitted(model, paths):
    return Embedder(model, **CPU).fit(paths)


@pytest.mark.parametrize("which", ["quick", pytest.param("all", marks=pytest.mark.long)])
def test_checks_of_scikit_learn(model, which):
    names = set()
    for estimator, check in estimator_checks_generator(OfRows(model, **CPU), mark=None):
        name = getattr(check, "func", check).__name__
        if (which == "all" or name in QUICK) and name != "check_array_api_input":
            names.add(name)
            check(estimator)
    assert names >= set(QUICK) and (which == "quick" or len(names) > 40)


def test_features_equal_those_of_the_python_api(model, paths, fitted):
    m = upstep_fast.load(model, device="cpu", precision="fp32").fit_whitening(paths)
    assert np.array_equal(fitted.transform(paths[:7]), m.embed(paths[:7]))
    again = clone(fitted)
    assert not hasattr(again, "feature_model_") and again.get_params() == fitted.get_params()
    np.testing.assert_allclose(again.fit_transform(paths), m.embed(paths), rtol=0, atol=1e-6)
    plain = clone(fitted).set_params(whiten=False)
    assert np.array_equal(
        plain.fit_transform(paths), upstep_fast.load(model, device="cpu", precision="fp32").embed(paths)
    )


def test_forms_of_images(model, paths, fitted):
    images = [Image.open(path).convert("RGB").resize((40, 40)) for path in paths]
    stacked = np.stack([np.asarray(image) for image in images])
    assert np.array_equal(fitted.transform(images), fitted.transform(stacked))
    for form in (np.array(paths), pd.Series(paths, index=range(100, 124)), np.array(paths, dtype=object)):
        assert np.array_equal(fitted.transform(form), fitted.transform(paths))
    with pytest.raises(DataError, match="image 0: an array of shape"):
        fitted.transform(np.zeros((3, 4)))


def test_it_is_the_head_of_a_pipeline(model, paths):
    labels = [index % 2 for index in range(len(paths))]
    pipeline = make_pipeline(Embedder(model, **CPU), LogisticRegression(C=100.0))
    assert pipeline.fit(paths, labels).predict(paths).shape == (24,)
    pipeline.set_params(embedder__whiten=False)
    assert len(cross_val_score(pipeline, paths, labels, cv=2)) == 2


def test_names_of_features(model, paths, fitted):
    names = fitted.get_feature_names_out()
    assert list(names[:2]) == ["embedder0", "embedder1"] and len(names) == fitted.transform(paths[:1]).shape[1] == 144
    table = clone(fitted).set_output(transform="pandas").fit_transform(paths)
    assert list(table.columns) == list(names)


def test_pickled_it_needs_no_model_on_disk(model, paths, fitted, monkeypatch):
    data = pickle.dumps(fitted)
    monkeypatch.setattr("upstep_fast.evaluation.feature_model.load_models", None)
    assert np.array_equal(pickle.loads(data).transform(paths), fitted.transform(paths))


def test_it_must_be_fitted(model, paths):
    with pytest.raises(NotFittedError):
        Embedder(model).transform(paths)


def test_without_scikit_learn_the_package_is_whole_but_for_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "upstep_fast.integrations.sklearn", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"upstep_fast.Embedder needs scikit-learn; pip install"):
        upstep_fast.Embedder  # noqa: B018
    assert "Embedder" in dir(upstep_fast)
    exec("from upstep_fast import *", {})
