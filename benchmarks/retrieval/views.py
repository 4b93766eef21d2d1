"""Random views of images: rotated, scaled, sheared and shifted."""

import math

import torch
from torch import nn

ANGLE, SCALE, SHEAR, SHIFT = math.radians(15), 0.15, 0.15, 0.1
"""At most: radians; part of the size; tangent of the slant; part of the side."""


def augment(images, generator):
    """One random affine view of each image ``(B, channels, height, width)``; pixels from outside it are 0."""
    angle, scale, shear, right, down = (2 * torch.rand(5, len(images), generator=generator) - 1) * torch.tensor(
        [[ANGLE], [SCALE], [SHEAR], [SHIFT], [SHIFT]]
    )
    scale = 1 + scale
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = [cosine, shear * cosine - sine, 2 * right], [sine, shear * sine + cosine, 2 * down]  # the side is 2 long
    matrix = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
    grid = nn.functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def stack_views(images, views, generator):
    """``views`` blocks, each a view of all ``images`` in their order."""
    return augment(images.repeat(views, 1, 1, 1), generator)
