"""Faults in the cache of answers, and in what serves teachers of several kinds: routing, mixtures, contexts, judges."""

from __future__ import annotations

from faults import CACHE, TEACHERS, Fault

_FILES = "tests/cache/test_files.py"
_DAMAGE = "tests/cache/test_damage.py"
_FILL = "tests/cache/test_fill.py"
_FAILURES = "tests/cache/test_answers_failures.py"
_RECORDER = "tests/cache/test_recorder.py"
_TEACHERS = "tests/megatron/test_teachers.py"
_JOINED = "tests/megatron/test_teachers_joined.py"
_CONTEXT = "tests/megatron/test_teacher_context.py"
_MIXTURE = "tests/megatron/test_teacher_mixture.py"
_EVERY_FORM = "tests/loss/test_every_form.py"
_JUDGE = "tests/loss/test_judge.py"


def _cache(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, CACHE, f"vcrd/cache/{file}", old, new, tests)


def _teachers(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, TEACHERS, file, old, new, tests)


FAULTS = [
    _cache(
        "a piece that is added twice counts twice for the size of the file",
        "files.py",
        "        if place in pending:\n            return\n",
        "",
        *(_FILES, "-k", "counts_once"),
    ),
    _cache(
        "an answer is put together from the pieces of two runs",
        "files.py",
        "runs.setdefault(self.files[number >> 32].run, [])",
        'runs.setdefault("", [])',
        *(_FILES, "-k", "two_runs"),
    ),
    _cache(
        "the columns of a piece are copied to where they are in its file",
        "files.py",
        "target = target[:, area.left - first_column : area.right - first_column]",
        "target = target[:, area.left - file.columns.start : area.right - file.columns.start]",
        *(_FILES, "-k", "any_reader"),
    ),
    _cache(
        "a second answer that is opened later takes the place of the first",
        "files.py",
        "for number in self._pieces.get(key, ()):",
        "for number in reversed(self._pieces.get(key, ())):",
        *(_FAILURES, "-k", "same_one_of_two"),
    ),
    _cache(
        "a file gets its name before its contents are on disk",
        "atomic.py",
        "        file.flush()\n        os.fsync(file.fileno())\n",
        "        file.flush()\n",
        *(_DAMAGE, "-k", "whatever_step"),
    ),
    _cache(
        "the temporary file of a killed writer is read as a file",
        "files.py",
        'if atomic.is_written(e.name, "answers", ".safetensors"))',
        'if "answers" in e.name)',
        *(_DAMAGE, "-k", "whatever_step or may_live"),
    ),
    _cache(
        "the header of a second writer takes the place of the first one's",
        "atomic.py",
        "os.link(temporary, folder / name)",
        "os.rename(temporary, folder / name)",
        *(_DAMAGE, "-k", "two_teachers"),
    ),
    _cache(
        "temporary files of live writers on other hosts are deleted",
        "atomic.py",
        'killed = match["place"] == here and not _alive(int(match["pid"]))',
        'killed = not _alive(int(match["pid"]))',
        *(_DAMAGE, "-k", "may_live"),
    ),
    _cache(
        "the key leaves out where the context is",
        "header.py",
        "for numbers in (tokens, *context):",
        "for numbers in (tokens, context.tokens):",
        *(_FILES, "-k", "key_depends"),
    ),
    _cache(
        "the output layers of cache and teacher are not compared",
        "header.py",
        'for name in ("version", "payload", "vocab_size", "top_k", "head", "weights"):',
        'for name in ("version", "payload", "vocab_size", "top_k", "weights"):',
        *(_FILES, "-k", "other_sizes"),
    ),
    _cache(
        "half a file is opened",
        "answer_file.py",
        "if self._data + end != self.bytes:",
        "if self._data + end < self.bytes:",
        *(_DAMAGE, "-k", "cut_anywhere"),
    ),
    _cache(
        "a fill asks twice about a sequence that the data have twice",
        "fill.py",
        "                self._named.add(key)\n",
        "",
        *(_FILL, "-k", "written_once"),
    ),
    _cache(
        "a fill stores the first rows for each packed sequence",
        "fill.py",
        "own = [tensor[part.start : part.stop, part.row] for tensor in tensors]",
        "own = [tensor[: part.width, part.row] for tensor in tensors]",
        *(_FILL, "-k", "written_once"),
    ),
    _cache(
        "a fill counts what it lacks among what it found",
        "fill.py",
        "self._progress.found(len(parts) - len(lacking))",
        "self._progress.found(len(parts))",
        *(_FILL, "-k", "written_once"),
    ),
    _cache(
        "a fill stores the answers of a teacher that came back with other weights",
        "fill.py",
        "        self._refuse_other_weights()\n",
        "",
        *(_FILL, "-k", "other_weights"),
    ),
    _cache(
        "a fill does not look for what other jobs have added",
        "fill.py",
        "            self._cache.refresh()\n",
        "",
        *(_FILL, "-k", "sees_what"),
    ),
    _cache(
        "the first token of context of the next sequence belongs to this one as well",
        "sequences.py",
        "(context.places < first + part.width)",
        "(context.places <= first + part.width)",
        *("tests/cache/test_sequences.py", "-k", "own_context"),
    ),
    _cache(
        "hidden states are read from a folder that lacks the output layer",
        "reading.py",
        "if not lacking and self._has_head:",
        "if not lacking:",
        "tests/cache/test_planner.py",
    ),
    _cache(
        "a folder of hidden states without the output layer is opened",
        "answers.py",
        "    if alone and header.head is not None and OUTPUT_LAYER not in cache:\n",
        "    if not alone and header.head is not None and OUTPUT_LAYER not in cache:\n",
        *(_FAILURES, "-k", "needs_the_output_layer"),
    ),
    _cache(
        "a cache whose weights are not known is let in where the settings insist on them",
        "answers.py",
        "        if not header.weights:\n",
        "        if header.weights is None:\n",
        *(_FAILURES, "-k", "checked_as_that"),
    ),
    _cache(
        "a sequence that is asked for again is added again",
        "reading.py",
        "            if keys[index] not in self._recorded:\n",
        "            if True:\n",
        "tests/cache/test_planner.py",
    ),
    _cache(
        "what the teacher job has answered is not added",
        "answers.py",
        "        self._recorder.add(plan, answer)\n",
        "",
        *(_FAILURES, "-k", "asked_of_the_teacher_job"),
    ),
    _cache(
        "a context rank adds its first rows as all of its rows",
        "recorder.py",
        "                first += rows.width\n",
        "",
        _RECORDER,
    ),
    _cache(
        "every tensor rank adds an answer that is the same on all of them",
        "recorder.py",
        "self._adds_answers = place.tensor == 0 if whole else link.columns.width > 0",
        "self._adds_answers = link.columns.width > 0",
        _RECORDER,
    ),
    _cache(
        "answers of a teacher that came back with other weights are added",
        "recorder.py",
        "if now.weights == then.weights:",
        "if True:",
        _RECORDER,
    ),
    _cache(
        "the ranks do not learn from their leader that one of them is gone",
        "channel.py",
        "        self.tell({_FAILURE: reason}, but=told_by)\n",
        "",
        *("tests/cache/test_channel.py", "-k", "gives_up"),
    ),
    _teachers(
        "the context of a teacher's rows is that of the first rows",
        "vcrd/megatron/routing.py",
        "rows = [Span(row * self.width, (row + 1) * self.width) for row in index.tolist()]",
        "rows = [Span(row * self.width, (row + 1) * self.width) for row in range(len(index))]",
        *(_TEACHERS, "-k", "its_own_samples"),
    ),
    _teachers(
        "the padding of a packed row goes to the first teacher",
        "vcrd/megatron/routing.py",
        "(found[-1] if found else 0) if start in padding",
        "0 if start in padding",
        *(_TEACHERS, "-k", "packed_sequence"),
    ),
    _teachers(
        "a token is read in every form of answer, also where it has none",
        "vcrd/megatron/teachers.py",
        "mask=mask if here is None else torch.where(here, mask, torch.zeros_like(mask)),",
        "mask=mask,",
        *(_TEACHERS, "-k", "gets_alone"),
    ),
    _teachers(
        "the judge of the first form judges in every form",
        "vcrd/megatron/teachers.py",
        'arguments["judge"] = judge.parts[number].logits',
        'arguments["judge"] = judge.parts[0].logits',
        *(_TEACHERS, "-k", "has_its_judge"),
    ),
    _teachers(
        "each token has the weight of the first teacher",
        "vcrd/megatron/distillation.py",
        "self._weights[0 if answer.owners is None else answer.owners.long()]",
        "self._weights[0]",
        *(_JOINED, "-k", "from_its_teacher and fused"),
    ),
    _teachers(
        "the fused head does not expect the weights of the teachers",
        "vcrd/megatron/distillation.py",
        "                given = mask * weights\n",
        "                pass\n",
        *(_JOINED, "-k", "from_its_teacher and fused"),
    ),
    _teachers(
        "the wait for any teacher is counted for the first",
        "vcrd/megatron/distillation.py",
        "teacher if self._names else 0)",
        "0)",
        *(_JOINED, "-k", "from_its_teacher and fused"),
    ),
    _teachers(
        "the figures of a teacher have the tokens of those after it as well",
        "vcrd/megatron/report.py",
        "own = torch.where(owners == teacher, counted, 0.0)",
        "own = torch.where(owners >= teacher, counted, 0.0)",
        *(_TEACHERS, "-k", "figures"),
    ),
    _teachers(
        "the weights of a mixture are in the order of the text",
        "vcrd/settings.py",
        "return tuple(float(weights[source.name]) for source in self.link.teachers())",
        "return tuple(float(weight) for weight in weights.values())",
        *(_MIXTURE, "-k", "by_name"),
    ),
    _teachers(
        "the judge is asked without the context, and the teacher with it",
        "vcrd/megatron/privileged.py",
        "        super().request(question._replace(context=NO_CONTEXT))\n        return super().request(question) // 2",
        "        super().request(question)\n        return super().request(question._replace(context=NO_CONTEXT)) // 2",
        *("tests/megatron/test_privileged.py", "-k", "asked_twice and off"),
    ),
    _teachers(
        "the judge's sum of a shard is not moved to the row's maximum",
        "vcrd/loss/judge.py",
        "sums = torch.where(maxima == -torch.inf, 0.0, sums * (maxima - top).exp())",
        "sums = torch.where(maxima == -torch.inf, 0.0, sums)",
        *(_JUDGE, "-k", "shards and 2"),
    ),
    _teachers(
        "the weight of a mixed teacher divides its probabilities",
        "vcrd/loss/teacher_blocks.py",
        "return (total - total.new_tensor(log_weights))",
        "return (total + total.new_tensor(log_weights))",
        *(_EVERY_FORM, "-k", "mixture and forward_kl"),
    ),
    _teachers(
        "the sum of a mixed teacher's shard is not moved to the row's maximum",
        "vcrd/loss/teacher_blocks.py",
        "torch.where(maxima == -torch.inf, 0.0, sums * (maxima - top).exp()).sum(0).log()",
        "torch.where(maxima == -torch.inf, 0.0, sums).sum(0).log()",
        *("tests/loss/test_forms_sharded.py", "-k", "reference and 2"),
    ),
    _teachers(
        "the maximum of a mixed teacher's row is subtracted",
        "csrc/cpu/mix.h",
        "p.subtracted[row] - shift_of(p.teacher, row)",
        "p.subtracted[row] + shift_of(p.teacher, row)",
        *(_EVERY_FORM, "-k", "mixture and forward_kl"),
    ),
    _teachers(
        "every block of a row is mixed into the first one",
        "csrc/cpu/mix.h",
        "float* mixture = p.mixture + row * p.columns + block;",
        "float* mixture = p.mixture + row * p.columns;",
        *(_EVERY_FORM, "-k", "more_columns"),
    ),
    _teachers(
        "the probabilities of a mixture are multiplied, not added",
        "csrc/cpu/mix.h",
        "mixture[i] = log_of_sum(mixture[i], logits[i] - subtracted);",
        "mixture[i] = mixture[i] + logits[i] - subtracted;",
        *(_EVERY_FORM, "-k", "mixture and forward_kl"),
    ),
    _teachers(
        "rows that are padded to the longest context are counted without it",
        "vcrd/link/question.py",
        "seen = sequence + count if len(edges) else batch * (sequence + widest)",
        "seen = sequence + count if len(edges) else batch * sequence + count",
        *("tests/link/test_request_context.py", "-k", "longest_sequence"),
    ),
    _teachers(
        "a request has the padding of the longest context among them",
        "vcrd/link/teacher.py",
        "shared = Context(*(part[:length] for part in parts))",
        "shared = Context(*parts)",
        *("tests/link/test_request_context.py", "-k", "share_a_batch"),
    ),
    _teachers(
        "a token of the student stands before the context that precedes it",
        "vcrd/megatron/teacher_context.py",
        "students += torch.searchsorted(places, index, right=True) - before[which]",
        "students += torch.searchsorted(places, index) - before[which]",
        *("tests/megatron/test_teacher_rows.py", "-k", "rows_hold"),
    ),
    _teachers(
        "the states of context ranks are not put in the order of the positions",
        "vcrd/megatron/teacher_context.py",
        "return self._rows.take(torch.cat(parts).index_select(0, order), self._students)",
        "return self._rows.take(torch.cat(parts), self._students)",
        *(_CONTEXT, "-k", "context_parallel_ranks and float32"),
    ),
    _teachers(
        "a teacher that fills a cache in its ranks does not see the context",
        "vcrd/megatron/filling.py",
        "Request(self._number, self._layout.data_rank, *question[:3])",
        "Request(self._number, self._layout.data_rank, *question[:2])",
        *("tests/megatron/test_fill_cache.py", "-k", "every_payload"),
    ),
]
