"""Speed as ratios against plain baselines in the same process.

    python tests/benchmark.py [step] [ntk]

Absolute times depend on the machine and on what else it is doing: compare lines of one run."""
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
import experiment


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


def step_of(network, alpha, x, y, as_written=False):
    """One training step of f^alpha, as the scripts take it; or as one would write it down: f_theta0, too, at each."""
    f = common.center(network, alpha)
    optimizer = common.scaled_sgd(f, .01, .9)
    f0 = experiment.outputs(f.model0, x)

    def step():
        with torch.no_grad():
            start = f.model0(x) if as_written else f0
        loss = F.cross_entropy(f(x, start), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item() if as_written else loss
    return step


def bench_step():
    print("\nstep of ResNet18, width 64, batch 125, 32 x 32 images")
    x, y = torch.randn(125, 3, 32, 32), torch.randint(10, (125,))
    ours, torchs = common.resnet18(10), plain_convolutions(common.resnet18(10))
    steps = [step_of(ours, 1.0, x, y), step_of(torchs, 1.0, x, y), step_of(torchs, 1.0, x, y, as_written=True)]
    t, t_torchs, t_paper, t_linear = seconds(*steps, step_of(ours, float("inf"), x, y))
    print(f"  alpha = 1                       {t:8.4f} s\n"
          f"  with torch's convolutions       {t_torchs:8.4f} s   {t_torchs / t:.2f} x\n"
          f"  and f_theta0, .item() each step {t_paper:8.4f} s   {t_paper / t:.2f} x\n"
          f"  alpha = inf                     {t_linear:8.4f} s   {t_linear / t:.2f} x")


def bench_ntk():
    print("\nNTK of ResNet18, all 10 outputs, exact and checked")
    model = common.resnet18(10)
    for n in (25, 50, 100):
        x = torch.randn(n, 3, 32, 32)
        t, = seconds(lambda: common.empirical_ntk(model, x), repeats=3)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"  {n:>3} examples {t:7.2f} s   peak memory so far {peak:.2f} GiB")


if __name__ == "__main__":
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in sys.argv[1:] or ("step", "ntk"):
        {"step": bench_step, "ntk": bench_ntk}[name]()
