"""Writes that fail: a disk that fills up at any write of a run, files that cannot grow, a folder that is read-only.

A trial ends well where the run stops with an error of ours that names a file or folder of the run, and the same
command, once there is room again, ends as the run that nothing disturbed.
"""

import contextlib
import dataclasses
import errno
import io
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kill import differences
from trials import Tally

from fl_taskarith import simulate
from fl_taskarith.cli.command import main as command
from fl_taskarith.client.app import app
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import FlTaskarithError
from fl_taskarith.server.launch import run_federation
from fl_taskarith.storage.run_folder import Row

STOPPED = "stopped with the path, then continued to the same bits"
NOBODY = 65534


def fault_at_every_write(config: Config, trials: int | None) -> Tally:
    """The n-th flush or rename of a run fails, and all after it; for every n, or for `trials` of them spread evenly."""
    tally = Tally("disk full at the n-th write")
    whole = simulate(config, run_name="whole").folder
    with _full_disk(after=10**9) as writes:
        simulate(config, run_name="counted")
    count = len(writes)
    chosen = range(count) if trials is None else sorted({round(n * (count - 1) / (trials - 1)) for n in range(trials)})
    for number in chosen:
        named = dataclasses.replace(config, run_name=f"full-{number}")
        trial = f"write {number} of {count}"
        try:
            with _full_disk(after=number):
                simulate(named)
        except FlTaskarithError as error:
            if named.run_name not in str(error):
                tally.lose(f"{trial}: the error names no file of the run: {error}")
                continue
        except Exception as error:
            tally.lose(f"{trial}: {type(error).__name__}: {error}")
            continue
        tally.settle(STOPPED, differences(whole, simulate(named).folder), trial)
    return tally


@contextmanager
def _full_disk(after: int) -> Iterator[list[str]]:
    """Flushing and renaming fails from number `after` on; yields the list that grows by one entry for each."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def fail(name: str) -> None:
        calls.append(name)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")

    def flush(descriptor: int) -> None:
        fail("fsync")
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        fail("replace")
        replace(source, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", flush)
        patched.setattr(os, "replace", rename)
        yield calls


def limited_files(config: Config, trials: int, seed: int = 0) -> Tally:
    """The kernel refuses to let any file grow beyond a size drawn at random (RLIMIT_FSIZE), in a process of its own."""
    tally = Tally("files cannot grow (RLIMIT_FSIZE)")
    whole = simulate(config, run_name="whole").folder
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fl_taskarith.server.simulate"])
    drawn = random.Random(seed)
    for number in range(trials):
        named = dataclasses.replace(config, run_name=f"limited-{number}")
        limit = int(largest ** drawn.uniform(0.3, 1.0)) - 1  # of every order of magnitude: a row, run.json, the model
        said = Path(config.results_dir) / "said.txt"
        process = context.Process(target=_run_limited, args=(named, limit, said))
        process.start()
        process.join()
        trial, message = f"limit of {limit} bytes", said.read_text()
        if process.exitcode != 1 or "CheckpointError: " not in message or named.run_name not in message:
            tally.lose(f"{trial}: status {process.exitcode}, said {message!r}")
            continue
        tally.settle(STOPPED, differences(whole, simulate(named).folder), trial)
    return tally


def _run_limited(config: Config, limit: int, said: Path) -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(output):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        usual = Config().to_run_config()
        settings = (f"{key}={value}" if isinstance(value, str) else f"{key}={str(value).lower()}"
                    for key, value in config.to_run_config().items() if value != usual[key])  # fmt: skip
        status = command(["simulate", *settings])
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said.write_text(output.getvalue())
    sys.exit(status)


def small_disks(config: Config, trials: int, seed: int = 0) -> Tally:
    """A real file system (tmpfs) of a size drawn at random fills up. No trials where one may not be mounted."""
    tally = Tally("disk full (a small tmpfs)")
    whole = simulate(config, run_name="whole").folder
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    drawn = random.Random(seed)
    for _ in range(trials):
        kilobytes = drawn.randint(8, size * 9 // 10 // 1024)
        with tempfile.TemporaryDirectory() as folder, _mounted(Path(folder), kilobytes) as mounted:
            if not mounted:
                break
            there = dataclasses.replace(config, results_dir=folder, run_name="small")
            trial = f"{kilobytes} kB"
            try:
                simulate(there)
            except FlTaskarithError as error:
                if folder not in str(error):
                    tally.lose(f"{trial}: the error names no path: {error}")
                    continue
            except Exception as error:
                tally.lose(f"{trial}: {type(error).__name__}: {error}")
                continue
            else:
                tally.lose(f"{trial}: the run finished")
                continue
            subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
            tally.settle(STOPPED, differences(whole, simulate(there).folder), trial)
    return tally


@contextmanager
def _mounted(folder: Path, kilobytes: int) -> Iterator[bool]:
    """A tmpfs of that size at `folder`; yields whether this machine lets us."""
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    there = sys.platform == "linux" and shutil.which("mount") is not None and os.geteuid() == 0
    mounted = there and subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def read_only_folders(config: Config) -> Tally:
    """Before the start, and after each round: the run's folders lose their write permission."""
    tally = Tally("folder read-only from some round on")
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o777)
        folder = Path(parent) / "results"
        with _as_nobody():
            try:
                folder.mkdir()
            except PermissionError:  # the folder of temporary files is closed to others
                return tally
            there = dataclasses.replace(config, results_dir=str(folder))
            whole = simulate(there, run_name="whole").folder
            for closed_after in range(-1, config.num_rounds):
                run = folder / f"closed-{closed_after}"
                trial, wrong = f"read-only after round {closed_after}", "the run finished"
                try:
                    _run_closed(dataclasses.replace(there, run_name=run.name), run, closed_after)
                except FlTaskarithError as error:
                    wrong = "" if run.name in str(error) else f"the error names no path: {error}"
                except Exception as error:
                    wrong = f"{type(error).__name__}: {error}"
                _permit(folder, 0o755)
                again = simulate(there, run_name=run.name).folder
                tally.settle(STOPPED, [wrong] if wrong else differences(whole, again), trial)
    return tally


def _run_closed(config: Config, run: Path, closed_after: int) -> None:
    def close(server_round: int, num_rounds: int, row: Row) -> None:
        if server_round == closed_after:
            _permit(run, 0o555)

    if closed_after < 0:
        run.parent.chmod(0o555)
    run_federation(config, app, progress=close)


def _permit(folder: Path, mode: int) -> None:
    for each in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        with contextlib.suppress(PermissionError):  # of another user
            each.chmod(mode)


@contextmanager
def _as_nobody() -> Iterator[None]:
    """As a user whom permissions bind, where we are root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
