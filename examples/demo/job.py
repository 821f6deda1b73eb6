"""One process of a job, started by torchrun as `-m examples.demo.job student|teacher SETTINGS`.

Without a GPU it switches Megatron to CPU and gloo before any import of Megatron. If it fails, it writes one message.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import threading
import time
from pathlib import Path

from .settings import DemoSettings

LAUNCHER = "DEMO_LAUNCHER"  # environment: the process that started both jobs


def main(name: str, settings: DemoSettings) -> None:
    """Runs this rank of the job. Writes an error message to logs/NAME-RANK.failed, for the launcher."""
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    try:
        _run(name, settings)
    except Exception as error:
        # gloo's message about a lost connection does not help a user of the demo.
        reason = re.sub(
            r":? ?\[[^\]]*gloo.*", "", (str(error).strip() or type(error).__name__).splitlines()[0]
        )
        path = settings.folder / "logs" / f"{name}-{os.environ['RANK']}.failed"
        path.with_suffix(".writing").write_text(f"{_kind(error)}\n{reason}\n")
        path.with_suffix(".writing").rename(path)
        raise


def _kind(error: Exception) -> str:
    """The origin of the error: "own", "link" for the other job, "peer" for another rank of this job."""
    if any(kind.__name__ == "LinkError" for kind in type(error).__mro__):
        return "link"
    of_peer = isinstance(error, RuntimeError) and ("gloo" in str(error) or "Connection" in str(error))
    return "peer" if of_peer else "own"


def _run(name: str, settings: DemoSettings) -> None:
    import torch

    from vcrd.megatron import cpu

    tensor, pipeline = {
        "student": (settings.student_tensor_size, 1),
        "teacher": (1, settings.teacher_stages),
    }[name]
    torch.set_num_threads(1)  # five processes on few cores
    torch.manual_seed(settings.seed)
    if settings.gpu:
        torch.cuda.set_device(0)
    with contextlib.nullcontext() if settings.gpu else cpu.on_cpu():
        import torch.distributed as dist
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        dist.init_process_group("nccl" if settings.gpu else "gloo")
        parallel_state.initialize_model_parallel(tensor, pipeline)
        model_parallel_cuda_manual_seed(settings.seed)
        importlib.import_module(f".{name}", __package__).run(settings)
        dist.destroy_process_group()


def _end_with_the_launcher() -> None:
    """Ends this process when torchrun or the launcher has ended for any reason."""
    launcher, parent = int(os.environ.get(LAUNCHER, os.getppid())), os.getppid()
    while os.getppid() == parent and _is_alive(launcher):
        time.sleep(0.5)
    os._exit(1)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


if __name__ == "__main__":
    main(sys.argv[1], DemoSettings.load(Path(sys.argv[2])))
