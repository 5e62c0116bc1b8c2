"""The ImageNet distillation step of this package against the same step in PyTorch, in turns on one device.

    python -m benchmarks.bench_torch --pair r34_r18 --methods kd wkd_l
    JAX_PLATFORMS=cpu python -m benchmarks.bench_torch --batch 2 --image-size 160 --classes 10 --rounds 3

The PyTorch side is written here the way such code usually is: uint8 images, channels last, autocast in the networks and
the projector, losses in float32, a frozen teacher in evaluation mode, `loss.backward()`, SGD in its fused form; eagerly
and with `torch.compile` around everything from the images to the loss. WKD-L comes in the form of the released code,
which gives every example a [C-1, C-1] cost without its target class (direct), and as products of [B, C] with one [C, C]
kernel (batched). Both sides have random weights, the same loss settings and no augmentation on the device. Ours also
makes its metrics in the step and has its classifiers in float32, which is not asked of PyTorch.

Prints a table and writes JSON after each method. A variant that runs out of memory or does not compile has the reason
in its row. What Triton and cuDNN choose in the first calls is not timed.
"""

from __future__ import annotations

import argparse
import gc
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from benchmarks import timing

PAIRS = {"r34_r18": ("resnet34", "resnet18"), "r50_mv1": ("resnet50", "mobilenetv1")}
METHODS = ("none", "kd", "wkd_l", "wkd_f", "wkd_l+wkd_f")
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compile": {},
    "reduce-overhead": {"mode": "reduce-overhead"},  # CUDA graphs
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},  # tries more kernels; compiles for minutes
}
FORMS = ("direct", "batched")  # of WKD-L
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def conv_norm(wide_in: int, wide_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias and its BatchNorm."""
    conv = nn.Conv2d(wide_in, wide_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(wide_out)]


class Residual(nn.Module):
    """Two 3 x 3 convolutions, or 1 x 1, 3 x 3 and 1 x 1 in a bottleneck, beside a shortcut."""

    def __init__(self, wide_in: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        if expansion == 1:
            layers = [*conv_norm(wide_in, width, 3, stride), nn.ReLU(inplace=True), *conv_norm(width, width, 3)]
        else:
            layers = [*conv_norm(wide_in, width, 1), nn.ReLU(inplace=True), *conv_norm(width, width, 3, stride)]
            layers += [nn.ReLU(inplace=True), *conv_norm(width, expansion * width, 1)]
        self.layers = nn.Sequential(*layers)
        same = stride == 1 and wide_in == expansion * width
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_norm(wide_in, expansion * width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """[B, wide_in, H, W] to [B, expansion * width, H / stride, W / stride]."""
        return F.relu(self.layers(x) + self.shortcut(x), inplace=True)


class Network(nn.Module):
    """A stack of layers, an average over positions and a classifier; returns logits and the last feature map."""

    def __init__(self, layers: Sequence[nn.Module], width: int, classes: int) -> None:
        super().__init__()
        self.layers, self.width, self.fc = nn.Sequential(*layers), width, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] to [B, classes] and [B, width, H / 32, W / 32]."""
        x = self.layers(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)), x


def resnet(depths: Sequence[int], expansion: int, classes: int) -> Network:
    """A ResNet as in torchvision."""
    layers = [*conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    wide_in = 64
    for stage, depth in enumerate(depths):
        for block in range(depth):
            width, stride = 64 << stage, 2 if stage and not block else 1
            layers.append(Residual(wide_in, width, stride, expansion))
            wide_in = expansion * width
    return Network(layers, wide_in, classes)


def mobilenetv1(classes: int) -> Network:
    """MobileNetV1 of width 1."""
    layers, wide_in = [*conv_norm(3, 32, 3, 2), nn.ReLU(inplace=True)], 32
    units = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
    for wide_out, stride in units:
        layers += [*conv_norm(wide_in, wide_in, 3, stride, groups=wide_in), nn.ReLU(inplace=True)]
        layers += [*conv_norm(wide_in, wide_out, 1), nn.ReLU(inplace=True)]
        wide_in = wide_out
    return Network(layers, wide_in, classes)


def network(name: str, classes: int) -> Network:
    """One of the networks of `PAIRS`."""
    if name == "mobilenetv1":
        return mobilenetv1(classes)
    depths = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}[name]
    return resnet(depths, 4 if name == "resnet50" else 1, classes)


def bottleneck(wide_in: int, wide_out: int) -> nn.Sequential:
    """WKD-F's projector."""
    return nn.Sequential(
        nn.Conv2d(wide_in, 256, 1),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.Conv2d(256, wide_out, 1),
        nn.BatchNorm2d(wide_out),
        nn.ReLU(inplace=True),
    )


def kd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(teacher || student) of logits [B, C], averaged over the batch."""
    log_q, p = F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def target_term(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """WKD-L's cross-entropy of the target class alone, averaged over the batch."""
    p, log_q = F.softmax(teacher, dim=1), F.log_softmax(student, dim=1)
    return -(p * log_q).gather(1, labels[:, None]).mean()


def transport_direct(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    cost: Tensor,
    temperature: float = 2.0,
    epsilon: float = 0.05,
    num_iters: int = 10,
) -> Tensor:
    """WKD-L's transport with the target class deleted: one cost matrix an example, [B, C-1, C-1]."""
    others = torch.arange(student.shape[1] - 1, device=student.device)
    others = others + (others >= labels[:, None])
    a, b = (F.softmax(x.gather(1, others) / temperature, dim=1) for x in (student, teacher))
    cost = cost[others[:, :, None], others[:, None, :]]
    kernel, u = torch.exp(-cost / epsilon), torch.full_like(a, 1 / a.shape[1])
    for _ in range(num_iters):
        v = b / (torch.einsum("bij,bi->bj", kernel, u) + 1e-8)
        u = a / (torch.einsum("bij,bj->bi", kernel, v) + 1e-8)
    plan = u[:, :, None] * kernel * v[:, None, :]
    return (plan * cost).sum((1, 2)).mean()


def transport_batched(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    cost: Tensor,
    temperature: float = 2.0,
    epsilon: float = 0.05,
    num_iters: int = 10,
) -> Tensor:
    """WKD-L's transport with the target class masked: products with one kernel [C, C] of all examples."""
    target = F.one_hot(labels, student.shape[1]).bool()
    a, b = (F.softmax(x.masked_fill(target, -torch.inf) / temperature, dim=1) for x in (student, teacher))
    kernel, u = torch.exp(-cost / epsilon), (~target).to(a.dtype) / (a.shape[1] - 1)
    for _ in range(num_iters):
        v = b / (u @ kernel + 1e-8)
        u = a / (v @ kernel.T + 1e-8)
    return (u * (v @ (kernel * cost).T)).sum(1).mean()


def wkd_feature(student: Tensor, teacher: Tensor, grid: int = 4, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """WKD-F's distances of means and of standard deviations [B, D, H, W], cell by cell, averaged over the batch."""
    rows, columns = ([(i * n // grid, -(-(i + 1) * n // grid)) for i in range(grid)] for n in student.shape[2:])
    mean_term = cov_term = student.new_zeros(())
    for top, bottom in rows:
        for left, right in columns:
            cells = (x[:, :, top:bottom, left:right] for x in (student, teacher))
            (var_s, mean_s), (var_t, mean_t) = (torch.var_mean(cell, dim=(2, 3)) for cell in cells)
            mean_term = mean_term + (mean_s - mean_t).square().sum(1).mean()
            cov_term = cov_term + ((var_s + eps).sqrt() - (var_t + eps).sqrt()).square().sum(1).mean()
    return mean_term / grid**2, cov_term / grid**2


class Distillation(nn.Module):
    """Images and labels to the total loss, with the methods' default settings in this package."""

    def __init__(self, pair: str, method: str, form: str, classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        teacher, student = PAIRS[pair]
        self.methods, self.form, self.dtype = method.split("+"), form, dtype
        self.student = network(student, classes)
        if method != "none":
            self.teacher = network(teacher, classes).requires_grad_(False)
        if "wkd_f" in self.methods:
            self.projector = bottleneck(self.student.width, self.teacher.width)
        # 1 - exp(-(1 - similarity)) where the similarity of any two classes is a half.
        distance = 0.5 - 0.5 * torch.eye(classes)
        self.register_buffer("cost", 1 - torch.exp(-distance))
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, 255 * torch.tensor(value)[:, None, None])

    def train(self, mode: bool = True) -> Distillation:
        """Leaves the teacher in evaluation mode."""
        super().train(mode)
        if "teacher" in self._modules:
            self.teacher.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Uint8 [B, H, W, 3], which permuted are channels last, and integers [B]."""
        device = images.device.type
        x = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            logits, feature = self.student(x)
            if "teacher" in self._modules:
                with torch.no_grad():
                    teacher_logits, teacher_feature = self.teacher(x)
            if "wkd_f" in self.methods:
                feature = self.projector(feature)
        with torch.autocast(device, enabled=False):
            logits = logits.float()
            loss = F.cross_entropy(logits, labels)
            if "kd" in self.methods:
                loss = loss + kd(logits, teacher_logits.float())
            if "wkd_l" in self.methods:
                transport = transport_direct if self.form == "direct" else transport_batched
                loss = loss + target_term(logits, teacher_logits.float(), labels)
                loss = loss + 30 * transport(logits, teacher_logits.float(), labels, self.cost)
            if "wkd_f" in self.methods:
                mean_term, cov_term = wkd_feature(feature.float(), teacher_feature.float())
                loss = loss + 0.02 * (2 * mean_term + cov_term)
        return loss


class Step:
    """One training step in PyTorch with the state that it carries, after the two calls that compile it.

    Attributes:
      compile_s: Seconds of those calls less one more.
      parameters: Trained ones, and the teacher's.
      memory_mb: The most that PyTorch held for this step, on a GPU; else None.
    """

    def __init__(
        self,
        pair: str,
        method: str,
        mode: str,
        form: str = "batched",
        *,
        batch: int,
        image_size: int,
        classes: int,
        dtype: str,
        device: str,
    ) -> None:
        held = self._allocated(device)
        torch.manual_seed(0)
        model = Distillation(pair, method, form, classes, getattr(torch, dtype))
        model = model.to(device, memory_format=torch.channels_last).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)
        self.parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        self.images = torch.randint(256, (batch, image_size, image_size, 3), dtype=torch.uint8).to(device)
        self.labels = torch.randint(classes, (batch,)).to(device)
        self.model = model if mode == "eager" else torch.compile(model, **MODES[mode])
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            self.run()
            times.append(time.perf_counter() - start)
        self.compile_s = max(0.0, times[0] + times[1] - 2 * times[2])
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        self.memory_mb = None if peak is None else (peak - held) / 1e6

    @staticmethod
    def _allocated(device: str) -> int:
        return torch.cuda.memory_allocated() if device == "cuda" else 0

    def run(self) -> None:
        """One step, until it is done."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model(self.images, self.labels).backward()
        self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()


def attempt(name: str, **settings: Any) -> tuple[Step | None, str]:
    """The step called `name`, or the reason why there is none."""
    try:
        return Step(**settings), ""
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: {error}"
    except Exception as error:  # a compiler may fail in any way; what is wrong in the step itself shows eagerly
        if settings["mode"] == "eager":
            raise
        reason = f"{type(error).__name__}: {error}"
    reason = reason.split("\n")[0]
    print(f"{name}: {reason}", file=sys.stderr)
    return None, reason


def measure(
    method: str, modes: Sequence[str], rounds: int, device: str, settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """A row for ours and each variant of PyTorch, timed in turns."""
    import jax

    from benchmarks import imagenet_step

    torch.compiler.reset()  # its cache is by function and small: the variants of one method fit
    ours = imagenet_step.variant(methods=method.split("+"), **settings)
    ours.run()  # takes its memory before PyTorch's variants, of which one may find none left
    steps: dict[str, Any] = {"wkd_jax": ours}
    rows: dict[str, dict[str, Any]] = {"wkd_jax": {}}
    for mode in modes:
        for form in FORMS if "wkd_l" in method else ("",):
            name = f"torch {mode} {form}".strip()
            step, reason = attempt(name, method=method, mode=mode, form=form, device=device, **settings)
            rows[name] = {"failed": reason} if step is None else {}
            if step is None:  # what it held is free only now, when the exception is gone
                gc.collect()
                torch.cuda.empty_cache()
            else:
                steps[name] = step
    times = timing.interleaved({name: step.run for name, step in steps.items()}, rounds)
    for name, step in steps.items():
        rows[name] = timing.summary(times[name]) | {
            "compile_s": step.compile_s,
            "memory_mb": step.memory_mb,
            "parameters": step.parameters,
        }
        if name != "wkd_jax":
            ratios = timing.summary(times["wkd_jax"], times[name])
            rows[name] |= {"ours_over_this": ratios["ratio"], "ours_over_this_quartiles": ratios["ratio_quartiles"]}
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        # Of all methods until now: that of a method alone needs a run of its own.
        rows["wkd_jax"]["process_peak_mb"] = stats["peak_bytes_in_use"] / 1e6
    return rows


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The rows of all methods in Markdown."""
    lines = [
        "| method | variant | ms a step (quartiles) | ours / this (quartiles) | compile s | memory MB |",
        "|---|---|---|---|---|---|",
    ]
    for method, rows in results.items():
        for name, row in rows.items():
            if "failed" in row:
                lines.append(f"| {method} | {name} | {row['failed'].replace('|', '/')} | | | |")
                continue
            low, high = row["quartiles_ms"]
            ratio = "1"
            if "ours_over_this" in row:
                first, last = row["ours_over_this_quartiles"]
                ratio = f"{row['ours_over_this']:.2f} ({first:.2f}-{last:.2f})"
            memory = f"{row['memory_mb']:.0f}" if row["memory_mb"] else "–"
            lines.append(
                f"| {method} | {name} | {row['median_ms']:.1f} ({low:.1f}-{high:.1f}) | {ratio} | "
                f"{row['compile_s']:.1f} | {memory} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Runs the methods one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="r34_r18", choices=PAIRS)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--modes", nargs="+", default=["eager", "compile", "reduce-overhead"], choices=MODES)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both share the GPU; read when JAX starts
    import jax

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("JAX has a GPU and PyTorch has none: set JAX_PLATFORMS=cpu to compare on the CPU")
    torch.backends.cudnn.benchmark = True
    torch.set_flush_denormal(True)  # as XLA does: on a CPU, tiny gradients take several times longer otherwise
    settings = {
        "pair": args.pair,
        "batch": args.batch,
        "image_size": args.image_size,
        "classes": args.classes,
        "dtype": args.dtype,
    }
    out = args.out or timing.RESULTS / f"torch_{args.pair}_{device}.json"
    report = {
        "benchmark": "training step, against PyTorch",
        "machine": timing.machine("torch"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "threads": torch.get_num_threads(),
        **settings,
        "rounds": args.rounds,
        "results": {},
    }
    for method in args.methods:
        report["results"][method] = measure(method, args.modes, args.rounds, device, settings)
        gc.collect()
        torch.cuda.empty_cache()
        timing.write(report, out)
    print(table(report["results"]))


if __name__ == "__main__":
    main()
