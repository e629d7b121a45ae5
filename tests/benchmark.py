"""Speed as ratios against plain baselines in the same process.

    python tests/benchmark.py [step] [ntk] [toy] [probe]

Absolute times depend on the machine and on what else it is doing; compare lines of one run. Prints the machine first.
"""
import pathlib
import platform
import resource
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import common
import toy


def seconds(*functions, repeats=9):
    """Median seconds of each function, called in turn so that a machine that slows down slows them all."""
    times = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, taken in zip(functions, times):
            begin = time.perf_counter()
            function()
            if repeat > 0:  # the first is a warm-up
                taken.append(time.perf_counter() - begin)
    return [float(np.median(taken)) for taken in times]


def plain_convolutions(model):
    """The same network with torch's own convolutions throughout."""
    for module in model.modules():
        if isinstance(module, common.Conv):
            module.__class__ = torch.nn.Conv2d
    return model


def step_of(model, alpha, x, y):
    """One training step of f^alpha, as the scripts take it."""
    f = common.center(model, alpha)
    optimizer = common.scaled_sgd(f, .01, .9)
    f0 = common.outputs(f.model0, x)

    def step():
        loss = F.cross_entropy(f(x, f0), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def paper_step(x, y):
    """The step as one would write it down: both networks, momentum, .item() for the log; torch's convolutions."""
    model, frozen = plain_convolutions(common.resnet18(10)), plain_convolutions(common.resnet18(10))
    optimizer = torch.optim.SGD(model.parameters(), .01, .9)

    def step():
        with torch.no_grad():
            f0 = frozen(x)
        loss = F.cross_entropy(model(x) - f0, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()
    return step


def bench_step():
    torch.manual_seed(0)
    print("\nstep of ResNet18, width 64, batch 125, 32 x 32 images")
    x, y = torch.randn(125, 3, 32, 32), torch.randint(10, (125,))
    ours, torchs = step_of(common.resnet18(10), 1.0, x, y), step_of(plain_convolutions(common.resnet18(10)), 1.0, x, y)
    linear = step_of(common.resnet18(10), float("inf"), x, y)
    t, t_torchs, t_paper, t_linear = seconds(ours, torchs, paper_step(x, y), linear)
    print(f"  alpha = 1                       {t:8.4f} s\n"
          f"  with torch's convolutions       {t_torchs:8.4f} s   {t_torchs / t:.2f} x\n"
          f"  and f_theta0, .item() each step {t_paper:8.4f} s   {t_paper / t:.2f} x\n"
          f"  alpha = inf                     {t_linear:8.4f} s   {t_linear / t:.2f} x")


def jacrev(model, x):
    """The kernel by its definition."""
    theta = {name: p.detach() for name, p in model.named_parameters()}
    f = lambda theta, one: torch.func.functional_call(model, theta, (one[None],))[0]
    J = torch.func.vmap(torch.func.jacrev(f), (None, 0))(theta, x)
    J = torch.cat([part.flatten(2) for part in J.values()], 2)
    return torch.einsum("icp,jep->icje", J, J)


def bench_ntk():
    torch.manual_seed(0)
    print("\nNTK of ResNet18, all 10 outputs, exact and checked")
    model = common.resnet18(10)
    for n in (25, 50, 100):
        x = torch.randn(n, 3, 32, 32)
        t, t_torchs = seconds(lambda: common.empirical_ntk(model, x),
                              lambda: common.empirical_ntk(plain_convolutions(common.resnet18(10)), x), repeats=3)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"  {n:>3} examples {t:7.2f} s   with torch's convolutions {t_torchs / t:.2f} x   "
              f"peak memory so far {peak:.2f} GiB")
    x = torch.randn(10, 3, 32, 32)
    t, t_jacrev = seconds(lambda: common.empirical_ntk(model, x), lambda: jacrev(model, x), repeats=1)
    print(f"   10 examples {t:7.2f} s   vmap(jacrev) and a product {t_jacrev / t:.0f} x")


def bench_probe():
    """Probing's share of a rich run, from the time of a group, of the linearity measures and of a step."""
    torch.manual_seed(0)
    x, y = torch.randn(1000, 3, 32, 32), torch.randint(10, (1000,))
    f = common.center(common.resnet18(10), 1.0)
    f0, linearity = common.outputs(f.model0, x), common.Linearity(f, x[:100])
    t_step, t_group, t_linearity = seconds(step_of(common.resnet18(10), 1.0, x[:125], y[:125]),
                                           lambda: common.outputs(f, x, f0), linearity, repeats=3)
    print(f"\nprobe: {t_group:.2f} s a group of 1,000, {t_linearity:.2f} s the linearity measures, {t_step:.3f} s a "
          "step")
    for examples, epochs in ((40000, 11), (40000, 200), (4068, 12)):
        total = epochs * (examples // 125)
        probes = len(common.schedule(examples // 125, total))
        looking = probes * 3 * t_group + (probes / 5 + 1) * t_linearity
        share = looking / (looking + total * t_step)
        print(f"  {examples:>6} images, {epochs:>3} epochs: {probes:>3} probes of three groups, {share:.0%} of the run")


def bench_toy(chunk=25, iterations=200):
    """Training of the toy experiment, per run and iteration: as one against a plain network alone."""
    options = common.parse(common.parser(toy.__file__, toy.__doc__), {}, [], {"device": "cpu"})
    options.extra_dims, options.iterations = 5, iterations

    def as_one():
        list(toy.train(range(chunk), 1.0, options, [0.0], {run: [] for run in range(chunk)}))

    def alone():
        f = common.center(toy.network(0, options), 1.0)
        optimizer = torch.optim.SGD(f.model.parameters(), lr=options.lr)
        x = toy.points(0, options)[0].float()
        y = toy.label(x)[0]
        for _ in range(iterations):
            loss = toy.loss_of(-y * f(x)[:, 0]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    t, t_alone = seconds(as_one, alone, repeats=5)
    t, t_alone = 1e6 * t / iterations / chunk, 1e6 * t_alone / iterations
    print(f"\ntoy, {chunk} runs as one: {t:.0f} us a run and iteration; a plain network alone {t_alone / t:.1f} x")


if __name__ == "__main__":
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    benchmarks = {"step": bench_step, "ntk": bench_ntk, "toy": bench_toy, "probe": bench_probe}
    for name in sys.argv[1:] or benchmarks:
        benchmarks[name]()
