"""ModelOpt's distillation in Megatron-Bridge with `attach`, against vcrd's plug in the same loop."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import modelopt_bridge
import pytest
import torch
from ports import free_port

BRIDGE = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.bridge")


@pytest.mark.slow
@pytest.mark.skipif(not BRIDGE, reason="Megatron-Bridge needs Python 3.12")
@pytest.mark.parametrize("size", [1, 2])
def test_distill_of_bridge_trains_as_the_plug_does(size, tmp_path):
    ports = [str(free_port()) for _ in modelopt_bridge.WAYS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, modelopt_bridge.__file__, str(tmp_path), str(rank), str(size), *ports],
            env=environment,
            stdout=(tmp_path / f"{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(size)
    ]
    try:
        for rank, process in enumerate(ranks):
            assert process.wait(250) == 0, (tmp_path / f"{rank}.log").read_text()[-5000:]
    finally:
        for process in ranks:
            process.kill()
    for rank in range(size):
        by_modelopt, by_plug = (load(tmp_path / f"{way}-{rank}.pt") for way in modelopt_bridge.WAYS)
        for ours, plugs in zip(by_modelopt["steps"], by_plug["steps"], strict=True):
            assert ours["total loss"] == pytest.approx(plugs["lm loss"], rel=1e-5)
            assert ours["grad norm"] == pytest.approx(plugs["grad norm"], rel=1e-5)
        torch.testing.assert_close(by_modelopt["weights"], by_plug["weights"], rtol=1e-4, atol=1e-5)


def load(path: Path) -> dict:
    return torch.load(path)
