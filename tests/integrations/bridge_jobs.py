"""Jobs of Megatron-Bridge: its `pretrain` on tiny Hugging Face models, in any layout, and the truth in one process."""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import multiprocessing
import queue
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from packed_pretrain import attend_within_documents
from torch import Tensor
from torch.nn.functional import cross_entropy
from worlds import World, Worlds

from vcrd.megatron import bridge_on_cpu
from vcrd.megatron.training_loop import BridgeTraining
from vcrd.settings import DistillSettings

VOCAB, SEQUENCE, MICRO_BATCH, STEP = 128, 16, 2, 8  # STEP: samples
SHAPES = {
    "student": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "teacher": {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
}


class Runner:
    """A process that has imported Megatron-Bridge, which takes ten seconds, and forks the ranks of each run."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run_forever, args=(theirs, list(sys.path)), daemon=False)
        self._process.start()

    def run(self, *worlds: World, seconds: float = 200) -> list[list[Any]]:
        """As `run_worlds`."""
        self._pipe.send((worlds, seconds))
        found = self._pipe.recv()
        if isinstance(found, str):
            raise AssertionError(found)
        return found

    def close(self) -> None:
        self._process.kill()  # it has no ranks now, and would take seconds to free its modules
        self._process.join()


def _run_forever(pipe: Any, path: list[str]) -> None:
    sys.path[:] = path
    from vcrd.megatron import cpu

    with cpu.on_cpu():
        import megatron.bridge.training.finetune
        import megatron.bridge.training.gpt_step
        import megatron.bridge.training.pretrain  # noqa: F401
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    while True:
        worlds, seconds = pipe.recv()
        try:
            with Worlds(context) as under_way:
                started = [under_way.start(world) for world in worlds]
                pipe.send(under_way.wait(*started, seconds=seconds))
        except AssertionError as error:
            pipe.send(str(error))


def save_models(folder: Path) -> None:
    """Both models as Hugging Face folders, "student" and "teacher"."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for seed, (name, shape) in enumerate(SHAPES.items()):
        torch.manual_seed(seed)
        config = LlamaConfig(
            **shape,
            num_hidden_layers=4,
            vocab_size=VOCAB,
            max_position_embeddings=SEQUENCE,
            initializer_range=0.3,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)


class Samples(torch.utils.data.Dataset):
    """Samples of random tokens, some of which do not count. packed: each is sequences, with Bridge's names of edges."""

    def __init__(self, count: int, packed: str = "") -> None:
        self._count, self._packed = count, packed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(VOCAB, (SEQUENCE + 1,), generator=generator)
        mask = (torch.rand(SEQUENCE, generator=generator) < 0.5).float()
        sample = {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(SEQUENCE),
        }
        if self._packed:
            cut = 4 * int(torch.randint(1, 4, (), generator=generator))
            sample["position_ids"] = torch.cat([torch.arange(cut), torch.arange(SEQUENCE - cut)])
            sample |= edges_of(cut, self._packed)
        return sample


class Stream:
    """Micro-batches of `Samples` from an iterator that has a state, as Energon's loaders do."""

    def __init__(self, count: int, packed: str = "") -> None:
        self._samples, self._size, self._position = Samples(count, packed), 1 if packed else MICRO_BATCH, 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> dict[str, Tensor]:
        first = self._position
        if first >= len(self._samples):
            raise StopIteration
        self._position += self._size
        return torch.utils.data.default_collate([self._samples[first + n] for n in range(self._size)])

    def save_state(self) -> int:
        return self._position

    def restore_state(self, state: int) -> None:
        self._position = state


def edges_of(cut: int, form: str) -> dict[str, Tensor]:
    """Two sequences in a row of SEQUENCE tokens, as Bridge's data sets name their edges now, or did earlier."""
    edges = torch.tensor([0, cut, SEQUENCE], dtype=torch.int32)
    real = torch.tensor([0, cut - 1, SEQUENCE - 2], dtype=torch.int32)  # the last token of each is padding
    longest = torch.tensor([max(cut, SEQUENCE - cut)], dtype=torch.int32)
    if form == "current":
        return {
            "cu_seqlens_q": real,
            "cu_seqlens_kv": real,
            "cu_seqlens_q_padded": edges,
            "cu_seqlens_kv_padded": edges,
            "max_seqlen_q": longest,
            "max_seqlen_kv": longest,
        }
    unused = torch.full((2,), -1, dtype=torch.int32)
    return {
        "cu_seqlens": torch.cat([edges, unused]),
        "cu_seqlens_argmin": torch.tensor([3], dtype=torch.int32),
        "cu_seqlens_unpadded": torch.cat([real, unused]),
        "cu_seqlens_unpadded_argmin": torch.tensor([3], dtype=torch.int32),
        "max_seqlen": longest,
    }


@dataclass(frozen=True)
class Run:
    """One training. folder: where the models are. name: of its own folder. steps: it ends there.

    own_groups: of the model, without Megatron's parallel state. teacher: "linked", or "beside" the student.
    """

    folder: Path
    name: str
    steps: int = 4
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1  # above 1 with Bridge's overlapped distributed optimizer
    virtual: int | None = None
    own_groups: bool = False
    teacher: str = "linked"
    packed: str = ""
    dataloader: str = "single"
    save_interval: int | None = None
    load: int | None = None  # the step from which it goes on
    pretrained: str = ""  # the folder of a checkpoint, for `finetune`
    evaluate: int = 0
    form: str = "function"  # of the forward step
    settings: Any = None
    changes: dict[str, Any] = field(default_factory=dict)  # of the model's configuration


def provider(run: Run, name: str) -> Any:
    """The model's configuration, which makes this rank's part of it with Hugging Face's weights."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import local_layer_spec

    bridge = AutoBridge.from_hf_pretrained(str(run.folder / name), torch_dtype=torch.float32)
    found = bridge.to_megatron_provider(load_weights=True)
    chosen = {
        "transformer_layer_spec": local_layer_spec,
        "tensor_model_parallel_size": run.tensor,
        "pipeline_model_parallel_size": run.pipeline,
        "virtual_pipeline_model_parallel_size": run.virtual,
        "context_parallel_size": run.context if name == "student" else 1,
        "pipeline_dtype": torch.float32,
        "params_dtype": torch.float32,
        "bf16": False,
        "fp16": False,
        "use_cpu_initialization": True,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "cross_entropy_loss_fusion": False,
        "calculate_per_token_loss": True,
        "seq_length": SEQUENCE,
        **run.changes,
    }
    for option, value in chosen.items():
        setattr(found, option, value)
    if run.virtual:  # two stages send both ways between the same two ranks
        found.overlap_p2p_comm, found.batch_p2p_comm = True, False
    return found


def config(run: Run) -> Any:
    from megatron.bridge.data.base import DatasetProvider
    from megatron.bridge.training import config as bridge

    @dataclass
    class Data(DatasetProvider):
        seq_length: int = SEQUENCE

        def build_datasets(self, context: Any) -> tuple:
            counts = (context.train_samples, context.valid_samples, context.test_samples)
            kind = Stream if run.dataloader == "external" else Samples
            return tuple(kind(count, run.packed) for count in counts)

    own = run.folder / run.name
    return bridge.ConfigContainer(
        model=provider(run, "student"),
        train=bridge.TrainingConfig(
            train_iters=run.steps, global_batch_size=STEP, micro_batch_size=1 if run.packed else MICRO_BATCH
        ),
        validation=bridge.ValidationConfig(eval_interval=run.evaluate, eval_iters=1 if run.evaluate else 0),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam", lr=3e-3, min_lr=3e-3, clip_grad=0.0, use_distributed_optimizer=run.data > 1
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="constant", lr_warmup_iters=0, start_weight_decay=0.0, end_weight_decay=0.0
        ),
        ddp=bridge.DistributedDataParallelConfig(
            use_distributed_optimizer=run.data > 1,
            overlap_grad_reduce=run.data > 1,
            overlap_param_gather=run.data > 1,
            average_in_collective=False,
        ),
        dataset=Data(dataloader_type=run.dataloader, num_workers=0, persistent_workers=False),
        logger=bridge.LoggerConfig(log_interval=2, tensorboard_dir=str(own / "tensorboard")),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB - 1),
        checkpoint=bridge.CheckpointConfig(
            save=str(own / "checkpoints") if run.save_interval else None,
            save_interval=run.save_interval,
            load=str(own / "checkpoints") if run.load else None,
            ckpt_step=run.load,
            pretrained_checkpoint=run.pretrained or None,
            async_save=False,
        ),
        rng=bridge.RNGConfig(seed=1),
        dist=bridge.DistributedInitConfig(
            distributed_backend="gloo",
            use_decentralized_pg=run.own_groups,
            use_gloo_process_groups=not run.own_groups,
        ),
    )


def student(run: Run) -> SimpleNamespace:
    """Trains, and returns what this rank saw: each step's losses and gradient norm, what was written and logged."""
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.pretrain import pretrain

    from vcrd.megatron import distill

    write_checkpoints_alone()
    if run.own_groups:
        make_groups_of_gloo()
    if run.context > 1:
        attend_over_context_ranks()
    elif run.packed:
        attend_within_documents()
    wandb = SimpleNamespace(
        log=lambda values, step: written.append((step, dict(values))), finish=lambda: None
    )
    written: list[tuple[int, dict[str, Any]]] = []
    steps: list[dict[str, float]] = []
    evaluations: list[dict[str, float]] = []

    class Watch(Callback):
        def on_train_start(self, context: Any) -> None:
            if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                context.state._wandb_logger = wandb

        def on_train_step_end(self, context: Any) -> None:
            losses = {name: float(value) for name, value in context.loss_dict.items()}
            steps.append({**losses, "grad norm": context.grad_norm})

        def on_eval_end(self, context: Any) -> None:
            evaluations.append({name: float(value) for name, value in context.total_loss_dict.items()})

    chosen, teachers = config(run), []
    if run.teacher == "beside":
        chosen.model.register_pre_wrap_hook(lambda model: _with_teacher(run, chosen, teachers, model))
    plug = distill(
        forward_step(run.form), run.settings, teacher=(lambda: teachers) if run.teacher == "beside" else None
    )
    with heard() as said:
        (finetune if run.pretrained else pretrain)(chosen, plug, callbacks=[Watch()])
        plug.close()
    return SimpleNamespace(steps=steps, written=written, evaluations=evaluations, said=said)


def _with_teacher(run: Run, chosen: Any, teachers: list, model: list) -> list:
    """Builds this rank's part of the teacher where Bridge has built the student's."""
    beside = provider(run, "teacher")
    beside.finalize()
    teachers += beside.provide_distributed_model(wrap_with_ddp=False, pg_collection=model[0].pg_collection)
    chosen.model.variable_seq_lengths = True
    return model


def forward_step(form: str) -> Any:
    """Bridge's own step, in the forms in which scripts pass it."""
    from megatron.bridge.training import gpt_step

    if form == "function":
        return gpt_step.forward_step
    if form == "partial":
        return functools.partial(gpt_step.forward_step, return_schedule_plan=False)
    if form == "object":

        class Step:
            settings = None  # also the name of a field of the plug

            def __call__(self, state, data_iterator, model, return_schedule_plan=False):
                return gpt_step.forward_step(state, data_iterator, model, return_schedule_plan)

        return Step()
    if form == "without state":
        from megatron.bridge.training.losses import create_masked_next_token_loss_function

        def step(data_iterator, model):
            batch = next(data_iterator)
            output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
            return output, create_masked_next_token_loss_function(batch["loss_mask"], False, False)

        return step
    raise ValueError(form)


def teacher(run: Run, students: int = 1) -> int:
    """Serves the teacher to that many student jobs, one after another."""
    from megatron.bridge.training.config import TokenizerConfig
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    from vcrd.megatron import serve

    chosen = provider(run, "teacher")
    chosen.finalize()
    pg_collection = None
    if run.own_groups:
        from megatron.bridge.training.initialize import _create_pg_collection, _set_random_seed
        from megatron.core import parallel_state

        make_groups_of_gloo()
        parallel_state._set_global_memory_buffer()
        pg_collection = _create_pg_collection(chosen, 1)
        _set_random_seed(1, pg_collection=pg_collection)
    model = chosen.provide_distributed_model(wrap_with_ddp=False, pg_collection=pg_collection)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB - 1))
    return sum(serve(model, run.settings, tokenizer=tokenizer) for _ in range(students))


def truth(run: Run) -> dict[str, float]:
    """The figures of the first step and its gradient norm, by transformers, autograd and the reference."""
    from transformers import AutoModelForCausalLM

    from vcrd.loss import reference

    models = [
        AutoModelForCausalLM.from_pretrained(run.folder / name, dtype=torch.float32).double()
        for name in SHAPES
    ]
    sums = dict.fromkeys(("lm loss", "vcrd divergence", "vcrd cross entropy", "vcrd weight"), 0.0)
    count, total = 0, 0.0
    data = Samples(STEP, run.packed)
    for sample in (data[number] for number in range(STEP)):
        cuts = (sample["position_ids"] == 0).nonzero()[:, 0].tolist()
        parts = [slice(a, b) for a, b in zip(cuts, [*cuts[1:], SEQUENCE], strict=True)]
        q, p = (
            torch.cat([model(sample["tokens"][None, part]).logits for part in parts], 1) for model in models
        )
        labels, mask = sample["labels"][None], sample["loss_mask"][None]
        stats = reference.statistics(q, p, labels, mask=mask)
        weight, _ = reference.weights(*reference.log_validities(stats, "label"), mask=mask)
        loss = (weight * stats["divergence"])[mask != 0]
        total = total + loss.sum()
        count += int(mask.sum())
        sums["lm loss"] += float(loss.sum())
        sums["vcrd divergence"] += float(stats["divergence"][mask != 0].sum())
        sums["vcrd cross entropy"] += float(cross_entropy(q[mask != 0], labels[mask != 0], reduction="sum"))
        sums["vcrd weight"] += float(weight.sum())
    (total / count).backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in models[0].parameters()]).norm()
    return {
        **{name: value / count for name, value in sums.items()},
        "grad norm": float(norm),
        "tokens": count,
    }


def save_pretrained(run: Run, path: str) -> None:
    """The student as a checkpoint of Bridge's, as its conversion writes it."""
    from megatron.bridge import AutoBridge

    write_checkpoints_alone()
    chosen = provider(run, "student")
    chosen.finalize()
    model = chosen.provide_distributed_model(wrap_with_ddp=False)
    AutoBridge.from_hf_pretrained(str(run.folder / "student")).save_megatron_model(model, path)


def write_checkpoints_alone() -> None:
    """Megatron's writer puts its result into a queue of another process, which takes seconds to start."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


def make_groups_of_gloo() -> None:
    """Bridge makes its own groups for NCCL alone."""
    plain = torch.distributed.new_subgroups_by_enumeration
    torch.distributed.new_subgroups_by_enumeration = lambda ranks, backend, **rest: plain(
        ranks, backend="gloo", **rest
    )


def rows_by_hand(edges: list[int], rank: int, size: int) -> list[int]:
    """The positions of one of `size` context ranks: of each sequence, cut into 2 * size, part `rank` from both ends."""
    rows: list[int] = []
    for first, last in zip(edges, edges[1:], strict=False):
        part = (last - first) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            rows += range(first + number * part, first + (number + 1) * part)
    return rows


def attend_over_context_ranks() -> None:
    """Transformer Engine's part of context parallelism, for a CPU: an attention, and how packed rows are cut."""
    import copy

    from megatron.core import parallel_state, utils
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    plain_init, plain_forward = DotProductAttention.__init__, DotProductAttention.forward

    def init(self: Any, config: Any, *args: Any, **rest: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # else it refuses
        plain_init(self, alone, *args, **rest)

    def forward(
        self: Any, query: Any, key: Any, value: Any, mask: Any, packed_seq_params: Any = None, **rest: Any
    ) -> Any:
        group = parallel_state.get_context_parallel_group()
        size, packed = group.size(), packed_seq_params is not None
        edges = packed_seq_params.cu_seqlens_q_padded.tolist() if packed else [0, len(query) * size]
        position = torch.tensor([row for rank in range(size) for row in rows_by_hand(edges, rank, size)])
        mine = torch.tensor(rows_by_hand(edges, group.rank(), size))
        which = torch.bucketize(torch.arange(edges[-1]), torch.tensor(edges[1:]), right=True)
        hidden = (which[mine][:, None] != which[position]) | (mine[:, None] < position)
        rows = [each.unsqueeze(1) if packed else each for each in (query, key, value)]
        whole = [_Gathered.apply(each, group) for each in rows[1:]]
        found = plain_forward(self, rows[0], *whole, hidden[None, None], **rest)
        return found.squeeze(1) if packed else found

    def rows_of_engine(edges: Tensor, tokens: int, size: int, rank: int) -> Tensor:
        assert int(edges[-1]) == tokens
        return torch.tensor(rows_by_hand(edges.tolist(), rank, size))

    DotProductAttention.__init__, DotProductAttention.forward = init, forward
    utils.tex = SimpleNamespace(thd_get_partitioned_indices=rows_of_engine)


class _Gathered(torch.autograd.Function):
    """The parts of all ranks of a group, one after another, along the first dimension."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None


def saved_configuration(checkpoint: Path) -> str:
    """The end-of-step function in a checkpoint's configuration, which is read as for an export."""
    from megatron.bridge.training.model_load_save import load_model_config

    config, _ = load_model_config(str(checkpoint))
    function = config.finalize_model_grads_func
    function = getattr(function, "func", function)
    return f"{function.__module__}.{function.__qualname__}"


def injections() -> dict[str, bool]:
    """For each form of a forward step: whether Bridge gives the plug its state, and the step what it takes."""
    from megatron.bridge.training.state import GlobalState
    from megatron.bridge.training.utils.train_utils import prepare_forward_step_func

    from vcrd.megatron import distill

    state, model, got = GlobalState(), torch.nn.Linear(1, 1).eval(), []
    batch = object()
    iterator = itertools.repeat(batch)

    def by_name(global_state, data_iterator, model, return_schedule_plan=False):
        got.append((global_state, data_iterator, model))

    def by_annotation(anything: GlobalState, data_iterator, model):
        got.append((anything, data_iterator, model))

    def without(data_iterator, model, state=None):  # no state of Bridge's
        got.append((None, data_iterator, model))

    class Step:
        settings = "its own"

        def __call__(self, state, data_iterator, model):
            got.append((state, data_iterator, model))

    bound = functools.partial(by_name, state)  # a script may have bound it
    forms = {
        "name": by_name,
        "annotation": by_annotation,
        "without": without,
        "object": Step(),
        "bound": bound,
    }
    found = {}
    for name, form in forms.items():
        plug = distill(form, DistillSettings())
        called = prepare_forward_step_func(plug, state)
        called(iterator, model)
        its_state, its_iterator, its_model = got[-1]
        whole = its_state is (None if form is without else state) and its_model is model
        whole = whole and next(its_iterator) is batch  # not the same iterator: the plug hides its fields
        found[name] = whole and called is not plug and isinstance(plug._loop, BridgeTraining)
        assert isinstance(plug.settings, DistillSettings)
    return found


def refusals() -> dict[str, str]:
    """What is said of settings in Bridge's configuration that do not go together with distillation."""
    from modelopt.torch.distill import DistillationModel

    from vcrd.megatron.compatibility import check_compatibility

    def state(restart: Any = None, **dataset: Any) -> Any:
        config = SimpleNamespace(
            inprocess_restart=restart,
            dataset=SimpleNamespace(**dataset),
        )
        return SimpleNamespace(cfg=config)

    chunk = torch.nn.Linear(1, 1)
    chunk.config = SimpleNamespace()
    distilled = type("Distilled", (DistillationModel,), {"__init__": lambda self: None})()
    vars(distilled)["config"] = chunk.config
    cases = {
        "inprocess_restart": (chunk, state(SimpleNamespace(enabled=True))),
        "reset_position_ids": (chunk, state(reset_position_ids=True)),
        "modelopt": (distilled, state()),
    }
    found = {}
    for name, (model, its_state) in cases.items():
        try:
            check_compatibility(model, BridgeTraining(its_state).arguments)
        except ValueError as error:
            found[name] = str(error)
    return found


def stand_ins() -> SimpleNamespace:
    """What other modules see of the stand-ins, and what is left of them after the block."""
    from megatron.bridge.peft import lora_layers

    others, said = [], []
    for used in (lora_layers.te.Linear, lora_layers.te.ops.Sequential, lora_layers.te.fp8_autocast):
        try:
            used()
        except ImportError as error:
            said.append(str(error))
    with ExitStack() as stack:
        bridge_on_cpu.install(stack)
        import megatron.energon  # noqa: F401
    for name in ("transformer_engine", "nvidia_resiliency_ext"):
        try:
            importlib.import_module(name)
            others.append(name)
        except ImportError:
            pass
    return SimpleNamespace(
        others_see=others,
        said=said,
        left=[name for name in sys.modules if "energon" in name and name.startswith("megatron.energon")],
    )


@contextmanager
def heard() -> Iterator[list[str]]:
    """What the logger "vcrd" says in the block."""
    said: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("vcrd").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("vcrd").removeHandler(handler)
