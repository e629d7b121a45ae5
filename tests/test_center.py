"""The centred model and its optimizer, in float64 against hand-made gradients, finite differences and closed forms."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
from conftest import Square, jacobian


def network(outputs=3):
    torch.manual_seed(0)
    return common.mlp([5, 16, 16, outputs]).double()


def batch(seed=1, n=12):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


@pytest.mark.parametrize("alpha", [.5, 1, np.float32(2), np.int64(3), torch.tensor(100.0), math.inf])
def test_zero_at_initialisation_though_the_network_changes_its_input(alpha):
    f = common.center(nn.Sequential(nn.ReLU(inplace=True), network()), alpha)
    x = batch()[0]
    before = x.clone()
    for _ in range(2):
        assert torch.equal(f(x), torch.zeros(12, 3, dtype=torch.float64)) and torch.equal(x, before)
    with torch.no_grad():
        assert not f(x).any()


def test_cached_f0_is_zero_within_rounding_and_gives_the_same_gradient():
    x, y = batch(n=50)
    f = common.center(common.mlp([5, 64, 64, 3]), 100)
    x = x.float()
    f0 = torch.cat([f.model0(x[:7]), f.model0(x[7:])])
    assert f(x, f0).abs().max() < 1e-3
    f, x = f.double(), x.double()
    assert torch.allclose(f(x, f.model0(x)), f(x), atol=1e-12)
    parameters = list(f.model.parameters())
    cached = torch.autograd.grad(f(x, f.model0(x)).sum(), parameters)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(cached, torch.autograd.grad(f(x).sum(), parameters)))


@pytest.mark.parametrize("alpha", [0, -1, math.nan, -math.inf, "1", "abc", None, True, [1], 1e200])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match="alpha must be"):
        common.center(network(), alpha)


@pytest.mark.parametrize("lr, momentum", [(0, 0), (-1, 0), (math.nan, 0), (math.inf, 0), (.1, 1), (.1, -.1)])
def test_bad_learning_rate(lr, momentum):
    with pytest.raises(ValueError):
        common.scaled_sgd(common.center(network(), 1), lr, momentum)


class DropPath(nn.Module):
    """As in timm."""

    def __init__(self, drop_prob=0.):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x


class Thinned(nn.Module):
    def forward(self, x):
        return F.dropout(x, .5, self.training)


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


@pytest.mark.parametrize("make", [
    lambda: nn.BatchNorm1d(16), lambda: nn.BatchNorm1d(16, track_running_stats=False), lambda: nn.Dropout(.5),
    lambda: nn.RReLU(), lambda: DropPath(.1), lambda: Recurrent(16, 16, 2, dropout=.1), Thinned,
    lambda: pytest.importorskip("torchvision").ops.StochasticDepth(.2, "row"),
    lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))])
@pytest.mark.parametrize("alpha", [1, math.inf])
def test_networks_that_depend_on_chance_or_batch_are_refused(make, alpha):
    layer = make()
    model = nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 3)).train()
    x, says = torch.randn(4, 5), "computed twice|depend on chance" if make is Thinned else "training mode"
    calls = [lambda: common.center(model, alpha)(x), lambda: common.empirical_ntk(model, x)]
    calls += [] if make is Thinned else [lambda: common.center(model, alpha)]  # by its layers, before it is called
    for call in calls:
        with pytest.raises(ValueError, match=says):
            call()
    if getattr(layer, "track_running_stats", True):
        f = common.center(model.eval(), alpha)
        assert not f(x).any()
        f.train()
        with pytest.raises(ValueError, match=says):
            f(x)


def test_f0_of_another_shape_is_refused():
    f = common.center(network(outputs=1), 1)
    with pytest.raises(ValueError, match="shape"):
        f(batch()[0], torch.zeros(12, dtype=torch.float64))


def test_resnet_is_torchvisions_without_batch_norm():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    ours = common.resnet18(10)
    assert sum(p.numel() for p in ours.parameters()) == 11_176_842
    theirs = torchvision.models.resnet18(num_classes=10, norm_layer=lambda channels: nn.Identity())
    state = {k.replace(".downsample.", ".downsample.0."): v for k, v in ours.state_dict().items()}
    for name, m in theirs.named_modules():  # give theirs the biases that its batch norm would have had
        if isinstance(m, nn.Conv2d):
            m.bias = nn.Parameter(torch.zeros(m.out_channels))
    theirs.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    w = ours.layer2[0].conv1.weight
    assert math.isclose(w.std().item(), math.sqrt(2 / (128 * 9)), rel_tol=.02)  # He-normal, fan-out


def test_random_in_eval_mode_is_refused_too_and_no_chance_is_not():
    with pytest.raises(ValueError, match="FractionalMaxPool2d"):
        common.center(nn.Sequential(nn.FractionalMaxPool2d(2, 3)).eval(), 1)
    common.center(nn.Sequential(nn.Dropout(0.), DropPath(), DropPath(None), nn.Linear(2, 2)), 1)


def test_scaled_sgd_without_center_says_so():
    for model in (network(), nn.Sequential(nn.ELU(2.0)), nn.ELU(2.0)):  # ELU has an alpha of its own
        with pytest.raises(ValueError, match="center"):
            common.scaled_sgd(model, .1)


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


@pytest.mark.parametrize("alpha, cached, layers", [
    (3.0, False, []), (3.0, True, []), (math.inf, False, []), (math.inf, False, [Applied(Square)])])
def test_gradient_in_x_against_finite_differences(alpha, cached, layers):
    x, _ = batch()
    x.requires_grad_()
    f = common.center(nn.Sequential(network(), *layers), alpha)
    f0 = f.model0(x).detach() if cached else None
    assert not torch.autograd.grad(f(x, f0).sum(), x)[0].any()  # 0 at initialisation
    for p in f.parameters():
        p.data += .1 * p.requires_grad
    gradient, = torch.autograd.grad((f(x, f0)**2).sum(), x)
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(x.shape, generator=g, dtype=x.dtype)
    with torch.no_grad():
        up, down = ((f(x + e * direction)**2).sum() for e in (1e-6, -1e-6))
    assert math.isclose((up - down).item() / 2e-6, (gradient * direction).sum().item(), rel_tol=1e-6)


class Stopped(nn.Module):
    """Part of the gradient is stopped; autograd does not see it, forward mode may."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.how = nn.Linear(8, 4), nn.Linear(4, 3), how

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "no_grad"):
            h = torch.tanh(self.first(x))
        if self.how == "detach":
            h = h * h.detach()
        if self.how == "data":
            h = h + h.data**2
        return self.second(h)


@pytest.mark.parametrize("make", [
    lambda: common.mlp([8, 6, 2]), lambda: nn.Sequential(nn.Linear(8, 6), Applied(Square)), lambda: Stopped("no_grad"),
    lambda: Stopped("detach"), lambda: Stopped("data"), lambda: Recurrent(8, 5, batch_first=True),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), lambda: nn.Sequential(nn.Linear(8, 4), nn.GLU()),
    lambda: nn.Sequential(*[nn.Linear(8, 8), nn.Tanh()] * 2),
    lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True),
    lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()])
@pytest.mark.filterwarnings("ignore")
def test_alpha_inf_is_the_jacobian_of_autograd_times_delta(make):
    model, x = nn.Sequential(make(), nn.Flatten()).double(), torch.randn(3, 4, 8, dtype=torch.float64)
    f = common.center(model, math.inf)
    with torch.inference_mode():
        assert not f(x).any()
    for d in f.delta:
        d.data.normal_()
    J, out = jacobian(model, x).flatten(0, 1), f(x)
    assert torch.allclose(out.flatten(), J @ torch.cat([d.flatten() for d in f.delta]), rtol=1e-9, atol=1e-11)
    slope = torch.randn(out.shape, dtype=out.dtype)
    gradients = torch.autograd.grad(out, list(f.delta), slope, materialize_grads=True)
    assert torch.allclose(torch.cat([g.flatten() for g in gradients]), J.T @ slope.flatten(), rtol=1e-9, atol=1e-11)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.allclose(f(x), out) and not f(x).requires_grad


class Spoilt(nn.Linear):
    def __init__(self, how):
        super().__init__(3, 2)
        self.how, self.calls = how, 0

    def forward(self, x):
        self.calls += 1
        return self.how(super().forward(x), self.calls)


def with_a_closure():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].register_forward_hook(lambda m, args, out: out + model[0](args[0])[:, :2])
    return model


@pytest.mark.filterwarnings("ignore")
def test_attention_that_computes_otherwise_without_gradients_is_refused():
    class Masked(nn.TransformerEncoder):
        def forward(self, x):
            return super().forward(x, src_key_padding_mask=(torch.arange(4) == 3).expand(len(x), 4))

    f = common.center(Masked(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval(), 10)
    with pytest.raises(ValueError, match="set_fastpath_enabled"):
        f(torch.randn(3, 4, 8))
    torch.backends.mha.set_fastpath_enabled(False)
    out = f(torch.randn(3, 4, 8))
    torch.backends.mha.set_fastpath_enabled(True)
    assert out.abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alpha", [1, math.inf])
@pytest.mark.parametrize("make, says", [
    (lambda: Spoilt(lambda out, calls: (out, out)), "one tensor of real numbers"),
    (lambda: Spoilt(lambda out, calls: out * 1j), "one tensor of real numbers"),
    (lambda: Spoilt(lambda out, calls: out * calls), "computed twice"),
    (lambda: Spoilt(lambda out, calls: F.dropout(out, .5)), "computed twice"), (with_a_closure, "by a variable"),
    (lambda: nn.utils.weight_norm(nn.Linear(3, 2)), "cannot be copied")])
def test_networks_that_have_no_f_alpha_are_refused_in_one_line(make, says, alpha):
    with pytest.raises(ValueError, match=says) as error:
        common.center(make(), alpha)(torch.randn(4, 3))
    assert "\n" not in str(error.value)


class ThroughNumpy(torch.autograd.Function):
    """No forward mode, and a backward pass that autograd cannot see into."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        x, = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * np.cos(x.numpy()))


class Held(nn.Linear):
    def forward(self, x):
        self.__dict__.setdefault("held", [self.weight])  # where only plain autograd finds it
        return x @ self.held[0]


@pytest.mark.parametrize("layer", [Applied(ThroughNumpy), nn.Hardsigmoid(), Held(4, 4)])
def test_what_cannot_be_linearised_is_refused_at_inf_and_trains_all_the_same(layer, capsys):
    model, x = nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 2)), torch.randn(6, 5)
    with pytest.raises(ValueError, match="cannot be linearised: ") as error:
        common.center(model, math.inf)(x)
    f = common.center(model, 2.0)
    measured = common.Linearity(f, x)()
    assert "linearisation_error" not in measured and measured["ntk_alignment"] == pytest.approx(1)
    assert capsys.readouterr().out.count(str(error.value)) == 1
    f(x).sum().backward()


class Mixed(nn.Module):
    """Complex numbers and two precisions."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(3, 2, dtype=torch.cfloat)), nn.Linear(2, 2).double()

    def forward(self, x):
        return self.head((x[:, :3].to(torch.cfloat) @ self.weight).real.double())


@pytest.mark.parametrize("make", [
    Mixed, lambda: nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2)),
    lambda: nn.Sequential(nn.Embedding(10, 4, max_norm=.5), nn.Flatten(), nn.Linear(12, 2))])
def test_whatever_plain_sgd_trains(make):
    """The same steps as torch.optim.SGD at lr / alpha^2, with momentum, on the objective written out."""
    model, x = make(), torch.randint(10, (6, 3))
    target = torch.randn(6, 2)
    by_hand, theta0 = copy.deepcopy(model), copy.deepcopy(model)
    f = common.center(model, 3.0)
    steps = [(common.scaled_sgd(f, .1, .9), f),
             (torch.optim.SGD(by_hand.parameters(), .1 / 9, .9), lambda x: 3 * (by_hand(x) - theta0(x).detach()))]
    for optimizer, output in steps:
        for _ in range(4):
            optimizer.zero_grad()
            ((output(x) - target)**2).mean().backward()
            optimizer.step()
    for ours, plain in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, plain)
    assert not torch.equal(next(model.parameters()), next(theta0.parameters()))


@pytest.mark.parametrize("alpha", [2, math.inf])
def test_a_cache_that_the_network_shares_with_its_copy_is_refused(alpha):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Linear(4, 2))
    f, x = common.center(model, alpha), torch.randn(3, 5)
    assert not f(x).any()
    with nn.utils.parametrize.cached(), pytest.raises(ValueError, match="cached"):
        f(x)
