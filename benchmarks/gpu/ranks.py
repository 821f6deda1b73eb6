"""Starts NCCL ranks as processes that share one GPU. NCCL treats each of them as a separate host.

NCCL refuses two ranks on one device of one host. With a different NCCL_HOSTID in each process (from NCCL 2.30 on with
NCCL_MULTI_RANK_GPU_ENABLE) they count as two hosts and use sockets of the loopback interface.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping

ONE_GPU = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_RAS_ENABLE": "0",
    "NCCL_MAX_CTAS": "2",
}


def run_together(arguments: Mapping[str, list[str]], seconds: float) -> str | None:
    """Runs a Python process with these arguments for each name. Returns None, or why a process failed.

    The first failure ends all processes, because the others may wait in a collective. So does the time limit.
    """
    # One thread per process, because the processes share the cores.
    environment = {**os.environ, **ONE_GPU, "OMP_NUM_THREADS": "1"}
    processes = {
        name: subprocess.Popen([sys.executable, *given], env={**environment, "NCCL_HOSTID": f"host-{name}"})
        for name, given in arguments.items()
    }
    deadline = time.monotonic() + seconds
    try:
        while True:
            codes = {name: process.poll() for name, process in processes.items()}
            failed = {name: code for name, code in codes.items() if code}
            if failed:
                return "; ".join(f"{name} ended with exit status {code}" for name, code in failed.items())
            late = [name for name, code in codes.items() if code is None]
            if not late:
                return None
            if time.monotonic() > deadline:
                return f"{', '.join(late)} did not end within {seconds:g} seconds"
            time.sleep(0.05)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
