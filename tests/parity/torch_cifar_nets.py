"""The CIFAR networks of RepDistiller and mdistiller in PyTorch, which no installed library has.

Written from their tables, with their module names. Each returns logits; features are read from the outputs of modules
by hooks.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


def conv(wide_in, wide_out, size, stride=1, groups=1, bias=False):
    return nn.Conv2d(wide_in, wide_out, size, stride, size // 2, groups=groups, bias=bias)


def conv_norm_relu(*convs, last_relu=True):
    layers = [layer for c in convs for layer in (c, nn.BatchNorm2d(c.out_channels), nn.ReLU())]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


def he_and_small_linear(net):
    """He fan-out for convolutions, N(0, 0.01) for linear layers, biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class InvertedResidual(nn.Module):
    def __init__(self, wide_in, wide_out, stride, expansion):
        super().__init__()
        hidden = wide_in * expansion
        self.skip = stride == 1 and wide_in == wide_out
        self.conv = conv_norm_relu(
            conv(wide_in, hidden, 1),
            conv(hidden, hidden, 3, stride, groups=hidden),
            conv(hidden, wide_out, 1),
            last_relu=False,
        )

    def forward(self, x):
        return x + self.conv(x) if self.skip else self.conv(x)


class CifarMobileNetV2(nn.Module):
    WIDTHS = (16, 8, 12, 16, 32, 48, 80, 160)
    REPEATS = (1, 2, 3, 4, 3, 3, 1)
    STRIDES = (1, 1, 2, 2, 1, 2, 1)

    def __init__(self, num_classes, widths=WIDTHS, repeats=REPEATS):
        super().__init__()
        self.conv1 = conv_norm_relu(conv(3, 16, 3, 2))
        self.blocks = nn.ModuleList()
        for i, (count, stride) in enumerate(zip(repeats, self.STRIDES, strict=True)):
            wide_in, wide_out = widths[i : i + 2]
            expansion = 6 if i else 1
            rest = (InvertedResidual(wide_out, wide_out, 1, expansion) for _ in range(count - 1))
            self.blocks.append(nn.Sequential(InvertedResidual(wide_in, wide_out, stride, expansion), *rest))
        self.conv2 = conv_norm_relu(conv(widths[-1], 1280, 1))
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        he_and_small_linear(self)

    def forward(self, x):
        x = self.conv1(x)
        for blocks in self.blocks:
            x = blocks(x)
        return self.classifier(self.conv2(x).mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(self, wide_in, wide_out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(wide_in)
        self.conv1 = conv(wide_in, wide_out, 3, stride)
        self.bn2 = nn.BatchNorm2d(wide_out)
        self.conv2 = conv(wide_out, wide_out, 3)
        self.convShortcut = None if wide_in == wide_out else conv(wide_in, wide_out, 1, stride)

    def forward(self, x):
        before = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(before))))
        return y + (x if self.convShortcut is None else self.convShortcut(before))


class WideGroup(nn.Module):
    def __init__(self, blocks, wide_in, wide_out, stride):
        super().__init__()
        rest = (WideBlock(wide_out, wide_out, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(WideBlock(wide_in, wide_out, stride), *rest)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, depth, widening, num_classes):
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = conv(3, 16, 3)
        self.block1 = WideGroup(blocks, 16, 16 * widening, 1)
        self.block2 = WideGroup(blocks, 16 * widening, 32 * widening, 2)
        self.block3 = WideGroup(blocks, 32 * widening, 64 * widening, 2)
        self.bn1 = nn.BatchNorm2d(64 * widening)
        self.fc = nn.Linear(64 * widening, num_classes)
        weight = self.fc.weight.clone()
        he_and_small_linear(self)
        self.fc.weight.data = weight

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


def shuffle(x, groups):
    # Channel k * (C / groups) + j, the j-th of group k, goes to j * groups + k.
    channels = x.shape[1]
    return x[:, [k * (channels // groups) + j for j in range(channels // groups) for k in range(groups)]]


class ShuffleUnitV1(nn.Module):
    def __init__(self, wide_in, wide_out, stride, first_groups):
        super().__init__()
        self.stride, self.groups = stride, first_groups
        middle = wide_out // 4
        self.conv1 = conv(wide_in, middle, 1, groups=first_groups)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = conv(middle, middle, 3, stride, groups=middle)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = conv(middle, wide_out, 1, groups=3)
        self.bn3 = nn.BatchNorm2d(wide_out)

    def forward(self, x):
        y = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        if self.stride == 1:
            return F.relu(y + x)
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))


class ShuffleNetV1(nn.Module):
    def __init__(self, num_classes, units=(4, 8, 4)):
        super().__init__()

        def layer(first, width, count):
            return nn.Sequential(first, *(ShuffleUnitV1(width, width, 1, 3) for _ in range(count - 1)))

        self.conv1 = conv(3, 24, 1)
        self.bn1 = nn.BatchNorm2d(24)
        # A stride of 2 joins the input to the branch: 24 + 216, 240 + 240, 480 + 480.
        self.layer1 = layer(ShuffleUnitV1(24, 216, 2, 1), 240, units[0])
        self.layer2 = layer(ShuffleUnitV1(240, 240, 2, 3), 480, units[1])
        self.layer3 = layer(ShuffleUnitV1(480, 480, 2, 3), 960, units[2])
        self.linear = nn.Linear(960, num_classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class ShuffleUnitV2(nn.Module):
    def __init__(self, width):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = conv(half, half, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = conv(half, half, 3, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x):
        half = x.shape[1] // 2
        y = F.relu(self.bn1(self.conv1(x[:, half:])))
        y = F.relu(self.bn3(self.conv3(self.bn2(self.conv2(y)))))
        return shuffle(torch.cat([x[:, :half], y], 1), 2)


class ShuffleDownV2(nn.Module):
    def __init__(self, wide_in, wide_out):
        super().__init__()
        half = wide_out // 2
        self.conv1, self.bn1 = conv(wide_in, wide_in, 3, 2, groups=wide_in), nn.BatchNorm2d(wide_in)
        self.conv2, self.bn2 = conv(wide_in, half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(wide_in, half, 1), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = conv(half, half, 3, 2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x):
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        right = F.relu(self.bn5(self.conv5(right)))
        return shuffle(torch.cat([left, right], 1), 2)


class ShuffleNetV2(nn.Module):
    def __init__(self, num_classes, units=(3, 7, 3)):
        super().__init__()

        def layer(wide_in, width, count):
            return nn.Sequential(ShuffleDownV2(wide_in, width), *(ShuffleUnitV2(width) for _ in range(count)))

        self.conv1, self.bn1 = conv(3, 24, 1), nn.BatchNorm2d(24)
        self.layer1 = layer(24, 116, units[0])
        self.layer2 = layer(116, 232, units[1])
        self.layer3 = layer(232, 464, units[2])
        self.conv2, self.bn2 = conv(464, 1024, 1), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class VGG(nn.Module):
    CONVS = {
        8: [[64], [128], [256], [512], [512]],
        11: [[64], [128], [256] * 2, [512] * 2, [512] * 2],
        13: [[64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2],
        16: [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3],
        19: [[64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4],
    }

    def __init__(self, depth, num_classes):
        super().__init__()
        wide_in = 3
        for index, widths in enumerate(self.CONVS[depth]):
            before = [wide_in, *widths]
            convs = [conv(*before[i : i + 2], 3, bias=True) for i in range(len(widths))]
            setattr(self, f"block{index}", conv_norm_relu(*convs, last_relu=False))
            wide_in = widths[-1]
        self.classifier = nn.Linear(512, num_classes)
        he_and_small_linear(self)

    def forward(self, x):
        x = F.relu(self.block0(x))
        x = F.relu(self.block1(F.max_pool2d(x, 2, 2)))
        x = F.relu(self.block2(F.max_pool2d(x, 2, 2)))
        x = F.relu(self.block3(F.max_pool2d(x, 2, 2)))
        x = F.relu(self.block4(x))
        return self.classifier(x.mean((2, 3)))
