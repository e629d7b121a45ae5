"""What every experiment shares, in the order a reader meets it.

    1  the centred model        center, CenteredModel, LinearizedModel
    2  the optimizer            scaled_sgd
    3  NTK, linearity measures  empirical_ntk, kernel_alignment, target_alignment, relu_signs, sign_similarity,
                                representation, representation_alignment, linearisation_error
    4  the networks             resnet18, mlp
    5  the data                 load_images, flip_labels, Examples
    6  the training loop        train, LinearityProbe
    7  equal training loss      value_at, summarise
    8  the command line         parser, parse, command_line

Sections 1 to 3 are made to be copied: paste a function with the names its docstring lists under "Needs:".

Source: George, Lajoie, Baratin, "Lazy vs hasty: linearization in deep networks impacts learning schedule based on
example difficulty", TMLR 2022. The idea of scaling a centred model: Chizat, Oyallon, Bach, "On lazy training in
differentiable programming", NeurIPS 2019.
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import os
import pathlib
import signal
import sys
import time
import warnings
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# 1  The centred model
# ---------------------------------------------------------------------------------------------------------------------


def center(model, alpha):
    """Return f^a(x) = a (f_theta(x) - f_theta0(x)), where theta0 is what `model` holds now (paper, section 2).

    `model` itself is what trains afterwards. a = 1 is ordinary (rich) training of the centred network; a >> 1, with the
    learning rate divided by a^2 (`scaled_sgd`), is lazy: theta hardly moves. a = inf is that limit, exactly linear.

    model: any nn.Module whose output for one example depends on that example alone.
    alpha: a number above 0, or float("inf").
    Raises ValueError: alpha is none of these, or batch norm or dropout is in training mode.
    Needs: CenteredModel, LinearizedModel, check_deterministic.
    """
    try:
        good = not isinstance(alpha, (str, bool)) and (1e-100 < float(alpha) < 1e100 or float(alpha) == float("inf"))
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"alpha must be a number above 0, or inf for the exactly linear network; got {alpha!r}")
    return LinearizedModel(model) if alpha == float("inf") else CenteredModel(model, float(alpha))


class CenteredModel(nn.Module):
    """f^a(x) = a (f_theta(x) - f_theta0(x)) around a frozen copy of `model`; exactly 0 at initialisation.

    self.model trains, self.model0 is the frozen copy. Since f_theta0 never changes, it can be computed once for a whole
    data set and handed in as `f0`: then a step costs no second forward pass (0 within rounding at initialisation if it
    was computed at another batch size).

    forward(x, f0=None): x (N, ...), f0 (N, C) or None -> (N, C).
    Raises ValueError: batch norm or dropout in training mode; f0 of another shape than f_theta(x).
    Needs: check_deterministic.
    """

    def __init__(self, model, alpha):
        import copy
        super().__init__()
        check_deterministic(model)
        self.alpha = alpha
        self.model = model
        self.model0 = copy.deepcopy(model).requires_grad_(False)

    def forward(self, x, f0=None):
        check_deterministic(self.model)
        f, alpha = self.model(x), self.alpha
        if f0 is None:
            with torch.no_grad():
                f0 = self.model0(x)
        if f0.shape != f.shape:  # (N,) against (N, 1) would broadcast to (N, N)
            raise ValueError(f"f0 has shape {tuple(f0.shape)}, the network's output {tuple(f.shape)}")
        return alpha * (f - f0)


class LinearizedModel(nn.Module):
    """The lazy limit, a = inf: f(x) = grad f_theta0(x) . delta, trained in delta from 0 (paper, eq. 2).

    delta stands for a (theta - theta0), which stays finite as a grows. The directional derivative is exact: one
    forward-mode pass (torch.func.jvp), about 1.7 times the cost of an ordinary training step.

    forward(x, f0=None): x (N, ...) -> (N, C); f0 is accepted for the sake of one interface and not needed.
    Raises ValueError: batch norm or dropout in training mode.
    Needs: check_deterministic.
    """
    alpha = float("inf")

    def __init__(self, model):
        import copy
        super().__init__()
        check_deterministic(model)
        self.model0 = copy.deepcopy(model).requires_grad_(False)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.delta = nn.ParameterList(torch.zeros_like(self.model0.get_parameter(name)) for name in self.names)

    def forward(self, x, f0=None):
        check_deterministic(self.model0)
        theta0 = {name: self.model0.get_parameter(name) for name in self.names}
        f = lambda theta: torch.func.functional_call(self.model0, theta, (x,))
        return torch.func.jvp(f, (theta0,), (dict(zip(self.names, self.delta)),))[1]


def check_deterministic(model):
    """Raise ValueError if f(x) would depend on chance or on the other examples of the batch: f_theta0 could not be
    fixed, and neither the centred model nor the NTK would mean anything. (F.dropout by hand goes unseen.)"""
    for name, m in model.named_modules():
        if (isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
                or isinstance(m, (nn.modules.dropout._DropoutNd, nn.RReLU)) and m.training and getattr(m, "p", 1)
                or isinstance(m, (nn.MultiheadAttention, nn.RNNBase)) and m.training and m.dropout):
            raise ValueError(f"{name or 'the model'} ({type(m).__name__}) is in training mode or has no fixed "
                             "statistics; call model.eval() first (its parameters still train)")


# ---------------------------------------------------------------------------------------------------------------------
# 2  The optimizer
# ---------------------------------------------------------------------------------------------------------------------


def scaled_sgd(centered, lr, momentum=0.0):
    """torch.optim.SGD for f^a at learning rate lr / a^2 (paper, section 2).

    Why: the gradient of L(f^a) carries one factor a, and f^a turns a step of theta into a times as much; so at lr / a^2
    the *outputs* move at a speed that does not depend on a. At a = inf the parameter is delta = a (theta - theta0)
    itself, and the two factors are already gone: plain lr.

    There is no weight decay: it would pull theta to 0, not to theta0.

    centered: what `center` returned. lr: number above 0. momentum: number in [0, 1).
    Raises ValueError: lr or momentum out of range.
    """
    if not 0 < lr < float("inf") or not 0 <= momentum < 1:
        raise ValueError(f"lr must be above 0 and momentum in [0, 1); got {lr} and {momentum}")
    alpha = centered.alpha
    scaled_lr = lr if alpha == float("inf") else lr / alpha**2
    parameters = [p for p in centered.parameters() if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)  # one pass over the memory instead of three
    return torch.optim.SGD(parameters, lr=scaled_lr, momentum=momentum, fused=fused)


# ---------------------------------------------------------------------------------------------------------------------
# 3  The NTK and the linearity measures
# ---------------------------------------------------------------------------------------------------------------------


def empirical_ntk(model, x, y=None, trace=False, memory=2**30):
    """K[i, c, j, e] = < d f_c(x_i) / d theta, d f_e(y_j) / d theta >, exact; theta: all that requires gradients.

    Never holds the Jacobian (for ResNet18, 100 examples and 10 outputs: 45 GB). With A the input of a layer at its
    positions t and G the gradient of an output with respect to what the layer returns there, the layer's part of the
    Jacobian is J = sum_t G_t (x) A_t, so its part of the kernel is either J J^T, or, without forming J,

        K[i, c, j, e] = sum_ts (A_it . A_js) (G_ict . G_jes)     for one position: (A A^T) * (G G^T)

    and the cheaper is taken ("structured derivatives": Novak, Sohl-Dickstein, Schoenholz, ICML 2022). Linear and
    ordinary Conv2d layers used once go this way; every other parameter through torch.func, one Jacobian an example.

    x (N, ...), y (M, ...) or None for y = x -> (N, C, M, C); with trace=True the sum over outputs c = e, (N, M).
    memory: bytes to stay near; examples are taken in blocks. Outputs of more dimensions than (N, C) are flattened.

    >>> net = nn.Linear(1, 1)                            # f(x) = w x + b, so d f = (x, 1) and K(x, y) = x y + 1
    >>> empirical_ntk(net, torch.tensor([[2.], [3.]]), trace=True)
    tensor([[ 5.,  7.],
            [ 7., 10.]])

    Raises ValueError: batch norm or dropout in training mode; a network that does not return one row an example.
    Needs: check_deterministic, capture, structured_layers.
    """
    check_deterministic(model)
    if len(x) == 0 or y is not None and len(y) == 0:
        raise ValueError("there is no example in x or in y")
    layers = structured_layers(model, x)
    structured = {id(p) for m in layers for p in m.parameters()}
    rest = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and id(p) not in structured}
    if not layers and not rest:
        raise ValueError("no parameter of the model requires gradients: there is no tangent kernel")

    def factors(x):
        """[(A (n, T, d), G (n, C, T, O))], one pair a layer."""
        f, calls = capture(model, layers, x)
        outs = [calls[m][0][1] for m in layers]
        rows = [torch.autograd.grad(f[:, c].sum(), outs, retain_graph=True, materialize_grads=True)
                for c in range(f.shape[1])] if layers else []
        pairs = []
        for m, *gs in zip(layers, *rows):
            a, g = calls[m][0][0], torch.stack(gs, 1)
            if isinstance(m, nn.Conv2d):
                a = F.unfold(a, m.kernel_size, padding=m.padding, stride=m.stride).transpose(1, 2)
                g = g.flatten(3).transpose(2, 3)
            a, g = a.reshape(len(a), -1, a.shape[-1]), g.reshape(*g.shape[:2], -1, g.shape[-1])
            ones = a.new_ones(*a.shape[:2], 1)  # the bias is the weight of an input that is always 1
            used = [a] * m.weight.requires_grad + [ones] * (m.bias is not None and m.bias.requires_grad)
            pairs.append((torch.cat(used, 2), g))
        if rest:
            f_one = lambda theta, one: torch.func.functional_call(model, theta, (one[None],)).flatten()
            with torch.no_grad():
                jacobian = torch.func.vmap(torch.func.jacrev(f_one), (None, 0))(rest, x)  # name -> (n, C, *shape)
            j = torch.cat([j.flatten(2) for j in jacobian.values()], 2)[:, :, None]
            pairs.append((j.new_ones(len(x), 1, 1), j))  # J itself, as a layer of one position whose input is 1
        if trace:  # a sum over outputs is a dot product over them: one output, with C O channels
            pairs = [(a, g.transpose(1, 2).flatten(2)[:, None]) for a, g in pairs]
        return pairs, f.shape[1]

    def product(a, g, b, h):
        """One layer's part of the kernel, (n, C, m, C): a (n, T, d), g (n, C, T, O); b (m, S, d), h (m, C, S, O)."""
        (n, C, T, O), (m, _, S, _), d = g.shape, h.shape, a.shape[2]
        jacobian = (n * T + m * S) * C * O * d + n * m * C * C * O * d
        separate = n * m * (T * S * d + C * T * S * O + C * C * T * O)
        if separate < jacobian:
            K = g.new_empty(n, C, m, C)
            for i in range(n):  # an example at a time: nothing of size n m T S is ever held
                aa = torch.einsum("td,jsd->jts", a[i], b)
                gg = aa[:, None] @ h  # (m, C, T, O)
                K[i] = (g[i].flatten(1) @ gg.flatten(2).flatten(0, 1).T).view(C, m, C)
            return K
        K = 0
        width = max(1, memory // (4 * (n + m) * C * d * g.element_size()))
        for g_part, h_part in zip(g.split(width, 3), h.split(width, 3)):  # some output channels at a time
            J = torch.einsum("icto,itd->icod", g_part, a).flatten(2).flatten(0, 1)
            L = J if h is g else torch.einsum("icto,itd->icod", h_part, b).flatten(2).flatten(0, 1)
            K = K + J @ L.T
        return K.view(n, C, m, C)

    other = x if y is None else y
    one = sum(a.nbytes + g.nbytes for a, g in factors(other[:1])[0])
    block = max(1, memory // (4 * one))  # two blocks at a time, each with the graph it came from
    K = None
    for i, xs in zip(range(0, len(x), block), x.split(block)):
        left, C = factors(xs)
        for j, ys in zip(range(0, len(other), block), other.split(block)):
            if y is None and j < i:
                continue  # K is symmetric
            right = left if y is None and i == j else factors(ys)[0]
            part = sum(product(*p, *q) for p, q in zip(left, right))
            K = part.new_empty(len(x), part.shape[1], len(other), part.shape[1]) if K is None else K
            K[i:i + block, :, j:j + block] = part
            if y is None and j > i:
                K[j:j + block, :, i:i + block] = part.permute(2, 3, 0, 1)
    return K[:, 0, :, 0] if trace else K


def capture(model, layers, x):
    """Run `model` on x: its output as (N, C), and for each layer the list of (input, output) of its calls."""
    calls = {m: [] for m in layers}

    def hook(m, args, kwargs, out):
        calls[m].append(((args[0] if args else kwargs["input"]).detach().clone(), out))
        return out.clone()  # an activation that works in place then leaves `out` as the layer made it

    handles = [m.register_forward_hook(hook, prepend=True, with_kwargs=True) for m in layers]
    try:
        with torch.enable_grad():
            f = model(x)
    finally:
        for handle in handles:
            handle.remove()
    if f.shape[0] != len(x):
        raise ValueError(f"the network returned shape {tuple(f.shape)} for {len(x)} examples; need one row an example")
    return f.reshape(len(x), -1), calls


def structured_layers(model, x):
    """The Linear and ordinary Conv2d layers whose part of the NTK follows from their inputs and output gradients.

    Tried out on two examples: the layer must run once, on one row an example that belongs to that example, and no one
    else may use its parameters (counted in autograd's own graph, which also sees F.linear(h, layer.weight)).
    Needs: capture.
    """
    def ordinary(m):
        return type(m) is nn.Linear or (type(m) is nn.Conv2d and m.groups == 1 and m.dilation == (1, 1)
                                        and m.padding_mode == "zeros" and not isinstance(m.padding, str))

    candidates = [m for m in model.modules() if ordinary(m) and set(m._parameters) == {"weight", "bias"}
                  and any(p.requires_grad for p in m.parameters())]
    f, calls = capture(model, candidates, torch.cat([x[:1], x[-1:]]))
    if f.grad_fn is None:
        return []
    uses, seen, stack = {}, set(), [f.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if hasattr(node, "variable"):  # a leaf: this edge is one use of a parameter
                uses[id(node.variable)] = uses.get(id(node.variable), 0) + 1
            elif node is not None and node not in seen:
                seen.add(node)
                stack.append(node)

    def once(m):
        return (len(calls[m]) == 1 and all(uses.get(id(p)) == 1 for p in m.parameters() if p.requires_grad)
                and len(calls[m][0][1]) == 2 and (calls[m][0][0].dim() == 4 or isinstance(m, nn.Linear)))

    layers = [m for m in candidates if once(m)]
    outs = [calls[m][0][1] for m in layers]
    reached = torch.autograd.grad(f[0].sum(), outs, materialize_grads=True) if layers else []
    return [m for m, g in zip(layers, reached) if not g[1].any()]  # example 0 must not depend on row 1


def kernel_alignment(K, K0, centered=False):
    """KA(K, K0) = Tr[K K0] / (|K|_F |K0|_F), in [0, 1] for kernels; 1 if proportional (paper, section 3).

    K, K0: both (N, N) or both (N, C, N, C). centered=True: H K H with H = I - 1 1^T / n over the n = N C rows (CKA:
    Cortes, Mohri, Rostamizadeh 2012; Kornblith et al. 2019). Returns a float, nan if a kernel is 0.
    Raises ValueError: shapes that are not square or differ.
    """
    rows = K.shape[0] * (K.shape[1] if K.dim() == 4 else 1)
    if K.shape != K0.shape or K.numel() != rows**2:
        raise ValueError("need two kernels (N, N) or (N, C, N, C) of one shape, got "
                         f"{tuple(K.shape)} and {tuple(K0.shape)}")
    K, K0 = K.reshape(rows, rows).double(), K0.reshape(rows, rows).double()
    if centered:
        K, K0 = (k - k.mean(0) - k.mean(1, keepdim=True) + k.mean() for k in (K, K0))
    return ((K * K0).sum() / (K.norm() * K0.norm())).item()  # Tr[K K0] of symmetric kernels, without the product


def target_alignment(K, y, centered=True):
    """Alignment of a kernel with the labels' own kernel Y Y^T (Baratin et al., AISTATS 2021).

    K (N, N) with Y (N, C) the one-hot labels; or K (N, C, N, C) with Y flattened to N C rows, the direction in which
    the loss pulls all outputs at once. y: (N,) class indices, or real targets (N,) or (N, C). Returns a float.
    Raises ValueError: as kernel_alignment.
    Needs: kernel_alignment.
    """
    if not y.is_floating_point():  # one output stands for two classes, as -1 and 1
        y = 2.0 * y - 1 if K.dim() == 4 and K.shape[1] == 1 else F.one_hot(y.long(), K.shape[1] if K.dim() == 4 else -1)
    Y = y.double().reshape(K.shape[0] * K.shape[1], 1) if K.dim() == 4 else y.double().reshape(len(y), -1)
    return kernel_alignment(K.reshape(len(Y), len(Y)), Y @ Y.T, centered)


@torch.no_grad()
def relu_signs(model, x):
    """Which ReLUs are active: x (N, ...) -> bool (N, units), over every call of every nn.ReLU, in order of execution.

    Raises ValueError: a network without nn.ReLU modules (F.relu cannot be seen from outside).
    """
    signs = []
    handles = [m.register_forward_hook(lambda m, args, out: signs.append((out > 0).flatten(1)))
               for m in model.modules() if isinstance(m, nn.ReLU)]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not signs:
        raise ValueError("the network calls no nn.ReLU module")
    return torch.cat(signs, 1)


def sign_similarity(s, s0):
    """Share of ReLU units, over examples and units, active in both or in neither (paper, section 3). A float."""
    return (s == s0).double().mean().item()


@torch.no_grad()
def representation(model, x):
    """What the last nn.Linear receives: x (N, ...) -> (N, d). Raises ValueError if none is called."""
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    seen = []
    handles = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone())) for m in last]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("the network calls no nn.Linear module: no last layer whose input could be taken")
    return seen[-1].flatten(1)


def representation_alignment(R, R0, gram=False):
    """Alignment of two representations (N, d) of the same N examples, uncentred. A float.

    The paper's text speaks of the (N, N) kernels R R^T (gram=True); its published code, and so its figures, align the
    (d, d) matrices R^T R (default). The numbers differ, so both are offered under their names.
    Raises ValueError: shapes differ.
    Needs: kernel_alignment.
    """
    return kernel_alignment(R @ R.T, R0 @ R0.T) if gram else kernel_alignment(R.T @ R, R0.T @ R0)


@torch.no_grad()
def linearisation_error(centered, x):
    """|f^a(x) - a grad f_theta0(x) . (theta - theta0)| / |f^a(x)|: how far the network is from its own linearisation.

    centered: a CenteredModel (a LinearizedModel is its own linearisation: 0). x (N, ...). A float, nan at theta0.
    """
    if centered.alpha == float("inf"):
        return 0.0
    theta0 = dict(centered.model0.named_parameters())
    moved = {name: p.detach() - theta0[name] for name, p in centered.model.named_parameters()}
    f = lambda theta: torch.func.functional_call(centered.model0, theta, (x,))
    f0, slope = torch.func.jvp(f, (theta0,), (moved,))
    fa = centered(x, f0)
    return ((fa - centered.alpha * slope).norm() / fa.norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# 4  The networks
# ---------------------------------------------------------------------------------------------------------------------


def mlp(sizes):
    """Linear layers of the given sizes with ReLU between them, torch's default initialisation: mlp([7, 60, 60, 1])."""
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class BasicBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))), with a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.downsample(x) + self.conv2(self.relu(self.conv1(x))))


class ResNet18(nn.Module):
    """See resnet18."""

    def __init__(self, num_classes, in_channels, width):
        super().__init__()
        block = lambda i, o, stride: nn.Sequential(BasicBlock(i, o, stride), BasicBlock(o, o, 1))
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1, self.layer2 = block(width, width, 1), block(width, 2 * width, 2)
        self.layer3, self.layer4 = block(2 * width, 4 * width, 2), block(4 * width, 8 * width, 2)
        self.fc = nn.Linear(8 * width, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(self.relu(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def resnet18(num_classes, in_channels=3, width=64):
    """torchvision's ResNet18 layout, batch norm removed and a bias on every convolution: the paper's CIFAR network.

    He-normal (fan-out) convolutions, torch's default biases and last layer; 11.18 M parameters at width 64, 10 classes.
    """
    # What this network is on 32 x 32 images: the stem leaves 8 x 8 positions, layer2 4 x 4, layer3 2 x 2, and layer4
    # works on a single one. There a 3 x 3 convolution sees padding on all sides but its centre, so 8 of its 9 taps
    # (5 of 9 in the first) never receive a gradient: 6.95 M of the 11.18 M parameters cannot move.
    return ResNet18(num_classes, in_channels, width)


# ---------------------------------------------------------------------------------------------------------------------
# 5  The data
# ---------------------------------------------------------------------------------------------------------------------


def load_images(dataset, data_dir="data"):
    """A data set as a dict of arrays: "cifar10", "synthetic", or the path of an .npz.

    x_train uint8 (N, H, W, C), y_train int64 (N,), x_test, y_test likewise, and where there are any score_train,
    score_test (float, higher = easier), attribute_train, attribute_test (0 / 1); "mean" and "std" per channel, (C,),
    of pixels in [0, 1]. Raises ValueError or OSError, each with a line that says what is wrong and what to do.
    """
    if dataset == "cifar10":
        return cifar10(data_dir)
    if dataset == "synthetic":
        return with_statistics(synthetic())
    if str(dataset).endswith(".npz"):
        return with_statistics(check_images(read_npz(dataset), dataset))
    raise ValueError(f"--dataset {dataset}: not a known name, nor the path of an .npz file")


def with_statistics(images):
    """Add the training pixels' own mean and standard deviation per channel."""
    x = images["x_train"]
    counts = [np.bincount(x[..., c].ravel(), minlength=256) / x[..., c].size for c in range(x.shape[-1])]
    levels = np.arange(256) / 255
    mean = [float(p @ levels) for p in counts]
    std = [max(float(p @ (levels - m)**2), 1e-6)**.5 for p, m in zip(counts, mean)]
    return {**images, "mean": mean, "std": std}


def cifar10(data_dir):
    """The paper's split: the first 40,000 CIFAR-10 training images train, the last 10,000 *training* images test."""
    import torchvision
    source = torchvision.datasets.CIFAR10
    try:
        train = source(data_dir, train=True, download=True)
    except (OSError, RuntimeError) as e:  # torchvision reports a bad checksum as RuntimeError
        raise OSError(f"CIFAR-10 could not be fetched from {source.url} ({first_line(e)}). Put {source.filename} into "
                      f"{os.path.abspath(data_dir)} by hand, or try --dataset synthetic") from None
    x, y = train.data, np.array(train.targets)
    return {"x_train": x[:40000], "y_train": y[:40000], "x_test": x[40000:], "y_test": y[40000:],
            "mean": [.4914, .4822, .4465], "std": [.2023, .1994, .2010]}


def read_npz(path):
    """The arrays of an .npz, without ever unpickling; ValueError or OSError in one line for whatever else it holds."""
    if not os.path.exists(path):
        raise OSError(f"{path}: no such file")
    try:
        with open(path, "rb") as raw:
            if not zipfile.is_zipfile(raw):
                raise ValueError("not a zip archive")
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
    except PermissionError:
        raise
    except Exception as e:  # hostile bytes make numpy and zipfile raise nearly anything, MemoryError included
        reason = "it claims more data than fits into memory" if isinstance(e, MemoryError) else str(e).split("\n")[0]
        raise ValueError(f"{path}: not a readable .npz file (truncated, damaged or another format: "
                         f"{reason[:150]})") from None


def check_images(images, path):
    """Check the arrays of a FILE.npz (see load_images), bring them to their types; ValueError says which is wrong."""
    def refuse(reason):
        raise ValueError(f"{path}: {reason}")

    checked = {}
    for split in ("train", "test"):
        for name in (f"x_{split}", f"y_{split}"):
            if name not in images:
                refuse(f"no array {name} (has: {', '.join(images) or 'none'}); see 'Your own data' in README.md")
        x, y = images[f"x_{split}"], images[f"y_{split}"]
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or 0 in x.shape:
            refuse(f"x_{split} must be uint8 (N, H, W, C) or (N, H, W) and not empty; it is {x.dtype} {x.shape}")
        x = x if x.ndim == 4 else x[..., None]
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            refuse(f"y_{split} must be integers ({len(x)},), one a image of x_{split}; it is {y.dtype} {y.shape}")
        checked[f"x_{split}"], checked[f"y_{split}"] = x, y.astype(np.int64)
        for name, good, what in ((f"score_{split}", lambda v: np.isfinite(v).all(), "finite numbers"),
                                 (f"attribute_{split}", lambda v: np.isin(v, (0, 1)).all(), "0 or 1")):
            if name in images:
                v = images[name]
                if v.dtype.kind not in "iuf" + "b" * (name[0] == "a") or v.shape != x.shape[:1] or not good(v):
                    refuse(f"{name} must be {what}, one a image of x_{split}; it is {v.dtype} {v.shape}")
                checked[name] = v.astype(np.float64 if name[0] == "s" else np.int64)
    x, y = checked["x_train"], checked["y_train"]
    if x.shape[1:] != checked["x_test"].shape[1:]:
        refuse(f"images of x_train are {x.shape[1:]}, those of x_test {checked['x_test'].shape[1:]}")
    classes = int(y.max()) + 1
    if y.min() < 0 or classes < 2 or classes > len(y) or len(np.unique(y)) != classes:
        refuse(f"y_train must run from 0 to the number of classes - 1, each present; it has {y.min()} to {y.max()}, "
               f"{len(np.unique(y))} different")
    if checked["y_test"].min() < 0 or checked["y_test"].max() >= classes:
        refuse(f"y_test has a label outside 0 to {classes - 1}, the labels of y_train")
    return checked


def synthetic(n_train=1200, n_test=400, classes=10, size=32):
    """Images of known difficulty, from a fixed seed. Each class has a smooth pattern; an image is its class's pattern,
    share 1 - d, and a smooth pattern of its own, share d, under pixel noise. d, uniform in [0, .9), is the difficulty:
    an easy image shares its pattern with many, a hard one is mostly alone. The score is 1 - d."""
    rng = np.random.default_rng(0)
    grid = np.arange(size) / size
    waves = np.stack([np.cos(2 * np.pi * (u * grid[:, None] + v * grid) + phase)
                      for u in range(3) for v in range(3) for phase in (0, np.pi / 2) if u + v])  # (16, size, size)
    smooth = lambda n: np.einsum("kwc,whv->khvc", rng.normal(size=(n, 16, 3)), waves) / 4  # (n, size, size, 3)
    pattern = smooth(classes)

    def draw(n):
        y = rng.permutation(np.arange(n) % classes)
        d = rng.uniform(0, .9, (n, 1, 1, 1))
        x = (1 - d) * pattern[y] + d * smooth(n) + 1.4 * rng.normal(size=(n, size, size, 3))
        return (128 + 40 * x).clip(0, 255).astype(np.uint8), y, 1 - d.ravel()

    names = ("x", "y", "score")
    return {f"{name}_{split}": value for split, n in (("train", n_train), ("test", n_test))
            for name, value in zip(names, draw(n))}


def flip_labels(y, fraction, num_classes, seed):
    """Replace the label of an exact share of the examples by another class, drawn uniformly from the other classes.

    y (N,) integer labels, an array or a tensor; returns the same kind. round(fraction N) labels change, and where the
    result differs from y is where the noise is. (The paper draws each example with that probability.)
    Raises ValueError: fraction not in (0, 1), or it changes no label or every one; fewer than two classes.
    """
    count = round(fraction * len(y)) if 0 < fraction < 1 else 0
    if not 0 < count < len(y) or num_classes < 2:
        raise ValueError(f"label noise must change some of the {len(y)} labels and not all, among two classes or more; "
                         f"got a fraction of {fraction} and {num_classes} classes")
    rng = np.random.default_rng(seed)
    flipped = rng.choice(len(y), count, replace=False)
    noisy = np.asarray(y).copy()
    noisy[flipped] = (noisy[flipped] + rng.integers(1, num_classes, count)) % num_classes
    return torch.as_tensor(noisy) if isinstance(y, torch.Tensor) else noisy


class Examples:
    """Images on the device as uint8, standardised batch by batch, with their labels and (once cached) f_theta0.

    x uint8 (N, H, W, C), y (N,), mean and std per channel; C = 1 output or one per class is the network's business.
    """

    def __init__(self, x, y, mean, std, o):
        self.x = torch.as_tensor(x).to(o.device).permute(0, 3, 1, 2).contiguous()  # (N, C, H, W)
        self.y = torch.as_tensor(y).to(o.device)
        self.mean, self.std = (torch.tensor(v, dtype=o.dtype, device=o.device).view(-1, 1, 1) for v in (mean, std))
        self.f0 = None

    def __len__(self):
        return len(self.y)

    def pixels(self, index):
        return (self.x[index].to(self.std.dtype) / 255 - self.mean) / self.std

    def index(self):
        return torch.arange(len(self), device=self.x.device)

    @torch.no_grad()
    def cache_f0(self, centered):
        """Compute f_theta0 of every example once. At a = inf nothing is subtracted and nothing is needed."""
        if centered.alpha < math.inf:
            self.f0 = torch.cat([centered.model0(self.pixels(i)) for i in self.index().split(500)])

    @torch.no_grad()
    def predict(self, centered, index):
        """f^a of the examples in `index`, (n, C)."""
        return torch.cat([centered(self.pixels(i), self.start(i)) for i in index.split(500)])

    def start(self, index):
        return None if self.f0 is None else self.f0[index]


def draw_training_set(images, seed, o):
    """x_train, y_train, score_train or None: the --subset examples that this seed draws, in the file's order, or all.

    Raises ValueError: as training_indices."""
    keep = training_indices(images, seed, o)
    score = images["score_train"][keep] if "score_train" in images else None
    return images["x_train"][keep], images["y_train"][keep], score


def training_indices(images, seed, o):
    """Which training images a seed trains on, ascending. Raises ValueError: --subset larger than the training set, or
    a batch larger than what is left."""
    if o.subset and o.subset > len(images["y_train"]):
        raise ValueError(f"--subset {o.subset} is larger than the training set of {len(images['y_train'])}")
    keep = some(np.arange(len(images["y_train"])), o.subset, seed)  # all of them where --subset is not given
    if o.batch_size > len(keep):
        raise ValueError(f"--batch-size {o.batch_size} is larger than the training set of {len(keep)}")
    return keep


def some(members, count, seed):
    """Up to `count` of the indices `members`, drawn with the seed, in ascending order."""
    return np.sort(np.random.default_rng(seed).permutation(members)[:count])


def measure(f, y):
    """Mean loss and accuracy, as floats, of outputs f (N, C) against labels y (N,)."""
    loss, correct = losses(f, y)
    return loss.mean().item(), correct.double().mean().item()


def losses(f, y):
    """f (N, C) and labels y (N,) -> loss (N,) and correctness (N,): cross-entropy, or logistic loss at C = 1."""
    if f.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(f[:, 0], y.to(f.dtype), reduction="none"), (f[:, 0] > 0) == (y > 0)
    return F.cross_entropy(f, y, reduction="none"), f.argmax(1) == y


# ---------------------------------------------------------------------------------------------------------------------
# 6  The training loop
# ---------------------------------------------------------------------------------------------------------------------


class LinearityProbe:
    """Remembers the kernel, ReLU signs and representation at theta0 on examples x, and compares with them when called.

    Returns a dict: ntk_alignment, sign_similarity, repr_alignment (R^T R, drawn), repr_alignment_gram (R R^T) and
    linearisation_error. At a = inf the network never leaves theta0: 1, 1, 1, 1 and 0 by definition.
    """

    def __init__(self, centered, x):
        import copy
        self.centered, self.x = centered, x
        if centered.alpha < math.inf:
            start = copy.deepcopy(centered.model)  # which parameters require gradients, at theta0's values
            start.load_state_dict(centered.model0.state_dict())
            self.start = self.measure(start)

    def measure(self, model):
        return empirical_ntk(model, self.x), relu_signs(model, self.x), representation(model, self.x)

    def __call__(self):
        if self.centered.alpha == math.inf:
            return {"ntk_alignment": 1.0, "sign_similarity": 1.0, "repr_alignment": 1.0, "repr_alignment_gram": 1.0,
                    "linearisation_error": 0.0}
        (K, s, R), (K0, s0, R0) = self.measure(self.centered.model), self.start
        return {"ntk_alignment": kernel_alignment(K, K0), "sign_similarity": sign_similarity(s, s0),
                "repr_alignment": representation_alignment(R, R0),
                "repr_alignment_gram": representation_alignment(R, R0, gram=True),
                "linearisation_error": linearisation_error(self.centered, self.x)}


@torch.no_grad()
def forward_noise(centered, x):
    """Rounding that reaches the output: a max |f(x) - f(x) in float64| of the raw network (of f^a at a = inf)."""
    import copy
    f, scale = (centered, 1.0) if centered.alpha == math.inf else (centered.model, centered.alpha)
    return scale * (f(x) - copy.deepcopy(f).double()(x.double())).abs().max().item()


@torch.no_grad()
def update_noise(optimizer, gradients):
    """Rounding of the next step: |applied - intended| / |intended|, where theta - step is rounded to theta's precision.

    At large a the steps are small against theta: in float32, .75 % of a first step is lost at a = 100, 38 % at 1e4."""
    group, lost, intended = optimizer.param_groups[0], 0.0, 0.0
    for p, g in zip(group["params"], gradients):
        before = optimizer.state[p].get("momentum_buffer") if group["momentum"] else None
        velocity = g if before is None else group["momentum"] * before + g
        step = group["lr"] * velocity.double()
        applied = p.double() - p.add(velocity, alpha=-group["lr"]).double()
        lost += (applied - step).square().sum().item()
        intended += step.square().sum().item()
    return (lost / intended)**.5 if intended else math.nan


def train(folder, centered, train_set, probe_x, evaluate, o, seed, num_classes, streak=math.inf):
    """Train f^a on `train_set` by SGD; write folder/log.jsonl, a strict-JSON record a probe, and folder/checkpoint.pt.

    Probes: at the start, at the end, and whenever the smoothed training loss (exponential average, factor .9, started
    at ln C) has fallen by another 4 %; so runs of different a are sampled at equal losses. Linearity at every fifth.

    probe_x: pixels for the linearity measures. evaluate(): a dict, the script's part of a record, with mean_train_loss.
    streak: stop after so many fully correct minibatches in a row. An interrupted run goes on where its checkpoint is.
    Returns why it ended: "epochs", "stop-loss", "streak" or "diverged".
    """
    name = folder.name
    place = load_checkpoint(folder)
    steps = len(train_set) // o.batch_size  # the last incomplete batch is dropped
    total = o.epochs * steps
    if place and (place["ended"] in ("diverged", "streak") or place["ended"] == "epochs" and place["iteration"] >= total
                  or place["ended"] == "stop-loss" and place["mean_train_loss"] < o.stop_loss):
        print(f"{name}: already finished ({place['ended']})")
        return place["ended"]

    if place is None and (folder / "log.jsonl").exists() and (folder / "log.jsonl").stat().st_size:
        kept = unused(folder / "log.jsonl.old")
        (folder / "log.jsonl").rename(kept)
        print(f"{name}: there are records but no checkpoint; they are kept in {kept.name}, and the run starts again")
    optimizer = scaled_sgd(centered, o.lr, o.momentum)
    parameters = optimizer.param_groups[0]["params"]
    train_set.cache_f0(centered)
    linearity = LinearityProbe(centered, probe_x)
    highest = math.log(max(num_classes, 2))  # the loss of f^a = 0
    meters = torch.tensor([highest, 1 / max(num_classes, 2), 0, 0], dtype=o.dtype, device=o.device)
    shuffle = generator("order", seed)
    s = {"iteration": 0, "seconds": 0.0, "probe_seconds": 0.0, "probes": 0, "threshold": highest, "log_bytes": 0,
         "mean_train_loss": highest, "warned": [], "order_state": shuffle.get_state()}

    def forward(index):
        loss, correct = losses(centered(train_set.pixels(index), train_set.start(index)), train_set.y[index])
        return loss.mean(), correct

    def step(index):
        loss, correct = forward(index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = correct.to(o.dtype).mean()
        meters[:2].lerp_(torch.stack([loss.detach(), accuracy]), .1)  # smoothed loss and accuracy
        meters[2].add_(1).mul_(accuracy == 1)  # fully correct minibatches in a row ...
        meters[3].copy_(torch.maximum(meters[2], meters[3]))  # ... and the longest such row

    def warn(key, text):
        if key not in s["warned"]:
            s["warned"] = [*s["warned"], key]
            progress.done()
            print(f"{name}: warning: {text}")

    def record(loss, accuracy, order, ended):
        begin = time.perf_counter()
        entry = {"iteration": s["iteration"], "epoch": s["iteration"] / steps, "seconds": 0.0, "probe_seconds": 0.0,
                 "train_loss": loss, "train_acc": accuracy, **evaluate()}
        if ended is None and entry["mean_train_loss"] < o.stop_loss:
            ended = "stop-loss"
        if s["probes"] % 5 == 0 or ended:
            gradients = torch.autograd.grad(forward(order[:o.batch_size])[0], parameters)
            entry.update(linearity(), forward_noise=forward_noise(centered, probe_x[:32]),
                         update_noise=update_noise(optimizer, gradients))
            for key, limit, what in (("forward_noise", .01, "rounding reaches the outputs"),
                                     ("update_noise", .02, "rounding swallows part of each step")):
                if entry[key] > limit and ended != "diverged":
                    warn(key, f"{what} ({key} {entry[key]:.2g}, above {limit}): use --dtype float64, or --alpha inf")
        s["probes"] += 1
        s["mean_train_loss"] = float(entry["mean_train_loss"])
        s["probe_seconds"] += time.perf_counter() - begin
        entry["seconds"], entry["probe_seconds"] = round(seconds(), 3), round(s["probe_seconds"], 3)
        log.write(json_line(entry))
        log.flush()
        s["log_bytes"] = log.tell()
        progress.line(entry)
        return ended

    def seconds():
        return earlier + time.perf_counter() - started

    def save(ended=None, momentum=True):
        s["seconds"] = seconds()
        os.fsync(log.fileno())
        buffers = [optimizer.state[p].get("momentum_buffer") for p in parameters] if momentum and o.momentum else []
        save_checkpoint(folder, {**s, "ended": ended, "meters": meters, "parameters": [p.detach() for p in parameters],
                                 "momentum": [b for b in buffers if b is not None]}, spare=ended is None)

    if place:
        restore(place, folder, parameters, optimizer, meters)
        s = {key: place[key] for key in s}
        if place["ended"] == "stop-loss" and o.momentum:
            print(f"{name}: goes on below its old --stop-loss; its momentum was not kept and starts again from 0")
        else:
            print(f"{name}: goes on at iteration {s['iteration']}")
        shuffle.set_state(s["order_state"])
    run_step, read_every = step, 1
    if o.device.type == "cuda":  # to read a number from the device is to wait for it
        run_step, read_every = graphed(step, parameters, optimizer, meters, o), 10
    order = torch.randperm(len(train_set), generator=shuffle).to(o.device)
    earlier, started, saved = s["seconds"], time.perf_counter(), time.monotonic()
    progress = Progress(name, total, s["iteration"])
    with open(folder / "log.jsonl", "ab") as log, interruptible() as asked:
        log.truncate(s["log_bytes"])  # what lies behind is made again, the same
        log.seek(s["log_bytes"])
        while True:
            # The checkpoint is taken after a step and before this reading: what follows is a function of it.
            last = s["iteration"] >= total
            if last or s["iteration"] % read_every == 0:
                before = dict(s)
                loss, accuracy, _, row = meters.tolist()
                ended = ("diverged" if not math.isfinite(loss) else "streak" if row >= streak
                         else "epochs" if last else None)
                if 5 * steps <= s["iteration"] < 5 * steps + read_every and loss > .99 * highest:
                    warn("stuck", f"the training loss is still {loss:.3f} after 5 epochs: try a larger --lr")
                progress.status(s["iteration"], loss)
                if s["probes"] == 0 or loss < .96 * s["threshold"] or ended:
                    while loss < .96 * s["threshold"]:
                        s["threshold"] *= .96
                    ended = record(loss, accuracy, order, ended)
                if ended:
                    s.update(before if ended == "epochs" else {})  # more --epochs go on as if they had been asked for
                    break
            if s["iteration"] % steps == 0 and s["iteration"]:
                s["order_state"] = shuffle.get_state()
                order = torch.randperm(len(train_set), generator=shuffle).to(o.device)  # a new order each epoch
            k = s["iteration"] % steps * o.batch_size
            run_step(order[k:k + o.batch_size])
            s["iteration"] += 1
            if asked:
                save()
                raise KeyboardInterrupt
            if time.monotonic() - saved >= o.checkpoint_seconds:
                save()
                saved = time.monotonic()
        save(ended, momentum=ended == "epochs")
        if asked:
            raise KeyboardInterrupt
    progress.done()
    if ended == "diverged":
        print(f"{name}: diverged at iteration {s['iteration']} (its loss is not a finite number): try a smaller --lr")
    return ended


def graphed(step, parameters, optimizer, meters, o):
    """The same step as one CUDA graph on a static index: no launch costs. `step` itself, with a line, if that fails."""
    index = torch.arange(o.batch_size, device=o.device)
    kept = [*parameters, meters] + [optimizer.state[p]["momentum_buffer"] for p in parameters if optimizer.state[p]]
    values = [t.detach().clone() for t in kept]
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up, on another stream as torch asks for; it also makes the momentum
            for _ in range(3):
                step(index)
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(index)
        run = lambda batch: (index.copy_(batch), graph.replay())
    except RuntimeError as e:
        print(f"warning: CUDA graph refused ({first_line(e)}); going on step by step, slower")
        run = step
    with torch.no_grad():  # undo the warm-up: a first momentum of 0 gives the same first step as none
        for state in optimizer.state.values():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].zero_()
        for t, value in zip(kept, values):
            t.copy_(value)
    return run


def generator(what, seed):
    """A generator of its own for each purpose, so that no stream of random numbers depends on another's length."""
    return torch.Generator().manual_seed(zlib.crc32(f"{what} {seed}".encode()))


@contextlib.contextmanager
def seeded(what, seed):
    """Seed torch's global CPU generator inside the block (initialisation draws from it) and put it back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{what} {seed}".encode()))
        yield


@contextlib.contextmanager
def interruptible():
    """Inside the block Ctrl-C and SIGTERM only fill the list that is yielded; a second one interrupts at once."""
    asked = []

    def handler(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    old = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handler)
    except ValueError:
        pass  # not the main thread (a notebook's worker): leave them as they are
    try:
        yield asked
    finally:
        for number, handle in old.items():
            signal.signal(number, handle)


class Progress:
    """One status line on a terminal; one aligned line a probe into a file or pipe."""

    def __init__(self, name, total, first):
        self.name, self.total, self.first, self.begin, self.shown = name, total, first, time.monotonic(), 0.0
        self.terminal = sys.stdout.isatty()

    def status(self, iteration, loss):
        now = time.monotonic()
        if self.terminal and now - self.shown > .2 and iteration > self.first:
            self.shown = now
            left = (now - self.begin) / (iteration - self.first) * (self.total - iteration)
            print(f"\r{self.name}  iteration {iteration}  loss {loss:.4f}  at most "
                  f"{left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f} left \033[K", end="", flush=True)

    def line(self, entry):
        if not self.terminal:
            print(f"{self.name:<18} iteration {entry['iteration']:>7}  epoch {entry['epoch']:>8.2f}  "
                  f"loss {entry['train_loss']:.4f}  " + "  ".join(f"{k} {entry[k]:.4f}" for k in (
                      "mean_train_loss", "test_loss", "test_acc", "ntk_alignment") if k in entry), flush=True)

    def done(self):
        print("\r\033[K" if self.terminal else "", end="")


def json_line(entry):
    """Strict JSON, a line: numbers that are not finite become null."""
    def strict(v):
        if isinstance(v, dict):
            return {k: strict(w) for k, w in v.items()}
        if isinstance(v, (list, tuple)):
            return [strict(w) for w in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return (json.dumps(strict(entry), allow_nan=False) + "\n").encode()


def write_atomically(path, data, spare=None):
    """Write bytes to a temporary file, flush it to the disk, rename it to `path`; the one that was there to `spare`."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if spare and path.exists():
            os.replace(path, spare)
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise OSError(e.errno, f"{path} could not be written: {e.strerror}") from None


def save_checkpoint(folder, state, spare):
    """Write `state` (tensors and plain values) to folder/checkpoint.pt; keep the one before as a spare, or drop it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    previous = folder / "checkpoint.previous.pt"
    write_atomically(folder / "checkpoint.pt", buffer.getbuffer(), previous)
    if not spare:
        previous.unlink(missing_ok=True)


def load_checkpoint(folder):
    """The newest checkpoint of a run folder that is whole, or None if there is none. ValueError if none is whole."""
    paths = [p for p in (folder / "checkpoint.pt", folder / "checkpoint.previous.pt") if p.exists()]
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("wrong checksum")
            state = torch.load(path, map_location="cpu", weights_only=True)
            log = folder / "log.jsonl"
            if (log.stat().st_size if log.exists() else 0) < state["log_bytes"]:
                raise ValueError("log.jsonl is shorter than it was")
            return state
        except Exception as e:  # damaged bytes make zipfile and torch raise nearly anything
            print(f"{path}: unusable ({first_line(e)[:100]})")
    if paths:
        raise ValueError(f"{folder}: no checkpoint is usable; --fresh moves the run aside and starts again")


@torch.no_grad()
def restore(state, folder, parameters, optimizer, meters):
    """Copy a checkpoint's tensors into place; ValueError if they do not fit."""
    targets = [*parameters, meters]
    values = [*state["parameters"], state["meters"]]
    if len(targets) != len(values) or any(t.shape != v.shape or t.dtype != v.dtype for t, v in zip(targets, values)):
        raise ValueError(f"{folder}: the checkpoint is of another network; --fresh moves the run aside")
    for target, value in zip(targets, values):
        target.copy_(value)
    for p, value in zip(parameters, state["momentum"]):
        optimizer.state[p]["momentum_buffer"] = value.to(p.device)


@contextlib.contextmanager
def run_folder(o, folder, identity):
    """The folder of one run, made, locked and marked by its args.json, which names what the run is (see identity_of).

    With --fresh a run that is there is moved aside first. Raises ValueError: another process has the lock; the folder
    holds a run of another identity (the difference is named); args.json is damaged.
    """
    holds_a_run = lambda: any((folder / name).exists() for name in ("args.json", "log.jsonl", "checkpoint.pt"))
    with lock(folder):
        if o.fresh and holds_a_run():
            aside = unused(folder.with_name(f"{folder.name}.old"))
            folder.rename(aside)
            print(f"{folder.name}: moved aside to {aside.name}")
    with lock(folder):
        if holds_a_run():
            there, here = read_args(folder)["run"], json.loads(json_line(identity))
            for key in [*here, *there]:
                if there.get(key) != here.get(key):
                    raise ValueError(f"{folder} holds a run with {key} = {there.get(key)}, not {here.get(key)}: choose "
                                     "another --out, or --fresh to move it aside")
        else:
            dataset = os.path.basename(getattr(o, "dataset", ""))  # for the reader; data_crc32 is what is compared
            versions = {"torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}
            write_atomically(folder / "args.json", json_line({"run": identity, "dataset": dataset,
                                                              "device": str(o.device), "versions": versions}))
        yield folder


def unused(path):
    """The first of NAME-1, NAME-2, ... beside `path` that does not exist."""
    return next(p for i in range(1, 10**6) if not (p := path.with_name(f"{path.name}-{i}")).exists())


def read_args(folder):
    """A run folder's args.json: {"run": identity, "dataset", ...}. ValueError if it is missing or damaged."""
    try:
        args = json.loads((folder / "args.json").read_text())
        if not isinstance(args["run"], dict):
            raise ValueError
        return args
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder}/args.json: missing or damaged; --fresh moves the run aside") from None


@contextlib.contextmanager
def lock(folder, wait=False):
    """Hold folder/.lock; the system lets go of it when the process ends, however it ends. ValueError if it is held and
    `wait` is not set."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            raise ValueError(f"{folder}: another process is at work on this run") from None
        yield


def crc32(*tensors):
    """Checksum of arrays or tensors, to tell whether data or an initialisation is the same as before."""
    value = 0
    for t in tensors:
        t = t.detach().cpu().numpy() if isinstance(t, torch.Tensor) else t
        value = zlib.crc32(np.ascontiguousarray(t).data, value)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# 7  Equal training loss
# ---------------------------------------------------------------------------------------------------------------------


def read_runs(o):
    """The records at hand, {alpha: {seed: [record, ...]}}, of the runs in --out that --alpha and --seeds name, and what
    these runs are: the options they share, from their args.json.

    Raises ValueError: no records, damaged ones, or runs that differ in more than alpha and seed.
    """
    runs, what = {}, None
    for alpha, seed in ((alpha, seed) for alpha in o.alpha for seed in o.seeds):
        folder = folder_of(o, alpha, seed)
        records = read_log(folder / "log.jsonl")
        if records:
            args = read_args(folder)
            here = {"dataset": args.get("dataset"), **args["run"]}
            here = {key: value for key, value in here.items() if key not in ("alpha", "seed", "theta0_crc32")}
            for key in here if what else ():
                if here[key] != what.get(key):
                    raise ValueError(f"{o.out}: its runs differ in {key} ({what.get(key)}, {here[key]}): nothing to "
                                     "compare")
            if here.get("script", o.script) != o.script:
                raise ValueError(f"{folder} holds a run of {here['script']}")
            runs.setdefault(alpha, {})[seed], what = records, here
    if not runs:
        raise ValueError(f"{o.out}: no records of alpha {[f'{a:g}' for a in o.alpha]} and seeds {o.seeds}")
    return runs, what


def read_log(path):
    """The records of a log.jsonl; a half-written last line is left out. ValueError: a damaged line before it."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = []
    for i, line in enumerate(lines):
        try:
            record = json.loads(line)
            if not line.endswith(b"\n") or not isinstance(record, dict) or any(
                    not isinstance(v, (int, float, type(None))) for k, v in record.items() if k != "ended"):
                raise ValueError
            records.append(record)
        except ValueError:
            if i + 1 < len(lines):
                raise ValueError(f"{path}: line {i + 1} is damaged") from None
    return records


def value_at(level, loss, quantity):
    """The value of `quantity` at training loss `level`: a least-squares line in ln(loss) over the probes within 8 % of
    it, at least three and on both sides. None where there are not: nothing is extrapolated.

    loss, quantity: sequences, one entry a probe; entries that are None are left out.
    """
    near = [(math.log(l / level), q) for l, q in zip(loss, quantity)
            if l is not None and q is not None and l > 0 and abs(l / level - 1) <= .08]
    x, y = np.array(near).reshape(-1, 2).T
    if len(x) < 3 or x.min() > 0 or x.max() < 0 or x.max() - x.min() < 1e-9:
        return None
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean())**2).sum()
    return float(y.mean() - slope * x.mean())


def student_t(n):
    """The .975 quantile of Student's t with n - 1 degrees of freedom: with t = sqrt(n - 1) tan(u), u has density
    proportional to cos(u)^(n - 2)."""
    u = np.linspace(0, np.pi / 2, 200001)
    density = np.cos(u)**(n - 2)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(math.sqrt(n - 1) * np.tan(np.interp(.95 * mass[-1], mass, u)))


def spread(values, interval=False):
    """{"mean", "std", "n"} of the values that are not None, "interval" (95 %, Student's t) from three on; or None."""
    values = [v for v in values if v is not None]
    if not values:
        return None
    n, mean, std = len(values), float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
    result = {"mean": mean, "std": std, "n": n}
    if interval and n > 2:
        half = student_t(n) * std / math.sqrt(n)
        result["interval"] = [mean - half, mean + half]
    return result


def loss_levels(num_classes, *more):
    """.9, .8, ... .1 times ln C, the paper's 1.0 and .5, and more; highest first, as far as they lie below ln C."""
    highest = math.log(max(num_classes, 2))
    levels = {float(f"{level:.3g}") for level in [k / 10 * highest for k in range(1, 10)] + [1.0, .5, *more]}
    return sorted((level for level in levels if level < highest), reverse=True)


def summarise(runs, columns, levels, on="mean_train_loss"):
    """Every column at every level of the loss `on`: per alpha over seeds, and paired by seed between alphas.

    columns: name -> function of a record -> number or None. Returns {"alphas": {"1": {"levels": {"1.6": {column:
    {"mean", "std", "n"}}}}}, "paired": {"1 - 100": {"levels": {"1.6": {column: {..., "interval"}}}}}}; levels that no
    run has probed on both sides are absent.
    """
    value = {}  # (alpha, seed, level, column) -> number or None
    for alpha, seeds in runs.items():
        for seed, records in seeds.items():
            loss = [r.get(on) for r in records]
            for column, of in columns.items():
                quantity = [of(r) for r in records]
                for level in levels:
                    value[alpha, seed, level, column] = value_at(level, loss, quantity)

    def table(difference):
        rows = {}
        for level in levels:
            cells = {column: difference(level, column) for column in columns}
            if any(cells.values()):
                rows[f"{level:g}"] = {column: cell for column, cell in cells.items() if cell}
        return {"levels": rows}

    def paired(a, b):
        def cell(level, column):
            pairs = [(value[a, s, level, column], value[b, s, level, column]) for s in runs[a] if s in runs[b]]
            return spread([p - q for p, q in pairs if p is not None and q is not None], interval=True)
        return table(cell)

    def linearity(seeds):
        """The linearity measures at each level and at the end, over seeds."""
        rows = {f"{level:g}": {key: spread([between(r, level, key, on) for r in seeds.values()]) for key in LINEARITY}
                for level in levels}
        rows["end"] = {key: spread([r[-1].get(key) for r in seeds.values()]) for key in LINEARITY}
        return {level: row for level, row in rows.items() if any(row.values())}

    alphas = list(runs)
    return {"alphas": {f"{a:g}": {**table(lambda level, column: spread([value[a, s, level, column] for s in runs[a]])),
                                  "linearity": linearity(runs[a])} for a in alphas},
            "paired": {f"{a:g} - {b:g}": paired(a, b) for i, a in enumerate(alphas) for b in alphas[i + 1:]}}


LINEARITY = ("sign_similarity", "repr_alignment", "repr_alignment_gram", "ntk_alignment", "linearisation_error")


def between(records, level, key, on):
    """`key` where the loss `on` falls through `level`, on a line in ln(loss) between the two probes around it that have
    measured it (every fifth); None if there are not two such probes."""
    points = [(math.log(r[on] / level), r[key]) for r in records if r.get(key) is not None and (r.get(on) or 0) > 0]
    for (x, u), (y, v) in zip(points, points[1:]):
        if x >= 0 > y:
            return u + (v - u) * x / (x - y)


def print_linearity(summary, levels):
    """Print the linearity measures at the paper's losses 1.0 and .5, where they were reached, and at the end."""
    print("\nlinearity, on held-out images" + "".join(f"{key:>22}" for key in LINEARITY))
    for alpha, part in summary["alphas"].items():
        for level in [f"{level:g}" for level in (1.0, .5) if level in levels] + ["end"]:
            if level in part["linearity"]:
                row = part["linearity"][level]
                print(f"  alpha = {alpha:<5} {'at loss ' + level if level != 'end' else 'at the end':<14}"
                      + "".join(f"{cell(row[key]):>22}" for key in LINEARITY))


def print_table(title, part, columns, levels):
    """Print one table of `summarise`: a row a level, mean +- std (n); a dash where no run has the level."""
    print(f"\n{title}")
    print("  loss  " + "".join(f"{column:>25}" for column in columns))
    for level in levels:
        row = part["levels"].get(f"{level:g}", {})
        if row:
            print(f"{level:>6g}  " + "".join(f"{cell(row.get(column)):>25}" for column in columns))
    if not part["levels"]:
        print("     -  (no level is reached yet)")


def cell(value):
    """What `spread` returned, for a table: mean +- std (n), or mean [interval], or a dash."""
    if not value:
        return "-"
    if "interval" in value:
        return f"{value['mean']:.3f} [{value['interval'][0]:.3f}, {value['interval'][1]:.3f}]"
    return f"{value['mean']:.3f}" + (f" +- {value['std']:.3f} (n={value['n']})" if value["n"] > 1 else "")


# Colours that stay apart for colour-blind readers and in grey (Okabe and Ito), dark enough on white.
COLOURS = ["#d55e00", "#0072b2", "#000000", "#009e73", "#cc79a7", "#56b4e9"]


def band(ax, runs, x, y, **style):
    """Draw y against x for runs (a list of record lists): the curve of one run, or mean and range over several on the
    stretch of x that all of them cover. x and y: functions of a record."""
    curves = []
    for records in runs:
        points = sorted((x(r), y(r)) for r in records if x(r) is not None and y(r) is not None)
        if points:
            curves.append(np.array(points).T)
    if not curves:
        return
    if len(curves) == 1:
        ax.plot(*curves[0], **style)
        return
    low, high = max(c[0, 0] for c in curves), min(c[0, -1] for c in curves)
    if low < high:
        grid = np.linspace(low, high, 200)
        values = np.stack([np.interp(grid, *c) for c in curves])
        ax.plot(grid, values.mean(0), **style)
        ax.fill_between(grid, values.min(0), values.max(0), color=style.get("color"), alpha=.18, linewidth=0)


def minus(a, b):
    return None if a is None or b is None else a - b


def alpha_label(alpha):
    return r"$\alpha = \infty$" if alpha == math.inf else rf"$\alpha = {alpha:g}$"


LINEARITY_STYLES = {"sign_similarity": "-", "repr_alignment": "--", "ntk_alignment": ":", "linearisation_error": "-."}


def draw_linearity(ax, runs, x):
    """The similarities to initialisation against x, a function of a record, and how far f^a is from linear."""
    for colour, seeds in zip(itertools.cycle(COLOURS), runs.values()):
        for key, style in LINEARITY_STYLES.items():
            thin = dict(linewidth=1, alpha=.8) if key == "linearisation_error" else {}
            band(ax, seeds.values(), x, lambda r: r.get(key), color=colour, linestyle=style, **thin)
    ax.set(ylim=(0, None), ylabel="similarity to initialisation, error", title="Linearity")
    names = "ReLU signs", "representation", "NTK", "linearisation error"
    legend_below(ax, alpha_colours(runs), dict(zip(names, LINEARITY_STYLES.values())))


def alpha_colours(runs):
    """{label of an alpha: its colour}, for a legend."""
    return dict(zip(map(alpha_label, runs), itertools.cycle(COLOURS)))


def legend_below(ax, colours, styles):
    """A legend under the axis labels, where it covers no curve: what each colour means, then each line style."""
    from matplotlib.lines import Line2D
    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    handles += [Line2D([], [], color="#777777", linestyle=style, label=name) for name, style in styles.items()]
    ax.legend(handles=handles, fontsize=7.5, ncols=3, loc="upper center", bbox_to_anchor=(.5, -.15))


def save_figure(figure, folder, name):
    """Write folder/name.png and .pdf, each whole or not at all, on white."""
    for kind in ("png", "pdf"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150, facecolor="white",
                       metadata={"CreationDate": None} if kind == "pdf" else None)
        write_atomically(pathlib.Path(folder) / f"{name}.{kind}", buffer.getbuffer())


# ---------------------------------------------------------------------------------------------------------------------
# 8  The command line
# ---------------------------------------------------------------------------------------------------------------------


def number(kind, least=None, above=None, most=None, below=None):
    """An argparse type: an int or float within bounds, whose error says what was wanted."""
    limits = ("at least", least), ("above", above), ("at most", most), ("below", below)
    bounds = [f"{word} {limit:g}" for word, limit in limits if limit is not None]
    wanted = ("a whole number" if kind is int else "a number") + (" " + " and ".join(bounds) if bounds else "")

    def parse(text):
        try:
            value = kind(text)
            good = (math.isfinite(value) and (least is None or value >= least) and (above is None or value > above)
                    and (most is None or value <= most) and (below is None or value < below))
        except (ValueError, OverflowError):
            good = False
        if not good:
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value

    return parse


def alpha_type(text):
    """An argparse type: alpha, as `center` takes it; at most six digits, since folders are named by them."""
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not (1e-6 <= alpha <= 1e12 or alpha == math.inf) or float(f"{alpha:g}") != alpha:
        raise argparse.ArgumentTypeError(f"must be above 0 (1e-6 to 1e12, at most six digits), or inf; not {text}")
    return alpha


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError, so that a call from Python and the command line fail alike."""

    def error(self, message):
        raise ValueError(message)


def parser(doc, name, **defaults):
    """The flags that experiments share, with a script's own defaults; those given as None are left out."""
    p = Parser(prog=f"{name}.py", description=doc, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    whole, positive = number(int, least=1), number(float, above=0)
    flags = {
        "alpha": dict(type=alpha_type, nargs="+", default=[1.0, 100.0],
                      help="a in f^a = a (f - f0): 1 rich, 100 lazy, inf linear"),
        "seeds": dict(type=number(int, least=0, below=2**31), nargs="+", default=[0], help="one run an alpha and seed"),
        "dataset": dict(default="cifar10", help="a name, or the path of an .npz file (see README.md)"),
        "data_dir": dict(default="data", help="where downloads go"),
        "out": dict(default=f"runs/{name}", help="where records and figures go"),
        "device": dict(default="auto", help="auto, cpu, cuda, cuda:1"),
        "dtype": dict(choices=["float32", "float64"], default="float32", help="float64 for very large alpha"),
        "lr": dict(type=positive, default=.01, help="learning rate, before the division by alpha^2"),
        "momentum": dict(type=number(float, least=0, below=1), default=.9, help="of SGD"),
        "batch_size": dict(type=whole, default=125, help="examples a step"),
        "epochs": dict(type=whole, default=2500, help="at most so many passes over the training set"),
        "stop_loss": dict(type=number(float, least=0), default=.01, help="stop once mean_train_loss is below"),
        "width": dict(type=number(int, least=1, most=4096), default=64, help="channels of the network's first block"),
        "subset": dict(type=whole, default=None, help="train on so many examples only, drawn with the seed"),
        "probe_examples": dict(type=whole, default=100, help="held-out examples for the linearity measures"),
        "levels": dict(type=positive, nargs="+", default=[], help="more training losses to compare at"),
        "checkpoint_seconds": dict(type=number(float, least=0), default=60.0, help="time between checkpoints"),
    }
    for key, settings in flags.items():
        if key not in defaults or defaults[key] is not None:
            settings["default"] = defaults.get(key, settings["default"])
            p.add_argument("--" + key.replace("_", "-"), **settings)
    p.add_argument("--quick", action="store_true", help="a demonstration in under a minute; explicit options win")
    p.add_argument("--draw-only", action="store_true", help="draw the records at hand, train nothing")
    p.add_argument("--fresh", action="store_true", help="move runs that are there aside and start again")
    return p


def parse(p, quick, argv, options):
    """Options from a command line (a list of words) and from keywords, in one way: what argparse makes of them.

    quick: the preset behind --quick. Returns a namespace with device and dtype resolved. Raises ValueError.
    """
    words = [str(word) for word in argv or []]
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not False and value is not None:
            many = isinstance(value, (list, tuple, range, np.ndarray))
            words += [flag, *map(str, value)] if many else [f"{flag}={value}"]
    if p.parse_args(words).quick:
        p.set_defaults(**quick)
    o = p.parse_args(words)
    o.script = p.prog
    o.alpha, o.seeds = sorted(set(o.alpha)), list(dict.fromkeys(getattr(o, "seeds", [0])))
    if o.draw_only:
        find_runs(o, {word.split("=")[0] for word in words})
        return o
    if o.device == "auto":
        o.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        o.device = torch.device(o.device)
        if o.device.type not in ("cpu", "cuda"):  # the measures need float64, which mps has not
            raise RuntimeError("only cpu and cuda are supported")
        torch.zeros(1, device=o.device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {o.device}: {first_line(e)}") from None
    o.dtype = getattr(torch, o.dtype)
    # True float32: cuDNN's default, TF32, keeps 10 bits of the mantissa, and alpha multiplies what it rounds off.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return o


def find_runs(o, given):
    """For --draw-only: where --alpha or --seeds were not `given`, all that the folder holds; where --levels were not,
    those of the summary that is there. ValueError: there is no such folder."""
    found = []
    if not os.path.isdir(o.out):
        raise ValueError(f"--draw-only: there is no folder {o.out} (--out)")
    for path in sorted(pathlib.Path(o.out).glob("alpha=*/log.jsonl")):
        a, _, seed = path.parent.name[len("alpha="):].partition("_seed=")
        with contextlib.suppress(argparse.ArgumentTypeError):  # not a run's folder, or one moved aside
            found.append((alpha_type(a), number(int, least=0)(seed or 0)))
    if "--alpha" not in given and found:
        o.alpha = sorted({a for a, _ in found})
    if "--seeds" not in given and found:
        o.seeds = sorted({seed for _, seed in found})
    if "--levels" not in given:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            levels = json.loads((pathlib.Path(o.out) / "summary.json").read_text())["options"]["levels"]
            o.levels = [float(level) for level in levels if 0 < level < math.inf]


# What does not change what a run is: where things are, how long it goes on, what is drawn.
NOT_IDENTITY = {"alpha", "seeds", "out", "dataset", "data_dir", "epochs", "stop_loss", "levels", "device", "quick",
                "draw_only", "fresh", "checkpoint_seconds", "runs", "deciles", "animate"}


def identity_of(o, alpha, seed, images, model):
    """What defines a run: options, data and initialisation (the last two by checksum)."""
    options = {k: str(v) if k == "dtype" else v for k, v in vars(o).items() if k not in NOT_IDENTITY}
    data = crc32(*(images[k] for k in sorted(images) if isinstance(images[k], np.ndarray)))
    return {"alpha": f"{alpha:g}", "seed": seed, **options, "classes": int(images["y_train"].max()) + 1,
            "data_crc32": data, "theta0_crc32": crc32(*model.state_dict().values())}


def my_share(o):
    """This process's (alpha, seed) pairs: its share under torchrun, else all; every alpha of a seed, then the next."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return [(alpha, seed) for seed in o.seeds for alpha in o.alpha][rank::world]


def folder_of(o, alpha, seed):
    return pathlib.Path(o.out) / f"alpha={alpha:g}_seed={seed}"


def sweep(o, run, summarise, draw):
    """Call run(alpha, seed) for this process's share of the sweep; then, unless other processes are still at it,
    summarise(o, runs, classes) and draw(o, runs) from the records. Returns the summary.

    Raises ValueError: records that cannot be read or drawn.
    """
    endings = {} if o.draw_only else {folder_of(o, *pair).name: run(*pair) for pair in my_share(o)}
    with lock(pathlib.Path(o.out), wait=True):  # one process at a time: the last sees that all have ended
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not all(
                (load_checkpoint(folder_of(o, alpha, seed)) or {}).get("ended") for alpha in o.alpha for seed in o.seeds
                if not folder_of(o, alpha, seed).name in endings):
            return {"diverged": [name for name, ended in endings.items() if ended == "diverged"]}
        runs, what = read_runs(o)
        o.dataset = what["dataset"]
        try:
            summary = summarise(o, runs, what.get("classes", 2))
            summary = write_summary(o, runs, what, summary)
            draw(o, runs)
        except (KeyError, TypeError) as e:
            raise ValueError(f"{o.out}: the records are not of {o.script}, or damaged ({type(e).__name__}: {e})") from e
    print(f"wrote {o.out}/summary.json and the pictures beside it")
    return summary


def write_summary(o, runs, what, summary):
    """Write OUT/summary.json: the options, `what` the runs are, `summary`, and which runs diverged. Returns it all."""
    options = {"alpha": [f"{alpha:g}" for alpha in runs], "levels": getattr(o, "levels", []),
               "seeds": sorted({seed for seeds in runs.values() for seed in seeds}), **what}
    diverged = [f"alpha={a:g}_seed={s}" for a in runs for s in runs[a] if runs[a][s][-1]["mean_train_loss"] is None]
    whole = json_line({"options": options, **summary, "diverged": diverged})
    write_atomically(pathlib.Path(o.out) / "summary.json", whole)
    return json.loads(whole)


def first_line(e):
    """What an exception says, on one line; its type if it says nothing."""
    return str(getattr(e, "reason", e)).strip().split("\n")[0] or type(e).__name__


def command_line(main):
    """Run main(argv) as a program: one line and exit code 2 for bad input, 130 for Ctrl-C, 1 if a run diverged."""
    script = os.path.basename(sys.argv[0])
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*deprecated")  # torch's own, on its first jvp
    try:
        summary = main(sys.argv[1:])
        sys.exit(1 if summary.get("diverged") else 0)
    except KeyboardInterrupt:
        same = "the same command without --fresh" if "--fresh" in sys.argv else "the same command"
        print(f"\n{script}: stopped; {same} goes on from here", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as e:
        print(f"{script}: error: {' '.join(str(e).split())}", file=sys.stderr)
    except RuntimeError as e:
        if "memory" not in str(e):  # torch's own class on a GPU, a plain RuntimeError on a CPU
            raise
        print(f"{script}: out of memory: {first_line(e)[:200]} Try a smaller --subset, --probe-examples, --width or "
              "--batch-size", file=sys.stderr)
    sys.exit(2)
