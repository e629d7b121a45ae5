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
from conftest import ROOT, tiny_arrays

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
COMMANDS = [line.split(" #")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()
            if line.strip() and not line.startswith("#")]
SCRIPTS = {"toy": dict(runs=2, iterations=200, width=8, probe_examples=10, jobs=1)}
for name in ("noisy", "cscore", "spurious"):
    SCRIPTS[name] = dict(dataset="tiny.npz", width=4, batch_size=10, epochs=2, subset=40, probe_examples=4, device="cpu")


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
    module = __import__(name)
    given = common.parse_words(name, module.OPTIONS, module.QUICK, "", words[2:])
    given.update(SCRIPTS[name], out="out")
    try:
        assert module.main(**given)["alphas"]
    except ValueError as e:  # so short an animation reaches no training loss that it could show
        assert "animat" in str(e)


@pytest.mark.parametrize("k", [k for k, (kind, _) in enumerate(BLOCKS) if kind == "python"])
def test_python_block(k, tmp_path, monkeypatch):
    """Every snippet runs."""
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[k][1].replace("quick=True", "quick=True, epochs=1, seeds=[0], subset=50"), {})


def test_the_idea_is_thirty_lines_and_shows_the_effect(capsys):
    block, = [text for kind, text in BLOCKS if kind == "python" and "def points" in text]
    assert len(block.splitlines()) <= 30 and re.findall(r"^(?:from|import) (\w+)", block, re.M) == ["copy", "torch", "torch", "common"]
    exec(block, {})
    found = [[float(v) for v in re.findall(r"loss ([.\d]+) in|([.\d]+) outside", line) for v in v if v]
             for line in capsys.readouterr().out.splitlines()]
    (rich_in, rich_out), (lazy_in, lazy_out) = found
    assert rich_in > lazy_in + .1 and rich_out < lazy_out - .03


def test_length():
    assert len(README) <= 12000


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
    toy, noisy, cscore, small, small_c, dominoes = (
        json.loads((ROOT / "figures" / name / "summary.json").read_text())
        for name in ("toy", "noisy", "cscore", "noisy_5k", "cscore_5k", "dominoes"))
    at = lambda part, alpha, level, column: part["alphas"][alpha]["levels"][level][column]["mean"]
    pair = lambda part, which, level, column: part["paired"][which]["levels"][level][column]["mean"]
    steps = lambda alpha, *levels: [f"{toy['alphas'][alpha]['levels'][level]['median_iteration']:.0f}" for level in levels]
    deciles = lambda alpha, level: [number(at(cscore, alpha, level, f"decile_{d}")) for d in (1, 3, 8, 10)]
    smallest = lambda alpha: number(noisy["alphas"][alpha]["smallest_test_loss"]["loss"]["mean"])
    clean = lambda alpha, level: number(at(noisy["at_clean_loss"], alpha, level, "noisy_loss"))
    return {
        "Toy: test loss in the discs (hard), α = 1 minus 100, at training loss .5, .4, .3": [number(pair(toy, "1 - 100", l, "inside_loss"), 3) for l in ("0.5", "0.4", "0.3")],
        "Toy: the same outside (easy)": [number(pair(toy, "1 - 100", l, "outside_loss"), 3) for l in ("0.5", "0.4", "0.3")],
        "Toy: median iterations, α = 100, to .6, .5, .4": steps("100", "0.6", "0.5", "0.4"),
        "C-scores: deciles 1, 3, 8, 10, α = 1, at mean loss .5": deciles("1", "0.5"),
        "C-scores: the same at 1.0, α = 1": deciles("1", "1"),
        "C-scores: the same at 1.0, α = 100": deciles("100", "1"),
        "Noisy: noisy loss at clean loss 1.0, α = 1 and 100": [clean("1", "1"), clean("100", "1")],
        "Noisy: the same at .5, α = 1": [clean("1", "0.5")],
        "Noisy: smallest test loss, α = 1 and 100": [smallest("1"), smallest("100")],
        **small_claims(small, small_c, dominoes, at),
    }


def small_claims(small, small_c, dominoes, at):
    """Those of the experiments at small scale, read by the rule of now."""
    return {
        "Noisy, 4,068 images: noisy loss at clean loss 1.6, α = 1 and 100": [
            number(at(small["at_clean_loss"], a, "1.6", "noisy_loss")) for a in ("1", "100")],
        "C-scores, 4,068 images: gap of deciles 1 and 10 at 1.6, α = 1 and 100": [
            number(at(small_c, a, "1.6", "gap")) for a in ("1", "100")],
        "Dominoes, 4,000 images: gap in loss against − with at .3, α = .5, 1, 100": [
            number(at(dominoes, a, "0.3", "gap")) for a in ("0.5", "1", "100")],
        "Dominoes: accuracy against where that with is .95, α = .5, 1, 100": [
            number(at(dominoes["at_equal_accuracy"], a, "0.95", "against_acc")) for a in ("0.5", "1", "100")],
    }


def test_intervals_are_those_of_the_records():
    """Every "mean [low, high]" of the text is a paired difference of some summary.json."""
    found = set()

    def collect(part):
        if isinstance(part, dict):
            if part.get("interval"):
                for digits in (2, 3):
                    low, high = (number(bound, digits) for bound in part["interval"])
                    found.add(f"{number(part['mean'], digits)} [{low}, {high}]")
            for value in part.values():
                collect(value)

    for path in (ROOT / "figures").glob("*/summary.json"):
        collect(json.loads(path.read_text()))
    text = re.sub(r"\s+", " ", README)
    claimed = re.findall(r"[−.\d]+ \[[−.\d]+, [−.\d]+\]", text)
    assert len(claimed) >= 4 and set(claimed) <= found, set(claimed) - found


def test_numbers_of_the_claim_table():
    for start, values in claims().items():
        line, = [line for line in README.splitlines() if line.startswith(f"| {start} |")]
        ours = line.split("|")[3]  # | claim | paper | ours | scale |
        assert ours.split() == " / ".join(values).split(), start


def test_range_over_the_seeds():
    """"2.08 to 2.61" beside the noisy loss at clean loss .5 is what the single runs have."""
    curves = [common.curve(records) for records in common.read_runs(ROOT / "figures" / "noisy")[1.0].values()]
    values = [common.value_at(.5, curve["clean_loss"], curve["noisy_loss"]) for curve in curves]
    assert f"| the same; {number(min(values))} to {number(max(values))} |" in README


def test_no_machine_paths():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *(ROOT / "tests").glob("*.py"), *(ROOT / "figures").rglob("*.json*")]:
        assert not re.search(r"[\"' =(](/(home|root|tmp|work|usr|mnt)/)", path.read_text().replace('"/(home', "")), path


@pytest.mark.parametrize("folder", sorted(path.name for path in (ROOT / "figures").iterdir()))
def test_figures_can_be_drawn_again_from_what_is_kept(folder, tmp_path):
    name = {"dominoes": "spurious"}.get(folder, folder.split("_")[0])
    kept = json.loads((ROOT / "figures" / folder / "summary.json").read_text())
    shutil.copytree(ROOT / "figures" / folder, tmp_path / folder)
    levels = {} if name == "toy" else {"levels": kept["options"]["levels"]}
    again = __import__(name).main(out=str(tmp_path / folder), draw_only=True, **levels)
    assert {key: again[key] for key in kept if key != "options"} == {key: kept[key] for key in kept if key != "options"}
    tracked = {path.name for path in (ROOT / "figures" / folder).iterdir() if path.suffix != ".pdf"}
    assert {path.name for path in (tmp_path / folder).iterdir() if path.suffix != ".pdf"} == tracked


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


def test_public_names_are_documented():
    for name, value in vars(common).items():
        if inspect.isfunction(value) and value.__module__ == "common" and not name.startswith("_"):
            assert value.__doc__ or len(inspect.getsource(value).splitlines()) <= 3, name


def test_importing_does_no_work():
    code = "import sys, torch; before = torch.get_rng_state(); import common, toy, cscore, noisy, spurious; " \
           "assert 'matplotlib' not in sys.modules and 'torchvision' not in sys.modules; " \
           "assert torch.equal(torch.get_rng_state(), before)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
