"""Rich and lazy training of any network. Needs torch alone: copy this file, or a function with what it "Needs".

    f = center(network, alpha=100)         # f(x) = alpha (network(x) - network at the start(x))
    optimizer = scaled_sgd(f, lr=.1)       # at lr / alpha**2
    loss = F.cross_entropy(f(x), y)        # then zero_grad, backward and step, as ever
    K = empirical_ntk(network, x)          # the tangent kernel, (N, C, N, C), exact

Source: George, Lajoie, Baratin, "Lazy vs hasty: linearization in deep networks impacts learning schedule based on
example difficulty", TMLR 2022; scaling a centred model: Chizat, Oyallon, Bach, "On lazy training in differentiable
programming", NeurIPS 2019."""
import contextlib
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

# 1  The idea ---------------------------------------------------------------------------------------
def center(model, alpha):
    """Return f^a(x) = a (f_theta(x) - f_theta0(x)); theta0 is what `model` holds now (paper, section 2).

    `model` itself trains afterwards. a = 1 is ordinary (rich) training of the centred network. At a >> 1 and the
    learning rate lr / a^2 (scaled_sgd) theta hardly moves: lazy training. a = inf is the limit, linear in theta.
    model: maps examples (N, ...) to outputs (N, C), each from its own example alone; dropout and batch norm in eval
    mode. torch's inference shortcut for attention, which rounds otherwise, is switched off.
    Raises ValueError: alpha is no number above 0; see check_deterministic.
    Needs: CenteredModel, LinearizedModel, check_deterministic, true_float32."""
    number = hasattr(alpha, "__float__") and not isinstance(alpha, bool)
    if not number or not (1e-100 < float(alpha) < 1e100 or alpha == math.inf):
        raise ValueError(f"alpha must be a number above 0, or inf for the linear network; got {alpha!r}")
    torch.backends.mha.set_fastpath_enabled(False)
    return LinearizedModel(model) if alpha == math.inf else CenteredModel(model, float(alpha))


class CenteredModel(nn.Module):
    """f^a(x) = a (f_theta(x) - f_theta0(x)): self.model trains, self.model0 is its frozen copy; 0 at the start.
    f_theta0(x) never changes, so it can be computed once for a whole data set and handed in as f0: then a step costs
    no second forward pass (and f^a is 0 at the start within rounding only). forward(x, f0=None): x (N, ...), f0 (N, C)
    or None -> (N, C). Raises ValueError: see check_deterministic. Needs: check_deterministic, true_float32."""

    def __init__(self, model, alpha):
        super().__init__()
        check_deterministic(model)
        self.alpha, self.model, self.modes = alpha, model, None
        self.model0 = copy.deepcopy(model).requires_grad_(False)

    def forward(self, x, f0=None):
        self.check(x)
        f = self.model(x.clone())  # a copy for each: a network may change its input in place
        if f0 is None or x.requires_grad:  # f0 has a part of the gradient in x
            f0 = self.model0(x.clone())
        if f0.shape != f.shape:  # (N,) against (N, 1) would broadcast to (N, N)
            raise ValueError(f"f0 has shape {tuple(f0.shape)}, the network's output {tuple(f.shape)}")
        return self.alpha * (f - f0)

    def check(self, x):
        """What f^a rests on, at the first call and again where somebody has written model.train() since."""
        modes = [m.training for m in self.modules()]
        if modes != self.modes:
            check_deterministic(self.model, x)
            check_deterministic(self.model0, x)
            if self.alpha == math.inf:
                self.check_derivative(self.model0, x)
            self.modes = modes


def scaled_sgd(centered, lr, momentum=0.0):
    """torch.optim.SGD for f^a at learning rate lr / a^2 (paper, section 2).
    Why: the gradient of L(f^a) carries one factor a, and f^a turns a step of theta into a times as much. So at
    lr / a^2 the *outputs* move at a speed that does not depend on a. At a = inf delta = a (theta - theta0) itself
    trains, and both factors are gone. No weight decay: it would pull theta to 0, not to theta0.
    centered: what `center` returned. Raises ValueError: it is not; lr not above 0; momentum not in [0, 1)."""
    if not hasattr(centered, "model0"):
        raise ValueError(f"scaled_sgd takes what center(model, alpha) returned, not {type(centered).__name__}")
    if not 0 < lr < math.inf or not 0 <= momentum < 1:
        raise ValueError(f"lr must be above 0 and momentum in [0, 1); got {lr} and {momentum}")
    alpha = centered.alpha
    if alpha == math.inf:
        return torch.optim.SGD(centered.delta, lr, momentum)
    trained = [p for p in centered.model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr / alpha**2, momentum)


def check_deterministic(model, x=None):
    """Raise ValueError where f^a means nothing: f(x) depends on chance, on the other examples or on how often it
    was called, or has no row of real numbers for each example. By the layers' names; given x (N, ...), by value:
    f(x) twice, and f of one example alone. Needs: true_float32."""
    for name, m in model.named_modules():
        kind, chance = type(m).__name__, getattr(m, "p", 1)
        random = any(word in kind for word in ("BatchNorm", "Drop", "Stochastic", "RReLU", "SpectralNorm"))
        if random and chance and m.training:
            raise ValueError(f"{name or 'the model'} ({kind}) is in training mode, where it is random or mixes the "
                             "batch: call model.eval() first")
    if x is None:
        return
    with true_float32(), torch.no_grad():
        one = slice(len(x) // 2, len(x) // 2 + 1)  # an example with others before and behind
        f, again, alone = model(x.clone()), model(x.clone()), model(x[one].clone())
    if not isinstance(f, torch.Tensor) or not f.is_floating_point() or f.shape[:1] != x.shape[:1]:
        raise ValueError("the network must return one tensor of real numbers with a row for each example")
    allowed = torch.finfo(f.dtype).eps**.5 * f.norm() / len(f)**.5  # against a typical row
    if (f - again).norm() > allowed or (f[one] - alone).norm() > allowed:
        raise ValueError("f(x) computed twice differs, or f of one example from its row in a batch: the network "
                         "depends on chance or on the other examples, or changes as it is used")


@contextlib.contextmanager
def true_float32():
    """Inside, float32 is neither TF32 nor bfloat16 nor autocast's, and gradients are on; then all is as before."""
    cuda, cudnn, cpu = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    units = [cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv]
    before = [unit.fp32_precision for unit in units]
    try:
        for unit in units:
            unit.fp32_precision = "ieee"
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False), torch.inference_mode(False):
            yield
    finally:
        for unit, precision in zip(units, before):
            unit.fp32_precision = precision


# 2  Exactly lazy -----------------------------------------------------------------------------------
class LinearizedModel(CenteredModel):
    """The lazy limit, a = inf: f(x) = grad f_theta0(x) . delta, trained in delta from 0 (paper, eq. 2).

    delta stands for a (theta - theta0), which stays finite as a grows. The derivative is a forward-mode pass, a step
    1.5 times an ordinary one. It is checked against backward passes at the first call; among others weight_norm, GLU,
    Hardsigmoid, float32 LSTMs, Functions without jvp and torch.no_grad in a network are refused. forward(x, f0=None):
    x (N, ...) -> (N, C). ValueError: see both checks. Needs: CenteredModel, check_deterministic, true_float32."""

    def __init__(self, model):
        super().__init__(model, math.inf)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.delta = nn.ParameterList(torch.zeros_like(model.get_parameter(name)) for name in self.names)

    def forward(self, x, f0=None):
        self.check(x)
        return self.derivative(self.model0, x, dict(zip(self.names, self.delta)))

    @staticmethod
    def derivative(model, x, direction):
        """d f_(theta + t direction)(x) / dt at t = 0, (N, C); direction: {a parameter's name: tensor}."""
        forward_mode, wanted, theta = torch.autograd.forward_ad, torch.is_grad_enabled(), {}
        along = {model.get_parameter(name): v for name, v in direction.items()}
        attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # the one with a formula
        # No derivative is seen in inference mode; to leave it switches gradients on, wanted or not.
        with torch.inference_mode(False), torch.set_grad_enabled(wanted), attention, forward_mode.dual_level():
            for place, m in model.named_modules():  # each module once, however often it is registered
                for name, p in m.named_parameters(place, recurse=False, remove_duplicate=False):
                    theta[name] = p.detach()
                    if p in along:
                        theta[name] = forward_mode.make_dual(p.detach(), along[p])
            f = torch.func.functional_call(model, theta, (x.clone(),), tie_weights=False)
            return forward_mode.unpack_dual(f).tangent

    @staticmethod
    def check_derivative(model, x):
        """Raise ValueError where a layer has no formula for forward mode, or where that differs from backward mode
        (it ignores torch.no_grad). J v is linear in v: J^T u . v must be u . J v, and (its slope in v) . v as well."""
        generator = torch.Generator().manual_seed(0)
        try:
            with true_float32():
                model = copy.deepcopy(model).requires_grad_()
                theta = dict(model.named_parameters())
                f = model(x.clone())
                u, *v = [torch.randn(t.shape, generator=generator).to(t) for t in (f, *theta.values())]
                v = [direction.requires_grad_() for direction in v]
                Jv = LinearizedModel.derivative(model, x, dict(zip(theta, v)))
                allowed = torch.finfo(f.dtype).eps**.5 * Jv.norm()
                for output, inputs in ((f, list(theta.values())), (Jv, v)):  # J^T u, and the slope of u . J v in v
                    slopes = torch.autograd.grad(output, inputs, u, materialize_grads=True)
                    gap = sum((g * direction).sum() for g, direction in zip(slopes, v)) - (u * Jv).sum()
                    if not gap.abs() <= allowed:
                        raise ValueError("forward and backward mode differ")
            return
        except NameError:  # a forgotten paste
            raise
        except Exception as error:  # whatever a network stumbles over
            reason = str(error).split("\n")[0]
        raise ValueError(f"the network cannot be linearised: {reason}; use a large alpha instead")


# 3  How linear is it? ------------------------------------------------------------------------------
def empirical_ntk(model, x, y=None, memory=2**30):
    """K[i, c, j, e] = < d f_c(x_i) / d theta, d f_e(y_j) / d theta >, exact; theta: what requires gradients.

    Linear and Conv2d layers give their part of K without a Jacobian. K is then checked against backward passes of
    whole batches; if that fails (tied weights, a layer called twice), each gradient is taken alone, and K checked.
    x (N, ...), y (M, ...) or None for y = x -> (N, C, M, C); memory: bytes to stay near.
    Raises ValueError: outputs that depend on chance or on other examples, or are no float32 or float64 (N, ...).
    Needs: check_deterministic, true_float32, trace, Jacobian."""
    if y is not None:
        return empirical_ntk(model, torch.cat([x, y]), memory=memory)[:len(x), :, len(x):]
    check_deterministic(model, x)
    for structured in (True, False):
        try:
            with true_float32():
                J = Jacobian(model, x, memory, structured)
                K = J.kernel()
                if J.confirms(K):
                    return K
            reason = "backward passes give another one"
        except NameError:  # a forgotten paste
            raise
        except Exception as error:  # whatever a network stumbles over
            reason = str(error).split("\n")[0]
    raise ValueError(f"no tangent kernel: {reason}")


def trace(model, x, modules):
    """f(x) as (N, C), and a list of (module, its input, its output), one for each call of one of the modules."""
    calls = []

    def hook(m, args, kwargs, output):
        calls.append((m, [*args, *kwargs.values()][0], output))
        return output.clone()  # what works in place on it then leaves `output` as the module made it

    handles = [m.register_forward_hook(hook, prepend=True, with_kwargs=True) for m in modules]
    try:
        return model(x.clone()).reshape(len(x), -1), calls
    finally:
        for handle in handles:
            handle.remove()


class Jacobian:
    """J(x) = d f(x) / d theta, (N, C, P), never held as a whole. With A the input of a Linear or Conv2d layer at
    its positions t, and G the gradient of an output in what it returns there, its part is sum_t G_t (x) A_t
    ("structured derivatives": Novak, Sohl-Dickstein, Schoenholz, ICML 2022). Of all other parameters, or of all
    where `structured` is False, J itself is taken. Needs: trace."""

    def __init__(self, model, x, memory, structured):
        self.model, self.x, self.layers = model, x, []
        for m in model.modules():
            conv = isinstance(m, nn.Conv2d) and m.groups == 1
            trains = all(p.requires_grad for p in m.parameters())
            if structured and trains and (conv or type(m) is nn.Linear):
                self.layers.append(m)
        covered = {p for m in self.layers for p in m.parameters()}
        self.theta = [p for p in model.parameters() if p.requires_grad]
        self.rest = [p for p in self.theta if p not in covered]
        size = sum(t.numel() * t.element_size() for pair in self.factors(x[:2]) for t in pair) / len(x[:2])
        self.block = max(1, int(memory / (4 * size)))  # two blocks are held at a time, and a graph

    def kernel(self):
        """J J^T, (N, C, N, C), block against block for j >= i; the other half is its mirror image."""
        N = len(self.x)
        for i in range(0, N, self.block):
            left = self.factors(self.x[i:i + self.block])
            if i == 0:
                C = left[0][1].shape[1]
                K = left[0][1].new_zeros(N, C, N, C)
            for j in range(i, N, self.block):
                right = left if j == i else self.factors(self.x[j:j + self.block])
                for (A, G), (B, H) in zip(left, right):
                    K[i:i + len(A), :, j:j + len(B)] += self.contract(A, G, B, H, half=i == j)
        upper = K.flatten(2).flatten(0, 1)
        return (upper.triu() + upper.triu(1).T).view(K.shape)

    def factors(self, x):
        """[(A (n, T, d), G (n, C, T, O)), ...], a pair for each layer, for a block of n examples x."""
        pairs = []
        if self.rest and len(x) > 1:  # J itself is taken an example at a time
            for layer in zip(*[self.factors(x_i) for x_i in x.split(1)]):
                A, G = zip(*layer)
                pairs.append((torch.cat(A), torch.cat(G)))
            return pairs
        f, calls = trace(self.model, x, self.layers)
        outputs, gradients = [output for _, _, output in calls], []
        for f_c in f.sum(0) if calls else []:
            gradients.append(torch.autograd.grad(f_c, outputs, retain_graph=True, materialize_grads=True))
        for (m, layer_input, _), *G in zip(calls, *gradients):
            pairs.append(self.layer_factors(m, layer_input.detach(), torch.stack(G, 1)))
        if self.rest or not calls:  # as a layer of one position whose input is 1
            J = self.pull_back(f, torch.eye(f.shape[1]).to(f)[:, None], self.rest)
            pairs.append((f.new_ones(1, 1, 1), J[None, :, None]))
        return pairs

    @staticmethod
    def layer_factors(m, A, G):
        """A (n, T, d) and G (n, C, T, O), T positions, of a layer's input A, (n, ..., d) or of a convolution (n,
        channels, h, w), and the gradients G in its output, (n, C, ..., O) or (n, C, O, h, w)."""
        if isinstance(m, nn.Conv2d):
            A = F.unfold(A, m.kernel_size, m.dilation, m.padding, m.stride).transpose(1, 2)
            G = G.flatten(3).transpose(2, 3)
        n, C, *_, O = G.shape
        A, G = A.reshape(n, -1, A.shape[-1]), G.reshape(n, C, -1, O)
        if m.bias is not None:  # the weight of an input that is always 1
            A = torch.cat([A, A.new_ones(*A.shape[:2], 1)], 2)
        T, d = A.shape[1:]
        if T * (d + C * O) > C * O * d:  # many positions: sum_t G_ct (x) A_t is held, as one of input 1
            A, G = A.new_ones(n, 1, 1), torch.einsum("ncto,ntd->ncod", G, A).flatten(2)[:, :, None]
        return A, G

    @staticmethod
    def pull_back(f, slopes, parameters):
        """J^T u as rows (K, P), for K slopes u (n, C) of the outputs f (n, C)."""
        rows = []
        for u in slopes:
            gradients = torch.autograd.grad(f, parameters, u, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.to_dense().flatten() for g in gradients]))
        return torch.stack(rows)

    @staticmethod
    def contract(A, G, B, H, half):
        """K[i, c, j, e] = sum_ts (A_it . B_js) (G_ict . H_jes), (n, C, m, C), a layer's part of the kernel, of A
        (n, T, d), G (n, C, T, O), B (m, S, d), H (m, C, S, O). half: both are the same, and j < i stays 0."""
        n, C = G.shape[:2]
        K = G.new_zeros(n, C, len(H), C)
        for i in range(n):  # an example at a time: nothing of size n m T S is ever held
            first = i if half else 0
            inputs = torch.einsum("td,jsd->jts", A[i], B[first:])
            weighted = inputs[:, None] @ H[first:]  # (m - first, C, T, O)
            K[i, :, first:] = (G[i].flatten(1) @ weighted.flatten(2).flatten(0, 1).T).view(C, -1, C)
        return K

    def confirms(self, K):
        """Whether u^T K v = < J^T u, J^T v > within rounding (of trace K), for each pair of four random u. Examples go
        in the same blocks as in `factors`: in others a ReLU may round to the other side of 0, and J be another."""
        u = torch.randn(4, *K.shape[:2], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(K)
        pulled, together = 0, 1 if self.rest else self.block
        for x, slopes in zip(self.x.split(together), u.split(together, 1)):
            f, _ = trace(self.model, x, [])
            pulled = pulled + self.pull_back(f, slopes, self.theta)
        expected = sum(part.double() @ part.double().T for part in pulled.split(2**20, 1))  # no copy of all of it
        found = torch.einsum("aic,icje,bje->ab", u.double(), K.double(), u.double())
        tolerance = 1e-10 if K.dtype == torch.float64 else 2e-5
        scale = expected.trace() / 4
        return torch.allclose(found / scale, expected / scale, rtol=0, atol=tolerance, equal_nan=True)  # diverged: nan


def kernel_alignment(K, K0, centered=False):
    """KA(K, K0) = Tr[K K0] / (|K|_F |K0|_F), in [0, 1] for kernels; 1 if proportional (paper, section 3).
    K, K0: both (N, N) or both (N, C, N, C). centered=True: H K H with H = I - 1 1^T / n over the n = N C rows (CKA:
    Cortes et al. 2012; Kornblith et al. 2019). With one-hot labels Y (N, C), K0 = Y Y^T is the alignment of Baratin et
    al. 2021. Returns a float, nan if a kernel is 0. Raises ValueError: shapes that are not square or differ."""
    half = K.dim() // 2
    if K.shape != K0.shape or K.shape[:half] != K.shape[half:]:
        raise ValueError(f"need two kernels (N, N) or (N, C, N, C) of one shape, got {K.shape} and {K0.shape}")
    kernels = []
    for k in (K, K0):
        k = k.reshape(math.isqrt(k.numel()), -1).double()
        k = k / k.abs().max()  # no scale: the square of 1e-200 would be 0
        if centered:
            k = k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()
        kernels.append(k / k.norm())
    return (kernels[0] * kernels[1]).sum().item()  # Tr[K K0] of symmetric kernels, without the product


@torch.no_grad()
def relu_signs(model, x):
    """Which ReLUs are active: x (N, ...) -> bool (N, units), for every call of every nn.ReLU, as they run.
    Raises ValueError: a network without nn.ReLU modules (F.relu cannot be seen from outside). Needs: trace."""
    _, calls = trace(model, x, [m for m in model.modules() if isinstance(m, nn.ReLU)])
    if not calls:
        raise ValueError("the network calls no nn.ReLU module")
    return torch.cat([(output > 0).reshape(len(x), -1) for _, _, output in calls], 1)


def sign_similarity(s, s0):
    """Share of ReLU units, over examples and units, active in both or in neither (paper, section 3). A float."""
    return (s == s0).double().mean().item()


@torch.no_grad()
def representation(model, x):
    """What the last nn.Linear that is called receives: x (N, ...) -> (N, d). ValueError: none is. Needs: trace."""
    _, calls = trace(model, x, [m for m in model.modules() if isinstance(m, nn.Linear)])
    if not calls:
        raise ValueError("the network calls no nn.Linear module: no last layer whose input could be taken")
    return calls[-1][1].flatten(1)


def representation_alignment(R, R0, gram=False):
    """Alignment of two representations (N, d), uncentred. A float. The paper's text speaks of R R^T (N, N), gram=True;
    its published code, and so its figures, align R^T R (d, d). The numbers differ. Needs: kernel_alignment."""
    return kernel_alignment(R @ R.T, R0 @ R0.T) if gram else kernel_alignment(R.T @ R, R0.T @ R0)


@torch.no_grad()
def linearisation_error(centered, x):
    """|f^a(x) - a grad f_theta0(x) . (theta - theta0)| / |f^a(x)|, a float, nan at theta0. centered: what `center`
    returned. Raises as LinearizedModel. Needs: CenteredModel, LinearizedModel, check_deterministic, true_float32."""
    if centered.alpha == math.inf:
        return 0.0
    moved = {name: p - centered.model0.get_parameter(name) for name, p in centered.model.named_parameters()}
    if not hasattr(centered, "derivative_checked"):
        LinearizedModel.check_derivative(centered.model0, x)
        centered.derivative_checked = True
    slope = LinearizedModel.derivative(centered.model0, x, moved)
    f = centered(x)
    return ((f - centered.alpha * slope).norm() / f.norm()).item()


# 4  The networks -----------------------------------------------------------------------------------
class mlp(nn.Sequential):
    """Linear layers of the given sizes with ReLU between them, torch's default initialisation: mlp([7, 60, 60, 1])."""

    def __init__(self, sizes):
        layers = []
        for inputs, outputs in zip(sizes, sizes[1:]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])


class Conv(nn.Conv2d):
    """A 3 x 3 convolution with padding 1. On maps no larger than its stride it has one output position: there it is a
    matrix product with the taps that meet the image, and faster; parameters and initialisation are Conv2d's."""

    def forward(self, x):
        height, width = x.shape[2:]
        if max(height, width) > self.stride[0]:
            return super().forward(x)
        taps = self.weight[:, :, 1:1 + height, 1:1 + width]
        return F.linear(x.flatten(1), taps.flatten(1), self.bias)[:, :, None, None]


class BasicBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))), with a 1x1 convolution on the shortcut where stride > 1."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = Conv(inputs, outputs, 3, stride, padding=1)
        self.conv2 = Conv(outputs, outputs, 3, padding=1)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.conv1(x))) + self.downsample(x))


class resnet18(nn.Module):
    """torchvision's ResNet18 layout, batch norm removed and a bias on every convolution: the paper's CIFAR network.
    He-normal (fan-out) convolutions, torch's default biases and last layer; 11.18 M parameters at width 64, 10 classes.
    On 32 x 32 images layer4 has a single position: 6.95 M weights there meet only padding and cannot move."""

    def __init__(self, num_classes, in_channels=3, width=64):
        super().__init__()

        def stage(inputs, outputs, stride):
            return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))

        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1, self.layer2 = stage(width, width, 1), stage(width, 2 * width, 2)
        self.layer3, self.layer4 = stage(2 * width, 4 * width, 2), stage(4 * width, 8 * width, 2)
        self.fc = nn.Linear(8 * width, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(self.relu(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class Standardise(nn.Module):
    """The first layer of every image network: uint8 (N, C, H, W) as stored -> (x / 255 - mean) / std, per channel."""

    def __init__(self, mean, std):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x):
        return (x.to(self.mean.dtype) / 255 - self.mean) / self.std
