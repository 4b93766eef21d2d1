"""The retrieval benchmark: its metric, its losses and tasks, and what it chooses, resumes and reports."""

import csv
import importlib
import inspect
import io
import json
import zipfile
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning import losses, miners

from pml_multiproxy import MultiProxyEntropyLoss

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "retrieval" / "results"
PARAMETERS = inspect.signature(MultiProxyEntropyLoss).parameters
OURS = "MultiProxyEntropy"
MODULES = "command", "contrast", "losses", "runs", "selection", "tasks", "training", "views"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.retrieval.{name}") for name in MODULES})


@pytest.fixture
def main(bench, monkeypatch, tmp_path):
    """The command, on three configurations of each loss, without training: ``main.result`` gives the results."""

    def run(task, phase, loss, settings, seed):
        call.runs.append((loss, settings, phase, seed))
        result = map(str, call.result(loss, settings, phase, seed))
        return dict(zip(("map_at_r", "map_at_r_by_class", "assigned"), result, strict=True))

    def call(*arguments):
        call.runs = []
        bench.command.main(["--seeds", "2", "--threads", "1", "--out", str(tmp_path), *arguments])

    few = {name: drawn[:3] for name, drawn in json.loads(bench.losses.FILE.read_text()).items()}
    (tmp_path / "configurations.json").write_text(json.dumps(few))
    monkeypatch.setattr(bench.losses, "FILE", tmp_path / "configurations.json")
    monkeypatch.setattr(bench.runs, "TASKS", dict.fromkeys(bench.tasks.TASKS, lambda folder: None))
    monkeypatch.setattr(bench.runs, "run", run)
    call.result = lambda *_: (5, "1 2", "")
    return call


def test_map_at_r_is_the_mean_over_classes_of_the_definition(bench):
    x, labels = torch.nn.functional.normalize(torch.randn(40, 3)), torch.arange(40).clamp(max=15) % 6
    by_class = [[] for _ in range(6)]
    for i, c in enumerate(labels):
        order = (x @ x[i]).argsort(descending=True)
        hits = (labels[order[order != i]] == c).double()[: int((labels == c).sum()) - 1]
        by_class[c].append((hits * hits.cumsum(0) / torch.arange(1, len(hits) + 1)).mean().item())
    found = bench.training.evaluate(torch.nn.Identity(), bench.tasks.Data(x, labels, labels))
    assert float(found["map_at_r"]) == pytest.approx(np.mean([100 * np.mean(of) for of in by_class]), abs=0.01)


def test_configurations_are_those_that_were_drawn(bench):
    drawn = {name: bench.losses.draw(name, family) for name, family in bench.losses.FAMILIES.items()}
    assert json.loads(bench.losses.FILE.read_text()) == drawn


@pytest.mark.parametrize("task", ["digits-coarse", "omniglot-unseen-views"])
def test_every_configuration_is_a_loss_and_ours_starts_with_the_defaults(task, bench):
    views = 2 if task.endswith("views") else 1
    embeddings, labels = torch.randn(12, 4, requires_grad=True), torch.arange(6).remainder(2).repeat(2)
    for name, family in bench.losses.FAMILIES.items():
        for settings in bench.losses.configurations(name, task) if bench.selection.applies(name, task) else ():
            settings = {key: settings[key] for key in settings if key not in ("proxies_lr", "clusters")}
            family.build(2, 4, views, **settings)(embeddings, labels).backward()
    assert embeddings.grad.isfinite().all()
    loss_func, first = MultiProxyEntropyLoss(2, 4, views=views), bench.losses.configurations(OURS, task)[0]
    found = {name: getattr(loss_func, name) for name in first.keys() & PARAMETERS.keys()}
    found |= {"neighbor_weight": 1.0} if views > 1 else {}  # None: on with views
    assert all(value == first[name] for name, value in found.items())


def test_contrast_is_that_of_pml(bench):
    embeddings = torch.randn(24, 5, dtype=torch.float64, requires_grad=True)
    labels, samples = torch.arange(12).remainder(3).repeat(2), torch.arange(12).repeat(2)
    easy = bench.contrast.EasyPositives(temperature=0.2)
    nearest = miners.BatchEasyHardMiner(pos_strategy="easy", neg_strategy="all")(embeddings, labels)
    expected = losses.NTXentLoss(temperature=0.2)(embeddings, labels, nearest)
    gradients = [torch.autograd.grad(loss, embeddings)[0] for loss in (easy(embeddings, labels), expected)]
    torch.testing.assert_close(*gradients)

    pairs = [(a, b) for a, b in product(range(24), repeat=2) if labels[a] == labels[b] and samples[a] != samples[b]]
    indices = torch.arange(24), torch.arange(24).roll(12), *torch.tensor(pairs).T
    conditional = losses.NTXentLoss(temperature=0.4)(embeddings, labels, indices)
    expected = 0.75 * losses.SupConLoss(temperature=0.4)(embeddings, labels) + 0.25 * conditional
    found = bench.contrast.Spread(2, temperature=0.4, conditional_weight=0.25)(embeddings, labels)
    torch.testing.assert_close(found, expected)


def test_maskcon_by_hand(bench):
    """Two views of three samples, the last alone in its class. The first row has cosines 0.6 and 0.8 to the second."""
    x = torch.tensor([[1, 0], [0.6, 0.8], [0, 1], [1, 0], [0.8, 0.6], [0, -1]], dtype=torch.float64)
    labels, same = torch.tensor([0, 0, 1, 0, 0, 1]), torch.eye(3).repeat(2, 2).bool()
    other_views = same.clone().fill_diagonal_(False).double()
    targets = bench.contrast.soft_targets(x @ x.T, other_views, (labels[:, None] == labels) & ~same, temperature=0.2)
    relative = np.exp((0.6 - 0.8) / 0.2)  # 1 for the nearest
    torch.testing.assert_close(targets[0], torch.tensor([0, relative, 0, 1, 1, 0]).double() / (2 + relative))
    torch.testing.assert_close(targets[2], torch.eye(6).double()[5])
    loss_func = bench.contrast.MaskCon(2, 2, 2, target_temperature=0.2, target_weight=0.25).double()
    log_shares = (x @ x.T / 0.1).fill_diagonal_(-torch.inf).log_softmax(dim=1).fill_diagonal_(0)
    contrast = -((0.25 * targets + 0.75 * other_views) * log_shares).sum(dim=1).mean()
    torch.testing.assert_close(loss_func(x, labels), loss_func.softmax(x, labels) + contrast)


def test_all_losses_see_the_same_views_block_by_block(bench, monkeypatch):
    seen, stack = [], bench.views.stack_views
    monkeypatch.setattr(bench.training, "stack_views", lambda *given: seen.append(stack(*given)) or seen[-1])
    task = bench.tasks.digits_coarse(None)._replace(views=2, epochs=1)
    for loss in ("SoftTriple", "easy positives"):
        bench.training.run(task, "validation", loss, bench.losses.configurations(loss, "digits-coarse")[0], seed=3)
    assert torch.equal(torch.cat(seen[: len(seen) // 2]), torch.cat(seen[len(seen) // 2 :]))
    images, views = task.train.x, stack(task.train.x, 2, torch.Generator()).unflatten(0, (2, -1))
    assert 0.01 < (views[0] - views[1]).abs().mean() < 0.8 * (views[0] - images.roll(1, 0)).abs().mean()


def test_assignments_of_held_out_samples_are_those_of_the_loss(bench):
    task, training, settings = bench.tasks.digits_coarse(None), bench.training, {"proxies_per_class": 100}
    family = bench.losses.FAMILIES[OURS]
    network, loss_func = training.train(task._replace(epochs=1), task.train, family, settings | {"proxies_lr": 0.01}, 0)
    expected = loss_func.assign(training.embed(network, task.validation.x), task.validation.coarse)[1]
    for c, word in enumerate(training.assigned(network, loss_func, task.validation).split()):
        assert [training.DIGITS.index(x) for x in word] == expected[task.validation.coarse == c].tolist()


def write_data(folder):
    generator = np.random.default_rng(0)
    label, split = np.repeat(np.arange(150), 6), np.tile([0, 0, 0, 1, 2, 2], 150)
    features = generator.normal(size=(900, 384))
    np.savez(folder / "clinc150_minilm.npz", features=features, label=label, superclass=label // 15, split=split)
    (folder / "omniglot").mkdir()
    for number, alphabets in ((1, ["Greek", "Korean", "Latin"]), (2, ["Greek", "Sanskrit"])):
        with zipfile.ZipFile(folder / "omniglot" / f"images_background_small{number}.zip", "w") as file:
            for alphabet, character, drawing in product(alphabets, range(12), range(1, 21)):
                image = io.BytesIO()
                Image.fromarray(generator.random((105, 105)) > 0.1).save(image, "png")
                file.writestr(f"small/{alphabet}/character{character:02}/0001_{drawing:02}.png", image.getvalue())


def test_parts_of_a_task_have_nothing_in_common(bench, tmp_path):
    with pytest.raises(SystemExit, match=r"clinc150_minilm\.npz is missing: CLINC150 \(github.*makes it"):
        bench.tasks.clinc_coarse(tmp_path / "nowhere")
    write_data(tmp_path)
    for name, make_task in bench.tasks.TASKS.items():
        task = make_task(tmp_path)
        parts, fine = task[:3], [set(part.fine.tolist()) for part in task[:3]]
        samples = [{tuple(x.flatten()[:400].tolist()) for x in part.x} for part in parts]
        assert not any(a & b for a, b in combinations(samples, 2))
        assert fine[1] == fine[2] if "coarse" in name else not any(a & b for a, b in combinations(fine, 2))
        assert (task.has_coarse_labels, task.views > 1) == ("coarse" in name, name.endswith("views"))
        assert len(task.phase("test")[0].x) == len(task.train.x) + len(task.validation.x)
        assert task.make_network()(task.train.x[:2]).shape == (2, task.embedding_size)


@pytest.mark.parametrize("name", ["cub", "cars196", "sop"])
def test_image_tasks(name, bench, monkeypatch, tmp_path):
    datasets = pytest.importorskip("pytorch_metric_learning.datasets")
    dataset = {"cub": "CUB", "cars196": "Cars196", "sop": "StanfordOnlineProducts"}[name]
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit, match=rf"{dataset} is not in .*{dataset}\('DIR', download=True\)"):
            bench.tasks.IMAGE_TASKS[name](folder)
    Image.new("RGB", (40, 30)).save(tmp_path / "black.png")
    labels = {"train": np.arange(10).repeat(4), "test": np.arange(10, 13).repeat(4)}
    found = {part: SimpleNamespace(paths=[tmp_path / "black.png"] * len(of), labels=of) for part, of in labels.items()}
    monkeypatch.setattr(datasets, dataset, lambda folder, split: found[split])
    task = bench.tasks.IMAGE_TASKS[name](tmp_path)
    assert [len(part.fine.unique()) for part in task[:3]] == [8, 2, 3]
    network = torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten(), torch.nn.Linear(48, 512))
    task = task._replace(make_network=lambda: network, epochs=1, batch_size=8)
    assert 0 <= float(bench.training.run(task, "test", OURS, {"proxies_lr": 0.01}, seed=0)["map_at_r"]) <= 100


def test_chooses_by_the_mean_of_the_validation_seeds(main, bench):
    """The second configuration; the first is best with one seed, the last on the test part."""
    points, of_loss = {100: [9, 5, 0], 101: [0, 5, 1], 102: [0, 5, 1]}, bench.losses.configurations("CosFace", "digits")
    score = lambda settings, seed: points.get(seed, [1, 2, 3])[of_loss.index(settings)] if settings else 0  # noqa: E731
    main.result = lambda loss, settings, phase, seed: (score(settings, seed), "1 2", "")
    main("--task", "digits-coarse", "--losses", "CosFace", "--tables", "best here")
    assert [run[1:] for run in main.runs if run[2] == "test" and run[1]] == [(of_loss[1], "test", s) for s in (0, 1)]


def test_goes_on_from_the_rows_that_are_there(main, bench, tmp_path):
    path, arguments = tmp_path / "omniglot-coarse.csv", ("--task", "omniglot-coarse", "--losses", "SoftTriple", OURS)
    main(*arguments)
    lines = path.read_text().splitlines(keepends=True)
    assert len(main.runs) == len(lines) - 1
    path.write_text("".join(lines[:3] + lines[4:]))
    few = json.loads(bench.losses.FILE.read_text())
    other_order = {name: [dict(reversed(of_one.items())) for of_one in (of[0], *of[:0:-1])] for name, of in few.items()}
    bench.losses.FILE.write_text(json.dumps(other_order))
    main(*arguments)
    assert len(main.runs) == 1
    assert path.read_text().splitlines(keepends=True)[:-1] == [*lines[:3], *lines[4:]]


def test_what_runs_where(main, bench):
    for loss, part in (("MaskCon", "views"), ("MultiProxyEntropy, K=1", "unseen")):
        assert all(bench.selection.applies(loss, task) == (part in task) for task in bench.tasks.TASKS)
    main("--task", "omniglot-coarse-views", "--losses", OURS, "--tables", "proxies per class")
    assert [run[1]["proxies_per_class"] for run in main.runs if run[1]][-8:] == [30, 50, 75, 100] * 2
    assert all("neighbor_weight" in run[1] for run in main.runs if run[1])


def test_report_pairs_seeds_and_classes_and_names_what_is_open(main, tmp_path):
    """Ours is 1 better for each seed and class: paired, the difference has no spread."""
    main.result = lambda loss, _, phase, seed: (5, f"{9 + 40 * seed + (loss == OURS)} {80 + (loss == OURS)}", "")
    main("--task", "clinc-coarse", "--losses", OURS, "SoftTriple", "CosFace", "--tables", "defaults", "--report")
    expected = "| clinc-coarse | SoftTriple: 54.5 (5 of 7 peers open) | 55.5 | +1.0 (+1.0 to +1.0) | 1.02 |"
    assert expected in (tmp_path / "tables.md").read_text()
    path = tmp_path / "clinc-coarse.csv"
    path.write_text(
        "".join(x for x in path.read_text().splitlines(keepends=True) if ",test,SoftTriple," not in x or ",0,5," in x)
    )
    main("--report")
    assert "| clinc-coarse | CosFace: 54.5 (6 of 7 peers open) |" in (tmp_path / "tables.md").read_text()


def test_choice_by_agreement(main, bench, tmp_path):
    """The second configuration assigns alike with both seeds, up to the names of proxies; the others do not."""
    of_loss = bench.losses.configurations(OURS, "omniglot-coarse")
    words = {100: ["0" * 50 + "1" * 50] * 3, 101: ["01" * 50, "Z" * 50 + "a" * 50, "5" * 100]}
    word = lambda settings, seed: words[seed][of_loss.index(settings)] if seed in words else "1"  # noqa: E731
    main.result = lambda _, settings, phase, seed: (5, "1 2", f"{word(settings, seed)} {'0' * 100}")
    main("--task", "omniglot-coarse", "--losses", OURS, "--tables", "by agreement")
    assert [run[1] for run in main.runs if run[2] == "test" and run[1]] == [of_loss[1]] * 2
    runs = bench.runs.Runs("omniglot-coarse", None, tmp_path)
    assert bench.selection.agreements(runs, OURS) == pytest.approx([0, np.log(2) / 2, 0], abs=0.02)


def test_interval_is_over_seeds_and_classes(bench):
    for values, error in ((np.arange(20), 5.77 / 20**0.5), (np.arange(5)[:, None], 1.41 / 5**0.5)):
        low, high = bench.selection.interval(np.zeros((5, 20)) + values)
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_committed_results_are_of_settings_that_are_looked_up(bench):
    of, keys = bench.losses, set()
    for task in bench.tasks.TASKS:
        known = {name: [*of.configurations(name, task), *of.proxy_counts(name, task).values()] for name in of.FAMILIES}
        known |= {name: known[name] + of.candidates(name, task) for name in of.COMPARED_BY_AGREEMENT}
        for line in csv.DictReader((RESULTS / f"{task}.csv").read_text(encoding="utf-8").splitlines()):
            settings = of.from_text(line["settings"])
            assert line["loss"] == of.UNTRAINED or settings in known[line["loss"]]
            keys.add((task, line["phase"], line["loss"], frozenset(settings.items()), line["seed"]))
    assert len(keys) == sum(len((RESULTS / f"{task}.csv").read_text().splitlines()) - 1 for task in bench.tasks.TASKS)


@pytest.mark.slow
def test_committed_tables_are_those_of_the_committed_results(bench, tmp_path):
    for path in RESULTS.glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    bench.command.main(["--report", "--out", str(tmp_path)])
    assert (tmp_path / "tables.md").read_text() == (RESULTS / "tables.md").read_text()
