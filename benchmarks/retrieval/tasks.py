"""The data of each task, its network, and how long it trains.

``cub``, ``cars196`` and ``sop`` are for a machine with a GPU: PML's own dataset classes, with a trunk from timm.
"""

import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

CLINC = "clinc150_minilm.npz"
OMNIGLOT = "omniglot/images_background_small1.zip", "omniglot/images_background_small2.zip"
SOURCES = {
    CLINC: "CLINC150 (github.com/clinc/oos-eval) as L2-normalised sentence embeddings of all-MiniLM-L6-v2; "
    "python -m benchmarks.clinc_features makes it",
    **dict.fromkeys(OMNIGLOT, "of Omniglot (github.com/brendenlake/omniglot, python/)"),
}


class Data(NamedTuple):
    """Inputs; the labels to train with; those to retrieve, which number all classes of the task."""

    x: Tensor
    coarse: Tensor
    fine: Tensor

    def where(self, mask):
        return Data(*(part[mask] for part in self))


class Task(NamedTuple):
    """``train``, ``validation`` and ``test`` share no sample and, if ``unseen``, no class."""

    train: Data
    validation: Data
    test: Data
    make_network: object
    embedding_size: int
    epochs: int
    batch_size: int
    per_class: int | None = None
    """How many samples of a class a batch holds, where classes are many; None: batches are drawn at random."""
    views: int = 1
    """How many random views of each of its samples a batch holds, block by block."""
    half_precision: bool = False
    """Whether the network trains under autocast to bfloat16, which takes a third of the time on a recent CPU."""

    @property
    def has_coarse_labels(self):
        return not torch.equal(self.train.coarse, self.train.fine)

    def phase(self, name):
        """What to train and what to evaluate on. For the test, validation data are trained on, too."""
        if name == "validation":
            return self.train, self.validation
        return Data(*(joined(*parts) for parts in zip(self.train, self.validation, strict=True))), self.test


def joined(a, b):
    return torch.cat([a, b]) if isinstance(a, Tensor) else Images(np.concatenate([a.paths, b.paths]), a.size)


def path_of(folder, name):
    path = Path(folder or ".") / name
    if not path.exists():
        raise SystemExit(f"{path} is missing: {SOURCES[name]}. --data names the folder that holds it.")
    return path


def digits_coarse(folder):
    """Even and odd, then the digit."""
    images, digits = load_digits(return_X_y=True)
    data = Data(torch.tensor(images / 16).float().view(-1, 1, 8, 8), torch.tensor(digits % 2), torch.tensor(digits))
    rest, test = train_test_split(np.arange(len(digits)), test_size=0.5, stratify=digits, random_state=0)
    train, validation = train_test_split(rest, test_size=0.3, stratify=digits[rest], random_state=0)
    make_network = partial(ConvNet, [1, 32, 64, 64], pooled_after=(1, 2), flat=256)
    return Task(*(data.where(torch.tensor(part)) for part in (train, validation, test)), make_network, 64, 15, 64)


@cache
def clinc(folder):
    arrays = np.load(path_of(folder, CLINC))
    names = "features", "superclass", "label", "split"
    features, domains, intents, split = (torch.tensor(arrays[name].astype("float32")) for name in names)
    return Data(features, domains.long(), intents.long()), split


def clinc_coarse(folder):
    """Ten domains, then the 150 intents."""
    data, split = clinc(folder)
    return Task(*(data.where(split == part) for part in range(3)), ResidualHead, 384, 10, 128)


def clinc_unseen(folder):
    """75 intents, then the other 75: 15 of the first are the validation classes."""
    data, split = clinc(folder)
    data = data._replace(coarse=data.fine)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0)).argsort()[data.fine]
    known = split < 2
    parts = known & (order < 60), known & (order >= 60) & (order < 75), (split == 2) & (order >= 75)
    return Task(*map(data.where, parts), ResidualHead, 384, 10, 128, per_class=4)


@cache
def omniglot(folder, number):
    """Images 28 x 28, ink is 1; the alphabet, the character, and the number of the drawing, of each."""
    images, alphabets, characters, drawings = [], [], [], []
    with zipfile.ZipFile(path_of(folder, OMNIGLOT[number])) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".png") and "__MACOSX" not in name)
        for name in names:
            *_, alphabet, character, drawing = name.split("/")
            small = Image.open(io.BytesIO(file.read(name))).convert("L").resize((28, 28), Image.Resampling.BOX)
            images.append(1 - np.asarray(small, dtype="float32") / 255)
            alphabets.append(alphabet)
            characters.append(f"{alphabet}/{character}")
            drawings.append(int(drawing.split("_")[1].split(".")[0]))
    return torch.tensor(np.stack(images)).unsqueeze(1), np.array(alphabets), np.array(characters), np.array(drawings)


def omniglot_network():
    network = ConvNet([1, 16, 64, 64, 64], pooled_after=(0, 1, 2), flat=576)
    return network.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU


def omniglot_coarse(folder):
    """Five alphabets, then their 136 characters, in the hand of other people."""
    images, alphabets, characters, drawings = omniglot(folder, 0)
    data = Data(images, *(torch.tensor(np.unique(names, return_inverse=True)[1]) for names in (alphabets, characters)))
    parts = drawings <= 10, (drawings > 10) & (drawings <= 14), drawings > 14
    return Task(*(data.where(torch.tensor(part)) for part in parts), omniglot_network, 64, 10, 128)


def omniglot_unseen(folder):
    """136 characters, of which 30 are the validation classes, then 106 characters of other alphabets."""
    images, known, characters, _ = omniglot(folder, 0)
    other_images, alphabets, other_characters, _ = omniglot(folder, 1)
    new = ~np.isin(alphabets, known)
    names = np.concatenate([characters, other_characters[new]])
    labels = torch.tensor(np.unique(names, return_inverse=True)[1])
    data = Data(torch.cat([images, other_images[torch.tensor(new)]]), labels, labels)
    old = torch.arange(len(names)) < len(characters)
    chosen = torch.randperm(len(set(characters)), generator=torch.Generator().manual_seed(0))[:30]
    validation = old & torch.isin(labels, labels[old].unique()[chosen])
    return Task(*map(data.where, (old & ~validation, validation, ~old)), omniglot_network, 64, 10, 128, per_class=4)


class Images:
    """Files, read when they are indexed with a tensor of numbers."""

    def __init__(self, paths, size=224):
        self.paths, self.size = np.array(paths), size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, numbers):
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(self.read, self.paths[numbers.numpy()])))

    def read(self, path):
        image = ImageOps.fit(Image.open(path).convert("RGB"), (self.size, self.size))
        values = torch.tensor(np.asarray(image, dtype="float32") / 255).permute(2, 0, 1)
        return (values - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_DEVIATION)


IMAGENET_MEAN, IMAGENET_DEVIATION = [[[0.485]], [[0.456]], [[0.406]]], [[[0.229]], [[0.224]], [[0.225]]]


def pretrained_network():
    import timm

    return nn.Sequential(timm.create_model("resnet50", pretrained=True, num_classes=0), nn.Linear(2048, 512))


def image_task(name, folder):
    """The usual split by classes; a fifth of the training classes are for validation."""
    from pytorch_metric_learning import datasets  # which not all versions that we support have

    try:
        train, test = (getattr(datasets, name)(folder or ".", split=split) for split in ("train", "test"))
    except (ValueError, FileNotFoundError) as error:
        how = f"from pytorch_metric_learning.datasets import {name}; {name}('DIR', download=True)"
        raise SystemExit(f"{name} is not in {folder or '.'} ({error}). Into an empty folder: {how}") from error
    labels, test_labels = torch.tensor(train.labels), torch.tensor(test.labels)
    classes = labels.unique()
    chosen = classes[torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))[: len(classes) // 5]]
    held_out = torch.isin(labels, chosen)
    parts = [(np.array(train.paths)[mask.numpy()], labels[mask]) for mask in (~held_out, held_out)]
    parts.append((test.paths, test_labels))
    return Task(*(Data(Images(paths), y, y) for paths, y in parts), pretrained_network, 512, 20, 128, per_class=4)


def with_views(make_task, folder, **settings):
    return make_task(folder)._replace(views=2, **settings)


TASKS = {
    "digits-coarse": digits_coarse,
    "clinc-coarse": clinc_coarse,
    "omniglot-coarse": omniglot_coarse,
    "clinc-unseen": clinc_unseen,
    "omniglot-unseen": omniglot_unseen,
    "digits-coarse-views": partial(with_views, digits_coarse),
    "omniglot-coarse-views": partial(with_views, omniglot_coarse, half_precision=True),
    "omniglot-unseen-views": partial(with_views, omniglot_unseen, half_precision=True),
}
IMAGE_TASKS = {
    "cub": partial(image_task, "CUB"),
    "cars196": partial(image_task, "Cars196"),
    "sop": partial(image_task, "StanfordOnlineProducts"),
}


class ResidualHead(nn.Module):
    """At the start, the identity, so that every loss starts from the frozen features."""

    def __init__(self, size=384, hidden=512):
        super().__init__()
        self.first, self.second = nn.Linear(size, hidden), nn.Linear(hidden, size)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


class ConvNet(nn.Sequential):
    def __init__(self, channels, pooled_after, flat, size=64):
        layers = []
        for i, (before, after) in enumerate(pairwise(channels)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] * (i in pooled_after)
        super().__init__(*layers, nn.Flatten(), nn.Linear(flat, size))
