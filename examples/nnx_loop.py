"""Flax NNX: WKD-L and WKD-F in a loop of nnx.Optimizer; ground cost from the teacher's classifier."""

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from wkd_jax import losses

digits = load_digits()
images, labels = np.float32(digits.images[..., None] / 16), np.int32(digits.target)  # [1797, 8, 8, 1], [1797]
# The teacher learns from 1297 digits, the student from the first 100 of them.
train, few, test = slice(0, 1297), slice(0, 100), slice(1297, None)


class ConvNet(nnx.Module):
    """Two convolutions and a classifier."""

    def __init__(self, width, *, rngs):
        self.conv1 = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(width, 2 * width, (3, 3), strides=2, rngs=rngs)
        self.classifier = nnx.Linear(16 * 2 * width, 10, rngs=rngs)

    def __call__(self, x):
        """Images [B, 8, 8, 1] -> logits [B, 10], feature map [B, 4, 4, 2 * width]."""
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.classifier(x.reshape(len(x), -1)), x


def fit(model, loss_fn, part, steps):
    """Minimises loss_fn(model, images, labels) -> (loss, value to log); returns the values."""
    optimizer = nnx.Optimizer(model, optax.adam(0.003), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        (_, value), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model, x, y)
        optimizer.update(model, gradients)
        return value

    rng, values = np.random.default_rng(0), []
    for _ in range(steps):
        rows = rng.choice(part.stop, 50, replace=False)
        values.append(step(model, optimizer, images[rows], labels[rows]))
    return np.array(values)


def label_loss(model, x, y):
    """Cross-entropy with the labels."""
    value = losses.cross_entropy(model(x)[0], y).mean()
    return value, value


def distillation_loss(model, x, y):
    """The labels' loss + WKD-L + WKD-F, with the weights of the paper's ImageNet setting."""
    student_logits, student_map = model["student"](x)
    teacher_logits, teacher_map = teacher(x)
    target, wasserstein = losses.wkd_logit(student_logits, teacher_logits, y, cost)  # [B], [B]
    mean, covariance = losses.wkd_feature(model["projector"](student_map), teacher_map, grid=2)  # [B], [B]
    wkd = (target + 30.0 * wasserstein + 0.02 * (2.0 * mean + covariance)).mean()
    return losses.cross_entropy(student_logits, y).mean() + wkd, wkd


teacher, alone, student = (ConvNet(width, rngs=nnx.Rngs(seed)) for width, seed in ((32, 0), (8, 1), (8, 1)))
projector = nnx.Conv(16, 64, (1, 1), rngs=nnx.Rngs(2))  # from the student's channels to the teacher's

fit(teacher, label_loss, train, steps=500)
cost = losses.ground_cost(losses.cosine_similarity(teacher.classifier.kernel[...].T), sharpness=1.0)  # [C, C]
fit(alone, label_loss, few, steps=300)
wkd = fit(nnx.Dict(student=student, projector=projector), distillation_loss, few, steps=300)

right = [np.mean(model(images[test])[0].argmax(-1) == labels[test]) for model in (teacher, alone, student)]
print("teacher {:.1%}, student alone {:.1%}, student distilled {:.1%}".format(*right))
print(f"distillation loss {wkd[:10].mean():.2f} -> {wkd[-10:].mean():.2f}")
