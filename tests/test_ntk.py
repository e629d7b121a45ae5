"""The NTK and the linearity measures, in float64 against per-example, per-output autograd Jacobians."""
import copy
import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import common
from conftest import jacobian

pytestmark = pytest.mark.filterwarnings("ignore")


def kernel_by_hand(model, x):
    J = jacobian(model, x)
    return torch.einsum("icp,jep->icje", J, J)


def close(K, expected, tolerance=1e-9):
    return K.shape == expected.shape and (K - expected).norm() <= tolerance * expected.norm()


# --- the networks: each right, or refused ---


class Net(nn.Module):
    """A network in a line: its parts by name, and forward as a function of itself and x."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.how = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.how(self, x)


class Scaled(nn.Linear):
    """A layer whose forward is overridden."""

    def forward(self, x):
        return 2 * super().forward(x) + self.weight.sum()


def lin(i=5, o=7, **k):
    return nn.Linear(i, o, **k)


def seq(*layers):
    return nn.Sequential(*layers)


def tied():
    model = seq(lin(5, 5), nn.Tanh(), lin(5, 5), nn.Tanh(), lin(5, 2))
    model[2].weight = model[0].weight
    return model


def registered_twice():
    """The same layers, with a buffer, at two places."""
    block = seq(lin(5, 5), nn.BatchNorm1d(5))
    return seq(block, nn.Tanh(), block, lin(5, 2)).eval()


def held_and_masked():
    model = Net(lambda f, x: f.b(torch.tanh(x @ f.held[0])), w=nn.Parameter(torch.randn(5, 7)), b=lin(7, 2))
    model.held = [model.w]
    model.b.weight.register_hook(lambda g: g * torch.tensor([[1], [0]]))
    return model


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def batch_norm():
    """In eval mode, with statistics away from 0 and 1."""
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_(), norm.running_var.uniform_(.5, 2)
    return conv_net(nn.Conv2d(4, 4, 3), norm).eval()


def conv_net(*layers):
    return seq(*layers, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), lin(16, 2))


VECTOR, SEQUENCE, IMAGE, TOKENS = (4, 5), (3, 4, 8), (3, 4, 9, 9), (4, 6)
RIGHT = {
    "mlp, in place": (lambda: seq(lin(bias=False), nn.ReLU(inplace=True), lin(7, 9), nn.Tanh(), lin(9, 3)), VECTOR),
    "flat output": (lambda: Net(lambda f, x: f.a(x).sum(1), a=lin()), VECTOR),
    "squeezed": (lambda: Net(lambda f, x: f.a(x).squeeze(), a=seq(lin(), nn.LayerNorm(7), lin(7, 1))), VECTOR),
    "output (N, 2, 3)": (lambda: Net(lambda f, x: f.a(x).view(-1, 2, 3), a=lin(5, 6)), VECTOR),
    "sparse gradients": (lambda: seq(nn.Embedding(11, 4, sparse=True), nn.Flatten(), lin(24, 2)), TOKENS),
    "frozen bias": (lambda: frozen(seq(lin(), nn.Tanh(), lin(7, 2)), "0.bias", "2.weight"), VECTOR),
    "layer without use": (lambda: Net(lambda f, x: f.a(x), a=lin(), b=lin()), VECTOR),
    "bare parameters": (lambda: Net(lambda f, x: x.sin() @ f.w + f.b, w=nn.Parameter(torch.randn(5, 3)),
                                    b=nn.Parameter(torch.randn(3))), VECTOR),
    "forward overridden": (lambda: seq(Scaled(5, 7), nn.Tanh(), lin(7, 2)), VECTOR),
    # convolutions, attention
    "conv": (lambda: conv_net(nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 2)), IMAGE),
    "conv, uneven": (lambda: conv_net(nn.Conv2d(4, 4, (2, 3), (2, 1), (1, 0), (3, 2), bias=False)), IMAGE),
    "conv, groups": (lambda: conv_net(nn.Conv2d(4, 4, 3, groups=2)), IMAGE),
    "conv, same": (lambda: conv_net(nn.Conv2d(4, 4, 4, padding="same")), IMAGE),
    "conv, reflect": (lambda: conv_net(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), IMAGE),
    "conv, channels last": (lambda: conv_net(nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last), IMAGE),
    "batch norm": (batch_norm, IMAGE),
    "ours": (lambda: common.resnet18(3, width=4), (3, 3, 32, 32)),
    "transformer": (lambda: seq(nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
                                nn.Flatten(), lin(48, 2)), TOKENS),
    "transformer in eval mode": (lambda: seq(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(),
                                             lin(32, 2)).eval(), SEQUENCE),
    # weights that are no parameters of their own, or are used again
    "weight norm": (lambda: seq(parametrizations.weight_norm(lin()), nn.ReLU(), lin(7, 2)), VECTOR),
    "weight norm, old": (lambda: seq(nn.utils.weight_norm(lin()), nn.ReLU(), lin(7, 2)), VECTOR),
    "tied weights": (tied, VECTOR),
    "layer used twice": (lambda: Net(lambda f, x: f.b(f.a(torch.tanh(f.a(x)))), a=lin(5, 5), b=lin(5, 3)), VECTOR),
    "layers registered twice": (registered_twice, VECTOR),
    "held and masked": (held_and_masked, VECTOR),
    "autoencoder, tied": (lambda: Net(lambda f, x: F.linear(torch.tanh(f.a(x)), f.a.weight.T), a=lin(5, 3)), VECTOR),
    # rows that are no examples, inputs that change
    "one position of a sequence": (lambda: Net(lambda f, x: f.b(torch.tanh(f.a(x.transpose(0, 1)))[0]),
                                               a=lin(8, 6), b=lin(6, 2)), (4, 4, 8)),  # rows of `a` are positions
    "one layer's rows permuted": (lambda: Net(lambda f, x: f.b(torch.tanh(f.a(x.flip(0)).flip(0))),
                                              a=lin(5, 6), b=lin(6, 2)), VECTOR),
    "input changed in place": (lambda: Net(lambda f, x: f.a(x.mul_(2)), a=lin()), VECTOR),
}
MIXED = "chance or on the other examples"
REFUSED = {
    "batch mean": (lambda: Net(lambda f, x: f.b(torch.tanh(f.a(x)) - torch.tanh(f.a(x)).mean(0)), a=lin(), b=lin(7, 2)),
                   VECTOR, MIXED),
    "batch mean of the inputs": (lambda: Net(lambda f, x: f.a(x - x.mean(0)), a=lin()), VECTOR, MIXED),
    "dropout by hand": (lambda: Net(lambda f, x: f.b(F.dropout(f.a(x))), a=lin(), b=lin(7, 2)), VECTOR, MIXED),
    "batch norm": (lambda: seq(lin(), nn.BatchNorm1d(7), lin(7, 2)), VECTOR, "eval"),
    "tuple": (lambda: Net(lambda f, x: (f.a(x), x), a=lin()), VECTOR, "one tensor"),
    "one number": (lambda: Net(lambda f, x: f.a(x).sum(), a=lin()), VECTOR, "row for each"),
    "no example": (lin, (0, 5), "no example"),
    "bfloat16": (lambda: Net(lambda f, x: f.a(x).bfloat16(), a=lin()), VECTOR, "derivative"),
    "all frozen": (lambda: lin().requires_grad_(False), VECTOR, "requires gradients"),
    "an error of its own": (lambda: Net(lambda f, x: f.missing(x), a=lin()), VECTOR, "missing"),
}


def example(make, shape):
    torch.manual_seed(0)
    model = make().double()
    return model, torch.randint(11, shape) if shape == TOKENS else torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    model, x = example(*RIGHT[name])
    before, own = copy.deepcopy(x), [*model.parameters(), *model.buffers()]
    expected = kernel_by_hand(model, x)
    K = common.empirical_ntk(model, x)
    assert close(K, expected) and torch.equal(x, before)
    assert all(a is b for a, b in zip(own, [*model.parameters(), *model.buffers()], strict=True))
    assert torch.equal(K, K.permute(2, 3, 0, 1))
    assert close(common.empirical_ntk(model, x, memory=1), expected)
    if len(x) > 2:
        assert close(common.empirical_ntk(model, x[:2], x[1:], memory=1), expected[:2, :, 1:])


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name):
    *case, reason = REFUSED[name]
    model, x = example(*case)
    for options in ({}, {"memory": 1}, {"y": x[:2]}):
        with pytest.raises(ValueError, match=reason) as error:
            common.empirical_ntk(model, x, **options)
        assert "\n" not in str(error.value)


# --- the check ---


def float32_and_64(model, x):
    for dtype in (torch.float32, torch.float64):
        yield model.to(dtype), x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize("make, shape", [
    (lambda: common.mlp([5, 20, 3]), (10, 5)), (lambda: common.mlp([5, 20, 1]), (30, 5)), RIGHT["transformer"]])
def test_an_error_of_one_percent_in_one_block_is_caught(make, shape):
    """An error of 1 % of |K|_F in the block of a pair of examples: in one entry, or in all of them."""
    for model, x in float32_and_64(*example(make, shape)):
        J = common.Jacobian(model, x, 2**30, True)
        K = J.product(J)
        assert J.confirms(K, J)
        for seed in range(100):
            g = torch.Generator().manual_seed(seed)
            i, c, j, e = (torch.randint(size, (), generator=g) for size in K.shape)
            j = i if seed % 3 == 0 else j
            entry = torch.zeros_like(K[0, :, 0])
            entry[c, e] = 1
            for error in (entry, torch.randn(entry.shape, generator=g, dtype=K.dtype)):
                wrong = K.clone()
                wrong[i, :, j] += .01 * K.norm() * error / error.norm()
                assert not J.confirms(wrong, J)


# Where only the second attempt is right.
PLAIN = ["autoencoder, tied", "one layer's rows permuted", "tied weights", "weight norm, old", "held and masked"]


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_is_not_refused(name):
    for model, x in float32_and_64(*example(*RIGHT[name])):
        J = common.Jacobian(model, x, 2**30, name not in PLAIN)
        assert J.confirms(J.product(J), J)


def test_a_diverged_network_has_no_finite_kernel():
    model, x = common.mlp([5, 4, 2]), torch.randn(3, 5)
    model[0].weight.data.fill_(math.nan)
    assert common.empirical_ntk(model, x).isnan().any()


def test_the_examples_in_docstrings():
    assert doctest.testmod(common) == (0, 4)


def test_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7).eval(), nn.ReLU(inplace=True), nn.Linear(7, 3))
    model[0].register_buffer("calls", torch.zeros(()))

    def users_hook(m, args, out):  # honoured and kept; it draws
        m.calls += 1
        return out * 2 + 0 * torch.rand(())

    model[0].register_forward_hook(users_hook)
    model[0].weight.grad = torch.ones(7, 5)
    x = torch.randn(4, 5)
    expected = kernel_by_hand(model, x)
    random, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert close(common.empirical_ntk(model, x), expected, 1e-5)
    assert torch.equal(torch.get_rng_state(), random) and model.training and not model[1].training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(7, 5)) and model[3].weight.grad is None
    assert [len(m._forward_hooks) for m in model] == [1, 0, 0, 0]


def test_tf32_is_off_inside_and_as_before_outside():
    inside = []
    model = Net(lambda f, x: inside.append(torch.backends.cuda.matmul.fp32_precision) or f.a(x), a=nn.Linear(5, 3))
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


# --- alignment and the other measures ---


def kernel(seed, n=8):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(n, 5, generator=g, dtype=torch.float64)
    return A @ A.T


def test_kernel_alignment():
    K, L = kernel(0), kernel(1)
    assert common.kernel_alignment(K, K) == pytest.approx(1)
    assert common.kernel_alignment(3 * K, K) == pytest.approx(1)
    assert common.kernel_alignment(K, L) == pytest.approx((torch.trace(K @ L) / (K.norm() * L.norm())).item())
    in_blocks = common.kernel_alignment(K.view(4, 2, 4, 2), L.view(4, 2, 4, 2))
    assert in_blocks == pytest.approx(common.kernel_alignment(K, L))
    H = torch.eye(8, dtype=torch.float64) - 1 / 8
    assert common.kernel_alignment(K, L, centered=True) == pytest.approx(common.kernel_alignment(H @ K @ H, H @ L @ H))
    assert common.kernel_alignment(K, K + 100, centered=True) == pytest.approx(1)  # a constant is centred away
    assert math.isnan(common.kernel_alignment(K, 0 * K))
    for bad in (kernel(0, 7), K[:4], K.view(4, 2, 4, 2)):
        with pytest.raises(ValueError):
            common.kernel_alignment(K, bad)


def test_relu_signs_and_representation_by_hand():
    model = common.mlp([2, 2, 1])
    model[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    model[0].bias.data.zero_()
    x = torch.tensor([[1.0, 1.0], [-1.0, -2.0], [0.0, 3.0]])
    assert common.relu_signs(model, x).tolist() == [[True, False], [False, True], [False, False]]
    assert common.representation(model, x).tolist() == [[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]
    s = common.relu_signs(model, x)
    assert common.sign_similarity(s, s) == 1 and common.sign_similarity(s, ~s) == 0
    assert common.sign_similarity(s, torch.zeros_like(s)) == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match="ReLU"):
        common.relu_signs(nn.Linear(2, 2), x)
    with pytest.raises(ValueError, match="Linear"):
        common.representation(nn.ReLU(), x)


def test_relu_signs_see_every_call_of_a_shared_relu():
    s = common.relu_signs(common.resnet18(2, width=2), torch.randn(3, 3, 32, 32))
    assert s.shape == (3, 2 * 16 * 16 + 4 * 2 * 8 * 8 + 4 * 4 * 4 * 4 + 4 * 8 * 2 * 2 + 4 * 16)
    points = seq(nn.Flatten(0, 1), nn.ReLU(), nn.Unflatten(0, (3, 4)), nn.Flatten(), nn.ReLU())  # rows (12, 5), (3, 20)
    assert common.relu_signs(points, torch.randn(3, 4, 5)).shape == (3, 40)


def test_representation_alignment_conventions():
    g = torch.Generator().manual_seed(0)
    R, R0 = torch.randn(6, 3, generator=g), torch.randn(6, 3, generator=g)
    for gram, K, K0 in ((False, R.T @ R, R0.T @ R0), (True, R @ R.T, R0 @ R0.T)):
        expected = (torch.trace(K @ K0) / (K.norm() * K0.norm())).item()
        assert common.representation_alignment(R, R0, gram) == pytest.approx(expected, rel=1e-5)
    assert common.representation_alignment(R, R0) != pytest.approx(common.representation_alignment(R, R0, gram=True))
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=g))[0]
    assert common.representation_alignment(R @ rotation, R, gram=True) == pytest.approx(1)  # R^T R sees it


def test_linearisation_error():
    x = torch.randn(6, 5, dtype=torch.float64)
    start = common.mlp([5, 16, 2]).double()
    errors = []
    for alpha in (1.0, 10.0, 100.0, 1000.0):
        f = common.center(copy.deepcopy(start), alpha)
        assert math.isnan(common.linearisation_error(f, x))  # 0 / 0 at theta0
        g = torch.Generator().manual_seed(1)
        step = [torch.randn(p.shape, generator=g, dtype=p.dtype) * .05 / alpha for p in f.model.parameters()]
        for p, s in zip(f.model.parameters(), step):
            p.data += s
        linear = alpha * jacobian(start, x) @ torch.cat([s.flatten() for s in step])
        expected = ((f(x) - linear).norm() / f(x).norm()).item()
        assert common.linearisation_error(f, x) == pytest.approx(expected, rel=1e-8)
        errors.append(expected)
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert common.linearisation_error(common.center(start, math.inf), x) == 0


def test_representation_is_what_the_last_called_linear_receives():
    """The head is registered first and called by keyword; another linear layer is never called."""
    model = Net(lambda f, x: f.head(input=f.body(input=x)), head=lin(4, 2), body=lin(8, 4), spare=lin(4, 2))
    x = torch.randn(SEQUENCE)
    assert torch.equal(common.representation(model, x), model.body(x).detach().flatten(1))


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


def test_resnet18_needs_no_jacobian():
    J = common.Jacobian(common.resnet18(3, width=4), torch.randn(4, 3, 32, 32), 2**30, structured=True)
    assert len(J.layers) == 21 and not J.rest
