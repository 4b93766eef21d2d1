"""The nearest proxies, with a few similarities at a time: the same result, and memory linear in the samples."""

import pytest
import torch
from cases import make_distance

from pml_multiproxy import MultiProxyEntropyLoss, _nearest


@pytest.mark.parametrize("name", ["cosine", "L2", "SNR"])
def test_does_not_depend_on_how_many_at_a_time(name, monkeypatch):
    loss_func = MultiProxyEntropyLoss(7, 6, 3, distance=make_distance(name)).double()
    embeddings, labels = torch.randn(40, 6).double(), torch.randint(7, (40,))
    whole = torch.stack([loss_func.distance(embeddings, of_class).float() for of_class in loss_func.proxies], dim=1)
    expected = (whole if loss_func.distance.is_inverted else -whole).detach()
    for most in (1, 100, 10**9):
        monkeypatch.setattr(_nearest, "MOST_SIMILARITIES", most)
        classes, proxies = loss_func.assign(embeddings, labels)
        assert classes.equal(labels)
        assert proxies.equal(expected[torch.arange(40), labels].argmax(dim=1))
        classes, proxies = loss_func.assign(embeddings)
        assert (3 * classes + proxies).equal(expected.flatten(1).argmax(dim=1))


def test_is_linear_in_the_samples(monkeypatch):
    """5,000 samples of 1,000 classes: all similarities to the proxies of these classes would be 150 million."""
    sizes, similarities = [], _nearest.similarities

    def recorded(*arguments):
        result = similarities(*arguments)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(_nearest, "similarities", recorded)
    loss_func = MultiProxyEntropyLoss(1000, 8, 30)
    loss_func.assign(torch.randn(5000, 8), torch.arange(5000) % 1000)
    assert max(sizes) <= _nearest.MOST_SIMILARITIES
    assert sum(sizes) < 20 * _nearest.MOST_SIMILARITIES
    sizes.clear()
    loss_func.assign(torch.randn(5000, 8))
    assert max(sizes) <= _nearest.MOST_SIMILARITIES


def test_without_samples(loss_func):
    none = torch.empty(0, dtype=torch.long)
    for found in (*loss_func.assign(torch.empty(0, 8), none), *loss_func.assign(torch.empty(0, 8))):
        assert found.shape == (0,)
    assert loss_func.soft_assign(torch.empty(0, 8), none).shape == (0, 4)
