"""Records as from the ranks of a run, with any length and number of ranks, for the tests of the page."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

BEGIN = 1_790_000_000.0
SENTENCE = "student waited 31 % of the step for teacher replica 1, which had not begun to answer; try more"
TOKENS = {
    "floor": 0.1,
    "ceiling": 1.9,
    "samples": [
        {
            "name": "Circles & <lines>",
            "text": "How many points?",
            "stages": {
                stage: [[f" word{n}", 0.1 + 1.8 * ((n * shift) % 17) / 16] for n in range(90)]
                for stage, shift in (("before training", 5), ("after training", 3))
            },
        }
    ],
}


def write(
    folder: Path,
    intervals: int = 200,
    every: int = 10,
    ranks: int = 4,
    teachers: int = 4,
    records: int = 120,
    gpus: bool = True,
) -> Path:
    """A run of intervals x every iterations of 0.8 s: `ranks` student ranks, two teacher replicas, a restart."""
    folder.mkdir(parents=True, exist_ok=True)
    length = 0.8 * intervals * every
    for role, size in (("student", ranks), ("teacher", teachers)):
        for rank in range(size):
            with open(folder / f"{role}-{rank:05d}.jsonl", "w") as file:
                for line in _lines(role, rank, size, records, length, gpus):
                    file.write(json.dumps(line) + "\n")
                if role == "student" and rank == size - 1:
                    for line in _figures(rank, intervals, every):
                        file.write(json.dumps(line) + "\n")
    (folder / "tokens.json").write_text(json.dumps(TOKENS))
    return folder


def _lines(role: str, rank: int, size: int, records: int, length: float, gpus: bool):
    who = {"role": role, "rank": rank, "host": f"node{rank // 8:02d}", "iteration": 0}
    noise = random.Random(1000 * rank + len(role))
    start = {
        **{"world": size, "tensor_size": 2, "pipeline_size": 1, "data_size": max(1, size // 2)},
        **{"data_rank": rank // 2, "torch": "2.11.0", "validity": "label", "device": "NVIDIA H100 80GB HBM3"},
        "settings": {"divergence": "forward_kl", "sharpness": 4.0, "payload": "float16", "credits": 2},
    }
    interval = length / records
    for number in range(records):
        moment = BEGIN + number * interval
        if number in (0, records // 2) and (role == "student" or number == 0):
            yield {"time": moment, "kind": "start", **who, **start}
        found = {
            "seconds": interval,
            "host_memory_bytes": 6e9 + 1e9 * noise.random() + 3e9 * number / records,
        }
        if gpus:
            found |= {
                "gpu_memory_bytes": (61e9 if role == "student" else 42e9) + 4e9 * noise.random(),
                "gpu_utilization": min(1.0, (0.9 if role == "student" else 0.6) + 0.1 * noise.random()),
                "gpu_power_watts": 520 + 120 * noise.random(),
                "nvlink_sent_bytes_per_second": 3e10 * noise.random(),
                "nvlink_received_bytes_per_second": 3e10 * noise.random(),
            }
        if role == "student":
            found |= {"steps": 12, "link_bytes": int(2e8 * interval), "teacher_wait": 0.2 * interval}
        else:
            busy = (0.3 + 0.3 * (rank // 2)) * interval
            found |= {
                "answering": busy + 0.1 * interval,
                "sending": 0.1 * interval,
                "idle": 0.9 * interval - busy,
            }
            found |= {"answers": 40, "bytes_sent": int(4e8 * interval)}
        yield {"time": moment + interval, "kind": "rank", **who, **found}


def _figures(rank: int, intervals: int, every: int):
    noise = random.Random(5)
    who = {"role": "student", "rank": rank, "host": "node00"}
    for number in range(1, intervals + 1):
        part = number / intervals
        seconds = 0.8 * every
        wait = (0.31 if part < 0.4 else 0.02) * seconds * (0.9 + 0.2 * noise.random())
        centre = 128 + int(4 * math.sin(7 * part))
        spread = 6 + 10 * part
        counts = [round(4000 * math.exp(-(((n - centre) / spread) ** 2))) for n in range(90, 145)]
        loss = 0.7 + 3 * math.exp(-5 * part) + 0.05 * noise.gauss(0, 1)
        first = {"time": BEGIN + number * seconds, "iteration": every * number, **who}
        yield {
            **first,
            "kind": "figures",
            **{"steps": every, "seconds": seconds, "tokens": sum(counts), "loss": loss, "invalid_rows": 0.0},
            **{"divergence": 0.9 * loss, "cross_entropy": 1.4 + loss, "weight": 1 - 0.1 * part},
            **{"weight_p10": 0.6 - 0.2 * part, "weight_p90": 1.4, "agreement": 0.5 + 0.3 * part},
            **{"student_more_valid": 0.2 + 0.25 * part, "verifier_time": 0.0, "teacher_wait": wait},
            **{"forward": 0.25 * seconds + wait, "backward": 0.3 * seconds, "gradients": 0.03 * seconds},
            "between": 0.1 * seconds,
            "teacher_wait_by_replica": {"0": 0.4 * wait, "1": wait}
            if number % 3
            else {"0": wait, "1": 0.2 * wait},
            "weight_histogram": [90, counts],
        }
        if wait > 0.05 * seconds:
            share = wait / seconds
            yield {
                **first,
                "kind": "starved",
                "replica": 1,
                "share": share,
                "cause": "teacher",
                "sentence": SENTENCE,
            }
