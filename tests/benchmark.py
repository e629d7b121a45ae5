"""Speed as ratios against plain baselines in the same process.

    python tests/benchmark.py [step] [ntk] [toy] [checkpoint]

Absolute times depend on the machine and on what else it is doing; compare lines of one run. Prints the machine first.
"""
import pathlib
import platform
import resource
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import common
import toy


def seconds(*functions, repeats=9):
    """Median seconds of each function, called in turn so that a machine that slows down slows them all."""
    for f in functions:
        f()
    times = [[] for _ in functions]
    for _ in range(repeats):
        for f, t in zip(functions, times):
            begin = time.perf_counter()
            f()
            t.append(time.perf_counter() - begin)
    return [float(np.median(t)) for t in times]


def matrix_rate(batch=0, n=1500):
    """GFLOP/s of a large matrix product, or of `batch` small ones at once."""
    a, b = (torch.randn(*([batch] if batch else []), n, n) for _ in range(2))
    t, = seconds(lambda: a @ b)
    return 2 * max(batch, 1) * n**3 / t / 1e9


def counted(f):
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops() / 1e9


def bench_step():
    """One training step of ResNet18, batch 125, 32 x 32 images."""
    torch.manual_seed(0)
    x, y = torch.randn(125, 3, 32, 32), torch.randint(10, (125,))

    def ours(alpha):
        f = common.center(common.resnet18(10), alpha)
        optimizer = common.scaled_sgd(f, .01, .9)
        f0 = None if alpha == float("inf") else f.model0(x)

        def step():
            optimizer.zero_grad()
            F.cross_entropy(f(x, f0), y).backward()
            optimizer.step()
        return step

    model, frozen = common.resnet18(10), common.resnet18(10)
    optimizer = torch.optim.SGD(model.parameters(), .01, .9)

    def plain():
        optimizer.zero_grad()
        with torch.no_grad():
            f0 = frozen(x)
        loss = F.cross_entropy(1.0 * (model(x) - f0), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    t_plain, t_ours, t_inf = seconds(plain, ours(1.0), ours(float("inf")))
    flops, rate = counted(ours(1.0)), matrix_rate()
    a, b = torch.randn(2**26), torch.randn(2**26)
    t_add, = seconds(lambda: a.add_(b))
    bandwidth = 3 * a.nbytes / t_add / 1e9
    update = 5 * 4 * sum(p.numel() for p in model.parameters()) / 1e9
    print(f"\nstep, ResNet18, batch 125: {flops:.1f} GFLOP, update {update:.3f} GB")
    print(f"  floor        {flops / rate + update / bandwidth:8.4f} s   (matrix rate {rate:.0f} GFLOP/s, "
          f"bandwidth {bandwidth:.0f} GB/s)")
    print(f"  alpha = 1    {t_ours:8.4f} s   {flops / t_ours:.0f} GFLOP/s")
    print(f"  plain loop   {t_plain:8.4f} s   {t_plain / t_ours:.2f} x (f_theta0 and .item() each step, no fusion)")
    print(f"  alpha = inf  {t_inf:8.4f} s   {t_inf / t_ours:.2f} x a finite step")


def jacrev(model, x):
    f = lambda theta, one: torch.func.functional_call(model, theta, (one[None],))[0]
    theta = {name: p.detach() for name, p in model.named_parameters()}
    J = torch.func.vmap(torch.func.jacrev(f), (None, 0))(theta, x)
    J = torch.cat([j.flatten(2) for j in J.values()], 2)
    return torch.einsum("icp,jep->icje", J, J)


def bench_ntk():
    torch.manual_seed(0)
    model = common.resnet18(10)
    print(f"\nNTK of ResNet18, all outputs, exact ({matrix_rate():.0f} GFLOP/s matrix rate)")
    for C in (1, 10):
        net = common.resnet18(C)
        for n in (25, 50, 100):
            x = torch.randn(n, 3, 32, 32)
            t, = seconds(lambda: common.empirical_ntk(net, x), repeats=3)
            flops = counted(lambda: common.empirical_ntk(net, x))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"  N = {n:<4} C = {C:<3} {t:7.2f} s  {flops:7.0f} GFLOP  {flops / t:5.0f} GFLOP/s   "
                  f"peak memory so far {peak:.2f} GiB")
    x = torch.randn(10, 3, 32, 32)
    t, = seconds(lambda: common.empirical_ntk(model, x), repeats=5)
    t_jacrev, = seconds(lambda: jacrev(model, x), repeats=1)
    print(f"  N = 10, C = 10: {t:.3f} s; vmap(jacrev) and a product {t_jacrev:.1f} s, {t_jacrev / t:.0f} x")
    try:
        from nngeometry.gram import GramMatrix
    except ImportError:
        print("  nngeometry is not installed: not compared")
        return
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=10)
    begin = time.perf_counter()
    GramMatrix(model, loader)
    print(f"  nngeometry's dense GramMatrix, N = 10, C = 10: {(time.perf_counter() - begin) / t:.0f} x")


def bench_toy(repeats=7, chunk=25):
    """One step of the toy experiment, per run: batched against one plain network."""
    o = toy.common.parse(toy.make_parser(), toy.QUICK, [], dict(device="cpu"))
    batch = toy.Batch(range(chunk), 1.0, o)

    @torch.no_grad()
    def batched(steps=50):
        for _ in range(steps):
            margin = batch.y * batch.outputs()
            (F.softplus(-margin).mean((1, 2)) > 0).all()
            batch.step(-batch.y * torch.sigmoid(-margin) / toy.POINTS)

    x, _, grid = (t.float() for t in toy.points(0, o))
    y, grid_y = ((toy.label(o.task, t)[0] > 0).float() for t in (x, grid))
    f = common.center(toy.network(0, o), 1.0)
    optimizer = torch.optim.SGD(f.model.parameters(), lr=o.lr)

    def plain(steps=50, with_grid=False):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(f(x)[:, 0], y)
            loss.backward()
            optimizer.step()
            loss.item()
            if with_grid:
                with torch.no_grad():
                    F.binary_cross_entropy_with_logits(f(grid)[:, 0], grid_y).item()

    t, t_plain, t_grid = seconds(batched, plain, lambda: plain(with_grid=True), repeats=repeats)
    sizes = [2 + o.extra_dims, o.width, o.width, o.width, 1]
    flops = 3 * 2 * toy.POINTS * sum(a * b for a, b in zip(sizes, sizes[1:])) - 2 * toy.POINTS * sizes[0] * sizes[1]
    per_run = t / 50 / chunk
    print(f"\ntoy, one run and iteration ({chunk} runs at once)")
    us = lambda seconds: f"{1e6 * seconds:8.1f} us   "
    t_plain, t_grid = t_plain / 50, t_grid / 50
    print(f"  batched      {us(per_run)}{flops / per_run / 1e9:.0f} GFLOP/s (bmm: {matrix_rate(chunk, 64):.0f})")
    print(f"  plain        {us(t_plain)}{t_plain / per_run:.1f} x (f_theta0 and .item() each step)")
    print(f"  and its grid {us(t_grid)}{t_grid / per_run:.1f} x (the test grid at every iteration)")


def bench_checkpoint():
    """A checkpoint of ResNet18 with momentum, against the minute between two of them."""
    tensors = [p.detach() for p in common.resnet18(10).parameters()]
    with tempfile.TemporaryDirectory() as folder:
        state = {"log_bytes": 0, "parameters": tensors, "momentum": tensors}
        t, = seconds(lambda: common.save_checkpoint(pathlib.Path(folder), state, spare=True), repeats=5)
    print(f"\ncheckpoint: {t:.3f} s, {t / 60:.2%} of a run at one a minute")


if __name__ == "__main__":
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    benchmarks = {"step": bench_step, "ntk": bench_ntk, "toy": bench_toy, "checkpoint": bench_checkpoint}
    for name in sys.argv[1:] or benchmarks:
        benchmarks[name]()
