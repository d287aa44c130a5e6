"""The verdict: which method is best, by how much, how sure, at what cost, and what to do next."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lightning_prompts.report.comparability import unequal_settings
from lightning_prompts.report.data import MAIN, NLL, Comparison, Method, Task
from lightning_prompts.report.page import Block, Verdict, amount, difference, interval, p_value, spread
from lightning_prompts.report.statistics import LEVEL, over_seeds, questions_needed
from lightning_prompts.runs.names import BEST, CHECKPOINTS, CONFIG, LAST, PROMPT_TEXT
from lightning_prompts.runs.reader import Run

FEW = 100  # validation questions: the standard error of exact match is 5 points there
SMALL_LEAD = 2  # validation questions
SEEDS = 3  # that a statement about a method should rest on
NOT_EXPORTED = ("ScratchTransformer",)  # classes that have no prompt to export


def verdict(task: Task) -> list[Block]:
    """Write the verdict of a task; nothing where no method has a result."""
    methods = [method for method in task.ranked if method in task.scored]
    if not methods:
        return []
    best = methods[0]
    if len(methods) == 1:
        return [Verdict([("Result", f"{_result(task, best)}. {_all_costs([best])}", ""), _add_baseline(best)])]
    rival = task.baseline if task.baseline in methods[1:] else methods[1]
    found = task.comparison(task.metric, best, rival)
    equal = "" if not unequal_settings(task) else "Their settings differ, see below: the methods may not be the cause."
    items = [
        ("Best here", _best(task, methods, rival, found), ""),
        ("How sure", " ".join(filter(None, [_sure(task, best, rival, found), _lead(task, methods), equal])), ""),
        ("Cost", _all_costs(methods[:2]), ""),
        *_next(task, methods, found),
    ]
    return [Verdict(items)]


def _result(task: Task, method: Method) -> str:
    metric = task.metric
    return f"{method.name}, {metric.title} {spread(method.values(f'{MAIN}/{metric.name}'), metric.percent)}"


def _value(task: Task, method: Method) -> str:
    return spread(method.values(f"{MAIN}/{task.metric.name}"), task.metric.percent)


def _change(task: Task, found: Comparison) -> str:
    """A difference with its unit and interval."""
    percent = task.metric.percent
    ends = interval(found.interval, percent, signed=True)
    return f"{difference(found.difference, percent)}{' points' if percent else ' nats'} (95% interval {ends})"


def _best(task: Task, methods: Sequence[Method], rival: Method, found: Comparison | None) -> str:
    best = methods[0]
    if best is task.baseline:
        text = f"{_result(task, best)}: the baseline. No other method is better; the second best is {rival.name}"
        return f"{text} with {_value(task, rival)}."
    role = "the baseline" if rival is task.baseline else "the second best"
    change = f": {_change(task, found)}" if found else ""
    text = f"{_result(task, best)} against {_value(task, rival)} for {role} {rival.name}{change}."
    nll = [(mean, method) for method in methods if (mean := method.mean(f"{MAIN}/{NLL.name}")) is not None]
    other = min(nll, key=lambda pair: pair[0])[1] if nll else best
    return text if other is best else f"{text} By NLL, {other.name} is best."


def _established(task: Task, found: Comparison) -> bool:
    """Whether the first of two methods is better beyond chance, on the rows that both have."""
    return found.adjusted < LEVEL and task.metric.sign * found.difference > 0


def _test(found: Comparison) -> str:
    """The adjusted p-value with its sign: it is exact, or a bound."""
    shown = p_value(found.adjusted, found.p_value)
    return f"p (Holm) {shown if shown.startswith('≤') else f'= {shown}'}"


def _sure(task: Task, best: Method, rival: Method, found: Comparison | None) -> str:
    """Whether the difference is established, over questions and over seeds."""
    if found is None:
        return "Unknown: there are no predictions on the same questions."
    word = "Established" if _established(task, found) else "Not established"
    text = (
        f"{word} for these prompts on other questions: paired permutation test over {found.questions:,} questions, "
        f"{_test(found)}."
    )
    seeds = best.by_seed_against(rival, f"{MAIN}/{task.metric.name}")
    ends = over_seeds(seeds) if np.isfinite(seeds).all() else None
    if ends is None:
        return (
            f"{text} Fewer than two seeds in common say nothing about training with other seeds."
            if best.trained
            else text
        )
    word = "established" if all(task.metric.sign * end > 0 for end in ends) else "not established"
    shown = interval(ends, task.metric.percent, signed=True)
    return f"{text} For other seeds: {word} (95% interval {shown} over {len(seeds)} seeds)."


def _lead(task: Task, methods: Sequence[Method]) -> str:
    """The lead over the second best, where that is not what the best was compared with already."""
    best, second = methods[:2]
    if task.baseline in (best, second):
        return ""
    found = task.comparison(task.metric, best, second)
    if found is None:
        return f"The second best, {second.name} with {_value(task, second)}, was not tested against it."
    word = "established" if _established(task, found) else "not established"
    lead = f"{_change(task, found)}, {_test(found)}"
    return f"Its lead over the second best, {second.name} with {_value(task, second)}, is {word}: {lead}."


def _all_costs(methods: Sequence[Method]) -> str:
    """The training costs of methods, means over seeds."""
    parts = []
    for method in methods:
        names = {"tokens": "training tokens", "tokens_remote": "tokens of servers", "seconds": "seconds"}
        costs = [
            f"{amount(float(np.mean(found)))} {unit}" for name, unit in names.items() if any(found := method.cost(name))
        ]
        unknown = "its cost was not recorded" if method.trained else "nothing was trained"
        parts.append(f"{method.name}: {', '.join(costs) or unknown}")
    return f"{'; '.join(parts)}."


def _add_baseline(method: Method) -> tuple[str, str, str]:
    folder = method.runs[0].folder
    if not method.trained:
        return ("Next", "Train a prompt, and report both runs.", "")
    command = _command("test", "-c", folder / CONFIG, "--trainer.default_root_dir", folder / "untrained")
    return ("Next", "Test a baseline, for example the prompt without training, and report both runs:", command)


def _next(task: Task, methods: Sequence[Method], found: Comparison | None) -> list[tuple[str, str, str]]:
    """What to do with the result."""
    best, second = methods[:2]
    if best is task.baseline:
        text = "Keep the baseline, or give the other methods more training, another length or learning rate."
        return [("Next", f"{text} {_more_questions(task, found)}".strip(), "")]
    if found is None or not _established(task, found):
        return [("Next", _more_questions(task, found) or "Test both methods on the same questions.", "")]
    steps = [("Next", *_use(best))]
    lead = task.comparison(task.metric, best, second)
    if task.baseline is not second and lead is not None and not _established(task, lead):
        cheaper = _cheaper(best, second)
        use = f": the cheaper one, {cheaper.name}, will do" if cheaper else ""
        text = f"{best.name} and {second.name} may be equally good{use}. {_more_questions(task, lead)}"
        steps.append(("Or", text, ""))
    if best.trained and len(best.runs) < SEEDS:
        text = f"To know about the method and not only about this prompt, train with at least {SEEDS} seeds."
        steps.append(("Then", text, ""))
    return steps


def _cheaper(one: Method, other: Method) -> Method | None:
    """The method whose training took fewer tokens; ``None`` if both took as many, or a cost was not recorded."""
    costs = [method.cost("tokens") if method.trained else [0.0] for method in (one, other)]
    if not all(costs):
        return None
    mine, others = map(np.mean, costs)
    return one if mine < others else other if others < mine else None


def _more_questions(task: Task, found: Comparison | None) -> str:
    """How many test questions would establish a difference of this size."""
    if found is None or _established(task, found):
        return ""
    needed = questions_needed(found.difference, found.deviation, len(task.pairs))
    if needed is None:
        return "There is no difference to establish."
    needed = max(needed, found.questions + 1)
    step = 10 ** max(0, len(str(needed)) - 2)
    rounded = math.ceil(needed / step) * step
    return f"About {rounded:,} test questions would establish a difference of this size (now: {found.questions:,})."


def _use(method: Method) -> tuple[str, str]:
    """The sentence and the command that make use of a method's best run on validation."""
    run = min(method.runs, key=_validation)
    config = run.folder / CONFIG
    if not method.trained:
        return "Use it as it is:", _command("predict", "-c", config)
    own = any(row.prompt is not None for row in run.predictions or [])
    if own or run.class_name in NOT_EXPORTED:
        tested = run.tested_checkpoint or run.folder / CHECKPOINTS / BEST
        return "Answer questions with it:", _command("predict", "-c", config, "--ckpt_path", tested)
    if any(name.startswith("model.lm.server.") for name in run.settings or {}):
        return f"Its text is in {run.folder / PROMPT_TEXT}.", ""
    kind = "peft" if run.text is None else "text"
    seed = f" (seed {run.seed}, the best on validation)" if len(method.runs) > 1 else ""
    last = ("--checkpoint", "last") if _last(run) else ()
    return f"Export it{seed}:", _command("export", run.folder, "--format", kind, *last)


def _last(run: Run) -> bool:
    """Whether the last checkpoint was tested, and not the best one."""
    return run.tested_checkpoint == run.folder / CHECKPOINTS / LAST


def _validation(run: Run) -> float:
    """What the tested checkpoint has on validation, smaller is better."""
    judged = _judged(run)
    return math.inf if not judged else judged[-1] if _last(run) else min(judged)


def _command(*words: object) -> str:
    return shlex.join(["lightning-prompts", *map(str, words)])


def _judged(run: Run) -> list[float]:
    """Every validation by what the run chose its best prompt, smaller is better."""
    name, larger = run.monitor
    return [-value if larger else value for value in run.curves.get(name, {}).values() if math.isfinite(value)]


def validation_warnings(task: Task) -> list[str]:
    """Warn of prompts that were chosen by few validation questions, or by one or two more right answers."""
    found: dict[str, list[str]] = {}
    for method in task.ranked:
        told = Counter(reason for run in method.runs if (reason := _weak_choice(run)))
        for reason, count in told.items():
            seeds = f" ({count} of {len(method.runs)} seeds)" if count < len(method.runs) else ""
            found.setdefault(reason, []).append(f"{method.name}{seeds}")
    if not found:
        return []
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in found.items())
    return [f"Chance may have chosen the best prompt of a run. {reasons}. More validation questions make it safer."]


def _weak_choice(run: Run) -> str:
    """Why the choice of a run's best prompt may be chance; empty where it need not be."""
    count = _validation_questions(run)
    judged = sorted(set(_judged(run)))
    if count is None or not judged:
        return ""
    told = [f"{count:,} validation questions"] if count < FEW else []
    if run.monitor[0] == "val/exact_match" and len(judged) > 1:
        lead = max(1, round((judged[1] - judged[0]) * count))
        if lead <= SMALL_LEAD:
            told.append(f"{lead} of {count:,} questions ahead of the next best validation")
    return ", ".join(told)


def _validation_questions(run: Run) -> int | None:
    """How many questions a run was validated on: as logged, or at most as many as its config asks for."""
    logged = run.curves.get("val/examples", {}).values()
    asked = (run.settings or {}).get("data.val_size")
    count = next(iter(logged), asked if isinstance(asked, int) else None)
    return None if count is None else int(count)
