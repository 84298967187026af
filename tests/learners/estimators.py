"""Estimators for the tests of the bridges to other libraries."""

import threading

import numpy as np
import threadpoolctl
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

FITS = []
"""(random state, jobs, rows, thread, threads of the libraries) of each fit of ``Recorder``."""


def _with_ones(x):
    return np.hstack([x, np.ones((len(x), 1))])


def ridge_with_constant(alpha=1.0):
    """Return ridge regression that shrinks the intercept, too."""
    return make_pipeline(FunctionTransformer(_with_ones), Ridge(alpha, fit_intercept=False))


def logistic_with_constant(strength=1.0):
    """Return logistic regression that shrinks the intercept, too."""
    model = LogisticRegression(C=1 / strength, fit_intercept=False, tol=1e-10, solver="newton-cg")
    return make_pipeline(FunctionTransformer(_with_ones), model)


class Recorder:
    """Predicts the mean, and records its fits."""

    def __init__(self, random_state=None, n_jobs=None):
        self.random_state, self.n_jobs = random_state, n_jobs

    def fit(self, x, y):
        threads = {pool["num_threads"] for pool in threadpoolctl.threadpool_info()}
        FITS.append((self.random_state, self.n_jobs, len(x), threading.current_thread().name, threads))
        self.mean = y.mean()
        return self

    def predict(self, x):
        return np.full(len(x), self.mean)


class Infinite(Recorder):
    """Predicts infinity."""

    def predict(self, x):
        return np.full(len(x), np.inf)


class Unable:
    """Has nothing to predict with."""

    def fit(self, x, y):
        return self


class HalfSure:
    """Knows the classes of its rows, and has no probabilities."""

    def fit(self, x, y):
        self.label = y[-1]
        return self

    def predict(self, x):
        return np.full(len(x), self.label)


CONSTANT = 3.0


class RecordedShares(Recorder):
    """Predicts the shares of the classes, and records its fits."""

    def fit(self, x, y):
        self.classes_, counts = np.unique(y, return_counts=True)
        self.shares = counts / len(y)
        return super().fit(x, y)

    def predict_proba(self, x):
        return np.tile(self.shares, (len(x), 1))
