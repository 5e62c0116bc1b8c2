"""Faster R-CNN with a feature pyramid as detectron2 computes it, in plain PyTorch, for comparison with ours.

Written from a description of that code base, with its names of arrays, and without any of ours: one image, one level
and one box at a time, and lists of whatever length. Images are BGR uint8, boxes xyxy in pixels; the background is the
last class.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

MEAN = torch.tensor([103.530, 116.280, 123.675])[:, None, None]  # BGR; the standard deviations are 1
STRIDES = (4, 8, 16, 32, 64)
ANCHOR_SIZES = (32, 64, 128, 256, 512)
RATIOS = (0.5, 1.0, 2.0)
RPN_WEIGHTS, ROI_WEIGHTS = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)
PRE_NMS, POST_NMS = {True: 2000, False: 1000}, 1000  # by level, in training and in detection; of all levels
ANCHOR_SAMPLES, REGION_SAMPLES = 256, 512


# --------------------------------------------------------------------------------------------------------- networks


class FixedNorm(nn.Module):
    """(x - mean) / sqrt(var + 1e-5) * weight + bias, all of them buffers."""

    def __init__(self, width):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x):
        scale = self.weight / torch.sqrt(self.running_var + 1e-5)
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class NormConv(nn.Conv2d):
    def __init__(self, wide_in, wide_out, size, stride=1):
        super().__init__(wide_in, wide_out, size, stride, size // 2, bias=False)
        self.norm = FixedNorm(wide_out)

    def forward(self, x):
        return self.norm(super().forward(x))


class Block(nn.Module):
    """Two 3 x 3 convolutions; or 1 x 1, 3 x 3, 1 x 1. The first one has the stride in both."""

    def __init__(self, wide_in, width, stride, bottleneck):
        super().__init__()
        wide_out = 4 * width if bottleneck else width
        self.conv1 = NormConv(wide_in, width, 1 if bottleneck else 3, stride)
        self.conv2 = NormConv(width, width, 3)
        self.conv3 = NormConv(width, wide_out, 1) if bottleneck else None
        self.shortcut = NormConv(wide_in, wide_out, 1, stride) if wide_in != wide_out else None

    def forward(self, x):
        y = self.conv2(torch.relu(self.conv1(x)))
        if self.conv3:
            y = self.conv3(torch.relu(y))
        return torch.relu(y + (self.shortcut(x) if self.shortcut else x))


class Trunk(nn.Module):
    def __init__(self, depths, bottleneck):
        super().__init__()
        self.stem = nn.ModuleDict({"conv1": NormConv(3, 64, 7, 2)})
        wide_in, self.channels = 64, []
        for number, depth in enumerate(depths):
            width, blocks = 64 << number, []
            for index in range(depth):
                blocks.append(Block(wide_in, width, 2 if number and not index else 1, bottleneck))
                wide_in = 4 * width if bottleneck else width
            setattr(self, f"res{number + 2}", nn.Sequential(*blocks))
            self.channels.append(wide_in)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.stem["conv1"](x)), 3, 2, 1)
        maps = []
        for stage in (self.res2, self.res3, self.res4, self.res5):
            x = stage(x)
            maps.append(x)
        return maps


class Pyramid(nn.Module):
    def __init__(self, trunk, features):
        super().__init__()
        self.bottom_up = trunk
        for level, channels in enumerate(trunk.channels, 2):
            setattr(self, f"fpn_lateral{level}", nn.Conv2d(channels, features, 1))
            setattr(self, f"fpn_output{level}", nn.Conv2d(features, features, 3, padding=1))

    def forward(self, maps):
        """p2 to p6."""
        levels, above = [], None
        for level in (5, 4, 3, 2):
            inner = getattr(self, f"fpn_lateral{level}")(maps[level - 2])
            if above is not None:
                inner = inner + above.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            levels.insert(0, getattr(self, f"fpn_output{level}")(inner))
            above = inner
        return [*levels, F.max_pool2d(levels[-1], 1, 2)]


class Detector(nn.Module):
    """`depths` blocks a stage; `classes` without the background."""

    def __init__(self, depths, bottleneck, classes, features, hidden):
        super().__init__()
        self.classes = classes
        self.backbone = Pyramid(Trunk(depths, bottleneck), features)
        head = {
            "conv": nn.Conv2d(features, features, 3, padding=1),
            "objectness_logits": nn.Conv2d(features, len(RATIOS), 1),
            "anchor_deltas": nn.Conv2d(features, 4 * len(RATIOS), 1),
        }
        self.proposal_generator = nn.ModuleDict({"rpn_head": nn.ModuleDict(head)})
        box_head = {"fc1": nn.Linear(features * 7 * 7, hidden), "fc2": nn.Linear(hidden, hidden)}
        predictor = {"cls_score": nn.Linear(hidden, classes + 1), "bbox_pred": nn.Linear(hidden, 4 * classes)}
        parts = {"box_head": nn.ModuleDict(box_head), "box_predictor": nn.ModuleDict(predictor)}
        self.roi_heads = nn.ModuleDict(parts)

    def objectness(self, levels):
        """For each level logits [B, H * W * 3] and deltas [B, H * W * 3, 4]: row, column, anchor."""
        head, logits, deltas = self.proposal_generator["rpn_head"], [], []
        for x in levels:
            hidden = torch.relu(head["conv"](x))
            logits.append(head["objectness_logits"](hidden).permute(0, 2, 3, 1).flatten(1))
            moves = head["anchor_deltas"](hidden)  # channel = 4 * anchor + coordinate
            moves = moves.unflatten(1, (len(RATIOS), 4)).permute(0, 3, 4, 1, 2)
            deltas.append(moves.flatten(1, 3))
        return logits, deltas

    def classify(self, regions):
        """[K, D, 7, 7] to logits [K, C + 1] and deltas [K, C, 4]."""
        head, predictor = self.roi_heads["box_head"], self.roi_heads["box_predictor"]
        x = torch.relu(head["fc2"](torch.relu(head["fc1"](regions.flatten(1)))))
        return predictor["cls_score"](x), predictor["bbox_pred"](x).unflatten(1, (self.classes, 4))


def canvas_of(images):
    """Images [3, h, w] less their mean, then 0 to the right and below, up to multiples of 32 that hold them all."""
    sides = [32 * math.ceil(max(image.shape[axis] for image in images) / 32) for axis in (1, 2)]
    canvas = torch.zeros(len(images), 3, *sides)
    for place, image in zip(canvas, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image.float() - MEAN
    return canvas


# ------------------------------------------------------------------------------------------------------------ boxes


def anchors_of(levels):
    """[H * W * 3, 4] for each level."""
    every = []
    for x, stride, size in zip(levels, STRIDES, ANCHOR_SIZES, strict=True):
        boxes = []
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                for ratio in RATIOS:
                    width = math.sqrt(size**2 / ratio)
                    height = ratio * width
                    cx, cy = column * stride, row * stride
                    boxes.append([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2])
        every.append(torch.tensor(boxes))
    return every


def decode(deltas, boxes, weights):
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    cx, cy = boxes[..., 0] + width / 2, boxes[..., 1] + height / 2
    dx, dy, dw, dh = (deltas[..., i] / weights[i] for i in range(4))
    limit = math.log(1000 / 16)
    cx, cy = dx * width + cx, dy * height + cy
    width, height = torch.exp(dw.clamp(max=limit)) * width, torch.exp(dh.clamp(max=limit)) * height
    return torch.stack([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2], dim=-1)


def encode(targets, boxes, weights):
    (wide, high, cx, cy), (wide_t, high_t, cx_t, cy_t) = (
        (b[:, 2] - b[:, 0], b[:, 3] - b[:, 1], (b[:, 0] + b[:, 2]) / 2, (b[:, 1] + b[:, 3]) / 2)
        for b in (boxes, targets)
    )
    code = [(cx_t - cx) / wide, (cy_t - cy) / high, torch.log(wide_t / wide), torch.log(high_t / high)]
    return torch.stack([w * x for w, x in zip(weights, code, strict=True)], dim=1)


def clip(boxes, size):
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def overlaps(a, b):
    """[N, M] IoU, 0 without intersection."""
    area_a, area_b = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
    sides = torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])
    inner = sides.clamp(min=0).prod(dim=2)
    return torch.where(inner > 0, inner / (area_a[:, None] + area_b - inner), 0)


def nms(boxes, scores, groups, threshold):
    """Indices that greedy suppression within each group keeps, by falling score."""
    kept = {}
    order = torch.argsort(-scores, stable=True)
    for i in order.tolist():
        others = kept.setdefault(groups[i].item(), [])
        if not others or not (overlaps(boxes[i : i + 1], boxes[others]) > threshold).any():
            others.append(i)
    every = torch.tensor([i for others in kept.values() for i in others], dtype=torch.long)
    return every[torch.argsort(-scores[every], stable=True)]


# --------------------------------------------------------------------------------------------------------- pooling


def level_of(box):
    """0 to 3, from p2 to p5."""
    side = torch.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    level = torch.floor(4 + torch.log2(side / 224 + 1e-8))
    return int(level.clamp(2, 5)) - 2


def interpolation(start, length, size):
    """Samples of seven cells along one axis: neighbours before and after, share of the second, whether it counts, n."""
    number = math.ceil(length / 7)
    samples = [
        start + cell * length / 7 + (a + 0.5) * length / (7 * number) for cell in range(7) for a in range(number)
    ]
    y = torch.tensor(samples, dtype=torch.float32)
    counts = (y >= -1) & (y <= size)
    y = y.clamp(min=0)
    before = y.floor().long()
    last = before >= size - 1
    before = torch.where(last, size - 1, before)
    after = torch.where(last, size - 1, before + 1)
    return before, after, torch.where(last, 0, y - before), counts.float(), number


def pool(levels, boxes):
    """[K, D, 7, 7] of one image's maps [D, H, W], each box from its own level."""
    pooled = []
    for box in boxes:
        level = level_of(box)
        x, (left, top, right, bottom) = levels[level], (box / STRIDES[level] - 0.5).tolist()
        row0, row1, down, row_counts, rows = interpolation(top, bottom - top, x.shape[1])
        column0, column1, across, column_counts, columns = interpolation(left, right - left, x.shape[2])
        if not rows * columns:
            pooled.append(torch.zeros(len(x), 7, 7))
            continue
        x = x[:, row0] * (1 - down)[:, None] + x[:, row1] * down[:, None]
        x = x[:, :, column0] * (1 - across) + x[:, :, column1] * across
        x = x * row_counts[:, None] * column_counts
        pooled.append(x.reshape(len(x), 7, rows, 7, columns).mean(dim=(2, 4)))
    return torch.stack(pooled)


# ------------------------------------------------------------------------------------------- proposals and detections


def propose(logits, deltas, anchors, size, train):
    """Proposals [N, 4] of one image, best first, and how many there were before the limit of all levels together."""
    boxes, scores, groups = [], [], []
    for number, (score, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
        score, best = torch.sort(score, descending=True, stable=True)
        best = best[: PRE_NMS[train]]
        boxes.append(clip(decode(delta[best], anchor[best], RPN_WEIGHTS), size))
        scores.append(score[: PRE_NMS[train]])
        groups.append(torch.full((len(best),), number))
    boxes, scores, groups = torch.cat(boxes), torch.cat(scores), torch.cat(groups)
    solid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
    boxes, scores, groups = boxes[solid], scores[solid], groups[solid]
    kept = nms(boxes, scores, groups, 0.7)
    return boxes[kept[:POST_NMS]], len(kept)


def detect(regions, logits, deltas, size):
    """Boxes [N, 4], scores [N] and classes [N] of at most 100 detections of one image, best first."""
    scores = torch.softmax(logits, dim=1)[:, :-1]
    boxes = clip(decode(deltas, regions[:, None], ROI_WEIGHTS), size)
    region, classes = torch.nonzero(scores > 0.05, as_tuple=True)
    boxes, scores = boxes[region, classes], scores[region, classes]
    kept = nms(boxes, scores, classes, 0.5)[:100]
    return boxes[kept], scores[kept], classes[kept]


# ----------------------------------------------------------------------------------------------------------- losses


def label_anchors(anchors, boxes):
    """(1, 0 or -1 for those that do not take part; index of the box) of each anchor."""
    if not len(boxes):
        return torch.zeros(len(anchors)), torch.zeros(len(anchors), dtype=torch.long)
    iou = overlaps(boxes, anchors)
    largest, matches = iou.max(dim=0)
    labels = torch.where(largest >= 0.7, 1, torch.where(largest < 0.3, 0, -1))
    labels[(iou == iou.max(dim=1, keepdim=True).values).any(dim=0)] = 1  # each box's best ones
    return labels, matches


def label_regions(regions, boxes, labels, background):
    """(class; index of the box) of each region."""
    if not len(boxes):
        return torch.full((len(regions),), background), torch.zeros(len(regions), dtype=torch.long)
    largest, matches = overlaps(boxes, regions).max(dim=0)
    return torch.where(largest >= 0.5, labels[matches], background), matches


def sample_sizes(positives, negatives, count, share):
    """How many of each a sample has."""
    positives = min(positives, int(count * share))
    return positives, min(negatives, count - positives)


def losses(net, levels, logits, deltas, truth, samples, regions):
    """The four losses of a batch with given samples.

    Args:
      net: A `Detector`.
      levels: p2 to p6, [B, D, H, W].
      logits: Of all anchors, [B, A].
      deltas: [B, A, 4].
      truth: (boxes [G, 4], classes [G]) of each image.
      samples: Indices of anchors of each image, long.
      regions: [R, 4] of each image.
    """
    anchors, background = torch.cat(anchors_of(levels)), net.classes
    rpn_class = rpn_box = roi_class = roi_box = torch.zeros(())
    for i, (boxes, classes) in enumerate(truth):
        labels, matches = label_anchors(anchors, boxes)
        positive = samples[i][labels[samples[i]] == 1]
        rpn_class = rpn_class + F.binary_cross_entropy_with_logits(
            logits[i, samples[i]], labels[samples[i]].float(), reduction="sum"
        )
        if len(positive):
            target = encode(boxes[matches[positive]], anchors[positive], RPN_WEIGHTS)
            rpn_box = rpn_box + (deltas[i, positive] - target).abs().sum()
        scores, moves = net.classify(pool([x[i] for x in levels[:4]], regions[i]))
        labels, matches = label_regions(regions[i], boxes, classes, background)
        roi_class = roi_class + F.cross_entropy(scores, labels, reduction="sum")
        found = torch.nonzero(labels < background)[:, 0]
        if len(found):
            target = encode(boxes[matches[found]], regions[i][found], ROI_WEIGHTS)
            roi_box = roi_box + (moves[found, labels[found]] - target).abs().sum()
    slots, rows = ANCHOR_SAMPLES * len(truth), sum(map(len, regions))
    return {
        "rpn_objectness": rpn_class / slots,
        "rpn_box": rpn_box / slots,
        "roi_class": roi_class / rows,
        "roi_box": roi_box / rows,
    }
