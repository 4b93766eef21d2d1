"""The benchmark of time and memory, at shapes that take no time."""

import csv
import importlib
import json
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
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def main(speed):
    def run(*arguments):
        speed.main(["--threads", "1", "--repeats", "2", *map(str, arguments)])

    return run


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_writes_a_row_for_each_shape_and_loss(speed, main, tmp_path):
    main("--json", tmp_path / "rows.json")
    rows = read(tmp_path / "speed.csv")
    assert [(row["shape"], row["row"]) for row in rows] == [
        (shape, row) for shape in speed.SHAPES for row in speed.ROWS
    ]
    for row in rows:
        assert all(float(row[column]) > 0 for column in speed.NUMBERS)
        assert all(row[column] for column in row if column != "note")
    assert {float(row["ratio to floor"]) for row in rows if row["row"] == "floor"} == {1.0}
    assert [{k: str(v) for k, v in row.items()} for row in json.loads((tmp_path / "rows.json").read_text())] == rows


def test_replaces_the_rows_of_the_same_shape(main, tmp_path):
    main()
    before = read(tmp_path / "speed.csv")
    main("--shape", "tiny", "--repeats", 3)
    after = read(tmp_path / "speed.csv")
    assert [(row["shape"], row["row"]) for row in after] == [(row["shape"], row["row"]) for row in before]
    for old, new in zip(before, after, strict=True):
        assert new["repeats"] == "3" if new["shape"] == "tiny" else new == old


def test_keeps_the_rows_of_another_device(speed, main, monkeypatch, tmp_path):
    main("--shape", "tiny")
    rows = [{**row, "device": "cuda", "dtype": "bfloat16"} for row in read(tmp_path / "speed.csv")]
    speed.store("speed", rows, speed.SHAPES)
    assert [row["device"] for row in read(tmp_path / "speed.csv")] == ["cpu"] * len(rows) + ["cuda"] * len(rows)
    main("--report")
    assert (tmp_path / "speed.md").read_text().count("**tiny**") == 2


def test_makes_tables_of_the_csv_alone(speed, main, tmp_path):
    main("--shape", "other")
    path = tmp_path / "speed.csv"
    path.write_text(path.read_text().replace("1234.0", "4321.0"))
    main("--shape", "tiny")
    tiny, other = (tmp_path / "speed.md").read_text().split("**other**")
    for text, memory in ((tiny, "1,234"), (other, "4,321")):
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
        assert cells[0] == ["", *speed.NUMBERS]
        assert [row[0] for row in cells[2:]] == list(speed.ROWS)
        assert {row[5] for row in cells[2:]} == {memory}


def test_growth_has_a_file_of_its_own(speed, main, tmp_path):
    main("--growth", "--report")
    rows = read(tmp_path / "speed_growth.csv")
    assert [(row["shape"], row["row"]) for row in rows] == [
        (shape, row) for shape in ("C=10, K=2", "C=20, K=2", "C=10, K=3") for row in speed.GROWTH_ROWS
    ]
    assert (tmp_path / "speed_growth.png").exists()


def test_records_what_it_skips(speed, main, monkeypatch, tmp_path):
    reason = "skipped: needs about 99 GB"
    monkeypatch.setattr(speed, "why_not", lambda row, shape, mode: reason if row == "ProxyAnchorLoss" else "")
    main("--shape", "tiny", "--growth", "--report")
    *measured, skipped = read(tmp_path / "speed.csv")
    assert not any(row["note"] for row in measured)
    assert skipped["note"] == reason
    assert not any(skipped[column] for column in speed.NUMBERS)
    assert f"| ProxyAnchorLoss | {reason} |" in (tmp_path / "speed.md").read_text()


def test_skips_what_would_not_fit(speed, monkeypatch):
    million = speed.Shape(256, 100_000, 10, 128)
    monkeypatch.setattr(speed, "extra_mb_alone", lambda row, shape, mode: 0.2 * shape.C)
    assert speed.why_not("ProxyAnchorLoss", million, CPU) == "skipped: needs about 28 GB"
    assert speed.why_not("ProxyAnchorLoss", million._replace(C=50_000), CPU) == ""


def test_report_alone_measures_nothing(main, tmp_path):
    main("--shape", "tiny", "other")
    before = (tmp_path / "speed.csv").read_bytes()
    main("--report")
    assert (tmp_path / "speed.csv").read_bytes() == before
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_names_the_shapes_there_are(main, capsys):
    with pytest.raises(SystemExit):
        main("--shape", "huge")
    assert "invalid choice: 'huge' (choose from" in capsys.readouterr().err


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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_that_of_one_step(speed, monkeypatch):
    monkeypatch.undo()
    torch.set_num_threads(1)
    shape = speed.Shape(128, 1000, 10, 16)
    similarities = 4e-6 * 128 * 1000 * 10
    assert 0.9 * similarities < speed.extra_mb_alone("floor", shape, CPU) < 2 * similarities
    assert speed.extra_mb_alone("ours, streamed", shape, CPU) > 0
