"""The README keeps its promises: commands run, links and pictures exist, numbers are those of the records, functions
can be pasted elsewhere."""
import ast
import inspect
import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

import common
from conftest import ROOT, tiny_arrays

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
COMMANDS = [line.split(" #")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()
            if line.strip() and not line.startswith("#")]
SCRIPTS = {"toy": ["--runs", "2", "--iterations", "200", "--width", "8", "--probe-examples", "10"],
           **{name: ["--dataset", "tiny.npz", "--width", "4", "--batch-size", "10", "--epochs", "2", "--subset", "40",
                     "--probe-examples", "4", "--device", "cpu"] for name in ("noisy", "cscore", "spurious")}}


def test_the_first_two_commands_do_everything():
    """One installs and shows the effect, one runs the tests; nothing else is needed on a fresh machine."""
    assert "pip install -r requirements.txt" in COMMANDS[0] and "noisy.py --quick" in COMMANDS[0]
    assert "pytest" in COMMANDS[1]


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if "pip install -r" not in c}))
def test_command(command, tmp_path, monkeypatch):
    """Every command, on tiny data and briefly: options given last win."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    if "pytest" in words:
        words = words[words.index("-m"):] + ["--collect-only", "-q"]  # without installing pytest again
        assert subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True).returncode == 0
        return
    if "benchmark" in command:
        compile((ROOT / words[1]).read_text(), words[1], "exec")
        return
    if words[0] == "torchrun":
        words = words[1:]
        while words[0].startswith("--"):
            words = words[1:]
        words = ["python", *words]
    assert words[0] == "python" and words[1].endswith(".py") and (ROOT / words[1]).exists()
    name = words[1][:-3]
    arrays = tiny_arrays(n=60, classes=2)
    arrays.update({f"attribute_{s}": np.arange(len(arrays[f"y_{s}"])) % 3 // 2 for s in ("train", "test")})
    np.savez("tiny.npz", **arrays)
    if "--draw-only" in words:
        out = words[words.index("--out") + 1]
        import shutil
        shutil.copytree(ROOT / out, tmp_path / out)
        extra = []
    else:
        extra = [*SCRIPTS[name], "--out", "out"]
    module = __import__(name)
    try:
        summary = module.main(words[2:] + extra)
    except ValueError as e:  # so short an animation reaches no training loss that it could show
        assert "--animate" in str(e)
        return
    assert summary["alphas"]


@pytest.mark.parametrize("k", [k for k, (kind, _) in enumerate(BLOCKS) if kind == "python"])
def test_python_block(k, tmp_path, monkeypatch):
    """Every snippet runs; what it needs to find in its folder is put there."""
    text = BLOCKS[k][1]
    if "download=True" in text:
        compile(text, "README.md", "exec")
        return
    monkeypatch.chdir(tmp_path)
    images = common.synthetic(60, 30)
    np.savez("cifar10_5k.npz", **images)
    exec(text.replace("quick=True", "quick=True, epochs=1, seeds=[0], subset=50"), {})


def test_links_and_pictures_exist():
    links = re.findall(r"\]\(([^)#]+)\)|(?:src|href)=\"([^\"#]+)\"", README)
    relative = [a or b for a, b in links if not (a or b).startswith("http")]
    assert len(relative) > 4
    for link in relative:
        assert (ROOT / link).exists(), link
    anchors = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", README, re.M)}
    assert {a for a in re.findall(r"\]\(#([^)]+)\)", README)} <= anchors


def number(value, digits=2):
    """As the README writes it: .74, 1.41, −.024."""
    text = f"{value:.{digits}f}".replace("-", "−")
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def claims():
    """What the table of claims says of ours: {claim: numbers from the records behind the figures}."""
    toy, noisy, cscore, small, small_c, border = (
        json.loads((ROOT / "figures" / name / "summary.json").read_text())
        for name in ("toy", "noisy", "cscore", "noisy_5k", "cscore_5k", "spurious_cifar"))
    at = lambda part, alpha, level, column: part["alphas"][alpha]["levels"][level][column]["mean"]
    pair = lambda part, which, level, column: part["paired"][which]["levels"][level][column]["mean"]
    steps = lambda alpha, *levels: [f"{toy['alphas'][alpha]['levels'][level]['median_iteration']:.0f}" for level in levels]
    deciles = lambda alpha, level: [number(at(cscore, alpha, level, f"decile_{d}")) for d in (1, 3, 8, 10)]
    linear = lambda part, alpha, level: [number(part["alphas"][alpha]["linearity"][level][key]["mean"])
                                         for key in ("sign_similarity", "repr_alignment", "ntk_alignment")]
    smallest = lambda alpha: number(noisy["alphas"][alpha]["smallest_test_loss"]["loss"]["mean"])
    clean = lambda alpha, level: number(at(noisy["at_clean_loss"], alpha, level, "noisy_loss"))
    return {
        "Toy: test loss in the discs (hard), α = 1 minus 100, at training loss .5, .4, .3": [number(pair(toy, "1 - 100", l, "inside_loss"), 3) for l in ("0.5", "0.4", "0.3")],
        "Toy: the same outside (easy)": [number(pair(toy, "1 - 100", l, "outside_loss"), 3) for l in ("0.5", "0.4", "0.3")],
        "Toy: median iterations, α = 1, to .5, .3, .1": steps("1", "0.5", "0.3", "0.1"),
        "Toy: median iterations, α = 100, to .6, .5, .4": steps("100", "0.6", "0.5", "0.4"),
        "C-scores: deciles 1, 3, 8, 10, α = 1, at mean loss .5": deciles("1", "0.5"),
        "C-scores: the same at 1.0, α = 1": deciles("1", "1"),
        "C-scores: the same at 1.0, α = 100": deciles("100", "1"),
        "C-scores: signs, representation, NTK, α = 1, at 1.0": linear(cscore, "1", "1"),
        "Noisy: noisy loss at clean loss 1.0, α = 1 and 100": [clean("1", "1"), clean("100", "1")],
        "Noisy: noisy loss at clean loss .5, α = 1": [clean("1", "0.5")],
        "Noisy: smallest test loss, α = 1 and 100": [smallest("1"), smallest("100")],
        "Noisy, 4,068 images: gap at mean loss 1.6, α = 1 and 100": [number(at(small, a, "1.6", "gap")) for a in ("1", "100")],
        "Noisy, 4,068 images: test accuracy there": [number(at(small, a, "1.6", "test_acc")) for a in ("1", "100")],
        "C-scores, 4,068 images: gap 1 - 10 at 1.6, α = 1 and 100": [number(at(small_c, a, "1.6", "gap")) for a in ("1", "100")],
        "C-scores, 4,068 images: the same at 1.15": [number(at(small_c, a, "1.15", "gap")) for a in ("1", "100")],
        "Spurious, CIFAR-10 with a border: gap against - with at .208, α = .5, 1, 100": [
            number(at(border, a, "0.208", "gap")) for a in ("0.5", "1", "100")],
    }


def test_intervals_are_those_of_the_records():
    """Every "mean [low, high]" of the text is a paired difference of some summary.json."""
    found = set()

    def collect(part):
        if isinstance(part, dict):
            if part.get("interval"):
                found.add(f"{number(part['mean'])} [{', '.join(map(number, part['interval']))}]")
            for value in part.values():
                collect(value)

    for path in (ROOT / "figures").glob("*/summary.json"):
        collect(json.loads(path.read_text()))
    text = re.sub(r"\s+", " ", README)
    claimed = re.findall(r"[−.\d]+ \[[−.\d]+, [−.\d]+\]", text)
    assert len(claimed) >= 8 and set(claimed) <= found, set(claimed) - found


def test_numbers_of_the_claim_table():
    for start, values in claims().items():
        line, = [line for line in README.splitlines() if line.startswith(f"| {start} |")]
        ours = line.split("|")[3]  # | claim | paper | ours | scale |
        assert ours.split() == " / ".join(values).split(), start


def test_no_machine_paths():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *(ROOT / "tests").glob("*.py"), *(ROOT / "figures").rglob("*.json*")]:
        assert not re.search(r"[\"' =(](/(home|root|tmp|work|usr|mnt)/)", path.read_text().replace('"/(home', "")), path


def test_figures_can_be_drawn_again_from_what_is_kept(tmp_path):
    import shutil
    for folder in (ROOT / "figures").iterdir():
        script = folder.name.split("_")[0]
        shutil.copytree(folder, tmp_path / folder.name)
        again = __import__(script).main(out=str(tmp_path / folder.name), draw_only=True)
        kept = json.loads((folder / "summary.json").read_text())
        assert again["alphas"] == kept["alphas"] and again["paired"] == kept["paired"]


# --- copying a function out ---


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
    exec("import torch\nimport torch.nn.functional as F\nfrom torch import nn\n", namespace)
    for n in [*needs, name]:
        exec(inspect.getsource(getattr(common, n)), namespace)
    return namespace[name]


def net(seed=0):
    torch.manual_seed(seed)
    return common.mlp([4, 6, 3]).double()


X = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)
K, K2 = (lambda A: A @ A.T)(X + 1), (lambda A: A @ A.T)(X**2)


def moved(f):
    with torch.no_grad():
        for p in f.parameters():
            if p.requires_grad:
                p.add_(.1)
    return f


EXAMPLES = {
    "center": lambda g: moved(g(net(), 2.0))(X),
    "CenteredModel": lambda g: moved(g(net(), 2.0))(X),
    "LinearizedModel": lambda g: moved(g(net()))(X),
    "check_deterministic": lambda g: torch.tensor(g(net()) is None),
    "scaled_sgd": lambda g: torch.tensor(g(common.center(net(), 10.0), .5, .9).param_groups[0]["lr"]),
    "empirical_ntk": lambda g: g(net(), X),
    "capture": lambda g: g(net(), [], X)[0],
    "structured_layers": lambda g: torch.tensor(len(g(net(), X))),
    "kernel_alignment": lambda g: torch.tensor(g(K, K2, True)),
    "target_alignment": lambda g: torch.tensor(g(K, torch.tensor([0, 1, 0, 1, 2]))),
    "relu_signs": lambda g: g(net(), X),
    "sign_similarity": lambda g: torch.tensor(g(X > 0, X > .5)),
    "representation": lambda g: g(net(), X),
    "representation_alignment": lambda g: torch.tensor(g(X, X**2)),
    "linearisation_error": lambda g: torch.tensor(g(moved(common.center(net(), 2.0)), X)),
}


@pytest.mark.parametrize("name", section_names())
def test_pasted_elsewhere(name):
    assert torch.equal(EXAMPLES[name](pasted(name)), EXAMPLES[name](getattr(common, name)))


def test_public_names_are_documented():
    for name, value in vars(common).items():
        if inspect.isfunction(value) and value.__module__ == "common" and not name.startswith("_"):
            assert value.__doc__ or len(inspect.getsource(value).splitlines()) <= 3, name


def test_importing_does_no_work():
    code = "import sys; before = set(sys.modules); import common, toy, cscore, noisy, spurious; " \
           "assert 'matplotlib' not in sys.modules and 'torchvision' not in sys.modules; import torch; " \
           "assert torch.initial_seed() == torch.default_generator.initial_seed()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
