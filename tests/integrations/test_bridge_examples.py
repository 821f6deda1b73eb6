"""The scripts of examples/bridge: Hugging Face checkpoint to Megatron and back, and a pair of jobs between."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import hugging_face
import pytest
import torch
from bridge_forks import ROOT, Forks, Job, script

from examples.bridge.prune import parse_layers, prune

pytest.importorskip("transformers")
needs_bridge = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None, reason="Megatron-Bridge needs Python 3.12"
)
SEQUENCE = 32
SHORT = ("--seq-length", SEQUENCE)
DISTILL = ("distill.py", "--student-hf", "HF/llama", "--data", "HF/data", "--save", "HF/run")


@pytest.fixture(scope="module")
def bridge():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Random models: a deep Qwen3 with tied embeddings, a Llama with its own output layer; and chats."""
    folder = tmp_path_factory.mktemp("hugging-face")
    hugging_face.save(folder / "qwen3", "Qwen3", 1, layers=6, tie_word_embeddings=True)
    hugging_face.save(folder / "llama", "Llama", 2, tie_word_embeddings=False)
    hugging_face.write_chats(folder / "data", 48)
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_layers_are_numbers_and_ranges():
    assert parse_layers("0,2, 4-6") == [0, 2, 4, 5, 6]
    for text in ("", "1,x", "3,2", "1,1-2", "-1", "2-"):
        with pytest.raises(ValueError, match="^--keep-layers: expected "):
            parse_layers(text)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_pruned_checkpoint_is_the_model_without_the_layers(checkpoints, tmp_path, kind):
    kept = [0, 2, 3]
    prune(checkpoints / kind, kept, tmp_path / "pruned")
    whole, pruned = load(checkpoints / kind), load(tmp_path / "pruned")
    tokens = torch.randint(hugging_face.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[layer] for layer in kept)
    whole.config.num_hidden_layers = len(kept)
    with torch.no_grad():
        assert torch.equal(pruned(tokens).logits, whole(tokens, use_cache=False).logits)
    assert pruned.config.num_hidden_layers == 3 and len(getattr(pruned.config, "layer_types", kept)) == 3
    assert (pruned.lm_head.weight is pruned.model.embed_tokens.weight) == (kind == "qwen3")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "pruned" / name).read_bytes() == (checkpoints / kind / name).read_bytes()
    prune(checkpoints / kind, kept, tmp_path / "pruned")  # as a resumed run does
    with pytest.raises(ValueError, match=r"--keep-layers: expected .* got \[0, 1\], not \[0, 2, 3\]"):
        prune(checkpoints / kind, [0, 1], tmp_path / "pruned")


def test_kept_layers_keep_their_kinds(tmp_path):
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    sliding = {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 4}
    hugging_face.save(tmp_path / "whole", "Qwen3", 3, **sliding)
    prune(tmp_path / "whole", [0, 2, 3], tmp_path / "pruned")
    whole, pruned = load(tmp_path / "whole"), load(tmp_path / "pruned")
    assert pruned.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[layer] for layer in (0, 2, 3))
    whole.config.num_hidden_layers, whole.config.layer_types = 3, pruned.config.layer_types
    with torch.no_grad():
        assert torch.equal(pruned(some_tokens()).logits, whole(some_tokens(), use_cache=False).logits)


def test_a_checkpoint_of_several_files_is_pruned_to_the_same_weights(checkpoints, tmp_path):
    load(checkpoints / "llama").save_pretrained(tmp_path / "several", max_shard_size="30KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    for name, source in (("one", checkpoints / "llama"), ("several pruned", tmp_path / "several")):
        prune(source, [1, 3], tmp_path / name)
    one, several = (load(tmp_path / name).state_dict() for name in ("one", "several pruned"))
    assert one.keys() == several.keys() and all(torch.equal(one[name], several[name]) for name in one)
    index = json.loads((tmp_path / "several pruned" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())


@pytest.mark.parametrize(
    ("change", "kept", "says"),
    [
        ({}, [0, 4], "--keep-layers: expected numbers below the 4 layers of .*, got 4"),
        ({"model_type": "gemma3"}, [0], "--keep-layers: expected a model of a type .*, got gemma3"),
        ({"use_sliding_window": True}, [0], "--keep-layers: expected layer_types .*, got None"),
    ],
)
def test_what_cannot_be_pruned_is_refused_and_leaves_nothing(checkpoints, tmp_path, change, kept, says):
    config = json.loads((checkpoints / "llama" / "config.json").read_text())
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=says):
        prune(tmp_path / "source", kept, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def convert(folder: Path, out: Path, kinds: tuple[str, ...], tensor: int, stages: int) -> dict[str, Any]:
    """Of each checkpoint: the logits of a Megatron model in this layout, on the last stage; saves it as well."""
    from examples.bridge import models

    models.start()
    models.init_process_group()
    from megatron.core import parallel_state

    found = {}
    for kind in kinds:
        bridge = models.bridge_of(str(folder / kind))
        args = Namespace(tp=tensor, pp=stages, seq_length=SEQUENCE, dtype="float32")
        provider = models.provider_of(bridge, args)
        provider.finalize()
        provider.initialize_model_parallel(seed=0)
        chunks = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        found[kind] = logits_of(chunks[0], bridge.hf_pretrained.config.vocab_size)
        bridge.save_megatron_model(chunks, out / kind, hf_tokenizer_path=folder / kind)
        parallel_state.destroy_model_parallel()
    return found


def logits_of(chunk: torch.nn.Module, vocabulary: int) -> torch.Tensor | None:
    """Through Megatron's schedule, [b, s, true vocabulary], on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    tokens = some_tokens()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=lambda _, model: (model(tokens, positions, None), lambda logits, **_: logits),
            data_iterator=None,
            model=[chunk.eval()],
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not collected:
        return None
    return gather_from_tensor_model_parallel_region(collected[0])[..., :vocabulary]


def some_tokens() -> torch.Tensor:
    return torch.randint(hugging_face.VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(0))


@needs_bridge
@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 1), (1, 2)])
def test_a_checkpoint_becomes_a_megatron_model_and_comes_back_bit_for_bit(
    bridge, checkpoints, tmp_path, tensor, stages
):
    check_conversions(bridge, checkpoints, tmp_path, ("qwen3", "llama"), tensor, stages)
    if tensor * stages == 1:
        words = ("--checkpoint", tmp_path / "llama", "--out", tmp_path / "half", "--dtype", "bfloat16")
        bridge.run(Job(script, ("examples/bridge/export.py", *words), tmp_path / "half.log"))
        weights, half = load(checkpoints / "llama").state_dict(), load(tmp_path / "half").state_dict()
        assert all(torch.equal(half[name], weights[name].bfloat16()) for name in weights)
        assert (tmp_path / "half/model.safetensors").stat().st_size < 0.6 * (
            tmp_path / "hf-llama/model.safetensors"
        ).stat().st_size


def check_conversions(
    bridge: Forks, checkpoints: Path, tmp_path: Path, kinds: tuple[str, ...], tensor: int, stages: int
) -> None:
    ranks = tensor * stages
    job = Job(convert, (checkpoints, tmp_path, kinds, tensor, stages), tmp_path / "convert.log", ranks)
    (found,) = bridge.run(job)
    exports = []
    for kind in found[0]:
        words = ("--checkpoint", tmp_path / kind, "--out", tmp_path / f"hf-{kind}")
        exports.append(Job(script, ("examples/bridge/export.py", *words), tmp_path / f"{kind}.log"))
    bridge.run(*exports)
    for kind in found[0]:
        model, back = load(checkpoints / kind), load(tmp_path / f"hf-{kind}")
        with torch.no_grad():
            expected = model(some_tokens()).logits
        for logits in [each[kind] for each in found if each[kind] is not None]:
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
        weights, exported = model.state_dict(), back.state_dict()
        assert weights.keys() == exported.keys()
        assert all(torch.equal(weights[name], exported[name]) for name in weights)
        assert back.config.to_dict() == {**model.config.to_dict(), "_name_or_path": back.config._name_or_path}


class Pair:
    """A run of distill.py on a pruned student, with a teacher job or another teacher."""

    STEPS = 16

    def __init__(self, bridge: Forks, checkpoints: Path, folder: Path) -> None:
        self._bridge, self._from, self.folder = bridge, checkpoints, folder
        self.log = folder / "student.log"

    def train(
        self,
        steps: int = STEPS,
        layout: tuple = ("--tp", 2),
        teacher: tuple | None = ("--tp", 2),
        more: tuple = (),
    ) -> None:
        """teacher: the layout of its job; None if there is no such job. more: arguments of the student."""
        environment = {"VCRD_PAYLOAD": "float32"}
        words = [
            "examples/bridge/distill.py",
            "--student-hf",
            self._from / "qwen3",
            "--keep-layers",
            "0,2-3,5",
        ]
        words += [
            "--data",
            self._from / "data",
            "--save",
            self.folder / "run",
            "--seq-length",
            SEQUENCE,
            *layout,
        ]
        words += [f"train.train_iters={steps}", "train.global_batch_size=4", "train.micro_batch_size=2"]
        words += ["optimizer.lr=1e-2", "optimizer.min_lr=1e-2", "dataset.num_workers=0", *more]
        jobs = []
        if teacher is not None:
            environment["VCRD_ADDRESS"] = f"file:{self.folder}/address"
            served = ("--hf", self._from / "llama", "--seq-length", SEQUENCE, *teacher)
            log = self.folder / "teacher.log"
            jobs += [Job(script, ("examples/bridge/teacher.py", *served), log, 2, environment)]
        self._bridge.run(*jobs, Job(script, tuple(words), self.log, 2, environment))

    def losses(self) -> list[float]:
        return [float(loss) for loss in re.findall(r"lm loss: ([0-9.E+-]+)", self.log.read_text())]

    def export(self) -> Path:
        out, log = self.folder / "exported", self.folder / "export.log"
        words = ("--checkpoint", self.folder / "run/checkpoints", "--out", out, "--check")
        self._bridge.run(Job(script, ("examples/bridge/export.py", *words), log))
        (difference,) = re.findall(r"largest difference of a logit from Megatron's: (\S+)", log.read_text())
        assert float(difference) < 1e-4
        return out


def divergence(teacher: Path, student: Path, data: Path) -> float:
    """The mean KL divergence of the student from the teacher on the chats."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    p, q, total = load(teacher), load(student), []
    for line in (data / "training.jsonl").read_text().splitlines()[:16]:
        text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        tokens = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logs = [model(tokens).logits.double().log_softmax(-1) for model in (p, q)]
        total.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1).flatten())
    return torch.cat(total).mean().item()


@pytest.fixture(scope="module")
def linked(bridge, checkpoints, tmp_path_factory) -> Pair:
    """A trained student of two tensor ranks, with a teacher job of two tensor ranks."""
    pair = Pair(bridge, checkpoints, tmp_path_factory.mktemp("linked"))
    pair.train()
    return pair


@needs_bridge
def test_a_student_is_distilled_from_a_teacher_job_and_exported(linked, checkpoints):
    exported = linked.export()
    assert load(exported).config.num_hidden_layers == 4
    before, after = (
        divergence(checkpoints / "llama", student, checkpoints / "data")
        for student in (linked.folder / "run/student-hf", exported)
    )
    assert len(linked.losses()) == Pair.STEPS
    assert after < 0.8 * before


@needs_bridge
@pytest.mark.slow
def test_a_teacher_in_the_students_ranks_gives_the_same_losses(linked, bridge, checkpoints, tmp_path):
    pair = Pair(bridge, checkpoints, tmp_path)
    pair.train(3, layout=("--pp", 2), teacher=None, more=("--teacher-hf", checkpoints / "llama"))
    assert pair.losses() == pytest.approx(linked.losses()[:3], rel=1e-3)
    pair.export()


@needs_bridge
@pytest.mark.slow
def test_a_run_with_a_teacher_job_leaves_answers_for_one_without(linked, bridge, checkpoints, tmp_path):
    asks, reads = (Pair(bridge, checkpoints, tmp_path / name) for name in ("asks", "reads"))
    cache = f"cache:{tmp_path / 'cache'}"
    for pair in (asks, reads):
        pair.folder.mkdir()
    asks.train(3, more=("--vcrd-teacher", cache))
    reads.train(3, layout=("--pp", 2), teacher=None, more=("--teacher", cache))
    assert reads.losses() == pytest.approx(asks.losses(), rel=1e-5)
    assert asks.losses() == pytest.approx(linked.losses()[:3], rel=1e-3)


@needs_bridge
@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint(linked, bridge, checkpoints, tmp_path):
    pair = Pair(bridge, checkpoints, tmp_path)
    pair.train(2)
    pair.train(4)
    assert "successfully loaded checkpoint" in pair.log.read_text()
    assert pair.losses() == pytest.approx(linked.losses()[2:4], rel=1e-3)


@needs_bridge
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("teacher.py", "--hf", "HF/none"),
            "Hugging Face checkpoint: expected one that Bridge converts, got ",
        ),
        (
            ("teacher.py", "--hf", "HF/llama", "--pp", 3, *SHORT),
            "--pp: expected a divisor of the 4 layers, got 3",
        ),
        (
            ("teacher.py", "--hf", "HF/llama"),
            "--seq-length: expected at most 64, the longest of the model, got 2048",
        ),
        ((*DISTILL, "--data", "HF"), "--data: expected a folder with training.jsonl, got "),
        ((*DISTILL, "--keep-layers", "0,9"), "--keep-layers: expected numbers below the 4 layers of "),
        (
            (*DISTILL, *SHORT, "train.no=1"),
            "section.name=value: expected a setting of Bridge's ConfigContainer",
        ),
        ((*DISTILL, *SHORT, "--teacher", "cache"), "VCRD_ADDRESS (--vcrd-address): expected host:port "),
        (
            ("export.py", "--checkpoint", "HF/none", "--out", "HF/out"),
            "--checkpoint: expected the folder of a ",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(bridge, checkpoints, tmp_path, words, says):
    name, *rest = (str(word).replace("HF", str(checkpoints)) for word in words)
    with pytest.raises(AssertionError, match=r"^exit codes \[78\]") as raised:
        bridge.run(Job(script, (f"examples/bridge/{name}", *rest), tmp_path / "log"))
    assert f"{name}: {says}" in str(raised.value)


@needs_bridge
@pytest.mark.slow
def test_the_real_smollm2_comes_back_bit_for_bit(bridge, tmp_path):
    pytest.importorskip("gguf")
    from examples.bridge.smollm2 import write

    write(tmp_path / "from")
    check_conversions(bridge, tmp_path / "from", tmp_path, ("smollm2",), 3, 1)


def test_make_runs_the_demo_with_the_python_of_its_environment():
    """And not with the interpreter that makes the environment, which make passes on as a variable."""
    command = ["make", "--dry-run", "bridge-demo", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    (line,) = (line for line in done.stdout.splitlines() if "examples/bridge/demo.sh" in line)
    assert line.startswith("PYTHON=python PATH="), done.stderr


@needs_bridge
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_distils_the_real_smollm2(tmp_path):
    """In fresh processes, as a user types it. With two short steps."""
    pytest.importorskip("gguf")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VCRD_")}
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "STEPS": "2"}
    environment |= {"EXTRA": "train.global_batch_size=2"}
    command = ["examples/bridge/demo.sh", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    divergences = [float(value) for value in re.findall(r"vcrd divergence: (\S+)", done.stdout)]
    assert len(divergences) == 2 and all(1 < value < 10 for value in divergences)
    (difference,) = re.findall(r"largest difference of a logit from Megatron's: (\S+)", done.stdout)
    assert float(difference) < 1e-3
    assert load(tmp_path / "exported").config.num_hidden_layers == 10
