"""The pages: each piece of code runs by itself and does what the page says, what they refer to exists."""

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
GUIDE = DOCS / "guide.md"


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def in_guide(text):
    (block,) = (block for block in blocks(GUIDE) if text in block)
    return block


def run(code, **names):
    """The names that the code defines."""
    namespace = {"__name__": "page", **names}
    exec(code, namespace)
    return namespace


def page_id(page):
    return str(page.relative_to(DOCS))


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # by the bar of PML's trainers
@pytest.mark.parametrize(
    "code", [pytest.param(code, id=f"{page_id(page)}-{i}") for page in PAGES for i, code in enumerate(blocks(page))]
)
def test_code_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some code writes files
    run(code)
    assert max(map(len, code.splitlines())) <= 88, "wider than the page"


def test_class_weights():
    page = run(in_guide("ClassWeightedReducer"))
    losses = page["loss_func"].eval().compute_loss(page["embeddings"], page["labels"])["loss"]["losses"]
    loss = page["loss_func"](page["embeddings"], page["labels"])
    torch.testing.assert_close(loss, (losses * page["weights"][page["labels"]]).mean())


def test_logits_of_kept_classes_stay():
    page = run(in_guide("smaller"))
    embeddings, kept = torch.randn(40, 64), page["kept"]
    logits, of_larger, of_smaller = (page[name].get_logits(embeddings) for name in ("old", "larger", "smaller"))
    torch.testing.assert_close(of_larger[:, :5], logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(of_smaller, logits[:, kept], rtol=0, atol=1e-6)
    page["larger"].init_proxies(torch.randn(40, 64), torch.arange(40) % 2 + 5)
    assert page["larger"].proxies[:5].equal(page["old"].proxies)


@pytest.fixture(scope="module")
def noisy_digits():
    images, digits = map(torch.tensor, load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(digits), generator=generator) < 1 / 7
    other = (digits + torch.randint(1, 10, digits.shape, generator=generator)) % 10
    return images.float().view(-1, 1, 8, 8) / 16, torch.where(wrong, other, digits), wrong


def hints(noisy_digits, settings):
    """Precision and recall of the guide's hints, from its first to its last."""
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
    trained = {"embeddings": network.eval()(images).detach(), "labels": labels, "loss_func": loss_func}
    page = run(in_guide("elsewhere").split("# Here, train")[1].partition("\n")[2], **trained)
    outliers = torch.zeros(len(labels), dtype=torch.bool).index_fill_(0, page["outliers"], True)
    flags = page["elsewhere"], outliers, page["rare"]
    precision, recall = [wrong[flag].float().mean() for flag in flags], [flag[wrong].float().mean() for flag in flags]
    return precision, recall


@pytest.mark.slow
def test_hints_at_wrong_labels(noisy_digits):
    precision, recall = hints(noisy_digits, {"pooling": "max", "intra_weight": 0.0, "balance_weight": 0.0})
    assert recall == sorted(recall, reverse=True)
    assert precision == sorted(precision)
    assert recall[0] > 0.9
    assert precision[0] > 0.6  # a seventh by chance
    assert recall[2] > 0.05
    assert precision[1] > 0.9
    assert hints(noisy_digits, {})[0][1] < precision[1] - 0.1


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_what_a_page_refers_to_exists(page):
    text = page.read_text()
    for target in re.findall(r"pml-multiproxy/blob/main/([^)#\s]+)\)", text) + re.findall(r'--8<-- "([^":]+)', text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"\]\(([^):#]+\.md)", text):
        notebook = re.sub(r"^notebooks/(\w+)\.md$", r"../examples/notebooks/\1.ipynb", target)
        assert (page.parent / notebook).exists(), target
