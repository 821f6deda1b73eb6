"""Every setting of vcrd, each defined once: what the link needs in `LinkSettings`, the rest in `DistillSettings`.

A field holds its default, its help text and its check (`setting`). The name of a field gives the environment variable
(`credits`: VCRD_CREDITS) and the command-line argument (`--vcrd-credits`, added by `vcrd.megatron.arguments`), and
`help_table` makes docs/settings.md. This module imports neither torch nor Megatron.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from vcrd.errors import check_choice, check_integer, check_number, expected, wrong_type

PAYLOADS = ("float16", "float32", "logits_8bit", "topk", "hidden")
TRANSPORTS = ("auto", "nccl", "tcp", "fake")
IDENTITIES = ("check", "insist", "warn")
FUSED_HEADS = ("off", "on", "recompute")
MOST_SOCKETS = 16
FILE_SCHEME = "file:"  # how an address begins that names a file
CACHE_SCHEME = "cache:"  # how a teacher begins that is a folder of answers
DEFAULT_ADDRESS = "127.0.0.1:29600"
_PREFIX = "VCRD_"
# VCRD_* variables that other parts of vcrd read.
_OTHER_VARIABLES = ("VCRD_CPU_INSTRUCTION_SET",)


class Kind(NamedTuple):
    """What the value of a setting may be.

    check(name, value): raises ValueError or TypeError for a wrong value. read(text): the value that a text stands for,
    ValueError where it stands for none. what: the values in words. optional: the texts "" and "none" stand for None.
    shown: the type in docs/settings.md.
    """

    check: Callable[[str, Any], None]
    read: Callable[[str], Any] = str
    what: str = "a text"
    optional: bool = False
    shown: str = "text"


def setting(default: Any, help: str, kind: Kind, argument: bool = True, **options: Any) -> Any:
    """A field of a settings class. argument: whether it is a command-line argument. options: for `field`."""
    metadata = {"help": help, "kind": kind, "argument": argument}
    return field(default=default, metadata=metadata, **options)


def label(name: str) -> str:
    """A setting as messages name it: "VCRD_CREDITS (--vcrd-credits)"; the variable alone where there is no argument."""
    return (
        f"{variable_of(name)} ({argument_of(name)})"
        if _FIELDS[name].metadata["argument"]
        else variable_of(name)
    )


def variable_of(name: str) -> str:
    return _PREFIX + name.upper()


def argument_of(name: str) -> str:
    return "--vcrd-" + name.replace("_", "-")


def parse(name: str, text: str) -> Any:
    """The value that `text` gives the setting `name`; not checked yet. ValueError for a text that gives none."""
    kind = _FIELDS[name].metadata["kind"]
    if kind.optional and text.lower() in ("", "none"):
        return None
    try:
        return kind.read(text)
    except ValueError:
        raise expected(label(name), kind.what, repr(text)) from None


def check(name: str, value: Any) -> None:
    """ValueError or TypeError unless `value` is a right value of the setting `name`, as far as it can be told alone."""
    _FIELDS[name].metadata["kind"].check(label(name), value)


def host_and_port(text: str) -> tuple[str, int] | None:
    """What "host:port" or "[::1]:port" names; None for another text."""
    host, _, port = text.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        return None
    return host.strip("[]"), int(port)


def _integer(least: int, most: int | None = None, optional: bool = False) -> Kind:
    right = partial(check_integer, least=least, most=most, optional=optional)
    span = f"of at least {least}" if most is None else f"from {least} to {most}"
    return Kind(right, int, "an integer", optional, f"integer {span}")


def _number(optional: bool = False, **bounds: float) -> Kind:
    shown = " and ".join(f"{_BOUNDS[name]} {bound:g}" for name, bound in bounds.items())
    right = partial(check_number, optional=optional, **bounds)
    return Kind(right, float, "a number", optional, f"number {shown}".strip())


def _choice(*names: str) -> Kind:
    shown = ", ".join(f"`{name}`" for name in names)
    return Kind(partial(check_choice, choices=names), what=f"one of {', '.join(names)}", shown=shown)


def _text(
    right: Callable[[str], bool] = lambda text: True,
    what: str = "a text",
    optional: bool = False,
    shown: str = "text",
) -> Kind:
    def check_text(name: str, value: Any) -> None:
        if value is None and optional:
            return
        if not isinstance(value, str):
            raise wrong_type(name, "a text or None" if optional else "a text", value)
        if not right(value):
            raise expected(name, what, repr(value))

    return Kind(check_text, what=what, optional=optional, shown=shown)


def _check_path(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, (str, PathLike)):
        raise wrong_type(name, "a path or None", value)


def _check_validity(name: str, value: Any) -> None:
    if not isinstance(value, str) and not callable(value):
        raise wrong_type(name, "the name of an estimator or a callable", value)


def named(text: str) -> dict[str, str] | None:
    """The parts of "name=value,name=value" by name; {"": text} for a text without names; None for another text."""
    if not _NAMED.match(text):
        return {"": text} if text else None
    found: dict[str, str] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if not _NAMED.match(part.strip()) or not value or name in found:
            return None
        found[name] = value
    return found


def of_teacher(name: str, value: Any, teacher: str) -> Any:
    """What the value of a setting means for that teacher: its part of a value by teacher, else the value itself.

    A teacher without a part has the default of the setting.
    """
    if not _is_by_teacher(value):
        return value
    part = named(value).get(teacher)
    each = _FIELDS[name]
    return each.default if part is None else each.metadata["kind"].read(part)


def teachers_in(value: Any) -> tuple[str, ...]:
    """The names of the teachers in a value by teacher; none in another value."""
    return tuple(named(value)) if _is_by_teacher(value) else ()


def _is_by_teacher(value: Any) -> bool:
    return isinstance(value, str) and _NAMED.match(value) is not None


def _by_teacher(kind: Kind) -> Kind:
    """A kind whose value may also be given by teacher, as the text "math=value,code=value"."""

    def check_each(name: str, value: Any) -> None:
        if not _is_by_teacher(value):
            kind.check(name, value)
            return
        parts = named(value)
        if parts is None:
            raise expected(name, _PARTS, repr(value))
        for teacher, text in parts.items():
            whose = f"{name} of {teacher}"
            try:
                part = kind.read(text)
            except ValueError:
                raise expected(whose, kind.what, repr(text)) from None
            kind.check(whose, part)

    def read(text: str) -> Any:
        return text if _is_by_teacher(text) else kind.read(text)

    return Kind(check_each, read, kind.what, kind.optional, f"{kind.shown}; or by teacher")


def _check_weights(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise wrong_type(name, "a text or None", value)
    if not _is_by_teacher(value) or named(value) is None:
        raise expected(name, _PARTS, repr(value))
    for teacher, text in named(value).items():
        try:
            weight = float(text)
        except ValueError:
            raise expected(f"{name} of {teacher}", "a number", repr(text)) from None
        check_number(f"{name} of {teacher}", weight, above=0)


def _all_named(right: Callable[[str], bool]) -> Callable[[str], bool]:
    """Whether every part of a text is right, whether it has names or not."""
    return lambda text: bool(parts := named(text)) and all(map(right, parts.values()))


def _is_cache(text: str) -> bool:
    return text.startswith(CACHE_SCHEME) and os.path.isabs(text.removeprefix(CACHE_SCHEME))


def _is_address(text: str) -> bool:
    if text.startswith(FILE_SCHEME):
        return os.path.isabs(text.removeprefix(FILE_SCHEME))
    return _is_cache(text) or host_and_port(text) is not None


_NAMED = re.compile(r"[A-Za-z0-9_.-]+=")  # the name of a teacher, where there are several
_PARTS = "name=value,name=value, each teacher once"
_BOUNDS = {"least": "of at least", "above": "above", "most": "of at most", "below": "below"}
_WEIGHTS = Kind(_check_weights, what=_PARTS, optional=True, shown="numbers above 0 by teacher")
_PATH = Kind(_check_path, what="a path", optional=True, shown="path")
# A name that `vcrd.loss.config` checks, which needs torch.
_NAME_OF_THE_LOSS = _text(shown="name")
_ADDRESS = _text(
    _all_named(_is_address),
    "host:port with a port from 1 to 65535, file:/absolute/path, cache:/absolute/path, or several of them as "
    "name=address,name=address",
    optional=True,
    shown="address; or by teacher",
)
_TEACHER = _text(
    _all_named(_is_cache),
    "cache:/absolute/path, or several of them as name=cache:/absolute/path,..",
    optional=True,
    shown="`cache:` and a path; or by teacher",
)


class TeacherSource(NamedTuple):
    """Where one teacher's answers come from. name: "" if there is one teacher without a name. address: of its job, or
    None. cache: the folder with its answers, or None. At least one of both; with both, what the cache lacks is asked
    of the job and added to the cache.
    """

    name: str
    address: str | None
    cache: str | None


@dataclass(frozen=True)
class LinkSettings:
    """How a teacher job and a student job find each other, and what travels between them; equal in both jobs except
    where a help text says otherwise. Raises ValueError or TypeError that names the setting."""

    address: str | None = setting(
        None,
        "host:port where rank 0 of the student's world hosts the rendezvous ([::1]:port for IPv6); it listens on that "
        f"host's interface only. none: {DEFAULT_ADDRESS}, unless `teacher` is set. Or file:/path on a file system that "
        "both jobs share: rank 0 listens on a free port of `interface` and writes the address there. A teacher that "
        "serves one student after another may have a pattern, file:/path/*. Several teachers of one student: "
        "math=host:port,code=host:port, in the student job.",
        _ADDRESS,
    )
    teacher: str | None = setting(
        None,
        "In the student job: cache:/path takes the teacher's answers from a folder that `python -m vcrd cache` has "
        "written, and no teacher job is needed. If `address` is set as well, answers that the folder lacks are asked "
        "of the teacher job there and added to the folder. Several teachers: math=cache:/path,code=cache:/path. none: "
        "a teacher job at `address`.",
        _TEACHER,
    )
    interface: str | None = setting(
        None,
        "Name (ib0) or IP address of the interface that each student rank listens on. none: the interface that routes "
        "to `address`; where that is a file, the default route's on rank 0. It may differ by rank. The teacher job "
        "does not read it.",
        _text(optional=True),
    )
    payload: str = setting(
        "float16",
        "What the teacher sends. Logits: float16 (of the distance from the row's maximum; 2 bytes per vocabulary "
        "column), float32 (bit-exact; 4 bytes) or logits_8bit (the square root of that distance; 1 byte). topk: the "
        "most probable tokens and the exact mass of the others (8 top_k + 4 bytes per token). hidden: the teacher's "
        "last hidden states; the student receives the teacher's output layer once. docs/payloads.md has the errors. "
        "Several teachers, in the student job: math=topk,code=float16; one that is not named has the default.",
        _by_teacher(_choice(*PAYLOADS)),
    )
    top_k: int | str = setting(
        64,
        "Tokens per position that the payload topk carries; at most the vocabulary. By teacher as `payload`.",
        _by_teacher(_integer(1)),
    )
    transport: str = setting(
        "auto",
        "How tensors travel. auto: over NCCL from GPU to GPU where both jobs can and a probe of every pair of ranks "
        "succeeds, else over TCP through pinned host memory, with a warning that says why. nccl: over NCCL or not at "
        "all. tcp: over TCP, without probing NCCL. fake: the code path of nccl on the CPU, for tests. The jobs may "
        "differ: nccl or tcp in one job decides for auto in the other. Requests and liveness always use TCP.",
        _choice(*TRANSPORTS),
    )
    sockets: int = setting(
        1,
        "TCP connections between a teacher rank and a student rank. Tensors of 8 MB and more are divided among as "
        "many of them as get at least 4 MB each. The teacher's setting counts.",
        _integer(1, MOST_SOCKETS),
    )
    credits: int = setting(
        2,
        "Micro-batches that the student asks the teacher for before its script draws them, per data-parallel rank. "
        "It bounds memory in both jobs. 0: nothing is drawn early, and the teacher never works ahead. Samples, random "
        "state and checkpoints are the same with any value; where they could not be, vcrd uses 0 and warns, or raises "
        "an error (docs/metrics.md). The student's setting counts.",
        _integer(0),
    )
    teacher_context_length: int = setting(
        0,
        "The most tokens that the teacher sees beside a sequence and the student does not (docs/context.md): the field "
        "vcrd_teacher_context of the micro-batches. 0: no micro-batch may have any. A teacher whose model has fewer "
        "positions than the longest sequence and this together is refused. The student's setting counts.",
        _integer(0),
    )
    timeout: float = setting(
        600.0,
        "Seconds without a sign of life after which the other job counts as lost, while the student waits for an "
        "answer or the teacher waits for an answer to be taken. Idle time is not counted.",
        _number(above=0),
    )
    connect_timeout: float = setting(
        600.0,
        "Seconds to wait for the other job: at the start, and for a lost teacher or student to come back.",
        _number(above=0),
    )
    name: str = setting(
        "vcrd",
        "Name of the run. Two links at one address need two names.",
        _text(lambda text: bool(text) and "/" not in text, "a text without / that is not empty"),
    )
    identity: str = setting(
        "check",
        "What happens to a teacher whose tokenizer gives other tokens to the same ids than the student's, or whose "
        "weights are not those of the run's first teacher (after a restart, or in another replica). check: it is "
        "refused. insist: it is refused also where a job does not state its tokenizer or weights. warn: it may join, "
        "with a warning. The student's setting counts.",
        _choice(*IDENTITIES),
    )
    secret: str = setting(
        "",
        "Shared secret. Where it is set, only processes that know it can join. It is not an argument, because every "
        "user of a machine can read command lines.",
        _text(),
        argument=False,
        repr=False,
    )
    secret_file: str | PathLike | None = setting(
        None, "File that holds the shared secret. Only its owner should be able to read it.", _PATH
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        names = [source.name for source in self.teachers()]
        for setting in BY_TEACHER:
            check_teachers(setting, teachers_in(getattr(self, setting)), names)
        if self.secret and self.secret_file:
            raise expected(label("secret_file"), f"none where {variable_of('secret')} is set", "both")

    @property
    def rendezvous(self) -> str:
        """The one address where this job meets the other one. ValueError if `address` names several teachers."""
        if _is_by_teacher(self.address):
            raise expected(label("address"), "one address without names here", repr(self.address))
        return DEFAULT_ADDRESS if self.address is None else self.address

    def teachers(self) -> tuple[TeacherSource, ...]:
        """The teachers of a student job, in the order of `address` and then of `teacher`. ValueError if the names of
        the two settings differ in kind, or a teacher has two caches."""
        address = DEFAULT_ADDRESS if self.address is None and self.teacher is None else self.address
        addresses, caches = named(address or "") or {}, named(self.teacher or "") or {}
        names = list(dict.fromkeys([*addresses, *caches]))
        if "" in names and len(names) > 1:
            got = f"{self.teacher!r} beside the address {self.address!r}"
            raise expected(label("teacher"), "names like those of the address, or none in both", got)
        found = []
        for name in names:
            address, cache = addresses.get(name), caches.get(name)
            if address is not None and _is_cache(address):
                if cache is not None:
                    got = f"{address!r} beside the teacher {cache!r}"
                    raise expected(
                        label("address"), "host:port or file:/path where `teacher` names the cache", got
                    )
                address, cache = None, address
            found.append(TeacherSource(name, address, cache and cache.removeprefix(CACHE_SCHEME)))
        jobs = [source.address for source in found if source.address is not None]
        if len(set(jobs)) < len(jobs):
            raise expected(label("address"), "another address for each teacher", repr(self.address))
        folders = [os.path.normpath(source.cache) for source in found if source.cache is not None]
        if len(set(folders)) < len(folders):
            both = self.teacher if self.teacher is not None else self.address
            raise expected(label("teacher"), "another cache for each teacher", repr(both))
        return tuple(found)

    def of(self, source: TeacherSource) -> LinkSettings:
        """These settings as if `source` were the only teacher."""
        cache = None if source.cache is None else CACHE_SCHEME + source.cache
        own = {name: of_teacher(name, getattr(self, name), source.name) for name in BY_TEACHER}
        return replace(self, address=source.address, teacher=cache, **own)

    def shared_secret(self) -> str:
        """The secret, from its file where one is named; ValueError if that cannot be read or is empty."""
        if self.secret_file is None:
            return self.secret
        try:
            text = Path(self.secret_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            got = f"{str(self.secret_file)!r}: {error}"
            raise expected(label("secret_file"), "a file that can be read", got) from None
        if not text:
            got = f"the empty file {str(self.secret_file)!r}"
            raise expected(label("secret_file"), "a file that holds a secret", got)
        return text


@dataclass(frozen=True)
class DistillSettings:
    """Settings of `vcrd.megatron.distill` and `vcrd.megatron.serve`: the loss, the plug, and the link in `link`.
    Raises ValueError or TypeError that names the setting."""

    divergence: str = setting(
        "forward_kl",
        "Divergence between the teacher's distribution p and the student's q: forward_kl KL(p||q), reverse_kl "
        "KL(q||p), jeffreys (half of each), jsd, skew_kl or skew_reverse_kl.",
        _NAME_OF_THE_LOSS,
    )
    temperature: float = setting(
        1.0, "Temperature of both models in the divergence. Validity is always read at 1.", _number()
    )
    alpha: float = setting(0.1, "Mixture weight of skew_kl and skew_reverse_kl.", _number())
    beta: float = setting(0.5, "Mixture weight of jsd.", _number())
    validity: Any = setting(
        "label",
        "Estimator of local validity: label, margin, confidence, uniform, or scores, which reads the validity of each "
        "token from the micro-batches. privileged: the probabilities by the teacher with the context that the "
        "micro-batches have for it, which the teacher that is distilled does not see. docs/validity.md describes these "
        "two. In Python also a callable.",
        Kind(_check_validity, shown="name"),
    )
    weighting: str = setting(
        "sigmoid",
        "What makes a weight of the validities. sigmoid: from floor to ceiling by the difference of the two log "
        "validities. gap: by how much more probability the teacher gives to what is verified than the student "
        "does, relative to the root mean square of this over the micro-batches that all ranks process at the same "
        "time; with the validity label, scores or privileged, or a verifier (docs/method.md).",
        _NAME_OF_THE_LOSS,
    )
    sharpness: float | None = setting(
        None,
        "How strongly the weight follows the validities. none: 4 with the weighting sigmoid, 1 with gap.",
        _number(optional=True),
    )
    floor: float | None = setting(
        None,
        "Smallest weight. none: 0.1 with the weighting sigmoid, 0.05 with gap.",
        _number(optional=True),
    )
    ceiling: float | None = setting(
        None, "Largest weight. none: 1.9 with the weighting sigmoid, 3 with gap.", _number(optional=True)
    )
    normalization: str = setting(
        "none",
        "What all weights are divided by, taken over the tokens that count in the micro-batches that all ranks process "
        "at the same time. mean: their mean. mass: the sum of the weighted divergences over that of the divergences, "
        "so that the sum of the losses stays what it is without weights.",
        _NAME_OF_THE_LOSS,
    )
    ce_weight: float = setting(
        0.0, "Weight of the hard-label cross-entropy that is added. Validity does not change it.", _number()
    )
    teacher_weights: str | None = setting(
        None,
        "With several teachers: math=1,code=0.5 multiplies the loss of each token by the number of its teacher, and "
        "changes nothing else. A teacher without a number has 1 (docs/teachers.md).",
        _WEIGHTS,
    )
    teacher_mixture: str | None = setting(
        None,
        "With several teachers: math=1,code=0.5 lets every teacher answer every token. The student learns from the "
        "mixture of their distributions, with these weights scaled to a sum of 1. Not with the payload topk "
        "(docs/teachers.md). none: each sample has one teacher.",
        _WEIGHTS,
    )
    invalid_rows: str = setting(
        "skip",
        "What happens to a token whose teacher logits are no distribution (a NaN, +inf, or nothing above -inf). skip: "
        "its loss, weight and gradient are 0, and it is counted. stop: the step raises an error before the optimizer "
        "runs, on every rank.",
        _choice("skip", "stop"),
    )
    fused_head: str = setting(
        "off",
        "on: the loss makes the student's logits in chunks of tokens, and all of them never exist at once. recompute: "
        "also makes each chunk's logits again in backward, which costs a fourth product with the output layer and "
        "keeps no float32 gradient of it from forward to backward. A loss_func needs recompute on GPUs if it weighs "
        "the tokens of a micro-batch alike in the first step but not in later steps.",
        _choice(*FUSED_HEADS),
    )
    vocab_size: int | None = setting(
        None,
        "Size of the true vocabulary. Columns past it are padding. none: the model's, without padding.",
        _integer(1, optional=True),
    )
    sequence_length: int | None = setting(
        None,
        "Longest sequence, which must be equal in both jobs. none: the model's maximum.",
        _integer(1, optional=True),
    )
    telemetry_dir: str | PathLike | None = setting(
        None,
        "Folder for the telemetry file of each rank: GPU, waits and figures (docs/metrics.md). `python -m vcrd report` "
        "makes a page of it. Student and teacher may share it. none: no telemetry.",
        _PATH,
    )
    link: LinkSettings = field(default_factory=LinkSettings)

    def __post_init__(self) -> None:
        _check_fields(self)
        if not isinstance(self.link, LinkSettings):
            raise wrong_type("link", "LinkSettings", self.link)
        if self.validity == "privileged" and not self.link.teacher_context_length:
            what = "more than 0 with validity 'privileged', whose judge is the teacher with a context"
            raise expected(label("teacher_context_length"), what, 0)
        sources = self.link.teachers()
        names = [source.name for source in sources]
        check_teachers("teacher_weights", teachers_in(self.teacher_weights), names)
        links = [self.link.of(source) for source in sources]
        payloads = [link.payload for link in links]
        if self.teacher_mixture is not None:
            self._check_mixture(names, payloads)
        # Each form of answer has a separate loss, and which forms there are depends on the micro-batch of a rank.
        forms = {(link.payload, link.top_k if link.payload == "topk" else None) for link in links}
        several = len(forms) > 1 or ("hidden" in payloads and len(sources) > 1)
        if self.pooled and self.teacher_mixture is None and several:
            usual = _FIELDS[self.pooled].default
            what = f"{usual} where teachers answer in several forms, each of which has a separate loss"
            raise expected(label(self.pooled), what, getattr(self, self.pooled))
        if "topk" in payloads and self.temperature != 1:
            what = f"1 with the payload topk ({variable_of('payload')}), whose tail has no mass at another"
            raise expected(label("temperature"), what, self.temperature)

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, **overrides: Any
    ) -> DistillSettings:
        """Defaults, then VCRD_* variables of `environment` (default: the process's), then `overrides`.

        Raises ValueError or TypeError that names the variable, for an unknown VCRD_* name too.
        """
        environment = os.environ if environment is None else environment
        found: dict[str, Any] = {}
        for variable, text in environment.items():
            if not variable.startswith(_PREFIX) or variable in _OTHER_VARIABLES:
                continue
            name = variable.removeprefix(_PREFIX).lower()
            if name not in _FIELDS:
                known = ", ".join(map(variable_of, _FIELDS))
                raise expected(variable, f"the variable of a setting ({known})", "an unknown name")
            found[name] = parse(name, text)
        return cls().replaced(**{**found, **overrides})

    def replaced(self, **changes: Any) -> DistillSettings:
        """A copy with other values; names of `LinkSettings` fields reach `link`."""
        of_link = {each.name for each in fields(LinkSettings)}
        link = {name: changes.pop(name) for name in list(changes) if name in of_link}
        if link:
            changes["link"] = replace(changes.get("link", self.link), **link)
        unknown = [name for name in changes if name not in {each.name for each in fields(self)}]
        if unknown:
            raise TypeError(f"{unknown[0]}: not a setting of vcrd")
        return replace(self, **changes)

    def value(self, name: str) -> Any:
        """Of a setting, here or in `link`."""
        return getattr(self.link if hasattr(self.link, name) else self, name)

    def _check_mixture(self, names: list[str], payloads: list[str]) -> None:
        given = teachers_in(self.teacher_mixture)
        if sorted(given) != sorted(names):
            what = f"a weight for each teacher in address or teacher ({', '.join(filter(None, names)) or 'none'})"
            raise expected(label("teacher_mixture"), what, repr(self.teacher_mixture))
        if "topk" in payloads:
            what = "no teacher with the payload topk in a mixture, which needs a logit for each column"
            raise expected(label("payload"), what, repr(self.link.payload))
        if self.teacher_weights is not None:
            what = "none beside teacher_mixture, where each token learns from all teachers"
            raise expected(label("teacher_weights"), what, repr(self.teacher_weights))

    def mixture(self) -> tuple[float, ...]:
        """The weights of the teachers in their order, where they answer together; empty where each sample has one."""
        if self.teacher_mixture is None:
            return ()
        weights = named(self.teacher_mixture)
        return tuple(float(weights[source.name]) for source in self.link.teachers())

    @property
    def pooled(self) -> str | None:
        """The setting by which a token's weight depends on the other tokens that count; None where it does not."""
        names = ("weighting", "normalization")
        return next((name for name in names if getattr(self, name) != _FIELDS[name].default), None)

    def weight_of(self, teacher: str) -> float:
        """By which the loss of this teacher's tokens is multiplied."""
        return float(named(self.teacher_weights).get(teacher, 1)) if self.teacher_weights else 1.0

    def loss_arguments(self) -> dict[str, Any]:
        """Fields of `vcrd.LossConfig`, those aside that depend on the model."""
        names = ("divergence", "temperature", "alpha", "beta", "validity", "weighting", "sharpness", "floor")
        found = {name: getattr(self, name) for name in (*names, "ceiling", "normalization", "ce_weight")}
        # Rows are skipped with invalid_rows "stop" too: the run stops at the end of the step, when all are counted.
        return {**found, "skip_invalid_teacher": True}


_FIELDS: dict[str, Field] = {
    each.name: each for kind in (DistillSettings, LinkSettings) for each in fields(kind) if each.metadata
}
NAMES = tuple(_FIELDS)  # of all settings
BY_TEACHER = ("payload", "top_k")  # settings of the link that each teacher may have a value of


def check_teachers(name: str, given: tuple[str, ...], known: list[str]) -> None:
    """ValueError if a setting names a teacher that has neither an address nor a cache."""
    for teacher in given:
        if teacher not in known:
            what = f"the names of teachers in address or teacher ({', '.join(filter(None, known)) or 'none'})"
            raise expected(label(name), what, repr(teacher))


def help_text(name: str) -> str:
    return _FIELDS[name].metadata["help"]


def is_argument(name: str) -> bool:
    return _FIELDS[name].metadata["argument"]


def help_table() -> str:
    """All settings as a Markdown table, for docs/settings.md."""
    rows = ["| variable | argument | type | default | meaning |", "|---|---|---|---|---|"]
    for name, each in _FIELDS.items():
        argument = f"`{argument_of(name)}`" if is_argument(name) else "-"
        default = "none" if each.default is None else str(each.default)
        shown = f"`{default}`" if default else "-"
        kind = each.metadata["kind"]
        values = kind.shown + (", or none" if kind.optional else "")
        help = help_text(name).replace("|", r"\|")
        rows.append(f"| `{variable_of(name)}` | {argument} | {values} | {shown} | {help} |")
    return "\n".join(rows) + "\n"


def _check_fields(settings: LinkSettings | DistillSettings) -> None:
    for each in fields(settings):
        if each.metadata:
            check(each.name, getattr(settings, each.name))


if __name__ == "__main__":
    print(help_table(), end="")
