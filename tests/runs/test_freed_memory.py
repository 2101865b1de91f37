import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from mmlab.runs.freed_memory import keep_freed_memory

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for size in (1 << 24, 1 << 26):
    given_back = [faults(size) for _ in range(3)][-1]
    print(given_back)
keep_freed_memory()
for size in (1 << 26, 1 << 24):
    kept = [faults(size) for _ in range(3)][-1]
    print(kept)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
def test_freed_memory_is_used_again_without_asking_the_system():
    printed = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    small, large, large_kept, small_kept = map(int, printed.split())
    assert large > 5000 or small > 2000, "the system already kept the memory"
    assert large_kept < 100 and small_kept < 100
