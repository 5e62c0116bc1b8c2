"""Equinox: WKD-L and WKD-F in a loop of filtered transformations; ground cost from the teacher's classifier."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from wkd_jax import losses

digits = load_digits()
images, labels = np.float32(digits.images[:, None] / 16), np.int32(digits.target)  # [1797, 1, 8, 8], [1797]
# The teacher learns from 1297 digits, the student from the first 100 of them.
train, few, test = slice(0, 1297), slice(0, 100), slice(1297, None)


class ConvNet(eqx.Module):
    """Two convolutions and a classifier."""

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    classifier: eqx.nn.Linear

    def __init__(self, width, *, key):
        keys = jax.random.split(key, 3)
        self.conv1 = eqx.nn.Conv2d(1, width, 3, padding=1, key=keys[0])
        self.conv2 = eqx.nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, key=keys[1])
        self.classifier = eqx.nn.Linear(16 * 2 * width, 10, key=keys[2])

    def __call__(self, x):
        """Images [B, 1, 8, 8] -> logits [B, 10], feature map [B, 4, 4, 2 * width]: channels last, as losses have it."""
        x = jax.nn.relu(jax.vmap(self.conv2)(jax.nn.relu(jax.vmap(self.conv1)(x))))
        return jax.vmap(self.classifier)(x.reshape(len(x), -1)), jnp.moveaxis(x, 1, -1)


def fit(model, loss_fn, part, steps):
    """Minimises loss_fn(model, images, labels) -> (loss, value to log); returns the model and the values."""
    optimizer = optax.adam(0.003)

    @eqx.filter_jit
    def step(model, state, x, y):
        (_, value), gradients = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, x, y)
        updates, state = optimizer.update(gradients, state)
        return eqx.apply_updates(model, updates), state, value

    state, rng, values = optimizer.init(eqx.filter(model, eqx.is_array)), np.random.default_rng(0), []
    for _ in range(steps):
        rows = rng.choice(part.stop, 50, replace=False)
        model, state, value = step(model, state, images[rows], labels[rows])
        values.append(value)
    return model, np.array(values)


def label_loss(model, x, y):
    """Cross-entropy with the labels."""
    value = losses.cross_entropy(model(x)[0], y).mean()
    return value, value


def distillation_loss(model, x, y):
    """The labels' loss + WKD-L + WKD-F, with the weights of the paper's ImageNet setting."""
    (student_logits, student_map), (teacher_logits, teacher_map) = model[0](x), teacher(x)
    target, wasserstein = losses.wkd_logit(student_logits, teacher_logits, y, cost)  # [B], [B]
    mean, covariance = losses.wkd_feature(student_map @ model[1], teacher_map, grid=2)  # [B], [B]
    wkd = (target + 30.0 * wasserstein + 0.02 * (2.0 * mean + covariance)).mean()
    return losses.cross_entropy(student_logits, y).mean() + wkd, wkd


student = ConvNet(8, key=jax.random.key(1))
projector = jax.random.normal(jax.random.key(2), (16, 64)) / 4  # a 1 x 1 convolution, from 16 channels to 64
teacher, _ = fit(ConvNet(32, key=jax.random.key(0)), label_loss, train, steps=500)
cost = losses.ground_cost(losses.cosine_similarity(teacher.classifier.weight), sharpness=1.0)  # [C, C]
alone, _ = fit(student, label_loss, few, steps=300)
(distilled, _), wkd = fit((student, projector), distillation_loss, few, steps=300)
right = [np.mean(model(images[test])[0].argmax(-1) == labels[test]) for model in (teacher, alone, distilled)]
print("teacher {:.1%}, student alone {:.1%}, student distilled {:.1%}".format(*right))
print(f"distillation loss {wkd[:10].mean():.2f} -> {wkd[-10:].mean():.2f}")
