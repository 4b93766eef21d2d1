"""What the fuzz does with a case, and how it compares the outcome with the reference."""

import copy
import random
from dataclasses import replace

import fuzz_reference as reference
import pytest
import torch
from cases import memory_full_of_nan
from fuzz_cases import Drawn
from pytorch_metric_learning import reducers
from torch.utils.checkpoint import checkpoint

EXACT = 1e-9
"""In float64: the largest error of a gradient, relative to its largest component, beside what rounding explains."""

TIMES_PLAIN = 50, 50
"""How many times as large as that of plain autograd, or as the change by inputs that are a unit of rounding off, an
error may be, and in float32 how many units of rounding beside. Under autocast, a fifth of that."""


def autocast(case, enabled):
    return torch.autocast("cpu", case.autocast_dtype, enabled)


# The reference on a case.


class Evaluated:
    """The reference on what a loss was just called with, in some dtype: loss and gradients."""

    def __init__(self, drawn, similarity, dtype, noise=0.0, seed=0):
        """With ``noise``, on inputs and similarities that are off by so much, relatively."""
        case, usage = drawn.case, drawn.loss_func.proxy_usage
        generator = torch.Generator().manual_seed(seed)

        def noisy(values):
            if not noise:
                return values
            return values * (1 + noise * torch.randn(values.shape, dtype=dtype, generator=generator))

        with torch.enable_grad():
            source = drawn.source.detach().to(dtype).requires_grad_()
            proxies = drawn.current_proxies().detach().to(dtype).requires_grad_()
            parameters = [leaf.detach().to(dtype).requires_grad_() for leaf in drawn.distance_leaves]
            embeddings, labels = drawn.view(source), drawn.labels.long().clone()
            self.s = similarity(noisy(embeddings), noisy(proxies.flatten(0, 1)), *parameters).to(dtype)
            self.s = noisy(self.s).view(len(labels), case.num_classes, case.per_class)
            self.losses = reference.losses(self.s, labels, usage, case.settings)
            weighted = self.losses * reference.mined_weights(drawn.mined, len(labels), dtype)
            self.loss = reference.reduce(case.reducer, weighted, labels, drawn.class_weights)
            self.loss = self.loss + regularization(case, embeddings, proxies)
            self.q = reference.assignment(self.s, labels, case.settings)
            inputs = [source, proxies, *parameters]
            total = self.loss + (0.1 * source.square().mean() if case.alias else 0)
            self.gradients = pull_back(drawn, gradients_of(total, inputs))
            weights = torch.randn(self.s.shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
            count = 1 if case.reducer == "sum" else max(len(labels), 1)
            unit = (case.scale + 1 / case.temperature) / count
            # A gradient of zero is what remains of slopes like these, or of ones that no length takes away.
            slopes = gradients_of(unit * (self.s * weights).sum(), inputs)
            least = [1e-3 * unit / max(largest(values), 1e-3) for values in inputs]
            names = ["embeddings", "proxies", *(f"distance {i}" for i in range(len(parameters)))]
            self.units = dict(
                zip(names, [max(largest(s), low) for s, low in zip(slopes, least, strict=True)], strict=True)
            )
            # How much of that unit the gradient of a similarity is.
            self.part = min(max(largest(*gradients_of(total, [self.s])) / unit, 1e-2), 1.0)


def gradients_of(value, inputs):
    return torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)


def regularization(case, embeddings, proxies):
    total = 0
    if case.weight_regularizer == "length":
        total = total + 0.3 * reference.mean_length(proxies.flatten(0, 1))
    if case.weight_regularizer == "entropy":
        total = total + 0.3 * reference.proxy_entropy(proxies, temperature=0.5)
    if case.embedding_regularizer:
        total = total + 0.2 * reference.mean_length(embeddings)
    return total


def pull_back(drawn, gradients):
    """By name, also those of the leaves that proxies are computed from."""
    of_source, of_proxies, *of_parameters = gradients
    proxies = drawn.current_proxies()
    named = {"embeddings": of_source, "proxies": of_proxies}
    named |= {f"distance {i}": gradient for i, gradient in enumerate(of_parameters)}
    if proxies.requires_grad:
        of_leaves = torch.autograd.grad(proxies, drawn.proxy_leaves, of_proxies.to(proxies.dtype))
        named |= {f"proxies {i}": gradient for i, gradient in enumerate(of_leaves)}
    return {name: gradient.double() for name, gradient in named.items()}


def plain(drawn):
    """The similarity by PML's distance itself, as it rounds, called on as many classes at a time as the loss does.

    Each call normalizes anew: what normalizing takes away of a gradient leaves its rounding in each.
    """
    case, distance = drawn.case, drawn.loss_func.distance

    def similarity(x, w, *parameters):
        names = [name for name, _ in distance.named_parameters()]
        lent = dict(zip(names, parameters, strict=True))
        some = torch.split(w, (case.per_chunk or case.num_classes) * case.per_class)
        with autocast(case, case.rounded), torch.enable_grad():
            values = torch.cat([torch.func.functional_call(distance, lent, (x, part)) for part in some], dim=1)
        return values if distance.is_inverted else -values

    return similarity


class Expected:
    """What a call should give: made right after it, when the usage is that which it used."""

    def __init__(self, drawn):
        self.case, self.drawn = drawn.case, drawn
        self.exact = Evaluated(drawn, drawn.kind.similarity, torch.float64)
        # As rounding alone may have it: for inputs that are a little off, and by plain autograd.
        seeds = (1,) if self.case.dtype == torch.float64 else (1, 2)
        self.rounded = [Evaluated(drawn, drawn.kind.similarity, torch.float64, self.eps, seed) for seed in seeds]
        if self.case.dtype == torch.float32:
            # By chance, one evaluation may leave exactly nothing of what normalizing takes away of a gradient.
            self.rounded.append(Evaluated(drawn, plain(drawn), torch.float32))
            self.rounded += [Evaluated(drawn, plain(drawn), torch.float32, self.eps, seed) for seed in (3, 4)]
        # Products of long vectors round by their own size, also where their sum is small.
        errors = [largest(rounded.s - self.exact.s) for rounded in self.rounded]
        self.largest = max(largest(self.exact.s), max(errors) / self.eps)

    @property
    def eps(self):
        return torch.finfo(self.case.autocast_dtype if self.case.rounded else self.case.dtype).eps

    def allowed(self, value_of, scale):
        """How far from the exact value one may be that ``value_of`` takes from an evaluation of the reference."""
        exact = value_of(self.exact).detach()
        error = max(largest(value_of(rounded).detach() - exact) for rounded in self.rounded)
        times, units = TIMES_PLAIN
        if self.case.dtype == torch.float64:
            exponents = self.eps * self.largest * max(self.case.scale, 1 / self.case.temperature)  # round by their size
            return times * error + (EXACT + 4 * exponents) * scale
        return (times * error + units * self.eps * scale) / (5 if self.case.rounded else 1)

    def check_loss(self, loss):
        exact = self.exact.loss.detach()
        if self.case.reducer not in ("positive", "divisor"):  # where nothing is left, PML's zero is of the embeddings
            assert loss.dtype == self.case.dtype, f"the loss is of {loss.dtype}"
        if self.is_clear:
            scale = max(1.0, largest(exact))
            assert_near("loss", loss, exact, self.allowed(lambda evaluated: evaluated.loss, scale))

    def check_usage(self, before, moves):
        usage = self.drawn.loss_func.proxy_usage
        assert usage.dtype == torch.float32
        if not moves:
            assert usage.equal(before), "usage moved"
            return
        labels = self.drawn.labels.long()
        expected = reference.moved_usage(before, self.exact.q, labels, self.case.momentum)
        assert_near("usage", usage, expected, self.allowed_usage)

    @property
    def allowed_usage(self):
        return 3e-6 + 8 * self.eps * self.largest / self.case.temperature

    @property
    def is_clear(self):
        """Whether rounding cannot change which proxy is nearest, a slope at distance 0, or what a reducer drops."""
        if self.drawn.kind.sharp and bool((self.exact.s.detach().abs() < 1e-4 * self.largest).any()):
            return False
        off = 16 * self.eps * self.largest if self.case.dtype == torch.float32 else 0.0
        if self.case.pooling == "max" and self.case.per_class > 1 and len(self.exact.s):
            first, second = self.exact.s.detach().topk(2, dim=2).values.unbind(dim=2)
            if bool(((first - second > 0) & (first - second < off)).any()):
                return False
        slope = max(self.case.scale, 1 / self.case.temperature)
        return self.case.reducer != "positive" or bool((self.exact.losses.abs() > 1e-9 + off * slope).all())

    def of_leaves(self):
        """Name, leaf, exact gradient and what one may be off, of each leaf that gets a gradient."""
        for name, leaf in self.drawn.leaves.items():
            exact = self.exact.gradients[name]
            # A gradient that vanishes is what remains of larger ones.
            behind = "proxies" if name.startswith("proxies") else name
            before = self.exact.part * self.exact.units[behind]
            scale = max(largest(exact), largest(self.exact.gradients[behind]), before)
            allowed = self.allowed(lambda evaluated, name=name: evaluated.gradients[name], scale)
            if leaf.dtype != self.case.dtype:
                allowed += 4 * torch.finfo(leaf.dtype).eps * scale + (1e-6 if leaf.dtype == torch.float16 else 0)
            yield name, leaf, exact, allowed


def largest(values):
    return values.detach().nan_to_num(0.0).abs().max().item() if values.numel() else 0.0


def assert_near(name, actual, expected, allowed):
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{name} is of shape {tuple(actual.shape)}"
    assert actual.isnan().equal(expected.isnan()), f"{name} is NaN elsewhere: {actual}, not {expected}"
    error = largest(actual - expected)
    assert error <= allowed, f"{name} is off by {error:.3g}, allowed are {allowed:.3g}: {actual}, not {expected}"


def check_gradients(*expectations):
    """Of leaves after backward of the sum of some losses; forgets them."""
    if not all(expected.is_clear for expected in expectations):
        return
    sums = {}
    for expected in expectations:
        for name, leaf, exact, allowed in expected.of_leaves():
            _, _, exact_before, allowed_before = sums.get(id(leaf), (name, leaf, 0, 0))
            sums[id(leaf)] = name, leaf, exact_before + exact, allowed_before + allowed
    for name, leaf, exact, allowed in sums.values():
        assert_near(f"gradient of {name}", torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, exact, allowed)
        leaf.grad = None


# A step.


def call(drawn, through=None):
    """The loss, whose value and effects are checked, and what is expected of its gradient."""
    case, usage = drawn.case, drawn.loss_func.proxy_usage.clone()
    batch = drawn.source.detach().clone(), drawn.labels.clone()
    with autocast(case, case.autocast[0]):
        loss = (through or drawn.call)(drawn.embeddings(), drawn.labels, drawn.mined)
    assert drawn.source.detach().equal(batch[0]), "the loss changed the embeddings"
    assert drawn.labels.equal(batch[1]), "the loss changed the labels"
    expected = Expected(drawn)
    expected.check_usage(usage, drawn.loss_func.training and torch.is_grad_enabled())
    expected.check_loss(loss)
    return loss, expected


def backward(drawn, loss, **kwargs):
    total = loss + drawn.alias_term()
    with autocast(drawn.case, drawn.case.autocast[1]):
        if total.requires_grad:
            total.backward(**kwargs)


def check_step(case):
    drawn = Drawn(case)
    loss, expected = call(drawn)
    backward(drawn, loss)
    check_gradients(expected)
    check_statistics(drawn, expected)
    check_logits_and_assignment(drawn, expected)


def check_statistics(drawn, expected):
    case, loss_func = drawn.case, drawn.loss_func
    if not (case.collect_stats and case.batch) or case.rounded:
        return
    usage = loss_func.proxy_usage
    wanted = reference.statistics(expected.exact.s.detach(), drawn.labels.long(), usage, case.settings)
    slope = max(case.scale, 1 / case.temperature)
    for name, value in wanted.items():
        allowed = (1e-5 + 32 * expected.eps * (1 + expected.largest * slope)) * max(1.0, largest(value))
        assert_near(name, torch.tensor(getattr(loss_func, name)), value, allowed)


def check_logits_and_assignment(drawn, expected):
    case, loss_func, s = drawn.case, drawn.loss_func, expected.exact.s.detach()
    usage = loss_func.proxy_usage.clone()
    with torch.no_grad():
        logits = loss_func.get_logits(drawn.embeddings())
    off = 64 * expected.eps * expected.largest
    off_pooled = off * (1 + expected.largest / case.temperature) if case.pooling == "softmax" else off
    wanted = case.scale * reference.pool(s, case.settings)
    assert_near("logits", logits, wanted, case.scale * off_pooled + 64 * expected.eps)
    for labels in (None, drawn.labels):
        classes, proxies = loss_func.assign(drawn.embeddings(), labels)
        if labels is not None:
            assert classes.equal(labels.long())
        chosen = s[torch.arange(case.batch), classes, proxies]
        best = s.flatten(1).amax(dim=1) if labels is None else reference.own(s, labels.long()).amax(dim=1)
        assert bool((best - chosen <= off).all()), "not the nearest proxy"
    assert loss_func.proxy_usage.equal(usage), "usage moved"


# Other ways to use the loss.


def check_sequence(case):
    """Steps of an optimizer in changing modes: usage and parameters stay with those of the reference."""
    rng = random.Random(case.seed)
    drawn = Drawn(replace(case, autocast=(False, False), wants="all"))
    restart(drawn, rng.choice(["", "copied", "loaded", "assigned"]))
    leaves = drawn.proxy_leaves + drawn.distance_leaves
    twins = [leaf.detach().double().clone() for leaf in leaves]
    rate, keeps = 0.02 / (case.scale + 1 / case.temperature), 0.9
    optimizers = [torch.optim.SGD(parameters, lr=rate, momentum=keeps) for parameters in (leaves, twins)]
    own_usage, allowed_usage = drawn.loss_func.proxy_usage.double(), 0.0
    allowed_velocity, allowed_step = [0.0] * len(leaves), [0.0] * len(leaves)
    for _ in range(6):
        drawn.draw_batch()
        drawn.set_requires_grad()
        mode = rng.choice(["train", "train", "eval", "no_grad"])
        drawn.loss_func.train(mode != "eval")
        with torch.set_grad_enabled(mode != "no_grad"):
            loss, expected = call(drawn)
        if mode == "train":
            own_usage = reference.moved_usage(own_usage, expected.exact.q, drawn.labels.long(), case.momentum)
        allowed_usage += expected.allowed_usage
        assert_near("usage over steps", drawn.loss_func.proxy_usage, own_usage, allowed_usage)
        if mode == "no_grad":
            continue
        if not expected.is_clear:
            return
        backward(drawn, loss)
        gradients = {id(leaf): (exact, allowed) for _, leaf, exact, allowed in expected.of_leaves()}
        for i, (leaf, twin) in enumerate(zip(leaves, twins, strict=True)):
            twin.grad, allowed = gradients[id(leaf)]
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # momentum goes on
            # The errors of the gradients add up as the gradients do; each step rounds once more.
            allowed_velocity[i] = keeps * allowed_velocity[i] + allowed
            allowed_step[i] += rate * allowed_velocity[i]
        for optimizer in optimizers:
            optimizer.step()
        for leaf, twin, allowed in zip(leaves, twins, allowed_step, strict=True):
            rounding = 32 * torch.finfo(leaf.dtype).eps * max(1.0, largest(twin))
            assert_near("parameter over steps", leaf, twin, allowed + rounding)
            leaf.grad = None


def restart(drawn, how):
    """Goes on with a copy of the loss."""
    if not how:
        return
    fresh = copy.deepcopy(drawn.loss_func)
    if how != "copied":
        fresh.proxies.data, fresh.proxy_usage = torch.zeros_like(fresh.proxies), torch.zeros_like(fresh.proxy_usage)
        state = {name: value.clone() for name, value in drawn.loss_func.state_dict().items()}
        fresh.load_state_dict(state, assign=how == "assigned")
    drawn.loss_func = drawn.call = fresh
    drawn.current_proxies, drawn.proxy_leaves = lambda: fresh.proxies, [fresh.proxies]


def check_edit(case):
    """Whatever is edited between forward and backward: autograd's error, or the gradient of what forward saw."""
    rng = random.Random(case.seed)
    drawn = Drawn(replace(case, alias=False, wants="all"))
    loss, expected = call(drawn)
    of_leaves = list(expected.of_leaves())
    for target in rng.sample(["embeddings", "labels", "proxies", "distance", "usage", "mined"], rng.choice([1, 1, 2])):
        edit(drawn, target)
    try:
        backward(drawn, loss)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return
    if expected.is_clear:
        for name, leaf, exact, allowed in of_leaves:
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            assert_near(f"after an edit, gradient of {name}", grad, exact, allowed)


@torch.no_grad()
def edit(drawn, target):
    """In place, to other values that are valid, too."""
    case = drawn.case
    if target == "embeddings":
        labels = drawn.labels.clone()
        drawn.source.detach().copy_(torch.randn_like(drawn.source))
        if case.embedding_layout == "labels in the same memory":
            drawn.labels.copy_(labels)
    elif target == "labels" and case.label_layout != "expanded":
        drawn.labels.copy_((drawn.labels.long() + 1) % case.num_classes)
    elif target == "mined" and drawn.mined is not None:
        for indices in drawn.mined:
            indices.copy_((indices + 1) % case.batch)
    elif target == "usage":
        drawn.loss_func.proxy_usage.copy_(torch.rand_like(drawn.loss_func.proxy_usage).softmax(dim=1))
    else:
        leaves = {"proxies": drawn.proxy_leaves, "distance": drawn.distance_leaves}.get(target, [])
        for leaf in leaves:
            leaf.detach().add_(0.5 * torch.randn_like(leaf))


def check_twice(case):
    """Backward twice through one graph, with another call between."""
    drawn = Drawn(case)
    loss, expected = call(drawn)
    backward(drawn, loss, retain_graph=True)
    usage = drawn.loss_func.proxy_usage.clone()
    check_gradients(expected)
    drawn.loss_func.train(not case.training)
    drawn.call(drawn.embeddings(), drawn.labels, drawn.mined)
    drawn.loss_func.proxy_usage = usage
    backward(drawn, loss)
    check_gradients(expected)


def check_several(case):
    """One graph with two batches through one loss, or with one batch through two losses."""
    first = Drawn(case)
    loss, expected = call(first)
    if case.seed % 2:
        second = copy.copy(first)
        second.draw_batch()
        second.set_requires_grad()
    else:
        second = Drawn(replace(case, seed=case.seed + 1))
        second.source, second.view, second.labels = first.source, first.view, first.labels
    other_loss, other_expected = call(second)
    backward(first, loss + other_loss + second.alias_term())
    check_gradients(expected, other_expected)


def check_checkpoint(case):
    """Activation checkpointing around the loss: right, with the usage moved once, or refused with a reason."""
    reentrant = bool(case.seed % 2)
    drawn = Drawn(replace(case, wants="all", autocast=(False, False)))
    usage = drawn.loss_func.proxy_usage.clone()
    try:
        args = drawn.embeddings(), drawn.labels, drawn.mined
        loss = checkpoint(drawn.call, *args, use_reentrant=reentrant)
        backward(drawn, loss)
    except (RuntimeError, ValueError) as error:
        if "checkpoint" not in str(error).lower():
            raise
        if not drawn.loss_func.proxy_usage.equal(usage):  # by forward, which cannot know yet
            Expected(drawn).check_usage(usage, moves=True)
        return
    expected = Expected(drawn)
    expected.check_usage(usage, case.training)
    if not (reentrant and case.training):  # there, forward runs without gradients, and so on the usage as it was
        expected.check_loss(loss)
    check_gradients(expected)


def check_reseed(case):
    """Dead proxies move as documented; then all is as ever."""
    drawn = Drawn(replace(case, training=True, wants="all", autocast=(False, False)), reseed_below=0.5)
    proxies, usage = drawn.loss_func.proxies.detach().clone(), drawn.loss_func.proxy_usage.clone()
    loss = drawn.call(drawn.embeddings(), drawn.labels, drawn.mined)
    moved = check_moves(drawn, proxies, usage)
    expected = Expected(drawn)
    expected.check_usage(reference.reseeded_usage(usage, moved), moves=True)
    expected.check_loss(loss)
    backward(drawn, loss)
    check_gradients(expected)


def check_moves(drawn, before, usage):
    """In each class of the batch with a dead proxy, one such lies on a sample now: those (class, proxy)."""
    case, after = drawn.case, drawn.loss_func.proxies.detach()
    moved = (after != before).any(dim=2).nonzero().tolist()
    dead = usage < 0.5 / case.per_class
    labels, points = drawn.labels.long(), drawn.embeddings().detach()
    if drawn.loss_func.distance.normalize_embeddings:
        points = reference.unit(points)
    assert sorted(c for c, _ in moved) == [c for c in labels.unique().tolist() if dead[c].any()], "not one per class"
    for c, k in moved:
        assert dead[c, k], "a proxy in use moved"
        distance = (points[labels == c] - after[c, k]).abs().amax(dim=1).min()
        assert distance <= 1e-6 * max(1.0, largest(points)), "a proxy moved to where no sample of its class is"
    return moved


def check_not_finite(case):
    """Samples with a row that is not finite neither move the usage nor touch the losses and gradients of others."""
    case = replace(case, mined=None, reducer="mean", wants="all", alias=False, autocast=(False, False))
    case = replace(case, weight_regularizer=None, embedding_regularizer=False, collect_stats=False)
    drawn, rng = Drawn(case, reducer=reducers.DoNothingReducer()), random.Random(case.seed)
    rows = [row for row in range(case.batch) if rng.random() < 0.3]
    with torch.no_grad():
        drawn.source[rows] = float("nan")
    usage = drawn.loss_func.proxy_usage.clone()
    losses = drawn.call(drawn.embeddings(), drawn.labels, None)["loss"]["losses"]
    good = torch.tensor([row for row in range(case.batch) if not is_spoilt(row, rows, case)], dtype=torch.long)
    spoilt = Expected(drawn)
    usable = torch.ones(case.batch, dtype=torch.bool).index_fill(0, torch.tensor(rows, dtype=torch.long), False)
    moves = case.training and bool(usable.any())
    q = torch.where(usable.unsqueeze(1), spoilt.exact.q, torch.nan)
    wanted = reference.moved_usage(usage, q, drawn.labels.long(), case.momentum) if moves else usage
    assert drawn.loss_func.proxy_usage.isfinite().all(), "usage is not finite"
    losses[good].sum().backward()

    only_good = copy.copy(drawn)
    only_good.case = replace(case, reducer="sum")
    only_good.source, only_good.labels = drawn.source.detach()[good].requires_grad_(), drawn.labels[good]
    expected = Expected(only_good)
    assert_near("usage", drawn.loss_func.proxy_usage, wanted, spoilt.allowed_usage)
    if not expected.is_clear:
        return
    exact = expected.exact.losses.detach()
    allowed = expected.allowed(lambda evaluated: evaluated.losses, max(1.0, largest(exact)))
    assert_near("losses of finite samples", losses[good], exact, allowed)
    _, _, exact, allowed = next(expected.of_leaves())
    assert_near("gradient of finite samples", drawn.source.grad[good], exact, allowed)


def is_spoilt(row, rows, case):
    """Whether a view of the same sample is not finite."""
    samples = max(case.batch // case.views, 1)
    return any(other % samples == row % samples for other in rows)


def check_refusal(case):
    """What is not valid raises, and moves nothing."""
    drawn = Drawn(replace(case, training=True))
    before = drawn.loss_func.proxy_usage.clone(), drawn.current_proxies().detach().clone()
    embeddings, labels = drawn.embeddings(), drawn.labels.long()
    past = torch.full_like(labels, case.num_classes)
    refused = [
        (TypeError, (embeddings, labels.float())),
        (TypeError, (embeddings, labels.double())),
        (TypeError, (embeddings, labels.bool())),
        (TypeError, (embeddings.long(), labels)),
        (ValueError, (embeddings, None)),
        (ValueError, (embeddings, torch.zeros(case.batch + 1, dtype=torch.long))),
        (ValueError, (embeddings[:, 1:], labels)),
        (ValueError, (embeddings, labels, (labels[:0],))),
    ]
    if case.batch:
        outside = (torch.tensor([case.batch]),) * 3
        refused += [(ValueError, (embeddings, past)), (ValueError, (embeddings, -1 - labels))]
        refused += [(ValueError, (embeddings, labels, outside))]
    for error, args in refused:
        with pytest.raises(error):
            drawn.call(*args)
    assert drawn.loss_func.proxy_usage.equal(before[0]), "usage moved by a call that was refused"
    assert drawn.current_proxies().equal(before[1]), "proxies moved by a call that was refused"
    drawn.loss_func.eval()
    loss, leaves = drawn.call(embeddings, labels, drawn.mined), list(drawn.leaves.values())
    if leaves and loss.requires_grad:  # plain autograd can differentiate twice
        try:
            torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "create_graph" not in str(error):
                raise


CHECKS = {
    "step": check_step,
    "sequence": check_sequence,
    "edit": check_edit,
    "twice": check_twice,
    "several": check_several,
    "checkpoint": check_checkpoint,
    "reseed": check_reseed,
    "not finite": check_not_finite,
    "refusal": check_refusal,
}


def check(case):
    with memory_full_of_nan():
        CHECKS[case.scenario](case)
