"""The documents: README.md is short, links lead somewhere, numbers come from CSVs, and code in them runs."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import final_weights, take_ridge_head
from pages import ROOT, render, templates

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config, load
from fl_taskarith.strategies.fedavg import Reply
from fl_taskarith.workspace import workspace as room

FOLDERS = ("conf", "fl_taskarith", "results")
DOCUMENTS = [ROOT / "README.md", *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.md")))]
IDS = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
PLACEHOLDERS = (
    "RUN",
    "NAME",
    "FILE",
    "DATA",
    "results/A",
    "results/B",
    "PART",
    "STUDY",
    "*",
    "<",
    "{",
    "STEM",
    "FAMILY",
)
BY_FILE = (ROOT / "fl_taskarith" / "data" / "sets").exists() and (ROOT / "fl_taskarith" / "masking" / "rules").exists()
ELSEWHERE = (ROOT / "conf" / "README.md",)  # written by `python -m fl_taskarith.config.reference`
MADE_BY_RUNS = ("results/digits-fedavg-nc2-j4-s0-44136fa3/",)


def prose(path: Path) -> str:
    """Return a document without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def headings(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_readme_is_short_and_in_the_words_of_the_field() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    for words in ("the half", "in turns", "sittings", "anew"):
        assert words not in text
    assert "pip install -e . && flwr run . --stream\n" in text and 'pip install -e ".[test]" && pytest\n' in text


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_link_and_every_named_path_exists(path: Path) -> None:
    text = prose(path)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            place, _, heading = target.partition("#")
            page = (path.parent / place).resolve()
            assert page.exists() or page in ELSEWHERE, target
            assert not heading or heading in headings(page), target
    for quoted in re.findall(r"`((?:results|conf|fl_taskarith|tests)/[^`\s]+)`", text):
        if not any(word in quoted for word in PLACEHOLDERS) and not quoted.startswith(MADE_BY_RUNS):
            assert (ROOT / quoted).exists(), quoted


@pytest.mark.parametrize("template", templates(), ids=lambda path: path.parent.name)
def test_the_findings_are_what_the_tables_say(template: Path) -> None:
    page = template.with_suffix("")
    assert page.read_text(encoding="utf-8") == render(template), "python -m tests.docs.pages --write"


@pytest.mark.parametrize("template", templates(), ids=lambda path: path.parent.name)
def test_no_measured_number_is_written_by_hand(template: Path) -> None:
    text = re.sub(r"^```.*?^```", "", template.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    symbols = r"[A-Zα-ωΔ_a-zσ]+ ?[=≤≥] ?[\d.]+(,? (\d[\d.]*|and \d[\d.]*))*"  # C = 0.05, 0.1 and 0.2
    words = (
        r"(density|densities|at|momentum of|momentum|server step of|With|to) \d\.\d+( and \d\.\d+)?|in place of \d\.\d"
    )
    text = re.sub(rf"{symbols}|{words}|95 %", "", text)
    assert re.findall(r"[-+±]? ?\d+\.\d+|\d+ %", text) == [], "compute it, or mark it by stated(...)"


def test_the_results_in_the_readme_are_rows_of_the_findings() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.* ± .*\|$", text, re.MULTILINE)
    findings = "".join(
        (ROOT / "results" / name / "FINDINGS.md").read_text(encoding="utf-8") for name in ("cifar100", "digits")
    )
    assert len(rows) == 12
    for row in rows:
        assert row + "\n" in findings


@pytest.mark.parametrize("name", ["fed-em", "br-ifca"])
def test_the_report_of_a_study_contains_its_findings(name: str) -> None:
    folder = ROOT / "results" / name
    assert (folder / "findings.md").read_text(encoding="utf-8").strip() in (folder / "README.md").read_text(
        encoding="utf-8"
    )


def test_the_round_in_the_package_readme_is_that_of_a_run(quick_config: Config) -> None:
    """The code is run as it is printed, with the ridge head of a run, and ends at the weights of that run."""
    history = simulate(quick_config)
    home: Any = room.Workspace(quick_config)
    take_ridge_head(home, history.folder)
    (code,) = re.findall(
        r"<!-- test: fedavg -->\n```python\n(.*?)^```",
        (ROOT / "fl_taskarith" / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE,
    )  # fmt: skip
    exec(code, {
        "config": quick_config, "model": home.model, "train": home.data.train, "shards": home.shards,
        "preprocessing": home.preprocessing,
    })  # fmt: skip
    for name, weights in final_weights(history.folder).items():
        if not name.startswith("head."):
            assert torch.allclose(weights, home.model.get_parameter(name), rtol=1e-5, atol=1e-7), name


def test_the_ratios_of_the_benchmarks_are_those_recorded() -> None:
    text = (ROOT / "fl_taskarith" / "bench" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| ([\d.]+)[^|]*\|$", text, re.MULTILINE)
    assert len(rows) >= 9
    for name, ratio in rows:
        recorded = json.loads((ROOT / "results" / "bench" / f"{name}.json").read_text(encoding="utf-8"))["ratio"]
        assert float(ratio) == round(recorded, len(ratio.partition(".")[2])), name


def test_what_a_user_imports_is_there() -> None:
    """The notebook and README.md name modules and attributes; nothing else tells when one moves."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for cell in json.loads((ROOT / "results" / "colab.ipynb").read_text(encoding="utf-8"))["cells"]:
        text += "".join(cell["source"]) + "\n"
    imports = re.findall(r"^\s*from (fl_taskarith[\w.]*) import (\w+)", text, re.MULTILINE)
    assert imports
    for module, name in imports:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.skipif(not BY_FILE, reason="data sets and mask rules are not one file each yet")
def test_the_examples_of_how_to_add_something_run() -> None:
    """Each block of code makes what it says: a strategy, a mask rule, a data set, and a merge rule."""
    text = "".join(
        (ROOT / "fl_taskarith" / name).read_text(encoding="utf-8") for name in ("README.md", "merging/README.md")
    )
    examples = {
        name: code for code, name in re.findall(r"^```python\n(# (own_\w+)\.py.*?)^```", text, re.DOTALL | re.MULTILINE)
    }
    assert examples.keys() == {"own_strategy", "own_masks", "own_data", "own_rule"}
    made: dict[str, Any] = {}
    for code in examples.values():
        exec(code, made)
    vector = {"w": torch.tensor([[1.0, -2.0], [4.0, 1.0]])}
    assert torch.equal(made["sign_sum"]([vector, vector])["w"], 2 * vector["w"].sign())
    assert torch.equal(made["distance_from_mean"](vector, None)["w"], torch.tensor([[0.0, 3.0], [3.0, 0.0]]))
    signs = made["SignMean"](load(), torch.device("cpu")).aggregate({}, [Reply(0, vector, 5.0)])
    assert torch.equal(signs["w"], vector["w"].sign())
    assert made["DATASET"].classes == 2
