import os
import subprocess
import sys

import pytest

# Page faults of ten tensors of 64 MB, one after the other, once the heap has grown.
COUNT = """
import resource
import torch
from hf_circuit_sparsity.commands.memory import keep_freed_memory

told = keep_freed_memory()
torch.set_num_threads(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
before = faults()
for _ in range(10):
    torch.ones(2**24)
print(int(told), faults() - before)
"""


def faults(environment) -> tuple[int, int]:
    command = [sys.executable, "-c", COUNT]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told, count = ran.stdout.split()
    return int(told), int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_used_again(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    told, kept = faults(dict(os.environ))
    if not told:
        pytest.skip("the C library is not glibc")
    # The user's own setting, here the library's default, is left alone.
    tunables = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}
    not_told, given_back = faults({**os.environ, **tunables})
    assert not not_told and given_back > 100 * max(1, kept)
