import json
import pathlib
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Small networks gain nothing from threads, and results stay bit-equal between this process and its children; no
    test draws what depends on the tests before it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def tiny_arrays(n=60, classes=3, size=8, seed=0):
    """Images that a small network learns in seconds: a bright bar whose place is the class, under noise."""
    rng = np.random.default_rng(seed)

    def split(n):
        y = np.arange(n) % classes
        x = rng.integers(0, 100, (n, size, size, 3))
        for i, c in enumerate(y):
            x[i, :, 2 * c:2 * c + 2] += 120
        return x.astype(np.uint8), y, rng.uniform(size=n)

    arrays = {}
    for name, count in (("train", n), ("test", 30)):
        arrays[f"x_{name}"], arrays[f"y_{name}"], arrays[f"score_{name}"] = split(count)
    return arrays


def small_arrays(train=(30, 4, 3, 30), test=(5, 5, 5, 5), size=8):
    """Counts of the cells 00, 01, 10, 11 -> arrays. The label is a bar's place, the attribute the brightness."""
    rng, arrays = np.random.default_rng(0), {}
    for split, counts in (("train", train), ("test", test)):
        y, attribute = np.repeat([0, 0, 1, 1], counts), np.repeat([0, 1, 0, 1], counts)
        x = rng.integers(0, 60, (len(y), size, size, 3)) + 80 * attribute[:, None, None, None]
        x[y == 0, :, :2] += 60
        x[y == 1, :, 4:6] += 60
        arrays.update({f"x_{split}": x.astype(np.uint8), f"y_{split}": y, f"attribute_{split}": attribute,
                       f"score_{split}": rng.uniform(size=len(y))})
    return arrays


@pytest.fixture
def tiny(tmp_path):
    np.savez(tmp_path / "tiny.npz", **tiny_arrays())
    return tmp_path / "tiny.npz"


# Options with which a whole experiment on `tiny` takes about a second.
TINY = dict(alpha=[1, 100], epochs=6, width=4, batch_size=10, lr=.01, probe_examples=6, device="cpu")


def refused(match, function, *arguments, **options):
    """function(...) is a ValueError or an OSError, in one line that matches."""
    with pytest.raises((ValueError, OSError), match=match) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 3000


def records_of(folder):
    """The records of a run's log.jsonl, each strict JSON."""
    return [json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is not strict JSON"))
            for line in (folder / "log.jsonl").read_text().splitlines()]


def jacobian(model, x):
    """(N, C, P), one autograd call an example and output."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        f = model(x[i:i + 1].clone()).flatten()
        for output in f:
            gradients = torch.autograd.grad(output, parameters, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.to_dense().flatten() for g in gradients]))
    return torch.stack(rows).view(len(x), len(f), -1)


class Square(torch.autograd.Function):
    """No forward mode, no vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g
