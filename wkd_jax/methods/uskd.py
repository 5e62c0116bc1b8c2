"""USKD: self-distillation from customised soft labels, without a teacher (Yang et al., ICCV 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.methods.taps import find_tap
from wkd_jax.models.layers import Linear, mean_over_positions, widen
from wkd_jax.types import Context, Setup, Term, Terms


class USKD(nnx.Module):
    """target_weight * target term + nontarget_weight * non-target term + weak_weight * weak term.

    A linear layer on an earlier feature gives the weak logits: on the mean over positions of a map, or on the class
    token. Its loss trains the network up to there too. `task.label_weight` is 1. Defaults are those of all ImageNet
    networks; on CIFAR-100 the three weights are 0.1. Published results have `group_size` 32, the images of a GPU.

    The default tap is the one before the last, the paper's for ResNets, MobileNetV1 and Swin. It is not for two others:
    the paper takes MobileNetV2's 320-channel map before its last convolution and a ViT's class token after half of the
    blocks, which are no taps here ("stage2" and "stage3" of a ViT are after 4 and 10 of 12).
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "target_weight": 1.0,
        "nontarget_weight": 0.1,
        "weak_weight": 0.005,
        "tap": None,  # of the weak logits; None: the one before the last
        "weak_smoothing": 0.1,  # label smoothing of the weak logits' loss
        "rank_from_prob": False,  # rank by probabilities, as in the paper, instead of by their logarithms, as its code
        "group_size": 0,  # consecutive examples that share the mean in the target term; 0: the whole (micro)batch
        "schedule": schedule.DEFAULTS,  # of all three weights
    }
    NEEDS_TEACHER = False

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        checks.not_negative("uskd", config, "target_weight", "nontarget_weight", "weak_weight")
        checks.groups("uskd", config, setup.global_batch_size)
        if not 0 <= config["weak_smoothing"] < 1:
            raise ValueError(f"methods.uskd.weak_smoothing={config['weak_smoothing']}: must be from 0 to below 1")
        schedule.check("uskd", config["target_weight"], config["schedule"], setup.epochs)
        taps = list(setup.student.taps)
        self.config = config
        self.tap, tap = find_tap(setup.student, config["tap"] or taps[max(len(taps) - 2, 0)], "methods.uskd.tap")
        self.weak = Linear(tap.channels, setup.student.num_classes, rngs=rngs)
        self.class_token = tap.prefix_tokens > 0

    def terms(self, context: Context) -> Terms:
        """Terms `target`, `nontarget` and `weak`."""
        config, feature = self.config, context.student.taps[self.tap]
        if feature.ndim == 4:
            pooled = mean_over_positions(feature)
        else:
            pooled = widen(feature[:, 0]) if self.class_token else widen(feature).mean(1)
        target, nontarget, weak = losses.uskd(
            context.student.logits,
            self.weak(pooled),
            context.batch.label,
            weak_smoothing=config["weak_smoothing"],
            rank_from_prob=config["rank_from_prob"],
            group_size=config["group_size"] or None,
            where=context.batch.valid,
        )
        weight = [
            schedule.weight(config[name], config["schedule"], context.progress)
            for name in ("target_weight", "nontarget_weight", "weak_weight")
        ]
        return {
            "target": Term(target, weight[0]),
            "nontarget": Term(nontarget, weight[1]),
            "weak": Term(weak, weight[2]),
        }


REGISTER = {"uskd": USKD}
