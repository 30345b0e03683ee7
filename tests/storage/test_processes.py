"""Worker processes end with the one that started them."""

import subprocess
import sys
from pathlib import Path

PARENT = """
import os, time
from fl_taskarith.storage.processes import worker_pool

if __name__ == "__main__":
    pool = worker_pool(2, threads=1)
    working = [pool.submit(time.sleep, 600) for _ in range(2)]
    while not all(future.running() for future in working):
        time.sleep(0.1)
    print(len(pool._processes), flush=True)
    time.sleep(600)
"""


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "2\n"
        parent.kill()
        assert parent.communicate(timeout=60)[0] == "", "the end of the output that all three write to"
