"""The pages: their code runs, their parameters are those of the signature, what they refer to exists."""

import inspect
import re
from pathlib import Path

import pytest
import torch

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
        assert (page.parent / target).exists(), target
