"""Files that would run code if they were unpickled, and run names that would lead out of the results folder."""

import dataclasses
import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from trials import Tally

from fl_taskarith.config.settings import Config
from fl_taskarith.data.datasets import load_dataset
from fl_taskarith.data.prefix_cache import open_or_make
from fl_taskarith.errors import ConfigError, FlTaskarithError
from fl_taskarith.masking.mask import load_mask
from fl_taskarith.models.weights import read_tensors
from fl_taskarith.one_shot.model_files import ModelFile
from fl_taskarith.storage.checkpoint import load_latest_checkpoint
from fl_taskarith.storage.client_files import read_client_state, read_frozen
from fl_taskarith.storage.run_folder import Logbook
from fl_taskarith.storage.verified_files import CHECKSUM_DIGITS

REFUSED, MADE_ANEW = "refused, not run", "not loaded, made anew"

NAMES = (
    *("../x", "..", ".", "/tmp/x", "/", "a/b", "a/../../b", "..\\x", "a\\b", "C:\\x", "C:x", "\\\\server\\share"),
    *("x\0y", "\0", "a\nb", "~", "~root", "-rf", ".hidden", "a b", "x" * 151, "x" * 5000),
    *("\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}\N{FULLWIDTH SOLIDUS}x", "a\N{FRACTION SLASH}b"),
    *("a\N{DIVISION SLASH}b", "\N{TWO DOT LEADER}/x", "x\N{RIGHT-TO-LEFT OVERRIDE}y", "a\ud800b", "%2e%2e%2fx"),
    *("é", "a:b", "con*", "$(touch x)", "`x`", "a;b", "a|b", "x\x1b[2J"),
)


@dataclasses.dataclass
class Payload:
    """Unpickled, it writes a file."""

    marker: Path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path, str]]:
        return Path.write_text, (self.marker, "code from a file was run")


def payloads(folder: Path, marker: Path) -> list[bytes]:
    """Pickles of every protocol, torch's archive and its older format, and a zip that holds a pickle."""
    contents = [pickle.dumps(Payload(marker), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    contents.append(pickle.dumps({"model": Payload(marker), "weight": np.zeros(3)}))
    for new_format in (True, False):
        torch.save({"weight": torch.zeros(3), "more": Payload(marker)}, folder / "made", pickle_module=pickle,
                   _use_new_zipfile_serialization=new_format)  # fmt: skip
        contents.append((folder / "made").read_bytes())
    with zipfile.ZipFile(folder / "made", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(marker)))
        archive.writestr("archive/version", "3")
    contents.append((folder / "made").read_bytes())
    return contents


def malicious_files(folder: Path) -> Tally:
    """Each payload as every kind of file that is read, under a name with the right checksum where names carry one."""
    tally, marker = Tally("pickles offered as data"), folder / "marker"
    contents = payloads(folder, marker)
    for content in contents[:-3]:  # they do run where they are unpickled, else nothing would be tried here
        pickle.loads(content)
        assert marker.exists()
        marker.unlink()
    for number, content in enumerate(contents):
        here = folder / str(number)
        for kind, use in _offers(here, content).items():
            trial = f"{kind}, payload {number}"
            try:
                outcome = MADE_ANEW if use() else ""
            except FlTaskarithError:
                outcome = REFUSED
            except Exception as error:
                outcome = ""
                trial += f": {type(error).__name__}: {error}"
            if marker.exists():
                marker.unlink()
                tally.lose(f"{trial}: it was run")
            elif outcome:
                tally.note(outcome)
            else:
                tally.lose(f"{trial}: accepted, or a traceback")
    return tally


def _offers(folder: Path, content: bytes) -> dict[str, Callable[[], bool]]:
    """How each kind of file is read, with the content in its place."""
    checksum = hashlib.sha256(content).hexdigest()

    def put(name: str, data: bytes = content) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    short = checksum[:CHECKSUM_DIGITS]
    put(f"checkpoints/round-000001-{short}.safetensors")
    put(f"000003/round-000001-{short}.safetensors")
    put(f"frozen-{short}.safetensors")
    put("cache/key.npy")
    put("cache/key.json", json.dumps({"sha256": checksum}).encode())
    array = np.array([Payload(folder.parent / "marker")], dtype=object)
    np.save(folder / "objects.npy", array, allow_pickle=True)
    objects = (folder / "objects.npy").read_bytes()
    put("objects/key.npy", objects)
    put("objects/key.json", json.dumps({"sha256": hashlib.sha256(objects).hexdigest()}).encode())
    for name in ("train", "test", "meta"):
        put(f"cifar-100-python/{name}")
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)

    def cache(name: str) -> bool:
        return len(open_or_make(folder / name, "key", images, lambda part: part.float().flatten(2), "float32")) == 2

    def accepted(read: Callable[[], object]) -> Callable[[], bool]:
        def offer() -> bool:
            read()
            return False

        return offer

    weights = {f"weights.{ending}": put(f"weights.{ending}") for ending in ("pth", "pt", "safetensors", "bin")}
    return {name: accepted(partial(read_tensors, path)) for name, path in weights.items()} | {
        "checkpoint": accepted(lambda: load_latest_checkpoint(folder / "checkpoints")),
        "client's state": accepted(lambda: read_client_state(folder, 3, f"round-000001-{short}.safetensors")),
        "frozen head and mask": accepted(lambda: read_frozen(folder, f"frozen-{short}.safetensors")),
        "mask": accepted(lambda: load_mask(put("mask.safetensors"))),
        "model to merge": accepted(lambda: ModelFile(put("model.safetensors"))),
        "prefix cache": lambda: cache("cache"),
        "prefix cache of objects": lambda: cache("objects"),
        "CIFAR-100": accepted(lambda: load_dataset("cifar100", folder, download=False)),
    }


def run_names(folder: Path) -> Tally:
    """Names of runs that are no plain folder names: refused, and nothing is made anywhere."""
    tally = Tally("run names that lead out of the results folder")
    results = folder / "below" / "results"
    results.mkdir(parents=True)
    before = sorted(folder.rglob("*"))
    for name in NAMES:
        try:
            with Logbook(Config(results_dir=str(results), run_name=name)):
                pass
        except ConfigError as error:
            if "run-name" in str(error) and sorted(folder.rglob("*")) == before:
                tally.note("refused")
            else:
                tally.lose(f"{name!r}: refused, but {error}")
        except Exception as error:
            tally.lose(f"{name!r}: {type(error).__name__}: {error}")
        else:
            tally.lose(f"{name!r}: accepted")
    return tally
