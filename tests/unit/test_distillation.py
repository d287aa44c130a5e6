"""Prompt distillation against plain computations: the divergence, its bins, the cache, the start and the metrics."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_prompts.datamodules.base import SourceRow
from lightning_prompts.errors import UserError
from lightning_prompts.lm import KeyValues, LMConfig, distribution_store
from lightning_prompts.lm.distributions import Distributions
from lightning_prompts.methods import FewShot, FixedPrompt, PromptDistillation
from lightning_prompts.methods.self_study import SelfStudy
from lightning_prompts.objectives import Divergence
from lightning_prompts.prompts.initializers import VocabNormal
from lightning_prompts.template import Template
from lightning_prompts.types import Batch, Example
from support.cases import Questions
from support.models import SHAPES, TINY
from support.training import trainer

# Wide weights, so that the teacher's answers depend on its context.
LM = LMConfig(f"{TINY},initializer_range=0.3")
CONTEXT = "hot -> cold\nin -> out\n"


class OneMore(Questions):
    """Questions with one row in a split of its own.

    Args:
        split: Name of the split.
        question: Question of the row.
    """

    def __init__(self, split: str, question: str) -> None:
        super().__init__("Q: {question} ={prompt} {answer}\n")
        self.split, self.question = split, question

    def load_rows(self) -> dict[str, list[SourceRow]]:
        return {**super().load_rows(), self.split: [SourceRow({"question": self.question, "answer": "x"}, "row 0")]}


def examples(template: str = "{prompt}{question} -> {answer}\n") -> list[Example]:
    pairs = [("up", "down"), ("unlikely", "likely"), ("a", "b")]
    return [Template(template).render({"question": question, "answer": answer}) for question, answer in pairs]


def made(**settings: Any) -> PromptDistillation:
    """A method without a trainer, with its LM."""
    L.seed_everything(0, verbose=False)
    method = PromptDistillation(**{"length": 4, "context": CONTEXT, "lm": LM, "max_new_tokens": 2, **settings})
    method.configure_model()
    return method


def plain_log_probs(method: PromptDistillation, ids: list[int], scored: int, vectors: Tensor | None) -> Tensor:
    """Log-probabilities at the last tokens of a text, by transformers alone in float64: one text, no cache."""
    model = copy.deepcopy(method.lm.model).double()
    model.set_attn_implementation("eager")
    index = torch.tensor(ids)
    embeddings = model.get_input_embeddings()(index.clamp(min=0)).detach()
    if vectors is not None:
        embeddings[index < 0] = vectors[-1 - index[index < 0]].double()
    return model(inputs_embeds=embeddings[None]).logits[0].double().log_softmax(-1)[-scored - 1 : -1]


# --- the divergence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("template", ["{prompt}{question} -> {answer}\n", "Of {question}{prompt} is{answer}."])
def test_the_loss_is_the_divergence_of_two_separate_passes(template: str, direction: Any) -> None:
    method = made(text=" two", init=VocabNormal(), objective=Divergence(direction, end_weight=0.5))
    batch = examples(template)
    loss = method.training_step(Batch(batch), 0)
    lm, vectors, total = method.lm, method.current_prompt().detach(), 0.0
    for example in batch:
        (own,) = lm.encode([example], len(vectors), with_end=True)
        ids = lm.encoder.tokens(f"{CONTEXT}{example.before} two{example.after}{example.answer}{example.end}")
        student = [*own.context, *own.answer, *own.end]
        scored = len(own.answer) + len(own.end)
        p, q = plain_log_probs(method, ids, scored, None), plain_log_probs(method, student, scored, vectors)
        p, q = (p, q) if direction == "forward" else (q, p)
        values = (p.exp() * (p - q)).sum(-1)
        total += values[: len(own.answer)].mean().item() + 0.5 * values[len(own.answer) :].mean().item()
    assert loss.item() == pytest.approx(total / len(batch), rel=1e-4)
    assert loss.item() > 0.05
    loss.backward()
    assert method.prompt.embeddings.grad.abs().max() > 1e-4
    assert method.lm.usage.tokens_without_gradient > 0


@pytest.mark.parametrize("reverse", [False, True])
def test_bins_of_the_likeliest_tokens_are_a_lower_bound_with_a_known_gap(reverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(7, 40, generator=generator, dtype=torch.double) for _ in range(2))
    student.requires_grad_(True)
    whole = Distributions.of(teacher).divergence(student, reverse)
    for k in (1, 5, 39):
        bins = Distributions.of(teacher, k)
        assert bins.log_probs.shape == (7, k + 1)
        assert torch.allclose(bins.log_probs.exp().sum(-1), torch.ones(7, dtype=torch.double))
        found = bins.divergence(student, reverse)
        rest = torch.ones(7, 40, dtype=torch.bool).scatter(-1, bins.tokens, False).view(7, 40)
        p, q = teacher.log_softmax(-1), student.log_softmax(-1)
        p, q = (q, p) if reverse else (p, q)
        p, q = p[rest].view(7, -1), q[rest].view(7, -1)
        inside = (p.log_softmax(-1).exp() * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
        assert torch.allclose(whole - found, p.exp().sum(-1) * inside, atol=1e-12)
        assert (found <= whole + 1e-12).all()
        assert (found >= 0).all()
        (gradient,) = torch.autograd.grad(found.sum(), student, retain_graph=True)
        assert torch.isfinite(gradient).all()
    assert torch.allclose(Distributions.of(teacher, 39).divergence(student, reverse), whole)


# --- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", ["vectors", "prefix"])
@pytest.mark.parametrize("shape", ["llama", "gpt2", "qwen3", "gemma3", "mistral"])
def test_a_prompt_of_the_whole_context_is_the_teacher(shape: str, student: Any) -> None:
    """Positions, rotations and sliding windows are those of the context's own tokens."""
    method = made(length=len(CONTEXT), student=student, lm=LMConfig(f"{SHAPES[shape]},initializer_range=0.3"))
    assert method.prompt_length == len(CONTEXT), "a byte is a token here"
    assert method.training_step(Batch(examples()), 0).item() < 1e-6
    teacher = method.lm.score(method.with_context(examples()), method.lm.no_prompt(), with_end=True)
    own = method.lm.score(examples(), method.current_prompt(), with_end=True)
    assert torch.allclose(own.nll, teacher.nll, atol=1e-4)
    assert torch.allclose(own.end_nll, teacher.end_nll, atol=1e-4)
    assert method.lm.generate(examples(), method.current_prompt(), 5) == method.lm.generate(
        method.with_context(examples()), "", 5
    )


def flat(prompt: Any) -> Tensor:
    return (prompt.flatten() if isinstance(prompt, KeyValues) else prompt).detach().clone()


@pytest.mark.parametrize("student", ["vectors", "prefix"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_first_position_can_stay(student: Any, frozen: bool, tmp_path: Path) -> None:
    optimizer = lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1)  # noqa: E731
    method = PromptDistillation(3, student, shots=2, freeze_first=frozen, optimizer=optimizer, lm=LM, max_new_tokens=2)
    trainer(tmp_path, limit_val_batches=0).fit(method, Questions())
    moved = (flat(method.current_prompt()) != flat(method.initial_prompt())).any(-1)
    assert moved.tolist() == [not frozen, True, True]


# --- the cache -------------------------------------------------------------------------------------------------------


def trained(folder: Path, **settings: Any) -> tuple[list[float], Tensor, int]:
    """Losses, the prompt and the teacher's tokens of three steps."""
    L.seed_everything(3, verbose=False)
    losses: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            losses.append(trainer.callback_metrics["train/loss"].item())

    method = PromptDistillation(3, **{"shots": 2, "lm": LM, "max_new_tokens": 2, **settings})
    trainer(folder, max_steps=3, limit_val_batches=0, callbacks=[Watch()]).fit(method, Questions())
    return losses, flat(method.current_prompt()), method.lm.usage.tokens_without_gradient


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_cache_changes_no_digit_and_saves_the_teacher(
    top_k: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distribution_store, "cache_root", lambda: tmp_path / "cache")
    objective = Divergence(top_k=top_k)
    without = trained(tmp_path / "run", objective=objective)
    assert not (tmp_path / "cache").exists()
    for tokens in (without[2], 0):  # the files are written, then read
        found = trained(tmp_path / "run", objective=objective, cache=True)
        assert found[0] == without[0]
        assert torch.equal(found[1], without[1])
        assert found[2] == tokens
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 12, "one for each training example"
    changes = ({"text": " two"}, {"shots": 3}, {"lm": LMConfig(TINY)}, {"objective": Divergence(top_k=6)})
    for change in changes if top_k else ():
        assert trained(tmp_path / "run", **{"objective": objective, "cache": True, **change})[2] > 0, change
    assert top_k is None or len(list((tmp_path / "cache").rglob("*.safetensors"))) == 5 * 12


def test_mixed_precision_has_files_of_its_own(tmp_path: Path) -> None:
    method = made()
    rows = method.teacher_rows(examples())
    store = distribution_store.DistributionStore(method.lm, None, True, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = store(rows).log_probs
    assert torch.equal(store(rows).log_probs, store.compute(rows).log_probs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(store(rows).log_probs, mixed)
        assert store.path(rows[0]).exists()
    with torch.autocast("cpu", torch.float16):
        assert not store.path(rows[0]).exists()


@pytest.mark.parametrize("damage", ["cut", "other", "renamed"])
def test_a_wrong_file_is_replaced(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method = made()
    rows = method.teacher_rows(examples())
    store = distribution_store.DistributionStore(method.lm, None, True, tmp_path)
    good = store(rows).log_probs
    path = store.path(rows[1])
    content = path.read_bytes()
    other = b"no tensors" if damage == "other" else store.path(rows[0]).read_bytes()
    path.write_bytes(content[:-9] if damage == "cut" else other)
    with caplog.at_level(logging.WARNING):
        again = store(rows).log_probs
    assert torch.allclose(again, good, atol=1e-5)
    assert "the file replaced" in caplog.text
    assert torch.equal(store(rows).log_probs, again)


def test_a_full_or_read_only_cache_says_what_to_do(tmp_path: Path) -> None:
    method = made()
    (tmp_path / "file").write_text("")
    store = distribution_store.DistributionStore(method.lm, None, True, tmp_path / "file")
    with pytest.raises(UserError, match=r"LIGHTNING_PROMPTS_CACHE.*model\.cache to false"):
        store(method.teacher_rows(examples()))


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_the_teacher_is_few_shot_and_the_share_is_of_means(tmp_path: Path) -> None:
    results: dict[str, dict[str, float]] = {}
    lm = LMConfig(TINY)
    methods = {
        "student": PromptDistillation(3, shots=2, text=" two", init=VocabNormal(), lm=lm, max_new_tokens=2),
        "teacher": FewShot(2, " two", lm=lm, max_new_tokens=2),
        "nothing": FixedPrompt("", lm, 2),
    }
    for name, method in methods.items():
        L.seed_everything(0, verbose=False)
        results[name] = dict(trainer(tmp_path).test(method, datamodule=Questions(), verbose=False)[0])
    found = results["student"]
    for metric in ("nll", "exact_match"):
        assert found[f"test/teacher_{metric}"] == pytest.approx(results["teacher"][f"test/{metric}"], abs=1e-5)
        assert found[f"test/no_context_{metric}"] == pytest.approx(results["nothing"][f"test/{metric}"], abs=1e-5)
    student, teacher, nothing = (results[name]["test/nll"] for name in methods)
    assert nothing > teacher
    assert found["test/nll_gain_kept"] == pytest.approx((nothing - student) / (nothing - teacher), rel=5e-3)
    assert "test/exact_match_gain_kept" not in found, "the teacher gains nothing"
    shots = methods["student"].context_text
    assert found["test/tokens_saved"] == len(shots) + len(" two") - 3, "a byte is a token here"


def test_no_share_of_no_gain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method, logged = made(), {}
    method.trainer = trainer(tmp_path)
    monkeypatch.setattr(method, "log", lambda name, value: logged.update({name: value}))
    same = {"teacher_nll": 2.0, "no_context_nll": 2.0, "nll": 1.0}
    method._sums = {"val": {**same, "teacher_exact_match": 3.0, "no_context_exact_match": 1.0, "exact_match": 2.0}}
    with caplog.at_level(logging.WARNING):
        method._log_kept()
    assert logged == {"val/exact_match_gain_kept": 0.5}
    assert "val: the context does not improve nll" in caplog.text


# --- self-study ------------------------------------------------------------------------------------------------------


def test_self_study_asks_in_the_form_of_the_template() -> None:
    asked: list[tuple[list[Example], str, int, list[int]]] = []

    def write(shown: Sequence[Example], slot: str, limit: int, seeds: Sequence[int]) -> list[str]:
        asked.append((list(shown), slot, limit, list(seeds)))
        if len(asked) == 1:
            return ["big", "", "12", "big", "small"]  # 12 is a question of validation
        return ["large", ""]

    study = SelfStudy(size=5, instruction="Ask:\n", max_question_tokens=7)
    data = Questions("Q: {question} ={prompt} {answer}\n")
    assert study.study(data, " two", 3, write) == [["big", "large"]]
    (questions, nothing, limit, seeds), (answers, slot, most, others) = asked
    assert len(questions) == 5
    assert (nothing, slot) == ("", " two"), "where the text stands before the question, the request has it already"
    assert limit == 7
    assert questions[0].before == "Ask:\nQ:"
    assert questions[0].stop == r"=\ two"
    assert len({*seeds, *others}) == 7, "every text has its own seed"
    assert [example.before + example.after for example in answers] == ["Q: big =", "Q: small ="]
    assert most == 3
    assert study.example(data, "big", "large").answer == " large"


@pytest.mark.parametrize("split", ["test/ood", "predict"])
def test_self_study_leaves_out_the_questions_of_every_other_split(split: str) -> None:
    texts = iter([["big", "small"], ["large"]])
    study = SelfStudy(size=2, instruction="Ask:\n")
    assert study.study(OneMore(split, "BIG "), "", 3, lambda *_: next(texts)) == [["small", "large"]]


def test_self_study_asks_nothing_twice() -> None:
    texts = iter([["big", "", "Big ", "small"], ["large", "tall"]])
    study = SelfStudy(size=4, instruction="Ask:\n")
    found = study.study(Questions("Q: {question} ={prompt} {answer}\n"), "", 3, lambda *_: next(texts))
    assert found == [["big", "large"], ["small", "tall"]]


def test_self_study_answers_the_questions_of_the_data() -> None:
    data = Questions(labels=True)
    rows = len(data.examples("train"))

    def pairs(size: int, seed: int) -> list[list[Any]]:
        L.seed_everything(seed, verbose=False)
        answers = lambda shown, slot, limit, seeds: [f"a{n}" for n, _ in enumerate(shown)]  # noqa: E731
        return SelfStudy("data", size=size).study(data, "", 2, answers)

    assert pairs(rows + 1, 0) == [[row, f"a{row}"] for row in range(rows)]
    draws = {tuple(row for row, _ in pairs(3, seed)) for seed in (0, 0, 1, 2)}
    assert len(draws) == 3, "drawn by the run's seed, not the first rows of a file that may be sorted"
    assert all(len({*draw}) == 3 for draw in draws)
    row, answer = pairs(3, 0)[1]
    example = SelfStudy("data").example(data, row, answer)
    assert (example.question, example.answer, example.labels) == (data.examples("train")[row].question, " a1", ())


def test_self_study_trains_on_what_was_written(tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    seen: list[str] = []

    class Watched(PromptDistillation):
        def teach(self, examples: Sequence[Example]) -> Distributions:
            seen.extend(example.question for example in examples)
            return super().teach(examples)

    method = Watched(3, shots=2, self_study=SelfStudy(size=6, max_question_tokens=4), lm=LM, max_new_tokens=2)
    fit = trainer(tmp_path, max_steps=3, limit_val_batches=0)
    fit.fit(method, Questions())
    assert method.written
    assert {*seen} <= {question for question, _ in method.written}
    fit.save_checkpoint(tmp_path / "x.ckpt")
    again = PromptDistillation.load_from_checkpoint(tmp_path / "x.ckpt")
    assert (again.written, again.context_text) == (method.written, method.context_text)
    assert torch.equal(flat(again.current_prompt()), flat(method.current_prompt()))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"length": 1, "freeze_first": True}, "length must be at least 2"),
        ({"student": "both"}, "student must be vectors or prefix"),
        ({"context_file": "a.txt"}, "give either context or context_file"),
        ({"context": None, "shots": 0}, "shots must be at least 1, got 0; or give a context"),
        ({"context": " "}, "context is empty"),
        ({"context": None, "context_file": str(tmp_path / "no.txt")}, "no.txt does not exist"),
        ({"length": 100}, rf"length \(100\) is more than the {len(CONTEXT)} tokens of the context"),
        ({"length": 256}, "leaves no room"),
        ({"objective": Divergence(top_k=10**6)}, r"top_k \(1000000\) must be below the vocabulary"),
    ]
    for settings, message in wrong:
        with pytest.raises(UserError, match=message):
            made(**settings)
    with pytest.raises(UserError, match=r"objective\.direction"):
        Divergence("both")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"top_k must be at least 1"):
        Divergence(top_k=0)
    with pytest.raises(UserError, match=r"questions must be written or data"):
        SelfStudy("own")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"with the context in front: .*shorten the context"):
        trainer(tmp_path).fit(made(context="x" * 250), Questions())
    with pytest.raises(UserError, match=r"with the context in front: .*shorten the context"):  # of a later test
        trainer(tmp_path).fit(made(context="x" * 180), OneMore("test/ood", "y" * 90))


def test_a_checkpoint_brings_its_context(tmp_path: Path) -> None:
    """A trained prompt is tested and read without the file or the examples that its context came from."""

    class NoTraining(Questions):
        def load_rows(self) -> dict[str, list[SourceRow]]:
            return {**super().load_rows(), "train": []}

    file = tmp_path / "context.txt"
    for name, settings in (("file", {"context_file": str(file)}), ("shots", {"shots": 2})):
        file.write_text(CONTEXT)
        method = PromptDistillation(3, **settings, lm=LM, max_new_tokens=2)  # type: ignore[arg-type]
        fit = trainer(tmp_path / name, limit_val_batches=0)
        fit.fit(method, Questions())
        fit.save_checkpoint(tmp_path / "x.ckpt")
        expected = trainer(tmp_path).test(method, Questions(), verbose=False)
        file.unlink()
        data = NoTraining() if name == "shots" else Questions()
        again = PromptDistillation(3, **settings, lm=LM, max_new_tokens=2)  # type: ignore[arg-type]
        found = trainer(tmp_path).test(again, data, ckpt_path=tmp_path / "x.ckpt", verbose=False)
        assert found == expected
        assert again.context_text == method.context_text
        told = "no.txt does not exist|context.txt does not exist|no train examples"
        for run in ("test", "predict"):
            untrained = PromptDistillation(3, **settings, lm=LM, max_new_tokens=2)  # type: ignore[arg-type]
            with pytest.raises(UserError, match=told):
                getattr(trainer(tmp_path), run)(untrained, data)


@pytest.mark.parametrize("change", [{"shots": 3}, {"text": " x"}])
def test_other_shots_are_another_context(change: dict[str, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"shots": 2, "lm": LM, "max_new_tokens": 2}
    fit = trainer(tmp_path, limit_val_batches=0)
    fit.fit(PromptDistillation(3, **settings), Questions())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="the context has changed"):
        trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(
            PromptDistillation(3, **{**settings, **change}), Questions(), ckpt_path=tmp_path / "x.ckpt"
        )


def test_self_study_of_fewer_examples_is_refused() -> None:
    data = Questions()
    with pytest.raises(UserError, match="resume with the same training data"):
        SelfStudy("data").example(data, len(data.examples("train")), "a")


@pytest.mark.parametrize("changed", [CONTEXT.upper(), CONTEXT.splitlines(keepends=True)[0]])
@pytest.mark.parametrize("shots", [0, 2])
def test_a_changed_file_is_noticed(changed: str, shots: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "context.txt"
    file.write_text(CONTEXT)
    settings: dict[str, Any] = {"context_file": str(file), "shots": shots, "lm": LM, "max_new_tokens": 2}
    fit = trainer(tmp_path, limit_val_batches=0)
    trained = PromptDistillation(3, **settings)
    fit.fit(trained, Questions())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    file.write_text(changed)
    method = PromptDistillation(3, **settings)
    with pytest.raises(UserError, match="the context has changed"):
        trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(method, Questions(), ckpt_path=tmp_path / "x.ckpt")
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path).test(method, Questions(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert "the context has changed" in caplog.text
    assert method.context_text == trained.context_text
    assert (trained.context_text == CONTEXT) == (shots == 0)


def test_a_prompt_loaded_without_a_trainer_keeps_the_task_s_instruction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Questions()
    method = PromptDistillation(3, text=None, shots=2, lm=LM, max_new_tokens=2)
    fit = trainer(tmp_path, limit_val_batches=0)
    fit.fit(method, data)
    fit.save_checkpoint(tmp_path / "x.ckpt")
    (wanted,) = fit.test(method, data, verbose=False)
    with caplog.at_level(logging.WARNING):
        again = PromptDistillation.load_from_checkpoint(tmp_path / "x.ckpt")
        (found,) = trainer(tmp_path / "again").test(again, data, verbose=False)
    assert again.text == "Say where."
    assert found == pytest.approx(wanted)
    assert "the context has changed" not in caplog.text
