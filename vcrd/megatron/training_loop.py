"""The training loop that calls the forward step: megatron.training, Megatron-Bridge, or one that is not known.

It tells where the figures of an interval are written, which tokenizer the data was made with, and which settings the
job has. Nothing is imported for it: a loop that runs has imported its own modules.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Protocol

# Settings of the job that `compatibility` reads, by section of Bridge's configuration.
_BRIDGE_SETTINGS = {
    "dataset": ("reset_position_ids", "reset_attention_mask", "dataloader_inter_document_masking"),
}


class TrainingLoop(Protocol):
    """What the plug asks of a loop. The writers exist on the last rank, if the script wants them, and are else None.

    iteration: the step that is under way; the first is 1. iterations: the last one. log_interval: steps.
    tokenizer: the loop's, or None. arguments: the job's settings by Megatron's names, as `check_compatibility` reads
    them.
    """

    iteration: int
    iterations: int
    log_interval: int
    tensorboard: Any
    wandb: Any
    tokenizer: Any
    arguments: Any


class MegatronTraining:
    """`megatron.training`, which keeps everything in `megatron.training.global_vars`."""

    def __init__(self, variables: Any) -> None:
        self._variables = variables

    @property
    def arguments(self) -> Any:
        return self._variables.get_args()

    @property
    def iteration(self) -> int:
        return self.arguments.curr_iteration + 1

    @property
    def iterations(self) -> int:
        return self.arguments.train_iters

    @property
    def log_interval(self) -> int:
        return self.arguments.log_interval

    @property
    def tensorboard(self) -> Any:
        return self._variables.get_tensorboard_writer()

    @property
    def wandb(self) -> Any:
        return self._variables.get_wandb_writer()

    @property
    def tokenizer(self) -> Any:
        return getattr(self._variables, "_GLOBAL_TOKENIZER", None)


class BridgeTraining:
    """Megatron-Bridge's `pretrain` and `finetune`, which pass their GlobalState to the forward step."""

    def __init__(self, state: Any) -> None:
        self._state = state

    @property
    def arguments(self) -> Any:
        config = self._state.cfg
        restart = config.inprocess_restart
        found = {"inprocess_restart": restart is not None and restart.enabled}
        for section, names in _BRIDGE_SETTINGS.items():
            found |= {name: getattr(getattr(config, section), name, None) for name in names}
        return SimpleNamespace(**found)

    @property
    def iteration(self) -> int:
        return self._state.train_state.step + 1  # counted when the step has ended

    @property
    def iterations(self) -> int:
        return self._state.cfg.train.train_iters

    @property
    def log_interval(self) -> int:
        return self._state.cfg.logger.log_interval

    @property
    def tensorboard(self) -> Any:
        return self._state.tensorboard_logger

    @property
    def wandb(self) -> Any:
        return self._state.wandb_logger

    @property
    def tokenizer(self) -> Any:
        return self._state.tokenizer


def training_loop(arguments: Iterable[Any] = ()) -> TrainingLoop | None:
    """The loop of this process. arguments: those of a forward step, among which Bridge passes its state."""
    state = bridge_state(arguments)
    if state is not None:
        return BridgeTraining(state)
    variables = sys.modules.get("megatron.training.global_vars")
    running = variables is not None and getattr(variables, "_GLOBAL_ARGS", None) is not None
    return MegatronTraining(variables) if running else None


def bridge_state(arguments: Iterable[Any]) -> Any:
    """Bridge's GlobalState among the arguments of a forward step, or None."""
    kind = getattr(sys.modules.get("megatron.bridge.training.state"), "GlobalState", None)
    return None if kind is None else next((value for value in arguments if isinstance(value, kind)), None)


def signature_for_bridge(forward_step: Callable[..., Any]) -> inspect.Signature | None:
    """The parameters of a forward step with `state` before them, if Bridge is in use and would not pass its state."""
    bridge = sys.modules.get("megatron.bridge.training.utils.train_utils")
    if bridge is None or bridge.needs_global_state_injection(forward_step):
        return None
    others = inspect.signature(forward_step).parameters
    name = "global_state" if "state" in others else "state"  # Bridge passes its state to either
    state = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
    return inspect.Signature([state, *others.values()])
