"""Shared by the examples: scikit-learn's handwritten digits, trained with two labels and retrieved by ten."""

import math
from functools import cache

import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pml_multiproxy.views import ViewsDataset, stack_views

EMBEDDING_SIZE = 64
ROTATION, SCALING, SHEAR, SHIFT = math.radians(15), 0.15, 0.15, 0.1
"""How far a view goes at most, either way: radians, part of the size, slant, and part of the side of the image."""


@cache
def load_data():
    """Half of scikit-learn's digits to train with, labelled 0 (even) or 1 (odd); the other half with the digit."""
    images, digits = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    digits = torch.tensor(digits)
    train, test = train_test_split(np.arange(len(digits)), test_size=0.5, stratify=digits, random_state=0)
    return TensorDataset(images[train], digits[train] % 2), TensorDataset(images[test], digits[test])


def random_views(images):
    """Images ``(N, 1, 8, 8)``, each rotated, scaled, sheared and shifted at random; black comes in from outside."""
    angle, scaling, shear, right, down = 2 * torch.rand(5, len(images)) - 1
    cosine, sine = torch.cos(ROTATION * angle), torch.sin(ROTATION * angle)
    size, shear = 1 + SCALING * scaling, SHEAR * shear
    # Where each pixel of the view comes from, in coordinates from -1 to 1: the side is 2 long.
    matrices = [
        [size * cosine, size * (shear * cosine - sine), 2 * SHIFT * right],
        [size * sine, size * (shear * sine + cosine), 2 * SHIFT * down],
    ]
    matrices = torch.stack([torch.stack(row) for row in matrices]).permute(2, 0, 1)
    grid = nn.functional.affine_grid(matrices, images.shape, align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def stack_random_views(samples):
    """Collates samples of a ``ViewsDataset``; whole batches change faster than single images."""
    images, labels = stack_views(samples)
    return random_views(images), labels


def make_models():
    def block(channels_in, channels_out):
        return nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()

    trunk = nn.Sequential(*block(1, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 64), nn.MaxPool2d(2), nn.Flatten())
    trunk = trunk.to(memory_format=torch.channels_last)  # faster convolutions
    return {"trunk": trunk, "embedder": nn.Linear(64 * 4, EMBEDDING_SIZE)}


def load_batches():
    return DataLoader(load_data()[0], batch_size=64, shuffle=True)


def load_views(train_set, views):
    """Batches of so many random views of each image."""
    dataset = ViewsDataset(train_set, views)
    return DataLoader(dataset, batch_size=64, shuffle=True, collate_fn=stack_random_views)


def train_epoch(network, loss_func, optimizer, batches):
    for images, labels in batches:
        optimizer.zero_grad()
        loss_func(network(images), labels).backward()
        optimizer.step()


def make_optimizer(network, loss_func):
    """The proxies start at unit norm, and stand a larger step than the network."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    if list(loss_func.parameters()):
        optimizer.add_param_group({"params": loss_func.parameters(), "lr": 1e-2})
    return optimizer


@torch.no_grad()
def map_at_r(network):
    """MAP@R of the digits in the test half, in %."""
    images, digits = load_data()[1].tensors
    embeddings = nn.functional.normalize(network.eval()(images))
    network.train()
    calculator = AccuracyCalculator(include=("mean_average_precision_at_r",), k="max_bin_count")
    return 100 * calculator.get_accuracy(embeddings, digits)["mean_average_precision_at_r"]
