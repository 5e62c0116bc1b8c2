"""Keras 3 on JAX: WKD-L and WKD-F in keras.distillation; ground cost from the teacher's classifier."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from sklearn.datasets import load_digits

from wkd_jax import losses

digits = load_digits()
images, labels = np.float32(digits.images[..., None] / 16), np.int32(digits.target)  # [1797, 8, 8, 1], [1797]
# The teacher learns from 1297 digits, the student from the first 100 of them.
train, few, test = slice(0, 1297), slice(0, 100), slice(1297, None)


def conv_net(width):
    """Images -> logits [B, 10]; the layer "map" gives the last feature map [B, 4, 4, 2 * width]."""
    x = inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(width, 3, padding="same", activation="relu")(x)
    x = keras.layers.Conv2D(2 * width, 3, 2, padding="same", activation="relu", name="map")(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="classifier")(keras.layers.Flatten()(x)))


def fit(model, part, steps):
    """Adam in batches of 50, with the cross-entropy of the labels; returns the history."""
    model.compile(keras.optimizers.Adam(0.003), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    epochs = steps // -(-part.stop // 50)
    return model.fit(images[part], labels[part], batch_size=50, epochs=epochs, verbose=0).history


class WKDFeature(keras.distillation.DistillationLoss):
    """WKD-F between two layers; the Distiller reads their names."""

    teacher_layer_name = student_layer_name = "map"

    def __init__(self, projector):
        self.projector = projector

    def compute_loss(self, teacher_outputs, student_outputs, **kwargs):
        """The batch's mean, a scalar."""
        mean, covariance = losses.wkd_feature(self.projector(student_outputs), teacher_outputs, grid=2)
        return (2.0 * mean + covariance).mean()


class Distiller(keras.distillation.Distiller):
    """Adds WKD-L here: a DistillationLoss is given no labels (and `losses.wkd_logit_unseparated` needs none)."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The labels' loss + WKD-F, each by half as the Distiller has it, and half of WKD-L."""
        target, wasserstein = losses.wkd_logit(y_pred, self.teacher(x, training=False), y, cost)
        rest = super().compute_loss(x, y, y_pred, sample_weight, training)
        return rest + 0.5 * (target + 30.0 * wasserstein).mean()


keras.utils.set_random_seed(0)
teacher, student, projector = conv_net(32), conv_net(8), keras.layers.Conv2D(64, 1)
projector.build((None, 4, 4, 16))  # from the student's channels to the teacher's
fit(teacher, train, steps=500)
cost = losses.ground_cost(losses.cosine_similarity(teacher.get_layer("classifier").kernel.value.T), sharpness=1.0)
alone = keras.models.clone_model(student)
alone.set_weights(student.get_weights())
fit(alone, few, steps=300)

distiller = Distiller(teacher, student, [WKDFeature(projector)], [0.02], student_loss_weight=0.5)
distiller.projector = projector  # an attribute of the model is trained with it; one of a loss is not
loss = fit(distiller, few, steps=300)["loss"]
right = [
    np.mean(model.predict(images[test], verbose=0).argmax(-1) == labels[test]) for model in (teacher, alone, student)
]
print("teacher {:.1%}, student alone {:.1%}, student distilled {:.1%}".format(*right))
print(f"loss of the Distiller {np.mean(loss[:5]):.2f} -> {np.mean(loss[-5:]):.2f}")
