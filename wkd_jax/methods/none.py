"""No distillation: hard labels only. The baseline, and how teachers are trained."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from wkd_jax.types import Context, Setup, Terms


class LabelsOnly(nnx.Module):
    """Adds nothing to the task's hard-label loss."""

    DEFAULTS: ClassVar[dict[str, Any]] = {}
    NEEDS_TEACHER = False

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        del config, setup, rngs

    def terms(self, context: Context) -> Terms:
        """No terms."""
        del context
        return {}


REGISTER = {"none": LabelsOnly}
