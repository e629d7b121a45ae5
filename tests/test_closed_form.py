"""center and scaled_sgd against a model whose training is known in closed form: the diagonal network
f(x) = sum_i a_i b_i x_i, a = b = sqrt(s0) at the start, orthogonal inputs, loss sum_i lambda_i (theta_i - f_i)^2 / 2.

With S = a b and a = b throughout, d loss / d a_i = -alpha lambda_i (theta_i - alpha (S_i - s0)) b_i, so that a step at
lr / alpha^2 multiplies a and b by 1 + lr lambda (S* - S), S* = s0 + theta / alpha. In continuous time dS/dt =
2 lambda S (S* - S), a logistic curve: the share learnt is p = (1 - d) / (1 + kappa d), d = exp(-2 lambda s0 (1 + kappa)
t), kappa = theta / (alpha s0); at alpha = inf p = 1 - exp(-2 lambda s0 t)."""
import math

import numpy as np
import pytest
import torch
from torch import nn

import common

THETA = torch.tensor([1.0, .3, .2], dtype=torch.float64)
LAMBDA = torch.tensor([1.0, 2.0, .5], dtype=torch.float64)
S0 = .1


class Diagonal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.full((3,), S0**.5, dtype=torch.float64))
        self.b = nn.Parameter(torch.full((3,), S0**.5, dtype=torch.float64))

    def forward(self, x):
        return x * (self.a * self.b)  # row i of x = identity sees direction i alone; (N, 3)


def loss_of(f, theta=THETA):
    return (LAMBDA * (theta - f.diagonal())**2).sum() / 2


def trained(f, optimizer, steps, theta=THETA):
    """f after some steps, its outputs (3,) in each direction at each step: (steps, 3)."""
    x, path = torch.eye(3, dtype=torch.float64), []
    for _ in range(steps):
        out = f(x)
        path.append(out.detach().diagonal().clone())
        optimizer.zero_grad()
        loss_of(out, theta).backward()
        optimizer.step()
    return torch.stack(path)


def recursion(alpha, lr, steps, momentum=0.0):
    """The same by hand: the factors a = b, or at alpha = inf what is left of each direction."""
    a, velocity, path = torch.full_like(THETA, S0**.5), torch.zeros_like(THETA), []
    delta, speed = torch.zeros_like(THETA), torch.zeros_like(THETA)
    for _ in range(steps):
        if alpha == math.inf:  # f = 2 sqrt(s0) delta, for both factors move alike
            path.append(2 * S0**.5 * delta)
            speed = momentum * speed - LAMBDA * (THETA - path[-1]) * S0**.5
            delta = delta - lr * speed
        else:
            path.append(alpha * (a**2 - S0))
            velocity = momentum * velocity - LAMBDA * (S0 + THETA / alpha - a**2) * a  # alpha^2 / alpha^2
            a = a - lr * velocity
    return torch.stack(path)


@pytest.mark.parametrize("momentum", [0.0, .9])
@pytest.mark.parametrize("alpha", [.1, 1, 100, math.inf])
def test_gradient_descent_is_the_recursion(alpha, momentum):
    lr = .02 if alpha >= 1 else .002
    f = common.center(Diagonal(), alpha)
    path = trained(f, common.scaled_sgd(f, lr, momentum), 200)
    assert (path - recursion(alpha, lr, 200, momentum)).abs().max() < 1e-12
    assert (path[-1] / THETA).min() > .01  # something has been learnt


def test_small_steps_follow_the_logistic_curve():
    lr, steps = 2e-3, 1500
    t = lr * np.arange(steps)[:, None]
    for alpha in (1, 10, math.inf):
        f = common.center(Diagonal(), alpha)
        share = (trained(f, common.scaled_sgd(f, lr), steps) / THETA).numpy()
        kappa = (THETA / (alpha * S0)).numpy()
        d = np.exp(-2 * LAMBDA.numpy() * S0 * (1 + kappa) * t)
        assert abs(share - (1 - d) / (1 + kappa * d)).max() < 5e-4


@pytest.mark.parametrize("momentum", [0.0, .9])
@pytest.mark.parametrize("alpha", [.5, 8, 1024])
def test_alpha_is_a_scale_of_the_targets_bit_for_bit(alpha, momentum):
    """Under squared loss (f^alpha, targets y, lr / alpha^2) and (f^1, targets y / alpha, lr) move theta alike."""
    scaled, plain = common.center(Diagonal(), alpha), common.center(Diagonal(), 1)
    trained(scaled, common.scaled_sgd(scaled, .02, momentum), 100)
    trained(plain, common.scaled_sgd(plain, .02, momentum), 100, THETA / alpha)
    assert torch.equal(scaled.model.a, plain.model.a) and not torch.equal(scaled.model.a, scaled.model0.a)
