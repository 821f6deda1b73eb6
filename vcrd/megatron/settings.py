"""Everything a user may choose for distillation inside Megatron: one dataclass for the loss and the link."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vcrd.link.settings import LinkSettings

_LINK_FIELDS = tuple(f.name for f in fields(LinkSettings))
# VCRD_* variables that other parts of vcrd read.
_OTHER_VARIABLES = ("VCRD_CPU_INSTRUCTION_SET",)


@dataclass(frozen=True)
class DistillSettings:
    """Settings of `vcrd.megatron.distill`; the loss fields are documented by `vcrd.validity_calibrated_kl`.

    validity: also "scores", student's and teacher's validity of each token as fields of the micro-batches, and steps:
        whether they carry the reasoning step of each token (`vcrd.megatron.external_validity`, docs/validity.md).
    invalid_rows: what happens to a token whose teacher is no distribution (a NaN, +inf, or nothing above -inf among its
        logits). "skip": its loss, weight and gradient are 0, and it is counted. "stop": the step raises before the
        optimizer runs, on every rank.
    fused_head: make the student's logits chunk by chunk inside the loss, never all of them
        (`vcrd.fused_validity_calibrated_kl`).
    fused_head_recompute: with `fused_head`, make each chunk's logits again in backward: a fourth product with the
        output layer, but no float32 gradient of it is kept from forward to backward. Needed on GPUs by a loss_func that
        weighs the tokens of a micro-batch alike in the first step and not later; one that never does is found out.
    vocab_size: the true vocabulary; columns past it are padding. None: the model's own, nothing is padding.
    sequence_length: the longest sequence, a number both jobs must agree on. None: the model's maximum.
    ahead: micro-batches drawn from the data iterator and asked of the teacher before the script draws them.
        None: as many as the link's `credits`. 0: nothing is drawn early, and the teacher never works ahead. Samples,
        random state and checkpoints are those of 0 with any other; where they could not be, it is 0 after a warning, or
        a ValueError says why (docs/metrics.md).
    telemetry_dir: folder for each rank's file of records: GPU, waits and figures (docs/metrics.md). None: no records.
        `python -m vcrd report` makes a page of it. Student and teacher may share one.
    telemetry_interval: seconds between two records of a rank's GPU, memory and time.
    link: `LinkSettings`, equal in the teacher's job.

    Each field, and each field of `link`, can come from the environment: VCRD_SHARPNESS=2, VCRD_ADDRESS=host:port.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    alpha: float = 0.1
    beta: float = 0.5
    validity: Any = "label"
    steps: bool = False
    sharpness: float = 4.0
    floor: float = 0.1
    ceiling: float = 1.9
    normalization: str = "none"
    ce_weight: float = 0.0
    invalid_rows: str = "skip"
    fused_head: bool = False
    fused_head_recompute: bool = False
    vocab_size: int | None = None
    sequence_length: int | None = None
    ahead: int | None = None
    telemetry_dir: str | os.PathLike | None = None
    telemetry_interval: float = 10.0
    link: LinkSettings = field(default_factory=LinkSettings)

    def __post_init__(self) -> None:
        for name in ("temperature", "alpha", "beta", "sharpness", "floor", "ceiling", "ce_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {value!r}")
        for name, least in (("vocab_size", 1), ("sequence_length", 1), ("ahead", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: expected an integer of at least {least} or None, got {value!r}")
        interval = self.telemetry_interval
        number = isinstance(interval, (int, float)) and not isinstance(interval, bool)
        if not number or not 0 < interval < float("inf"):
            raise ValueError(f"telemetry_interval: expected a positive number of seconds, got {interval!r}")
        if self.telemetry_dir is not None and not isinstance(self.telemetry_dir, (str, os.PathLike)):
            raise TypeError(
                f"telemetry_dir: expected a folder or None, got {type(self.telemetry_dir).__name__}"
            )
        if self.invalid_rows not in ("skip", "stop"):
            raise ValueError(f"invalid_rows: expected 'skip' or 'stop', got {self.invalid_rows!r}")
        for name in ("steps", "fused_head", "fused_head_recompute"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected True or False, got {value!r}")
        if not isinstance(self.link, LinkSettings):
            raise TypeError(f"link: expected LinkSettings, got {type(self.link).__name__}")
        if self.link.payload == "topk" and self.temperature != 1:
            raise ValueError(
                "temperature: expected 1 with the payload 'topk', whose tail has no mass at another, "
                f"got {self.temperature}"
            )

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, **overrides: Any
    ) -> DistillSettings:
        """Defaults, then VCRD_* variables of `environment` (default: the process's), then `overrides`.

        Raises ValueError that names the variable for an unknown VCRD_* name or a value of the wrong kind.
        """
        environment = os.environ if environment is None else environment
        own = {f.name: f for f in fields(cls) if f.name != "link"}
        link = {f.name: f for f in fields(LinkSettings)}
        found: dict[str, Any] = {}
        for variable, text in environment.items():
            if not variable.startswith("VCRD_") or variable in _OTHER_VARIABLES:
                continue
            name = variable.removeprefix("VCRD_").lower()
            if name not in own and name not in link:
                known = ", ".join("VCRD_" + n.upper() for n in (*own, *link))
                raise ValueError(f"{variable}: not a setting of vcrd; expected one of {known}")
            found[name] = _parse(variable, text, str((own.get(name) or link[name]).type))
        return cls().replaced(**{**found, **overrides})

    def replaced(self, **changes: Any) -> DistillSettings:
        """A copy with other values; names of `LinkSettings` fields reach `link`."""
        link = {name: changes.pop(name) for name in list(changes) if name in _LINK_FIELDS}
        if link:
            changes["link"] = replace(changes.get("link", self.link), **link)
        unknown = [name for name in changes if name not in {f.name for f in fields(self)}]
        if unknown:
            raise TypeError(f"{unknown[0]}: not a setting of vcrd")
        return replace(self, **changes)

    def loss_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `vcrd.validity_calibrated_kl` that do not depend on the micro-batch."""
        names = ("divergence", "temperature", "alpha", "beta", "validity", "sharpness", "floor", "ceiling")
        found = {name: getattr(self, name) for name in (*names, "normalization", "ce_weight")}
        # Also where the run is to stop: it does so at the end of the step, and knows then how many there were.
        return {**found, "skip_invalid_teacher": True}


def _parse(variable: str, text: str, annotation: str) -> Any:
    kind = annotation.split(" ")[0]
    if "None" in annotation and text.lower() in ("", "none"):
        return None
    if kind == "bool":
        if text.lower() not in ("0", "1", "false", "true"):
            raise ValueError(f"{variable}: expected 0, 1, false or true, got {text!r}")
        return text.lower() in ("1", "true")
    if kind in ("int", "float"):
        try:
            return int(text) if kind == "int" else float(text)
        except ValueError:
            expected = "an integer" if kind == "int" else "a number"
            raise ValueError(f"{variable}: expected {expected}, got {text!r}") from None
    return text
