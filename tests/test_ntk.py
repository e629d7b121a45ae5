"""The NTK and the linearity measures, in float64 against per-example, per-output autograd Jacobians."""
import contextlib
import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
from conftest import jacobian, refused

pytestmark = pytest.mark.filterwarnings("ignore")


def kernel_by_hand(model, x):
    J = jacobian(model, x)
    return torch.einsum("icp,jep->icje", J, J)


def close(K, expected, tolerance=1e-9):
    return K.shape == expected.shape and (K - expected).norm() <= tolerance * expected.norm()


class Net(nn.Module):
    """A network in a line: its parts by name, and forward as a function of itself and x."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.how = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.how(self, x)


def lin(i=5, o=7, **k):
    return nn.Linear(i, o, **k)


def seq(*layers):
    return nn.Sequential(*layers)


def conv_net(*layers):
    return seq(*layers, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), lin(16, 2))


def changed(model, change):
    change(model)
    return model


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x) + self.weight.sum()


def routed(f, x):
    """Each example goes to one of two layers, whose rows then are not all examples."""
    out, left = x.new_zeros(len(x), 7), x[:, 0] > 0
    out[left], out[~left] = f.a(x[left]), f.b(x[~left])
    return f.c(torch.tanh(out))


VECTOR, SEQUENCE, IMAGE, TOKENS = (4, 5), (3, 4, 8), (3, 4, 9, 9), (4, 6)
RIGHT = {
    "mlp, in place": (lambda: seq(lin(bias=False), nn.ReLU(inplace=True), lin(7, 9), nn.Tanh(), lin(9, 3)), VECTOR),
    "flat output": (lambda: Net(lambda f, x: f.a(x).sum(1), a=lin()), VECTOR),
    "squeezed": (lambda: Net(lambda f, x: f.a(x).squeeze(), a=seq(lin(), nn.LayerNorm(7), lin(7, 1))), VECTOR),
    "output (N, 2, 3)": (lambda: Net(lambda f, x: f.a(x).view(-1, 2, 3), a=lin(5, 6)), VECTOR),
    "sparse gradients": (lambda: seq(nn.Embedding(11, 4, sparse=True), nn.Flatten(), lin(24, 2)), TOKENS),
    "frozen bias": (lambda: changed(seq(lin(), nn.Tanh()), lambda m: m[0].bias.requires_grad_(False)), VECTOR),
    "layer without use": (lambda: Net(lambda f, x: f.a(x), a=lin(), b=lin()), VECTOR),
    "bare, of two names": (lambda: changed(Net(lambda f, x: (x @ f.w).tanh() @ f.v, w=nn.Parameter(torch.randn(5, 5))),
                                           lambda m: setattr(m, "v", m.w)), VECTOR),
    "forward overridden": (lambda: seq(Scaled(5, 7), nn.Tanh(), lin(7, 2)), VECTOR),
    # convolutions, attention
    "conv": (lambda: conv_net(nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 2)), IMAGE),
    "conv, uneven": (lambda: conv_net(nn.Conv2d(4, 4, (2, 3), (2, 1), (1, 0), (3, 2), bias=False)), IMAGE),
    "conv, groups": (lambda: conv_net(nn.Conv2d(4, 4, 3, groups=2)), IMAGE),
    "conv, same": (lambda: conv_net(nn.Conv2d(4, 4, 4, padding="same")), IMAGE),
    "conv, reflect": (lambda: conv_net(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), IMAGE),
    "conv, channels last": (lambda: conv_net(nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last), IMAGE),
    "batch norm": (lambda: changed(conv_net(nn.BatchNorm2d(4)).eval(), lambda m: m[0].running_var.mul_(2)), IMAGE),
    "ours": (lambda: common.resnet18(3, width=4), (3, 3, 32, 32)),
    "transformer": (lambda: seq(nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
                                nn.Flatten(), lin(48, 2)), TOKENS),
    "transformer in eval mode": (lambda: seq(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(),
                                             lin(32, 2)).eval(), SEQUENCE),
    # weights that are no parameters of their own, or are used again
    "weight norm": (lambda: seq(nn.utils.parametrizations.weight_norm(lin()), nn.ReLU(), lin(7, 2)), VECTOR),
    "weight norm, old": (lambda: seq(nn.utils.weight_norm(lin()), nn.ReLU(), lin(7, 2)), VECTOR),
    "tied weights": (lambda: changed(seq(lin(5, 5), nn.Tanh(), lin(5, 5)),
                                     lambda m: setattr(m[2], "weight", m[0].weight)), VECTOR),
    "layer used twice": (lambda: Net(lambda f, x: f.b(f.a(torch.tanh(f.a(x)))), a=lin(5, 5), b=lin(5, 3)), VECTOR),
    "layers registered twice": (lambda: changed(seq(seq(lin(5, 5), nn.BatchNorm1d(5)), nn.Tanh(), lin(5, 2)).eval(),
                                                lambda m: m.insert(2, m[0])), VECTOR),
    "gradient changed by a hook": (lambda: changed(lin(), lambda m: m.weight.register_hook(torch.tril)), VECTOR),
    "autoencoder, tied": (lambda: Net(lambda f, x: F.linear(torch.tanh(f.a(x)), f.a.weight.T), a=lin(5, 3)), VECTOR),
    # rows that are no examples, inputs that change
    "one position of a sequence": (lambda: Net(lambda f, x: f.b(torch.tanh(f.a(x.transpose(0, 1)))[0]),
                                               a=lin(8, 6), b=lin(6, 2)), (4, 4, 8)),  # rows of `a` are positions
    "one layer's rows permuted": (lambda: Net(lambda f, x: f.b(torch.tanh(f.a(x.flip(0)).flip(0))),
                                              a=lin(5, 6), b=lin(6, 2)), VECTOR),
    "rows routed": (lambda: Net(routed, a=lin(), b=lin(), c=lin(7, 2)), VECTOR),
    "input changed in place": (lambda: Net(lambda f, x: f.a(x.mul_(2)), a=lin()), VECTOR),
}
MIXED, NONE = "chance or on the other examples", "no tangent kernel: "
REFUSED = {
    "batch mean": (lambda: Net(lambda f, x: f.a(x) - f.a(x).mean(0), a=lin()), VECTOR, MIXED),
    "batch_first forgotten": (lambda: Net(lambda f, x: f.a(x)[0].sum(1), a=nn.GRU(8, 5)), SEQUENCE, MIXED),
    "dropout by hand": (lambda: Net(lambda f, x: F.dropout(f.a(x)), a=lin()), VECTOR, MIXED),
    "batch norm": (lambda: seq(lin(), nn.BatchNorm1d(7)), VECTOR, "eval"),
    "tuple": (lambda: Net(lambda f, x: (f.a(x), x), a=lin()), VECTOR, "one tensor"),
    "bfloat16": (lambda: Net(lambda f, x: f.a(x).bfloat16(), a=lin()), VECTOR, NONE),
    "all frozen": (lambda: lin().requires_grad_(False), VECTOR, NONE),
    "no example": (lin, (0, 5), NONE),
}


def example(make, shape):
    torch.manual_seed(0)
    model = make().double()
    return model, torch.randint(11, shape) if shape == TOKENS else torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    """In blocks of all examples and of one, against other examples, and in float32, where rounding may refuse it."""
    model, x = example(*RIGHT[name])
    before, own = copy.deepcopy(x), [*model.parameters(), *model.buffers()]
    expected = kernel_by_hand(model, x)
    K = common.empirical_ntk(model, x)
    assert close(K, expected) and torch.equal(x, before) and torch.equal(K, K.permute(2, 3, 0, 1))
    assert all(a is b for a, b in zip(own, [*model.parameters(), *model.buffers()], strict=True))
    assert close(common.empirical_ntk(model, x, memory=1), expected)
    assert close(common.empirical_ntk(model, x[:2], x[1:], memory=1), expected[:2, :, 1:])
    x = x.float() if x.is_floating_point() else x
    assert close(common.empirical_ntk(model.float(), x), expected, 1e-4)


@pytest.mark.parametrize("make, shape, reason", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(make, shape, reason):
    model, x = example(make, shape)
    for options in ({}, {"memory": 1}, {"y": x[:2]}):
        refused(reason, common.empirical_ntk, model, x, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make, shape", [
    (lambda: common.mlp([5, 20, 3]), (10, 5)), (lambda: common.mlp([5, 20, 1]), (30, 5)), RIGHT["transformer"]])
def test_an_error_of_one_percent_in_one_block_is_caught(make, shape, dtype):
    """An error of 1 % of |K|_F in the block of a pair of examples: in one entry, or in all of them."""
    model, x = example(make, shape)
    J = common.Jacobian(model.to(dtype), x.to(dtype) if x.is_floating_point() else x, 2**30, True)
    K = J.kernel()
    assert J.confirms(K)
    for seed in range(100):
        g = torch.Generator().manual_seed(seed)
        i, c, j, e = (torch.randint(size, (), generator=g) for size in K.shape)
        one, every = torch.zeros_like(K), torch.zeros_like(K)
        one[i, c, j, e] = 1
        every[i, :, j if seed % 3 else i] = torch.randn(K[0, :, 0].shape, generator=g, dtype=dtype)
        for error in (one, every):
            assert not J.confirms(K + .01 * K.norm() * error / error.norm())


@pytest.mark.parametrize("memory, on", [(1, False), (10_000, None), (2**30, True)])  # blocks of 1, of 3, 3, 1, of 7
def test_a_relu_that_rounding_decides_is_no_reason_for_gradients_one_at_a_time(memory, on, monkeypatch):
    """A unit within rounding of 0 is on or off by how many examples go together: kernel and check see one side."""
    def forward(f, x):
        return f.b(torch.relu(f.a(x) + (1e-7 if f.on or len(x) > 1 else -1e-7)))

    attempts, make = [], common.Jacobian
    monkeypatch.setattr(common, "Jacobian", lambda *args: attempts.append(args[3]) or make(*args))
    model, x = Net(forward, a=lin(5, 40), b=lin(40, 3), on=False), torch.randn(7, 5)
    model.a.weight.data[:10], model.a.bias.data[:10] = 0, 0
    K = common.empirical_ntk(model, x, memory=memory)
    assert attempts == [True]
    for side in (False, True):
        model.on = side
        assert close(K, kernel_by_hand(model, x), 1e-5) == (side is on)


@pytest.mark.parametrize("missing", ["check_deterministic", "true_float32", "trace", "Jacobian"])
def test_a_forgotten_paste_is_a_name_error(missing):
    there = {"contextlib": contextlib, "torch": torch, "F": F, "nn": nn}
    for name in {"check_deterministic", "true_float32", "trace", "Jacobian", "empirical_ntk"} - {missing}:
        exec(inspect.getsource(getattr(common, name)), there)
    with pytest.raises(NameError, match=missing):
        there["empirical_ntk"](lin(), torch.randn(VECTOR))


def test_a_diverged_network_has_no_finite_kernel():
    model = changed(common.mlp([5, 4, 2]), lambda m: m[0].weight.data.fill_(math.nan))
    assert common.empirical_ntk(model, torch.randn(VECTOR)).isnan().any()


def test_leaves_the_model_as_it_was():
    """Its modes, gradients and hooks, which are honoured; also where gradients are switched off."""
    model, x = seq(lin(), nn.BatchNorm1d(7).eval(), nn.ReLU(inplace=True), lin(7, 3)), torch.randn(VECTOR)
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    model[0].weight.grad = torch.ones(7, 5)
    expected = kernel_by_hand(model, x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert close(common.empirical_ntk(model, x), expected, 1e-5)
    assert model.training and not model[1].training and [len(m._forward_hooks) for m in model] == [1, 0, 0, 0]
    assert torch.equal(model[0].weight.grad, torch.ones(7, 5)) and model[3].weight.grad is None


def test_tf32_is_off_inside_and_as_before_outside():
    inside = []
    model = Net(lambda f, x: inside.append(torch.backends.cuda.matmul.fp32_precision) or f.a(x), a=lin())
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert common.empirical_ntk(model, torch.randn(4, 5)).dtype == torch.float32 and set(inside) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert torch.backends.cudnn.allow_tf32 == before[1]


def test_kernel_alignment():
    K, L = (A @ A.T for A in torch.randn(2, 8, 5, dtype=torch.float64))
    expected = pytest.approx((torch.trace(K @ L) / (K.norm() * L.norm())).item())
    assert common.kernel_alignment(K, L) == common.kernel_alignment(K.view(4, 2, 4, 2), L.view(4, 2, 4, 2)) == expected
    assert common.kernel_alignment(3 * K, K) == pytest.approx(1) == common.kernel_alignment(1e-200 * K, 1e200 * K)
    H = torch.eye(8, dtype=torch.float64) - 1 / 8
    assert common.kernel_alignment(K, L, centered=True) == pytest.approx(common.kernel_alignment(H @ K @ H, H @ L @ H))
    assert common.kernel_alignment(K, K + 100, centered=True) == pytest.approx(1)  # a constant is centred away
    assert math.isnan(common.kernel_alignment(K, 0 * K))
    for bad in (K[:7, :7], K[:4], K.view(4, 2, 4, 2)):
        refused("need two kernels", common.kernel_alignment, K, bad)


def test_relu_signs_and_representation_by_hand():
    model = common.mlp([2, 2, 1])
    model[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    model[0].bias.data.zero_()
    x = torch.tensor([[1.0, 1.0], [-1.0, -2.0], [0.0, 3.0]])
    s = common.relu_signs(model, x)
    assert s.tolist() == [[True, False], [False, True], [False, False]]
    assert common.representation(model, x).tolist() == [[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]
    assert [common.sign_similarity(s, other) for other in (s, ~s, s & False)] == [1, 0, pytest.approx(4 / 6)]
    refused("ReLU", common.relu_signs, lin(2, 2), x)
    refused("Linear", common.representation, nn.ReLU(), x)
    last = Net(lambda f, x: f.a(input=f.b(input=x)), a=lin(4, 2), b=lin(2, 4), c=lin(4, 2))  # the last called
    assert torch.equal(common.representation(last, x), last.b(x))


def test_relu_signs_see_every_call_of_a_shared_relu():
    s = common.relu_signs(common.resnet18(2, width=2), torch.randn(3, 3, 32, 32))
    assert s.shape == (3, 2 * 16 * 16 + 4 * 2 * 8 * 8 + 4 * 4 * 4 * 4 + 4 * 8 * 2 * 2 + 4 * 16)
    points = seq(nn.Flatten(0, 1), nn.ReLU(), nn.Unflatten(0, (3, 4)), nn.Flatten(), nn.ReLU())  # rows (12, 5), (3, 20)
    assert common.relu_signs(points, torch.randn(3, 4, 5)).shape == (3, 40)


def test_representation_alignment_conventions():
    R, R0 = torch.randn(2, 6, 3)
    for gram, K, K0 in ((False, R.T @ R, R0.T @ R0), (True, R @ R.T, R0 @ R0.T)):
        expected = (torch.trace(K @ K0) / (K.norm() * K0.norm())).item()
        assert common.representation_alignment(R, R0, gram) == pytest.approx(expected, rel=1e-5)
    rotation = torch.linalg.qr(torch.randn(3, 3))[0]
    assert common.representation_alignment(R @ rotation, R, gram=True) == pytest.approx(1)  # R^T R sees it
    assert common.representation_alignment(R @ rotation, R) < .99


def test_linearisation_error():
    x, start, errors = torch.randn(6, 5, dtype=torch.float64), common.mlp([5, 16, 2]).double(), []
    for alpha in (1.0, 10.0, 100.0):
        f = common.center(copy.deepcopy(start), alpha)
        assert math.isnan(common.linearisation_error(f, x))  # 0 / 0 at theta0
        step = torch.linspace(-1, 1, 130, dtype=x.dtype)[torch.randperm(130)] * .05 / alpha
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(start.parameters()) + step, f.model.parameters())
        expected = ((f(x) - alpha * jacobian(start, x) @ step).norm() / f(x).norm()).item()
        assert common.linearisation_error(f, x) == pytest.approx(expected, rel=1e-8)
        errors.append(expected)
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert common.linearisation_error(common.center(start, math.inf), x) == 0


@pytest.mark.parametrize("size, stride", [(1, 1), (2, 2), (1, 2), (2, 1), (3, 2)])
def test_our_convolution_is_torchs_on_a_single_position_too(size, stride):
    """Outputs, and gradients in its parameters and, by the layer before it, in its input."""
    models, x = [], torch.randn(5, 4, size, size, dtype=torch.float64)
    for kind in (common.Conv, nn.Conv2d):
        torch.manual_seed(0)
        models.append(seq(nn.Conv2d(4, 4, 1), kind(4, 6, 3, stride, padding=1), nn.Flatten()).double())
    ours, torchs = models
    torch.testing.assert_close(ours(x), torchs(x))
    assert close(common.empirical_ntk(ours, x), kernel_by_hand(torchs, x))


@pytest.mark.parametrize("name, layers", [("ours", 21), ("mlp, in place", 3)])
def test_linear_layers_and_convolutions_need_no_jacobian(name, layers):
    J = common.Jacobian(*example(*RIGHT[name]), 2**30, structured=True)
    assert len(J.layers) == layers and not J.rest and J.confirms(J.kernel())
