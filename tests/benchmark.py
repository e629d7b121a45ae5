"""Speed as ratios against plain baselines in the same process.

    python tests/benchmark.py [step] [ntk] [toy] [checkpoint] [probe]

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


def unchecked(model, x):
    """empirical_ntk without the check of its answer."""
    J = common.Jacobian(model, x, 2**30, structured=True)
    return J.product(J)


def bench_ntk():
    torch.manual_seed(0)
    print("\nNTK of ResNet18, all outputs, exact and checked")
    for C in (1, 10):
        model = common.resnet18(C)
        for n in (25, 50, 100):
            x = torch.randn(n, 3, 32, 32)
            t, t_unchecked = seconds(lambda: common.empirical_ntk(model, x), lambda: unchecked(model, x), repeats=3)
            flops = counted(lambda: common.empirical_ntk(model, x))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"  N = {n:<4} C = {C:<3} {t:7.2f} s  the check {1 - t_unchecked / t:4.0%}  {flops:6.0f} GFLOP  "
                  f"{flops / t:5.0f} GFLOP/s   peak memory so far {peak:.2f} GiB")
    x = torch.randn(10, 3, 32, 32)
    t, = seconds(lambda: common.empirical_ntk(model, x), repeats=5)
    t_jacrev, = seconds(lambda: jacrev(model, x), repeats=1)
    print(f"  N = 10, C = 10: {t:.3f} s; vmap(jacrev) and a product {t_jacrev:.1f} s, {t_jacrev / t:.0f} x")
    bench_nngeometry(model, x)
    bench_neural_tangents(model)


def bench_nngeometry(model, x):
    try:
        from nngeometry.gram import GramMatrix
    except ImportError:
        print("  nngeometry is not installed: not compared")
        return
    t, = seconds(lambda: common.empirical_ntk(model, x), repeats=5)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=len(x))
    begin = time.perf_counter()
    GramMatrix(model, loader)
    print(f"  nngeometry's dense GramMatrix, N = {len(x)}, C = 10: {(time.perf_counter() - begin) / t:.0f} x")


def bench_neural_tangents(model, sizes=(10, 25, 50)):
    """neural-tangents' structured derivatives of the same network in jax (0.6.5 with jax 0.4.20; a later jax does not
    run it), compiled, the compilation not counted."""
    try:
        import jax
        import neural_tangents
    except Exception as e:  # an unfitting pair of versions raises anything
        print(f"  neural-tangents cannot be imported ({type(e).__name__}): not compared")
        return
    theta = {name: jax.numpy.asarray(p.detach().numpy()) for name, p in model.named_parameters()}
    kernel = jax.jit(neural_tangents.empirical_ntk_fn(
        jax_resnet18, trace_axes=(), vmap_axes=0,
        implementation=neural_tangents.NtkImplementation.STRUCTURED_DERIVATIVES))
    print(f"  neural-tangents {neural_tangents.__version__}, jax {jax.__version__}, structured derivatives, C = 10:")
    for n in sizes:
        x = torch.randn(n, 3, 32, 32)
        images = jax.numpy.asarray(x.numpy())
        theirs = lambda: np.asarray(kernel(images, None, theta))  # (N, N, C, C)
        t, t_unchecked, t_theirs = seconds(lambda: common.empirical_ntk(model, x), lambda: unchecked(model, x),
                                           theirs, repeats=5)
        K = common.empirical_ntk(model, x).numpy()
        difference = np.linalg.norm(theirs().transpose(0, 2, 1, 3) - K) / np.linalg.norm(K)
        print(f"    N = {n:<4} {t_theirs:7.2f} s, {t_theirs / t:.1f} x ours, {t_theirs / t_unchecked:.1f} x ours "
              f"without the check; they agree to {difference:.0e}")


def jax_resnet18(theta, x):
    """common.resnet18's network in plain jax; theta: {name: array} as in torch, x (N, C, H, W)."""
    import jax
    relu = jax.nn.relu

    def conv(name, x, stride=1, padding=1):
        out = jax.lax.conv_general_dilated(x, theta[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2,
                                           dimension_numbers=("NCHW", "OIHW", "NCHW"))
        return out + theta[f"{name}.bias"][None, :, None, None]

    x = relu(conv("conv1", x, 2, 3))
    x = jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), [(0, 0), (0, 0), (1, 1), (1, 1)])
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            shortcut = conv(f"{name}.downsample", x, stride, 0) if stride > 1 else x
            h = relu(conv(f"{name}.conv1", x, stride))
            x = relu(shortcut + conv(f"{name}.conv2", h))
    return x.mean((2, 3)) @ theta["fc.weight"].T + theta["fc.bias"]


def bench_toy(repeats=7, chunk=25):
    """One step of the toy experiment, per run: batched against one plain network."""
    o = common.options("toy", toy.OPTIONS, toy.QUICK, dict(device="cpu"), toy.__file__)
    batch = toy.Batch(range(chunk), 1.0, o)

    def batched(steps=50):
        for _ in range(steps):
            loss = batch.loss()
            (loss > 0).all().item()
            batch.step(loss)

    x, _, grid = (t.float() for t in toy.points(0, o))
    y, grid_y = ((toy.label(points)[0] > 0).float() for points in (x, grid))
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
    import types
    with tempfile.TemporaryDirectory() as folder:
        training = types.SimpleNamespace(folder=pathlib.Path(folder), iteration=0, seconds=0.0, records=[],
                                         tensors=2 * [p.detach() for p in common.resnet18(10).parameters()])
        t, = seconds(lambda: common.Run.save(training), repeats=5)
    print(f"\ncheckpoint: {t:.3f} s, {t / 60:.2%} of a run at one a minute")


def bench_probe():
    """Probing's share of a rich run, from the time of a probe, a kernel and a step of ResNet18."""
    torch.manual_seed(0)
    f = common.center(common.resnet18(10), 1.0)
    optimizer = common.scaled_sgd(f, .01, .9)
    x, y = torch.randn(1000, 3, 32, 32), torch.randint(10, (1000,))
    f0 = common.outputs(f.model0, x)
    linearity = common.Linearity(f, x[:100], y[:100])

    def step():
        loss = F.cross_entropy(f(x[:125], f0[:125]), y[:125])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    t_step, t_group, t_linearity = seconds(step, lambda: common.outputs(f, x, f0), linearity, repeats=3)
    print(f"\nprobe: {t_group:.2f} s a group of 1,000, {t_linearity:.2f} s the linearity measures, {t_step:.3f} s a step")
    for examples, epochs in ((40000, 11), (40000, 200), (4068, 12)):
        total = epochs * (examples // 125)
        probes = len(common.schedule(examples // 125, total))
        looking = probes * 3 * t_group + (probes / 5 + 1) * t_linearity
        share = looking / (looking + total * t_step)
        print(f"  {examples:>6} images, {epochs:>3} epochs: {probes:>3} probes of three groups, {share:.0%} of the run")


if __name__ == "__main__":
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    benchmarks = {"step": bench_step, "ntk": bench_ntk, "toy": bench_toy, "checkpoint": bench_checkpoint, "probe": bench_probe}
    for name in sys.argv[1:] or benchmarks:
        benchmarks[name]()
