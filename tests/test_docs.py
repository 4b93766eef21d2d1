"""The pages: their code runs, their parameters are those of the signature, what they refer to exists."""

import inspect
import re
from pathlib import Path

import pytest

from pml_multiproxy.losses import MultiProxyEntropyLoss

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def page_id(page):
    return str(page.relative_to(DOCS))


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # by the bar of PML's trainers
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=page_id)
def test_code_runs(page):
    namespace = {"__name__": "page"}
    for block in blocks(page):
        exec(block, namespace)


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
