"""Command lines of all commands, as people mistype them; the work behind the commands is left out."""

import contextlib
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fl_taskarith.cli.command import COMMANDS, main
from fl_taskarith.config.fields import rules, snake
from fl_taskarith.config.hints import other_names
from fl_taskarith.config.settings import Config

FAULT = "command lines drawn at random"
WORK: dict[str, Any] = {  # what the commands call once all is checked, and what that returns
    "server.simulate.simulate": None, "study.runner.run_studies": None, "study.listing.measure": {},
    "study.one_search.search_rate": (Path("search.csv"), None), "one_shot.benchmark.run_one_shot": None,
    "mixtures.studies.run_studies.run_mixture_study": None, "describe.masks.make_masks": None,
    "describe.shard_histogram.show_shards": None, "bench.round.bench_round": mock.Mock(ratio=1.0, lines=[]),
    "models.glyph_pretraining.pretrain_glyph": mock.Mock(held_out_accuracy=1.0),
    "study.project._contents": {"README.md": b""},
}  # fmt: skip
VALUES: dict[str, tuple[Any, ...]] = {
    "seed": (0, 7, 2**53), "num-rounds": (1, 10, 300), "batch-size": (8, 16), "learning-rate": (0.001, 0.5, 1.0, 1e-5),
    "weight-decay": (0.0, 0.1), "run-name": ("123", "2024-01-01", "1e5", "true", "007", "mine", "0x10", "1_0", "nan"),
    "save-model": (True, False), "momentum": (0.5, 0.9), "ridge-lambda": ("auto", 10.0), "sharding": ("iid",),
    "weights": ("pretrained",), "nesterov": (True, False), "client-timeout": (0.5, 3.0),
}  # fmt: skip
SOUND = (  # command lines with files of `prepare`
    "study study.toml", "study --list study.toml data-dir=x", "study study.toml --tables", "one-shot benchmark.toml",
    "search settings.toml --rounds 4 8 --from 1e-4", "search run", "centralized bom.toml",
    "mask mask-rule=random density=0.5", "shards sharding=iid", "fed-em --quick", "br-ifca --tables",
    "bench round --repeats 2", "plot run --output p", "report run --template t.tex", "pretrain-glyph --steps 5",
    "simulate a=b/settings.toml", "simulate settings.toml", "merge model.safetensors --base model.safetensors",
    "init new", "init run", "init .",
)  # fmt: skip
OPTIONS = (
    "--jobs", "--budget", "--results-dir", "--from", "--to", "--rounds", "--keep", "--seed", "--per-decade", "--list",
    "--tables", "--pack", "--quick", "--output", "--authors", "--template", "--overwrite", "--clients", "--base",
    "--scale", "--steps", "--method", "--search", "--json", "--learning-rate", "--lr", "-h", "--help", "-lr", "--",
    "-", "--nothing", "--res", "-5", "-1e-3",
)  # fmt: skip
ODD = (
    "", " ", "=", "=3", "a=", "seed", "seed =3", "5", "nan", "inf", "-1", "1e400", "9" * 400, "٣", "25m", "0h",
    "9" * 30 + "h", "x" * 300, "\x1b[31m", "é=1", "seed=[1]", "seed={}", "seed=0x", "num-rounds=10.5", "momentum=True",
    "nesterov=2", "run-name=a/b", "run-name=", 'run-name="', "run-name='a", "__class__=1", "learning-rate=1/3",
    "learning-rate=0,1", "all", "ties", "round",
)  # fmt: skip


def prepare(folder: Path) -> Path:
    """A folder of files of every kind that a command line may name."""
    texts = {
        "settings.toml": b"num-rounds = 3\n", "bom.toml": b"\xef\xbb\xbfnum-rounds = 3\n", "empty.toml": b"",
        "utf16.toml": "num-rounds = 3\n".encode("utf-16"), "latin.toml": b"# \xe9\n", "bytes.toml": bytes(range(256)),
        "study.toml": b'name = "s"\nseeds = [0]\n[[arm]]\nname = "a"\nsettings = { learning-rate = 0.1 }\n',
        "benchmark.toml": b'name = "b"\nseeds = [0]\n[tasks]\nfamily = "inversions"\nnumber = 2\n[settings]\n'
        b'learning-rate = 0.1\n[[data]]\nname = "d"\noverlap = 1\n[[training]]\nname = "t"\n',
        "flower.toml": b"[tool.flwr.app.config]\nseed = 1\n", "authors.toml": b'[[author]]\nname = "A"\nid = "1"\n',
        "a=b/settings.toml": b"num-rounds = 3\n", "file": b"x", "mask.safetensors": b"x", "model.safetensors": b"",
        "run/run.json": b'{"config": {"num-rounds": 3}}', "bad/run.json": b"[" * 5000, "bad/table.csv": b"group\n1,2\n",
        "list/run.json": b"[1]", "t.tex": b"\\VAR{1/0}",
    }  # fmt: skip
    for name, content in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def attempt(shared: Path, drawn: random.Random, folder: Path) -> str:
    expected = {key: drawn.choice(VALUES[key]) for key in drawn.sample(sorted(VALUES), drawn.randint(0, 4))}
    sound = [f"{key}={_spelt(value, drawn)}" for key, value in expected.items()]
    with contextlib.chdir(folder):
        return _attempt(shared, drawn, expected, sound)


def _attempt(shared: Path, drawn: random.Random, expected: dict[str, Any], sound: list[str]) -> str:
    if drawn.random() < 0.4:
        given = _accepted(["simulate", *sound, *drawn.choice([[], [str(shared / "settings.toml")]])])
        assert given is None or all(getattr(given, snake(key)) == value for key, value in expected.items()), sound
        return "refused" if given is None else "accepted"
    files = [str(path) for path in [*shared.rglob("*"), shared / "none.toml", shared / ("x" * 300), Path("~nobody/x")]]
    name, *words = drawn.choice([*SOUND, *SOUND, *COMMANDS, "simulat", "", "settings.toml"]).split(" ")
    words = [str(shared / word) if (shared / word).exists() else word for word in words]
    for _ in range(drawn.choice([0, 1, 1, 2, 3])):
        setting = f"{drawn.choice([*other_names(), *rules()])}={drawn.choice(ODD)}"
        odd = drawn.choice([drawn.choice(files), drawn.choice(OPTIONS), drawn.choice(ODD), setting, *sound])
        words.insert(drawn.randint(0, len(words)), odd)
    return f"{'refused' if _accepted([name, *words]) is None else 'accepted'}: {name[:20]}"


def _spelt(value: Any, drawn: random.Random) -> str:
    if isinstance(value, bool):
        return drawn.choice([str(value), str(value).lower(), str(value).upper(), f'"{value}"'])
    if isinstance(value, str):
        return drawn.choice([value, f'"{value}"', f"'{value}'"])
    if isinstance(value, int):
        spellings = ("{}", "+{}", "{}.0", " {} ", "00{}", "{}e0", "0x{:x}", '"{}"')
        return drawn.choice(spellings).format(value)
    return drawn.choice([repr(value), f"{value:e}", repr(value).lstrip("0"), f" {value!r}", f'"{value!r}"'])


def _accepted(words: list[str]) -> Config | bool | None:
    """The settings that the command would run with, or whether it was accepted at all; None where it was refused."""
    said, printed = io.StringIO(), io.StringIO()
    with _without_work() as work, contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        try:
            status = main(words)
        except SystemExit as ended:
            assert ended.code in (0, 2), f"{words}: {ended.code}"
            status = int(ended.code or 0)
    message = said.getvalue()
    assert "Traceback" not in message and "\x1b" not in message and len(message) < 8000, f"{words}: {message[:300]}"
    assert status == 0 or message.count("Error: ") == 1 or "error: " in message, f"{words}: {message[:300]}"
    if status:
        return None
    calls = [call.args[0] for mocked in work for call in mocked.call_args_list if call.args]
    return next((each for each in calls if isinstance(each, Config)), True)


@contextlib.contextmanager
def _without_work() -> Iterator[list[mock.Mock]]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("fl_taskarith.storage.paths.checkout", return_value=Path.cwd()))
        patches = [mock.patch(f"fl_taskarith.{name}", return_value=value) for name, value in WORK.items()]
        yield [stack.enter_context(patch) for patch in patches]
