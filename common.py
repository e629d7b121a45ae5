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
import operator
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
    """Return f^a(x) = a (f_theta(x) - f_theta0(x)); theta0 is what `model` holds now (paper, section 2).

    `model` itself is what trains afterwards. a = 1 is ordinary (rich) training of the centred network; a >> 1
    at the learning rate lr / a^2 (`scaled_sgd`) is lazy: theta hardly moves. a = inf is that limit.

    model: any nn.Module whose output for one example depends on that example alone.
    alpha: a number above 0, or float("inf").
    Raises ValueError: alpha is none of these; the model is random, see check_deterministic.
    Needs: CenteredModel, LinearizedModel, check_deterministic.
    """
    try:
        value = math.nan if isinstance(alpha, (str, bool)) else float(alpha)
    except (TypeError, ValueError):
        value = math.nan
    if value == math.inf:
        return LinearizedModel(model)
    if not 1e-100 < value < 1e100:
        raise ValueError(f"alpha must be a number above 0, or inf for the linear network; got {alpha!r}")
    return CenteredModel(model, value)


class CenteredModel(nn.Module):
    """f^a(x) = a (f_theta(x) - f_theta0(x)) around a frozen copy of `model`; exactly 0 at initialisation.

    self.model trains, self.model0 is the frozen copy. f_theta0 never changes, so it can be computed once for
    a whole data set and handed in as `f0`: then a step costs no second forward pass (and at initialisation
    f^a is 0 within rounding). Where x requires gradients, f0 is computed all the same, for its part of them.

    forward(x, f0=None): x (N, ...), f0 (N, C) or None -> (N, C).
    Raises ValueError: f0 of another shape than f_theta(x); a random model, see check_deterministic.
    Needs: check_deterministic.
    """

    def __init__(self, model, alpha):
        super().__init__()
        check_deterministic(model)
        self.alpha = alpha
        self.model = model
        self.model0 = copy.deepcopy(model).requires_grad_(False)

    def forward(self, x, f0=None):
        check_deterministic(self.model)
        alpha = self.alpha
        if f0 is None or x.requires_grad:
            f0 = self.model0(x.clone())  # a copy for each: a network may change its input in place
            x = x.clone()
        f = self.model(x)
        if f0.shape != f.shape:  # (N,) against (N, 1) would broadcast to (N, N)
            raise ValueError(f"f0 has shape {tuple(f0.shape)}, the network's output {tuple(f.shape)}")
        return alpha * (f - f0)


class LinearizedModel(nn.Module):
    """The lazy limit, a = inf: f(x) = grad f_theta0(x) . delta, trained in delta from 0 (paper, eq. 2).

    delta stands for a (theta - theta0), which stays finite as a grows. The directional derivative is exact:
    one forward-mode pass, about 1.5 times the cost of an ordinary training step.

    forward(x, f0=None): x (N, ...) -> (N, C); f0 is accepted for the sake of one interface and not needed.
    Raises ValueError: a random model, see check_deterministic.
    Needs: check_deterministic.
    """
    alpha = float("inf")

    def __init__(self, model):
        super().__init__()
        check_deterministic(model)
        self.model0 = copy.deepcopy(model).requires_grad_(False)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.delta = nn.ParameterList()
        for name in self.names:
            self.delta.append(torch.zeros_like(self.model0.get_parameter(name)))

    def forward(self, x, f0=None):
        check_deterministic(self.model0)
        return self.derivative(self.model0, x, dict(zip(self.names, self.delta)))

    @staticmethod
    def derivative(model, x, direction):
        """d f_(theta + t direction)(x) / dt at t = 0, (N, C); direction: {a parameter's name: tensor}."""
        theta = {name: model.get_parameter(name).detach() for name in direction}
        f = lambda theta: torch.func.functional_call(model, theta, (x.clone(),))
        try:
            return torch.func.jvp(f, (theta,), (direction,))[1]
        except RuntimeError:  # layers without a forward-mode formula: LSTM, attention, weight norm
            pass
        # Two reverse passes. Fast implementations cannot always be differentiated twice, the plain ones can.
        wanted = torch.is_grad_enabled()
        plain_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with torch.inference_mode(False), plain_attention, torch.backends.cudnn.flags(enabled=False):
            return torch.autograd.functional.jvp(lambda *theta: f(dict(zip(direction, theta))), tuple(theta.values()),
                                                 tuple(direction.values()), create_graph=wanted)[1]


def check_deterministic(model):
    """Raise ValueError if f(x) would depend on chance or on the other examples of the batch: f_theta0 could
    not be fixed, and neither f^a nor the NTK would mean anything. (F.dropout by hand goes unseen here.)"""
    for name, m in model.named_modules():
        kind = type(m).__name__
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            bad = m.training or m.running_mean is None
        elif isinstance(m, (nn.MultiheadAttention, nn.RNNBase)):
            bad = m.training and m.dropout
        elif isinstance(m, nn.modules.dropout._DropoutNd) or "Drop" in kind or "Stochastic" in kind:
            # by name: torchvision's StochasticDepth and DropBlock2d, timm's DropPath and PatchDropout
            bad = m.training and getattr(m, "p", getattr(m, "drop_prob", 1))
        elif "FractionalMaxPool" in kind:
            bad = m._random_samples is None
        else:
            bad = m.training and kind in ("RReLU", "_SpectralNorm")
        if bad:
            raise ValueError(f"{name or 'the model'} ({kind}) is random or mixes the batch: it is in "
                             "training mode or has no fixed statistics; call model.eval() first")


# ---------------------------------------------------------------------------------------------------------------------
# 2  The optimizer
# ---------------------------------------------------------------------------------------------------------------------


def scaled_sgd(centered, lr, momentum=0.0):
    """torch.optim.SGD for f^a at learning rate lr / a^2 (paper, section 2).

    Why: the gradient of L(f^a) carries one factor a, and f^a turns a step of theta into a times as much; so
    at lr / a^2 the *outputs* move at a speed that does not depend on a. At a = inf the parameter is
    delta = a (theta - theta0) itself, and the two factors are already gone: plain lr.

    There is no weight decay: it would pull theta to 0, not to theta0.

    centered: what `center` returned. lr: number above 0. momentum: number in [0, 1).
    Raises ValueError: a network without `center`; lr or momentum out of range.
    """
    if not hasattr(centered, "model0"):
        raise ValueError("scaled_sgd takes what center(model, alpha) returned, and its alpha; "
                         f"{type(centered).__name__} has not been through center")
    if not 0 < lr < float("inf") or not 0 <= momentum < 1:
        raise ValueError(f"lr must be above 0 and momentum in [0, 1); got {lr} and {momentum}")
    alpha = centered.alpha
    scaled_lr = lr if alpha == float("inf") else lr / alpha**2
    parameters = [p for p in centered.parameters() if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)  # one pass over the memory, not three
    return torch.optim.SGD(parameters, lr=scaled_lr, momentum=momentum, fused=fused)


# ---------------------------------------------------------------------------------------------------------------------
# 3  The NTK and the linearity measures
# ---------------------------------------------------------------------------------------------------------------------


def empirical_ntk(model, x, y=None, memory=2**30):
    """K[i, c, j, e] = < d f_c(x_i) / d theta, d f_e(y_j) / d theta >, exact; theta: what requires gradients.

    Linear and ordinary Conv2d layers give their part of K without a Jacobian (ResNet18, 100 examples, 10
    outputs: 45 GB). K is then checked against backward passes of whole batches. If that fails (tied weights,
    rows that are no examples), each gradient is taken alone, and K is checked again.

    x (N, ...), y (M, ...) or None for y = x -> (N, C, M, C); an output of more dimensions is flattened.
    memory: bytes to stay near. Model and global random state are left as they were.

    >>> net = nn.Linear(1, 1)                       # f(x) = w x + b, so d f = (x, 1) and K(x, y) = x y + 1
    >>> empirical_ntk(net, torch.tensor([[2.], [3.]])).view(2, 2)
    tensor([[ 5.,  7.],
            [ 7., 10.]])

    Raises ValueError: an output that depends on chance or on the other examples, or is no float32 or float64
    tensor with a row an example; no example; no parameter that requires gradients.
    Needs: check_deterministic, true_float32, Jacobian.
    """
    check_deterministic(model)
    if len(x) == 0 or y is not None and len(y) == 0:
        raise ValueError("there is no example in x or in y")
    devices = [x.device] if x.is_cuda else []
    for structured in (True, False):
        try:
            same_random = torch.random.fork_rng(devices)
            with torch.inference_mode(False), torch.enable_grad(), same_random, true_float32():
                J = Jacobian(model, x, memory, structured)
                L = J if y is None else Jacobian(model, y, memory, structured)
                K = J.product(L)
                if J.confirms(K, L):
                    return K
            reason = "the outputs depend on chance or on the other examples of the batch"
        except Exception as error:  # whatever a pasted network stumbles over
            reason = str(error).split("\n")[0]
    raise ValueError(f"no tangent kernel: {reason}")


@contextlib.contextmanager
def true_float32():
    """float32 means float32 inside, not TF32 or bfloat16; afterwards what it meant before."""
    cuda, cudnn, cpu = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    units = [cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv]
    before = [unit.fp32_precision for unit in units]
    try:
        for unit in units:
            unit.fp32_precision = "ieee"
        yield
    finally:
        for unit, precision in zip(units, before):
            unit.fp32_precision = precision


class Jacobian:
    """J(x) = d f(x) / d theta, (N, C, P), of which no more is held than empirical_ntk needs at a time.

    With A the input of a Linear or Conv2d layer at its positions t, and G the gradient of an output in what
    it returns there, its part of J is sum_t G_t (x) A_t ("structured derivatives": Novak, Sohl-Dickstein,
    Schoenholz, ICML 2022). All other parameters: a backward pass for each example and output.
    """

    def __init__(self, model, x, memory, structured):
        self.model, self.x = model, x.detach()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter of the model requires gradients")
        self.layers = []
        for m in model.modules():
            plain_conv = type(m) is nn.Conv2d and m.groups == 1 and m.padding_mode == "zeros"
            trains = any(p.requires_grad for p in m.parameters())
            if structured and trains and (type(m) is nn.Linear or plain_conv):
                self.layers.append(m)
        f, calls = self.outputs(0, 2)
        self.layers = [m for m in self.layers if len(calls[m]) == 1 and len(calls[m][0][1]) == len(f)]
        covered = {id(p) for m in self.layers for p in m.parameters()}
        self.rest = [p for p in self.parameters if id(p) not in covered]
        self.C = f.shape[1]
        numbers = self.C * sum(p.numel() for p in self.rest)  # what `factors` returns for an example
        for m in self.layers:
            numbers += calls[m][0][1][0].numel() * (self.C + m.weight[0].numel() / len(m.weight))
        # Two blocks are held at a time, and a graph. Two examples at least: one alone cannot show that it
        # depends on others.
        self.block = max(2, int(memory / (3 * numbers * f.element_size())))

    def outputs(self, first, last):
        """f(x[first:last]) as (n, C), and {layer: [(its input, its output), one pair a call]}."""
        calls = {m: [] for m in self.layers}

        def hook(m, inputs, output):
            calls[m].append((inputs[0].detach(), output))
            return output.clone()  # an activation in place then leaves `output` as the layer made it

        handles = [m.register_forward_hook(hook, prepend=True) for m in self.layers]
        x = self.x[first:last].clone()  # copies of x and of the buffers: the network may change them
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        try:
            f = torch.func.functional_call(self.model, buffers, (x,))
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(f, torch.Tensor) or f.shape[:1] != x.shape[:1]:
            returned = tuple(f.shape) if isinstance(f, torch.Tensor) else type(f).__name__
            raise ValueError("the network must return one tensor with a row for each example; "
                             f"for {len(x)} it returned {returned}")
        if f.dtype not in (torch.float32, torch.float64) or not f.requires_grad:
            raise ValueError(f"the output ({f.dtype}) has no derivative in float32 or float64")
        return f.reshape(len(x), f[0].numel()), calls

    def factors(self, first):
        """[(A (n, T, d), G (n, C, T, O)), one pair a layer], for the block of examples from `first` on."""
        f, calls = self.outputs(first, first + self.block)
        gradients, pairs = [], []
        if self.layers:
            outputs = [calls[m][0][1] for m in self.layers]
            for f_c in f.sum(0):
                gradients.append(torch.autograd.grad(f_c, outputs, retain_graph=True, materialize_grads=True))
        for m, *G in zip(self.layers, *gradients):
            A, G = calls[m][0][0], torch.stack(G, 1)
            if isinstance(m, nn.Conv2d):
                padding = m._reversed_padding_repeated_twice  # as numbers, for padding="same" too
                A = F.unfold(F.pad(A, padding), m.kernel_size, m.dilation, 0, m.stride).transpose(1, 2)
                G = G.flatten(3).transpose(2, 3)
            A, G = A.reshape(len(f), -1, A.shape[-1]), G.reshape(len(f), self.C, -1, G.shape[-1])
            used = []
            if m.weight.requires_grad:
                used.append(A)
            if m.bias is not None and m.bias.requires_grad:  # the weight of an input that is always 1
                used.append(A.new_ones(*A.shape[:2], 1))
            pairs.append((torch.cat(used, 2), G))
        if self.rest:  # J itself, as a layer of one position whose input is 1
            rows = []
            for i in range(first, first + len(f)):
                for f_c in self.outputs(i, i + 1)[0][0]:
                    row = torch.autograd.grad(f_c, self.rest, retain_graph=True, materialize_grads=True)
                    rows.append(torch.cat([g.flatten() for g in row]))
            pairs.append((f.new_ones(len(f), 1, 1), torch.stack(rows).view(len(f), self.C, 1, -1)))
        return pairs

    def product(self, other):
        """J L^T, (N, C, M, C), for L = other, a block of examples against another; half of it if L is J."""
        symmetric = other is self
        for i in range(0, len(self.x), self.block):
            left = self.factors(i)
            if i == 0:
                K = left[0][1].new_zeros(len(self.x), self.C, len(other.x), self.C)
            for j in range(i if symmetric else 0, len(other.x), other.block):
                right = left if symmetric and i == j else other.factors(j)
                for (A, G), (B, H) in zip(left, right, strict=True):
                    K[i:i + self.block, :, j:j + other.block] += self.contract(A, G, B, H, right is left)
        if symmetric:
            upper = K.flatten(2).flatten(0, 1)
            K = (upper.triu() + upper.triu(1).T).view(K.shape)
        return K

    @staticmethod
    def contract(A, G, B, H, half):
        """K[i, c, j, e] = sum_ts (A_it . B_js) (G_ict . H_jes), (n, C, m, C): a layer's part of the kernel.

        As it stands, or as J L^T with J = sum_t G_t (x) A_t formed, whichever takes fewer multiplications.
        A (n, T, d), B (m, S, d), G (n, C, T, O), H (m, C, S, O). half: both are the same, j < i may stay 0.
        """
        (n, C, T, O), (m, _, S, _), d = G.shape, H.shape, A.shape[2]
        pairs, positions = (n * m / 2, n * T) if half else (n * m, n * T + m * S)
        K = G.new_zeros(n, C, m, C)
        as_it_stands = pairs * (T * S * d + C * T * S * O + C * C * T * O)
        formed = positions * C * O * d + pairs * C * C * O * d
        if as_it_stands < formed:
            for i in range(n):  # an example at a time: nothing of size n m T S is ever held
                first = i if half else 0
                inputs = torch.einsum("td,jsd->jts", A[i], B[first:])
                weighted = inputs[:, None] @ H[first:]  # (m - first, C, T, O)
                K[i, :, first:] = (G[i].flatten(1) @ weighted.flatten(2).flatten(0, 1).T).view(C, -1, C)
            return K
        width = max(1, 2**26 // ((n + m) * C * d))  # output channels at a time: J of 256 MB in float32
        step = -(-n // 8) if half else n
        for G_part, H_part in zip(G.split(width, 3), H.split(width, 3)):
            J = torch.einsum("icto,itd->icod", G_part, A).flatten(2)
            L = J if half else torch.einsum("jcto,jtd->jcod", H_part, B).flatten(2)
            for i in range(0, n, step):
                first = i if half else 0
                part = J[i:i + step].flatten(0, 1) @ L[first:].flatten(0, 1).T
                K[i:i + step, :, first:] += part.view(-1, C, m - first, C)
        return K

    def pull_back(self, u):
        """J^T u[k] for each u[k] (N, C), each a list of tensors, one a parameter: a backward pass a block."""
        pulled = []
        for first in range(0, len(self.x), self.block):
            f, _ = self.outputs(first, first + self.block)
            for k in range(len(u)):
                gradients = torch.autograd.grad(f, self.parameters, u[k, first:first + self.block],
                                                retain_graph=True, materialize_grads=True)
                if first == 0:
                    pulled.append(gradients)
                else:
                    pulled[k] = [total + g for total, g in zip(pulled[k], gradients)]
        return pulled

    def confirms(self, K, other):
        """Whether u^T K v = < J^T u, L^T v > within rounding, for each pair of four random u and four v.

        Rounding is that of a typical |J^T u| |L^T v|, about trace K. An error of K shows in one of the pairs
        unless all u, or all v, are nearly orthogonal to it. For y = x, the same four serve as u and v.
        """
        generator = torch.Generator().manual_seed(0)  # of its own
        u = torch.randn(4, *K.shape[:2], generator=generator, dtype=torch.float64).to(K)
        pulled, v = self.pull_back(u), u
        if other is not self:
            v = torch.randn(4, *K.shape[2:], generator=generator, dtype=torch.float64).to(K)
            pulled += other.pull_back(v)
        inner = 0
        for gradients in zip(*pulled):  # a parameter at a time, in pieces: no float64 copy of the whole
            for pieces in zip(*[g.flatten().split(2**15) for g in gradients]):
                piece = torch.stack(pieces).double()
                inner = inner + piece @ piece.T
        expected, squares = inner[:4, -4:], inner.diagonal()
        found = torch.einsum("aic,icje,bje->ab", u.double(), K.double(), v.double())
        if not expected.isfinite().all():
            return not found.isfinite().all()  # a network that has diverged: its kernel is not finite either
        tolerance = 1e-10 if K.dtype == torch.float64 else 2e-5
        scale = (squares[:4].mean() * squares[-4:].mean()).sqrt()
        return bool((found - expected).abs().max() <= tolerance * scale)


def kernel_alignment(K, K0, centered=False):
    """KA(K, K0) = Tr[K K0] / (|K|_F |K0|_F), in [0, 1] for kernels; 1 if proportional (paper, section 3).

    K, K0: both (N, N) or both (N, C, N, C). centered=True: H K H with H = I - 1 1^T / n over the n = N C rows
    (CKA: Cortes, Mohri, Rostamizadeh 2012; Kornblith et al. 2019). Returns a float, nan if a kernel is 0.
    Raises ValueError: shapes that are not square or differ.
    """
    rows = K.shape[0] * (K.shape[1] if K.dim() == 4 else 1)
    if K.shape != K0.shape or K.numel() != rows**2 or rows == 0:
        raise ValueError("need two kernels (N, N) or (N, C, N, C) of one shape, got "
                         f"{tuple(K.shape)} and {tuple(K0.shape)}")
    kernels = []
    for k in (K, K0):
        k = k.reshape(rows, rows).double()
        k = k / k.abs().max()  # no scale: the square of 1e-200 would be 0
        if centered:
            k = k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()
        kernels.append(k / k.norm())
    return (kernels[0] * kernels[1]).sum().item()  # Tr[K K0] of symmetric kernels, without the product


def target_alignment(K, y, centered=True):
    """Alignment of a kernel with the labels' own kernel Y Y^T (Baratin et al., AISTATS 2021).

    K (N, N) with Y (N, C) the one-hot labels; or K (N, C, N, C) with Y flattened to N C rows, the direction
    in which the loss pulls all outputs at once. y: class indices (N,), or targets (N,) or (N, C): one-hot,
    -1 and 1, real. Returns a float.
    Raises ValueError: as kernel_alignment; labels that do not fit K.
    Needs: kernel_alignment.
    """
    classes, Y = K.shape[1] if K.dim() == 4 else None, y.double()
    if y.dim() == 1 and not y.is_floating_point() and (Y >= 0).all():  # class indices
        if classes == 1:
            Y = 2 * Y - 1  # one output stands for two classes, as -1 and 1
        else:
            Y = F.one_hot(y.long()).double()
            Y = F.pad(Y, (0, max(0, (classes or 0) - Y.shape[1])))  # classes that no label has
    if classes is None:
        return kernel_alignment(K, Y.reshape(len(y), -1) @ Y.reshape(len(y), -1).T, centered)
    return kernel_alignment(K.flatten(2).flatten(0, 1), Y.reshape(-1, 1) @ Y.reshape(1, -1), centered)


@torch.no_grad()
def relu_signs(model, x):
    """Which ReLUs are active: x (N, ...) -> bool (N, units), for every call of every nn.ReLU, as they run.

    Raises ValueError: a network without nn.ReLU modules (F.relu cannot be seen from outside).
    """
    signs = []
    handles = [m.register_forward_hook(lambda m, args, out: signs.append((out > 0).flatten(1)))
               for m in model.modules() if isinstance(m, nn.ReLU)]
    try:
        model(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    if not signs:
        raise ValueError("the network calls no nn.ReLU module")
    return torch.cat(signs, 1)


def sign_similarity(s, s0):
    """Share of ReLU units, over examples and units, active in both or in neither (paper, sec. 3). A float."""
    return (s == s0).double().mean().item()


@torch.no_grad()
def representation(model, x):
    """What the last nn.Linear receives: x (N, ...) -> (N, d). Raises ValueError if none is called."""
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    seen = []
    handles = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone())) for m in last]
    try:
        model(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("the network calls no nn.Linear module: no last layer whose input could be taken")
    return seen[-1].flatten(1)


def representation_alignment(R, R0, gram=False):
    """Alignment of two representations (N, d) of the same N examples, uncentred. A float.

    The paper's text speaks of the (N, N) kernels R R^T (gram=True); its published code, and so its figures,
    align the (d, d) matrices R^T R (default). The numbers differ: both are offered under their names.
    Raises ValueError: shapes differ.
    Needs: kernel_alignment.
    """
    return kernel_alignment(R @ R.T, R0 @ R0.T) if gram else kernel_alignment(R.T @ R, R0.T @ R0)


@torch.no_grad()
def linearisation_error(centered, x):
    """|f^a(x) - a grad f_theta0(x) . (theta - theta0)| / |f^a(x)|: how far from its linearisation.

    centered: a CenteredModel (a LinearizedModel is its own: 0). x (N, ...). Returns a float, nan at theta0.
    Needs: LinearizedModel, check_deterministic.
    """
    if centered.alpha == float("inf"):
        return 0.0
    theta0 = dict(centered.model0.named_parameters())
    moved = {name: p - theta0[name] for name, p in centered.model.named_parameters()}
    slope = LinearizedModel.derivative(centered.model0, x, moved)
    fa = centered(x)
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
    """torchvision's ResNet18 layout, batch norm removed and a bias on every convolution: the paper's CIFAR network.

    He-normal (fan-out) convolutions, torch's default biases and last layer; 11.18 M parameters at width 64, 10 classes.
    """
    # What this network is on 32 x 32 images: the stem leaves 8 x 8 positions, layer2 4 x 4, layer3 2 x 2, and layer4
    # works on a single one. There a 3 x 3 convolution sees padding on all sides but its centre, so 8 of its 9 taps
    # (5 of 9 in the first) never receive a gradient: 6.95 M of the 11.18 M parameters cannot move.

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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(self.relu(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


resnet18 = ResNet18  # as torchvision calls it


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
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        torch.default_generator.manual_seed(generator(what, seed).initial_seed())
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


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
    """Add the training pixels' own mean and standard deviation per channel, of pixels in [0, 1], if it has none."""
    if "mean" in images and "std" in images:
        return images
    mean, std, value = [], [], np.arange(256) / 255
    for channel in np.moveaxis(images["x_train"], 3, 0):
        share = np.bincount(channel.ravel(), minlength=256) / channel.size  # of each of the 256 values
        mean.append(share @ value)
        std.append(max(share @ (value - mean[-1])**2, 1e-6)**.5)
    return {**images, "mean": mean, "std": std}


def cifar10(data_dir):
    """The paper's split: the first 40,000 CIFAR-10 training images train, the last 10,000 *training* images test."""
    import torchvision
    source = torchvision.datasets.CIFAR10
    with fetching("CIFAR-10", source.url, source.filename, os.path.abspath(data_dir)):
        train = source(data_dir, train=True, download=True)
    x, y = train.data, np.array(train.targets)
    return {"x_train": x[:40000], "y_train": y[:40000], "x_test": x[40000:], "y_test": y[40000:],
            "mean": [.4914, .4822, .4465], "std": [.2023, .1994, .2010]}


@contextlib.contextmanager
def fetching(what, address, files, folder, instead=""):
    """Around a download: what fails in it becomes one line with the address, the reason and the ways out."""
    try:
        yield
    except Exception as error:  # no network, a quota, a wrong checksum, damaged bytes raise nearly anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise OSError(f"{what} could not be had from {address} ({reason}). Put {files} into {folder} by "
                      f"hand, over what is there, or try {instead}--dataset synthetic (offline)") from None


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
    """The arrays of a FILE.npz (see load_images) as their types; ValueError says which is wrong."""
    def need(good, text):
        if not good:
            raise ValueError(f"{path}: {text}")

    checked = {}
    for split in ("train", "test"):
        x, y = images.get(f"x_{split}"), images.get(f"y_{split}")
        need(x is not None and y is not None,
             f"needs arrays x_{split} and y_{split} (has: {', '.join(images)}); see 'Your own data' in README.md")
        need(x.dtype == np.uint8 and x.ndim in (3, 4) and x.size > 0,
             f"x_{split} must be uint8 (N, H, W, C) or (N, H, W) and not empty; it is {x.dtype} {x.shape}")
        need(y.dtype.kind in "iu" and y.shape == x.shape[:1],
             f"y_{split} must be integers, one for each image of x_{split} {x.shape}; it is {y.dtype} {y.shape}")
        checked[f"x_{split}"] = x.reshape(*x.shape[:3], -1)  # (N, H, W) has one channel
        checked[f"y_{split}"] = y.astype(np.int64)
    x, y = checked["x_train"], checked["y_train"]
    need(x.shape[1:] == checked["x_test"].shape[1:], f"images of x_train are {x.shape[1:]}, those of x_test differ")
    classes = len(np.unique(y))
    need(classes > 1 and y.min() == 0 and y.max() == classes - 1,
         f"y_train must run from 0 to the number of classes - 1, each present; it has {y.min()} to {y.max()}, "
         f"{classes} different")
    need(0 <= checked["y_test"].min() and checked["y_test"].max() < classes,
         f"y_test has a label outside 0 to {classes - 1}, the labels of y_train")
    if x.shape[3] not in (1, 3, 4):
        print(f"warning: {path}: images have {x.shape[3]} channels; the channels come last")
    need(("mean" in images) == ("std" in images), "has one of mean and std; they come together")
    for name in images.keys() & {"score_train", "score_test", "attribute_train", "attribute_test", "mean", "std"}:
        values, what = images[name], name.split("_")[0]
        wanted = {"attribute": "0 or 1", "std": "numbers above 0"}.get(what, "finite numbers")
        count = x.shape[3] if what in ("mean", "std") else len(checked[name.replace(what, "y")])
        good = values.dtype.kind in "biuf" and values.shape == (count,) and np.isfinite(values).all()
        if good and what == "attribute":
            good = np.isin(values, (0, 1)).all()
        if good and what == "std":
            good = (values > 0).all()
        need(good, f"{name} must be {wanted}, {count} of them; it is {values.dtype} {values.shape}")
        checked[name] = values.astype(np.int64 if what == "attribute" else np.float64)
        if what in ("mean", "std"):
            checked[name] = checked[name].tolist()
    return checked


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

    def smooth_patterns(n):
        return np.einsum("kwc,whv->khvc", rng.normal(size=(n, 16, 3)), waves) / 4  # (n, size, size, 3)

    pattern = smooth_patterns(classes)
    images = {}
    for split, n in (("train", n_train), ("test", n_test)):
        y = rng.permutation(np.arange(n) % classes)
        d = rng.uniform(0, .9, (n, 1, 1, 1))
        x = (1 - d) * pattern[y] + d * smooth_patterns(n) + 1.4 * rng.normal(size=(n, size, size, 3))
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
    if f0 is None:
        return torch.cat([f(part) for part in x.split(block)])
    return torch.cat([f(part, part0) for part, part0 in zip(x.split(block), f0.split(block))])


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
        self.folder = run_folder(o, folder_of(o, f.alpha, seed), images, f.model0.parameters())
        if o.momentum:
            for p in list(self.tensors):  # a first momentum of 0 gives the same first step as none
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
                self.tensors.append(optimizer.state[p]["momentum_buffer"])
        if (self.folder / "checkpoint.pt").exists():
            self.load()
        else:
            refuse_without_checkpoint(self.folder)

    def minibatches(self, probe):
        """Yield the indices of minibatch after minibatch; probe() returns the script's part of a record, with
        mean_train_loss. The order of an epoch depends on (seed, epoch) alone."""
        o, due = self.o, schedule(self.steps_an_epoch, self.total)
        if finished(self.records, o):
            return
        if not self.records:
            self.save()
        progress, saved = Progress(self.folder.name, self.total), time.monotonic()
        begin, shuffled = time.monotonic() - self.seconds, None
        while True:
            self.seconds = time.monotonic() - begin
            if self.iteration in due or self.iteration >= self.total:
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
            loss = self.records[-1]["mean_train_loss"]
            progress.status(self.iteration, f"iteration {self.iteration}  loss {loss:.4f}")
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
        elif self.iteration >= self.total:
            ended = "epochs"
        elif len(recent) == 5 and np.mean(recent) < self.o.stop_loss:
            ended = "stop-loss"
        if ended != "diverged" and (ended or len(self.records) % 5 == 0):
            record.update(self.linearity())
            batch = torch.arange(self.o.batch_size, device=self.o.device)
            record["update_noise"] = update_noise(self.optimizer, lambda: self.step(batch))
        if ended:
            record["ended"] = ended
        self.records.append(json.loads(json_line(record)))
        with naming_out(self.folder), open(self.folder / "log.jsonl", "ab") as log:
            log.write(json_line(record))
        shown = [f"{key} {record[key]:>7.4f}" for key in ("mean_train_loss", "test_loss", "test_acc") if key in record]
        where = f"iteration {self.iteration:>7}  epoch {record['epoch']:>7.2f}"
        progress.status(self.iteration, "  ".join([where, *shown]), probe=True)
        if ended == "diverged":
            progress.line(f"diverged at iteration {self.iteration} (its loss is no finite number): try a smaller --lr")

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
            raise ValueError(f"{path} cannot be read ({first_line(e)[:100]}): choose another --out, or delete the "
                             f"folder {self.folder}") from None
        if not finished(self.records, self.o):  # what was probed here is probed again, if it is on the schedule
            self.records = [record for record in self.records if record["iteration"] < self.iteration]
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
        model = getattr(f, "model", None)
        if model is None:  # a = inf keeps theta0 alone, frozen
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
    """One status line on a terminal; into a file or pipe an aligned line a probe."""

    quiet = False  # in a child of --jobs, whose parent has the status line

    def __init__(self, name, total):
        self.name, self.total, self.first, self.terminal = name, total, None, sys.stdout.isatty()
        self.begin = self.shown = time.monotonic()

    def status(self, done, text, probe=False):
        """Say how far it is: on a terminal five times a second, elsewhere only of a probe."""
        now = time.monotonic()
        if self.first is None:
            self.first = done  # a run that goes on does not begin at 0
        if self.terminal:
            probe = not self.quiet and now - self.shown >= .2
        if not probe:
            return
        left, self.shown = "", now
        if done > self.first:  # at most, since a run may end before its last iteration
            seconds = int((now - self.begin) / (done - self.first) * (self.total - done))
            left = f"at most {datetime.timedelta(seconds=seconds)} left"
        if self.terminal:
            print(f"\r{self.name}  {text}  {left} \033[K", end="", flush=True)
        else:
            print(f"{self.name:<18} {text}  {left}", flush=True)

    def line(self, text):
        if self.terminal:
            print("\r\033[K", end="")
        print(f"{self.name}: {text}", flush=True)


# What a run is, and its files.


def identity(o, images):
    """What a run is ("run": script, options that are part of it, data) and what is good to know beside it."""
    run = {"script": o.script, **{name: getattr(o, name) for name in o.part_of_run}, "dtype": str(o.dtype)[6:],
           "data_crc32": crc32([np.asarray(v) for _, v in sorted(images.items()) if isinstance(v, (list, np.ndarray))])}
    return {"run": run, "script_crc32": o.script_crc32, "dataset": os.path.basename(str(getattr(o, "dataset", ""))),
            "torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0],
            # toy.py writes this before side_by_side sets its one thread.
            "device": str(o.device), "threads": 1 if o.script == "toy" else torch.get_num_threads()}


def run_folder(o, folder, images, theta0):
    """The folder of one run, made and marked by its args.json. ValueError: it holds another run, or one of the same
    seed began at another theta0."""
    args = {"folder": folder.name, **identity(o, images)}
    args["run"]["theta0_crc32"] = crc32(theta0)
    seed = folder.name.partition("_")[2]  # toy.py's folders hold all seeds
    for path in sorted(folder.parent.glob(f"alpha=*{seed}/args.json")):
        compare(read_args(path.parent), args["run"], path.parent)
    with naming_out(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if (folder / "log.jsonl").exists():
        read_args(folder)  # refused if it is missing
    if not (folder / "args.json").exists():
        write_atomically(folder / "args.json", json_line(args))
    return folder


def refuse_without_checkpoint(folder):
    """ValueError if a folder has records but not the checkpoint to go on from: they would be overwritten."""
    if read_log(folder) and not zipfile.is_zipfile(folder / "checkpoint.pt"):
        raise ValueError(f"{folder} has records of an unfinished run but not its checkpoint, or a damaged one, so it "
                         "cannot go on: choose another --out, or delete that folder")


def check_folder(o, images):
    """Compare what would be trained with every run in --out, and read its records, since all will be drawn.
    ValueError: one is another run, or damaged; warning: one is by another text of the script."""
    args, others = identity(o, images), []
    for folder in sorted(pathlib.Path(o.out).glob("alpha=*")):
        if (folder / "args.json").exists() or (folder / "log.jsonl").exists():
            there = read_args(folder)
            compare(there, args["run"], folder)
            read_log(folder, needed=())
            if there.get("script_crc32") != args["script_crc32"]:
                others.append(folder.name)
    if others:
        print(f"warning: {len(others)} run(s) in {o.out} are by another text of {o.script}.py: {' '.join(others)[:60]}")


def compare(there, run, folder):
    """ValueError if the run that a folder holds is another than `run`, naming the first difference."""
    for key, value in run.items():
        if there["run"].get(key) != value:
            raise ValueError(f"{folder} holds a run with {key} = {there['run'].get(key)}, not {value}: choose another "
                             "--out, or delete that folder")


def damaged(path):
    return ValueError(f"{path} is missing or damaged: choose another --out, or delete the folder {path.parent}")


def read_args(folder):
    """A run folder's args.json as a dict. ValueError: missing, damaged, or of a folder of another name."""
    try:
        args = json.loads((folder / "args.json").read_text())
        if args["folder"] != folder.name or not isinstance(args["run"], dict):
            raise ValueError
        return args
    except (OSError, ValueError, KeyError, TypeError):
        raise damaged(folder / "args.json") from None


def read_log(folder, needed=("iteration", "epoch", "mean_train_loss")):
    """The records of a folder's log.jsonl, each with what is `needed` and a number or null for all but `ended`; a
    half-written last line is left out. ValueError: it is damaged."""
    path, records = folder / "log.jsonl", []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            good = set(needed) <= set(record) and all(
                isinstance(value, (int, float, type(None))) for key, value in record.items() if key != "ended")
        except (ValueError, TypeError, AttributeError):
            good = False
        if not good or None in (record.get("iteration", 0), record.get("epoch", 0)):
            raise damaged(path)
        records.append(record)
    return records


def read_runs(folder):
    """The records of every run in a folder, {alpha: {seed: [record, ...]}}, ascending; for notebooks, too.
    ValueError: there are none, one is damaged, or they differ in more than alpha and seed."""
    runs, first, theta0 = {}, None, {}
    for path in sorted(pathlib.Path(folder).glob("alpha=*_seed=*/log.jsonl")):
        records, args = read_log(path.parent), read_args(path.parent)
        first = first or args
        alpha, seed = path.parent.name.removeprefix("alpha=").split("_seed=")
        start = theta0.setdefault(seed, args["run"].get("theta0_crc32"))  # one for a seed, under every alpha
        compare(args, {**first["run"], "theta0_crc32": start}, path.parent)
        for record in records:
            if set(records[0]) - set(record) - {*LINEARITY, "ended"}:
                raise damaged(path)
        if records:
            runs.setdefault(float(alpha), {})[int(seed)] = records
    if not runs:
        raise ValueError(f"{folder}: there are no records of runs (--out)")
    return {alpha: dict(sorted(runs[alpha].items())) for alpha in sorted(runs)}


def json_line(entry):
    """Strict JSON, a line: numbers that are not finite become null."""
    finite = json.loads(json.dumps(entry), parse_constant=lambda name: None)  # name: NaN, Infinity or -Infinity
    return (json.dumps(finite, allow_nan=False) + "\n").encode()


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


LINEARITY = ("sign_similarity", "repr_alignment", "repr_alignment_gram", "ntk_alignment", "target_alignment",
             "linearisation_error", "update_noise")


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

    Left out: the record at the end of the epochs, which is not on the schedule, and all from a loss that is not finite
    on."""
    finite = []
    for record in records:
        if record["mean_train_loss"] is None:
            break
        if record.get("ended") != "epochs":
            finite.append(record)
    columns = {}
    for key in records[0]:
        if key not in LINEARITY and key != "ended":
            columns[key] = smooth([r[key] for r in finite])  # numpy makes nan of None
    for key in ("iteration", "epoch", *LINEARITY):
        columns[key] = np.array([r.get(key) for r in finite[:-2]], float)
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
    # Where b was measured later, a jittering loss may be above the level again: its lowest value up to there counts.
    lowest = max(loss[passed[0]:b + 1].min(), 1e-300)
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
    """The .975 quantile of Student's t, from a table; beyond it 1.96 + 2.4 / freedom, right to .006."""
    table = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
             2.120, 2.110, 2.101, 2.093, 2.086]
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.4 / freedom


def loss_levels(runs, more=()):
    """.9, .8, ... .1 times L0, the paper's 1.0 and .5, and more, as far as they lie below L0; highest first. L0 is the
    mean training loss at the start, as the first record at the smallest alpha has it: ln C for cross-entropy."""
    smallest = runs[min(runs)]
    start = float(f"{smallest[min(smallest)][0]['mean_train_loss'] or 0:.3g}")  # null if it is not finite
    levels = {1.0, .5, *more}
    for k in range(1, 10):
        levels.add(k / 10 * start)
    return sorted({float(f"{level:.3g}") for level in levels if level < start}, reverse=True)


def summarise(runs, quantities, levels, on="mean_train_loss"):
    """What quantities(curve) -> {name: array} and the linearity measures are where the loss `on` passes each level:
    per alpha over seeds, and, since a seed fixes everything but alpha, paired by seed between alphas.

    Returns {"alphas": {"1": {"levels": {"1.6": {name: {"mean", "std", "n"}}}}}, "paired": {"1 - 100": {"levels":
    {"1.6": {name: {..., "interval"}}}}}}; a level that no run passes is absent.
    """
    def read(records):
        columns, rows = curve(records), {}
        arrays = {**quantities(columns), **{key: columns[key] for key in LINEARITY}}
        for level in levels:
            rows[f"{level:.3g}"] = {name: value_at(level, columns[on], array) for name, array in arrays.items()}
        return rows

    return over_seeds(runs, read)


def over_seeds(runs, read):
    """What read(records) -> {level: {name: number or None}} finds, per alpha over seeds and paired by seed."""
    found, summary = {}, {"alphas": {}, "paired": {}}
    for alpha, seeds in runs.items():
        found[alpha] = {seed: read(records) for seed, records in seeds.items()}
        summary["alphas"][f"{alpha:g}"] = {"levels": table(list(found[alpha].values()))}
    for a, b in itertools.combinations(runs, 2):
        differences = [subtract(found[a][seed], found[b][seed]) for seed in runs[a] if seed in runs[b]]
        summary["paired"][f"{a:g} - {b:g}"] = {"levels": table(differences, interval=True)}
    return summary


def table(cells, interval=False):
    """The spread over a list of {level: {name: number or None}}: {level: {name: spread}}, without what is empty."""
    rows = {}
    for level in cells[0] if cells else ():
        row = {name: spread([cell[level][name] for cell in cells], interval) for name in cells[0][level]}
        row = {name: value for name, value in row.items() if value}
        if row:
            rows[level] = row
    return rows


def subtract(one, other):
    """The differences of two {level: {name: number or None}}."""
    rows = {}
    for level, row in one.items():
        rows[level] = {name: minus(value, other[level][name]) for name, value in row.items()}
    return rows


def minus(a, b):
    return None if a is None or b is None else a - b


def sentence(runs, summary, name, opening, larger, smaller):
    """The conclusion: `name` at the smallest and the largest alpha, at the lowest level that every run has, and what
    their paired difference says: `larger` where its interval lies above 0, `smaller` where below."""
    a, b, level = f"{min(runs):g}", f"{max(runs):g}", None
    if a == b:
        return "One alpha is no comparison: --alpha 1 100 makes one."
    for lower in summary["alphas"][a]["levels"]:  # highest first
        rows = [summary["alphas"][f"{alpha:g}"]["levels"].get(lower, {}) for alpha in runs]
        if all(name in row and row[name]["n"] == len(seeds) for row, seeds in zip(rows, runs.values())):
            level = lower
    if level is None:
        return "No loss level was passed by every run yet: nothing is concluded."
    rich, lazy = (summary["alphas"][alpha]["levels"][level][name]["mean"] for alpha in (a, b))
    difference = summary["paired"][f"{a} - {b}"]["levels"].get(level, {}).get(name, {})
    text = f"{opening.format(level=level)} {rich:.3f} at alpha = {a} and {lazy:.3f} at alpha = {b}"
    if "interval" not in difference:
        return f"{text}; an interval takes three seeds of both: nothing is concluded."
    low, high = difference["interval"]
    verdict = "these runs do not show a difference"
    if low > 0:
        verdict = larger
    if high < 0:
        verdict = smaller
    return f"{text}, paired difference {cell(difference)}: {verdict}."


def print_table(title, rows, columns):
    """Print rows {label: {column: what spread returned}} under a title: mean +- std (n), or mean [interval] (n)."""
    print(f"\n{title}")
    if not rows:
        print("  no level is reached yet")
        return
    wide = max(8, *map(len, rows))
    print(" " * wide + "".join(f"{column:>30}" for column in columns))
    for label, row in rows.items():
        print(f"{label:>{wide}}" + "".join(f"{cell(row.get(column)):>30}" for column in columns))


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
    end = rows.pop("end", None)
    rows = dict(sorted(rows.items(), key=lambda row: -float(row[0])))
    print_table(title, {**rows, "end": end} if end else rows, columns)


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
    return known[alpha] if alpha in known else colormaps["viridis"](.45 + .45 * math.tanh(math.log10(alpha) / 3))


def alpha_label(alpha):
    return r"$\alpha = \infty$" if alpha == math.inf else rf"$\alpha = {alpha:g}$"


def draw_band(ax, seeds, x, y, read=value_at, **style):
    """Draw the smoothed y against the smoothed x for the runs {seed: records} of one alpha: one run as its curve, its
    single probes faint behind it; several as mean and range, read at equal x as the tables are."""
    curves = []
    for records in seeds.values():
        columns = curve(records)
        if len(columns[x]) > 1:
            curves.append(columns)
            drawn = records
    if len(curves) == 1:
        measured = np.isfinite(curves[0][y])
        ax.plot(curves[0][x][measured], curves[0][y][measured], **style)
        if y not in LINEARITY:
            probes = [(r[x], r[y]) for r in drawn if None not in (r[x], r[y])]
            ax.plot(*np.array(probes).T, ".", color=style["color"], markersize=2, alpha=.3)
    if len(curves) > 1:
        low, high = max(c[x].min() for c in curves), min(c[x].max() for c in curves)
        levels, band = np.linspace(low, high, 120)[1:-1], []
        if x == "iteration":  # on a logarithmic axis: where the probes are
            levels = curves[0][x][(curves[0][x] >= low) & (curves[0][x] <= high)]
        for level in levels:
            values = [read(level, columns[x], columns[y]) for columns in curves]
            if None not in values:
                band.append((level, np.mean(values), min(values), max(values)))
        middle, mean, least, most = np.array(band).reshape(-1, 4).T
        ax.plot(middle, mean, **style)
        ax.fill_between(middle, least, most, color=style["color"], alpha=.18, linewidth=0)


def draw_linearity(similarity, error, runs, x):
    """Two panels against x: the similarities to initialisation on [0, 1], and how far f^a is from its linearisation."""
    styles = {"sign_similarity": "-", "repr_alignment": "--", "ntk_alignment": ":"}
    for alpha, seeds in runs.items():
        for key, style in styles.items():
            draw_band(similarity, seeds, x, key, color=colour(alpha), linestyle=style)
        draw_band(error, seeds, x, "linearisation_error", color=colour(alpha))
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
    "alpha": ("what to run", [1.0, 100.0], "above 0, at most inf", "of f^a = a (f - f0); 1: rich, 100: lazy"),
    "seeds": ("what to run", [0], "at least 0, below 2147483648", "one run an alpha and seed"),
    "dataset": ("what to run", "cifar10", None, "cifar10, synthetic, or a file FILE.npz (see README.md)"),
    "epochs": ("what to run", 2500, "at least 1", "at most so many passes over the training set"),
    "stop_loss": ("what to run", .01, "at least 0", "end a run whose mean training loss, over five probes, is below"),
    "device": ("what to run", "auto", None, "auto, cpu, cuda, cuda:1"),
    "jobs": ("what to run", 1, "at least 0", "runs side by side; 0, the command line's default: one a core, or a GPU"),
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


def options(script, table, quick, given, file):
    """One call's options as a namespace: defaults, then --quick's preset, then what is given (words or Python values).

    script: its name; file: its path; table: its own options; quick: the preset. Raises ValueError, one line, for
    whatever is wrong with them.
    """
    table = merged(table)
    chosen = {name: default for name, (_, default, _, _) in table.items()}
    chosen["out"] = f"runs/{script}"
    if given.get("quick"):
        chosen.update(quick, out=f"runs/{script}_quick")
    for name, value in given.items():
        if name not in table:
            raise ValueError(f"there is no option {name}: {near(name, table)}")
        if value is not None:
            chosen[name] = value
    o = types.SimpleNamespace(script=script, script_crc32=zlib.crc32(pathlib.Path(file).read_bytes()))
    for name, (_, default, bounds, _) in table.items():
        setattr(o, name, checked(flag(name), chosen[name], default, bounds))
    o.part_of_run = [name for name in table if table[name][0] in ("training", "looking")]
    o.alpha = sorted(o.alpha)
    for alpha in o.alpha:
        if float(f"{alpha:g}") != alpha:
            raise ValueError(f"--alpha {alpha}: at most six digits, since folders are named by it")
    o.device, o.dtype = device_named(o.device), getattr(torch, o.dtype)
    return o


def merged(table):
    """The shared options with a script's own; those that it names None are left out."""
    return {name: row for name, row in {**SHARED, **table}.items() if row is not None}


def flag(name):
    return "--" + name.replace("_", "-")


def checked(flag, value, default, bounds):
    """The value of an option, a word or a Python value, as the type of its default; ValueError if it is none."""
    if value is default and isinstance(default, type):
        return None
    if isinstance(default, list):
        one = default[0] if default else 1.0
        several = value if isinstance(value, (list, tuple, range, np.ndarray)) else [value]
        if len(several) == 0 and default:
            raise ValueError(f"{flag} needs a value")
        return list(dict.fromkeys(checked(flag, each, one, bounds) for each in several))
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{flag} must be True or False, not {value}")
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
    holds = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
    if number == math.inf and "inf" not in bounds:
        return False
    for bound in bounds.split(", "):
        word, limit = bound.rsplit(" ", 1)
        if not holds[word](number, float(limit)):  # nan holds nowhere
            return False
    return True


def near(word, names):
    """What to say of a word that is none of `names`: the nearest of them, or all."""
    close = difflib.get_close_matches(str(word), list(names), 1)
    return f"did you mean {close[0]}?" if close else "choose one of " + ", ".join(names)


def device_named(name):
    """auto, cpu, cuda or cuda:N as a torch.device; under torchrun auto is LOCAL_RANK's. Does not start CUDA."""
    count = torch.cuda.device_count()
    there = ["cpu"]  # no mps: the measures need float64
    if count:
        there += ["cuda"] + [f"cuda:{k}" for k in range(count)]
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if count else "cpu"
    if name not in there:
        raise ValueError(f"--device {name}: here there are auto, {', '.join(there)}")
    return torch.device(name)


def sweep(o, load, run, conclude, draw):
    """Train what --out does not hold yet, run(alpha, seed, load(o), o) for each pair; then conclude(o, runs) and
    draw(o, runs) from every run that is there. Returns the summary. Under torchrun each process takes its share of the
    pairs, and whoever finds every run ended concludes."""
    if not o.draw_only:
        pairs = [(alpha, seed) for seed in o.seeds for alpha in o.alpha]
        images = load(o)
        check_folder(o, images)
        missing = [pair for pair in share_of_rank(pairs) if not finished(read_log(folder_of(o, *pair)), o)]
        for pair in missing:
            refuse_without_checkpoint(folder_of(o, *pair))
        mine = images if jobs_of(o, missing) == 1 else None  # a child of --jobs loads its own
        work = functools.partial(run_here, load, run, mine, o)
        progress = Progress("sweep", o.epochs * len(missing))
        for _ in side_by_side(o, work, missing, lambda: watch(o, missing, progress)):
            pass
        if not all(finished(read_log(folder_of(o, *pair)), o) for pair in pairs):
            return {}  # another process is at work on them, and will conclude
    runs = read_runs(o.out)
    there = read_args(sorted(pathlib.Path(o.out).glob("alpha=*_seed=*/log.jsonl"))[0].parent)
    compare(there, {"script": o.script}, o.out)
    o.dataset = there["dataset"]
    del there["run"]["theta0_crc32"]  # a seed's own
    summary = conclude(o, runs)
    summary["options"] = {"script": o.script, "dataset": o.dataset, "levels": o.levels, **there["run"]}
    summary["diverged"] = []
    for alpha, seeds in runs.items():
        diverged = [seed for seed, records in seeds.items() if records[-1].get("ended") == "diverged"]
        summary["diverged"] += [f"alpha={alpha:g}_seed={seed}" for seed in diverged]
    write_atomically(pathlib.Path(o.out) / "summary.json", json_line(summary))
    draw(o, runs)
    print(f"\nwrote {o.out}/summary.json and the pictures beside it\n\n{summary['conclusion']}")
    return json.loads(json_line(summary))


def share_of_rank(tasks):
    """This process's share of the tasks: all, or under torchrun every WORLD_SIZE-th."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank >= len(tasks):
        print(f"rank {rank} of {world}: there is no run for this process")
    return tasks[rank::world]


def folder_of(o, alpha, seed):
    return pathlib.Path(o.out) / f"alpha={alpha:g}_seed={seed}"


def run_here(load, run, images, o, alpha, seed):
    """One run in this process; a child of --jobs gets images as None and loads its own, once."""
    if images is None:
        run_here.images = images = getattr(run_here, "images", None) or load(o)
    run(alpha, seed, images, o)


def watch(o, pairs, progress):
    """One status line for runs side by side, read off their records."""
    last = [log[-1] for log in [read_log(folder_of(o, *pair)) for pair in pairs] if log]
    going = [f"{record['mean_train_loss']:.3f}" for record in last if "ended" not in record]
    done = sum(o.epochs if "ended" in record else record["epoch"] for record in last)
    progress.status(done, f"{len(last) - len(going)} of {len(pairs)} runs ended, losses {' '.join(going)}")


def jobs_of(o, tasks):
    """How many processes: --jobs, or for 0 as many as there are cores and tasks; on a GPU 1."""
    jobs = o.jobs or (1 if o.device.type == "cuda" or "WORLD_SIZE" in os.environ else cores())
    return max(1, min(jobs, len(tasks)))


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def side_by_side(o, work, tasks, look):
    """Yield work(*task) as the tasks end, --jobs processes at a time (1: in this process); look() meanwhile, once a
    second. The first exception, or Ctrl-C, ends all; a child ends with its parent."""
    jobs, before = jobs_of(o, tasks), torch.get_num_threads()
    threads = 1 if o.quick or o.script == "toy" else max(1, cores() // jobs)  # threads of small networks only wait
    if jobs == 1:
        torch.set_num_threads(min(before, threads))
        try:
            for task in tasks:
                yield at_work(work, *task)
        finally:
            torch.set_num_threads(before)
        return
    others, waiting = set(multiprocessing.active_children()), True
    pool = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_child, (threads,))
    try:
        waiting = {pool.submit(at_work, work, *task) for task in tasks}
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


def at_work(work, *task):
    """work(*task) in true float32 (TF32, cuDNN's default, keeps 10 bits of the mantissa, and alpha multiplies what it
    rounds off), and with gradients, whatever the caller has switched off."""
    with torch.inference_mode(False), torch.enable_grad(), true_float32():
        return work(*task)


def start_child(threads):
    """In a child of --jobs: its threads; its end when the parent's comes; Ctrl-C is the parent's business."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*deprecated")
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
    title, _, rest = doc.partition("\n")
    parser = Parser(prog=f"{script}.py", description=title, epilog=rest.strip("\n"), allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups, table = {}, merged(table)
    for name, (group, default, _, text) in table.items():
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        shown = [] if isinstance(default, (bool, type)) else [str(default)]
        if name in quick:
            shown.append(f"--quick: {quick[name]}")
        settings = {"help": f"{text} ({'; '.join(shown)})" if shown else text, "default": None}
        if isinstance(default, bool):
            groups[group].add_argument(flag(name), action="store_true", **settings)
        else:
            several = "+" if isinstance(default, list) else None
            groups[group].add_argument(flag(name), nargs=several, metavar="X", **settings)
    given, unknown = parser.parse_known_args(words)
    if unknown:
        raise ValueError(f"{unknown[0]}: {near(unknown[0], [flag(name) for name in table])}")
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
