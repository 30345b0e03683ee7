"""A SuperLink and SuperNodes as real processes on this machine, as the README starts them, and stopped for sure."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.run_folder import read_rounds

ROOT = Path(__file__).parents[2]
PR_SET_PDEATHSIG = 1  # of Linux's prctl
PATIENCE = 240.0  # seconds for what is waited for: a round on busy cores, or the SuperLink to miss two heartbeats


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _die_with_the_parent() -> None:
    """Also when the tests themselves are killed; what a process starts watches it and ends with it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def make_certificates(folder: Path) -> None:
    """A certificate authority ca.pem, and server.pem with server.key for this machine, by the README's commands."""
    commands = [
        'openssl req -x509 -newkey rsa:4096 -nodes -keyout ca.key -out ca.pem -days 365 -subj "/CN=my CA" '
        '-addext "keyUsage=critical,keyCertSign,cRLSign"',
        "openssl req -x509 -CA ca.pem -CAkey ca.key -newkey rsa:4096 -nodes -keyout server.key -out server.pem "
        '-days 365 -subj "/CN=superlink" -addext "basicConstraints=critical,CA:FALSE" '
        '-addext "subjectAltName=IP:127.0.0.1,DNS:localhost"',
    ]
    for command in commands:
        subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True)


class Deployment:
    """Everything in `folder`: each process has a FLWR_HOME and a log of its own there, each SuperNode a disk."""

    def __init__(self, folder: Path, certificates: Path | None = None) -> None:
        self.folder = folder
        self.certificates = certificates
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "cli").mkdir(parents=True)
        security = f'root-certificates = "{certificates}/ca.pem"' if certificates else "insecure = true"
        (folder / "cli" / "config.toml").write_text(
            f'[superlink]\ndefault = "deployment"\n\n[superlink.deployment]\naddress = "{self.address}"\n{security}\n'
        )

    def start_superlink(self) -> None:
        host, port = self.address.split(":")
        names = ("certfile", "server.pem"), ("keyfile", "server.key"), ("ca-certfile", "ca.pem")
        security = [word for option, name in names for word in (f"--ssl-{option}", f"{self.certificates}/{name}")]
        self._start("superlink", "flower-superlink", "--host", host, "--port", port,
                    *(security if self.certificates else ["--insecure"]))  # fmt: skip

    def start_supernode(self, partition: int) -> None:
        node_config = f'partition-id={partition} num-partitions=3 state-dir="{self.disk(partition)}"'
        security = ["--root-certificates", f"{self.certificates}/ca.pem"] if self.certificates else ["--insecure"]
        self._start(f"supernode-{partition}", "flower-supernode", "--superlink", self.address, "--port", free_port(),
                    "--node-config", node_config, *security)  # fmt: skip

    def kill_supernode(self, partition: int) -> None:
        """As when its machine loses power: the process and all that it started, at once."""
        process = self.processes.pop(f"supernode-{partition}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def disk(self, partition: int) -> Path:
        return self.folder / f"disk-{partition}"

    def flwr(self, *words: str) -> dict[str, Any]:
        """What a command of Flower's own says, as JSON."""
        done = subprocess.run(["flwr", *words, "--format", "json"], env=self._environment("cli"), cwd=self.folder,
                              capture_output=True, text=True, check=False, timeout=PATIENCE)  # fmt: skip
        said = f"{done.stdout}\n{done.stderr}\n{self.logs()}"
        assert done.returncode == 0, said
        answer: dict[str, Any] = json.loads(done.stdout)
        assert answer["success"], said
        return answer

    def run(self, settings: str) -> str:
        """Submits a run of the app; returns its id."""
        return str(self.flwr("run", str(ROOT), "deployment", "--run-config", settings)["run-id"])

    def finish(self, run: str) -> str:
        """Waits for a run to end; returns its status."""
        status = ""

        def ended() -> bool:
            nonlocal status
            status = self.flwr("list", "deployment", "--run-id", run)["runs"][0]["status"]
            return status.startswith("finished")

        self.wait_until(ended, 5.0)
        return status

    def wait_for_round(self, results: Path, server_round: int) -> None:
        """Until a run has written that round to its rounds.csv."""

        def written() -> bool:
            try:
                return any(row["round"] == server_round for row in read_rounds(results))
            except (OSError, CheckpointError):
                return False

        self.wait_until(written, 0.1)

    def wait_until(self, done: Callable[[], bool], every: float) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} has ended.\n{self.logs()}"
            assert time.monotonic() < deadline, f"Nothing for {PATIENCE:g} s.\n{self.logs()}"
            time.sleep(every)

    def logs(self) -> str:
        """The end of every log."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(self.folder.glob("*.log")))

    def _listens(self) -> bool:
        host, port = self.address.split(":")
        try:
            socket.create_connection((host, int(port)), 1.0).close()
        except OSError:
            return False
        return True

    def _environment(self, name: str) -> dict[str, str]:
        return {
            **os.environ,
            "FLWR_HOME": str(self.folder / name),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(command, env=self._environment(name), cwd=self.folder, stdout=log,
                                                    stderr=log, start_new_session=True,
                                                    preexec_fn=_die_with_the_parent)  # fmt: skip

    def __enter__(self) -> Self:
        try:
            self.start_superlink()
            self.wait_until(self._listens, 0.2)
            for partition in range(3):
                self.start_supernode(partition)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        """SIGKILL to every process group; what the SuperLink put into another one is found by its FLWR_HOME."""
        for process in self.processes.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in self._left():
            os.kill(pid, signal.SIGKILL)

    def _left(self) -> list[int]:
        mark = f"FLWR_HOME={self.folder}/".encode()
        pids = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in environment.read_bytes():
                    pids.append(int(environment.parent.name))
            except OSError:
                continue  # it has ended, or is somebody else's
        return pids
