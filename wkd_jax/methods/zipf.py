"""Zipf's label smoothing: soft labels from the ranks of a network's own votes (Liang et al., ECCV 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.methods.taps import find_tap, map_of
from wkd_jax.models import functional
from wkd_jax.models.layers import Linear, widen
from wkd_jax.types import Array, Context, ModelInfo, Setup, Term, Terms


class Zipf(nnx.Module):
    """weight * KL(Zipf's law over the ranks of the non-target classes || student over these classes).

    Form "dense": the classifier is applied at every position of the last map, and each position votes for its first
    class; classes are ranked by votes. It needs a network whose classifier sees the mean over a map. Form "last_layer":
    classes are ranked by the student's logits. Either way ranks are constants. `task.label_weight` is 1.

    Defaults are those of ImageNet. The authors' two versions differ on CIFAR: PyTorch doubles the last map
    (`upsample`); MegEngine has a second, linear head on the map before (`auxiliary_tap` "stage3" of a ResNet-18, and no
    doubling), whose positions vote too and which learns the labels with `auxiliary_weight` 0.1 (Tiny-ImageNet 0.5).
    Weight 1 on Tiny-ImageNet and iNaturalist. Mixed labels count as their largest entry, but for the auxiliary head.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 0.1,
        "form": "dense",  # or last_layer
        "power": 1.0,  # of the rank
        "upsample": False,  # dense: maps are first interpolated to twice as many positions along each side
        "auxiliary_tap": None,  # dense: a map with a head of its own, whose positions vote too
        "auxiliary_weight": 0.1,  # of that head's cross-entropy with the labels
        "schedule": schedule.DEFAULTS,  # of `weight`
    }
    NEEDS_TEACHER = False

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        checks.one_of("zipf", config, "form", ("dense", "last_layer"))
        checks.not_negative("zipf", config, "power", "auxiliary_weight")
        schedule.check("zipf", config["weight"], config["schedule"], setup.epochs)
        student, dense = setup.student, config["form"] == "dense"
        if dense and not student.mean_pooled:
            raise ValueError(
                f"methods.zipf.form='dense': needs a student whose classifier sees the mean over a map, and "
                f"{student.name}'s does not; set it to 'last_layer'"
            )
        for key in ("upsample", "auxiliary_tap"):
            if config[key] and not dense:
                raise ValueError(f"methods.zipf.{key}={config[key]}: only form 'dense' has votes; leave it out")
        self.config, self.student, self.image_size = config, student, setup.image_size
        self.tap: str | None = None
        if config["auxiliary_tap"]:
            self.tap, tap = find_tap(student, config["auxiliary_tap"], "methods.zipf.auxiliary_tap")
            self.head = Linear(tap.channels, student.num_classes, rngs=rngs)

    def terms(self, context: Context) -> Terms:
        """The term `kl`, and `auxiliary` where there is such a head."""
        config, logits = self.config, context.student.logits
        auxiliary = None
        votes = logits
        if config["form"] == "dense":
            kernel, bias = classifier(context.student_model(), self.student)
            votes = self._votes(context.student.positions, kernel, bias)
        if self.tap:
            feature = map_of(context.student.taps[self.tap], self.student.taps[self.tap], self.image_size)
            votes += self._votes(feature, self.head.kernel[...], self.head.bias[...])
            auxiliary = losses.cross_entropy(self.head(widen(feature).mean((1, 2))), context.batch.label)
        value = losses.zipf(logits, votes, context.labels, power=config["power"])
        weight = schedule.weight(config["weight"], config["schedule"], context.progress)
        terms = {"kl": Term(value, weight, where=context.student.valid)}
        if auxiliary is not None:
            terms["auxiliary"] = Term(auxiliary, config["auxiliary_weight"])
        return terms

    def _votes(self, feature: Array, kernel: Array, bias: Array) -> Array:
        """Votes [B, C] of the positions of a map."""
        feature = widen(jax.lax.stop_gradient(feature))
        if self.config["upsample"]:
            batch, height, width, channels = feature.shape
            feature = jax.image.resize(feature, (batch, 2 * height, 2 * width, channels), "bilinear")
        return losses.zipf_votes(feature @ kernel + bias)


def classifier(model: nnx.Module, info: ModelInfo) -> tuple[Array, Array]:
    """Kernel [D, C] and bias [C] of a network's classifier."""
    name = info.classifier
    return functional.value(model, name), functional.value(model, name.removesuffix("kernel") + "bias")


REGISTER = {"zipf": Zipf}
