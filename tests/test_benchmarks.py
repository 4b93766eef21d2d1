"""The smaller benchmarks run on small data, and go on from what they have."""

import csv
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_ablations_write_a_row_for_each_run_and_go_on_from_them(load, monkeypatch, tmp_path):
    """On 30 intents in 10 domains, 3 samples of each to train with, 2 to test with."""
    label, split = np.repeat(np.arange(30), 5), np.tile([0, 0, 0, 2, 2], 30)
    features = np.random.default_rng(0).normal(size=(150, 384))
    np.savez(tmp_path / "clinc150_minilm.npz", features=features, label=label, superclass=label // 3, split=split)
    module = load("ablations.__main__")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(
        module, "train", lambda task, *given, train=module.train: train(task._replace(epochs=1), *given)
    )
    module.main(["--data", str(tmp_path), "--seeds", "1"])
    for name, (_, configurations, _) in module.ABLATIONS.items():
        rows = list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
        table = (tmp_path / f"{name}.md").read_text().splitlines()[2:]
        assert [line.split("|")[1].strip() for line in table] == [row["configuration"] for row in rows]
        assert [row["configuration"] for row in rows] == list(configurations)
    lines = (tmp_path / "miner.csv").read_text().splitlines(keepends=True)
    (tmp_path / "miner.csv").write_text("".join(lines[:-1]))  # as if the last run had been interrupted
    module.main(["--data", str(tmp_path), "--seeds", "1", "--table", "miner"])
    again = (tmp_path / "miner.csv").read_text().splitlines(keepends=True)
    assert (again[:-1], len(again)) == (lines[:-1], len(lines))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_send_what_the_formula_says(processes, load):
    module = load("distributed.steps")
    row = module.measure("tiny", module.Shape(8, 6, 2, 4), processes, repeats=1)
    assert sum(row[column] for column in module.KINDS.values()) == row["bytes by formula"] > 0
    assert row["MB proxies"] == pytest.approx(6 * 2 * 4 * 4 / 1e6 / processes)


@pytest.mark.slow
def test_agreement_as_a_guide(load, monkeypatch, tmp_path):
    """One setting finds the same three parts each time; another always the same two outliers, and retrieves worse."""
    guide = load("agreement.guide")
    good, dominated = (guide.OURS, 10, 0.1), ("SoftTriple", 5, 0.1)
    settings = {"GRID": [(guide.OURS, 2, 0.1), good], "UNBALANCED": [dominated], "OFTEN": [good], "SUBSETS": 5}
    for name, value in settings.items():
        monkeypatch.setattr(guide, name, value)

    def run(key, _):
        generator, parts = np.random.default_rng(key.seed), np.arange(600) % 3
        noisy = np.where(generator.random(600) < 0.1, generator.integers(3, size=600), (parts + key.seed) % 3)
        found = {good: noisy, dominated: np.arange(600) % 300 < 2}.get(key[1:4], generator.integers(2, size=600))
        text = "".join(map(str, found.astype(int)))
        return {"map_at_r": f"{80 if key[1:4] == good else 40}", "assigned": f"{text[:300]} {text[300:]}"}

    monkeypatch.setattr(guide, "run", run)
    for _ in range(2):  # the second time, all is there
        guide.main(["--task", "digits-coarse", "--seeds", "6", "--out", str(tmp_path)])
        assert len((tmp_path / "trainings.csv").read_text().splitlines()) == 1 + 2 + 2 + 6
    guided, samples = (
        [line.strip("| ").split(" | ") for line in (tmp_path / f"{name}.md").read_text().splitlines()[2:]]
        for name in ("guide", "samples")
    )
    assert [row[4].split(",")[0] for row in guided] == [guide.OURS] * 3 + ["SoftTriple"]
    assert [row[5:] for row in guided[2:]] == [["35 %", "80.0", "80.0"], ["99 %", "40.0", "80.0"]]
    assert samples[0][2:5] == sorted(samples[0][2:5])  # the more samples, the more they tell
    assert samples[1][2:] == ["80.0"] * 7


def test_groups_and_failures_of_embeddings_in_a_file(load, tmp_path):
    """Two classes of three clear groups each; the inputs of one group lie where those of the other class are."""
    groups, generator = load("inspection.groups"), np.random.default_rng(0)
    fine = np.arange(240) % 6
    centers = np.eye(6, 8)
    inputs = (
        np.where((fine == 2)[:, None], centers[3] + 0.3 * centers[2], centers[fine])
        + generator.normal(size=(240, 8)) / 20
    )
    arrays = {
        "embeddings": (centers[fine] + generator.normal(size=(240, 8)) / 20).astype("float32"),
        "proxies": centers.reshape(2, 3, 8).astype("float32"),
        "usage": np.array([[0.3, 0.3, 0.4]] * 2, dtype="float32"),
    }
    arrays |= {f"{part}{name}": of for part in ("", "train_") for name, of in [("inputs", inputs), ("fine", fine)]}
    arrays |= {"labels": fine // 3, "train_labels": fine // 3}
    np.savez(tmp_path / "toy-0.npz", **arrays)
    given = ["--task", "toy", "--embeddings", str(tmp_path), "--seeds", "1", "--out", str(tmp_path)]
    for name, rows in (("groups", 7), ("failures", 6 * 4)):
        for _ in range(2):  # the second time, all is there
            groups.main(["--table", name, *given])
            found = list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
            assert len(found) == rows
        table = (tmp_path / f"{name}.md").read_text()
        assert table.count("| toy |") == len({row["method"] for row in found})
    (of_third,) = (row for row in found if (row["method"], row["hidden"]) == (groups.OURS_OF, "2"))
    assert float(of_third["share"]) == 1
    assert float(of_third["left_out"]) < 20 < float(of_third["accuracy"])


@pytest.mark.slow
def test_trainings_of_the_guide_and_clusters(load, monkeypatch, tmp_path):
    """On the digits, trained for one epoch."""
    guide, clusters = load("agreement.guide"), load("inspection.clusters")
    digits = guide.TASKS["digits-coarse"](None)._replace(epochs=1)
    monkeypatch.setitem(guide.TASKS, "digits-coarse", lambda _: digits)
    row = guide.run(guide.Key("digits-coarse", "SoftTriple", 3, 0.1, seed=0), None)
    even, odd = row["assigned"].split()
    assert (len(even) + len(odd), set(even + odd) <= set("012")) == (270 + 899, True)

    for _ in range(2):
        clusters.main(["--task", "digits-coarse", "--seeds", "2", "--out", str(tmp_path)])
        assert len((tmp_path / "clusters.csv").read_text().splitlines()) == 1 + 3 * 2
    proxies, order = torch.nn.functional.normalize(torch.randn(2, 3, 8), dim=2), torch.randperm(60) % 6
    data = digits.test._replace(coarse=order // 3 + 5, fine=torch.tensor([4, 9, 2, 7, 0, 1])[order])
    assert clusters.of_proxies(proxies, proxies.flatten(0, 1)[order], data) == pytest.approx((1, 1, 1))
    assert clusters.of_proxies(proxies, proxies.flatten(0, 1)[order.flip(0)], data).accuracy < 0.9


def test_clinc_features(load, tmp_path, monkeypatch):
    script, names = load("clinc_features"), ["balance", "traffic", "gas"]
    splits = (("val", 1), ("train", 3), ("test", 2), ("oos_train", 1))
    data = {split: [[f"{split} {name} {i}", name] for name in names for i in range(n)] for split, n in splits}
    (tmp_path / "data_full.json").write_text(json.dumps(data))
    (tmp_path / "domains.json").write_text(json.dumps({"banking": names[:1], "auto": names[1:]}))
    encode = lambda texts: np.array([[len(text), text.startswith("test")] for text in texts])  # noqa: E731
    monkeypatch.setattr(script, "sentence_encoder", lambda model: encode)
    script.main(["--source", str(tmp_path), "--out", str(tmp_path / "made")])
    made = np.load(tmp_path / "made" / "clinc150_minilm.npz")
    assert made["split"].tolist() == [0] * 9 + [1] * 3 + [2] * 6
    assert made["label_names"][made["label"]].tolist()[9:12] == names
    assert made["superclass_names"][made["superclass"]].tolist()[9:12] == ["banking", "auto", "auto"]
    assert ((made["features"][:, 1] > 0) == (made["split"] == 2)).all()
