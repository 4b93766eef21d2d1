"""The benchmark of time and memory, at shapes that take no time."""

import csv
import importlib
import math
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CPU = ("cpu", "float32")


@pytest.fixture
def speed(monkeypatch, tmp_path):
    """The module, with two shapes and two short series of its own, which pretends to measure memory."""
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("benchmarks.speed.steps")
    series = {"C": [(10, 2), (20, 2)], "K": [(10, 2), (10, 3)]}
    shapes = {"tiny": module.Shape(8, 12, 3, 8, warm_up=1), "other": module.Shape(6, 5, 1, 4, warm_up=1)}
    growth = {f"C={c}, K={k}": module.Shape(4, c, k, 4) for pairs in series.values() for c, k in pairs}
    replacements = {"RESULTS": tmp_path, "MODES": [CPU], "SHAPES": shapes, "SERIES": series, "GROWTH": growth}
    for name, value in replacements.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "extra_mb_alone", lambda row, shape, mode: 1234.5)
    return module


@pytest.fixture
def main(speed):
    return lambda *arguments: speed.main(["--threads", "1", "--repeats", "2", *map(str, arguments)])


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_writes_a_row_for_each_shape_and_loss_and_replaces_those_of_a_shape(speed, main, tmp_path):
    main()
    before = read(tmp_path / "speed.csv")
    assert [(row["shape"], row["row"]) for row in before] == [(s, row) for s in speed.SHAPES for row in speed.ROWS]
    assert all(float(row[column]) > 0 for row in before for column in speed.NUMBERS)
    assert {float(row["ratio to floor"]) for row in before if row["row"] == "floor"} == {1.0}
    main("--shape", "tiny", "--repeats", 3)
    after = read(tmp_path / "speed.csv")
    for old, new in zip(before, after, strict=True):
        assert new["repeats"] == "3" if new["shape"] == "tiny" else new == old


def test_makes_tables_of_the_csv_alone(speed, main, tmp_path):
    main("--shape", "other")
    path = tmp_path / "speed.csv"
    path.write_text(path.read_text().replace("1234.0", "4321.0"))
    main("--report")
    main("--shape", "tiny")
    tiny, other = (tmp_path / "speed.md").read_text().split("**other**")
    for text, memory in ((tiny, "1,234"), (other, "4,321")):
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
        assert cells[0] == ["", *speed.NUMBERS]
        assert [row[0] for row in cells[2:]] == list(speed.ROWS)
        assert {row[5] for row in cells[2:]} == {memory}


def test_growth_has_a_file_of_its_own(speed, main, tmp_path):
    main("--growth")
    rows = read(tmp_path / "speed_growth.csv")
    assert [(row["shape"], row["row"]) for row in rows] == [
        (shape, row) for shape in ("C=10, K=2", "C=20, K=2", "C=10, K=3") for row in speed.GROWTH_ROWS
    ]
    assert (tmp_path / "speed_growth.png").exists()


def test_records_what_it_skips(speed, main, monkeypatch, tmp_path):
    reason = "skipped: needs about 99 GB"
    monkeypatch.setattr(speed, "why_not", lambda row, shape, mode: reason if row == "ProxyAnchorLoss" else "")
    main("--shape", "tiny")
    *_, skipped = read(tmp_path / "speed.csv")
    assert skipped["note"] == reason
    assert f"| ProxyAnchorLoss | {reason} |" in (tmp_path / "speed.md").read_text()


def test_skips_what_would_not_fit(speed, monkeypatch):
    million = speed.Shape(256, 100_000, 10, 128)
    monkeypatch.setattr(speed, "extra_mb_alone", lambda row, shape, mode: 0.2 * shape.C)
    assert speed.why_not("ProxyAnchorLoss", million, CPU) == "skipped: needs about 28 GB"
    assert speed.why_not("ProxyAnchorLoss", million._replace(C=50_000), CPU) == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_loss_has_as_many_proxies_and_takes_steps(speed, dtype):
    shape = speed.SHAPES["tiny"]
    for row in speed.ROWS:
        run = speed.Run(row, shape, ("cpu", dtype))
        forward, backward, both = run.step()
        assert 0 < forward < both
        assert both == pytest.approx(forward + backward)
        assert sum(parameter.numel() for parameter in run.loss_func.parameters()) == math.prod(shape[1:4]), row
        assert row.startswith("floor") or run.embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("row", ["floor", "floor, batch last"])
def test_floor_is_the_three_products(speed, row):
    run = speed.Run(row, speed.SHAPES["tiny"], CPU)
    run.step()
    x, w = run.embeddings.detach(), run.loss_func.proxies
    similarities, of_embeddings, of_proxies = run.loss_func.outputs
    torch.testing.assert_close(similarities, w @ x.T if row == "floor, batch last" else x @ w.T)
    torch.testing.assert_close(of_embeddings, x @ w.T @ w)
    torch.testing.assert_close(of_proxies, w @ x.T @ x)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_that_of_one_step(speed, monkeypatch):
    monkeypatch.undo()
    shape = speed.Shape(128, 1000, 10, 16)
    similarities = 4e-6 * 128 * 1000 * 10
    assert 0.9 * similarities < speed.extra_mb_alone("floor", shape, CPU) < 2 * similarities
    assert speed.extra_mb_alone("ours, streamed", shape, CPU) > 0
