"""A student's own project folder: study files of the assignment's parts, authors.toml, and the commands in order."""

import itertools
from collections.abc import Mapping
from pathlib import Path

from fl_taskarith.config.toml import read_toml
from fl_taskarith.errors import ConfigError
from fl_taskarith.figures.markdown import render_markdown
from fl_taskarith.storage.files import make_folder, remove_leftovers, write_atomically
from fl_taskarith.storage.paths import conf_folder

TEMPLATE = Path(__file__).with_name("project.md.j2")
PARTS: Mapping[str, Mapping[str, str]] = {  # study files below conf/study, by the part of the assignment
    "digits": {
        **{part: f"digits/{part}" for part in ("centralized", "fedavg-iid", "heterogeneity", "six-models", "sparsity")},
        "extension": "digits-extension",
    },
    "CIFAR-100": {
        part: f"cifar100-t4/{part}"
        for part in ("centralized", "fedavg-iid", "heterogeneity", "six-models", "rules", "density",
                     "calibration-rounds", "extension")
    },
}  # fmt: skip
RUNS = ("centralized.toml", "fedavg-iid.toml", "fedavg-noniid.toml", "fedavg-noniid-sparse.toml")  # single ones
AUTHORS = """\
# For fl-taskarith report --authors authors.toml: a table per author. It may have affiliation and email, too.
title = "Federated learning under the lens of task arithmetic"

[[author]]
name = "Your name"
id = "Your student number"
"""


def init_project(folder: Path) -> list[Path]:
    """Lay a project in `folder`, which is made if need be, and return its files.

    A folder that an interrupted call left is completed.

    Raises:
        ConfigError: something else is in the folder.
        CheckpointError: a file cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a new folder, or an empty one.")
    contents = _contents()
    if folder.exists():
        remove_leftovers(folder, below=True)
        there = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
        if other := [path for path in there if contents.get(path.relative_to(folder).as_posix()) != _start_of(path)]:
            raise ConfigError(
                f"{folder} is not empty and stays as it is: {other[0]} is no file of a new project. Name a new one, "
                "or an empty one."
            )
    for name, content in contents.items():
        make_folder((folder / name).parent)
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def _contents() -> dict[str, bytes]:
    """Return what a new project holds, by name."""
    conf = conf_folder()
    studies = list(itertools.chain.from_iterable(parts.values() for parts in PARTS.values()))
    names = [*(f"study/{name}.toml" for name in studies), *RUNS]
    files = {f"conf/{name}": (conf / name).read_bytes() for name in names}
    results = {data: {part: _results_of(conf, name) for part, name in parts.items()} for data, parts in PARTS.items()}
    text = render_markdown(TEMPLATE, parts=PARTS, results=results)
    return {"README.md": text.encode(), "authors.toml": AUTHORS.encode(), **files}


def _results_of(conf: Path, name: str) -> str:
    """Return the folder of a study's tables below the results."""
    return str(read_toml(conf / "study" / f"{name}.toml", "study")["name"])


def _start_of(path: Path) -> bytes:
    """Return the content of a file; of a large one, which is none of a project's, the first part."""
    with open(path, "rb") as file:
        return file.read(2**20)
