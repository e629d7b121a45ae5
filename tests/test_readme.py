"""The READMEs keep their promises: commands run, links and pictures exist, numbers are those of the records, functions
can be pasted elsewhere."""
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
import experiment
import toy
from conftest import ROOT, small_arrays, tiny_arrays

README = (ROOT / "README.md").read_text()
ROWS = (ROOT / "figures" / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
COMMANDS += re.findall(r"\| `(python \w+\.py[^`]*)` \|", README)
SCRIPTS = {"toy": dict(runs=2, iterations=200, width=8)}
for name in ("noisy", "cscore", "spurious"):
    SCRIPTS[name] = dict(dataset="tiny.npz", width=4, batch_size=10, epochs=2, subset=40, probe_examples=4, seeds=[0],
                         stop_loss=.01)


@pytest.mark.parametrize("command", sorted(c for c in COMMANDS if "pip install -r" not in c))
def test_command(command, tmp_path, monkeypatch):
    """Every command, on tiny data and briefly: an option given last wins."""
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
    assert __import__(name).main(*words[1:], out="out", **SCRIPTS[name])["conclusion"]


def python_block(beginning):
    block, = [text for kind, text in BLOCKS if kind == "python" and text.startswith(beginning)]
    return block


def test_the_idea_in_40_lines(capsys):
    """It prints a positive difference in the discs, and is as long as it says."""
    source = python_block("import copy")
    assert len(source.splitlines()) <= 40
    threads = torch.get_num_threads()
    exec(source.replace("range(6)", "range(2)").replace("loss < .3", "loss < .5"), {})
    torch.set_num_threads(threads)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "(2)" in last and "= +" in last


def test_the_closed_form_prints_what_the_text_says(capsys):
    exec(python_block("import numpy"), {})
    gaps = [float(gap) for gap in re.findall(r"minus easy ([.\d]+)", capsys.readouterr().out)]
    assert gaps == sorted(gaps, reverse=True) and len(set(gaps)) == 5  # it falls strictly
    assert ", ".join(f"{gap:.3f}".lstrip("0") for gap in gaps) in README


def test_the_vision_transformer_takes_the_place_of_the_network(tmp_path):
    """A copy of noisy.py, its network replaced as the README says, trains."""
    source, function = (ROOT / "noisy.py").read_text(), inspect.getsource(__import__("noisy").network)
    (tmp_path / "my_vit.py").write_text(source.replace(function, python_block("class ViT")))
    for name in ("common.py", "experiment.py"):
        shutil.copy(ROOT / name, tmp_path)
    np.savez(tmp_path / "mine.npz", **tiny_arrays(size=32))
    words = "--dataset mine.npz --epochs 1 --batch-size 20 --probe-examples 4 --lr .01 --jobs 1 --alpha 1".split()
    done = subprocess.run([sys.executable, "my_vit.py", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/my_vit_mine/summary.json").read_text())["options"]["network"] == "ViT"


def test_length_links_and_pictures():
    assert len(README) <= 9000
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert len(links) > 6 and [link for link in links if not (ROOT / link).exists()] == []


def plain(text):
    return re.sub(r"(?<![\d.])\.(\d)", r"0.\1", text.replace("−", "-"))  # numbers as JSON's: −.05 is -0.05


def summary_of(folder):
    return json.loads((ROOT / "figures" / folder / "summary.json").read_text())


def where(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize("folder", ["toy", "cscore", "noisy", "dominoes"])
def test_the_verdicts_are_the_scripts_own_sentences(folder):
    assert summary_of(folder)["conclusion"] in " ".join(README.split())


def mean(folder, alpha, on, level, quantity):
    rows = where(summary_of(folder)["readings"], alpha=alpha, on=on, level=level)
    return np.mean([row[quantity] for row in rows if row[quantity] is not None])


def paired(folder, on, level, quantity, alpha=1):
    row, = where(summary_of(folder)["differences"], alpha=alpha, on=on, level=level, quantity=quantity)
    return row["mean"]


def half_gap(alpha, level):
    rows = where(summary_of("cscore_5k")["readings"], alpha=alpha, level=level)
    return np.mean([row["half_gap"] for row in rows if row["seed"] > 2])  # the declared ones


DECILES = [f"decile_{d}_loss" for d in (1, 3, 8, 10)]
CLAIMS = {  # start of the row: the numbers from the records behind the figures
    "Toy: in the discs": lambda: [paired("toy", "train_loss", level, "inside_loss") for level in (.5, .4, .3)],
    "Toy: the same outside": lambda: [paired("toy", "train_loss", level, "outside_loss") for level in (.5, .4, .3)],
    "Toy: median iterations": lambda: np.median(toy.read(ROOT / "figures" / "toy")[100.0]["iteration"][:, :3], 0),
    "C-scores: deciles 1, 3, 8, 10 at loss .5": lambda: [mean("cscore", 1, "mean_train_loss", .5, d) for d in DECILES],
    "C-scores: the same at 1.0, α = 1 ": lambda: [mean("cscore", 1, "mean_train_loss", 1, d) for d in DECILES],
    "C-scores: the same at 1.0, α = 100": lambda: [mean("cscore", 100, "mean_train_loss", 1, d) for d in DECILES],
    "C-scores: deciles 1–5": lambda: [half_gap(1, level) - half_gap(100, level) for level in (1.61, 1.49)],
    "Noisy: noisy loss at clean 1.0": lambda: [mean("noisy", a, "clean_loss", 1, "noisy_loss") for a in (1, 100)],
    "Noisy: the same at .5, α = 1": lambda: [mean("noisy", 1, "clean_loss", .5, "noisy_loss")],
    "Noisy: smallest test loss": lambda: [
        np.mean([experiment.curve(records)["test_loss"].min() for records in seeds.values()])
        for seeds in experiment.read_runs(ROOT / "figures" / "noisy").values()],
    "Noisy: beyond the control": lambda: [
        paired("noisy_control", "clean_loss", level, "noisy_minus_control") for level in (1.03, 1)],
    "Noisy: noisy loss minus that at α = ∞": lambda: [
        paired("noisy_5k", "clean_loss", 1.26, "noisy_loss", alpha) for alpha in (1, 3, 10, 30, 100)],
    "Noisy: noisy loss minus that at α = 100": lambda: [
        paired("noisy_5k_small", "clean_loss", 1.26, "noisy_loss", alpha) for alpha in (.3, 1)],
    "Dominoes: gap": lambda: [mean("dominoes", alpha, "mean_train_loss", .312, "gap") for alpha in (1, 100)],
    "Dominoes: accuracy": lambda: [mean("dominoes", alpha, "with_acc", .9, "against_acc") for alpha in (1, 100)],
    "Figure 2, rich": lambda: CLAIMS["C-scores: deciles 1, 3, 8, 10 at loss .5"](),
    "Figure 2, lazy": lambda: CLAIMS["C-scores: the same at 1.0, α = 100"](),
    "Figure 3: noisy loss": lambda: CLAIMS["Noisy: noisy loss at clean 1.0"](),
}


@pytest.mark.parametrize("start", CLAIMS)
def test_numbers_of_the_tables(start):
    line, = [line for line in (README + ROWS).splitlines() if line.startswith(f"| {start}")]
    written = re.findall(r"-?\d[\d.]*", plain(line.split("|")[3]))  # | claim | paper | ours |
    for text, value in zip(written, CLAIMS[start](), strict=True):
        assert float(text) == pytest.approx(value, abs=.51 * 10**-len(text.partition(".")[2])), (text, value)


def test_no_machine_paths():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("tests/*.py"), *ROOT.glob("figures/**/*.json*")]:
        assert not re.search(r"[\"' =(](/(home|root|tmp|work|usr|mnt)/)", path.read_text().replace('"/(home', "")), path


@pytest.mark.parametrize("folder", sorted({path.parent.name for path in ROOT.glob("figures/*/alpha=*")}))
def test_figures_can_be_drawn_again_from_what_is_kept(folder, tmp_path):
    name = {"dominoes": "spurious"}.get(folder, folder.split("_")[0])
    shutil.copytree(ROOT / "figures" / folder, tmp_path / folder)
    again = __import__(name).main(out=str(tmp_path / folder), draw_only=True)
    assert again == summary_of(folder) and (tmp_path / folder / f"{name}.pdf").exists()


def pasted(name):
    """`name` in a namespace with nothing but common.py's imports, its own source and that of the names it Needs."""
    needs = re.search(r"Needs: ([\w, \n]+)\.", inspect.getdoc(getattr(common, name)) or "")
    needs = [n.strip() for n in needs.group(1).split(",")] if needs else []
    namespace = {}
    exec("import contextlib, copy, math, torch\nimport torch.nn.functional as F\nfrom torch import nn\n", namespace)
    for n in [*needs, name]:
        exec(inspect.getsource(getattr(common, n)), namespace)
    return namespace[name]


def net(seed=0):
    torch.manual_seed(seed)
    return common.mlp([4, 6, 3]).double()


def moved(f):
    for p in f.parameters():
        p.data += .1 * p.requires_grad
    return f


X = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)
EXAMPLES = {
    "center": lambda g: torch.cat([moved(g(net(), alpha))(X) for alpha in (2.0, float("inf"))]),
    "CenteredModel": lambda g: moved(g(net(), 2.0))(X),
    "LinearizedModel": lambda g: moved(g(net()))(X),
    "check_deterministic": lambda g: torch.tensor(g(net(), X) is None),
    "scaled_sgd": lambda g: torch.tensor(g(common.center(net(), 10.0), .5, .9).param_groups[0]["lr"]),
    "empirical_ntk": lambda g: g(net(), X),
    "true_float32": lambda g: torch.tensor(g().__enter__() is None),
    "trace": lambda g: g(net(), X, [])[0],
    "Jacobian": lambda g: g(net(), X, 2**30, True).kernel(),
    "kernel_alignment": lambda g: torch.tensor(g(X @ X.T, X**2 @ X.T**2, True)),
    "relu_signs": lambda g: g(net(), X),
    "sign_similarity": lambda g: torch.tensor(g(X > 0, X > .5)),
    "representation": lambda g: g(net(), X),
    "representation_alignment": lambda g: torch.tensor(g(X, X**2)),
    "linearisation_error": lambda g: torch.tensor(g(moved(common.center(net(), 2.0)), X)),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_pasted_elsewhere(name):
    assert torch.equal(EXAMPLES[name](pasted(name)), EXAMPLES[name](getattr(common, name)))


def test_importing_does_no_work():
    code = "import sys, torch; before = torch.get_rng_state(); import common, toy, cscore, noisy, spurious; " \
           "assert 'matplotlib' not in sys.modules and 'torchvision' not in sys.modules; " \
           "assert torch.equal(torch.get_rng_state(), before)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
