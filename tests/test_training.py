"""The training loop against closed forms, and ensembles against networks trained alone."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from companion import models, training


def test_gradient_descent_on_a_parabola_follows_the_closed_form():
    x = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    history = training.fit(
        lambda step: 0.5 * x.square().sum(),
        [x],
        steps=20,
        lr=0.1,
        optimizer=torch.optim.SGD,
        record=lambda: {"x": x.clone()},
        record_every=5,
    )
    assert history["step"].tolist() == [0, 5, 10, 15, 20]
    torch.testing.assert_close(history["x"][:, 0], 3 * 0.9 ** history["step"].double())
    # The recorded loss is the one that the last step saw.
    assert history["loss"][1].item() == pytest.approx(0.5 * (3 * 0.9**4) ** 2)


def test_cosine_schedule_ends_at_its_fraction():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    history = training.fit(
        lambda step: x.sum(), [x], steps=50, lr=1.0, optimizer=torch.optim.SGD, cosine_to=0.1,
        record=lambda: {"x": x.clone()},
    )  # fmt: skip
    rates = -history["x"][:, 0].diff()
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 50)) / 2 for step in range(50)]
    torch.testing.assert_close(rates, torch.tensor(expected, dtype=torch.float64))


def test_a_schedule_of_ones_own_takes_the_place_of_the_cosine():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    history = training.fit(
        lambda step: x.sum(), [x], steps=6, lr=1.0, optimizer=torch.optim.SGD, record=lambda: {"x": x.clone()},
        schedule=partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2, 4], gamma=0.1),
    )  # fmt: skip
    expected = torch.tensor([1, 1, 0.1, 0.1, 0.01, 0.01], dtype=torch.float64)
    torch.testing.assert_close(-history["x"][:, 0].diff(), expected)


@pytest.mark.parametrize("members", [(), (3,)])
def test_gradients_are_clipped_as_by_pytorch_and_for_each_member_by_itself(generator, members):
    slope = torch.randn(*members, 4, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(4)
    x = torch.zeros_like(slope, requires_grad=True)
    options = dict(steps=1, lr=1.0, optimizer=torch.optim.SGD, clip=20.0)
    training.fit(lambda step: (slope * x).sum(-1), [x], **options)
    for row, gradient in zip(x.reshape(-1, 4), slope.reshape(-1, 4), strict=True):
        alone = torch.zeros(4, dtype=torch.float64)
        alone.grad = gradient.clone()
        nn.utils.clip_grad_norm_([alone], 20.0)
        torch.testing.assert_close(-row, alone.grad, rtol=1e-6, atol=0)


def test_an_ensemble_takes_several_inputs(generator):
    class Difference(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(weight))

        def forward(self, x, y):
            return self.weight * x - y

    ensemble = training.Ensemble([Difference(1.0), Difference(2.0)])
    x, y = torch.randn(2, 5, generator=generator)
    assert torch.equal(ensemble(x, y), torch.stack([x - y, 2 * x - y]))
    assert torch.equal(ensemble.each(torch.stack([x, y]), torch.stack([y, x])), torch.stack([x - y, 2 * y - x]))


def test_ensemble_trains_each_member_as_if_it_were_alone(generator):
    x, y = torch.randn(30, 4, generator=generator), torch.randn(30, 2, generator=generator)

    def network(seed):
        return models.mlp([4, 8, 2], generator=torch.Generator().manual_seed(seed))

    ensemble = training.Ensemble([network(seed) for seed in range(3)])
    together = training.fit(
        lambda step: (ensemble(x) - y).square().mean((1, 2)), ensemble.parameters.values(), steps=40, lr=1e-2
    )
    for seed in range(3):
        alone = network(seed)
        history = training.fit(partial(lambda step, net: (net(x) - y).square().mean(), net=alone), alone.parameters(),
                               steps=40, lr=1e-2)  # fmt: skip
        torch.testing.assert_close(together["loss"][:, seed], history["loss"])
        torch.testing.assert_close(ensemble(x)[seed], alone(x))


def test_members_see_inputs_of_their_own_and_leave_the_ensemble_as_copies(generator):
    networks = [
        nn.Sequential(models.mlp([3, 4], generator=torch.Generator().manual_seed(seed)), nn.BatchNorm1d(4))
        for seed in range(2)
    ]
    ensemble, alone = training.Ensemble(deepcopy(networks)), networks[1]
    x = torch.randn(2, 10, 3, generator=generator)
    ensemble.train()
    torch.testing.assert_close(ensemble.each(x)[1], alone.train()(x[1]))
    ensemble.train(False)
    torch.testing.assert_close(ensemble.each(x)[1], alone.eval()(x[1]))  # with the statistics that training left
    copy = ensemble.members()[1]
    torch.testing.assert_close(copy(x[1]), alone(x[1]))
    copy[0][0].weight.data.zero_()
    torch.testing.assert_close(ensemble.each(x)[1], alone(x[1]))


@given(st.integers(1, 40), st.data())
def test_an_epoch_of_minibatches_holds_each_sample_at_most_once(n_samples, data):
    batch_size = data.draw(st.integers(1, n_samples))
    batches = training.minibatches(n_samples, batch_size, torch.Generator().manual_seed(0))
    epoch = torch.cat([next(batches) for _ in range(n_samples // batch_size)])
    assert len(epoch.unique()) == len(epoch) == n_samples // batch_size * batch_size
    assert next(batches).max() < n_samples


def test_bad_input_is_named():
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="steps=0"):
        training.fit(lambda step: x.sum(), [x], steps=0, lr=0.1)
    with pytest.raises(ValueError, match="lr=-1"):
        training.fit(lambda step: x.sum(), [x], steps=1, lr=-1)
    with pytest.raises(ValueError, match="clip=0"):
        training.fit(lambda step: x.sum(), [x], steps=1, lr=0.1, clip=0)
    with pytest.raises(FloatingPointError, match="try a smaller lr than 10"):
        training.fit(lambda step: (x**4).sum(), [x], steps=100, lr=10, optimizer=torch.optim.SGD)
    with pytest.raises(ValueError, match="batch_size must be between 1 and n_samples=5, got 6"):
        next(training.minibatches(5, 6, torch.Generator()))
    with pytest.raises(ValueError, match="networks is empty"):
        training.Ensemble([])
