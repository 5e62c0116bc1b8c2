"""The optimizer and its learning-rate schedule, from the config's `optimizer` section."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from wkd_jax.training.clock import Clock
from wkd_jax.types import Array


def learning_rate(config: Mapping[str, Any], clock: Clock) -> Callable[[Array], Array]:
    """The learning rate at a step.

    "step" falls by `factor` after each of `milestones`; where these are epochs it is constant within an epoch, as in
    the PyTorch recipes. "cosine" falls smoothly to `end_learning_rate` over the whole run. A warm-up rises linearly to
    the base rate during the first `warmup` epochs or steps and takes the place of the schedule there; it does not shift
    the rest. With `per_epoch` cosine and warm-up change at the beginning of an epoch alone, as timm's schedulers do.

    Raises:
      ValueError: If milestones are not increasing and inside the run, or the warm-up outlasts it.
    """
    base, milestones, warmup = config["learning_rate"], tuple(config["milestones"]), config["warmup"]
    unit, in_steps = config["unit"], config["unit"] == "steps"
    length = clock.total_steps if in_steps else clock.epochs
    if config["schedule"] == "step" and not milestones:
        raise ValueError(f"optimizer.milestones=() with schedule 'step': give the {unit} after which the rate falls")
    if config["schedule"] != "step" and milestones:
        raise ValueError(f"optimizer.milestones={milestones}: only schedule='step' uses them; remove them")
    if sorted(set(milestones)) != list(milestones) or any(not 0 < m < length for m in milestones):
        raise ValueError(f"optimizer.milestones={milestones}: need increasing {unit} between 0 and {length}")
    if warmup >= length:
        raise ValueError(f"optimizer.warmup={warmup}: must be less than the run's {length} {unit}")
    if in_steps and config["per_epoch"]:
        raise ValueError("optimizer.per_epoch=True: has a meaning with optimizer.unit='epochs' alone")
    warmup_steps = warmup if in_steps else max(clock.steps(warmup), 1)

    def schedule(step: Array) -> Array:
        epoch = clock.progress(step).epoch
        part = (epoch - 1) / clock.epochs if config["per_epoch"] else step / clock.total_steps
        if config["schedule"] == "step":
            falls = jnp.sum((step >= jnp.asarray(milestones)) if in_steps else (epoch > jnp.asarray(milestones)))
            rate = base * config["factor"] ** falls
        elif config["schedule"] == "cosine":
            end = config["end_learning_rate"]
            rate = end + (base - end) * 0.5 * (1 + jnp.cos(jnp.pi * part))
        else:
            rate = jnp.asarray(base)
        if warmup:
            start = config["warmup_learning_rate"]
            done = (epoch - 1) / warmup if config["per_epoch"] else step / warmup_steps
            rate = jnp.where(done < 1, start + (base - start) * done, rate)
        return jnp.asarray(rate, jnp.float32)

    return schedule


def build(
    config: Mapping[str, Any], schedule: Callable[[Array], Array], names: Iterable[str]
) -> optax.GradientTransformation:
    """The optimizer: clipping, weight decay, momentum or Adam, learning rate, in the order PyTorch applies them.

    SGD adds `weight_decay * parameter` to the gradient before the momentum (coupled); AdamW adds it after Adam's
    scaling (decoupled). Without `decay_rules` every parameter decays, biases and BatchNorm included, as in the
    paper's code.

    Args:
      config: The `optimizer` section.
      schedule: Step -> learning rate.
      names: Paths of all trained parameters, for the decay rules.

    Raises:
      ValueError: If a decay rule matches no parameter.
    """
    decay = [
        optax.add_decayed_weights(rate, mask=lambda params, chosen=chosen: {name: name in chosen for name in params})
        for rate, chosen in _decay_groups(config, list(names)).items()
        if rate
    ]
    parts = [optax.clip_by_global_norm(config["clip_norm"])] if config["clip_norm"] else []
    if config["name"] == "sgd":
        parts += decay
        if config["momentum"]:
            parts += [optax.trace(decay=config["momentum"], nesterov=config["nesterov"])]
        elif config["nesterov"]:
            raise ValueError("optimizer.nesterov=True with momentum=0.0: set momentum, or nesterov=False")
    else:
        parts += [optax.scale_by_adam(b1=config["b1"], b2=config["b2"], eps=config["eps"]), *decay]
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def _decay_groups(config: Mapping[str, Any], names: list[str]) -> dict[float, frozenset[str]]:
    """Weight decay -> the parameters it applies to."""
    rules = [(re.compile(pattern), factor) for pattern, factor in config["decay_rules"]]
    for pattern, _ in rules:
        if not any(pattern.search(name) for name in names):
            raise ValueError(f"optimizer.decay_rules: {pattern.pattern!r} matches no parameter, e.g. {names[:3]}")
    groups: dict[float, set[str]] = {}
    for name in names:
        factor = next((factor for pattern, factor in rules if pattern.search(name)), 1.0)
        groups.setdefault(config["weight_decay"] * factor, set()).add(name)
    return {rate: frozenset(chosen) for rate, chosen in groups.items()}
