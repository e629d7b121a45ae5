"""The README keeps its promises: commands run, links and pictures exist, numbers are those of the records, functions
can be pasted elsewhere."""
import ast
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import common
import toy
from conftest import ROOT, small_arrays

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
COMMANDS = [line.split(" #")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()
            if line.strip() and not line.startswith("#")]
SCRIPTS = {"toy": dict(runs=2, iterations=200, width=8, jobs=1)}
for name in ("noisy", "cscore", "spurious"):
    SCRIPTS[name] = dict(dataset="tiny.npz", width=4, batch_size=10, epochs=2, subset=40, probe_examples=4,
                         device="cpu", jobs=1)


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if "pip install -r" not in c}))
def test_command(command, tmp_path, monkeypatch):
    """Every command, on tiny data and briefly: a scalar given last wins, and one seed is enough."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    if "pytest" in words:
        words = words[words.index("-m"):] + ["--collect-only", "-q"]  # without installing pytest again
        assert subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True).returncode == 0
        return
    while not words[0].endswith(".py"):
        words = words[1:]  # python, or torchrun and its options
    np.savez("tiny.npz", **small_arrays())
    name = words[0].removesuffix(".py")
    if "--seeds" in words:  # as many seeds as named would take long
        first = words.index("--seeds")
        last = next((k for k in range(first + 1, len(words)) if words[k].startswith("--")), len(words))
        words = words[:first + 2] + words[last:]
    try:
        assert __import__(name).main(*words[1:], out="out", **SCRIPTS[name])["conclusion"]
    except ValueError as error:  # so short an animation reaches no training loss that it could show
        assert "animat" in str(error)


@pytest.mark.parametrize("k", [k for k, (kind, _) in enumerate(BLOCKS) if kind == "python"])
def test_python_block(k, tmp_path, monkeypatch, capsys):
    """Every snippet runs, and prints what the text says."""
    monkeypatch.chdir(tmp_path)
    source = BLOCKS[k][1]
    if "points(n)" in source:
        assert len(source.splitlines()) <= 40
        source = source.replace("range(3)", "range(1)").replace("4000", "400").replace("4001", "401")
    exec(source.replace("quick=True", "quick=True, epochs=1, seeds=[0], subset=50"), {})
    out = capsys.readouterr().out
    if "theta, s0" in source:
        gaps = [float(gap) for gap in re.findall(r"minus easy ([.\d]+)", out)]
        assert gaps == sorted(gaps, reverse=True) and len(set(gaps)) == 5  # it falls strictly
        assert ", ".join(f"{gap:.3f}".lstrip("0") for gap in gaps) in README


def test_length_links_and_pictures():
    assert len(README) <= 12000
    links = re.findall(r"\]\(([^)#]+)\)|(?:src|href)=\"([^\"#]+)\"", README)
    relative = [a or b for a, b in links if not (a or b).startswith("http")]
    assert len(relative) > 4
    for link in relative:
        assert (ROOT / link).exists(), link


def plain(text):
    """The README's numbers as JSON's: −.05 is -0.05."""
    return re.sub(r"(?<![\d.])\.(\d)", r"0.\1", text.replace("−", "-"))


def summary_of(folder):
    return json.loads((ROOT / "figures" / folder / "summary.json").read_text())


@pytest.mark.parametrize("folder", ["toy", "cscore", "noisy", "dominoes"])
def test_the_verdicts_are_the_scripts_own_sentences(folder):
    assert summary_of(folder)["conclusion"] in " ".join(README.split())


def mean(folder, alpha, on, level, quantity):
    values = [row[quantity] for row in summary_of(folder)["readings"]
              if (row["alpha"], row["on"], row["level"]) == (alpha, on, level) and row[quantity] is not None]
    return np.mean(values)


def paired(folder, alpha, on, level, quantity):
    row, = common.where(summary_of(folder)["differences"], alpha=alpha, on=on, level=level, quantity=quantity)
    return row["mean"]


DECILES = [f"decile_{d}_loss" for d in (1, 3, 8, 10)]
CLAIMS = {  # start of the row: the numbers from the records behind the figures
    "Toy: in the discs": lambda: [paired("toy", 1, "train_loss", level, "inside_loss") for level in (.5, .4, .3)],
    "Toy: the same outside": lambda: [paired("toy", 1, "train_loss", level, "outside_loss") for level in (.5, .4, .3)],
    "Toy: median iterations": lambda: np.median(toy.read(ROOT / "figures" / "toy")[100.0]["iteration"][:, :3], 0),
    "C-scores: deciles 1, 3, 8, 10 at loss .5": lambda: [mean("cscore", 1, "mean_train_loss", .5, d) for d in DECILES],
    "C-scores: the same at 1.0, α = 1 ": lambda: [mean("cscore", 1, "mean_train_loss", 1, d) for d in DECILES],
    "C-scores: the same at 1.0, α = 100": lambda: [mean("cscore", 100, "mean_train_loss", 1, d) for d in DECILES],
    "C-scores: deciles 1–5": lambda: [row["mean"] for row in common.differences(
        [row for row in summary_of("cscore_5k")["readings"] if row["seed"] > 2 and row["level"] in (1.61, 1.49)],
        ["half_gap"])],
    "Noisy: noisy loss at clean 1.0": lambda: [
        mean("noisy", alpha, "clean_loss", 1, "noisy_loss") for alpha in (1, 100)],
    "Noisy: the same at .5, α = 1": lambda: [mean("noisy", 1, "clean_loss", .5, "noisy_loss")],
    "Noisy: smallest test loss": lambda: [
        np.mean([common.curve(records)["test_loss"].min() for records in seeds.values()])
        for seeds in common.read_runs(ROOT / "figures" / "noisy").values()],
    "Noisy: beyond the control": lambda: [
        paired("noisy_control", 1, "clean_loss", level, "noisy_minus_control") for level in (1.03, 1)],
    "Noisy: noisy loss minus": lambda: [row["mean"] for row in common.where(
        summary_of("noisy_5k")["differences"], on="clean_loss", level=1.26, quantity="noisy_loss")],
    "Dominoes: gap": lambda: [mean("dominoes", alpha, "mean_train_loss", .312, "gap") for alpha in (1, 100)],
    "Dominoes: accuracy": lambda: [mean("dominoes", alpha, "with_acc", .9, "against_acc") for alpha in (1, 100)],
}


@pytest.mark.parametrize("start", CLAIMS)
def test_numbers_of_the_claim_table(start):
    line, = [line for line in README.splitlines() if line.startswith(f"| {start}")]
    written = re.findall(r"-?[\d.]+", plain(line.split("|")[3]))  # | claim | paper | ours | where |
    for text, value in zip(written, CLAIMS[start](), strict=True):
        assert float(text) == pytest.approx(value, abs=.51 * 10**-len(text.partition(".")[2])), (text, value)


def test_no_machine_paths():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("tests/*.py"), *ROOT.glob("figures/**/*.json*")]:
        assert not re.search(r"[\"' =(](/(home|root|tmp|work|usr|mnt)/)", path.read_text().replace('"/(home', "")), path


@pytest.mark.parametrize("folder", sorted({path.parent.name for path in ROOT.glob("figures/*/alpha=*")}))
def test_figures_can_be_drawn_again_from_what_is_kept(folder, tmp_path):
    """Records of earlier versions, too: their args.json is nested, their records have more keys."""
    name = {"dominoes": "spurious"}.get(folder, folder.split("_")[0])
    shutil.copytree(ROOT / "figures" / folder, tmp_path / folder)
    again = __import__(name).main(out=str(tmp_path / folder), draw_only=True)
    assert again == summary_of(folder)
    tracked = {path.name for path in (ROOT / "figures" / folder).iterdir() if path.suffix != ".pdf"}
    assert {path.name for path in (tmp_path / folder).iterdir() if path.suffix != ".pdf"} == tracked


def section_names():
    """Public functions and classes of the first three sections of common.py."""
    source = (ROOT / "common.py").read_text()
    end = source[:source.index("# 4  The networks")].count("\n")
    return [n.name for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.lineno < end]


def pasted(name):
    """`name` in a namespace with nothing but torch, its own source and that of the names under its "Needs:"."""
    doc = inspect.getdoc(getattr(common, name)) or ""
    needs = re.search(r"Needs: ([\w, \n]+)\.", doc)
    needs = [n.strip() for n in needs.group(1).split(",")] if needs else []
    assert len(needs) <= 3, name
    namespace = {}
    exec("import contextlib, copy, math, torch\nimport torch.nn.functional as F\nfrom torch import nn\n", namespace)
    for n in [*needs, name]:
        exec(inspect.getsource(getattr(common, n)), namespace)
    return namespace[name]


def net(seed=0):
    torch.manual_seed(seed)
    return common.mlp([4, 6, 3]).double()


X = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)
K, K2 = (lambda A: A @ A.T)(X + 1), (lambda A: A @ A.T)(X**2)


def moved(f):
    for p in f.parameters():
        p.data += .1 * p.requires_grad
    return f


EXAMPLES = {
    "center": lambda g: moved(g(net(), 2.0))(X),
    "CenteredModel": lambda g: moved(g(net(), 2.0))(X),
    "LinearizedModel": lambda g: moved(g(net()))(X),
    "check_deterministic": lambda g: torch.tensor(g(net()) is None),
    "scaled_sgd": lambda g: torch.tensor(g(common.center(net(), 10.0), .5, .9).param_groups[0]["lr"]),
    "empirical_ntk": lambda g: g(net(), X),
    "true_float32": lambda g: torch.tensor(g().__enter__() is None),
    "Jacobian": lambda g: (lambda J: J.product(J))(g(net(), X, 2**30, True)),
    "kernel_alignment": lambda g: torch.tensor(g(K, K2, True)),
    "relu_signs": lambda g: g(net(), X),
    "sign_similarity": lambda g: torch.tensor(g(X > 0, X > .5)),
    "representation": lambda g: g(net(), X),
    "representation_alignment": lambda g: torch.tensor(g(X, X**2)),
    "linearisation_error": lambda g: torch.tensor(g(moved(common.center(net(), 2.0)), X)),
}


@pytest.mark.parametrize("name", section_names())
def test_pasted_elsewhere(name):
    assert torch.equal(EXAMPLES[name](pasted(name)), EXAMPLES[name](getattr(common, name)))


def test_importing_does_no_work():
    code = "import sys, torch; before = torch.get_rng_state(); import common, toy, cscore, noisy, spurious; " \
           "assert 'matplotlib' not in sys.modules and 'torchvision' not in sys.modules; " \
           "assert torch.equal(torch.get_rng_state(), before)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
