"""The machine, the versions and the commit that a record was made with."""

import os
import platform
import re
import subprocess
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fl_taskarith.storage.paths import checkout

PACKAGES = ("fl-taskarith", "flwr", "torch", "torchvision", "timm", "numpy")


def environment() -> dict[str, Any]:
    """Return versions, machine and commit, for the records of runs and benchmarks."""
    return {"started": now(), **_of_this_process()}


@cache
def _of_this_process() -> dict[str, Any]:
    """Return what stays while a process lives: the commit is that of the code which it has loaded."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "machine": {"platform": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        "git_commit": _git_commit(),
    }


def _processor() -> str:
    """Return the processor's name, which Linux has in /proc."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _git_commit() -> str | None:
    """Return the commit of the installed checkout, with "+" if it has uncommitted changes; None outside one."""
    root = checkout()
    if root is None:
        return None
    try:
        return subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """Return the local time with its offset from UTC, in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
