"""DPK-style: the teacher's map is rebuilt from the student's, part of which the teacher's tokens replace.

After Qiu et al., "Better Teacher Better Student: Dynamic Prior Knowledge for Knowledge Distillation", ICLR 2023, arXiv
2206.06067. Its code was never released. From the paper: random positions of a hybrid map come from the teacher, in a
share of 1 - CKA of the two networks' features, and a ViT-like network reconstructs the teacher's map. Chosen here:
patches so that every stage has the tokens of the teacher's last one, one learned position embedding a stage, two
pre-norm blocks of width 256, a linear layer behind them, the mean squared error over all positions, and the weight 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.methods.taps import map_of, nearest
from wkd_jax.models.connectors import spatial_size
from wkd_jax.models.layers import Conv
from wkd_jax.models.transformer import Attention, Block, linear, normal_02
from wkd_jax.types import Array, Context, ModelInfo, Setup, Tap, Term, Terms


class Reconstruction(nnx.Module):
    """Tokens of both networks' maps, mixed at random, to the teacher's map. The transformer computes in float32.

    Args:
      student: Channels of the student's map.
      teacher: Channels of the teacher's.
      grid: (height, width) of the tokens.
      patch: Positions of the teacher's map along each side of a token.
      config: The method's settings `width`, `heads` and `blocks`.
      rngs: Source of the initial values.
    """

    def __init__(
        self, student: int, teacher: int, grid: tuple[int, int], patch: int, config: Any, *, rngs: nnx.Rngs
    ) -> None:
        self.grid, self.patch = grid, patch
        width = config["width"]
        self.student_embed = Conv(student, width, patch, stride=patch, dtype=None, rngs=rngs)
        self.teacher_embed = Conv(teacher, width, patch, stride=patch, dtype=None, rngs=rngs)
        self.pos_embed = nnx.Param(normal_02(rngs.params(), (grid[0] * grid[1], width), jnp.float32))
        settings = {"dropout_rate": 0.0, "dtype": jnp.float32, "rngs": rngs}
        self.blocks = nnx.List(
            Block(Attention(width, config["heads"], **settings), width, eps=1e-6, drop_path_rate=0.0, **settings)
            for _ in range(config["blocks"])
        )
        self.head = linear(width, patch**2 * teacher, rngs=rngs)

    def __call__(self, student: Array, teacher: Array, share: Array, key: Array) -> Array:
        """The teacher's map [B, H, W, D] from [B, H, W, D'] and itself, of whose tokens each example sees a share."""
        tokens = [
            embed(x).reshape(x.shape[0], -1, self.pos_embed.shape[-1])
            for embed, x in ((self.student_embed, student), (self.teacher_embed, teacher))
        ]
        batch, count, _ = tokens[0].shape
        # The tokens with the smallest draws: as many as the share says, which is known only when the step runs.
        rank = jnp.argsort(jnp.argsort(jax.random.uniform(key, (batch, count)), axis=1), axis=1)
        prior = rank < jnp.round(share * count)
        x = jnp.where(prior[..., None], tokens[1], tokens[0]) + self.pos_embed[...]
        for block in self.blocks:
            x = block(x, train=True)
        (height, width), patch = self.grid, self.patch
        x = self.head(x).reshape(batch, height, width, patch, patch, -1)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * patch, width * patch, -1)


class DPK(nnx.Module):
    """weight * sum over stages of the mean squared error between the teacher's map and its reconstruction.

    Stages are all taps but the stem, matched in order. Where the maps' sizes differ the student's is resized to the
    teacher's (nearest). The share of the teacher's tokens is 1 - CKA of both maps over the batch, within [0, 1]. The
    label weight is 1; KD on the logits, which the paper's runs may have had, is the method `kd` beside this one.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 1.0,
        "width": 256,  # channels of the tokens
        "heads": 8,  # of the attention
        "blocks": 2,  # of the transformer: one of the encoder, one of the decoder
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        schedule.check("dpk", config["weight"], config["schedule"], setup.epochs)
        checks.positive("dpk", config, "width", "heads", "blocks")
        if config["width"] % config["heads"]:
            raise ValueError(f"methods.dpk.heads={config['heads']}: must divide width={config['width']}")
        if setup.global_batch_size < 4:
            raise ValueError(
                f"methods.dpk: CKA needs at least 4 examples, and a (micro)batch has {setup.global_batch_size}; raise "
                "global_batch_size or lower accumulation"
            )
        self.config = config
        self.image_size = setup.image_size
        self.student, self.teacher = _stages(setup.student), _stages(setup.teacher)
        if len(self.student) != len(self.teacher):
            raise ValueError(
                f"methods.dpk: {setup.student.name} has the stages {', '.join(self.student)}, and "
                f"{setup.teacher.name} {', '.join(self.teacher)}; choose networks of as many stages"
            )
        sizes = [spatial_size(tap, setup.image_size) for tap in self.teacher.values()]
        grid = sizes[-1]
        for name, size in zip(self.teacher, sizes, strict=True):
            if size[0] % grid[0] or size[1] % grid[1] or size[0] // grid[0] != size[1] // grid[1]:
                raise ValueError(
                    f"methods.dpk: {name} of {setup.teacher.name} has {size} positions at images of "
                    f"{setup.image_size}, which do not make square patches in the {grid} of its last tap; choose an "
                    "image size that the last tap's stride divides"
                )
        self.reconstructions = nnx.List(
            Reconstruction(student.channels, teacher.channels, grid, size[0] // grid[0], config, rngs=rngs)
            for student, teacher, size in zip(self.student.values(), self.teacher.values(), sizes, strict=True)
        )

    def terms(self, context: Context) -> Terms:
        """The term `reconstruction`, and each stage's share of the teacher's tokens, which is not trained on."""
        value, shares = jnp.zeros(()), {}
        names = zip(self.student, self.teacher, self.reconstructions, strict=True)
        for number, (student_name, teacher_name, reconstruction) in enumerate(names):
            student = map_of(context.student.taps[student_name], self.student[student_name], self.image_size)
            teacher = map_of(context.teacher.taps[teacher_name], self.teacher[teacher_name], self.image_size)
            similarity = losses.minibatch_cka(jax.lax.stop_gradient(student), teacher, where=context.batch.valid)
            share = 1 - jnp.clip(similarity, 0, 1)
            student, key = nearest(student, teacher.shape[1:3]), jax.random.fold_in(context.key, number)
            value = value + losses.mse(reconstruction(student, teacher, share, key), teacher)
            shares[f"share_{teacher_name}"] = Term(share, None)
        weight = schedule.weight(self.config["weight"], self.config["schedule"], context.progress)
        return {"reconstruction": Term(value, weight), **shares}


def _stages(info: ModelInfo) -> dict[str, Tap]:
    return {name: tap for name, tap in info.taps.items() if name != "stem"}


REGISTER = {"dpk": DPK}
