"""Records of what the package computes, to the last bit: taken before its code is moved, the same afterwards.

    python -m tests.golden            # compute everything again and name each record that differs
    python -m tests.golden --write    # take the records anew

Runs on digits (a short one per strategy, mask rule and other way through the engine, and the quick start): rounds.csv
without its times, the model's tensors, the mask's. Study files: all tables, from made-up runs, and those of CIFAR-100
from the committed runs. Reports: every text file. Bits of runs depend on the processor and on torch: the record names
both, and on others it is taken anew from the commit to compare with.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

os.environ["FL_TASKARITH_SHARED_STARTS"] = "off"
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).with_name("golden.json")
sys.path.insert(0, str(Path(__file__).parent))

from fl_taskarith.cli.command import main as command  # noqa: E402
from fl_taskarith.config.settings import Config  # noqa: E402
from fl_taskarith.storage.run_folder import TIMING_COLUMNS  # noqa: E402
from fl_taskarith.workspace.machine import describe_device  # noqa: E402

SHORT = [
    "train-subset=300",
    "validation-size=60",
    "test-subset=120",
    "num-clients=10",
    "num-rounds=3",
    "local-steps=2",
    "learning-rate=0.01",
    "schedule=constant",
    "precision=fp32",
    "compile=off",
    "evaluate-every=1",
    "draw-curves=false",
    "device=cpu",
    "threads=1",
    "participation=0.5",
]
DENSE = "mask-rule=none"
DEFAULTS = Config().to_run_config()
LATER = (  # settings that came after the records of made-up runs, whose accuracies are drawn from the others
    "lda-shrinkage", "covariance-form", "covariance-epsilon", "covariance-shrinkage", "covariance-weights",
    "covariance-mask", "momentum-rounds", "exp-epsilon", "merge-rule", "merge-parameter", "distillation-weight",
    "distillation-temperature", "anchoring-mu", "early-stopping-patience",
)  # fmt: skip
REGRESSION = [
    "dataset=linear-regression",
    "num-clients=12",
    "num-rounds=4",
    "draw-curves=false",
    "device=cpu",
    "threads=1",
    "participation=1.0",
]
RUNS = {
    "quick start": ["draw-curves=false", "device=cpu", "threads=1"],
    **{
        name: [*SHORT, DENSE, f"strategy={name}"]
        for name in [
            "fedavg",
            "fedavgm",
            "fedadam",
            "fedyogi",
            "fedprox",
            "fednova",
            "fedgma",
            "fedbn",
            "scaffold",
            "median",
            "trimmed-mean",
            "krum",
            "cclip",
            "geometric-median",
            "gram-anchored",
            "br-ifca",
        ]
    },
    "fedprox with a term": [*SHORT, DENSE, "strategy=fedprox", "proximal-mu=0.1"],
    "scaffold masked": [*SHORT, "strategy=scaffold"],
    "gram-anchored masked": [*SHORT, "strategy=gram-anchored", "gram-anchor=0.5"],
    "centralized": [*SHORT[:3], *SHORT[4:5], *SHORT[6:-1], DENSE, "strategy=centralized"],
    "centralized masked": [*SHORT[:3], *SHORT[4:5], *SHORT[6:-1], "strategy=centralized", "mask-rule=random"],
    **{
        f"mask {rule}": [*SHORT, f"mask-rule={rule}"]
        for rule in ("least-sensitive", "most-sensitive", "lowest-magnitude", "highest-magnitude", "random")
    },
    "mask of clients": [*SHORT, "mask-source=clients", "calibration-per-client=8"],
    "masks of their own": [*SHORT, "mask-source=own", "calibration-rounds=2"],
    "expected labels": [*SHORT, "fisher-labels=expected", "calibration-rounds=1"],
    "threshold": [*SHORT, "sensitivity-threshold=0.001"],
    "two blocks cached": [*SHORT, "trainable-blocks=2", "prefix-cache=float32"],
    "head alone": [*SHORT, DENSE, "trainable=head"],
    "linear head": [*SHORT, DENSE, "head=linear", "trainable=all", "head-rounds=1"],
    "head solved anew": [*SHORT, DENSE, "ridge-refresh=1"],
    "squared loss": [*SHORT, DENSE, "local-loss=squared"],
    "bank": [*SHORT, DENSE, "task-vector-bank=float32", "bank-decay=0.9"],
    "bank, own masks": [*SHORT, "mask-source=own", "task-vector-bank=bfloat16"],
    "at once": [*SHORT, DENSE, "clients-at-once=0"],
    "at once, masked scaffold": [*SHORT, "clients-at-once=3", "strategy=scaffold"],
    "dirichlet, cyclic, dropout": [
        *SHORT,
        DENSE,
        "sharding=dirichlet",
        "dirichlet-alpha=0.3",
        "sampling=cyclic",
        "dropout=0.3",
    ],
    "iid, other local steps": [
        *(word for word in SHORT if not word.startswith("local-steps")),
        DENSE,
        "sharding=iid",
        "local-steps-min=1",
        "local-steps-max=4",
    ],
    "optimizer": [*SHORT, DENSE, "nesterov=true", "weight-decay=0.01", "clip-norm=1.0", "warmup-rounds=1"],
    "sign flip": [*SHORT, DENSE, "byzantine-fraction=0.2", "strategy=median"],
    "alie": [*SHORT, DENSE, "byzantine-fraction=0.2", "strategy=trimmed-mean", "attack=alie"],
    "rotations": [*SHORT, DENSE, "client-groups=rotations", "num-clusters=4", "strategy=br-ifca"],
    "fed-em": [*REGRESSION, "strategy=fed-em"],
    "br-ifca, regression": [*REGRESSION, "strategy=br-ifca", "learning-rate=0.01", "byzantine-fraction=0.2"],
}
TABLES = ("README.md", "table.csv", "runs.csv", "search.csv", "curves.csv", "settings.json")
REPORTS = ("digits", "cifar100/h100", "cifar100/cpu")


def of_runs(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, digest) of each run's numbers, and of its tensors."""
    for name, words in RUNS.items():
        home = folder / f"run-{len(list(folder.glob('run-*')))}"
        _quietly(["simulate", *words, f"results-dir={home}", "run-name=run"])
        with open(home / "run" / "rounds.csv", encoding="utf-8", newline="") as file:
            rows = [
                {key: cell for key, cell in row.items() if key not in TIMING_COLUMNS} for row in csv.DictReader(file)
            ]
        yield f"{name}: rounds", _digest(json.dumps(rows).encode())
        for path in sorted((home / "run").glob("*.safetensors")):
            yield f"{name}: {path.stem}", _tensors(path)
        for kept in sorted((home / "run").glob("*.csv")):
            if kept.name not in ("rounds.csv", "clients.csv"):
                yield f"{name}: {kept.name}", _digest(kept.read_bytes())


def of_studies(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, digest) of the tables of every study file; runs are made up."""
    from small_studies import FakeTraining

    from fl_taskarith.study.runner import run_studies
    from fl_taskarith.study.study_file import load_study

    def accuracy(config: Config) -> float:
        settings = config.to_run_config() | {"results-dir": ""}  # a folder of this moment
        settings = {key: value for key, value in settings.items() if key not in LATER or value != DEFAULTS[key]}
        seed = int(_digest(repr(sorted(settings.items())).encode())[:8], 16)
        return 0.5 + seed / 2**34

    files = [path for path in sorted((ROOT / "conf" / "study").rglob("*.toml")) if "digits" in path.as_posix()]
    for number, path in enumerate(files):
        with (
            patch("fl_taskarith.server.simulate.simulate", FakeTraining(accuracy, test=lambda value: value)),
            patch("fl_taskarith.study.tables.plot_arms", lambda *_: []),
            patch("fl_taskarith.study.tables._figures", lambda *_: []),
            patch("fl_taskarith.study.monitor.GLANCE", 0.02),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            study = load_study(path)
            run_studies([study], folder / f"study-{number}")
        for table in TABLES:
            if (written := folder / f"study-{number}" / study.name / table).exists():
                text = written.read_text(encoding="utf-8").replace(str(folder), "FOLDER")
                yield f"{path.relative_to(ROOT)}: {table}", _digest(text.encode())


def of_committed(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, digest) of the tables of CIFAR-100 from the committed runs, and of the reports from committed tables."""
    shutil.copytree(ROOT / "results" / "cifar100", folder / "cifar100")
    with (
        patch("fl_taskarith.study.tables.plot_arms", lambda *_: []),
        patch("fl_taskarith.study.tables._figures", lambda *_: []),
    ):
        for part in ("cpu", "h100"):
            path = ROOT / "conf" / "study" / f"cifar100-{part}.toml"
            _quietly(["study", "--tables", str(path), "--results-dir", str(folder)])
            for table in TABLES:
                written = (folder / "cifar100" / part / table).read_text(encoding="utf-8")
                yield f"{path.relative_to(ROOT)}, committed: {table}", _digest(written.encode())
    for results in REPORTS:
        output = folder / "report" / results
        _quietly(["report", str(ROOT / "results" / results), "--output", str(output)])
        for path in sorted(output.rglob("*")):
            if path.suffix in (".tex", ".bib"):
                yield f"report of {results}: {path.relative_to(output)}", _digest(path.read_bytes())


PARTS = {"runs": of_runs, "studies": of_studies, "committed": of_committed}


def _quietly(words: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = command(words)
    if status:
        raise SystemExit(f"fl-taskarith {' '.join(words)} ended with {status}:\n{said.getvalue()}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _tensors(path: Path) -> str:
    """Of names, types, shapes and bits, whatever else the file holds."""
    from safetensors.torch import load_file

    found = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(dtype=__import__("torch").uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> int:
    """Compare with the records, or take them."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--write", action="store_true", help="take the records anew")
    parsed = parser.parse_args()
    import torch

    record = json.loads(RECORDS.read_text()) if RECORDS.exists() else {"records": {}}
    here = f"{describe_device(torch.device('cpu'))}, torch {torch.__version__}"
    if not parsed.write and record["machine"] != here:
        print(f"The records are of {record['machine']}, and this is {here}: runs may differ in their last bits.")
    different, count = [], 0
    for part in parsed.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            for name, digest in PARTS[part](Path(folder)):
                count += 1
                if record["records"].get(name) != digest:
                    different.append(name)
                    if not parsed.write:
                        print(f"{'different' if name in record['records'] else 'not recorded'}: {name}", flush=True)
                    record["records"][name] = digest
    if parsed.write:
        RECORDS.write_text(json.dumps({"machine": here, "records": record["records"]}, indent=1) + "\n")
        print(f"{count} records, {len(different)} of them new or changed.")
        return 0
    print(f"{count - len(different)} of {count} records identical.")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
