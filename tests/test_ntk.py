"""The NTK and the linearity measures, in float64 against per-example, per-output autograd Jacobians."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import common
from conftest import Square, jacobian

pytestmark = pytest.mark.filterwarnings("ignore")


def kernel_by_hand(model, x, y=None):
    J = jacobian(model, x)
    return torch.einsum("icp,jep->icje", J, J if y is None else jacobian(model, y))


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


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def busy(model):
    """Statistics and scales of norms away from 0 and 1."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None:
            m.running_mean.normal_(), m.running_var.uniform_(.5, 2)
    return model.eval()


def hooked():
    model = seq(lin(), nn.ReLU(inplace=True), lin(7, 3))
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    return model


def conv_net(*layers, channels=4):
    return seq(*layers, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), lin(4 * channels, 2))


def torchvision_model(name, **options):
    return busy(getattr(pytest.importorskip("torchvision").models, name)(num_classes=2, **options))


def layer(kind, **options):
    """A transformer layer without dropout."""
    return kind(8, 2, 16, dropout=0.0, **options)


def twice(f, x):
    h = torch.tanh(f.a(x))
    return f.c(torch.tanh(f.b(torch.tanh(f.b(h)))) * f.scale)


def change_input(f, x):
    return f.a(x.mul_(2))


def permuted(f, x):
    order = torch.arange(len(x) - 1, -1, -1)
    return f.b(torch.tanh(f.a(x[order])))[order]


def bounced(f, x):
    """Only the hidden layer sees the examples in another order."""
    return f.b(torch.tanh(f.a(x.flip(0)).flip(0)))


def one_position(f, x):
    return f.b(torch.tanh(f.a(x.transpose(0, 1)))[0])  # (positions, N, d): rows of `a` are positions


def first_of(i):
    return lambda f, x: f.out(f.rnn(f.embed(x))[i])


VECTOR, SEQUENCE, IMAGE, TOKENS = (4, 5), (3, 4, 8), (3, 4, 9, 9), (4, 6)
RIGHT = {
    # plain
    "linear": (lambda: lin(), VECTOR),
    "no bias": (lambda: seq(lin(bias=False), nn.ReLU(), lin(7, 3, bias=False)), VECTOR),
    "mlp, in place": (lambda: seq(lin(), nn.ReLU(inplace=True), lin(7, 9), nn.Tanh(), lin(9, 3)), VECTOR),
    "flat output": (lambda: Net(lambda f, x: f.a(x).sum(1), a=lin()), VECTOR),
    "output (N, 2, 3)": (lambda: Net(lambda f, x: f.a(x).view(-1, 2, 3), a=lin(5, 6)), VECTOR),
    "frozen bias": (lambda: frozen(seq(lin(), nn.Tanh(), lin(7, 2)), "0.bias", "2.weight"), VECTOR),
    "layer without use": (lambda: Net(lambda f, x: f.a(x), a=lin(), b=lin()), VECTOR),
    "bare parameters": (lambda: Net(lambda f, x: x.sin() @ f.w + f.b, w=nn.Parameter(torch.randn(5, 3)),
                                    b=nn.Parameter(torch.randn(3))), VECTOR),
    "a hook that doubles": (hooked, VECTOR),
    # convolutions
    "conv": (lambda: conv_net(nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 2)), IMAGE),
    "conv, rectangular": (lambda: conv_net(nn.Conv2d(4, 4, (3, 1), (2, 1), (1, 0), bias=False)), IMAGE),
    "conv, dilated unevenly": (lambda: conv_net(nn.Conv2d(4, 4, (2, 3), (2, 1), dilation=(3, 2))), IMAGE),
    "conv, groups": (lambda: conv_net(nn.Conv2d(4, 4, 3, groups=2)), IMAGE),
    "conv, same": (lambda: conv_net(nn.Conv2d(4, 4, 4, padding="same")), IMAGE),
    "conv, reflect": (lambda: conv_net(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), IMAGE),
    "conv transposed": (lambda: conv_net(nn.ConvTranspose2d(4, 4, 3, 2)), IMAGE),
    "conv, channels last": (lambda: conv_net(nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last), IMAGE),
    "ours": (lambda: common.resnet18(3, width=4), (3, 3, 32, 32)),
    "torchvision's shufflenet": (lambda: torchvision_model("shufflenet_v2_x0_5"), (2, 3, 40, 40)),
    # norms
    "batch norm 2d": (lambda: busy(conv_net(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))), IMAGE),
    "layer norm": (lambda: seq(lin(), nn.LayerNorm(7), lin(7, 2)), VECTOR),
    # activations with parameters, parametrisations, tying
    "prelu": (lambda: seq(lin(), nn.PReLU(), lin(7, 3)), VECTOR),
    "weight norm": (lambda: seq(parametrizations.weight_norm(lin()), nn.ReLU(), lin(7, 2)), VECTOR),
    "weight norm, old": (lambda: seq(nn.utils.weight_norm(lin()), nn.ReLU(), lin(7, 2)), VECTOR),
    "spectral norm": (lambda: seq(parametrizations.spectral_norm(lin()), lin(7, 2)).eval(), VECTOR),
    "tied weights": (tied, VECTOR),
    "layer used twice": (lambda: Net(twice, a=lin(5, 8), b=lin(8, 8), c=lin(8, 3),
                                     scale=nn.Parameter(torch.randn(8))), VECTOR),
    "autoencoder, tied": (lambda: Net(lambda f, x: F.linear(torch.tanh(f.a(x)), f.a.weight.T), a=lin(5, 3)), VECTOR),
    "forward overridden": (lambda: seq(Scaled(5, 7), nn.Tanh(), lin(7, 2)), VECTOR),
    "autograd function": (lambda: Net(lambda f, x: f.b(Square.apply(f.a(x))), a=lin(), b=lin(7, 2)), VECTOR),
    # embeddings, attention, recurrence
    "embedding": (lambda: seq(nn.Embedding(11, 4), nn.Flatten(), lin(24, 2)), TOKENS),
    "embedding, tied to the output": (lambda: Net(lambda f, x: f.e(x).mean(1) @ f.e.weight.T, e=nn.Embedding(11, 4)),
                                      TOKENS),
    "attention": (lambda: Net(lambda f, x: f.out(f.a(x, x, x)[0].mean(1)), out=lin(8, 2),
                              a=nn.MultiheadAttention(8, 2, batch_first=True)), SEQUENCE),
    "transformer": (lambda: Net(first_of(slice(None)), embed=nn.Embedding(11, 8), out=seq(nn.Flatten(), lin(48, 2)),
                                rnn=layer(nn.TransformerEncoderLayer, batch_first=True)), TOKENS),
    "transformer in eval mode": (lambda: seq(layer(nn.TransformerEncoderLayer, batch_first=True), nn.Flatten(),
                                             lin(32, 2)).eval(), SEQUENCE),
    "transformer, sequence first": (lambda: Net(lambda f, x: f.out(f.block(f.embed(x).transpose(0, 1)).mean(0)),
                                                embed=nn.Embedding(11, 8), out=lin(8, 2),
                                                block=layer(nn.TransformerEncoderLayer)), (4, 4)),
    "lstm": (lambda: Net(lambda f, x: f.out(f.rnn(x)[0][:, -1]), rnn=nn.LSTM(8, 5, batch_first=True), out=lin(5, 2)),
             SEQUENCE),
    # rows that are no examples, inputs and buffers that change
    "one position of a sequence": (lambda: Net(one_position, a=lin(8, 6), b=lin(6, 2)), (4, 4, 8)),
    "rows permuted and back": (lambda: Net(permuted, a=lin(5, 6), b=lin(6, 2)), VECTOR),
    "one layer's rows permuted": (lambda: Net(bounced, a=lin(5, 6), b=lin(6, 2)), VECTOR),
    "input changed in place": (lambda: Net(change_input, a=lin()), VECTOR),
}
MIXED = "chance or on the other examples"
REFUSED = {
    "batch mean": (lambda: Net(lambda f, x: f.b(torch.tanh(f.a(x)) - torch.tanh(f.a(x)).mean(0)), a=lin(), b=lin(7, 2)),
                   VECTOR, MIXED),
    "batch norm by hand": (lambda: Net(lambda f, x: F.batch_norm(f.a(x), None, None, training=True), a=lin()),
                           VECTOR, ""),
    "dropout by hand": (lambda: Net(lambda f, x: f.b(F.dropout(f.a(x))), a=lin(), b=lin(7, 2)), VECTOR, MIXED),
    "noise": (lambda: Net(lambda f, x: f.a(x + torch.randn_like(x)), a=lin()), VECTOR, MIXED),
    "batch norm": (lambda: seq(lin(), nn.BatchNorm1d(7), lin(7, 2)), VECTOR, "eval"),
    "dropout": (lambda: seq(lin(), nn.Dropout(.1), lin(7, 2)), VECTOR, "eval"),
    "stochastic depth": (lambda: seq(lin(), pytest.importorskip("torchvision").ops.StochasticDepth(.1, "row")),
                         VECTOR, "eval"),
    "tuple": (lambda: Net(lambda f, x: (f.a(x), x), a=lin()), VECTOR, "one tensor"),
    "one number": (lambda: Net(lambda f, x: f.a(x).sum(), a=lin()), VECTOR, "row for each"),
    "class indices": (lambda: Net(lambda f, x: f.a(x).argmax(1), a=lin()), VECTOR, "derivative"),
    "bfloat16": (lambda: Net(lambda f, x: f.a(x.bfloat16()), a=lin().bfloat16()), VECTOR, "derivative"),
    "all frozen": (lambda: lin().requires_grad_(False), VECTOR, "requires gradients"),
    "another shape of input": (lambda: lin(), (4, 6), "shapes"),
    "an error of its own": (lambda: Net(lambda f, x: f.missing(x), a=lin()), VECTOR, "missing"),
}


def example(name, make, shape, seed=0):
    torch.manual_seed(seed)
    model = make()
    if name != "bfloat16":
        model = model.double()
    tokens = "embedding" in name or name in ("transformer", "transformer, sequence first")
    x = torch.randint(11, shape) if tokens else torch.randn(shape, dtype=torch.float64)
    return model, x


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    model, x = example(name, *RIGHT[name])
    before = copy.deepcopy(x)
    expected = kernel_by_hand(model, x)
    K = common.empirical_ntk(model, x)
    assert close(K, expected) and torch.equal(x, before)
    assert torch.equal(K, K.permute(2, 3, 0, 1))
    assert close(common.empirical_ntk(model, x, memory=1), expected)
    if len(x) > 2:
        assert close(common.empirical_ntk(model, x[:2], x[1:], memory=1), expected[:2, :, 1:])


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name):
    make, shape, reason = REFUSED[name]
    model, x = example(name, make, shape)
    for options in ({}, {"memory": 1}, {"y": x[:2]}):
        with pytest.raises(ValueError, match=reason) as error:
            common.empirical_ntk(model, x, **options)
        assert "\n" not in str(error.value)


# --- the check ---


def float32_and_64(model, x):
    for dtype in (torch.float32, torch.float64):
        yield model.to(dtype), x.to(dtype) if x.is_floating_point() else x


def disturbed(K, block, kind, seed):
    """K with an error of 1 % of |K|_F in the block of one pair of examples."""
    generator = torch.Generator().manual_seed(seed)
    i, j = block
    a, b = (torch.randn(K.shape[1], generator=generator, dtype=K.dtype) for _ in range(2))
    if kind == "entry":
        error = torch.zeros(K.shape[1], K.shape[1], dtype=K.dtype)
        error[seed % len(a), seed // 7 % len(a)] = 1
    elif kind == "rank one":
        error = torch.outer(a, a if i == j else b)
    else:
        error = torch.randn(K.shape[1], K.shape[1], generator=generator, dtype=K.dtype)
    wrong = K.clone()
    wrong[i, :, j] += .01 * K.norm() * error / error.norm()
    return wrong


def caught(model, x, trials):
    """How many of `trials` disturbed kernels the check finds, in each dtype; and that it takes the right one."""
    counts = []
    for model, x in float32_and_64(model, x):
        J = common.Jacobian(model, x, 2**30, True)
        K = J.product(J)
        assert J.confirms(K, J)
        for kind in ("entry", "rank one", "any"):
            pairs = torch.randint(len(x), (trials, 2), generator=torch.Generator().manual_seed(1)).tolist()
            pairs[::3] = [(i, i) for i, _ in pairs[::3]]
            counts.append(sum(not J.confirms(disturbed(K, pair, kind, seed), J) for seed, pair in enumerate(pairs)))
    return counts


@pytest.mark.parametrize("make, shape", [
    (lambda: common.mlp([5, 20, 3]), (10, 5)), (lambda: common.mlp([5, 20, 1]), (30, 5)),
    RIGHT["transformer"], RIGHT["prelu"]])
def test_an_error_of_one_percent_in_one_block_is_caught(make, shape):
    model, x = example("embedding" if len(shape) == 2 and shape[1] == 6 else "", make, shape)
    assert caught(model, x, 100) == [100] * 6


PLAIN = ["autoencoder, tied", "one layer's rows permuted", "rows permuted and back", "tied weights",
         "weight norm, old"]  # where only the second attempt is right


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_is_not_refused(name):
    for model, x in float32_and_64(*example(name, *RIGHT[name])):
        J = common.Jacobian(model, x, 2**30, name not in PLAIN)
        assert J.confirms(J.product(J), J)


def test_a_diverged_network_has_no_finite_kernel():
    model, x = common.mlp([5, 4, 2]), torch.randn(3, 5)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    assert common.empirical_ntk(model, x).isnan().any()


# --- by hand, and what stays as it was ---


def test_worked_example_by_hand():
    """f(x) = w x + b: d f / d(w, b) = (x, 1), so K(2, 3) = 2 * 3 + 1 = 7, whatever w and b are."""
    K = common.empirical_ntk(nn.Linear(1, 1), torch.tensor([[2.0], [3.0]]))
    assert torch.equal(K.view(2, 2), torch.tensor([[5.0, 7.0], [7.0, 10.0]]))


@pytest.mark.parametrize("sizes", [(5, 5), (5, 3)])
@pytest.mark.parametrize("T, O, d", [(1, 3, 4), (9, 3, 4), (2, 40, 50)])
def test_contraction_is_the_sum_it_says(sizes, T, O, d):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    n, m = sizes
    A, G, B, H = draw(n, T, d), draw(n, 2, T, O), draw(m, T, d), draw(m, 2, T, O)
    if n == m:
        B, H = A, G
    expected = torch.einsum("itd,jsd,icto,jeso->icje", A, B, G, H)
    assert close(common.Jacobian.contract(A, G, B, H, False), expected)
    if n == m:
        half = common.Jacobian.contract(A, G, A, G, True)
        above = torch.ones(n, n).triu()[:, None, :, None]
        assert close(half * above, expected * above)


def test_images_as_they_are_stored():
    """uint8 images, standardised by the first layer."""
    torch.manual_seed(0)
    model = Net(lambda f, x: f.a(x.double().flatten(1) / 255), a=common.mlp([12, 6, 2])).double()
    x = torch.randint(256, (5, 3, 2, 2), dtype=torch.uint8)
    assert close(common.empirical_ntk(model, x), kernel_by_hand(model, x))


def test_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7).eval(), nn.ReLU(inplace=True), nn.Linear(7, 3))
    model[0].register_buffer("calls", torch.zeros(()))
    seen = []

    def users_hook(m, args, out):  # honoured and kept
        m.calls += 1
        seen.append(1)
        return out * 2

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
    noisy = Net(lambda f, x: f.a(x) + torch.rand(3), a=nn.Linear(5, 3))  # draws, and its kernel is none the worse
    assert close(common.empirical_ntk(noisy, x), kernel_by_hand(noisy, x), 1e-5)
    random = torch.get_rng_state()
    common.empirical_ntk(noisy, x)
    assert torch.equal(torch.get_rng_state(), random)


def test_tf32_is_off_inside_and_as_before_outside():
    inside = []
    model = Net(lambda f, x: inside.append(torch.backends.cuda.matmul.fp32_precision) or f.a(x), a=nn.Linear(5, 3))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        common.empirical_ntk(model, torch.randn(4, 5))
        assert set(inside) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert torch.backends.cudnn.allow_tf32 == before[1]


def test_no_example():
    for x, y in ((torch.zeros(0, 5), None), (torch.zeros(2, 5), torch.zeros(0, 5))):
        with pytest.raises(ValueError, match="no example"):
            common.empirical_ntk(nn.Linear(5, 2), x, y)


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
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        model[0].bias.zero_()
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
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64)
    start = common.mlp([5, 16, 2]).double()
    errors = []
    for alpha in (1.0, 10.0, 100.0, 1000.0):
        f = common.center(common.mlp([5, 16, 2]).double(), alpha)
        f.model.load_state_dict(start.state_dict()), f.model0.load_state_dict(start.state_dict())
        assert math.isnan(common.linearisation_error(f, x))  # 0 / 0 at theta0
        g = torch.Generator().manual_seed(1)
        step = [torch.randn(p.shape, generator=g, dtype=p.dtype) * .05 / alpha for p in f.model.parameters()]
        with torch.no_grad():
            for p, s in zip(f.model.parameters(), step):
                p.add_(s)
        linear = alpha * jacobian(start, x) @ torch.cat([s.flatten() for s in step])
        expected = ((f(x) - linear).norm() / f(x).norm()).item()
        assert common.linearisation_error(f, x) == pytest.approx(expected, rel=1e-8)
        errors.append(expected)
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert common.linearisation_error(common.center(start, math.inf), x) == 0


@pytest.mark.parametrize("scale", [1e-200, 1e-300, 1e200])
@pytest.mark.parametrize("centered", [False, True])
def test_kernel_alignment_has_no_scale(scale, centered):
    K, L = kernel(0), kernel(1)
    assert common.kernel_alignment(scale * K, scale * K, centered) == pytest.approx(1)
    assert common.kernel_alignment(scale * K, K, centered) == pytest.approx(1)
    expected = common.kernel_alignment(K, L, centered)
    assert common.kernel_alignment(scale * K, L / scale, centered) == pytest.approx(expected)


def test_linearisation_error_without_a_forward_mode_formula():
    model, x = example("weight norm", *RIGHT["weight norm"])
    f = common.center(model, 2.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.01)
    linear = 2 * jacobian(f.model0.requires_grad_(), x).sum(2) * .01
    expected = ((f(x) - linear).norm() / f(x).norm()).item()
    assert common.linearisation_error(f, x) == pytest.approx(expected, rel=1e-8)


# --- what people bring ---


class KeywordHead(nn.Module):
    """The head is registered first, called last, by keyword; attention holds a linear layer that is never called."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(4, 2), nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        h = self.body(input=x)
        return self.head(input=h + self.attention(h[:, None], h[:, None], h[:, None])[0][:, 0])


def test_representation_is_what_the_last_called_linear_receives():
    torch.manual_seed(0)
    model, x = KeywordHead(), torch.randn(5, 3)
    h = model.body(x)
    expected = h + model.attention(h[:, None], h[:, None], h[:, None])[0][:, 0]
    assert torch.equal(common.representation(model, x), expected.detach())
    assert common.representation(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.), torch.randn(2, 3, 4)).shape == (2, 24)
    with pytest.raises(ValueError, match="no nn.Linear"):
        common.representation(nn.Flatten(), torch.randn(2, 3, 4))


def test_an_embedding_that_renormalises_itself_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=.5), nn.Flatten(), nn.Linear(12, 2)).double()
    x, before = torch.randint(10, (4, 3)), copy.deepcopy(model.state_dict())
    K = common.empirical_ntk(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(torch.arange(10)[:, None].repeat(1, 3))  # now it has renormalised itself
    assert close(K, kernel_by_hand(model, x))


@pytest.mark.parametrize("size, stride, matrix", [
    (1, 1, True), (2, 2, True), (1, 2, True), (2, 1, False), (3, 2, False)])
def test_a_convolution_on_a_single_position_is_a_matrix_product(size, stride, matrix, monkeypatch):
    torch.manual_seed(0)
    ours, x = common.Conv(4, 6, 3, stride, padding=1), torch.randn(5, 4, size, size, requires_grad=True)
    torch.manual_seed(0)
    torchs = nn.Conv2d(4, 6, 3, stride, padding=1)
    assert all(torch.equal(value, torchs.state_dict()[name]) for name, value in ours.state_dict().items())
    products = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: products.append(1) or linear(*args))
    one, other = ours(x), torchs(x)
    assert len(products) == matrix
    torch.testing.assert_close(one, other, rtol=3e-7, atol=3e-7)
    slope = torch.randn_like(one)
    mine = torch.autograd.grad(one, [x, *ours.parameters()], slope)
    theirs = torch.autograd.grad(other, [x, *torchs.parameters()], slope)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    ours, torchs = (nn.Sequential(layer, nn.Flatten()).double() for layer in (ours, torchs))
    assert close(common.empirical_ntk(ours, x.detach().double()), kernel_by_hand(torchs, x.detach().double()))


def test_resnet18_takes_that_way_and_keeps_its_structured_kernel():
    torch.manual_seed(0)
    model, x = common.resnet18(3, width=4), torch.randn(4, 3, 32, 32)
    J = common.Jacobian(model, x, 2**30, structured=True)
    assert len(J.layers) == 21 and not J.rest and J.confirms(J.product(J), J)
