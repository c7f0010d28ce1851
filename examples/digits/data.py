"""The 1,797 scanned digits, and the classifier that judges drawn ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from torch import Tensor

CLASSES, SIDE = 10, 16
FEATURES = 32  # of the classifier, in which distances are taken


def load_data() -> tuple[Tensor, Tensor]:
    """The scans, 8x8 enlarged to 16x16: images (1797, 1, 16, 16) in [-1, 1] and labels (1797,)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(digits.target).long()


class Verdict(NamedTuple):
    """What the judge says of some images."""

    accuracy: float  # share in which the classifier sees the class that was asked for
    distance: float  # Frechet, to real digits
    spread: float  # of the distance, had other images been drawn: its deviation over resampled ones


class Judge:
    """A classifier fitted on half of the scans, and its features of the other half.

    The other half is split once more: `count` digits, the same number of each class, stand for what a
    perfect model would draw, and what is left is what both are compared with.
    """

    def __init__(self, count: int) -> None:
        images, labels = load_data()
        ids = np.arange(len(labels))
        fit, rest = train_test_split(ids, test_size=0.5, random_state=0, stratify=labels)
        self.classifier = MLPClassifier((64, FEATURES), alpha=0.1, tol=1e-3, random_state=0)
        self.classifier.fit(_flat(images[fit]), labels[fit])
        each = [rest[labels[rest] == k][: count // CLASSES] for k in range(CLASSES)]
        drawn = np.concatenate(each)
        self.others = self.features(images[np.setdiff1d(rest, drawn)])
        self.real = self(images[drawn], labels[drawn])

    def features(self, images: Tensor) -> np.ndarray:
        """The last hidden layer: (n, FEATURES)."""
        h = _flat(images)
        for weight, bias in list(zip(self.classifier.coefs_, self.classifier.intercepts_))[:-1]:
            h = np.maximum(h @ weight + bias, 0)
        return h

    def __call__(self, images: Tensor, labels: Tensor) -> Verdict:
        right = self.classifier.predict(_flat(images)) == labels.numpy()
        found, draw = self.features(images), np.random.default_rng(0)
        again = [
            frechet(found[draw.integers(len(found), size=len(found))], self.others) for _ in range(50)
        ]
        return Verdict(float(right.mean()), frechet(found, self.others), float(np.std(again)))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Between normal distributions with the means and covariances of two sets of features (n, F):
    |m - n|^2 + tr(S + T - 2 (S T)^(1/2)), in which S T has the eigenvalues of S^(1/2) T S^(1/2)."""
    means = a.mean(0) - b.mean(0)
    S, T = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(S)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ T @ root).clip(0)).sum()
    return float(means @ means + np.trace(S) + np.trace(T) - 2 * shared)


def _flat(images: Tensor) -> np.ndarray:
    return images.clamp(-1, 1).flatten(1).numpy()
