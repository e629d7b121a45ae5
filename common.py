"""What every experiment shares, in the order a reader meets it.

    1  the centred model        center, CenteredModel, LinearizedModel
    2  the optimizer            scaled_sgd
    3  NTK, linearity measures  empirical_ntk, kernel_alignment, relu_signs, sign_similarity, representation,
                                representation_alignment, linearisation_error
    4  the networks             mlp, resnet18, Standardise
    5  the data                 load_images, flip_labels, outputs, accuracy
    6  a run                    Run, Linearity, graphed, read_runs
    7  equal training loss      curve, value_at, readings, differences, verdict, print_table, draw
    8  the command line         parser, parse, sweep, command_line

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
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
import warnings
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

    model: any nn.Module whose output for one example is one tensor that depends on that example alone.
    alpha: a number above 0, or float("inf").
    Raises ValueError: alpha is none of these; a model that cannot be copied; a random one, see check_deterministic.
    Needs: CenteredModel, LinearizedModel, check_deterministic.
    """
    try:
        value = math.nan if isinstance(alpha, (str, bool)) else float(alpha)
    except (TypeError, ValueError):
        value = math.nan
    if not 1e-100 < value < 1e100 and value != math.inf:
        raise ValueError(f"alpha must be a number above 0, or inf for the linear network; got {alpha!r}")
    try:
        return LinearizedModel(model) if value == math.inf else CenteredModel(model, value)
    except (RuntimeError, TypeError) as error:  # copy.deepcopy, of the old torch.nn.utils.weight_norm for one
        raise ValueError(f"the model cannot be copied: {str(error).splitlines()[0]}") from None


class CenteredModel(nn.Module):
    """f^a(x) = a (f_theta(x) - f_theta0(x)) around a frozen copy of `model`; 0 at initialisation.

    self.model trains, self.model0 is the frozen copy. f_theta0 never changes, so it can be computed once for
    a whole data set and handed in as `f0`: then a step costs no second forward pass (and at initialisation f^a is 0
    within rounding only, as for LSTM and attention). Where x requires gradients, f0 is computed all the same, for its
    part of them.

    forward(x, f0=None): x (N, ...), f0 (N, C) or None -> (N, C).
    Raises ValueError: f0 of another shape than f_theta(x); see check_deterministic.
    Needs: check_deterministic.
    """

    def __init__(self, model, alpha):
        super().__init__()
        check_deterministic(model)
        self.alpha, self.checked = alpha, set()
        self.model = model
        self.model0 = copy.deepcopy(model).requires_grad_(False)

    def forward(self, x, f0=None):
        mode = (torch.is_grad_enabled(), nn.utils.parametrize._cache_enabled, *[m.training for m in self.modules()])
        if mode not in self.checked:
            check_deterministic(self.model, x)
            check_deterministic(self.model0, x)
            self.checked.add(mode)
        if f0 is None or x.requires_grad:
            f0 = self.model0(x.clone())  # a copy for each: a network may change its input in place
            x = x.clone()
        f = self.model(x)
        if f0.shape != f.shape:  # (N,) against (N, 1) would broadcast to (N, N)
            raise ValueError(f"f0 has shape {tuple(f0.shape)}, the network's output {tuple(f.shape)}")
        return self.alpha * (f - f0)


class LinearizedModel(nn.Module):
    """The lazy limit, a = inf: f(x) = grad f_theta0(x) . delta, trained in delta from 0 (paper, eq. 2).

    delta stands for a (theta - theta0), which stays finite as a grows. The derivative is the one that autograd's
    backward pass sees, stop-gradients included, taken in one forward-mode pass (about 1.5 times the cost of an
    ordinary training step) where that gives the same, else in two backward passes.

    forward(x, f0=None): x (N, ...) -> (N, C); f0 is accepted for the sake of one interface and not needed.
    Raises ValueError: neither way gives that derivative; see check_deterministic.
    Needs: check_deterministic.
    """
    alpha = float("inf")

    def __init__(self, model):
        super().__init__()
        check_deterministic(model)
        self.model0 = copy.deepcopy(model).requires_grad_(False)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.delta = nn.ParameterList(torch.zeros_like(self.model0.get_parameter(name)) for name in self.names)
        self.forward_mode, self.checked = None, set()  # the first is decided at the first call

    def forward(self, x, f0=None):
        mode = (torch.is_grad_enabled(), nn.utils.parametrize._cache_enabled, *[m.training for m in self.modules()])
        if mode not in self.checked:
            check_deterministic(self.model0, x)
            self.checked.add(mode)
        direction = dict(zip(self.names, self.delta))
        if self.forward_mode is None:
            self.forward_mode = x.device.type == "meta" or self.find_mode(self.model0, x)
        return self.derivative(self.model0, x, direction, self.forward_mode)

    @staticmethod
    def derivative(model, x, direction, forward_mode):
        """d f_(theta + t direction)(x) / dt at t = 0, (N, C); direction: {a parameter's name: tensor}."""
        before = [(m, dict(m._parameters)) for m in model.modules()]

        def f(*theta):
            try:
                return torch.func.functional_call(model, dict(zip(direction, theta)), (x.clone(),))
            finally:
                for m, parameters in before:  # torch does not put back those of a module that is registered twice
                    m._parameters.update(parameters)

        wanted, cudnn = torch.is_grad_enabled(), torch.backends.cudnn.enabled
        with torch.inference_mode(False), torch.set_grad_enabled(wanted):  # no derivative is seen in inference mode
            x = x.clone()
            theta = tuple(model.get_parameter(name).detach() for name in direction)
            if forward_mode:
                return torch.func.jvp(f, theta, tuple(direction.values()))[1]
            # Fast implementations cannot always be differentiated twice, the plain ones can.
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                try:
                    torch.backends.cudnn.enabled = False
                    return torch.autograd.functional.jvp(f, theta, tuple(direction.values()), create_graph=wanted)[1]
                finally:
                    torch.backends.cudnn.enabled = cudnn

    @staticmethod
    def find_mode(model, x):
        """Whether forward mode gives the derivative that autograd sees. (It ignores torch.no_grad and .data in a
        network, and some layers have no formula for it.) For random u and v, J v must agree with J^T u, in its value
        and its slope in v. model: a frozen copy. ValueError: neither forward mode does, nor two backward passes."""
        for forward_mode in (True, False):
            generator = torch.Generator().manual_seed(0)
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    v = {}
                    for name, p in model.requires_grad_().named_parameters():
                        v[name] = torch.randn(p.shape, generator=generator).to(p.detach()).requires_grad_()
                    f = model(x.clone())
                    u = torch.randn(f.shape, generator=generator).to(f.detach())
                    seen = torch.autograd.grad(f, list(model.parameters()), u, materialize_grads=True)  # J^T u
                    Jv = LinearizedModel.derivative(model, x, v, forward_mode)
                    slope = torch.autograd.grad(Jv, list(v.values()), u, materialize_grads=True)
            except Exception as error:  # whatever a network stumbles over
                reason = str(error).split("\n")[0]
                continue
            finally:
                model.requires_grad_(False)
            tolerance = 1e-2 if u.element_size() > 2 else .2  # TF32 and bfloat16 round
            gap = (u * Jv).sum() - sum((g.conj() * w).real.sum() for g, w in zip(seen, v.values()))
            wrong = sum((g - h).norm()**2 for g, h in zip(seen, slope))
            if gap.abs() <= tolerance * Jv.norm() and wrong <= tolerance**2 * sum(g.norm()**2 for g in seen):
                return forward_mode
            reason = "neither way gives the derivative of autograd's backward pass"
        raise ValueError(f"the network cannot be linearised: {reason}")


def check_deterministic(model, x=None):
    """Raise ValueError where f^a would mean nothing, since f_theta0 could not be fixed: f(x) depends on chance, on the
    other examples of the batch, on how often it has been called, or on whether gradients are wanted; what a frozen copy
    returns depends on what is not frozen; or f(x) is no tensor of real numbers.

    By its layers: batch norm, dropout and stochastic depth in training mode. By value, given x (N, ...): f(x) twice."""
    if nn.utils.parametrize._cache_enabled:
        raise ValueError("inside torch.nn.utils.parametrize.cached() a network shares its cache with its copy at "
                         "theta0, and f^a is wrong: leave it out")
    for name, m in model.named_modules():
        kind, bad = type(m).__name__, False
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            bad = m.training or m.running_mean is None
        elif "FractionalMaxPool" in kind:
            bad = m._random_samples is None
        elif "Drop" in kind or "Stochastic" in kind or kind in ("RReLU", "_SpectralNorm"):  # torchvision's, timm's
            bad = m.training and getattr(m, "p", getattr(m, "drop_prob", 1))
        elif isinstance(m, (nn.MultiheadAttention, nn.RNNBase)):
            bad = m.training and m.dropout
        if bad:
            raise ValueError(f"{name or 'the model'} ({kind}) is random or mixes the batch: it is in training mode or "
                             "has no fixed statistics; call model.eval() first")
    if x is None or x.device.type == "meta":
        return
    trains = x.requires_grad or any(p.requires_grad for p in model.parameters())
    first = model(x.clone())
    with torch.no_grad():
        second = model(x.clone())
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        found = getattr(first, "dtype", type(first).__name__)
        raise ValueError(f"the network must return one tensor of real numbers, not {found}")
    if (first - second).norm() > (1e-5 if first.element_size() > 2 else .05) * first.norm():
        raise ValueError("f(x) computed twice differs: the network depends on chance, changes as it is used, or "
                         "computes otherwise without gradients (attention with a mask: "
                         "torch.backends.mha.set_fastpath_enabled(False) mends that)")
    if first.requires_grad and not trains:
        raise ValueError("a hook or a replaced forward refers to the network by a variable, so that its copy at theta0 "
                         "would change with it")


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
    trained = centered.delta if alpha == float("inf") else centered.model.parameters()
    return torch.optim.SGD([p for p in trained if p.requires_grad], lr=scaled_lr, momentum=momentum)


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
    own = [*model.parameters(), *model.buffers()]
    before = [t.detach().clone() for t in own]
    for structured in (True, False):
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices), true_float32():
                J = Jacobian(model, x, memory, structured)
                L = J if y is None else Jacobian(model, y, memory, structured)
                K = J.product(L)
                if J.confirms(K, L):
                    return K
            reason = "the outputs depend on chance or on the other examples of the batch"
        except Exception as error:  # whatever a pasted network stumbles over
            reason = str(error).split("\n")[0]
        finally:
            with torch.no_grad():
                for t, old in zip(own, before):
                    if not torch.equal(t, old):  # a network may change its own (nn.Embedding with max_norm does)
                        t.copy_(old)
    raise ValueError(f"no tangent kernel: {reason}")


@contextlib.contextmanager
def true_float32():
    """float32 means float32 inside, not TF32 or bfloat16, nor autocast's; afterwards what it meant before."""
    cuda, cudnn, cpu = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    units = [cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv]
    before = [unit.fp32_precision for unit in units]
    try:
        for unit in units:
            unit.fp32_precision = "ieee"
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
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
            conv = isinstance(m, nn.Conv2d) and m.groups == 1 and m.padding_mode == "zeros"
            trains = any(p.requires_grad for p in m.parameters())
            if structured and trains and (type(m) is nn.Linear or conv):
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
        x = self.x[first:last].clone()
        try:
            f = self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(f, torch.Tensor) or f.shape[:1] != x.shape[:1] and len(x) > 1:  # squeeze() drops a single row
            returned = tuple(f.shape) if isinstance(f, torch.Tensor) else type(f).__name__
            raise ValueError("the network must return one tensor with a row for each example; "
                             f"for {len(x)} it returned {returned}")
        if f.dtype not in (torch.float32, torch.float64) or not f.requires_grad:
            raise ValueError(f"the output ({f.dtype}) has no derivative in float32 or float64")
        return f.reshape(len(x), -1), calls

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
            A = torch.cat(used, 2)
            (T, d), O = A.shape[1:], G.shape[3]
            if T * (d + self.C * O) > self.C * O * d:  # many positions: sum_t G_ct (x) A_t holds fewer numbers
                G = torch.einsum("ncto,ntd->ncod", G, A).flatten(2)[:, :, None]
                A = A.new_ones(len(f), 1, 1)
            pairs.append((A, G))
        if self.rest:  # J itself, as a layer of one position whose input is 1
            rows = []
            for i in range(first, first + len(f)):
                for f_c in self.outputs(i, i + 1)[0][0]:
                    row = torch.autograd.grad(f_c, self.rest, retain_graph=True, materialize_grads=True)
                    rows.append(torch.cat([g.to_dense().flatten() for g in row]))
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

        A (n, T, d), B (m, S, d), G (n, C, T, O), H (m, C, S, O). half: both are the same, j < i stays 0."""
        (n, C), m = G.shape[:2], len(H)
        K = G.new_zeros(n, C, m, C)
        for i in range(n):  # an example at a time: nothing of size n m T S is ever held
            first = i if half else 0
            inputs = torch.einsum("td,jsd->jts", A[i], B[first:])
            weighted = inputs[:, None] @ H[first:]  # (m - first, C, T, O)
            K[i, :, first:] = (G[i].flatten(1) @ weighted.flatten(2).flatten(0, 1).T).view(C, -1, C)
        return K

    def pull_back(self, u):
        """J^T u[k] for each u[k] (N, C), as rows (K, P): a backward pass a block. The first example is a block of its
        own, which shows whether it depends on the others."""
        total, edges = 0, [0, *range(1, len(self.x) - 1, self.block), len(self.x)]
        for first, last in zip(edges, edges[1:]):
            f, _ = self.outputs(first, last)
            rows = []
            for part in u[:, first:last]:
                pulled = torch.autograd.grad(f, self.parameters, part, retain_graph=True, materialize_grads=True)
                rows.append(torch.cat([g.to_dense().flatten() for g in pulled]))
            total = total + torch.stack(rows)
        return total

    def confirms(self, K, other):
        """Whether u^T K v = < J^T u, L^T v > within rounding, for each pair of four random u and four v.

        Rounding is that of a typical |J^T u| |L^T v|, about trace K. An error of K shows in one of the pairs
        unless all u, or all v, are nearly orthogonal to it. For y = x, the same four serve as u and v.
        """
        generator = torch.Generator().manual_seed(0)  # of its own
        u = v = torch.randn(4, *K.shape[:2], generator=generator, dtype=torch.float64).to(K)
        pulled = [self.pull_back(u)]
        if other is not self:
            v = torch.randn(4, *K.shape[2:], generator=generator, dtype=torch.float64).to(K)
            pulled.append(other.pull_back(v))
        inner = 0
        for pieces in torch.cat(pulled).split(2**20, 1):  # no float64 copy of the whole
            inner = inner + pieces.double() @ pieces.double().T
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

    >>> Y = F.one_hot(torch.tensor([0, 1, 0])).double()         # alignment with the labels (Baratin et al. 2021):
    >>> round(kernel_alignment(torch.eye(3), Y @ Y.T), 4)       # for K (N, C, N, C), use Y.view(-1, 1)
    0.7746

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


@torch.no_grad()
def relu_signs(model, x):
    """Which ReLUs are active: x (N, ...) -> bool (N, units), for every call of every nn.ReLU, as they run.

    Raises ValueError: a network without nn.ReLU modules (F.relu cannot be seen from outside).
    """
    signs = []
    handles = [m.register_forward_hook(lambda m, args, out: signs.append((out > 0).reshape(len(x), -1)))
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
    """What the last nn.Linear that is called receives: x (N, ...) -> (N, d). Raises ValueError if none is called."""
    seen = []
    note = lambda m, args, kwargs: seen.append((args[0] if args else kwargs["input"]).clone())
    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules() if isinstance(m, nn.Linear)]
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
    Raises ValueError: a network that cannot be linearised.
    Needs: LinearizedModel, check_deterministic.
    """
    if centered.alpha == float("inf"):
        return 0.0
    theta0 = dict(centered.model0.named_parameters())
    moved = {name: p - theta0[name] for name, p in centered.model.named_parameters()}
    fa = centered(x)
    forward_mode = LinearizedModel.find_mode(centered.model0, x)
    slope = LinearizedModel.derivative(centered.model0, x, moved, forward_mode)
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
    """relu(x + conv(relu(conv(x)))), with a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = Conv(inputs, outputs, 3, stride, padding=1)
        self.conv2 = Conv(outputs, outputs, 3, padding=1)
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
    """Inside the block, layers are initialised on the CPU from a seed of their own; afterwards torch's global generator
    and default device are what they were."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(generator(what, seed).initial_seed())
        yield


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
    raise ValueError(f"--dataset {dataset}: must be cifar10, synthetic or a file FILE.npz")


def with_statistics(images):
    """Add the training pixels' own mean and standard deviation per channel, of pixels in [0, 1], if it has none."""
    if "mean" in images:
        return images
    mean, std, value = [], [], np.arange(256)
    for channel in np.moveaxis(images["x_train"], 3, 0):
        # In whole numbers: sums of floats are another machine's to the last digit only, and their checksum is another.
        count, n = np.bincount(channel.ravel(), minlength=256), channel.size
        total, squares = int(count @ value), int(count @ value**2)
        mean.append(total / (255 * n))
        std.append(max((n * squares - total**2) / (255 * n)**2, 1e-6)**.5)
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
    """The arrays of an .npz, without ever unpickling. OSError: no such file; ValueError: it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name]) for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged bytes make numpy and zipfile raise nearly anything
        reason = (str(error) or type(error).__name__).split("\n")[0][:150]
        raise ValueError(f"{path}: not a readable .npz file ({reason})") from None


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
    need(x.shape[3] in (1, 3, 4), f"images have {x.shape[3]} channels, not 1, 3 or 4; the channels come last")
    classes = len(np.unique(y))
    need(classes > 1 and y.min() == 0 and y.max() == classes - 1,
         f"y_train must run from 0 to the number of classes - 1, each present; it has {y.min()} to {y.max()}, "
         f"{classes} different")
    need(0 <= checked["y_test"].min() and checked["y_test"].max() < classes,
         f"y_test has a label outside 0 to {classes - 1}, the labels of y_train")
    need(("mean" in images) == ("std" in images), "has one of mean and std; they come together")
    for name in images.keys() & {"score_train", "score_test", "attribute_train", "attribute_test", "mean", "std"}:
        values, (what, _, split) = images[name], name.partition("_")
        count = len(checked[f"y_{split}"]) if split else x.shape[3]
        need(values.dtype.kind in "biuf" and values.shape == (count,) and np.isfinite(values).all(),
             f"{name} must be finite numbers, {count} of them; it is {values.dtype} {values.shape}")
        low, high = {"score": (-np.inf, np.inf), "attribute": (0, 1), "mean": (0, 1), "std": (1e-6, .5)}[what]
        need(low <= values.min() and values.max() <= high,  # pixels in [0, 1] cannot deviate by more than .5
             f"{name} must be from {low:g} to {high:g}; it is {values.min():g} to {values.max():g}")
        if what == "attribute":
            need(np.isin(values, (0, 1)).all(), f"{name} must be 0 or 1")
        kept = values.astype(np.int64 if what == "attribute" else np.float64)  # of one type, so of one checksum
        checked[name] = kept.tolist() if what in ("mean", "std") else kept
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
    count = round(fraction * len(y)) if 0 < fraction < 1 else 0
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


def accuracy(f, y):
    """Share of outputs f (N, C) whose largest is at the label y (N,). A float."""
    return (f.argmax(1) == y).double().mean().item()


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
    Raises ValueError: --out holds another run, or records without their checkpoint. OSError: it cannot be written.
    """

    def __init__(self, o, seed, f, optimizer, examples, linearity):
        self.o, self.seed, self.optimizer, self.examples, self.linearity = o, seed, optimizer, examples, linearity
        self.steps_an_epoch = examples // o.batch_size  # the last incomplete batch is dropped
        self.total = o.epochs * self.steps_an_epoch
        self.iteration, self.seconds, self.records = 0, 0.0, []
        self.folder = folder_of(o, f.alpha, seed)
        size = sum(p.numel() for p in f.model0.parameters())
        args = {**identity(o), "network": name_of(f.model0), "parameters": size}
        check_out(o.out, args)
        self.tensors = list(optimizer.param_groups[0]["params"])  # all that a step changes
        if o.momentum:
            for p in list(self.tensors):  # a first momentum of 0 gives the same first step as none
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
                self.tensors.append(optimizer.state[p]["momentum_buffer"])
        if (self.folder / "checkpoint.pt").exists():
            self.load()
        write_atomically(self.folder / "args.json", json_line(args))

    def minibatches(self, probe):
        """Yield the indices of minibatch after minibatch; probe() returns the script's part of a record, with
        mean_train_loss. The order of an epoch depends on (seed, epoch) alone."""
        o, due, order = self.o, schedule(self.steps_an_epoch, self.total), None
        if not self.records:
            self.save()  # no records without a checkpoint
        saved, begin = time.monotonic(), time.monotonic() - self.seconds
        while True:
            now = time.monotonic()
            self.seconds = now - begin
            if self.iteration in due or self.iteration >= self.total:
                self.look(probe)
                if "ended" in self.records[-1]:
                    break
            if now - saved >= o.checkpoint_seconds:
                self.save()
                saved = now
            epoch, k = divmod(self.iteration, self.steps_an_epoch)
            if k == 0 or order is None:
                order = torch.randperm(self.examples, generator=generator(f"order {epoch}", self.seed)).to(o.device)
            yield order[k * o.batch_size:(k + 1) * o.batch_size]
            self.iteration += 1
        self.save()

    def look(self, probe):
        """Take one record; `ended` in it says why the run is over."""
        record = {"iteration": self.iteration, "epoch": self.iteration / self.steps_an_epoch,
                  "seconds": round(self.seconds, 3), **probe()}
        loss, ended = record["mean_train_loss"], None
        recent = [earlier["mean_train_loss"] for earlier in self.records[-4:]] + [loss]
        start = self.records[0]["mean_train_loss"] if self.records else loss
        if not math.isfinite(loss):
            ended = "diverged"
        elif self.iteration >= self.total:
            ended = "diverged" if np.mean(recent) > 2 * start > 0 else "epochs"
        elif len(recent) == 5 and np.mean(recent) < self.o.stop_loss:
            ended = "stop-loss"
        if math.isfinite(loss) and (ended or len(self.records) % 5 == 0):
            record.update(self.linearity())
        if ended:
            record["ended"] = ended
        self.records.append(json.loads(json_line(record)))
        write_atomically(self.folder / "log.jsonl", b"".join(json_line(record) for record in self.records))
        self.show()
        if ended == "diverged":
            print(f"{self.folder.name}: diverged, its loss went from {start:.3g} to {loss:.3g}: try a smaller --lr in "
                  "another --out", flush=True)

    def show(self):
        """Say how far the run is, and how long it will take at most (it may end before its last iteration)."""
        left = datetime.timedelta(seconds=int(self.seconds / max(self.iteration, 1) * (self.total - self.iteration)))
        epoch = self.iteration / self.steps_an_epoch
        text = f"{self.folder.name:<18} iteration {self.iteration:>7}  epoch {epoch:>7.2f}"
        for key in ("mean_train_loss", "test_loss", "test_acc"):
            if self.records[-1].get(key) is not None:
                text += f"  {key} {self.records[-1][key]:>7.4f}"
        progress(f"{text}  at most {left} left", end="\n" if "ended" in self.records[-1] else "")

    def save(self):
        buffer = io.BytesIO()
        torch.save({"iteration": self.iteration, "seconds": self.seconds, "records": self.records,
                    "tensors": [t.detach() for t in self.tensors]}, buffer)
        write_atomically(self.folder / "checkpoint.pt", buffer.getbuffer())

    @torch.no_grad()
    def load(self):
        """Take up checkpoint.pt."""
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.iteration, self.seconds = state["iteration"], state["seconds"]
            for mine, saved in zip(self.tensors, state["tensors"], strict=True):
                mine.copy_(saved)
        except Exception as error:  # damaged bytes make zipfile and torch raise nearly anything
            raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0][:100]}): choose another --out, or "
                             f"delete the folder {self.folder}") from None
        # What was probed here, `ended` too, is probed again if it is on the schedule.
        self.records = [record for record in state["records"] if record["iteration"] < self.iteration]


def needs_training(folder, o):
    """Whether these options leave something to train. (More epochs, or a lower stop-loss, do.) ValueError: records of
    an unfinished run without the checkpoint to go on from; they would be lost."""
    records = read_log(folder)
    ended = records[-1].get("ended") if records else None
    if ended == "diverged" or ended and records[-1]["epoch"] >= o.epochs:
        return False
    if ended == "stop-loss" and np.mean([record["mean_train_loss"] for record in records[-5:]]) < o.stop_loss:
        return False
    if records and not (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder} has records of an unfinished run but not its checkpoint, so it cannot go on: "
                         "choose another --out, or delete that folder")
    return True


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
    """The measures of linearity against theta0, on examples x (N, ...): make it at theta0, call it later. A measure
    that the network does not admit (no nn.ReLU: no signs) is said once a run and left out."""

    def __init__(self, f, x):
        self.f, self.x = f, x
        model = f.model if f.alpha < math.inf else copy.deepcopy(f.model0).requires_grad_()
        self.of = {empirical_ntk: model, relu_signs: model, representation: model, linearisation_error: f}
        self.start = self.measure(self.of)

    def measure(self, functions):
        found = {}
        for function in functions:
            try:
                found[function] = function(self.of[function], self.x)
            except ValueError as error:
                print(f"warning: not measured: {error}", flush=True)
        return found

    def __call__(self):
        record, start = {}, self.start
        now = start if self.f.alpha == math.inf else self.measure(start)  # at a = inf the network stays at theta0
        if empirical_ntk in now:
            record["ntk_alignment"] = kernel_alignment(now[empirical_ntk], start[empirical_ntk])
        if relu_signs in now:
            record["sign_similarity"] = sign_similarity(now[relu_signs], start[relu_signs])
        if representation in now:
            R, R0 = now[representation], start[representation]
            record["repr_alignment"] = representation_alignment(R, R0)
            record["repr_alignment_gram"] = representation_alignment(R, R0, gram=True)
        if linearisation_error in now:
            record["linearisation_error"] = now[linearisation_error]
        return record


def graphed(step, training):
    """The same step as one CUDA graph on a static index: no launch costs. On a CPU `step` itself."""
    if training.o.device.type != "cuda":
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
    except RuntimeError as error:
        print(f"warning: CUDA graph refused ({str(error).splitlines()[0]}); going on step by step, slower")
        return step
    finally:
        with torch.no_grad():  # undo the warm-up
            for t, old in zip(training.tensors, before):
                t.copy_(old)

    def replay(batch):
        index.copy_(batch)
        graph.replay()

    return replay


def progress(text, end=""):
    """A line into a file or pipe; on a terminal each is written over the last, unless end="\\n" closes it."""
    if sys.stdout.isatty():
        print(f"\r{text[:shutil.get_terminal_size().columns - 1]}\033[K", end=end, flush=True)
    else:
        print(text, flush=True)


# What a run is, and its files.

# These may differ between two calls that share a folder: which runs, how far and where, and what is good to know of a
# run (the last two are of earlier versions). All other options are part of what a run is.
MAY_DIFFER = {"alpha", "seeds", "dataset", "data_dir", "out", "device", "jobs", "quick", "draw_only", "epochs",
              "stop_loss", "checkpoint_seconds", "runs", "chunk", "animate", "script_crc32", "threads", "torch",
              "numpy", "python", "folder", "theta0_crc32"}


def identity(o):
    """What goes into args.json: the script, the options that change a run's numbers, the loss, a checksum of the data,
    and some facts."""
    run = {name: value for name, value in vars(o).items() if name not in MAY_DIFFER}
    return {**run, "dtype": str(o.dtype)[6:], "dataset": os.path.basename(str(getattr(o, "dataset", ""))),
            "device": str(o.device), "script_crc32": o.script_crc32, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}


def check_out(out, args, warn=False):
    """Compare every run in a folder with `args`: ValueError names a folder that holds another run, by what both know of
    it, and the first difference. warn: another text of the script is a line of warning."""
    for path in sorted(pathlib.Path(out).glob("alpha=*/args.json")):
        there = read_args(path.parent)
        for key in sorted(args.keys() & there.keys() - MAY_DIFFER):
            if there[key] != args[key]:
                raise ValueError(f"{path.parent} holds a run with {key} = {there[key]}, not {args[key]}: choose "
                                 "another --out, or delete that folder")
        if warn and there.get("script_crc32") != args["script_crc32"]:
            print(f"warning: {path.parent} is by another text of {args['script']}.py")
            warn = False


def read_args(folder):
    """A folder's args.json as a dict. ValueError: it is missing or damaged."""
    try:
        args = json.loads((folder / "args.json").read_text())
        return {**args.pop("run", {}), **args}  # earlier versions nested what is compared
    except (OSError, ValueError, AttributeError, TypeError):
        raise ValueError(f"{folder}/args.json is missing or damaged: choose another --out, or delete that folder"
                         ) from None


def read_log(folder):
    """The records of a folder's log.jsonl, none if there is no such file. ValueError: they cannot be read."""
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        ascending = [record["iteration"] for record in records if "mean_train_loss" in record]
        if not records or ascending != sorted({record["iteration"] for record in records}):
            raise ValueError
        return records
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: choose another --out, or delete the folder {folder}") from None


def read_runs(folder):
    """The records of every run in a folder, {alpha: {seed: [record, ...]}}, ascending; for notebooks, too.
    ValueError: there are none, one is damaged, or they differ in more than alpha and seed."""
    runs = {}
    for path in sorted(pathlib.Path(folder).glob("alpha=*_seed=*/log.jsonl")):
        if not runs:
            check_out(folder, read_args(path.parent))
        alpha, seed = path.parent.name.removeprefix("alpha=").split("_seed=")
        runs.setdefault(float(alpha), {})[int(seed)] = read_log(path.parent)
    if not runs:
        raise ValueError(f"{folder}: there are no records of runs (--out)")
    return {alpha: dict(sorted(runs[alpha].items())) for alpha in sorted(runs)}


def folder_of(o, alpha, seed):
    return pathlib.Path(o.out) / f"alpha={alpha:g}_seed={seed}"


def json_line(entry):
    """Strict JSON, a line: numbers that are not finite become null."""
    finite = json.loads(json.dumps(entry), parse_constant=lambda name: None)  # name: NaN, Infinity or -Infinity
    return (json.dumps(finite, allow_nan=False) + "\n").encode()


def write_atomically(path, data):
    """Write bytes to a temporary file and rename it to `path`: whole, or not at all. Makes the folder, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error}): make room, or choose another --out") from None
    finally:
        part.unlink(missing_ok=True)


def crc32(arrays):
    """Checksum of arrays, to tell whether data is the same as before."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def name_of(thing):
    """How args.json and the pictures call a loss or a network: a function's name, a module's class."""
    if isinstance(thing, nn.Sequential):  # the first layer standardises the images
        thing = thing[-1]
    return getattr(thing, "__name__", type(thing).__name__)


# ---------------------------------------------------------------------------------------------------------------------
# 7  Equal training loss, tables, drawing
# ---------------------------------------------------------------------------------------------------------------------


def smooth(values):
    """The centred average over five probes, (n,) -> (n - 2,): the window shrinks at the start, and the last two are not
    read, so that a reading does not change when the run goes on."""
    return np.array([np.mean(values[k - min(k, 2):k + min(k, 2) + 1]) for k in range(len(values) - 2)])


def curve(records):
    """A run's records as {key: array (n,)}, smoothed along the run. What is measured at every fifth probe only is not
    smoothed: a line between its neighbours, nan outside. Left out: the record at the end of the epochs, which is not on
    the schedule, and all from a loss that is not finite on."""
    kept = []
    for record in records:
        if record["mean_train_loss"] is None:
            break
        if record.get("ended") not in ("epochs", "diverged"):
            kept.append(record)
    columns = {}
    for key in {key for record in kept for key in record} - {"ended", "seconds"}:
        values = np.array([record.get(key) for record in kept], float)  # None becomes nan
        measured = np.flatnonzero(np.isfinite(values))
        if all(key in record for record in kept):
            columns[key] = smooth(values)
        elif len(measured):
            columns[key] = np.interp(np.arange(len(kept)), measured, values[measured], np.nan, np.nan)[:-2]
    return columns


def value_at(level, loss, quantity, rising=False):
    """`quantity` where `loss` first passes `level`, on a line between the two probes around it; None if it does not.

    rising: `loss` is an accuracy, and its first upward passage after its lowest value counts. Arrays (n,), smoothed."""
    if rising and len(loss):
        lowest = np.argmin(loss)
        loss, quantity, level = -loss[lowest:], quantity[lowest:], -level
    passed = np.flatnonzero(loss <= level)
    if len(passed) == 0 or passed[0] == 0:
        return None
    k = passed[0]
    share = (loss[k - 1] - level) / (loss[k - 1] - loss[k])
    value = quantity[k - 1] + share * (quantity[k] - quantity[k - 1])
    return float(value) if np.isfinite(value) else None


def loss_levels(runs):
    """.95, .9, ... .05 times L0, and the paper's 1.0 and .5, as far as they lie below L0; highest first. L0 is the mean
    training loss at the start, as the first record at the smallest alpha has it: ln C for cross-entropy."""
    smallest = runs[min(runs)]
    start = float(f"{smallest[min(smallest)][0]['mean_train_loss'] or 0:.3g}")  # null if it is not finite
    levels = {1.0, .5}
    for k in range(1, 20):
        levels.add(float(f"{k / 20 * start:.3g}"))
    return sorted((level for level in levels if 0 < level < start), reverse=True)


def readings(runs, derive=dict, on=("mean_train_loss",), accuracies=()):
    """What every run shows where the losses `on` first pass each level, and the accuracies .8, .85, .9 and .95.

    derive(curve) -> the curve with what follows from it, such as a gap. Returns rows, [{"alpha", "seed", "on", "level",
    <each key of the curve>: number or None}, ...]; a level that a run does not pass has no row."""
    rows, levels = [], [(key, level) for key in on for level in loss_levels(runs)]
    levels += [(key, level) for key in accuracies for level in (.8, .85, .9, .95)]
    for alpha, seeds in runs.items():
        for seed, records in seeds.items():
            columns = derive(curve(records))
            for key, level in levels:
                row = {"alpha": alpha, "seed": seed, "on": key, "level": level}
                for name, column in sorted(columns.items()):
                    row[name] = value_at(level, columns[key], column, rising=key in accuracies)
                if row[key] is not None:
                    rows.append(row)
    return rows


def where(rows, **wanted):
    """The rows that have the wanted values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def by_level(rows, alpha, on, quantity):
    """{level: what each run of this alpha shows of `quantity` there}, highest level first."""
    values = {}
    for row in sorted(where(rows, alpha=alpha, on=on), key=lambda row: -row["level"]):
        if row.get(quantity) is not None:
            values.setdefault(row["level"], []).append(row[quantity])
    return values


def differences(rows, quantities):
    """Each alpha minus the largest, seed by seed, since a seed fixes everything but alpha, for some quantities.

    Returns rows, [{"alpha", "minus", "on", "level", "quantity", "mean", "low", "high", "n"}, ...]: the mean over n
    seeds and its 95 % interval (Student's t; None below three seeds)."""
    largest, paired = max((row["alpha"] for row in rows), default=None), {}
    lazy = {(row["seed"], row["on"], row["level"]): row for row in where(rows, alpha=largest)}
    for row in rows:
        other = lazy.get((row["seed"], row["on"], row["level"]), {})
        for name in quantities:
            if row["alpha"] < largest and row.get(name) is not None and other.get(name) is not None:
                paired.setdefault((row["alpha"], row["on"], row["level"], name), []).append(row[name] - other[name])
    result = []
    for (alpha, on, level, name), values in paired.items():
        mean, low, high = interval(values)
        result.append({"alpha": alpha, "minus": largest, "on": on, "level": level, "quantity": name, "mean": mean,
                       "low": low, "high": high, "n": len(values)})
    return result


def interval(values):
    """Mean and 95 % interval (Student's t) of some numbers; (mean, None, None) below three."""
    mean, n = float(np.mean(values)), len(values)
    if n < 3:
        return mean, None, None
    half = float(student_t(n - 1) * np.std(values, ddof=1) / n**.5)
    return mean, mean - half, mean + half


def student_t(freedom):
    """The .975 quantile of Student's t, from a table; beyond it 1.96 + 2.5 / freedom, right to .0014."""
    table = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
             2.120, 2.110, 2.101, 2.093, 2.086]
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.5 / freedom


def rich_and_lazy(alphas):
    """The two alphas that a claim compares: 1, or else the smallest, and the largest."""
    return (1.0 if 1 in alphas and max(alphas) > 1 else min(alphas)), max(alphas)


def verdict(runs, rows, pairs, on, quantity, claim, about):
    """The conclusion in a sentence: whether `quantity` at the rich alpha minus that at the lazy one is above 0 at both
    of the two lowest levels of `on` that every run of the two has.

    runs: {alpha: whatever has a length, the number of its runs}. rows: of readings, pairs: of differences. about: the
    network and the loss."""
    rich, lazy = rich_and_lazy(runs)
    if rich == lazy:
        return "One alpha is no comparison: --alpha 1 100 makes one."
    read = []
    for row in sorted(where(pairs, alpha=rich, on=on, quantity=quantity), key=lambda row: row["level"]):
        passed = [len(where(rows, alpha=alpha, on=on, level=row["level"])) for alpha in (rich, lazy)]
        if passed == [len(runs[rich]), len(runs[lazy])]:  # by every run
            read.append(row)
    if len(read) < 2:
        return (f"Nothing is concluded: fewer than two levels of {on} were passed by every run. Train longer "
                "(more epochs or iterations, a lower stop-loss); where the loss does not fall, try a smaller --lr.")
    lower, low = read[:2]
    word = "is not shown by these runs"
    if low["n"] < 3:
        word = "is not judged (an interval takes three seeds)"
    elif low["low"] > 0 and lower["low"] > 0:
        word = "holds in these runs"
    elif low["high"] < 0 and lower["high"] < 0:
        word = "is contradicted by these runs"
    return (f"The claim that {claim} {word}: {quantity} at alpha = {rich:g} minus that at alpha = {lazy:g} is "
            f"{cell(low)} at {on} {low['level']:g} and {cell(lower)} at {on} {lower['level']:g} (n = {low['n']}; "
            f"{about}).")


def cell(row):
    """A difference for a table: mean [95 % interval]."""
    if row["low"] is None:
        return f"{row['mean']:+.3f}"
    return f"{row['mean']:+.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def print_table(title, rows, pairs, on, quantity):
    """Print `quantity` at each level of `on`: the mean over the runs of each alpha, then each alpha minus the largest
    with its interval; in brackets the number of runs."""
    columns = {}  # {header: {level: text}}
    for alpha in sorted({row["alpha"] for row in rows}):
        values = by_level(rows, alpha, on, quantity)
        texts = {level: f"{np.mean(found):.3f} ({len(found)})" for level, found in values.items()}
        columns[f"alpha = {alpha:g}"] = texts
    for row in where(pairs, on=on, quantity=quantity):
        header = f"{row['alpha']:g} - {row['minus']:g}"
        columns.setdefault(header, {})[row["level"]] = f"{cell(row)} ({row['n']})"
    if not any(columns.values()):
        return
    print(f"\n{title}\n{on:>18}" + "".join(f"{header:>30}" for header in columns))
    for level in sorted({level for levels in columns.values() for level in levels}, reverse=True):
        print(f"{level:>18g}" + "".join(f"{levels.get(level, '-'):>30}" for levels in columns.values()))


# Pictures, drawn at the levels. A colour and a marker belong to an alpha, the same everywhere: warm is rich, cold is
# lazy, black is linear (Okabe and Ito's colours, apart for colour-blind readers, too).

LOOK = {.1: ("#f0e442", "v"), .3: ("#8c510a", "<"), .5: ("#e69f00", "D"), 1.0: ("#d55e00", "o"), 3.0: ("#999999", "p"),
        10.0: ("#cc79a7", "^"), 30.0: ("#009e73", ">"), 100.0: ("#0072b2", "s"), 1000.0: ("#56b4e9", "P"),
        math.inf: ("#000000", "X")}


def look(alpha):
    """How an alpha is drawn, as keywords of matplotlib's plot."""
    colour, marker = LOOK.get(alpha, ("#777777", "h"))
    return {"color": colour, "marker": marker, "markersize": 4, "label": f"α = {alpha:g}".replace("inf", "∞")}


def draw(ax, rows, on, quantity, linestyle="-", name=""):
    """`quantity` at the levels of `on`, a line an alpha: the mean over its runs, and their range as a band; training
    goes to the right. Levels that not all of its runs pass are left out. name: written at the end of the line."""
    for alpha in sorted({row["alpha"] for row in rows}):
        values = by_level(rows, alpha, on, quantity)
        most = max(map(len, values.values()), default=0)
        levels = [level for level in values if len(values[level]) == most]
        if levels:
            runs, style = np.array([values[level] for level in levels]), look(alpha)  # (levels, runs)
            ax.plot(levels, runs.mean(1), linestyle=linestyle, **style)
            ax.fill_between(levels, runs.min(1), runs.max(1), color=style["color"], alpha=.18, linewidth=0)
            ax.annotate(name, (levels[-1], runs[-1].mean()), (4, 0), textcoords="offset points", va="center",
                        color=style["color"])
    to_the_right(ax, on)


def to_the_right(ax, on):
    """Training goes to the right, so losses fall to the right."""
    ax.margins(x=.12)
    ax.set_xlabel(on.replace("_", " "))
    if on.endswith("loss") and not ax.xaxis_inverted():
        ax.invert_xaxis()


def draw_differences(ax, pairs, on, quantity):
    """Each alpha minus the largest at every level, with its 95 % interval, and a line at 0."""
    ax.axhline(0, color="black", linewidth=.8)
    read = where(pairs, on=on, quantity=quantity)
    alphas = sorted({row["alpha"] for row in read})
    for k, alpha in enumerate(alphas):
        found = [(row["level"], row["mean"], row["low"], row["high"]) for row in where(read, alpha=alpha)]
        level, mean, low, high = np.array(found, float).T  # None, below three runs, becomes nan
        ax.errorbar(level * (1 - .03 * k / len(alphas)), mean, [mean - low, high - mean], linestyle="", **look(alpha))
    ax.set_title(f"(b) {quantity.replace('_', ' ')}, minus that at the largest α")
    to_the_right(ax, on)


def draw_linearity(similarity, error, rows, on):
    """Panels (c) and (d): the similarities to initialisation, of ReLUs' signs, representation (R^T R) and tangent
    kernel, on [0, 1]; and the distance of f^a from its linearisation, as a share of |f^a|."""
    handles = []
    for key, linestyle, name in (("sign_similarity", "-", "ReLU signs"), ("repr_alignment", "--", "representation"),
                                 ("ntk_alignment", ":", "tangent kernel")):
        draw(similarity, rows, on, key, linestyle)
        handles += similarity.plot([], [], color="#777777", linestyle=linestyle, label=name)
    similarity.set(ylim=(0, 1.05), title="(c) similarity to initialisation")
    similarity.legend(handles=handles)
    draw(error, rows, on, "linearisation_error")
    error.set(ylim=(0, 1.3 * error.get_ylim()[1]), title="(d) distance from the linearisation")
    if error.lines:
        error.legend(ncols=2)


def draw_crosses(ax, points):
    """The paper's own points, {alpha: {level: value}}, as crosses."""
    for alpha, values in points.items():
        ax.plot(list(values), list(values.values()), "x", color=look(alpha)["color"], markersize=8, markeredgewidth=1.5)


def draw_alphas(o, rows, on, quantity, levels=None):
    """How large must alpha be? With four alphas or more, OUT/SCRIPT_alphas.png: `quantity` against alpha, mean and 95 %
    interval over runs, at three levels (by default the lowest that every alpha has); alpha = inf as a dashed line."""
    from matplotlib.figure import Figure
    found = {alpha: by_level(rows, alpha, on, quantity) for alpha in sorted({row["alpha"] for row in rows})}
    if len(found) < 4:
        return
    figure = Figure(figsize=(8.3, 4.2), layout="constrained")
    ax = figure.subplots()
    levels = levels or sorted(set.intersection(*map(set, found.values())))
    for level, colour in zip(levels, ("#d55e00", "#0072b2", "#009e73")):
        points = {alpha: interval(found[alpha][level]) for alpha in found if level in found[alpha]}
        if math.inf in points:
            ax.axhline(points.pop(math.inf)[0], color=colour, linestyle="--")
        mean, low, high = np.array(list(points.values()), float).reshape(-1, 3).T  # None, below three runs: nan
        ax.errorbar(list(points), mean, [mean - low, high - mean], fmt="o-", color=colour, label=f"{on} {level:g}")
    ax.set(xscale="log", ylabel=quantity.replace("_", " "), xlabel="α (dashed: α = ∞, exactly linear)")
    ax.legend()
    save_figure(figure, o.out, f"{o.script}_alphas")


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

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class Add(argparse.Action):
    """Given twice, an option adds its values. (argparse's own "extend" adds them to the default, too.)"""

    def __call__(self, parser, namespace, values, option=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else before + values)


def number(kind, at_least=-math.inf, above=-math.inf, below=math.inf):
    """An argparse type: a number of a kind (int or float) within bounds."""
    named = (("at least", at_least), ("above", above), ("below", below))
    bounds = " and ".join(f"{word} {bound}" for word, bound in named if abs(bound) < math.inf)

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (at_least <= value and above < value < below):
            what = "a whole number" if kind is int else "a number"
            hint = " (separate several by spaces)" if "," in text else ""
            raise argparse.ArgumentTypeError(f"must be {what} {bounds}, not {text}{hint}")
        return value

    return convert


def alpha_type(text):
    """An argparse type: a number above 0, or inf, with as many digits as a folder's name has."""
    alpha = math.inf if text == "inf" else number(float, above=0)(text)
    if float(f"{alpha:g}") != alpha:
        raise argparse.ArgumentTypeError(f"must have at most six digits, since folders are named by it, not {text}")
    return alpha


def parser(file, doc):
    """The options that all four scripts share; file: the script's, doc: its docstring."""
    title, _, rest = doc.partition("\n")
    script = pathlib.Path(file).stem
    made = Parser(prog=f"{script}.py", description=title, epilog=rest.strip("\n"), allow_abbrev=False,
                  formatter_class=Formatter)
    made.set_defaults(script=script, script_crc32=zlib.crc32(pathlib.Path(file).read_bytes()))
    add = made.add_argument
    add("--alpha", nargs="+", action=Add, type=alpha_type, default=[1.0, 100.0], metavar="A",
        help="of f^a = a (f - f0); 1: rich, 100: lazy, inf: exactly linear")
    add("--lr", type=number(float, above=0), default=.01, metavar="X", help="learning rate, before division by alpha^2")
    add("--width", type=number(int, at_least=1), default=64, metavar="N", help="of the network's first layer")
    add("--dtype", choices=["float32", "float64"], default="float32", help="float64 for very large alpha")
    devices = ["auto", "cpu"]  # no mps: it has no float64
    if torch.cuda.is_available():
        devices += ["cuda", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    add("--device", choices=devices, default="auto", help="auto: a GPU if there is one")
    add("--jobs", type=number(int, at_least=0), default=1, metavar="N",
        help="runs side by side; 0: one a core, on a GPU one (from the command line 0)")
    add("--out", type=os.path.expanduser, default=f"runs/{script}", metavar="DIR", help="records and figures")
    add("--quick", action=argparse.BooleanOptionalAction, default=False,
        help="a demonstration in under a minute; explicit options win")
    add("--draw-only", action=argparse.BooleanOptionalAction, default=False, help="train nothing, draw all it holds")
    return made


def image_parser(file, doc):
    """The options of the three scripts that train on images."""
    made = parser(file, doc)
    add, count = made.add_argument, number(int, at_least=1)
    add("--seeds", nargs="+", action=Add, type=number(int, at_least=0, below=2**31), default=[0], metavar="S",
        help="one run an alpha and seed")
    add("--dataset", type=os.path.expanduser, default="cifar10", metavar="DATA",
        help="cifar10, synthetic, or a file FILE.npz (see README.md)")
    add("--data-dir", type=os.path.expanduser, default="data", metavar="DIR", help="where downloads go")
    add("--epochs", type=count, default=2500, metavar="N", help="at most so many passes over the training set")
    add("--stop-loss", type=number(float, at_least=0), default=.01, metavar="X",
        help="end a run whose mean training loss, over five probes, is below")
    add("--momentum", type=number(float, at_least=0, below=1), default=.9, metavar="X", help="of SGD")
    add("--batch-size", type=count, default=125, metavar="N", help="examples a step")
    add("--subset", type=count, metavar="N", help="train on so many examples only, drawn with the seed")
    add("--group-size", type=count, default=1000, metavar="N", help="examples of a group that a probe evaluates")
    add("--probe-examples", type=count, default=100, metavar="N", help="held-out examples, for the linearity measures")
    add("--checkpoint-seconds", type=number(float, at_least=0), default=60.0, metavar="X",
        help="time between checkpoints")
    return made


def parse(made, quick, loss, words, options):
    """One call's options as a namespace: the parser's defaults, then those of --quick, then words (a command line) and
    options (keywords), which go through the same parser. Raises ValueError, one line, for whatever is wrong."""
    words = list(words)
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (list, tuple, range, np.ndarray)):
            words += [f"--{flag}", *map(str, value)]
        elif value is not None:
            words.append(f"--{flag}={value}")
    made.epilog += "\n\n--quick: " + ", ".join(f"{name} {value}" for name, value in quick.items())
    if "--quick" in words:
        made.set_defaults(**quick, out=f"{made.get_default('out')}_quick")
    o = made.parse_args(words)
    if o.device == "auto":
        o.device = "cpu"
        if torch.cuda.is_available():  # under torchrun each process has its own
            o.device = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    o.alpha, o.device, o.dtype = sorted(set(o.alpha)), torch.device(o.device), getattr(torch, o.dtype)
    o.loss = name_of(loss)
    if "seeds" in o:
        o.seeds = sorted(set(o.seeds))
    if o.dtype == torch.float32 and not o.draw_only and any(1000 <= alpha < math.inf for alpha in o.alpha):
        print("warning: above alpha = 1000 float32 rounds part of each step away: --dtype float64, or --alpha inf")
    return o


def sweep(o, run, conclude, draw, load, *what):
    """Train what --out does not hold yet, run(alpha, seed, load(*what), o) for each pair; then from every run that is
    there rows, pairs, conclusion = conclude(o, runs), which prints, and draw(o, rows, pairs). Returns the summary.
    Under torchrun each process takes its share of the pairs, and whoever finds every run ended concludes."""
    if not o.draw_only:
        pairs = [(alpha, seed) for seed in o.seeds for alpha in o.alpha]
        o.data_crc32 = crc32(np.asarray(v) for _, v in sorted(load(*what).items())
                             if isinstance(v, (list, np.ndarray)))
        check_out(o.out, identity(o), warn=True)
        missing = [pair for pair in share_of_rank(pairs) if needs_training(folder_of(o, *pair), o)]
        tasks = [(run, *pair, o, load, *what) for pair in missing]
        for _ in side_by_side(o, load_and_run, tasks, threads=1 if o.quick else None):
            pass
        if any(needs_training(folder_of(o, *pair), o) for pair in pairs):
            print("not all runs have ended: another process is at work on them, or else the same command goes on")
            return {}
    runs = read_runs(o.out)
    args = read_args(folder_of(o, min(runs), min(runs[min(runs)])))
    if args["script"] != o.script:
        raise ValueError(f"{o.out} holds runs of {args['script']}.py: choose another --out")
    o.dataset, o.loss = args["dataset"], args.get("loss", o.loss)  # earlier versions did not name the loss
    o.about = ", ".join([args["network"], o.loss] if "network" in args else [o.loss])
    diverged = []
    for alpha, seeds in runs.items():
        for seed, records in seeds.items():
            ended, name = records[-1].get("ended"), folder_of(o, alpha, seed).name
            if not ended:
                print(f"{name} has not ended: it is read as far as it has come")
            if ended == "diverged":
                diverged.append(name)
    rows, pairs, conclusion = conclude(o, runs)
    draw(o, rows, pairs)
    return write_summary(o, args, rows, pairs, diverged, conclusion)


def load_and_run(run, alpha, seed, o, load, *what):
    """A run reads its data anew. (Handed to a child of --jobs that dies, images would fill a pipe that none reads.)"""
    loss = run.__globals__.get("loss_of")
    if loss and name_of(loss) != o.loss:
        raise ValueError("a child of --jobs reads the script's file, and its loss is not this process's: --jobs 1")
    run(alpha, seed, load(*what), o)


def write_summary(o, args, rows, pairs, diverged, conclusion):
    """Write OUT/summary.json and return what it holds; an alpha of inf is the string "inf" there."""
    def named(row):
        return {key: "inf" if key in ("alpha", "minus") and value == math.inf else value for key, value in row.items()}

    line = json_line({"options": args, "readings": [named(row) for row in rows], "diverged": diverged,
                      "differences": [named(row) for row in pairs], "conclusion": conclusion})
    summary = json.loads(line, parse_float=lambda text: float(f"{float(text):.6g}"))
    write_atomically(pathlib.Path(o.out) / "summary.json", json_line(summary))
    print(f"\nwrote {o.out}/summary.json and the picture beside it")
    return summary


def share_of_rank(tasks):
    """This process's share of the tasks: all, or under torchrun every WORLD_SIZE-th."""
    return tasks[int(os.environ.get("RANK", 0))::int(os.environ.get("WORLD_SIZE", 1))]


def side_by_side(o, work, tasks, threads=None):
    """Yield work(*task) as the tasks end, --jobs processes at a time (1: in this process), each with its share of the
    cores, or so many threads: those of small networks only wait for each other. The first exception, or Ctrl-C, ends
    all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = o.jobs or (1 if o.device.type == "cuda" or "WORLD_SIZE" in os.environ else cores)
    jobs = max(1, min(jobs, len(tasks)))
    work = functools.partial(exactly, work, threads or max(1, min(torch.get_num_threads(), cores) // jobs))
    if jobs == 1:
        yield from itertools.starmap(work, tasks)
        return
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with concurrent.futures.ProcessPoolExecutor(jobs, context, start_child) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(work, *task) for task in tasks]):
                yield future.result()
        except concurrent.futures.BrokenExecutor:
            raise OSError("a process of --jobs has died (killed, out of memory, or started from a script without the "
                          "line if __name__ == '__main__'); the same command goes on, fewer --jobs need less memory"
                          ) from None
        finally:
            for child in set(multiprocessing.active_children()) - others:
                child.kill()


def exactly(work, threads, *task):
    """work(*task) in true float32: TF32, cuDNN's default, keeps 10 bits of the mantissa, and alpha multiplies what it
    rounds off. With gradients and float32 weights, whatever the caller has set, and on so many threads."""
    before, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad(), true_float32():
            return work(*task)
    finally:
        torch.set_num_threads(before)
        torch.set_default_dtype(dtype)


def start_child():
    """In a child of --jobs: its GPU; its end when the parent's comes; Ctrl-C is the parent's business."""
    if torch.cuda.is_available():
        number = multiprocessing.current_process()._identity[-1]  # 1, 2, ...
        torch.cuda.set_device(number % torch.cuda.device_count())
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*deprecated")
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def command_line(main):
    """Run main(*words) as a program: one line and exit code 2 for bad input, 130 for Ctrl-C, 1 if a run diverged."""
    script = os.path.basename(sys.argv[0])
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot print a character ends no run
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*deprecated")  # torch's own, on its first jvp
    try:
        sys.exit(1 if main("--jobs", "0", *sys.argv[1:]).get("diverged") else 0)
    except KeyboardInterrupt:
        print(f"\n{script}: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
    except RuntimeError as error:
        if "memory" not in str(error):  # torch's own class on a GPU, a plain RuntimeError on a CPU
            raise
        print(f"{script}: out of memory: {str(error).splitlines()[0][:200]} Try a smaller --subset, --probe-examples, "
              "--width or --batch-size", file=sys.stderr)
    sys.exit(2)
