"""The options of `python -m vcrd plan`, and the scenario that they describe. Fast: no torch.

Every wrong input is an OptionError of one sentence that begins with the option.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from vcrd.plan.catalogue import GPUS, MODELS
from vcrd.plan.scenario import Gpu, Model, Scenario

_SIDE = (
    "a model and its layout, as {example}; in place of a name params=8.2e9,hidden=4096,layers=36,vocab=151936 "
    "(and active=, attention=, tied=1 where they differ); layout: {keys}"
)
_TEACHER_LAYOUT = ("tp", "pp", "replicas")
_STUDENT_LAYOUT = ("tp", "pp", "cp", "dp", "ep")
_MODEL_KEYS = ("params", "hidden", "layers", "vocab")
_MODEL_EXTRAS = ("active", "attention", "tied")
_TRANSPORTS = {"auto": True, "nccl": True, "tcp": False}  # whether the plan is for NCCL
_GPU_KEYS = ("bf16", "memory", "bandwidth", "host")
_LARGEST = 1e15  # above every count here, and still exact as a float


class OptionError(ValueError):
    """A wrong option of a command; the text is all that a user needs to see."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of `plan`. Values stay text here, so that each mistake is reported by `scenario_of` in the same way."""
    add_run_options(parser)
    add = parser.add_argument
    add("--network", default="5", help="GB/s of one rank in each direction (5; a NIC of 400 Gb/s carries 50)")
    add("--transport", default="auto", help="as the link's setting: auto (planned as nccl), nccl, tcp (auto)")
    add("--json", action="store_true", help="everything as JSON instead")


def add_run_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup, required: bool = True) -> None:
    """What describes a run. required: both sides must be given."""
    add = parser.add_argument
    teacher, student = "Qwen3-32B,tp=8,replicas=2", "Qwen3-4B,tp=2,dp=8"
    add(
        "--teacher",
        required=required,
        help=_SIDE.format(example=teacher, keys="tp, pp (1), replicas (as many as needed)"),
    )
    add("--student", required=required, help=_SIDE.format(example=student, keys="tp, pp, cp, dp, ep (1)"))
    add("--sequence", default="4096", help="tokens of a sequence (4096)")
    add("--micro-batch", default="1", help="sequences of a micro-batch (1)")
    add("--micro-batches", default="8", help="micro-batches of a step on each data rank (8)")
    add("--credits", default="2", help="micro-batches asked ahead, as the link's setting (2)")
    add("--top-k", default="64", help="tokens per position of the payload topk (64)")
    add(
        "--gpu",
        default="h100",
        help=f"of the student and the teacher: {', '.join(GPUS)}, or "
        "bf16=989,fp8=1979,memory=80,bandwidth=3350,host=64: dense TFLOP/s, GB, GB/s (h100)",
    )
    add("--teacher-gpu", default=None, help="where the teacher's differ")
    add("--student-mfu", default="0.4", help="share of the peak that the student reaches (0.4)")
    add("--teacher-mfu", default="0.4", help="share of the peak that the teacher reaches, forward only (0.4)")
    add("--recompute", action="store_true", help="the student recomputes its activations (4 forwards, not 3)")
    add("--student-fp8", action="store_true", help="the student computes in FP8")
    add("--teacher-fp8", action="store_true", help="the teacher computes in FP8")
    add(
        "--make-vocab-size-divisible-by",
        default="128",
        help="times tp: to what Megatron pads the vocabulary (128)",
    )


def scenario_of(options: argparse.Namespace) -> Scenario:
    """The scenario, or an OptionError that names the option."""
    teacher, at_teacher = _side("--teacher", options.teacher, _TEACHER_LAYOUT)
    student, at_student = _side("--student", options.student, _STUDENT_LAYOUT)
    gpu = _gpu("--gpu", options.gpu)
    teacher_gpu = gpu if options.teacher_gpu is None else _gpu("--teacher-gpu", options.teacher_gpu)
    scenario = Scenario(
        teacher=teacher,
        student=student,
        teacher_gpu=teacher_gpu,
        student_gpu=gpu,
        teacher_tensor=at_teacher["tp"],
        teacher_pipeline=at_teacher["pp"],
        replicas=at_teacher["replicas"],
        student_tensor=at_student["tp"],
        student_pipeline=at_student["pp"],
        student_context=at_student["cp"],
        student_data=at_student["dp"],
        student_expert=at_student["ep"],
        sequence=whole("--sequence", options.sequence),
        batch=whole("--micro-batch", options.micro_batch),
        micro_batches=whole("--micro-batches", options.micro_batches),
        credits=whole("--credits", options.credits),
        top_k=whole("--top-k", options.top_k),
        network=_positive("--network", options.network) * 1e9,
        over_nccl=_over_nccl(options.transport),
        student_mfu=_share("--student-mfu", options.student_mfu),
        teacher_mfu=_share("--teacher-mfu", options.teacher_mfu),
        recompute=options.recompute,
        student_fp8=options.student_fp8,
        teacher_fp8=options.teacher_fp8,
        vocab_multiple=whole("--make-vocab-size-divisible-by", options.make_vocab_size_divisible_by),
    )
    _check(scenario)
    return scenario


def _check(run: Scenario) -> None:
    """What only shows when two options are seen together."""
    if run.student.vocab != run.teacher.vocab:
        raise OptionError(
            f"--student: its vocabulary must be the teacher's, {run.teacher.vocab}, got {run.student.vocab}"
        )
    if run.replicas is not None and run.replicas > run.student_data:
        raise OptionError(
            f"--teacher: replicas must be at most the student's data-parallel size {run.student_data}, "
            f"got {run.replicas}"
        )
    for option, model, stages in (
        ("--teacher", run.teacher, run.teacher_pipeline),
        ("--student", run.student, run.student_pipeline),
    ):
        if stages > model.layers:
            raise OptionError(f"{option}: pp must be at most the {model.layers} layers, got {stages}")
    if (run.student_data * run.student_context) % run.student_expert:
        raise OptionError(
            f"--student: ep must divide dp times cp, {run.student_data * run.student_context}, "
            f"got {run.student_expert}"
        )
    if run.student_context > 1 and run.sequence % (2 * run.student_context):
        raise OptionError(
            f"--sequence: must be a multiple of {2 * run.student_context}, twice the student's cp, got {run.sequence}"
        )
    if run.top_k > run.vocab:
        raise OptionError(f"--top-k: must be at most the vocabulary of {run.vocab}, got {run.top_k}")
    for option, asked, gpu in (
        ("--student-fp8", run.student_fp8, run.student_gpu),
        ("--teacher-fp8", run.teacher_fp8, run.teacher_gpu),
    ):
        if asked and gpu.fp8 is None:
            raise OptionError(
                f"{option}: the GPU must have FP8, got {gpu.name}, of which no FP8 peak is known"
            )


def _side(option: str, text: str, layout: tuple[str, ...]) -> tuple[Model, dict[str, Any]]:
    first, _, rest = text.partition(",")
    name = None if "=" in first else first.strip()
    pairs = _pairs(option, text if name is None else rest)
    own = (*_MODEL_KEYS, *_MODEL_EXTRAS) if name is None else ()
    for key in pairs:
        if key not in layout and key not in own:
            known = ", ".join((*own, *layout))
            raise OptionError(f"{option}: expected keys among {known}, got {key!r}")
    places = {key: whole(f"{option}: {key}", pairs.get(key, "1")) for key in layout}
    if "replicas" not in pairs:
        places["replicas"] = None
    model = _described(option, pairs) if name is None else _named(option, name)
    return model, places


def _over_nccl(name: str) -> bool:
    if name not in _TRANSPORTS:
        raise OptionError(f"--transport: expected one of {', '.join(_TRANSPORTS)}, got {name!r}")
    return _TRANSPORTS[name]


def _named(option: str, name: str) -> Model:
    found = {known.lower(): model for known, model in MODELS.items()}.get(name.lower())
    if found is not None:
        return found
    close = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(MODELS)}"
    raise OptionError(
        f"{option}: expected a known model or params=..,hidden=..,layers=..,vocab=.., got {name!r}; {hint}"
    )


def _described(option: str, pairs: Mapping[str, str]) -> Model:
    missing = [key for key in _MODEL_KEYS if key not in pairs]
    if missing:
        raise OptionError(f"{option}: a model without a known name needs {', '.join(missing)} too")
    numbers = {key: whole(f"{option}: {key}", pairs[key]) for key in _MODEL_KEYS}
    params, hidden = numbers["params"], numbers["hidden"]
    active = whole(f"{option}: active", pairs.get("active", pairs["params"]))
    tied = pairs.get("tied", "0")
    if tied not in ("0", "1"):
        raise OptionError(f"{option}: tied must be 0 or 1, got {tied!r}")
    if active > params:
        raise OptionError(f"{option}: active must be at most params, {params}, got {active}")
    matrices = (1 if tied == "1" else 2) * numbers["vocab"] * hidden
    if active < matrices:
        raise OptionError(
            f"{option}: {active} active parameters are fewer than the {matrices} of embedding and output layer"
        )
    attention = whole(f"{option}: attention", pairs.get("attention", pairs["hidden"]))
    return Model("", params, active, hidden, numbers["layers"], numbers["vocab"], attention, tied == "1")


def _gpu(option: str, text: str) -> Gpu:
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    if "=" not in text:
        raise OptionError(
            f"{option}: expected one of {', '.join(GPUS)}, or bf16=989,memory=80,.., got {text!r}"
        )
    pairs = _pairs(option, text)
    known = (*_GPU_KEYS, "fp8")
    if unknown := [key for key in pairs if key not in known]:
        raise OptionError(f"{option}: expected keys among {', '.join(known)}, got {unknown[0]!r}")
    if missing := [key for key in _GPU_KEYS if key not in pairs]:
        raise OptionError(f"{option}: a GPU without a known name needs {', '.join(missing)} too")
    numbers = {key: _positive(f"{option}: {key}", value) for key, value in pairs.items()}
    fp8 = numbers["fp8"] * 1e12 if "fp8" in numbers else None
    memory, bandwidth, host = (numbers[key] * 1e9 for key in _GPU_KEYS[1:])
    return Gpu("the given GPU", numbers["bf16"] * 1e12, fp8, memory, bandwidth, host)


def _pairs(option: str, text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not (sign and key and value):
            raise OptionError(f"{option}: expected key=value, got {part!r}")
        if key in pairs:
            raise OptionError(f"{option}: {key} must be given once, got it twice")
        pairs[key] = value
    return pairs


def number(option: str, text: str, expected: str, meets: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value < _LARGEST and meets(value)):
        # "--gpu: memory must be ..", and "--network: expected .."
        verb = " must be" if ":" in option else ": expected"
        raise OptionError(f"{option}{verb} {expected}, got {text!r}")
    return value


def whole(option: str, text: str) -> int:
    """Of at least 1; also as 8e9."""
    return int(number(option, text, "an integer of at least 1", lambda v: v >= 1 and v == int(v)))


def _positive(option: str, text: str) -> float:
    return number(option, text, "a positive number", lambda v: v > 0)


def _share(option: str, text: str) -> float:
    return number(option, text, "a number above 0 and at most 1", lambda v: 0 < v <= 1)
