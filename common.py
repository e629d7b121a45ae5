"""What every experiment shares, in the order a reader meets it.

    1  the centred model        center, CenteredModel, LinearizedModel
    2  the optimizer            scaled_sgd
    3  NTK, linearity measures  empirical_ntk, kernel_alignment, target_alignment, relu_signs, sign_similarity,
                                representation, representation_alignment, linearisation_error
    4  the networks             mlp, resnet18, Standardise
    5  the data                 load_images, flip_labels, outputs
    6  a run                    Run, Linearity, update_noise, graphed, read_runs
    7  equal training loss      curve, value_at, summarise, print_claim, draw_band
    8  the command line         options, sweep, command_line

Sections 1 to 3 are made to be copied: paste a function with the names its docstring lists under "Needs:".

Source: George, Lajoie, Baratin, "Lazy vs hasty: linearization in deep networks impacts learning schedule based on
example difficulty", TMLR 2022. The idea of scaling a centred model: Chizat, Oyallon, Bach, "On lazy training in
differentiable programming", NeurIPS 2019.
"""
import argparse
import concurrent.futures
import contextlib
import copy
import datetime
import difflib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
import types
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

        def stage(inputs, outputs, stride):
            return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))

        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1, self.layer2 = stage(width, width, 1), stage(width, 2 * width, 2)
        self.layer3, self.layer4 = stage(2 * width, 4 * width, 2), stage(4 * width, 8 * width, 2)
        self.fc = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

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


class Standardise(nn.Module):
    """The first layer of every image network: uint8 (N, C, H, W) as stored -> (x / 255 - mean) / std, per channel."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x):
        return (x.to(self.mean.dtype) / 255 - self.mean) / self.std


@contextlib.contextmanager
def seeded(what, seed):
    """Inside the block, layers are initialised from a seed of their own, in float32 on the CPU; afterwards torch's
    global generator, default dtype and default device are what they were."""
    with initialising, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        torch.default_generator.manual_seed(generator(what, seed).initial_seed())
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


initialising = threading.Lock()  # layers draw from the global generator: one thread at a time


def generator(what, seed):
    """A generator of its own for each purpose, so that no stream of random numbers depends on another's length."""
    return torch.Generator().manual_seed(zlib.crc32(f"{what} {seed}".encode()))


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
    raise ValueError(f"--dataset {dataset}: {near(dataset, ['cifar10', 'synthetic'])} or a file FILE.npz")


def with_statistics(images):
    """Add the training pixels' own mean and standard deviation per channel, of pixels in [0, 1], unless it has some."""
    x = images["x_train"]
    if "mean" in images and "std" in images:
        return images
    mean, std = [], []
    for channel in range(x.shape[-1]):
        share = np.bincount(x[..., channel].ravel(), minlength=256) / x[..., channel].size  # of each of the 256 values
        value = np.arange(256) / 255
        mean.append(float(share @ value))
        std.append(max(float(share @ (value - mean[-1])**2), 1e-6)**.5)
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
                arrays = {name: file[name] for name in file.files}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):  # a member that is no .npy comes as bytes
                raise ValueError(f"its member {name} is no array")
        return arrays
    except PermissionError:
        raise
    except Exception as e:  # hostile bytes make numpy and zipfile raise nearly anything, MemoryError included
        reason = "it claims more data than fits into memory" if isinstance(e, MemoryError) else first_line(e)
        raise ValueError(f"{path}: not a readable .npz file (truncated, damaged or another format: "
                         f"{reason[:150]})") from None


def check_images(images, path):
    """Check the arrays of a FILE.npz (see load_images), bring them to their types; ValueError says which is wrong."""
    checked = {}
    for split in ("train", "test"):
        for name in (f"x_{split}", f"y_{split}"):
            if name not in images:
                has = ", ".join(images) or "none"
                raise ValueError(f"{path}: no array {name} (has: {has}); see 'Your own data' in README.md")
        x, y = images[f"x_{split}"], images[f"y_{split}"]
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or 0 in x.shape:
            raise ValueError(f"{path}: x_{split} must be uint8 (N, H, W, C) or (N, H, W) and not empty; it is "
                             f"{x.dtype} {x.shape}")
        if x.ndim == 3:
            x = x[..., None]
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise ValueError(f"{path}: y_{split} must be integers ({len(x)},), one for each image of x_{split}; it is "
                             f"{y.dtype} {y.shape}")
        checked[f"x_{split}"], checked[f"y_{split}"] = x, y.astype(np.int64)
        for name, kinds, type_ in ((f"score_{split}", "iuf", np.float64), (f"attribute_{split}", "iufb", np.int64)):
            if name in images:
                checked[name] = check_numbers(images[name], name, kinds, len(x), path).astype(type_)
    for name in ("mean", "std"):
        if name in images:
            checked[name] = check_numbers(images[name], name, "f", checked["x_train"].shape[3], path).tolist()
    y = checked["y_train"]
    if checked["x_train"].shape[1:] != checked["x_test"].shape[1:]:
        raise ValueError(f"{path}: images of x_train are {checked['x_train'].shape[1:]}, those of x_test "
                         f"{checked['x_test'].shape[1:]}")
    if checked["x_train"].shape[3] not in (1, 3, 4):
        print(f"warning: {path}: images have {checked['x_train'].shape[3]} channels; the channels come last")
    classes = int(y.max()) + 1
    if y.min() < 0 or classes < 2 or classes > len(y) or len(np.unique(y)) != classes:
        raise ValueError(f"{path}: y_train must run from 0 to the number of classes - 1, each present; it has "
                         f"{y.min()} to {y.max()}, {len(np.unique(y))} different")
    if checked["y_test"].min() < 0 or checked["y_test"].max() >= classes:
        raise ValueError(f"{path}: y_test has a label outside 0 to {classes - 1}, the labels of y_train")
    return checked


def check_numbers(values, name, kinds, count, path):
    """A score or attribute array (count,) of a FILE.npz; ValueError: another shape or type, not finite, not 0 or 1."""
    good = values.dtype.kind in kinds and values.shape == (count,) and np.isfinite(values).all()
    what = "finite numbers"
    if name == "std":
        what = "numbers above 0"
        good = good and (values > 0).all()
    if name.startswith("attribute"):
        what = "0 or 1"
        good = good and np.isin(values, (0, 1)).all()
    if not good:
        raise ValueError(f"{path}: {name} must be {what}, {count} of them; it is {values.dtype} "
                         f"{values.shape}")
    return values


def synthetic(n_train=1200, n_test=400, classes=10, size=32):
    """Images of known difficulty, from a fixed seed. Each class has a smooth pattern; an image is its class's pattern,
    share 1 - d, and a smooth pattern of its own, share d, under pixel noise. d, uniform in [0, .9), is the difficulty:
    an easy image shares its pattern with many, a hard one is mostly alone. The score is 1 - d."""
    rng = np.random.default_rng(0)
    grid = np.arange(size) / size
    waves = []  # 16 cosines of low frequency, (size, size) each
    for u, v in itertools.product(range(3), range(3)):
        for phase in (0, np.pi / 2):
            if u + v > 0:
                waves.append(np.cos(2 * np.pi * (u * grid[:, None] + v * grid) + phase))
    waves = np.stack(waves)

    def smooth(n):
        return np.einsum("kwc,whv->khvc", rng.normal(size=(n, 16, 3)), waves) / 4  # (n, size, size, 3)

    pattern = smooth(classes)
    images = {}
    for split, n in (("train", n_train), ("test", n_test)):
        y = rng.permutation(np.arange(n) % classes)
        d = rng.uniform(0, .9, (n, 1, 1, 1))
        x = (1 - d) * pattern[y] + d * smooth(n) + 1.4 * rng.normal(size=(n, size, size, 3))
        images[f"x_{split}"] = (128 + 40 * x).clip(0, 255).astype(np.uint8)
        images[f"y_{split}"], images[f"score_{split}"] = y, 1 - d.ravel()
    return images


def flip_labels(y, fraction, num_classes, seed):
    """Replace the label of an exact share of the examples by another class, drawn uniformly from the other classes.

    y (N,) integer labels, an array or a tensor; returns the same kind. round(fraction N) labels change, and where the
    result differs from y is where the noise is. (The paper draws each example with that probability.)
    Raises ValueError: fraction not in (0, 1), or it changes no label or every one; fewer than two classes.
    """
    count = 0
    if 0 < fraction < 1:
        count = round(fraction * len(y))
    if not 0 < count < len(y) or num_classes < 2:
        raise ValueError(f"label noise must change some of the {len(y)} labels and not all, among two classes or more; "
                         f"got a fraction of {fraction} and {num_classes} classes")
    rng = np.random.default_rng(seed)
    flipped = rng.choice(len(y), count, replace=False)
    noisy = np.asarray(y).copy()
    noisy[flipped] = (noisy[flipped] + rng.integers(1, num_classes, count)) % num_classes
    return torch.as_tensor(noisy) if isinstance(y, torch.Tensor) else noisy


def training_indices(images, seed, o):
    """Which training images a seed trains on, ascending: all, or the --subset that this seed draws.
    Raises ValueError: --subset larger than the training set, or a batch larger than what is left."""
    count = len(images["y_train"])
    if o.subset and o.subset > count:
        raise ValueError(f"--subset {o.subset} is larger than the training set of {count}")
    keep = draw_some(np.arange(count), o.subset, seed)
    if o.batch_size > len(keep):
        raise ValueError(f"--batch-size {o.batch_size} is larger than the training set of {len(keep)}")
    return keep


def draw_some(members, count, seed):
    """Up to `count` (None: all) of the indices `members`, drawn with the seed, in ascending order."""
    return np.sort(np.random.default_rng(seed).permutation(members)[:count])


def on_device(x, o):
    """Images uint8 (N, H, W, C) as a tensor uint8 (N, C, H, W) on the device."""
    return torch.as_tensor(x).to(o.device).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def outputs(f, x, f0=None, block=500):
    """f(x) for many examples, a block at a time, without gradients: (N, C). f0: f_theta0(x), if it is known."""
    parts = []
    for k in range(0, len(x), block):
        if f0 is None:
            parts.append(f(x[k:k + block]))
        else:
            parts.append(f(x[k:k + block], f0[k:k + block]))
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------------
# 6  A run: minibatches, probes, checkpoint
# ---------------------------------------------------------------------------------------------------------------------


class Run:
    """One (alpha, seed): it says when to train and when to look, and keeps on the disk all it takes to go on.

        for i in training.minibatches(probe):       # i (batch_size,): indices of the next minibatch, on the device
            step(i)

    OUT/alpha=A_seed=S/ holds args.json (what the run is), log.jsonl (a record a probe) and checkpoint.pt (parameters,
    momentum, iteration, records: all that changes while it trains).

    examples: how many there are to train on. linearity: called at every fifth probe.
    Raises ValueError: the folder holds another run, or records without their checkpoint. OSError: it cannot be written.
    """

    def __init__(self, o, seed, f, optimizer, images, examples, linearity):
        self.o, self.seed, self.optimizer, self.examples, self.linearity = o, seed, optimizer, examples, linearity
        self.steps_an_epoch = examples // o.batch_size  # the last incomplete batch is dropped
        self.total = o.epochs * self.steps_an_epoch
        self.iteration, self.seconds, self.records, self.step = 0, 0.0, [], None
        self.tensors = list(optimizer.param_groups[0]["params"])  # all that a step changes
        args = {"alpha": f"{f.alpha:g}", "seed": seed, **identity(o, images), "theta0_crc32": crc32(self.tensors)}
        self.folder = run_folder(o, f"alpha={f.alpha:g}_seed={seed}", args)
        if o.momentum:
            for p in list(self.tensors):  # a first momentum of 0 gives the same first step as none
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
                self.tensors.append(optimizer.state[p]["momentum_buffer"])
        if (self.folder / "checkpoint.pt").exists():
            self.load()
        else:
            self.records = read_log(self.folder / "log.jsonl")
            if self.records and not finished(self.records, o):
                raise ValueError(f"{self.folder} has records of an unfinished run but not its checkpoint, so it cannot "
                                 "go on: choose another --out, or delete that folder")

    def minibatches(self, probe):
        """Yield the indices of minibatch after minibatch; probe() returns the script's part of a record, with
        mean_train_loss. The order of an epoch depends on (seed, epoch) alone."""
        o, due = self.o, schedule(self.steps_an_epoch, self.total)
        if finished(self.records, o):
            return
        if not self.records:
            self.save()
        progress, saved = Progress(self.folder.name, self.total, self.iteration), time.monotonic()
        begin, shuffled = time.monotonic() - self.seconds, None
        while True:
            self.seconds = time.monotonic() - begin
            seen = bool(self.records) and self.records[-1]["iteration"] == self.iteration  # before an interruption
            if self.iteration in due and not seen:
                self.look(probe, progress)
                if "ended" in self.records[-1]:
                    break
            if time.monotonic() - saved >= o.checkpoint_seconds:
                self.save()
                saved = time.monotonic()
            epoch, k = divmod(self.iteration, self.steps_an_epoch)
            if epoch != shuffled:
                order = torch.randperm(self.examples, generator=generator(f"order {epoch}", self.seed)).to(o.device)
                shuffled = epoch
            yield order[k * o.batch_size:(k + 1) * o.batch_size]
            self.iteration += 1
            progress.status(self.iteration, f"iteration {self.iteration}  loss {self.records[-1]['mean_train_loss']:.4f}")
        self.save()
        noise = [record.get("update_noise") or 0.0 for record in self.records if "update_noise" in record]
        if noise and np.median(noise) > .02:
            progress.line(f"warning: rounding swallows part of each step (update_noise {np.median(noise):.2g}, median, "
                          "above .02): use --dtype float64, or --alpha inf")

    def look(self, probe, progress):
        """Take one record; `ended` in it says why the run is over."""
        record = {"iteration": self.iteration, "epoch": self.iteration / self.steps_an_epoch,
                  "seconds": round(self.seconds, 3), **probe()}
        loss, ended = record["mean_train_loss"], None
        recent = [earlier["mean_train_loss"] for earlier in self.records[-4:]] + [loss]
        if not math.isfinite(loss):
            ended = "diverged"
        elif len(recent) == 5 and np.mean(recent) < self.o.stop_loss:
            ended = "stop-loss"
        elif self.iteration >= self.total:
            ended = "epochs"
        if ended != "diverged" and (ended or len(self.records) % 5 == 0):
            record.update(self.linearity())
            batch = torch.arange(self.o.batch_size, device=self.o.device)
            record["update_noise"] = update_noise(self.optimizer, lambda: self.step(batch))
        if ended:
            record["ended"] = ended
        self.records.append(json.loads(json_line(record)))
        with naming_out(self.folder), open(self.folder / "log.jsonl", "ab") as log:
            log.write(json_line(record))
        shown = [f"{key} {record[key]:.4f}" for key in ("mean_train_loss", "test_loss", "test_acc") if key in record]
        progress.record(self.iteration, f"iteration {self.iteration:>7}  epoch {record['epoch']:>7.2f}  " + "  ".join(shown))
        if ended == "diverged":
            progress.line(f"diverged at iteration {self.iteration} (its loss is not a finite number): try a smaller --lr")

    def save(self):
        buffer = io.BytesIO()
        torch.save({"iteration": self.iteration, "seconds": self.seconds, "records": self.records,
                    "tensors": [t.detach() for t in self.tensors]}, buffer)
        write_atomically(self.folder / "checkpoint.pt", buffer.getbuffer())

    @torch.no_grad()
    def load(self):
        """Take up checkpoint.pt: its tensors, and log.jsonl as its records have it."""
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.iteration, self.seconds, self.records = state["iteration"], state["seconds"], state["records"]
            for mine, saved in zip(self.tensors, state["tensors"], strict=True):
                mine.copy_(saved)
        except Exception as e:  # damaged bytes make zipfile and torch raise nearly anything
            raise ValueError(f"{path} cannot be read ({first_line(e)[:100]}): choose another --out, or delete the folder "
                             f"{self.folder}") from None
        if not finished(self.records, self.o):
            if self.records and "ended" in self.records[-1]:
                self.records.pop()  # probed again, if it is on the schedule
            write_atomically(self.folder / "log.jsonl", b"".join(json_line(record) for record in self.records))


def finished(records, o):
    """Whether a run's records and these options leave nothing to train. (More epochs, or a lower stop-loss, do.)"""
    if not records or "ended" not in records[-1]:
        return False
    recent = [record["mean_train_loss"] for record in records[-5:]]
    return (records[-1]["ended"] == "diverged" or records[-1]["epoch"] >= o.epochs
            or records[-1]["ended"] == "stop-loss" and np.mean(recent) < o.stop_loss)


def schedule(steps_an_epoch, total):
    """The iterations of a run's probes, which no loss can influence, since a probe that waits for the loss to fall
    catches a jittering run in its lucky moments: 0, a tenth further each time (at least one iteration, at most an
    epoch), and the last."""
    due, iteration = {total}, 0
    while iteration < total:
        due.add(iteration)
        iteration += min(max(iteration // 10, 1), steps_an_epoch)
    return due


class Linearity:
    """The measures of linearity against theta0, on examples x (N, ...) with labels y (N,): make it at theta0, call it
    later. At a = inf the network never leaves theta0."""

    def __init__(self, f, x, y):
        self.f, self.x, self.y = f, x, y
        model = f.model0
        if f.alpha < math.inf:
            model = f.model
        else:
            model = copy.deepcopy(f.model0)
            for name, p in model.named_parameters():
                p.requires_grad_(name in f.names)
        self.start = self.measure(model)

    def measure(self, model):
        return empirical_ntk(model, self.x), relu_signs(model, self.x), representation(model, self.x)

    def __call__(self):
        (K, signs, R), (K0, signs0, R0) = self.start, self.start
        if self.f.alpha < math.inf:
            K, signs, R = self.measure(self.f.model)
        return {"ntk_alignment": kernel_alignment(K, K0), "sign_similarity": sign_similarity(signs, signs0),
                "repr_alignment": representation_alignment(R, R0),
                "repr_alignment_gram": representation_alignment(R, R0, gram=True),
                "target_alignment": target_alignment(K, self.y),
                "linearisation_error": linearisation_error(self.f, self.x)}


@torch.no_grad()
def update_noise(optimizer, step):
    """What rounding does to a step: |applied - intended| / |intended|. Takes step() for real, then puts parameters and
    momentum back. At large a the steps are small against theta: at a = 100 float32 loses .75 % of a first step."""
    group = optimizer.param_groups[0]
    parameters = group["params"]
    velocities = [optimizer.state[p].get("momentum_buffer") for p in parameters]
    changing = parameters + [v for v in velocities if v is not None]
    before = [t.clone() for t in changing]
    with torch.enable_grad():
        step()
    lost, whole = 0.0, 0.0
    for p, old, velocity in zip(parameters, before, velocities):
        intended = -group["lr"] * (p.grad if velocity is None else velocity).double()
        lost += (p.double() - old.double() - intended).square().sum().item()
        whole += intended.square().sum().item()
    for t, old in zip(changing, before):
        t.copy_(old)
    return (lost / whole)**.5 if whole else math.nan


def graphed(step, training):
    """The same step as one CUDA graph on a static index: no launch costs. On a CPU `step` itself."""
    training.step = step
    if training.o.device.type != "cuda" or finished(training.records, training.o):
        return step
    index = torch.arange(training.o.batch_size, device=training.o.device)
    before = [t.detach().clone() for t in training.tensors]
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up, on another stream as torch asks for
            for _ in range(3):
                step(index)
        torch.cuda.current_stream().wait_stream(side)
        training.optimizer.zero_grad()
        with torch.cuda.graph(graph):
            step(index)
    except RuntimeError as e:
        print(f"warning: CUDA graph refused ({first_line(e)}); going on step by step, slower")
        return step
    finally:
        with torch.no_grad():  # undo the warm-up
            for t, old in zip(training.tensors, before):
                t.copy_(old)

    def replay(batch):
        index.copy_(batch)
        graph.replay()

    training.step = replay
    return replay


class Progress:
    """One status line on a terminal; into a file or pipe an aligned line a record, or every ten seconds."""

    quiet = False  # in a child of --jobs, whose parent has the status line

    def __init__(self, name, total, done=0):
        self.name, self.total, self.first, self.begin, self.shown = name, total, done, time.monotonic(), time.monotonic()
        self.terminal = sys.stdout.isatty()

    def left(self, done):
        """The time left, as text: at most, since a run may end before its last iteration."""
        if done <= self.first:
            return ""
        seconds = int((time.monotonic() - self.begin) / (done - self.first) * (self.total - done))
        return f"  at most {datetime.timedelta(seconds=seconds)} left"

    def status(self, done, text, every=10.0):
        if self.terminal and not self.quiet and time.monotonic() - self.shown > .2:
            self.shown = time.monotonic()
            print(f"\r{self.name}  {text}{self.left(done)} \033[K", end="", flush=True)
        elif not self.terminal and time.monotonic() - self.shown > every:
            self.record(done, text)

    def record(self, done, text):
        if not self.terminal:
            self.shown = time.monotonic()
            print(f"{self.name:<18} {text}{self.left(done)}", flush=True)

    def line(self, text):
        print("\r\033[K" * self.terminal + f"{self.name}: {text}", flush=True)


# What a run is, and its files.


def identity(o, images):
    """What makes two runs comparable: script, options that are part of a run, data; and what is good to know beside."""
    arrays = [images[name] for name in sorted(images) if isinstance(images[name], np.ndarray)]
    options = {name: getattr(o, name) for name in o.part_of_run if name != "dtype"}
    options["dtype"] = str(o.dtype).removeprefix("torch.")
    return {"script": o.script, "options": options,
            "data_crc32": crc32(arrays), "dataset": os.path.basename(str(getattr(o, "dataset", ""))),
            "script_crc32": o.script_crc32, "torch": torch.__version__, "numpy": np.__version__,
            "python": sys.version.split()[0], "device": str(o.device), "threads": torch.get_num_threads()}


def run_folder(o, name, args):
    """The folder OUT/name of one run, made and marked by its args.json. ValueError: it holds another run."""
    folder = pathlib.Path(o.out) / name
    with naming_out(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if (folder / "args.json").exists():
        compare(read_args(folder), args, folder)
    else:
        write_atomically(folder / "args.json", json_line(args))
    return folder


def check_folder(o, images):
    """Compare what would be trained with every run in --out. ValueError: there is another; a warning: another script."""
    args = identity(o, images)
    for path in sorted(pathlib.Path(o.out).glob("alpha=*/args.json")):
        there = read_args(path.parent)
        compare(there, args, path.parent)
        if there.get("script_crc32") != args["script_crc32"]:
            print(f"warning: {path.parent} was run by another text of {o.script}.py")


def compare(there, here, folder):
    """ValueError if the run that a folder holds is another than `here`, naming the first difference."""
    facts = [(key, there.get(key), here[key]) for key in ("script", "data_crc32", "theta0_crc32") if key in here]
    facts += [(key, there["options"].get(key), here["options"][key]) for key in here["options"]]
    for key, old, new in facts:
        if old != new:
            raise ValueError(f"{folder} holds a run with {key} = {old}, not {new}: choose another --out, or delete that "
                             "folder")


def read_args(folder):
    """A run folder's args.json as a dict. ValueError: missing or damaged."""
    try:
        args = json.loads((folder / "args.json").read_text())
        return {**args, "options": dict(args["options"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder}/args.json is missing or damaged: choose another --out, or delete that "
                         "folder") from None


def read_log(path):
    """The records of a log.jsonl; a half-written last line is left out. ValueError: a damaged line before it."""
    lines, records = [], []
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            numbers = [value for key, value in record.items() if key != "ended"]
            if not line.endswith(b"\n") or not all(isinstance(v, (int, float, type(None))) for v in numbers):
                raise ValueError
            records.append(record)
        except (ValueError, AttributeError):
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is damaged: choose another --out, or delete the folder "
                                 f"{path.parent}") from None
    return records


def read_runs(folder):
    """The records of every run in a folder, {alpha: {seed: [record, ...]}}, ascending; for notebooks, too.
    ValueError: there are none, one is damaged, or they differ in more than alpha and seed."""
    runs, first = {}, None
    for path in sorted(pathlib.Path(folder).glob("alpha=*_seed=*/log.jsonl")):
        records = read_log(path)
        if not all({"iteration", "epoch", "mean_train_loss"} <= set(record) for record in records):
            raise ValueError(f"{path} is damaged: choose another --out, or delete the folder {path.parent}")
        if records:
            args = read_args(path.parent)
            first = first or args
            compare(args, {**first, "theta0_crc32": args.get("theta0_crc32")}, path.parent)
            runs.setdefault(float(args["alpha"]), {})[int(args["seed"])] = records
    if not runs:
        raise ValueError(f"{folder}: there are no records of runs (--out)")
    return {alpha: dict(sorted(runs[alpha].items())) for alpha in sorted(runs)}


def json_line(entry):
    """Strict JSON, a line: numbers that are not finite become null."""
    def strict(value):
        if isinstance(value, dict):
            return {key: strict(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [strict(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return (json.dumps(strict(entry), allow_nan=False) + "\n").encode()


def write_atomically(path, data):
    """Write bytes to a temporary file, flush it to the disk and rename it to `path`: whole, or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with naming_out(path):
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def naming_out(path):
    """Turn what a full disk or a read-only folder raises into one line that names --out."""
    try:
        yield
    except OSError as e:
        raise OSError(f"{path} could not be written ({e.strerror or e}): make room, or choose another --out") from None


def crc32(arrays):
    """Checksum of arrays or tensors, to tell whether data or an initialisation is the same as before."""
    value = 0
    for array in arrays:
        if isinstance(array, torch.Tensor):
            array = array.detach().cpu().numpy()
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def first_line(e):
    """What an exception says, on one line; its type if it says nothing."""
    return str(getattr(e, "reason", e)).strip().split("\n")[0] or type(e).__name__


# ---------------------------------------------------------------------------------------------------------------------
# 7  Equal training loss, tables, drawing
# ---------------------------------------------------------------------------------------------------------------------


def smooth(values):
    """The centred average over five probes, (n,) -> (n - 2,): the window shrinks at the start, and the last two are not
    read, so that a reading does not change when the run goes on."""
    values = np.asarray(values, float)
    averages = []
    for k in range(len(values) - 2):
        reach = min(k, 2)
        averages.append(values[k - reach:k + reach + 1].mean())
    return np.array(averages)


def curve(records):
    """A run's records as {key: array (n,)}, smoothed along the run; what every fifth probe measures is nan between.

    The record at the end of the epochs is not on the schedule, and what follows a loss that is not finite means nothing:
    both are left out."""
    finite = []
    for record in records:
        if record["mean_train_loss"] is None:
            break
        if record.get("ended") != "epochs":
            finite.append(record)
    columns = {}
    for key in records[0]:
        if key not in LINEARITY and key != "ended":
            columns[key] = smooth([r[key] if r[key] is not None else math.nan for r in finite])
    for key in ("iteration", "epoch"):
        columns[key] = np.array([r[key] for r in finite[:-2]], float)
    for key in LINEARITY:
        measured = [r.get(key) for r in finite[:-2]]
        columns[key] = np.array([math.nan if value is None else value for value in measured])
    return columns


def value_at(level, loss, quantity):
    """`quantity` where `loss` first passes `level`, on a line in ln(loss) between the two probes around it; None if it
    does not pass. loss, quantity: arrays (n,), smoothed; nan in quantity: not measured, its neighbours are taken."""
    passed = np.flatnonzero(loss <= level)
    if len(passed) == 0:
        return None
    measured = np.flatnonzero(np.isfinite(quantity))
    before, after = measured[measured < passed[0]], measured[measured >= passed[0]]
    if len(before) == 0 or len(after) == 0:
        return None
    a, b = before[-1], after[0]
    lowest = max(loss[passed[0]:b + 1].min(), 1e-300)  # loss[b] itself, unless b is further on
    share = math.log(loss[a] / level) / math.log(loss[a] / lowest)
    return float(quantity[a] + share * (quantity[b] - quantity[a]))


def value_at_accuracy(level, accuracy, quantity):
    """`quantity` at the first upward passage of `accuracy` through `level` after its lowest value, on a line between
    the two probes around it; None if there is none. Arrays (n,), smoothed."""
    if len(accuracy) == 0:
        return None
    lowest = int(np.argmin(accuracy))
    passed = np.flatnonzero(accuracy[lowest:] >= level)
    if len(passed) == 0 or passed[0] == 0:
        return None
    b = lowest + passed[0]
    share = (level - accuracy[b - 1]) / (accuracy[b] - accuracy[b - 1])
    return float(quantity[b - 1] + share * (quantity[b] - quantity[b - 1]))


def spread(values, interval=False):
    """{"mean", "std", "n"} of the values that are not None; with interval=True also "interval" (95 %, Student's t)
    from three on. None if there is no value."""
    values = [v for v in values if v is not None]
    if not values:
        return None
    n, mean, std = len(values), float(np.mean(values)), None
    if n > 1:
        std = float(np.std(values, ddof=1))
    result = {"mean": mean, "std": std, "n": n}
    if interval and n > 2:
        half = student_t(n - 1) * std / math.sqrt(n)
        result["interval"] = [mean - half, mean + half]
    return result


def student_t(freedom):
    """The .975 quantile of Student's t, from a table; beyond it 1.96 + 2.4 / freedom, right to .003."""
    table = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
             2.120, 2.110, 2.101, 2.093, 2.086]
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.4 / freedom


def loss_levels(runs, more=()):
    """.9, .8, ... .1 times L0, the paper's 1.0 and .5, and more, as far as they lie below L0; highest first. L0 is the
    mean training loss at the start, as the first record at the smallest alpha has it: ln C for cross-entropy."""
    smallest = runs[min(runs)]
    start = float(f"{smallest[min(smallest)][0]['mean_train_loss']:.3g}")
    levels = {1.0, .5, *more}
    for k in range(1, 10):
        levels.add(k / 10 * start)
    return sorted({float(f"{level:.3g}") for level in levels if level < start}, reverse=True)


def summarise(runs, quantities, levels, on="mean_train_loss"):
    """What quantities(curve) -> {name: array} are where the loss `on` passes each level: per alpha over seeds, and,
    since a seed fixes everything but alpha, paired by seed between alphas.

    Returns {"alphas": {"1": {"levels": {"1.6": {name: {"mean", "std", "n"}}}, "linearity": {...}}}, "paired":
    {"1 - 100": {"levels": {"1.6": {name: {..., "interval"}}}}}}; a level that no run passes is absent.
    """
    curves = {}
    for alpha, seed in pairs_of(runs):
        curves[alpha, seed] = curve(runs[alpha][seed])
    read = {}  # (alpha, seed, level) -> {name: number or None}
    for (alpha, seed), columns in curves.items():
        wanted = {**quantities(columns), **{key: columns[key] for key in LINEARITY}}
        for level in levels:
            read[alpha, seed, level] = {name: value_at(level, columns[on], q) for name, q in wanted.items()}
    names = list(quantities(next(iter(curves.values()))))
    summary = {"alphas": {}, "paired": {}}
    for alpha, seeds in runs.items():
        part = summary["alphas"][f"{alpha:g}"] = {"levels": {}, "linearity": {}}
        for level in levels:
            cells = [read[alpha, seed, level] for seed in seeds]
            fill(part["levels"], level, {name: spread([c[name] for c in cells]) for name in names})
            fill(part["linearity"], level, {key: spread([c[key] for c in cells]) for key in LINEARITY})
        last = [records[-1] for records in seeds.values()]
        fill(part["linearity"], "end", {key: spread([r.get(key) for r in last]) for key in LINEARITY})
    for a, b in itertools.combinations(runs, 2):
        part = summary["paired"][f"{a:g} - {b:g}"] = {"levels": {}}
        both = [seed for seed in runs[a] if seed in runs[b]]
        for level in levels:
            row = {}
            for name in names:
                differences = [minus(read[a, s, level][name], read[b, s, level][name]) for s in both]
                row[name] = spread(differences, interval=True)
            fill(part["levels"], level, row)
    return summary


LINEARITY = ("sign_similarity", "repr_alignment", "repr_alignment_gram", "ntk_alignment", "target_alignment",
             "linearisation_error", "update_noise")


def fill(rows, level, row):
    """Put the cells of a row that have a value into a table under its level."""
    row = {name: cell for name, cell in row.items() if cell}
    if row:
        rows[level if level == "end" else f"{level:.3g}"] = row


def pairs_of(runs):
    return [(alpha, seed) for alpha, seeds in runs.items() for seed in seeds]


def minus(a, b):
    return None if a is None or b is None else a - b


def lowest_common_level(runs, summary, name):
    """The lowest level at which every run has a value of `name`, as text; None if there is none."""
    found = None
    first = summary["alphas"][f"{min(runs):g}"]["levels"]
    for level in first:  # highest first
        counts = [summary["alphas"][f"{a:g}"]["levels"].get(level, {}).get(name) for a in runs]
        if all(cell and cell["n"] == len(seeds) for cell, seeds in zip(counts, runs.values())):
            found = level
    return found


def sentence(runs, summary, name, opening, larger, smaller):
    """The conclusion: `name` at the smallest and the largest alpha, at the lowest level that every run has, and what
    their paired difference says: `larger` where its interval lies above 0, `smaller` where below."""
    a, b = f"{min(runs):g}", f"{max(runs):g}"
    level = lowest_common_level(runs, summary, name)
    if a == b:
        return "One alpha is no comparison: --alpha 1 100 makes one."
    if level is None:
        return "No loss level was passed by every run yet: nothing is concluded."
    rich, lazy = (summary["alphas"][alpha]["levels"][level][name]["mean"] for alpha in (a, b))
    difference = summary["paired"][f"{a} - {b}"]["levels"].get(level, {}).get(name)
    text = f"{opening.format(level=level)} {rich:.2f} at alpha = {a} and {lazy:.2f} at alpha = {b}"
    if difference is None:
        return f"{text}; no seed has both."
    if "interval" not in difference:
        return f"{text}, paired difference {difference['mean']:.2f}: an interval takes three seeds, so nothing is concluded."
    low, high = difference["interval"]
    verdict = "these runs do not show a difference"
    if low > 0:
        verdict = larger
    if high < 0:
        verdict = smaller
    return f"{text}, paired difference {difference['mean']:.2f} [{low:.2f}, {high:.2f}] ({difference['n']} seeds): {verdict}."


def print_table(title, rows, columns):
    """Print rows {label: {column: what spread returned}} under a title: mean +- std (n), or mean [interval] (n)."""
    print(f"\n{title}")
    if not rows:
        print("  no level is reached yet")
        return
    print(" " * 12 + "".join(f"{column:>27}" for column in columns))
    for label, row in rows.items():
        print(f"{label:>12}" + "".join(f"{cell(row.get(column)):>27}" for column in columns))


def print_claim(title, summary, name):
    """One table for one claim: `name` at each level, a column for each alpha, then each alpha minus the largest."""
    rows, columns = {}, []
    largest = list(summary["alphas"])[-1]
    for alpha, part in summary["alphas"].items():
        columns.append(f"alpha = {alpha}")
        for level, row in part["levels"].items():
            rows.setdefault(level, {})[columns[-1]] = row.get(name)
    for alpha in list(summary["alphas"])[:-1]:
        columns.append(f"{alpha} - {largest}, paired")
        for level, row in summary["paired"][f"{alpha} - {largest}"]["levels"].items():
            rows[level][columns[-1]] = row.get(name)
    print_table(title, dict(sorted(rows.items(), key=lambda row: -float(row[0]))), columns)


def print_linearity(summary):
    """The linearity measures at the paper's losses 1.0 and .5, where they were reached, and at the end."""
    rows = {}
    for alpha, part in summary["alphas"].items():
        for level in ("1", "0.5", "end"):
            if level in part["linearity"]:
                rows[f"{alpha} at {level}"] = part["linearity"][level]
    print_table("Linearity on held-out images, alpha at a mean training loss", rows,
                ["sign_similarity", "repr_alignment", "ntk_alignment", "linearisation_error"])


def cell(value):
    """What `spread` returned, for a table: mean +- std (n), mean [interval] (n), or a dash."""
    if not value:
        return "-"
    if "interval" in value:
        low, high = value["interval"]
        return f"{value['mean']:.3f} [{low:.3f}, {high:.3f}] ({value['n']})"
    if value["std"] is None:
        return f"{value['mean']:.3f} (1)"
    return f"{value['mean']:.3f} +- {value['std']:.3f} ({value['n']})"


def colour(alpha):
    """A colour belongs to an alpha, the same in every figure: warm is rich, cold is lazy, black is linear. Apart for
    colour-blind readers, too (Okabe and Ito)."""
    from matplotlib import colormaps
    known = {.5: "#e69f00", 1: "#d55e00", 10: "#cc79a7", 100: "#0072b2", 1000: "#56b4e9", math.inf: "#000000"}
    return known[alpha] if alpha in known else colormaps["viridis"](min(max((math.log10(alpha) + 2) / 6, 0), .9))


def alpha_label(alpha):
    return r"$\alpha = \infty$" if alpha == math.inf else rf"$\alpha = {alpha:g}$"


def draw_band(ax, seeds, x, y, read=value_at, **style):
    """Draw the smoothed y against the smoothed x for the runs {seed: records} of one alpha: one run as its curve, its
    single probes faint behind it; several as mean and range, read at equal x as the tables are."""
    curves = [curve(records) for records in seeds.values()]
    curves = [c for c in curves if len(c[x]) > 1]
    if len(curves) == 1:
        measured = np.isfinite(curves[0][y])
        ax.plot(curves[0][x][measured], curves[0][y][measured], **style)
        points = [(r[x], r[y]) for r in next(iter(seeds.values())) if r.get(y) is not None and r[x] is not None]
        if y not in LINEARITY:
            ax.plot(*np.array(points).T, ".", color=style["color"], markersize=2, alpha=.3)
    if len(curves) < 2:
        return
    low, high = max(c[x].min() for c in curves), min(c[x].max() for c in curves)
    middle, mean, least, most = [], [], [], []
    for level in np.linspace(low, high, 120)[1:-1]:
        values = [read(level, c[x], c[y]) for c in curves]
        if None not in values:
            middle.append(level), mean.append(np.mean(values)), least.append(min(values)), most.append(max(values))
    ax.plot(middle, mean, **style)
    ax.fill_between(middle, least, most, color=style["color"], alpha=.18, linewidth=0)


def at_iteration(iteration, iterations, quantity):
    """A reading for draw_band: y against iterations, on a line between two probes."""
    return float(np.interp(iteration, iterations, quantity))


def draw_linearity(similarity, error, runs, x, read=value_at):
    """Two panels against x: the similarities to initialisation on [0, 1], and how far f^a is from its linearisation."""
    styles = {"sign_similarity": "-", "repr_alignment": "--", "ntk_alignment": ":"}
    for alpha, seeds in runs.items():
        for key, style in styles.items():
            draw_band(similarity, seeds, x, key, read, color=colour(alpha), linestyle=style)
        draw_band(error, seeds, x, "linearisation_error", read, color=colour(alpha))
    similarity.set(ylim=(0, 1.03), title="Similarity to initialisation")
    error.set(ylim=(0, None), title="Distance from its own linearisation")
    names = {"ReLU signs": "-", "representation": "--", "NTK": ":"}
    legend_below(similarity, runs, names)
    legend_below(error, runs, {})


def legend_below(ax, alphas, styles):
    """A legend under the axis labels, where it covers no curve: the colour of each alpha, then each line style."""
    from matplotlib.lines import Line2D
    handles = [Line2D([], [], color=colour(alpha), label=alpha_label(alpha)) for alpha in alphas]
    handles += [Line2D([], [], color="#777777", linestyle=style, label=name) for name, style in styles.items()]
    ax.legend(handles=handles, fontsize=7.5, ncols=3, loc="upper center", bbox_to_anchor=(.5, -.16))


def save_figure(figure, folder, name):
    """Write folder/name.png and .pdf, each whole or not at all, on white."""
    for kind in ("png", "pdf"):
        buffer = io.BytesIO()
        metadata = {"CreationDate": None} if kind == "pdf" else None
        figure.savefig(buffer, format=kind, dpi=150, facecolor="white", metadata=metadata)
        write_atomically(pathlib.Path(folder) / f"{name}.{kind}", buffer.getbuffer())


# ---------------------------------------------------------------------------------------------------------------------
# 8  The command line
# ---------------------------------------------------------------------------------------------------------------------

# name: (group, default, bounds, help). Its type follows from the default; a type in its place means: none by default.
# The options of the groups "training" and "looking" are part of what a run is.
SHARED = {
    "alpha": ("what to run", [1.0, 100.0], "above 0, at most inf", "a in f^a = a (f - f0): 1 rich, 100 lazy, inf linear"),
    "seeds": ("what to run", [0], "at least 0, below 2147483648", "one run an alpha and seed"),
    "dataset": ("what to run", "cifar10", None, "cifar10, synthetic, or a file FILE.npz (see README.md)"),
    "epochs": ("what to run", 2500, "at least 1", "at most so many passes over the training set"),
    "stop_loss": ("what to run", .01, "at least 0", "end a run whose mean training loss, over five probes, is below"),
    "device": ("what to run", "auto", None, "auto, cpu, cuda, cuda:1"),
    "jobs": ("what to run", 1, "at least 0", "runs side by side; 0, the command line's default: one a core, on a GPU 1"),
    "quick": ("what to run", False, None, "a demonstration in under a minute; explicit options win"),
    "draw_only": ("what to run", False, None, "conclude from the records at hand and draw them; train nothing"),
    "lr": ("training", .01, "above 0", "learning rate, before the division by alpha^2"),
    "momentum": ("training", .9, "at least 0, below 1", "of SGD"),
    "batch_size": ("training", 125, "at least 1", "examples a step"),
    "width": ("training", 64, "at least 1, at most 4096", "channels of the network's first block"),
    "subset": ("training", int, "at least 1", "train on so many examples only, drawn with the seed"),
    "dtype": ("training", "float32", ["float32", "float64"], "float64 for very large alpha"),
    "group_size": ("looking", 1000, "at least 1", "examples of a group that a probe evaluates"),
    "probe_examples": ("looking", 100, "at least 1", "held-out examples for the linearity measures"),
    "levels": ("reading", [], "above 0", "more training losses to compare at"),
    "data_dir": ("folders", "data", None, "where downloads go"),
    "out": ("folders", "runs/SCRIPT", None, "where records and figures go"),
    "checkpoint_seconds": ("folders", 60.0, "at least 0", "time between checkpoints"),
}


def merged(table):
    """The shared options with a script's own; those that it names None are left out."""
    return {name: row for name, row in {**SHARED, **table}.items() if row is not None}


def options(script, table, quick, given, file):
    """One call's options as a namespace: defaults, then --quick's preset, then what is given (words or Python values).

    script: its name; file: its path; table: its own options; quick: the preset. Raises ValueError, one line, for
    whatever is wrong with them.
    """
    table = merged(table)
    for name in given:
        if name not in table:
            raise ValueError(f"there is no option {name}: {near(name, table)}")
    chosen = {name: default for name, (_, default, _, _) in table.items()}
    chosen["out"] = f"runs/{script}"
    if given.get("quick"):
        chosen.update(quick, out=f"runs/{script}_quick")
    chosen.update({name: value for name, value in given.items() if value is not None})
    o = types.SimpleNamespace(script=script, script_crc32=zlib.crc32(pathlib.Path(file).read_bytes()))
    for name, (_, default, bounds, _) in table.items():
        setattr(o, name, checked(name, chosen[name], default, bounds))
    o.part_of_run = [name for name in table if table[name][0] in ("training", "looking")]
    o.alpha = sorted(o.alpha)
    for alpha in o.alpha:
        if float(f"{alpha:g}") != alpha:
            raise ValueError(f"--alpha {alpha}: at most six digits, since folders are named by it")
    o.device, o.dtype = device_named(o.device), getattr(torch, o.dtype)
    # True float32: cuDNN's default, TF32, keeps 10 bits of the mantissa, and alpha multiplies what it rounds off.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return o


def checked(name, value, default, bounds):
    """The value of an option, a word or a Python value, as the type of its default; ValueError if it is none."""
    flag = "--" + name.replace("_", "-")
    if isinstance(default, list):
        kind = default[0] if default else 1.0
        several = value if isinstance(value, (list, tuple, range, np.ndarray)) else [value]
        return list(dict.fromkeys(checked(name, one, kind, bounds) for one in several))
    if value is default and isinstance(default, type):
        return None
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{flag} is True or False, not {value}")
        return value
    if isinstance(default, str):
        if bounds and str(value) not in bounds:
            raise ValueError(f"{flag} {value}: {near(value, bounds)}")
        return str(value)
    kind = default if isinstance(default, type) else type(default)
    try:
        number = kind(str(value))  # by way of text: False is not 0, and 2.5 is no whole number
        good = within(number, bounds)
    except ValueError:
        good = False
    if not good:
        what = "a whole number" if kind is int else "a number"
        hint = " (separate several by spaces)" if "," in str(value) else ""
        raise ValueError(f"{flag} must be {what} {bounds.replace(', ', ' and ')}, not {value}{hint}")
    return number


def within(number, bounds):
    """Whether a number keeps to bounds such as "above 0, at most 1"; infinite only where they name inf."""
    keeps = {"at least": number.__ge__, "above": number.__gt__, "at most": number.__le__, "below": number.__lt__}
    for bound in bounds.split(", "):
        word, limit = bound.rsplit(" ", 1)
        if not keeps[word](type(number)(limit)):
            return False
    return math.isfinite(number) or "inf" in bounds


def near(word, names):
    """What to say of a word that is none of `names`: the nearest of them, or all."""
    close = difflib.get_close_matches(str(word), list(names), 1)
    return f"did you mean {close[0]}?" if close else "choose one of " + ", ".join(names)


def device_named(name):
    """auto, cpu, cuda or cuda:N as a torch.device; under torchrun auto is LOCAL_RANK's. Does not start CUDA."""
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if count else "cpu")
    kind, _, index = name.partition(":")
    if kind == "gpu":
        raise ValueError(f"--device {name}: did you mean cuda?")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):  # the measures need float64, which mps has not
        raise ValueError(f"--device {name}: {near(name, ['auto', 'cpu', 'cuda', 'cuda:1'])}")
    if kind == "cuda" and int(index or 0) >= count:
        raise ValueError(f"--device {name}: torch sees {count} CUDA devices here; --device cpu works everywhere")
    return torch.device(name)


def sweep(o, load, run, conclude, draw):
    """Train what --out does not hold yet, run(alpha, seed, load(o), o) for each pair; then conclude(o, runs) and
    draw(o, runs) from every run that is there. Returns the summary. Under torchrun each process takes its share of the
    pairs, and whoever finds every run ended concludes."""
    pairs = [(alpha, seed) for seed in o.seeds for alpha in o.alpha]
    if not o.draw_only:
        images = load(o)
        check_folder(o, images)
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        share = unfinished(o, pairs[rank::world])
        if not pairs[rank::world]:
            print(f"rank {rank} of {world}: there is no run for this process")
        work = functools.partial(run_in_child, load, run, o)
        if jobs_of(o, share) == 1:
            work = functools.partial(run_here, run, images, o)
        progress = Progress("sweep", o.epochs * len(share))
        for _ in side_by_side(o, work, share, lambda: watch(o, share, progress)):
            pass
        if unfinished(o, pairs):
            return {}  # another process is at work on them, and will conclude
    runs = read_runs(o.out)
    there = read_args(next(pathlib.Path(o.out).glob("alpha=*_seed=*")))
    if there.get("script") != o.script:
        raise ValueError(f"{o.out} holds runs of {there.get('script')}.py: choose another --out")
    o.dataset = there.get("dataset")
    summary = conclude(o, runs)
    summary["diverged"] = [f"alpha={a:g}_seed={s}" for a, s in pairs_of(runs) if runs[a][s][-1].get("ended") == "diverged"]
    summary["options"] = {"script": o.script, "dataset": o.dataset, "levels": o.levels}
    write_atomically(pathlib.Path(o.out) / "summary.json", json_line(summary))
    draw(o, runs)
    print(f"\nwrote {o.out}/summary.json and the pictures beside it\n\n{summary['conclusion']}")
    return json.loads(json_line(summary))


def log_of(o, alpha, seed):
    return read_log(pathlib.Path(o.out) / f"alpha={alpha:g}_seed={seed}" / "log.jsonl")


def unfinished(o, pairs):
    """The (alpha, seed) pairs that these options leave something to train of."""
    return [pair for pair in pairs if not finished(log_of(o, *pair), o)]


def run_here(run, images, o, alpha, seed):
    with torch.inference_mode(False), torch.enable_grad():
        run(alpha, seed, images, o)


def run_in_child(load, run, o, alpha, seed):
    if "images" not in loaded:
        loaded["images"] = load(o)
    run(alpha, seed, loaded["images"], o)


loaded = {}  # in a child of --jobs: its own data, for all its runs


def watch(o, share, progress):
    """One status line for runs side by side, read off their records."""
    last = [(log_of(o, *pair) or [None])[-1] for pair in share]
    last = [record for record in last if record]
    if last and progress.terminal:
        done = sum(o.epochs if "ended" in record else record["epoch"] for record in last)
        ended = sum("ended" in record for record in last)
        losses = ", ".join(f"{record['mean_train_loss'] or math.nan:.3f}" for record in last if "ended" not in record)
        progress.status(done, f"{ended} of {len(share)} runs ended, losses {losses}")


def jobs_of(o, tasks):
    """How many processes: --jobs, or for 0 as many as there are cores and tasks; on a GPU 1."""
    jobs = o.jobs or (1 if o.device.type == "cuda" else cores())
    return max(1, min(jobs, len(tasks)))


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def side_by_side(o, work, tasks, look):
    """Yield work(*task) as the tasks end, --jobs processes at a time (1: in this process); look() meanwhile, once a
    second. The first exception, or Ctrl-C, ends all; a child ends with its parent."""
    jobs = jobs_of(o, tasks)
    threads = 1 if o.quick or o.script == "toy" else max(1, cores() // jobs)
    if jobs == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(min(before, threads))
        try:
            for task in tasks:
                yield work(*task)
        finally:
            torch.set_num_threads(before)
        return
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_child, (threads,))
    try:
        waiting = {pool.submit(work, *task) for task in tasks}
        while waiting:
            ended, waiting = concurrent.futures.wait(waiting, 1, concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                yield future.result()
            look()
    except concurrent.futures.BrokenExecutor:
        raise OSError("a process of --jobs has died (killed, out of memory, or started from a script without the line "
                      "if __name__ == '__main__'); the same command goes on, fewer --jobs need less memory") from None
    finally:
        if waiting:
            for child in set(multiprocessing.active_children()) - others:
                child.kill()
        pool.shutdown(cancel_futures=True)


def start_child(threads):
    """In a child of --jobs: its threads; its end when the parent's comes; Ctrl-C is the parent's business."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Progress.quiet = True

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parse_words(script, table, quick, doc, words=None):
    """A command line as the keywords of main(**options). Raises ValueError."""
    parser = Parser(prog=f"{script}.py", description=doc.split("\n")[0], epilog=doc.partition("\n")[2].strip("\n"),
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    groups = {}
    for name, (group, default, bounds, text) in merged(table).items():
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        flag, settings = "--" + name.replace("_", "-"), {"metavar": name.upper()[:8]}
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default).replace("SCRIPT", script)
        if name in quick:
            preset = quick[name]
            shown += "; --quick: " + (" ".join(map(str, preset)) if isinstance(preset, list) else str(preset))
        if isinstance(default, bool):
            settings, shown = {"action": "store_true", "default": None}, ""
        elif isinstance(default, list):
            settings["nargs"] = "+"
        elif isinstance(default, type):
            shown = ""
        groups[group].add_argument(flag, **settings, help=text + (f" ({shown})" if shown else ""))
    given, unknown = parser.parse_known_args(words)
    if unknown:
        flags = ["--" + name.replace("_", "-") for name in merged(table)]
        raise ValueError(f"{unknown[0]}: {near(unknown[0], flags)}")
    return {name: value for name, value in vars(given).items() if value is not None}


def command_line(script, main, table, quick, doc):
    """Run main(**options) as a program: one line and exit code 2 for bad input, 130 for Ctrl-C, 1 if a run diverged."""
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*deprecated")  # torch's own, on its first jvp
    try:
        summary = main(**{"jobs": 0, **parse_words(script, table, quick, doc)})
        sys.exit(1 if summary.get("diverged") else 0)
    except KeyboardInterrupt:
        print(f"\n{script}.py: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as e:
        print(f"{script}.py: error: {' '.join(str(e).split())}", file=sys.stderr)
    except RuntimeError as e:
        if "memory" not in str(e):  # torch's own class on a GPU, a plain RuntimeError on a CPU
            raise
        print(f"{script}.py: out of memory: {first_line(e)[:200]} Try a smaller --subset, --probe-examples, --width or "
              "--batch-size", file=sys.stderr)
    sys.exit(2)
