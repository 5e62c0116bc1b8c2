"""Which kinds of class similarity find the classes that a teacher confuses, and which follow the order of images.

    JAX_PLATFORMS=cpu python -m benchmarks.bench_kinds

100 classes, each a pair of handwritten digits side by side, with noise: two classes that share a digit are alike, which
18 of the 99 others of a class do. The teacher is a perceptron of 128 and 64 hidden units on 15,000 such images; what it
confuses is measured on as many others, of other digits. For every kind of `interrelation.kind`:

  shares a digit     classes, of 100, whose most similar other class has a digit in common with it; by chance 18
  confusion          Spearman correlation, over pairs of classes, with the belief that it puts in the one on images of
                     the other
  one number         share of the variance that a_i a_j explains
  stable, rest       correlation with the matrix of the same images in another order (cka), or between two halves of
                     the images; and of what a_i a_j leaves

The last row is linear CKA with the same images on both sides, those of all classes, and class i's evidence w_i * x for
features: its closed form is (w_i^2)^T (S * S) (w_j^2), S the features' covariance. It is not part of the package, since
the squares lose the signs of the classifier.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from wkd_jax import interrelation
from wkd_jax.evaluation import structure

IMAGES, CLASSES = 15000, 100
SPECS = {
    "cka, logits": ({"kind": "cka"}, "logits"),
    "cka, pooled": ({"kind": "cka"}, "pooled"),
    "cka rbf, pooled": ({"kind": "cka", "kernel": "rbf"}, "pooled"),
    "cosine": ({"kind": "cosine"}, "pooled"),
    "cosine, centred": ({"kind": "cosine", "centred": True}, "pooled"),
    "gaussian": ({"kind": "gaussian"}, "pooled"),
    "confusion, 1": ({"kind": "confusion"}, "logits"),
    "confusion, 4": ({"kind": "confusion", "temperature": 4.0}, "logits"),
    "logit_correlation": ({"kind": "logit_correlation"}, "logits"),
}


def main() -> None:
    """Prints the table."""
    digits, rng = load_digits(), np.random.default_rng(0)
    order = rng.permutation(len(digits.target))

    def images(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left, right = rng.choice(rows, IMAGES), rng.choice(rows, IMAGES)
        pixels = np.concatenate([digits.data[left], digits.data[right]], axis=1) / 16
        return pixels + rng.normal(0, 0.25, pixels.shape), 10 * digits.target[left] + digits.target[right]

    (x, label), (unseen, truth) = images(order[:1000]), images(order[1000:])
    with warnings.catch_warnings(action="ignore"):
        teacher = MLPClassifier((128, 64), random_state=0, max_iter=25, alpha=1e-3).fit(x, label)
    belief = teacher.predict_proba(unseen)
    confused = np.stack([belief[truth == label].mean(axis=0) for label in range(CLASSES)])
    confused = confused + confused.T
    hidden = x
    for weights, bias in zip(teacher.coefs_[:-1], teacher.intercepts_[:-1], strict=True):
        hidden = np.maximum(hidden @ weights + bias, 0)
    kernel = teacher.coefs_[-1]
    samples = np.bincount(label).min()
    rows = np.stack([np.flatnonzero(label == number)[:samples] for number in range(CLASSES)])
    features = {"pooled": hidden[rows], "logits": (hidden @ kernel + teacher.intercepts_[-1])[rows]}
    sys.stdout.write(f"top-1 {100 * np.mean(belief.argmax(axis=1) == truth):.1f} %, {samples} images a class\n")
    first, second = np.divmod(np.arange(CLASSES), 10)
    same = (first[:, None] == first) | (second[:, None] == second)
    pairs = ~np.eye(CLASSES, dtype=bool)
    sys.stdout.write(f"{'':22}{'shares a digit':>15}{'confusion':>11}{'one number':>12}{'stable':>8}{'rest':>7}\n")

    def row(name: str, similarity: np.ndarray, stable: dict | None = None) -> None:
        shares = np.sum(same[np.arange(CLASSES), np.where(pairs, similarity, -np.inf).argmax(axis=1)])
        found = spearmanr(similarity[pairs], confused[pairs]).statistic
        last = f"{stable['all']:8.2f}{stable['rest']:7.2f}" if stable else ""
        sys.stdout.write(f"{name:22}{shares:15}{found:11.2f}{structure.rank_one_share(similarity):12.2f}{last}\n")

    for name, (spec, of) in SPECS.items():

        def make(x: np.ndarray, spec: dict = spec) -> np.ndarray:
            return interrelation.from_features(spec, x)

        mine = features[of].astype(np.float32)
        similarity, paired = make(mine), spec["kind"] == "cka"
        row(name, similarity, structure.stability(make, mine, similarity, samples=samples, paired=paired))
    for centred in (False, True):
        row(f"classifier{', centred' * centred}", interrelation.from_classifier(kernel, centred=centred))
    covariance, squares = np.cov(features["pooled"].reshape(-1, len(kernel)).T), kernel.T**2
    products = squares @ covariance**2 @ squares.T
    row("evidence (see above)", products / np.sqrt(np.outer(*[np.diag(products)] * 2)))


if __name__ == "__main__":
    main()
