"""Flax Linen: WKD-L and WKD-F in a loop of TrainState and Optax; ground cost from CKA of the teacher's logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

from wkd_jax import losses

digits = load_digits()
images, labels = np.float32(digits.images[..., None] / 16), np.int32(digits.target)  # [1797, 8, 8, 1], [1797]
# The teacher learns from 1297 digits, the student from the first 100 of them.
train, few, test = slice(0, 1297), slice(0, 100), slice(1297, None)


class ConvNet(nn.Module):
    """Two convolutions and a classifier."""

    width: int

    @nn.compact
    def __call__(self, x):
        """Images [B, 8, 8, 1] -> logits [B, 10], feature map [B, 4, 4, 2 * width]."""
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        x = nn.relu(nn.Conv(2 * self.width, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1)), x


def fit(model, params, loss_fn, part, steps):
    """Minimises loss_fn(params, apply, images, labels) -> (loss, value to log); returns the params and the values."""
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(0.003))

    @jax.jit
    def step(state, x, y):
        gradients, value = jax.grad(loss_fn, has_aux=True)(state.params, state.apply_fn, x, y)
        return state.apply_gradients(grads=gradients), value

    rng, values = np.random.default_rng(0), []
    for _ in range(steps):
        rows = rng.choice(part.stop, 50, replace=False)
        state, value = step(state, images[rows], labels[rows])
        values.append(value)
    return state.params, np.array(values)


def label_loss(params, apply, x, y):
    """Cross-entropy with the labels."""
    value = losses.cross_entropy(apply(params, x)[0], y).mean()
    return value, value


def distillation_loss(params, apply, x, y):
    """The labels' loss + WKD-L + WKD-F, with the weights of the paper's ImageNet setting."""
    student_logits, student_map = apply(params["student"], x)
    teacher_logits, teacher_map = teacher.apply(teacher_params, x)
    target, wasserstein = losses.wkd_logit(student_logits, teacher_logits, y, cost)  # [B], [B]
    mean, covariance = losses.wkd_feature(projector.apply(params["projector"], student_map), teacher_map, grid=2)
    wkd = (target + 30.0 * wasserstein + 0.02 * (2.0 * mean + covariance)).mean()
    return losses.cross_entropy(student_logits, y).mean() + wkd, wkd


teacher, student, projector = ConvNet(32), ConvNet(8), nn.Conv(64, (1, 1))  # the projector: from 16 to 64 channels
teacher_params, _ = fit(teacher, jax.jit(teacher.init)(jax.random.key(0), images[:1]), label_loss, train, steps=500)
logits, _ = jax.jit(teacher.apply)(teacher_params, images[train])
by_class = jnp.stack([logits[labels[train] == digit][:100] for digit in range(10)])  # [C, N, D]
cost = losses.ground_cost(losses.cka(by_class), sharpness=1.0)  # [C, C]

start = jax.jit(student.init)(jax.random.key(1), images[:1])
alone, _ = fit(student, start, label_loss, few, steps=300)
both = {"student": start, "projector": projector.init(jax.random.key(2), jnp.zeros((1, 4, 4, 16)))}
distilled, wkd = fit(student, both, distillation_loss, few, steps=300)

nets = ((teacher, teacher_params), (student, alone), (student, distilled["student"]))
right = [np.mean(model.apply(params, images[test])[0].argmax(-1) == labels[test]) for model, params in nets]
print("teacher {:.1%}, student alone {:.1%}, student distilled {:.1%}".format(*right))
print(f"distillation loss {wkd[:10].mean():.2f} -> {wkd[-10:].mean():.2f}")
