"""The comparison with a language model: its verifier, its generation, its losses and its interruptions."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import tasks
from lm import compare, judged, page, training
from lm.decoder import Decoder, generate
from lm.losses import METHODS, REGIMES, loss_of, names_of, verified
from lm.sizes import CONFIGS
from lm.text import PAD, Rows, Task, Vocabulary, pairs_of_symbols, smollm2
from methods import OWN, TRACES
from problems import END, Problem, State

TINY = CONFIGS["tiny"]


class Coins(State):
    """An amount to be paid with coins of these values in any order; texts of one to three symbols."""

    def __init__(self, left: int) -> None:
        self.left = left

    def steps(self):
        found = {}
        for coin in (1, 2, 5):
            rest = self.left - coin
            if rest >= 0:
                found[f"{coin};" if rest else f"{coin}={END}"] = Coins(rest) if rest else None
        return found


def every_solution(state: State | None, text: str = ""):
    if state is None:
        yield text
        return
    for step, after in state.steps().items():
        yield from every_solution(after, text + step)


def task_of(problem: Problem, vocabulary: Vocabulary) -> Task:
    return Task(problem, 0, vocabulary.encode(problem.prompt), [])


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return pairs_of_symbols()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small for several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def setting() -> training.Setting:
    return training.Setting.of(TINY)


@pytest.mark.parametrize("kind", ["coins", "arithmetic", "tracing"])
def test_a_token_is_valid_where_a_correct_solution_continues_with_its_text(kind, vocabulary):
    rng = random.Random(1)
    problem = Problem("7?", Coins(7)) if kind == "coins" else getattr(tasks, kind)(rng, False)
    correct = set(every_solution(problem.start))
    solutions = [vocabulary.encode(rng.choice(sorted(correct))) for _ in range(4)]
    solutions.append([*solutions[0][:3], vocabulary.encode("Z")[0], *solutions[0][3:]])
    solutions.append([*solutions[1], *solutions[1][:2]])  # goes on after the end
    task = task_of(problem, vocabulary)
    rows = Rows.of([task] * len(solutions), solutions, vocabulary)
    prefixes = [vocabulary.decode(each[:place]) for each in solutions for place in range(len(each))]
    assert rows.counts.sum() == len(prefixes) == len(rows.written)
    several = 0
    for token, text in enumerate(vocabulary.texts):
        expected = [any(whole.startswith(prefix + text) for whole in correct) for prefix in prefixes]
        assert rows.valid(torch.full((len(prefixes),), token)).tolist() == expected, text
        several += len(text) > 1 and any(expected)
    assert several >= 2
    open_ = [any(whole.startswith(prefix) for whole in correct) for prefix in prefixes]
    assert rows.unbroken().tolist() == open_ and not all(open_)
    # The written tokens are where the model predicts them.
    assert torch.equal(rows.tokens[0, rows.counts[0]][1:], torch.tensor(solutions[0][:-1]))
    assert rows.tokens[0, rows.counts[0]][0] == task.prompt[-1]


def plain(model: Decoder, prompt: list[int], length: int, end: int, chances=None) -> list[int]:
    """Without cache, one row at a time."""
    text = list(prompt)
    for place in range(length):
        shares = model.logits(model(torch.tensor([text])))[0, -1].softmax(-1)
        text.append(
            int(shares.argmax()) if chances is None else int((shares.cumsum(-1) < chances[place]).sum())
        )
        if text[-1] == end:
            break
    return text[len(prompt) :]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("together", [2, 64])
def test_generation_with_a_cache_equals_the_plain_model(setting, sampled, together):
    model = training.decoder(setting, (0, 1), seed=3)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(2, 60, (n,), generator=generator).tolist() for n in (5, 1, 9, 3, 4, 7, 2, 8)]
    chances = torch.rand(len(prompts), 12, generator=generator) if sampled else None
    if sampled:
        end = 0
        chances[torch.arange(len(prompts)), torch.tensor([3, 9, 2, 11, 0, 5, 5, 7])] = 0.0  # draws token 0
    else:
        end = generate(model, prompts, 12, -1)[0][4]
    found = generate(model, prompts, 12, end, chances, together)
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            its = None if chances is None else chances[row]
            assert found[row] == plain(model, prompt, 12, end, its)
    # Solutions end at different places, so that rows leave the batch.
    assert len({len(row) for row in found}) > (4 if sampled else 1)


def test_a_student_has_layers_of_the_trained_teacher(setting):
    teacher = training.decoder(setting, (0, 1), seed=3)
    student = teacher.part((1,))
    assert torch.equal(student.embedding, teacher.embedding) and len(student.layers) == 1
    for name, parameter in student.layers[0].named_parameters():
        assert torch.equal(parameter, teacher.layers[1].get_parameter(name)), name
        assert (
            parameter.requires_grad
            and parameter.data_ptr() != teacher.layers[1].get_parameter(name).data_ptr()
        )
    rounded = training.frozen(teacher).to(torch.bfloat16).part((0, 1))
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}


def test_a_frozen_copy_has_the_same_logits(setting):
    """Also far from the start, where the angles of the rotary embeddings are large."""
    model = training.decoder(setting, (0, 1), seed=3)
    model.compute = torch.bfloat16
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(2.0 * parameter.bfloat16())  # no rounding of weights
        tokens = torch.randint(2, 60, (2, 200), generator=torch.Generator().manual_seed(1))
        expected, found = (each.logits(each(tokens)).float() for each in (model, training.frozen(model)))
    assert (expected - found).abs().max() < 0.02 * expected.std()


def test_logits_do_not_depend_on_the_other_rows_of_a_batch(setting):
    model = training.decoder(setting, (0, 1), seed=3)
    tasks_ = [*setting.tasks[:5], setting.tasks[1]]
    rows = setting.rows(tasks_, [task.worked for task in tasks_])
    with torch.no_grad():
        alone = [setting.logits(model, setting.rows([task], [task.worked])) for task in tasks_]
        plain_ = model.logits(model(rows.tokens)[rows.counts])
        torch.testing.assert_close(setting.logits(model, rows), plain_)
        torch.testing.assert_close(torch.cat(alone), plain_)
        assert len(alone[1]) == len(tasks_[1].worked)


def test_the_losses_of_all_methods_equal_a_direct_computation(setting):
    generator = torch.Generator().manual_seed(1)
    some = [task for task in setting.tasks if task.family == 1][:5]
    # Some solutions go wrong on the way.
    solutions = [[*t.worked[:4], 7, *t.worked[5:]] if row % 2 else t.worked for row, t in enumerate(some)]
    rows = setting.rows(some, solutions)
    n, vocab = len(rows.written), len(setting.vocabulary.texts)
    student, teacher = 2 * torch.randn(2, n, vocab, generator=generator)
    # Proposals that are correct in about half of the places.
    correct = torch.tensor(list(itertools.chain(*(task.worked for task in some))))
    for logits in (student, teacher):
        logits[torch.arange(n), correct] += 9.0 * (torch.rand(n, generator=generator) < 0.5)
    for regime, method in itertools.product(REGIMES, METHODS.values()):
        if regime not in method.regimes:
            continue
        given = student.clone().requires_grad_()
        loss = loss_of(method, given, teacher, rows, regime, torch.Generator().manual_seed(2))
        loss.backward()
        value, gradient = direct(method.name, student, teacher, rows, regime)
        assert loss.item() == pytest.approx(value, rel=1e-5), (regime, method.name)
        torch.testing.assert_close(given.grad.double(), gradient, rtol=1e-4, atol=1e-8)


def direct(name: str, student, teacher, rows: Rows, regime: str) -> tuple[float, torch.Tensor]:
    """In float64, from the formulas."""
    q_logits, p_logits = student.double().requires_grad_(), teacher.double()
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    asked = p.argmax(-1) if regime == OWN else rows.written
    valid = rows.valid(asked)
    assert 0.1 < valid.float().mean() < 0.9
    y = asked[:, None]
    kl = (p * (log_p - log_q)).sum(-1)
    log_m = (0.5 * (p + q)).log()
    jsd = 0.5 * (p * (log_p - log_m)).sum(-1) + 0.5 * (q * (log_q - log_m)).sum(-1)
    ce = torch.where(valid, -log_q.gather(-1, y)[:, 0], 0.0)
    weight = torch.ones(len(valid), dtype=torch.float64)
    proposals = [each.argmax(-1) for each in (p, q)]
    teacher_valid, student_valid = map(rows.valid, proposals)
    if "accepted mass" in name:
        gaps = [(p - q).gather(-1, each[:, None])[:, 0] for each in proposals]
        twice = proposals[0] == proposals[1]
        gap = teacher_valid * gaps[0] + torch.where(twice, 0.0, student_valid * gaps[1])
        weight = (1 + gap / gap.square().mean().sqrt()).clamp(0.05, 3.0).detach()
    elif "scores" in name:
        rho = 0.5 + 0.5 * (teacher_valid.double() - student_valid.double())  # sharpness 4 saturates
        weight = 0.1 + 1.8 * rho
    elif "label" in name:
        relative = (4 * (log_p - log_q).gather(-1, y)[:, 0]).sigmoid()
        weight = (0.1 + 1.8 * torch.where(valid, relative, 0.5)).detach()
    if "shuffled" in name:
        weight = weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(2))]
    if "kept" in name:
        weight = weight * (jsd.sum() / (weight * jsd).sum()).detach()
    others = {"SFT": ce, "KL + CE": 0.5 * kl + 0.5 * ce, "forward KL": kl, "label": weight * kl}
    loss = others.get(name, weight * jsd).mean()
    (gradient,) = torch.autograd.grad(loss, q_logits)
    return float(loss.detach()), gradient


def test_on_the_student_s_own_samples_labels_are_the_teacher_s_accepted_proposals(setting):
    task = setting.tasks[1]
    rows = setting.rows([task], [task.worked])
    wrong = torch.full_like(rows.written, 0)
    assert torch.equal(verified(rows, OWN, rows.written), rows.written)
    assert (verified(rows, OWN, wrong) == -1).all()
    assert torch.equal(verified(rows, TRACES, wrong), rows.written)


def without_times(path) -> dict:
    content = json.loads((path / "lm.json").read_text())
    drop = ("seconds", "processor_seconds", "median")
    students = [{k: v for k, v in each.items() if k not in drop} for each in content["students"]]
    return {**{k: v for k, v in content.items() if k not in drop}, "students": students}


def fingerprints(path) -> list[str]:
    return [compare.fingerprint(each) for each in sorted(path.glob("models/*/*.pt"))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of the first four runs."""
    folder = tmp_path_factory.mktemp("lm")
    assert compare.main(["--config", "tiny", "--out", str(folder), "--most", "4"]) == 0
    return folder


def test_an_interrupted_comparison_continues_as_if_it_had_not_been(finished, tmp_path, capsys):
    command = ["--config", "tiny", "--out", str(tmp_path), "--most", "4"]
    calls = 0
    while not (tmp_path / "lm.json").exists() or len(without_times(tmp_path)["students"]) < 4:
        assert compare.main([*command, "--seconds", "1e-9"]) == 0
        calls += 1
        assert calls < 20
    # Teacher: two measurements, one of them the last; each run is interrupted once.
    assert calls >= 5 and not list(tmp_path.rglob("*.part"))
    assert "the same command continues" in capsys.readouterr().out
    assert fingerprints(tmp_path) == fingerprints(finished) and len(fingerprints(finished)) == 2
    assert without_times(tmp_path) == without_times(finished)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("runs/*/*.json")}
    compare.main(command)
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("runs/*/*.json")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--config", "gpu", "--device", "cuda", "--out", str(tmp_path / "none")])
    assert stopped.value.code == 2 and not (tmp_path / "none").exists()
    assert "--device: expected a GPU that torch can use for 'cuda', got none" in capsys.readouterr().err


def test_another_process_takes_the_next_run(finished, setting, tmp_path):
    queue = compare.Queue(finished, "tiny", setting)
    run = compare.runs_of(TINY)[0]
    with compare.locked(queue.folder.of_run(run), wait=False) as mine:
        assert mine
        with compare.locked(queue.folder.of_run(run), wait=False) as also:
            assert not also
    with compare.locked(queue.folder.of_run(run), wait=False) as mine:
        assert mine


def test_results_belong_to_one_teacher_and_one_configuration(finished, setting):
    """A teacher that is trained anew is another one."""
    folder = compare.Queue(finished, "tiny", setting).folder
    before, student = folder.of_run(compare.runs_of(TINY)[0]), folder.student(0)
    kept = folder.teacher().read_bytes()
    folder.teacher().write_bytes(kept + b"another")
    try:
        assert folder.student(0) != student
    finally:
        folder.teacher().write_bytes(kept)
    assert folder.student(0) == student
    kept = student.read_bytes()
    student.write_bytes(kept + b"another")
    try:
        assert folder.of_run(compare.runs_of(TINY)[0]) != before
    finally:
        student.write_bytes(kept)
    assert folder.of_run(compare.runs_of(TINY)[0]) == before
    other = compare.Folder(finished, replace(TINY, rate=0.5))
    assert other.teacher() == folder.teacher() and other.student(0) == folder.student(0)
    assert other.of_run(compare.runs_of(TINY)[0]) != before
    for changed in ({"pool": 9}, {"teacher_rate": 0.5}, {"good_enough": (0.1, 0.2)}):
        assert compare.Folder(finished, replace(TINY, **changed)).teacher() != folder.teacher()
    changed = compare.Folder(finished, replace(TINY, student_rate=0.5))
    assert changed.teacher() == folder.teacher() and changed.student(0) != folder.student(0)


def test_methods_see_the_same_problems_and_train_different_students(finished):
    """All students of a seed start equal, and draw with the same random numbers."""
    records = without_times(finished)["students"]
    assert [each["method"] for each in records] == names_of(OWN)[:4]
    assert (
        len({str(each["before"]) for each in records}) == len({str(each["teacher"]) for each in records}) == 1
    )
    assert all(each["tokens"] > TINY.steps * TINY.batch * 5 for each in records)


def results(solved: dict[str, str]) -> dict:
    """Of one seed and regime, eight problems of each of two families: hexadecimal digits of both."""
    students = [
        {
            "regime": OWN,
            "seed": 0,
            "method": name,
            "solved": [text[:2], text[2:]],
            "before": ["00", "0f"],
            "teacher": ["ff", "0f"],
        }
        for name, text in solved.items()
    ]
    sizes = {**vars(TINY), "families": ("underspecified:walks", "tasks:arithmetic")}
    return {
        "config": "cpu",
        "device": "cpu",
        "sizes": sizes,
        "problems": 8,
        "all_runs": 48,
        "median": {"tokens": 1234567.0},
        "judged": {},
        "students": students,
    }


def test_the_page_has_the_numbers_of_the_results():
    text = page.page(results({"JSD": "f000", "KL + CE": "ff0f", "JSD x scores": "ff00"}))
    assert "| KL + CE | 100.0 | 50.0 | 75.0 |" in text and "| JSD | 50.0 | 0.0 | 25.0 |" in text
    assert "| method | walks | arithmetic | mean |" in text
    assert "about 1,234,567 tokens" in text and "3 of 48 runs are finished" in text
    assert "The teacher solves 75.0 %, the students before the distillation 25.0 %." in text
    assert "longer" not in text and "### Prefixes of the teacher's solutions" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| JSD x scores |") and "to" in line]
    assert row.split(" | ")[1].startswith("**+25.0 (")


def test_the_picture_has_every_method(tmp_path):
    page.draw(results({"JSD": "f000", "KL + CE": "ff0f", "JSD x scores": "ff00"}), tmp_path)
    (drawn,) = tmp_path.iterdir()
    assert drawn.name == "methods-own.svg"
    assert all(
        f">{name}<" in drawn.read_text() for name in ("KL + CE", "JSD x scores", "walks", "arithmetic")
    )


def test_only_seeds_with_all_methods_are_compared():
    content = results({name: "ff00" for name in names_of(OWN)})
    more = [{**each, "seed": 1} for each in content["students"][:2]]
    content["students"] = [*more, *content["students"]]
    assert page.results_of(content, OWN).seeds == [0]
    content["students"] = more
    assert page.results_of(content, OWN).seeds == [1] and page.results_of(content, TRACES) is None


def test_the_judged_proposals_are_those_up_to_the_first_error(setting, monkeypatch):
    def solved(self, model: Decoder, tasks_: list[Task], chances: torch.Tensor) -> list[list[int]]:
        """Worked solutions, half of them with a wrong token somewhere."""
        assert chances.shape == (len(tasks_), setting.length)
        wrong = self.vocabulary.encode("Z")
        return [
            task.worked[:row] + wrong + task.worked[row + 1 :] if row % 2 else task.worked
            for row, task in enumerate(tasks_)
        ]

    monkeypatch.setattr(training.Setting, "solved", solved)
    teacher, student = (
        training.decoder(setting, layers, seed=seed) for layers, seed in (((0, 1), 1), ((1,), 2))
    )
    found = judged.measured(setting, training.frozen(teacher), student, 1)
    some = setting.held_out[: len(setting.held_out) // 2]
    chances = torch.rand(len(some), setting.length, generator=torch.Generator().manual_seed(9001))
    for regime, model in ((OWN, student), (TRACES, teacher)):
        expected: dict[str, list] = {"problem": [], "teacher": [], "student": []}
        for family in range(2):
            for place, (task, written) in enumerate(
                zip(some, setting.solved(model, some, chances), strict=True)
            ):
                if task.family == family:
                    _judge(setting, task, written, {"teacher": teacher, "student": student}, expected)
                    count = len(expected["teacher"]) - len(expected["problem"])
                    expected["problem"] += [place + len(some)] * count
        parts = found[regime]
        assert np.concatenate([those.problem for those in parts]).tolist() == expected["problem"]
        assert len(expected["problem"]) > 30
        for name in ("teacher", "student"):
            assert np.concatenate([those.valid[name] for those in parts]).tolist() == expected[name]
    summary = judged.summary([found])
    assert set(summary) == set(REGIMES) and "wrong" in summary[OWN]["relative"]
    text = page.page({**results({"JSD": "f000"}), "judged": summary})
    assert "| label |" in text and "own: which of the two" in text


def _judge(setting, task: Task, written: list[int], models: dict[str, Decoder], expected: dict) -> None:
    """The verdicts on both proposals before each token up to the first wrong one, by the text alone."""

    def correct(tokens: list[int]) -> bool:
        text = setting.vocabulary.decode(tokens)
        return all(
            symbol in allowed for symbol, allowed in zip(text, task.problem.allowed(text), strict=True)
        )

    for place in range(len(written)):
        if correct(written[:place]):
            with torch.no_grad():
                inputs = torch.tensor([[*task.prompt, *written[:place]]])
                for name, model in models.items():
                    action = int(model.logits(model(inputs))[0, -1].argmax())
                    expected[name].append(correct([*written[:place], action]))


@pytest.mark.slow
def test_a_student_comes_closer_to_its_teacher(setting, tmp_path):
    sizes = replace(TINY, steps=24, batch=6, renewed=6, rate=4e-3)
    setting = replace(setting, sizes=sizes)
    teacher = training.frozen(training.decoder(setting, (0, 1), seed=1))
    student = training.decoder(setting, (1,), seed=2)
    rows = setting.rows(setting.held_out, [task.worked for task in setting.held_out])

    def distance(model: Decoder) -> float:
        with torch.no_grad():
            p, q = (setting.logits(each, rows) for each in (teacher, model))
            return float(loss_of(METHODS["JSD"], q, p, rows, OWN, torch.Generator()))

    before = distance(student)
    for regime in REGIMES:
        trained, _ = training.distil(METHODS["JSD"], regime, teacher, student, 0, tmp_path / "part", setting)
        assert distance(trained) < 0.7 * before, regime
    assert distance(student) == before


@pytest.mark.slow
def test_the_decoder_equals_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    from examples.demo.model import Shape

    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(config).eval()
    state = {name: value + 0.1 * torch.randn_like(value) for name, value in theirs.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state)
    kept = (0, 2, 3)
    theirs.model.layers = torch.nn.ModuleList([theirs.model.layers[index] for index in kept])
    model = Decoder(Shape.of(config), len(kept)).load(state.__getitem__, kept)
    tokens = torch.randint(50, (3, 11))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        torch.testing.assert_close(model.logits(model(tokens)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_smollm2_reads_and_writes_solutions():
    vocabulary, rng = smollm2(), random.Random(1)
    assert len(vocabulary.texts) == 49152
    assert vocabulary.texts[vocabulary.end] == END and vocabulary.texts.count(END) == 1
    assert vocabulary.texts[PAD] not in ("", END)
    several = 0
    for family in (tasks.arithmetic, tasks.tracing, tasks.formats):
        for _ in range(20):
            problem = family(rng, False)
            solution = problem.solution(rng)
            tokens = vocabulary.encode(solution)
            assert vocabulary.decode(tokens) == solution and tokens[-1] == vocabulary.end
            rows = Rows.of([task_of(problem, vocabulary)], [tokens], vocabulary)
            assert rows.valid(rows.written).all()
            several += any(len(vocabulary.texts[token]) > 1 for token in tokens)
    assert several > 10
