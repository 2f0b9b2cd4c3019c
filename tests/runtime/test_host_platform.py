import os
import subprocess
import sys

# how often the kernel hands out a cleared page while 16 MiB are taken and given back 20 times
FAULTS = """
import resource
from hip_sglang.runtime.host_platform import settle_environment
settle_environment()
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [torch.ones(1 << 20) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
THEIRS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def faults(environment: dict[str, str]) -> int:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=ours | environment, check=True, stdout=subprocess.PIPE)
    return int(done.stdout)


def test_freed_memory_stays_unless_the_user_says_otherwise():
    assert 10 * faults({}) < faults(THEIRS)
