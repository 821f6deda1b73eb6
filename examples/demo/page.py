"""One self-contained HTML page: held-out solutions with every token coloured by its relative validity."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import pstdev
from typing import Any

from vcrd.report import style

from . import plots, source
from .show import figure_rows

_TEMPLATE = Path(__file__).with_name("page.html")
_FIRST_LENGTH = range(110, 220)  # tokens of the first solution, which should fill a screen


def write(path: Path, results: dict[str, Any], solutions: dict[str, Any], cache: Path) -> None:
    """results: as in results.json. solutions: as in logs/held_out.json. cache: of the demo, with text and tokenizer."""
    tokenizer, fields = source.tokenizer(cache), solutions["fields"]
    problems = _problems(tokenizer, solutions, cache)
    used = {
        int(row[fields.index(column)])
        for stage in ("before", "after")
        for rows in solutions[stage].values()
        for row in rows
        for column in ("label", "student_action", "teacher_action")
    }
    data = {
        "fields": fields,
        "problems": problems,
        "first": _first(problems, fields.index("relative_validity")),
        "tokens": {token: tokenizer.decode([token], skip_special_tokens=False) for token in sorted(used)},
        "figures": [["", "before", "after"], *figure_rows(results["held_out"])],
        "floor": results["method"]["floor"],
        "ceiling": results["method"]["ceiling"],
    }
    # Inside a script element only "</" could end the data.
    text = _TEMPLATE.read_text().replace("@DATA@", json.dumps(data).replace("</", "<\\/"))
    text = text.replace("@COLOURS@", style.css()).replace("@CHARTS@", plots.in_page(results, solutions))
    path.write_text(text.replace("@FOOTER@", _footer(results)))


def write_tokens(path: Path, results: dict[str, Any], solutions: dict[str, Any], cache: Path) -> None:
    """Solutions with the weight of every token for `python -m vcrd report`, the most instructive first."""
    tokenizer, fields = source.tokenizer(cache), solutions["fields"]
    problems = _problems(tokenizer, solutions, cache)
    first = problems.pop(_first(problems, fields.index("relative_validity")))
    samples = [
        {
            "name": problem["name"],
            "text": problem["text"],
            "stages": {
                f"{stage} training": [
                    [_shown(text), row[fields.index("weight")]]
                    for text, row in zip(problem["written"], problem[stage], strict=True)
                ]
                for stage in ("before", "after")
            },
        }
        for problem in [first, *problems]
    ]
    content = {name: results["method"][name] for name in ("floor", "ceiling")}
    path.write_text(json.dumps({**content, "samples": samples}))


def _shown(text: str) -> str:
    return "\N{RETURN SYMBOL}\n" if text == "\n" else " end" if text == "<|im_end|>" else text


def _problems(tokenizer: Any, solutions: dict[str, Any], cache: Path) -> list[dict[str, Any]]:
    """By name: the question, the tokens of the solution as text, and their rows before and after training."""
    known = {problem["name"]: problem for problem in json.loads((cache / "problems.json").read_text())}
    fields = solutions["fields"]
    return [
        {
            "name": name.removeprefix("P_").replace("_", " "),
            "text": _question(tokenizer, known[name]),
            "written": _as_written(
                tokenizer, [int(row[fields.index("label")]) for row in solutions["after"][name]]
            ),
            **{stage: _rounded(solutions[stage][name]) for stage in ("before", "after")},
        }
        for name in sorted(solutions["after"])
    ]


def _question(tokenizer: Any, problem: dict[str, Any]) -> str:
    """The problem as the models see it, without the chat template."""
    prompt = [token for token, step in zip(problem["tokens"], problem["steps"], strict=True) if step < 0]
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    return text.split("<|im_start|>user\n", 1)[-1].split("<|im_end|>", 1)[0]


def _as_written(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text of each token in its place. If a character has several tokens, the last one has its text."""
    texts, waiting = [], []
    for token in tokens:
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special_tokens=False)
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
        texts.append(text if whole else "")
        waiting = [] if whole else waiting
    return texts


def _first(problems: list[dict[str, Any]], column: int) -> int:
    """The problem to show first: of those that fit on a screen, the one with the largest range of validity."""

    def spread(problem: dict[str, Any]) -> tuple[bool, float]:
        values = [row[column] for row in problem["after"]]
        return len(values) in _FIRST_LENGTH, pstdev(values) if values else 0.0

    return max(range(len(problems)), key=lambda index: spread(problems[index]))


def _rounded(rows: list[list[float]]) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in rows]


def _footer(results: dict[str, Any]) -> str:
    method = results["method"]
    return (
        f"Student: {len(results['student_layers'])} of the teacher's 30 layers, {results['settings']['steps']} steps. "
        f"Settings of vcrd: validity {method['validity']}, sharpness {method['sharpness']:g}, divergence "
        f"{method['divergence']}. Model: SmolLM2-135M-Instruct. Problems and solutions: CHAMP (Mao, Kim, Zhou 2024)."
    )
