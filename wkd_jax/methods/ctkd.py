"""CTKD: a temperature that learns to make distillation harder, little by little (Li et al., AAAI 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.models.layers import Linear
from wkd_jax.types import Array, Context, Setup, Term, Terms


class CTKD(nnx.Module):
    """weight * KD, or weight * (alpha * target + beta * non-target) of DKD, at a temperature that is learned.

    T = 1 + 20 sigmoid(g), with the gradient that reaches g multiplied by a factor that goes from 0 to -1 over
    `curriculum_epochs`, along a cosine of the 1-based epoch. Everything else sees its gradient as it is. g is trained
    with the student, by the same rule and with the same weight decay, which pulls T towards 11: let no decay rule leave
    "methods/ctkd/" out. There is one g for all devices; in the released code each process has its own.

    The defaults are those of the released code for ImageNet, ResNet-34 -> ResNet-18, 120 epochs, label weight 1. With
    DKD it uses alpha = beta = 1 there, and no warm-up. CIFAR-100: weight 0.9, label weight 0.1, 10 curriculum epochs.

    With `form` "global", g is one number, 1 in the beginning. With "instance", each example has its own, from a network
    that is not public: two linear layers with a ReLU between them, the concatenated logits of student and teacher
    without gradient as input, torch's initial values. This network is our choice, its results are no reference.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 1.0,
        "form": "global",  # or instance
        "hidden": 0,  # instance: units of the hidden layer; 0: the number of classes
        "loss": "kd",  # or dkd
        "alpha": 1.0,  # dkd: of the target class's divergence
        "beta": 1.0,  # dkd: of the non-target classes'
        "curriculum_epochs": 5,  # until the gradient is reversed in full
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        checks.one_of("ctkd", config, "form", ("global", "instance"))
        checks.one_of("ctkd", config, "loss", ("kd", "dkd"))
        checks.not_negative("ctkd", config, "hidden", "alpha", "beta")
        checks.positive("ctkd", config, "curriculum_epochs")
        schedule.check("ctkd", config["weight"], config["schedule"], setup.epochs)
        self.config = config
        if config["form"] == "global":
            self.parameter = nnx.Param(jnp.ones((), jnp.float32))
        else:
            classes = setup.student.num_classes
            hidden = config["hidden"] or classes
            self.hidden = Linear(2 * classes, hidden, rngs=rngs)
            self.output = Linear(hidden, 1, rngs=rngs)

    def terms(self, context: Context) -> Terms:
        """The term `kl`, or with DKD `target` and `nontarget`; and `temperature`, which is only logged."""
        config, where = self.config, context.student.valid
        student, teacher = context.student.logits, context.teacher.logits
        done = jnp.minimum(context.progress.epoch / config["curriculum_epochs"], 1)
        reversal = 0.5 * (jnp.cos(jnp.pi * done) - 1)
        if config["form"] == "global":
            temperature = losses.ctkd_temperature(self.parameter[...], reversal)
        else:
            temperature = losses.ctkd_temperature(self._each(student, teacher), reversal)
        weight = schedule.weight(config["weight"], config["schedule"], context.progress)
        logged = {"temperature": Term(temperature, None, where if temperature.ndim else None)}
        if config["loss"] == "dkd":
            target, nontarget = losses.dkd(student, teacher, context.labels, temperature=temperature)
            alpha, beta = weight * config["alpha"], weight * config["beta"]
            return {"target": Term(target, alpha, where), "nontarget": Term(nontarget, beta, where), **logged}
        loss = losses.kd if config["form"] == "global" else losses.ctkd_instance
        return {"kl": Term(loss(student, teacher, temperature=temperature), weight, where), **logged}

    def _each(self, student: Array, teacher: Array) -> Array:
        """The parameter g of each example, [...], from its logits [..., C]."""
        logits = jnp.concatenate([student, teacher], axis=-1).astype(jnp.float32)
        return self.output(jax.nn.relu(self.hidden(jax.lax.stop_gradient(logits))))[..., 0]


REGISTER = {"ctkd": CTKD}
