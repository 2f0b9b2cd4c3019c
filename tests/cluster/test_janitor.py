"""What a killed process leaves behind, and who removes it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

PROCESS = """
import os, sys, time
from pathlib import Path
from hip_cluster.janitor import Janitor
janitor = Janitor()
Path(f"/dev/shm/sgl_shm_test_{os.getpid()}_0000").write_text("x")
for name in ("socket", "other"):
    Path(sys.argv[1], name).write_text("x")
Path(sys.argv[1], "folder").mkdir()
janitor.sweep_later(sys.argv[1] + "/sock*", sys.argv[1] + "/folder")
print("there", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm here")
def test_a_killed_process_leaves_no_shared_memory_and_no_socket(tmp_path):
    line = [sys.executable, "-c", PROCESS, str(tmp_path)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        left = sorted(path.name for path in tmp_path.iterdir())
        left += [path.name for path in Path("/dev/shm").glob(f"sgl_shm_test_{process.pid}_*")]
        if left == ["other"]:
            return
        time.sleep(0.05)
    pytest.fail(f"left: {left}")
