"""Faster R-CNN with a feature pyramid: faster_rcnn_r18, _r50, _r101 and _mobilenetv2.

Ren, He, Girshick, Sun, arXiv 1506.01497; Lin et al., arXiv 1612.03144. Shapes are static throughout: proposals, samples
and detections are fixed numbers of slots with a mask. Boxes are xyxy in pixels of the canvas, float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wkd_jax import registry
from wkd_jax.models.base import KeyStyle, Network, factories
from wkd_jax.models.detection import key_styles, proposals
from wkd_jax.models.detection.anchors import RATIOS, pyramid_anchors
from wkd_jax.models.detection.boxes import clip_boxes, decode_boxes
from wkd_jax.models.detection.heads import BoxHead, FeaturePyramid, ProposalHead
from wkd_jax.models.detection.nms import Detections, final_detections
from wkd_jax.models.detection.parallel import over_images
from wkd_jax.models.detection.roi_align import assign_levels, roi_align_einsum, roi_align_gather
from wkd_jax.models.detection.trunks import STRIDES, MobileNetV2Trunk, ResNetTrunk
from wkd_jax.types import Array, ModelInfo, Outputs, Tap

LEVELS = ("p2", "p3", "p4", "p5", "p6")
POOLED = LEVELS[:4]  # regions are pooled from these
REGION_SIZE = 7  # side of a pooled region before the box head, positions
ROI_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@dataclasses.dataclass(frozen=True)
class Preset:
    """What two code bases do differently.

    Attributes:
      anchors: Rounding of the anchors, their strides, and the level rule of regions: "d2" or "tv".
      early_stride: Whether bottlenecks have their stride in the first 1 x 1 convolution.
      post_nms: Proposals kept, in training and in inference.
      min_side: Pixels that the sides of a proposal, and of a box before the suppression of detections, must reach. In
        the end both have sides above 0 in any case.
      aligned: Whether regions are shifted by half a position before pooling.
      sampling_ratio: Samples a bin and axis in pooling; 0: as many as it covers positions.
    """

    anchors: Literal["d2", "tv"] = "d2"
    early_stride: bool = True
    post_nms: tuple[int, int] = (1000, 1000)
    min_side: tuple[float, float] = (0.0, 0.0)
    aligned: bool = True
    sampling_ratio: int = 0


PRESETS = {
    "d2": Preset(),
    "tv": Preset("tv", False, (2000, 1000), (1e-3, 1e-2), False, 2),
}
TRUNKS = {
    "faster_rcnn_r18": "resnet18",
    "faster_rcnn_r50": "resnet50",
    "faster_rcnn_r101": "resnet101",
    "faster_rcnn_mobilenetv2": "mobilenetv2",
}


class FasterRCNN(Network):
    """A detector of `TRUNKS` for canvases [B, H, W, 3] whose sides are multiples of 32; a `wkd_jax.types.Model`.

    In training it proposes regions, samples some of them with the ground truth among them, and classifies those:
    `logits` [B, R, C] has a row a region, `valid` says which count. Given `regions` it classifies these and does not
    propose any: how a teacher sees what its student sampled. Otherwise it detects.

    Taps: "p2" to "p6", the pyramid; "roi", pooled regions [B, R, S, S, D], where `roi_tap` asks for them. `pooled` is
    the classifier's input. The background is the last class. Normalisation layers of the trunk are fixed.

    `Outputs.extra` holds "deltas" [B, R, C - 1, 4] and "regions" [B, R, 4]; in training "labels" [B, R] int32,
    "targets" (`proposals.Targets` of the regions), "anchors" (`Targets` of the sampled anchors), and of these
    "objectness" [B, A'] and "anchor_deltas" [B, A', 4]; in detection "detections" (`Detections`).

    Args:
      name: Key of `TRUNKS`.
      num_classes: C, the background included.
      preset: "d2", the networks of detectron2 and of the published distillation results, or "tv", torchvision's.
      features: Channels of the pyramid.
      hidden: Width of the box head.
      anchor_sizes: Side of the square anchor of each level, pixels.
      pre_nms: Candidates a level, in training and in inference.
      post_nms: Proposals an image, likewise; None: the preset's.
      anchor_samples: Sampled anchors an image.
      region_samples: Sampled regions an image.
      detections: Slots of detections an image.
      candidates: Pairs (region, class) that enter the suppression of detections, the best ones; 0: all, which is exact
        where `Detections.overflow` says that it may matter, and slower.
      ignore_padding: Leave anchors beyond the image (rounded up to 32) out, of training and of the proposals.
      freeze_at: Parts of the trunk that are not trained, see `trunks`.
      norm_eps: Of the trunk's normalisation; torchvision's published weights need 0.
      pooling: Of regions that are sampled or given: "gather", two samples a bin and axis, or "einsum", the preset's
        number of samples, exactly. Detection always has the latter.
      roi_tap: Side of the pooled regions in the tap "roi", positions; 0: there is none.
      dtype: Compute dtype of the convolutions; boxes and losses are float32.
      rngs: Source of the initial values.

    Raises:
      ValueError: If a setting is out of range.
    """

    IMAGE_SIZE: ClassVar[tuple[int, int]] = (800, 1344)
    KEY_STYLES: ClassVar[Mapping[str, KeyStyle]] = key_styles.KEY_STYLES

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        preset: Literal["d2", "tv"] = "d2",
        features: int = 256,
        hidden: int = 1024,
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        pre_nms: tuple[int, int] = (2000, 1000),
        post_nms: tuple[int, int] | None = None,
        anchor_samples: int = 256,
        region_samples: int = 512,
        detections: int = 100,
        candidates: int = 4096,
        ignore_padding: bool = True,
        freeze_at: int = 2,
        norm_eps: float = 1e-5,
        pooling: Literal["gather", "einsum"] = "gather",
        roi_tap: int = 0,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if name not in TRUNKS:
            raise ValueError(registry.unknown("detector", name, TRUNKS))
        for key, value, valid in (("preset", preset, PRESETS), ("pooling", pooling, ("gather", "einsum"))):
            if value not in valid:
                raise ValueError(f"{key}: {registry.unknown('value', value, valid)}")
        if len(anchor_sizes) != len(LEVELS):
            raise ValueError(f"anchor_sizes={tuple(anchor_sizes)}: needs one for each of {', '.join(LEVELS)}")
        self.name, self.num_classes, self.dtype = name, num_classes, dtype
        self.trunk_of, self.norm_eps = TRUNKS[name], norm_eps
        self.preset = PRESETS[preset]
        self.features, self.hidden, self.roi_tap = features, hidden, roi_tap
        self.anchor_sizes, self.pre_nms, self.post_nms = anchor_sizes, pre_nms, post_nms or self.preset.post_nms
        self.anchor_samples, self.region_samples, self.detections = anchor_samples, region_samples, detections
        self.candidates, self.ignore_padding, self.pooling = candidates, ignore_padding, pooling
        self.remat = False
        settings: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        trunk: dict[str, Any] = {"freeze_at": freeze_at, "norm_eps": norm_eps, **settings}
        if TRUNKS[name] == "mobilenetv2":
            self.trunk: MobileNetV2Trunk | ResNetTrunk = MobileNetV2Trunk(**trunk)
        else:
            self.trunk = ResNetTrunk(TRUNKS[name], early_stride=self.preset.early_stride, **trunk)
        self.fpn = FeaturePyramid(self.trunk.channels, features, **settings)
        self.rpn = ProposalHead(features, len(RATIOS), **settings)
        self.box_head = BoxHead(features, REGION_SIZE, hidden, num_classes, **settings)

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        taps = {
            level: Tap(self.features, stride, signed=True) for level, stride in zip(LEVELS, (*STRIDES, 64), strict=True)
        }
        if self.roi_tap:
            taps["roi"] = Tap(self.features, 1, signed=True, size=(self.roi_tap, self.roi_tap))
        return ModelInfo(
            name=self.name,
            num_classes=self.num_classes,
            taps=taps,
            pooled=self.hidden,
            classifier="box_head/cls_score/kernel",
            task="detection",
        )

    @property
    def by_class(self) -> tuple[str, ...]:
        """See `Network`; box deltas are by class too."""
        return *super().by_class, "box_head/bbox_pred/kernel", "box_head/bbox_pred/bias"

    def remarks(self, style: str, trunk: str, described: Mapping[str, Any]) -> list[str]:
        """See `Network`: another preset, or of a trunk alone, bottlenecks whose stride is elsewhere."""
        by_style = "d2" if style == "detectron2" else "tv" if style.startswith("torchvision") else ""
        # Image classifiers have their stride where torchvision's detectors have it.
        preset = "tv" if trunk == self.trunk_of else described.get("preset", by_style)
        if not preset or self.preset == PRESETS[preset]:
            return []
        if not trunk:
            return [f"its network has preset={preset!r}, and this one another: they compute different things"]
        if self.trunk.early_stride in (None, PRESETS[preset].early_stride):
            return []
        first, second = ("1 x 1", "3 x 3") if PRESETS[preset].early_stride else ("3 x 3", "1 x 1")
        return [
            f"its bottlenecks had their stride in the {first} convolution, and this network has it in the {second}: a "
            f"start for training; with preset={preset!r} they compute what they were trained to"
        ]

    def __call__(
        self,
        image: Array,
        *,
        train: bool,
        rngs: nnx.Rngs | None = None,
        size: Array | None = None,
        boxes: Array | None = None,
        labels: Array | None = None,
        box_valid: Array | None = None,
        regions: Array | None = None,
        region_valid: Array | None = None,
    ) -> Outputs:
        """Runs the detector on normalised canvases.

        Args:
          image: [B, H, W, 3], any float dtype.
          train: Whether to sample regions for training.
          rngs: Source of the samples, in training.
          size: [B, 2], (height, width) of the images without padding, pixels; None: the canvas's.
          boxes: [B, M, 4] xyxy, ground truth, in training.
          labels: [B, M] int32, their classes, in training.
          box_valid: [B, M] bool, in training.
          regions: [B, R, 4] xyxy: regions to classify instead.
          region_valid: [B, R] bool; None: all count.
        """
        levels = self.pyramid(image, train=train)
        if regions is not None:
            return self.forward_from("pyramid", levels, train=train, regions=regions, region_valid=region_valid)
        size = jnp.broadcast_to(jnp.array(image.shape[1:3]), (len(image), 2)) if size is None else size
        logits, deltas = self.rpn([levels[name] for name in LEVELS])
        grid = self.anchors(image.shape[1:3])
        propose = functools.partial(
            proposals.propose,
            anchors=grid,
            pre_nms=self.pre_nms[not train],
            post_nms=self.post_nms[not train],
            min_side=self.preset.min_side[0],
            ignore_padding=self.ignore_padding,
        )
        proposed = over_images(lambda logits, deltas, size: propose(logits, deltas, size=size))(logits, deltas, size)
        if not train:
            regions, region_valid = proposed
            outputs = self.forward_from(
                "pyramid", levels, train=False, regions=regions, region_valid=region_valid, exact=True
            )
            return dataclasses.replace(outputs, extra={**outputs.extra, "detections": self._detect(outputs, size)})
        if rngs is None or boxes is None or labels is None or box_valid is None:
            raise ValueError(f"{self.name}: training needs rngs, boxes, labels and box_valid, or regions")
        of_anchors, of_regions = (jax.random.split(rngs.sampling(), len(image)) for _ in range(2))

        def targets_of_anchors(boxes: Array, box_valid: Array, size: Array, key: Array) -> proposals.Targets:
            every = np.concatenate(grid)
            settings = {"count": self.anchor_samples, "ignore_padding": self.ignore_padding}
            priorities = jax.random.uniform(key, (len(every),))
            return proposals.anchor_targets(every, boxes, box_valid, size, priorities, **settings)

        def targets_of_regions(proposed: Any, boxes: Array, box_valid: Array, key: Array) -> Any:
            priorities = jax.random.uniform(key, (len(proposed[0]) + len(boxes),))
            settings = {"count": self.region_samples, "weights": ROI_WEIGHTS}
            return proposals.region_targets(*proposed, boxes, box_valid, priorities, **settings)

        anchor_targets = over_images(targets_of_anchors)(boxes, box_valid, size, of_anchors)
        regions, targets = over_images(targets_of_regions)(proposed, boxes, box_valid, of_regions)
        outputs = self.forward_from("pyramid", levels, train=True, regions=regions, region_valid=targets.valid)
        background = self.num_classes - 1
        extra = {
            "anchors": anchor_targets,
            "objectness": _rows(jnp.concatenate(logits, axis=1), anchor_targets.indices),
            "anchor_deltas": _rows(jnp.concatenate(deltas, axis=1), anchor_targets.indices),
            "targets": targets,
            "labels": jnp.where(targets.positive, _rows(labels, targets.matches), background).astype(jnp.int32),
        }
        return dataclasses.replace(outputs, extra=outputs.extra | extra)

    def anchors(self, canvas: tuple[int, int]) -> list[np.ndarray]:
        """Anchors of each level of a canvas (height, width), see `pyramid_anchors`."""
        return pyramid_anchors(canvas, sizes=self.anchor_sizes, preset=self.preset.anchors)

    def pyramid(self, image: Array, *, train: bool) -> dict[str, Array]:
        """The levels "p2" to "p6" [B, H / stride, W / stride, D] of [B, H, W, 3] normalised canvases.

        Raises:
          ValueError: If a side of the canvas is not a multiple of 32.
        """
        if any(side % 32 for side in image.shape[1:3]):
            raise ValueError(f"{self.name}: the sides of a canvas must be multiples of 32, got {image.shape[1:3]}")

        return self.fpn(self.trunk(image.astype(self.dtype), remat=self.remat and train))

    def pool(self, levels: Mapping[str, Array], regions: Array, side: int, *, exact: bool = False) -> Array:
        """Regions of a pyramid as maps of one size (RoIAlign; He et al., "Mask R-CNN", arXiv 1703.06870).

        Args:
          levels: "p2" to "p5", [B, H, W, D].
          regions: [B, R, 4] xyxy, constants.
          side: S, positions.
          exact: Whether to pool as in detection, whatever `pooling` is.

        Returns:
          [B, R, S, S, D], dtype of the levels.
        """
        preset = self.preset

        def of_image(maps: Sequence[Array], regions: Array) -> Array:
            level = assign_levels(regions, preset=preset.anchors)
            settings = {"output_size": side, "aligned": preset.aligned}
            if self.pooling == "gather" and not exact:
                return roi_align_gather(maps, regions, level, **settings)
            return roi_align_einsum(maps, regions, level, sampling_ratio=preset.sampling_ratio, **settings)

        return over_images(of_image)([levels[name] for name in POOLED], regions)

    def forward_from(
        self,
        tap: str,
        x: Any,
        *,
        train: bool,
        rngs: nnx.Rngs | None = None,
        regions: Array | None = None,
        region_valid: Array | None = None,
        exact: bool = False,
    ) -> Outputs:
        """Continues from "pyramid", a dict of the levels, or from "regions", pooled [B, R, 7, 7, D].

        Args:
          tap: One of the two.
          x: What it names.
          train: Not used: what follows is the same in training.
          rngs: Not used.
          regions: [B, R, 4] xyxy, for "pyramid".
          region_valid: [B, R] bool; None: all count.
          exact: Whether regions are pooled as in detection, see `pool`.

        Raises:
          ValueError: If there is no such tap.
        """
        del train, rngs
        taps: dict[str, Array] = {}
        if tap == "pyramid":
            taps = dict(x)
            if self.roi_tap:
                taps["roi"] = self.pool(x, regions, self.roi_tap, exact=exact)
            x = taps["roi"] if self.roi_tap == REGION_SIZE else self.pool(x, regions, REGION_SIZE, exact=exact)
        elif tap != "regions":
            raise ValueError(registry.unknown(f"tap of {self.name}", tap, ("pyramid", "regions")))
        hidden, logits, deltas = self.box_head(x)
        return Outputs(logits, taps, hidden, valid=region_valid, extra={"deltas": deltas, "regions": regions})

    def _detect(self, outputs: Outputs, size: Array) -> Detections:
        def of_image(regions: Array, valid: Array, logits: Array, deltas: Array, size: Array) -> Detections:
            decoded = decode_boxes(deltas, regions[:, None], weights=ROI_WEIGHTS)
            decoded = clip_boxes(decoded, size)
            sides = decoded[..., 2:] - decoded[..., :2]
            valid = valid[:, None] & jnp.all(sides >= self.preset.min_side[1], axis=-1)
            settings = {"count": self.detections, "candidates": self.candidates or None}
            found = final_detections(decoded, jax.nn.softmax(logits)[:, :-1], valid, **settings)
            # As in detectron2, boxes without extent take part until here.
            return found._replace(valid=found.valid & jnp.all(found.boxes[:, 2:] > found.boxes[:, :2], axis=-1))

        extra = outputs.extra
        return over_images(of_image)(extra["regions"], outputs.valid, outputs.logits, extra["deltas"], size)


def _rows(x: Array, index: Array) -> Array:
    """x[b, index[b]] of every image b."""
    return over_images(lambda x, index: x[index])(x, index)


REGISTER = factories(FasterRCNN, TRUNKS)
