"""The command `python -m vcrd plan`: its options and its output.

Wrong options are reported without importing torch, as an OptionError of one sentence that begins with the option.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vcrd.errors import OptionError, expected
from vcrd.plan.scenario import GPUS, MODELS, Gpu, Model, Scenario

_SIDE = (
    "a model and its layout, for example {example}; instead of a name: params=8.2e9,hidden=4096,layers=36,vocab=151936 "
    "(and active=, attention=, tied=1 if they differ); layout: {keys}"
)
_TEACHER_LAYOUT = ("tp", "pp", "replicas")
_STUDENT_LAYOUT = ("tp", "pp", "cp", "dp", "ep")
_MODEL_KEYS = ("params", "hidden", "layers", "vocab")
_MODEL_EXTRAS = ("active", "attention", "tied")
_TRANSPORTS = {"auto": True, "nccl": True, "tcp": False}  # whether the plan is for NCCL
_GPU_KEYS = ("bf16", "memory", "bandwidth", "host")
_LARGEST = 1e15  # larger than every count here, and still exact as a float

SUMMARY = "computes what each payload costs for given models and layouts, and which is the best"
DESCRIPTION = """\
Computes for two models and their layouts: the bytes that each payload moves, its memory in both jobs, the number of
teacher GPUs with which the student never waits, and the best payload. Bytes are exact, as the link counts them. Seconds
come from a model, whose assumptions are printed.

The best payload needs at most a tenth of the memory of the student GPU and keeps the network of every rank busy for at
most half of the time. Of these payloads it has the shortest step, where the step counts 5 % longer for 8 bits and 25 %
longer for top-k because of their error. Of equal payloads it costs the student the least time.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`. Values stay text here, so that `scenario_of` reports every wrong value in the same way."""
    add_run_options(parser)
    add = parser.add_argument
    add("--network", default="5", help="GB/s of one rank in each direction (5; a NIC of 400 Gb/s has 50)")
    add(
        "--transport",
        default="auto",
        help="as the setting of the link: auto (planned as nccl), nccl, tcp (auto)",
    )
    add(
        "--cache",
        metavar="TOKENS",
        default=None,
        help="also price a cache of the answers about that many tokens (docs/cache.md)",
    )
    add("--disk", default="2", help="GB/s at which all ranks of the student together read the cache (2)")
    add("--json", action="store_true", help="print everything as JSON")


def add_run_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup, required: bool = True) -> None:
    """The options that describe a run. required: both sides must be given."""
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
    add(
        "--teacher-context",
        default="0",
        help="tokens per sequence that only the teacher sees, on average (0)",
    )
    add("--micro-batches", default="8", help="micro-batches of a step on each data rank (8)")
    add("--credits", default="2", help="micro-batches requested ahead, as the setting of the link (2)")
    add("--top-k", default="64", help="tokens per position of the payload topk (64)")
    add(
        "--gpu",
        default="h100",
        help=f"of the student and the teacher: {', '.join(GPUS)}, or "
        "bf16=989,fp8=1979,memory=80,bandwidth=3350,host=64: dense TFLOP/s, GB, GB/s (h100)",
    )
    add("--teacher-gpu", default=None, help="of the teacher, if they differ")
    add("--student-mfu", default="0.4", help="share of the peak that the student reaches (0.4)")
    add("--teacher-mfu", default="0.4", help="share of the peak that the teacher reaches, forward only (0.4)")
    add("--recompute", action="store_true", help="the student recomputes its activations (4 forwards, not 3)")
    add("--student-fp8", action="store_true", help="the student computes in FP8")
    add("--teacher-fp8", action="store_true", help="the teacher computes in FP8")
    add(
        "--make-vocab-size-divisible-by",
        default="128",
        help="Megatron pads the vocabulary to a multiple of this times tp (128)",
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
        sequence=parse_count("--sequence", options.sequence),
        batch=parse_count("--micro-batch", options.micro_batch),
        teacher_context=parse_count("--teacher-context", options.teacher_context, least=0),
        micro_batches=parse_count("--micro-batches", options.micro_batches),
        credits=parse_count("--credits", options.credits),
        top_k=parse_count("--top-k", options.top_k),
        network=_positive("--network", options.network) * 1e9,
        over_nccl=_over_nccl(options.transport),
        student_mfu=_share("--student-mfu", options.student_mfu),
        teacher_mfu=_share("--teacher-mfu", options.teacher_mfu),
        recompute=options.recompute,
        student_fp8=options.student_fp8,
        teacher_fp8=options.teacher_fp8,
        vocab_multiple=parse_count("--make-vocab-size-divisible-by", options.make_vocab_size_divisible_by),
    )
    if getattr(options, "cache", None) is not None:  # the doctor has no such option
        tokens, disk = parse_count("--cache", options.cache), _positive("--disk", options.disk) * 1e9
        scenario = replace(scenario, cache_tokens=tokens, disk=disk)
    _check(scenario)
    return scenario


def _check(run: Scenario) -> None:
    """Checks that need two options."""
    if run.student.vocab != run.teacher.vocab:
        what = f"a model with the vocabulary of the teacher, {run.teacher.vocab}"
        raise expected("--student", what, run.student.vocab, OptionError)
    if run.replicas is not None and run.replicas > run.student_data:
        what = f"at most the data-parallel size of the student, {run.student_data}"
        raise expected("--teacher replicas", what, run.replicas, OptionError)
    for option, model, stages in (
        ("--teacher", run.teacher, run.teacher_pipeline),
        ("--student", run.student, run.student_pipeline),
    ):
        if stages > model.layers:
            raise expected(f"{option} pp", f"at most the {model.layers} layers", stages, OptionError)
    ranks = run.student_data * run.student_context
    if ranks % run.student_expert:
        raise expected("--student ep", f"a divisor of dp x cp, {ranks}", run.student_expert, OptionError)
    chunks = 2 * run.student_context
    if run.student_context > 1 and run.sequence % chunks:
        what = f"a multiple of {chunks}, twice the cp of the student"
        raise expected("--sequence", what, run.sequence, OptionError)
    if run.top_k > run.vocab:
        raise expected("--top-k", f"at most the vocabulary, {run.vocab}", run.top_k, OptionError)
    for option, asked, gpu in (
        ("--student-fp8", run.student_fp8, run.student_gpu),
        ("--teacher-fp8", run.teacher_fp8, run.teacher_gpu),
    ):
        if asked and gpu.fp8 is None:
            raise expected(option, "a GPU with a known FP8 peak", gpu.name, OptionError)


def _side(option: str, text: str, layout: tuple[str, ...]) -> tuple[Model, dict[str, Any]]:
    first, _, rest = text.partition(",")
    name = None if "=" in first else first.strip()
    pairs = _pairs(option, text if name is None else rest)
    own = (*_MODEL_KEYS, *_MODEL_EXTRAS) if name is None else ()
    for key in pairs:
        if key not in layout and key not in own:
            raise expected(option, f"keys among {', '.join((*own, *layout))}", repr(key), OptionError)
    places = {key: parse_count(f"{option} {key}", pairs.get(key, "1")) for key in layout}
    if "replicas" not in pairs:
        places["replicas"] = None
    model = _described(option, pairs) if name is None else _named(option, name)
    return model, places


def _over_nccl(name: str) -> bool:
    if name not in _TRANSPORTS:
        raise expected("--transport", f"one of {', '.join(_TRANSPORTS)}", repr(name), OptionError)
    return _TRANSPORTS[name]


def _named(option: str, name: str) -> Model:
    found = {known.lower(): model for known, model in MODELS.items()}.get(name.lower())
    if found is not None:
        return found
    close = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(MODELS)}"
    what = "a known model or params=..,hidden=..,layers=..,vocab=.."
    raise expected(option, what, f"{name!r}; {hint}", OptionError)


def _described(option: str, pairs: Mapping[str, str]) -> Model:
    missing = [key for key in _MODEL_KEYS if key not in pairs]
    if missing:
        what = f"{', '.join(_MODEL_KEYS)} for a model without a name"
        raise expected(option, what, f"no {', '.join(missing)}", OptionError)
    numbers = {key: parse_count(f"{option} {key}", pairs[key]) for key in _MODEL_KEYS}
    params, hidden = numbers["params"], numbers["hidden"]
    active = parse_count(f"{option} active", pairs.get("active", pairs["params"]))
    tied = pairs.get("tied", "0")
    if tied not in ("0", "1"):
        raise expected(f"{option} tied", "0 or 1", repr(tied), OptionError)
    if active > params:
        raise expected(f"{option} active", f"at most params, {params}", active, OptionError)
    matrices = (1 if tied == "1" else 2) * numbers["vocab"] * hidden
    if active < matrices:
        what = f"at least the {matrices} parameters of embedding and output layer"
        raise expected(f"{option} active", what, active, OptionError)
    attention = parse_count(f"{option} attention", pairs.get("attention", pairs["hidden"]))
    return Model("", params, active, hidden, numbers["layers"], numbers["vocab"], attention, tied == "1")


def _gpu(option: str, text: str) -> Gpu:
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    if "=" not in text:
        what = f"one of {', '.join(GPUS)}, or bf16=989,memory=80,.."
        raise expected(option, what, repr(text), OptionError)
    pairs = _pairs(option, text)
    known = (*_GPU_KEYS, "fp8")
    if unknown := [key for key in pairs if key not in known]:
        raise expected(option, f"keys among {', '.join(known)}", repr(unknown[0]), OptionError)
    if missing := [key for key in _GPU_KEYS if key not in pairs]:
        what = f"{', '.join(_GPU_KEYS)} for a GPU without a name"
        raise expected(option, what, f"no {', '.join(missing)}", OptionError)
    numbers = {key: _positive(f"{option} {key}", value) for key, value in pairs.items()}
    fp8 = numbers["fp8"] * 1e12 if "fp8" in numbers else None
    memory, bandwidth, host = (numbers[key] * 1e9 for key in _GPU_KEYS[1:])
    return Gpu("the given GPU", numbers["bf16"] * 1e12, fp8, memory, bandwidth, host)


def _pairs(option: str, text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not (sign and key and value):
            raise expected(option, "key=value", repr(part), OptionError)
        if key in pairs:
            raise expected(f"{option} {key}", "one value", "two", OptionError)
        pairs[key] = value
    return pairs


def parse_number(option: str, text: str, what: str, is_valid: Callable[[float], bool]) -> float:
    """The number of an option. what: the valid numbers in words, for the error."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value < _LARGEST and is_valid(value)):
        raise expected(option, what, repr(text), OptionError)
    return value


def parse_count(option: str, text: str, least: int = 1) -> int:
    """An integer of at least `least`, which may be written as 8e9."""
    what = f"an integer of at least {least}"
    return int(parse_number(option, text, what, lambda v: v >= least and v == int(v)))


def _positive(option: str, text: str) -> float:
    return parse_number(option, text, "a positive number", lambda v: v > 0)


def _share(option: str, text: str) -> float:
    return parse_number(option, text, "a number above 0 and at most 1", lambda v: 0 < v <= 1)


def run(options: argparse.Namespace) -> tuple[str, int]:
    """The text to print and the exit status. OptionError for a wrong option."""
    scenario = scenario_of(options)
    # Imported here because they import torch.
    from vcrd.plan.choice import choose
    from vcrd.plan.costs import costs
    from vcrd.plan.table import json_values, table

    found = costs(scenario)
    choice = choose(found, scenario.student_gpu.memory)
    if options.json:
        return json.dumps(json_values(scenario, found, choice), indent=1), 0
    return table(scenario, found, choice), 0
