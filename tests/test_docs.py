"""The pages: their code runs, their parameters are those of the signature, what they refer to exists."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from pml_multiproxy.losses import MultiProxyEntropyLoss

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def page_id(page):
    return str(page.relative_to(DOCS))


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run(page):
    """The names that the code of a page defines."""
    namespace = {"__name__": "page"}
    for block in blocks(page):
        exec(block, namespace)
    return namespace


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # by the bar of PML's trainers
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=page_id)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some code writes files
    run(page)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # by the bar of PML's trainers
def test_code_around_the_loss_does_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = run(DOCS / "around.md")
    features, labels, network = page["features"], page["labels"], page["network"]
    embeddings = network(features).detach()

    # Class weights
    weighted = page["weighted"].eval()
    by_sample = weighted.compute_loss(embeddings, labels)["loss"]["losses"]
    weights = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0])
    torch.testing.assert_close(weighted(embeddings, labels), (by_sample * weights[labels]).mean())

    # Adding classes later
    logits = page["larger"].get_logits(embeddings)
    assert logits.shape == (200, 7)
    torch.testing.assert_close(logits[:, :5], page["loss_func"].get_logits(embeddings))
    old = page["larger"].proxies[:5].detach().clone()
    page["larger"].init_proxies(torch.randn(40, 64), torch.arange(40) % 2 + 5)
    assert page["larger"].proxies[:5].equal(old)

    # Two label levels
    assert {"mean_average_precision_at_r_level0", "mean_average_precision_at_r_level1"} <= page["accuracies"].keys()
    assert all(loss.proxies.grad.any() for loss in page["per_level"])

    # Looking at proxies
    assert (tmp_path / "nearest.png").exists()
    assert len(page["ax"].images) == 2 * 10 * 8


FOR_NOISE = {"pooling": "max", "intra_weight": 0.0, "balance_weight": 0.0}
"""Those of the guide."""


@pytest.fixture(scope="module")
def noisy_digits():
    images, digits = map(torch.tensor, load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(digits), generator=generator) < 1 / 7
    other = (digits + torch.randint(1, 10, digits.shape, generator=generator)) % 10
    return images.float().view(-1, 1, 8, 8) / 16, torch.where(wrong, other, digits), wrong


def hints(noisy_digits, settings):
    """Precision and recall of what the page calls hints, by name."""
    images, labels, wrong = noisy_digits
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64)
    )
    loss_func = MultiProxyEntropyLoss(10, 64, 10, **settings)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    optimizer.add_param_group({"params": loss_func.parameters(), "lr": 1e-2})
    for _ in range(5):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            loss_func(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    page = {"network": network.eval(), "features": images, "labels": labels, "loss_func": loss_func}
    (block,) = (block for block in blocks(DOCS / "around.md") if "at_rare_proxies" in block)
    exec(block, page)
    page["outliers"] = torch.zeros(len(labels), dtype=torch.bool).index_fill_(0, page["outliers"], True)
    flags = {name: page[name] for name in ("elsewhere", "outliers", "at_rare_proxies")}
    return {
        name: (wrong[flag].float().mean().item(), flag[wrong].float().mean().item()) for name, flag in flags.items()
    }


def test_hints_at_wrong_labels(noisy_digits):
    precision, recall = zip(*hints(noisy_digits, FOR_NOISE).values(), strict=True)
    assert list(recall) == sorted(recall, reverse=True)
    assert list(precision) == sorted(precision)
    assert recall[0] > 0.9
    assert precision[0] > 0.6  # a seventh by chance
    assert recall[2] > 0.05
    assert precision[1] > 0.9
    assert hints(noisy_digits, {})["outliers"][0] < precision[1] - 0.1


def test_parameters_are_those_of_the_signature():
    rows = re.findall(r"^\| `(\w+)` \| (.*?)\|", (DOCS / "parameters.md").read_text(), re.MULTILINE)
    given = [
        (name, "" if parameter.default is parameter.empty else f"`{parameter.default!r}`")
        for name, parameter in inspect.signature(MultiProxyEntropyLoss).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    assert [(name, default.strip("| ")) for name, default in rows] == given


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_what_a_page_refers_to_exists(page):
    text = page.read_text()
    for target in re.findall(r"pml-multiproxy/blob/main/([^)#\s]+)\)", text) + re.findall(r'--8<-- "(.*?)"', text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"\]\(([^):#]+\.md)", text):
        notebook = re.sub(r"^notebooks/(\w+)\.md$", r"../examples/notebooks/\1.ipynb", target)
        assert (page.parent / notebook).exists(), target
