"""A data set and a trunk for runs without any download: train with even and odd, retrieve digits."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

CONFIGS = Path(__file__).parent.resolve() / "configs"


def configs(*loss):
    """The options that select this task and the overlays of a loss."""
    overlays = {
        "dataset": ["digits/dataset"],
        "eval": ["pml2", "digits/eval"],
        "general": ["digits/general"],
        "loss_and_miners": [*loss, "digits/sampler"],
        "models": ["digits/models"],
        "optimizers": ["with_proxies", "digits/optimizers"],
        "transforms": ["digits/transforms"],
    }
    for name, files in overlays.items():
        yield f"--config_{name}"
        yield from f"[default, {', '.join(str(CONFIGS / file) for file in files)}]".split(" ")


class EvenOddDigits(Dataset):
    """scikit-learn's handwritten digits. Label level 0 is the digit, level 1 whether it is odd."""

    def __init__(self, root, transform=None, download=False):
        digits = load_digits()
        self.images = (digits.images / 16).astype(np.float32)
        self.labels = np.stack([digits.target, digits.target % 2], axis=1)
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"data": self.transform(self.images[index]), "label": self.labels[index]}


class DigitsTrunk(nn.Module):
    mean = std = None  # so that the benchmarker does not normalize the images as those of ImageNet
    input_space, input_range = "L", [0, 1]

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.last_linear = nn.Linear(64 * 4, 1)  # the benchmarker reads its input size, and takes it out

    def forward(self, images):
        return self.last_linear(self.convolutions(images))
