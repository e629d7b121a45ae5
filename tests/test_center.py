"""The centred model and its optimizer, in float64 against hand-made gradients, finite differences and closed forms."""
import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import experiment
from conftest import ROOT, Square, jacobian, refused
from test_ntk import IMAGE, RIGHT, SEQUENCE, TOKENS, VECTOR, Net, conv_net, example, lin, seq

pytestmark = pytest.mark.filterwarnings("ignore")


def network():
    return common.mlp([5, 16, 16, 3]).double()


def batch(seed=1, n=12):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(tensors):
    return torch.cat([t.to_dense().flatten() for t in tensors])


def test_common_py_imports_torch_alone():
    """And the standard library's contextlib, copy and math: one file that can be copied anywhere."""
    modules = re.findall(r"^ *(?:import|from) (\w+)", (ROOT / "common.py").read_text(), re.M)
    assert set(modules) == {"contextlib", "copy", "math", "torch"}


@pytest.mark.parametrize("alpha", [.5, 1, np.float32(2), np.int64(3), torch.tensor(100.0), math.inf])
def test_zero_at_initialisation_though_the_network_changes_its_input(alpha):
    f = common.center(seq(nn.ReLU(inplace=True), network()), alpha)
    x = batch()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert torch.equal(f(x), torch.zeros(12, 3, dtype=torch.float64)) and torch.equal(x, batch())


def test_cached_f0_is_zero_within_rounding_and_gives_the_same_gradient():
    x = batch(n=50).float()
    f = common.center(common.mlp([5, 64, 64, 3]), 100)
    f0 = torch.cat([f.model0(x[:7]), f.model0(x[7:])])
    assert f(x, f0).abs().max() < 1e-3
    f, x = f.double(), x.double()
    assert torch.allclose(f(x, f.model0(x)), f(x), atol=1e-12)
    cached, again = (torch.autograd.grad(out.sum(), f.model.parameters()) for out in (f(x, f.model0(x)), f(x)))
    assert torch.equal(flat(cached), flat(again)) and all(g.any() for g in cached)
    refused("shape", f, x, f.model0(x)[:, :1])  # (50, 1) against (50, 3) would broadcast


@pytest.mark.parametrize("alpha", [0, -1, math.nan, -math.inf, "1", "abc", None, True, [1], 1e200])
def test_bad_alpha(alpha):
    refused("alpha must be", common.center, network(), alpha)


@pytest.mark.parametrize("lr, momentum", [(0, 0), (-1, 0), (math.nan, 0), (math.inf, 0), (.1, 1), (.1, -.1)])
def test_bad_learning_rate(lr, momentum):
    refused("lr must be", common.scaled_sgd, common.center(network(), 1), lr, momentum)


def test_scaled_sgd_without_center_says_so():
    for model in (network(), nn.ELU(2.0)):  # ELU has an alpha of its own
        refused("center", common.scaled_sgd, model, .1)


def recurrent(kind, inputs, *sizes, **options):
    r = kind(inputs, *sizes, batch_first=True, **options)
    return Net(lambda f, x: f.r(x.view(len(x), -1, inputs))[0].flatten(1), r=r)


BY_NAME = [
    lambda: nn.BatchNorm1d(16), lambda: nn.BatchNorm1d(16, track_running_stats=False), lambda: nn.Dropout(.5), nn.RReLU,
    type("DropPath", (nn.Identity,), {}), lambda: pytest.importorskip("torchvision").ops.StochasticDepth(.2, "row"),
    lambda: nn.utils.parametrizations.spectral_norm(lin(16, 16))]
BY_VALUE = [lambda: Net(lambda f, x: F.dropout(x, .5, f.training)), lambda: recurrent(nn.LSTM, 4, 4, 2, dropout=.5)]


@pytest.mark.parametrize("make", BY_NAME + BY_VALUE)
@pytest.mark.parametrize("alpha", [1, math.inf])
def test_networks_that_depend_on_chance_or_batch_are_refused(make, alpha):
    """Before they are called, if a layer's name tells; and again as soon as somebody has written train()."""
    model, x = seq(lin(5, 16), make(), lin(16, 3)).double().train(), batch()
    says = "training mode" if make in BY_NAME else "computed twice"
    for call in [lambda: common.center(model, alpha)(x), lambda: common.empirical_ntk(model, x)]:
        refused(says, call)
    if make in BY_NAME:
        refused(says, common.center, model, alpha)
    if getattr(model[1], "track_running_stats", True):  # else it mixes the batch in eval mode as well
        f = common.center(model.eval(), alpha)
        for part in (f, f.model, f.model0):
            assert not f(x).any()
            part.train()
            refused(says, f, x)
            f.eval()


@pytest.mark.parametrize("alpha", [1, math.inf])
@pytest.mark.parametrize("forward, says", [
    (lambda f, x: (f.a(x), x), "one tensor of real numbers"), (lambda f, x: f.a(x) * 1j, "one tensor of real numbers"),
    (lambda f, x: f.a(x).sum(), "row for each"), (lambda f, x: f.a(x) + f.calls.add_(1), "computed twice"),
    (lambda f, x: torch.cat([f.a(x[:5]), F.dropout(f.a(x[5:9])), f.a(x[9:])]), "computed twice"),
    (lambda f, x: f.a(x - x.mean(0)), "other examples"), (lambda f, x: f.a(x.cumsum(0)), "other examples")])
def test_networks_that_have_no_f_alpha_are_refused(forward, says, alpha):
    """The last: an example sees those before it, as in a GRU whose batch_first was forgotten."""
    refused(says, common.center(Net(forward, a=lin(5, 3), calls=torch.zeros(())).double(), alpha), batch())


def test_attention_is_computed_alike_with_gradients_and_without():
    """torch's inference shortcut is off: it rounds otherwise, and zeroes what is masked."""
    torch.backends.mha.set_fastpath_enabled(True)
    model = Net(lambda f, x: f.a(x, src_key_padding_mask=(torch.arange(4) == 3).expand(len(x), 4)),
                a=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)).eval()
    f, x = common.center(model, 10), torch.randn(SEQUENCE)
    with torch.no_grad():
        f0 = f.model0(x)
    assert f(x, f0).abs().max() < 1e-4


@pytest.mark.parametrize("alpha, cached", [(3.0, False), (3.0, True), (math.inf, False)])
def test_gradient_in_x_against_finite_differences(alpha, cached):
    x = batch().requires_grad_()
    f = common.center(network(), alpha)
    f0 = f.model0(x).detach() if cached else None
    assert not torch.autograd.grad(f(x, f0).sum(), x)[0].any()  # 0 at initialisation
    for p in f.parameters():
        p.data += .1 * p.requires_grad
    gradient, = torch.autograd.grad((f(x, f0)**2).sum(), x)
    direction = batch(seed=2)
    with torch.no_grad():
        up, down = ((f(x + e * direction)**2).sum() for e in (1e-6, -1e-6))
    assert math.isclose((up - down).item() / 2e-6, (gradient * direction).sum().item(), rel_tol=1e-6)


LINEAR = {name: case for name, case in RIGHT.items() if "weight norm" not in name and "hook" not in name} | {
    "detach": (lambda: Net(lambda f, x: f.a(x).tanh() * f.a(x).detach(), a=lin()), VECTOR),
    "data": (lambda: Net(lambda f, x: f.a(x).tanh() + f.a(x).data**2, a=lin()), VECTOR),
    "GELU, LayerNorm": (lambda: seq(lin(8, 6), nn.LayerNorm(6), nn.GELU(), lin(6, 2)), SEQUENCE),
    "attention": (lambda: Net(lambda f, x: f.a(x, x, x)[0], a=nn.MultiheadAttention(8, 2, batch_first=True)), SEQUENCE),
    "LSTM": (lambda: recurrent(nn.LSTM, 8, 5), SEQUENCE),
    "GRU": (lambda: recurrent(nn.GRU, 8, 5), SEQUENCE),
    "group norm": (lambda: conv_net(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)), IMAGE),
    "orthogonal": (lambda: seq(nn.utils.parametrizations.orthogonal(lin(5, 5)), lin(5, 2)), VECTOR)}


@pytest.mark.parametrize("name", LINEAR)
def test_alpha_inf_is_the_jacobian_of_autograd_times_delta(name):
    model, x = example(*LINEAR[name])
    f, theta = common.center(model, math.inf), copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        assert not f(x).any()
    for d in f.delta:
        d.data.normal_()
    J, out = jacobian(model, x).flatten(0, 1), f(x)
    assert torch.allclose(out.flatten(), J @ flat(f.delta), rtol=1e-9, atol=1e-11)
    slope = torch.randn(out.shape, dtype=out.dtype)
    gradients = torch.autograd.grad(out, list(f.delta), slope, materialize_grads=True)
    assert torch.allclose(flat(gradients), J.T @ slope.flatten(), rtol=1e-9, atol=1e-11)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.allclose(f(x), out) and not f(x).requires_grad
    assert all(torch.equal(value, theta[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("make", [
    nn.GLU, nn.Hardsigmoid, lambda: nn.utils.parametrizations.weight_norm(lin(4, 4)),
    lambda: Net(lambda f, x: Square.apply(x)), lambda: Net(lambda f, x: torch.no_grad()(f.a)(x) + x, a=lin(4, 4)),
    lambda: recurrent(nn.LSTM, 4, 4)])
def test_what_cannot_be_linearised_is_refused_at_inf_and_trains_all_the_same(make, capsys):
    """At a finite alpha the measure is left out, and that is said once."""
    model, x = seq(lin(5, 4), make(), nn.LazyLinear(2)), torch.randn(6, 5)
    model(x)
    refused("the network cannot be linearised: .*; use a large alpha", common.center(model, math.inf), x)
    f = common.center(model, 2.0)
    measure = experiment.linearity(f, x)
    for measured in (measure(), measure()):
        assert "linearisation_error" not in measured and measured["ntk_alignment"] == pytest.approx(1)
    assert capsys.readouterr().out.count("linearisation_error is not measured: the network cannot be linearised") == 1
    f(x).sum().backward()
    assert model[0].weight.grad.any()


def mixed():
    """Complex numbers, and two precisions."""
    model = Net(lambda f, x: f.a((x.to(torch.cfloat) @ f.w).real.double()), a=lin(2, 2))
    model.w = nn.Parameter(torch.randn(5, 2, dtype=torch.cfloat))
    return model


TRAINED = {name: case for name, case in RIGHT.items() if name != "weight norm, old"} | {
    "mixed": (mixed, VECTOR), "renormalised": (lambda: seq(nn.Embedding(11, 4, max_norm=.5), nn.Flatten()), TOKENS)}


@pytest.mark.parametrize("name", TRAINED)
def test_trains_as_plain_sgd_on_the_objective_written_out(name):
    """At lr / alpha^2, with momentum, and to the same weights."""
    (model, x), (by_hand, _), (theta0, _) = [example(*TRAINED[name]) for _ in range(3)]
    f, plain = common.center(model, 3.0), torch.optim.SGD(by_hand.parameters(), .1 / 9, .9)
    for optimizer, output in [(common.scaled_sgd(f, .1, .9), f),
                              (plain, lambda x: 3 * (by_hand(x.clone()) - theta0(x).detach()))]:
        for _ in range(3):
            optimizer.zero_grad()
            ((output(x.clone()) - 1)**2).mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), by_hand.state_dict())
    assert not torch.equal(flat(model.parameters()), flat(theta0.parameters()))


def test_resnet_is_torchvisions_without_batch_norm():
    torchvision = pytest.importorskip("torchvision")
    ours = common.resnet18(10)
    assert sum(p.numel() for p in ours.parameters()) == 11_176_842
    theirs = torchvision.models.resnet18(num_classes=10, norm_layer=lambda channels: nn.Identity())
    for m in theirs.modules():  # give theirs the biases that its batch norm would have had
        if isinstance(m, nn.Conv2d):
            m.bias = nn.Parameter(torch.zeros(m.out_channels))
    theirs.load_state_dict({k.replace("downsample.", "downsample.0."): v for k, v in ours.state_dict().items()})
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert math.isclose(ours.layer2[0].conv1.weight.std(), math.sqrt(2 / (128 * 9)), rel_tol=.02)  # He-normal, fan-out
