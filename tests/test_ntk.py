"""The NTK and the linearity measures, in float64 against per-example, per-output autograd Jacobians."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common


def jacobian(model, x):
    """(N, C, P), one autograd call an example and output."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        f = model(x[i:i + 1]).flatten()
        rows.append(torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(
            f[c], parameters, retain_graph=True, materialize_grads=True)]) for c in range(len(f))]))
    return torch.stack(rows)


class Reuse(nn.Module):
    """A layer used twice, a bare parameter, a weight also used by hand, a hidden layer whose bias alone trains."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.d.weight.requires_grad_(False)

    def forward(self, x):
        h = torch.tanh(self.d(torch.tanh(self.a(x))))
        h = torch.tanh(self.b(torch.tanh(self.b(h)))) * self.scale
        return self.c(h) + F.linear(h, self.c.weight) ** 2


class Transformer(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.embed, self.out, self.batch_first = nn.Embedding(11, 8), nn.Linear(8, 2), batch_first
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, dropout=0.0)

    def forward(self, x):
        h = self.embed(x)
        if self.batch_first:
            return self.out(self.block(h).mean(1))
        return self.out(self.block(h.transpose(0, 1)).mean(0))  # rows are positions, not examples


def convnet():
    return nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1, groups=2),
                         nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3, padding=2, dilation=2, bias=False), nn.ReLU(),
                         nn.Conv2d(6, 6, (3, 1), (2, 1), padding="valid"), nn.GroupNorm(2, 6),
                         nn.Conv2d(6, 5, (3, 2), padding=(1, 0), bias=False), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(20, 3))


def eval_batch_norm():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=2).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(.5, 2)
            nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    return model


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)), (6, 5)),
    "one output, one example": (lambda: common.mlp([3, 4, 1]), (1, 3)),
    "sequence input": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)), (4, 3, 4)),
    "ours": (lambda: common.resnet18(3, width=4), (4, 3, 32, 32)),
    "torchvision's resnet18": (eval_batch_norm, (3, 3, 40, 40)),
    "groups, dilation, stride": (convnet, (4, 4, 12, 12)),
    "reuse": (Reuse, (5, 6)),
    "transformer": (lambda: Transformer(True), (4, 5)),
    "transformer, sequence first": (lambda: Transformer(False), (4, 2)),  # two positions: looks like a batch of two
    "weight norm": (lambda: nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU(),
                                          nn.Linear(5, 2)), (3, 4)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", CASES)
def test_equals_naive_jacobian(case):
    torch.manual_seed(0)
    make, shape = CASES[case]
    model = make().double()
    x = torch.randint(11, shape) if "transformer" in case else torch.randn(shape, dtype=torch.float64)
    J = jacobian(model, x)
    expected = torch.einsum("icp,jep->icje", J, J)
    close = lambda a, b: (a - b).norm() <= 1e-10 * b.norm()
    K = common.empirical_ntk(model, x)
    assert K.shape == expected.shape and close(K, expected)
    flat = K.reshape(J.shape[0] * J.shape[1], -1)
    assert close(flat, flat.T) and torch.linalg.eigvalsh((flat + flat.T) / 2).min() > -1e-10 * flat.norm()
    assert close(common.empirical_ntk(model, x, memory=1), expected)
    assert close(common.empirical_ntk(model, x, trace=True), torch.einsum("icjc->ij", expected))
    if len(x) > 2:
        assert close(common.empirical_ntk(model, x[:2], x[1:], memory=1), expected[:2, :, 1:])


def test_both_contractions_agree():
    """Wide layers contract separately, narrow ones form the Jacobian: both are taken in this network, and are right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 64, 4, 4), nn.ReLU(), nn.Flatten(),
                          nn.Linear(256, 3)).double()
    x = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    J = jacobian(model, x)
    assert torch.allclose(common.empirical_ntk(model, x), torch.einsum("icp,jep->icje", J, J), rtol=1e-10)


def test_worked_example_by_hand():
    """f(x) = w x + b: d f / d(w, b) = (x, 1), so K(2, 3) = 2 * 3 + 1 = 7, whatever w and b are."""
    net = nn.Linear(1, 1)
    K = common.empirical_ntk(net, torch.tensor([[2.0], [3.0]]), trace=True)
    assert torch.equal(K, torch.tensor([[5.0, 7.0], [7.0, 10.0]]))


def test_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(inplace=True), nn.Linear(7, 3)).eval()
    seen = []
    model[0].register_forward_hook(lambda m, args, out: seen.append(1) or out * 2)  # a user's hook, honoured and kept
    model[0].weight.grad = torch.ones(7, 5)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(4, 5)
    torch.set_rng_state(before)
    with torch.no_grad():
        K = common.empirical_ntk(model, x)
    J = jacobian(model, x)
    assert torch.allclose(K, torch.einsum("icp,jep->icje", J, J), rtol=1e-4)
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(7, 5)) and model[3].weight.grad is None
    assert [len(m._forward_hooks) for m in model] == [1, 0, 0, 0]


def test_frozen_parameters_do_not_count():
    torch.manual_seed(0)
    model = common.mlp([4, 6, 2]).double()
    model[0].weight.requires_grad_(False)
    x = torch.randn(3, 4, dtype=torch.float64)
    J = jacobian(model, x)
    assert torch.allclose(common.empirical_ntk(model, x), torch.einsum("icp,jep->icje", J, J))
    with pytest.raises(ValueError, match="requires gradients"):
        common.empirical_ntk(model.requires_grad_(False), x)


def test_bad_input():
    with pytest.raises(ValueError, match="no example"):
        common.empirical_ntk(common.mlp([4, 2]), torch.zeros(0, 4))
    with pytest.raises(ValueError, match="one row an example"):
        common.empirical_ntk(nn.Sequential(nn.Linear(4, 2), nn.Flatten(0)), torch.zeros(3, 4))


def kernel(seed, n=8):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(n, 5, generator=g, dtype=torch.float64)
    return A @ A.T


def test_kernel_alignment():
    K, L = kernel(0), kernel(1)
    assert common.kernel_alignment(K, K) == pytest.approx(1)
    assert common.kernel_alignment(3 * K, K) == pytest.approx(1)
    assert common.kernel_alignment(K, L) == pytest.approx((torch.trace(K @ L) / (K.norm() * L.norm())).item())
    assert common.kernel_alignment(K.view(4, 2, 4, 2), L.view(4, 2, 4, 2)) == pytest.approx(common.kernel_alignment(K, L))
    H = torch.eye(8, dtype=torch.float64) - 1 / 8
    assert common.kernel_alignment(K, L, centered=True) == pytest.approx(common.kernel_alignment(H @ K @ H, H @ L @ H))
    assert common.kernel_alignment(K, K + 100, centered=True) == pytest.approx(1)  # a constant is centred away
    assert math.isnan(common.kernel_alignment(K, 0 * K))
    for bad in (kernel(0, 7), K[:4], K.view(4, 2, 4, 2)):
        with pytest.raises(ValueError):
            common.kernel_alignment(K, bad)


def test_target_alignment():
    y = torch.tensor([0, 1, 1, 0])
    same = (y[:, None] == y).double()
    assert common.target_alignment(same, y) == pytest.approx(1)
    assert common.target_alignment(same, y, centered=False) == pytest.approx(1)
    Y = F.one_hot(y, 3).double().reshape(12, 1)
    assert common.target_alignment((Y @ Y.T).view(4, 3, 4, 3), y) == pytest.approx(1)
    signs = 2.0 * y - 1
    K = kernel(0, 4)
    assert common.target_alignment(K, signs, centered=False) == pytest.approx(
        (signs.double() @ K @ signs.double() / (K.norm() * 4)).item())
    assert common.target_alignment(K.view(4, 1, 4, 1), signs, centered=False) == pytest.approx(
        common.target_alignment(K, signs, centered=False))


def test_target_alignment_of_one_output_takes_class_indices():
    y, K = torch.tensor([0, 1, 1, 0]), kernel(0, 4)
    assert common.target_alignment(K.view(4, 1, 4, 1), y) == pytest.approx(common.target_alignment(K, 2.0 * y - 1))


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
    assert common.representation_alignment(R @ rotation, R, gram=True) == pytest.approx(1)  # only R R^T ignores rotations


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
        J = jacobian(start, x)
        linear = alpha * J @ torch.cat([s.flatten() for s in step])
        expected = ((f(x) - linear).norm() / f(x).norm()).item()
        assert common.linearisation_error(f, x) == pytest.approx(expected, rel=1e-8)
        errors.append(expected)
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert common.linearisation_error(common.center(start, math.inf), x) == 0
