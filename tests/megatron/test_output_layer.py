"""What a model does to its logits is found out whatever the micro-batches hold, in the first pass and later."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import jobs
import pytest
import torch
from test_fused_head import build
from torch import Tensor
from worlds import World, run_worlds

from vcrd.megatron import output_layer
from vcrd.megatron.fused_head import FusedHeadLoss
from vcrd.megatron.output_layer import EVERY
from vcrd.megatron.serving import ServedHead

SIZE, WIDTH = 96, 50
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REFUSED = (
    "expected .*logits .*scale \\* states @ weight.T, soft-capped or not, .* got logits of test states that"
)


class Model(torch.nn.Module):
    """An output layer, and what the model's own code does to its logits."""

    def __init__(self, finish: Callable[[Tensor], Tensor], dtype: torch.dtype, **config) -> None:
        super().__init__()
        layer = torch.nn.Linear(SIZE, WIDTH, bias=False, dtype=dtype)
        torch.nn.init.normal_(layer.weight, std=0.02)
        self.rows: list[int] = []  # that the layer multiplied

        def forward(states: Tensor, weight: Tensor | None = None) -> tuple[Tensor, None]:
            self.rows.append(states.shape[:-1].numel())
            return torch.nn.functional.linear(states, layer.weight if weight is None else weight), None

        layer.forward = forward
        self.output_layer, self.finish, self.config = layer, finish, SimpleNamespace(**config)

    def forward(self, states: Tensor) -> Tensor:
        return self.finish(self.output_layer(states)[0])


def student(model: Model) -> Callable[[Tensor], None]:
    head = FusedHeadLoss(model, None)

    def run(states: Tensor) -> None:
        tokens = states.shape[:-1]
        teacher, labels = torch.zeros(*tokens, WIDTH), torch.zeros(tokens, dtype=torch.int64)
        with head.captured():
            head.loss(model(states), teacher, labels)

    return run


def teacher(model: Model) -> Callable[[Tensor], None]:
    head = ServedHead(model, None)

    def run(states: Tensor) -> None:
        with torch.no_grad(), head.captured() as captured:
            logits = model(states)
        assert torch.equal(captured.states.nan_to_num(), states.nan_to_num())
        head.layer.check(logits, head.weight)

    return run


def cap(at: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: at * torch.tanh(logits / at)


SIDES = pytest.mark.parametrize("side", [student, teacher], ids=["student", "teacher"])
FINISHES = {
    "a cap": (cap(30), {}),
    "a high cap": (cap(100), {}),
    "a clamp": (lambda logits: logits.clamp(-50, 50), {}),
    "another cap": (cap(50), {"final_logit_softcapping": 30.0}),
    "no cap": (lambda logits: logits, {"final_logit_softcapping": 30.0}),
    "a factor": (lambda logits: 1.04 * logits, {}),
    "a smaller factor": (lambda logits: logits * 0.98, {}),
    "another scale": (lambda logits: logits / 16, {"use_mup": True, "mup_output_mult": 1 / 15.5}),
    "a bias": (lambda logits: logits + 0.02, {}),
    "a bias of one token": (lambda logits: logits + (torch.arange(WIDTH) == 7) * 0.05, {}),
    "another order": (lambda logits: logits.roll(1, -1), {}),
    "a mean": (lambda logits: logits - logits.mean(-1, keepdim=True), {}),
    "other columns": (lambda logits: logits[..., :-1], {}),
    "not a number": (lambda logits: logits * torch.nan, {}),
}


@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FINISHES)
def test_the_first_pass_finds_it_out_whatever_its_states_are(side, dtype, name):
    finish, config = FINISHES[name]
    for states in (torch.zeros(3, 2, SIZE), torch.full((3, 2, SIZE), torch.nan), torch.randn(40, 1, SIZE)):
        run = side(Model(lambda logits: finish(logits).to(dtype), dtype, **config))
        with pytest.raises(ValueError, match=REFUSED):
            run(states.to(dtype))


@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_that_normalises_or_drops_units_is_found_out(side, dtype):
    for change in (
        lambda states: torch.nn.functional.rms_norm(states.float(), (SIZE,)).to(dtype),
        lambda states: torch.cat([states[..., :60], states[..., 60:] * 0], -1),
    ):
        model = Model(lambda logits: logits, dtype)
        plain = model.output_layer.forward
        model.output_layer.forward = lambda states, *rest, plain=plain, c=change: plain(c(states), *rest)
        with pytest.raises(ValueError, match=REFUSED):
            side(model)(torch.randn(5, 2, SIZE).to(dtype))


@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(1, 1), (5, 3), (7, 40)])
def test_what_is_honoured_is_not_refused_and_costs_a_few_rows(monkeypatch, side, dtype, tokens):
    monkeypatch.setattr(output_layer, "EVERY", 2)
    for std in (0.002, 0.02, 1.0):
        for finish, config in (
            (lambda logits: logits, {}),
            (lambda logits: logits.float(), {}),
            (lambda logits: logits * 0.0721, {"use_mup": True, "mup_output_mult": 0.0721}),
            (
                lambda logits: cap(30)(logits * 0.25),
                {"use_mup": True, "mup_output_mult": 0.25, "logit_softcap": 30.0},
            ),
            (cap(15), {"output_logit_softcapping": 15.0}),
        ):
            model = Model(finish, dtype, **config)
            torch.nn.init.normal_(model.output_layer.weight, std=std)
            run = side(model)
            for _ in range(5):
                run(torch.randn(*tokens, SIZE).to(dtype))
            few, tested = tokens[1], model.rows[::2]
            assert len(tested) == 3 and few <= min(tested) and max(tested) <= max(16, few) + few
            assert model.rows[1::2] == [few, few]


@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_begins_later_is_found_out_soon(side, dtype):
    """A cap that is switched on, an adapter that begins at zero, as LoRA's do."""
    low, high = torch.randn(SIZE, 1).to(dtype), torch.zeros(1, WIDTH).to(dtype)
    for change in ("cap", "adapter", "weight"):
        model = Model(lambda logits: logits, dtype)
        plain = model.output_layer.forward
        model.output_layer.forward = lambda states, *rest, plain=plain: (
            plain(states, *rest)[0] + states @ low @ high,
            None,
        )
        run = side(model)
        for _ in range(EVERY + 3):
            run(torch.randn(5, 2, SIZE).to(dtype))
        if change == "cap":
            model.finish = cap(30)
        elif change == "adapter":
            high.normal_(std=0.01)
        elif side is teacher:  # whose students were sent the weight of before
            with torch.no_grad():
                model.output_layer.weight.mul_(1.03)
        else:
            continue
        with pytest.raises(ValueError, match=REFUSED):
            for _ in range(EVERY):
                run(torch.randn(5, 2, SIZE).to(dtype))
        high.zero_()


def test_a_nan_of_the_weight_is_not_the_layers_doing():
    model = Model(lambda logits: logits, torch.float32)
    with torch.no_grad():
        model.output_layer.weight[3] = torch.nan
    teacher(model)(torch.randn(5, 2, SIZE))


def test_no_global_random_state_moves():
    before = torch.get_rng_state()
    model = Model(lambda logits: logits, torch.float32)
    run = teacher(model)
    torch.set_rng_state(before)
    run(torch.zeros(5, 2, SIZE))
    assert torch.equal(torch.get_rng_state(), before)


def sharded_layers() -> list[str]:
    """Megatron's own layers, each rank with its columns: of a model that is as it says, and of others."""
    from megatron.core import parallel_state, tensor_parallel

    from examples.demo.model import configure

    group = parallel_state.get_tensor_model_parallel_group()
    found = []
    for sequence_parallel in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            config = configure(jobs.STUDENT, 1)
            config.sequence_parallel, config.params_dtype = sequence_parallel, dtype
            config.tensor_model_parallel_size = group.size()
            for finish in (
                lambda logits: logits,
                cap(30),
                # Of one rank's columns alone.
                lambda logits: logits * (1.0 if group.rank() == 0 else 1.04),
                lambda logits: logits + (0.0 if group.rank() else 0.1),
            ):
                for side in ("student", "teacher"):
                    layer = tensor_parallel.ColumnParallelLinear(
                        jobs.STUDENT.hidden,
                        64,
                        config=config,
                        init_method=None,
                        bias=False,
                        gather_output=False,
                    ).to(dtype)
                    torch.nn.init.normal_(layer.weight, std=0.3)
                    chunk = SimpleNamespace(output_layer=layer, config=config, forward=layer.forward)
                    found.append(_ask(chunk, finish, side, group, dtype, sequence_parallel))
    return found


def _ask(chunk, finish, side, group, dtype, sequence_parallel) -> str:
    head = FusedHeadLoss(chunk, group) if side == "student" else ServedHead(chunk, group)
    parts = group.size() if sequence_parallel else 1
    try:
        for _ in range(EVERY + 1):
            generator = torch.Generator().manual_seed(1)
            states = torch.randn(6, 2, jobs.STUDENT.hidden, generator=generator).to(dtype)
            states = states.chunk(parts)[group.rank() if sequence_parallel else 0].requires_grad_(
                side == "student"
            )
            with head.captured(), torch.set_grad_enabled(side == "student"):
                logits = finish(chunk.output_layer(states)[0])
                if side == "student":
                    teacher_logits = torch.zeros(6, 2, 64 // group.size())
                    out = head.loss(logits, teacher_logits, torch.zeros(6, 2, dtype=torch.int64), group=group)
                    out.loss.sum().backward()
            if side == "teacher":
                head.layer.check(logits, head.weight)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_megatrons_layers_on_two_ranks_say_the_same_with_and_without_sequence_parallelism():
    (ranks,) = run_worlds(World(sharded_layers, 2, tensor=2))
    assert ranks[0] == ranks[1]
    for number, sentence in enumerate(ranks[0]):
        if number % 8 < 2:
            assert sentence == "accepted", number
        else:
            assert "got logits of test states that differ by" in sentence, (number, sentence)


def whole_models(tied: bool) -> list[str]:
    """A student beside its teacher, as they are, and with a cap or a factor in the student's own code."""

    from vcrd.megatron import distill
    from vcrd.settings import DistillSettings

    found = []
    for finish in (None, cap(30), lambda logits: 1.04 * logits):
        model = build(tied)
        if finish is not None:
            plain = model.output_layer.forward
            model.output_layer.forward = lambda *given, plain=plain, finish=finish, **more: (
                finish(plain(*given, **more)[0]),
                None,
            )
        plug = distill(
            jobs.plain_forward_step([]),
            DistillSettings(vocab_size=jobs.TRUE_VOCAB, fused_head="on").replaced(payload="hidden"),
            teacher=build(tied),
        )
        try:
            jobs.one_step(plug, model)
        except ValueError as error:
            found.append(str(error))
        else:
            found.append("accepted")
        plug.close()
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_with_a_cap_in_its_own_code_is_refused_on_every_tensor_rank(tied):
    (ranks,) = run_worlds(World(whole_models, 2, tensor=2, arguments=(tied,)))
    assert ranks[0] == ranks[1]
    honest, *others = ranks[0]
    assert honest == "accepted"
    assert all(other.startswith("fused_head: expected a model whose logits are scale") for other in others)
