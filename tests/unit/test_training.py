"""Every method trains, changes its prompt alone, and comes back from a checkpoint as it was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau

from lightning_prompts.callbacks import LastCheckpoint, PromptReadout, SampleGenerations, ValidateAtEnd, throughput
from lightning_prompts.cli import PromptCLI
from lightning_prompts.datamodules import Antonyms, QuestionAnswer
from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import FixedPrompt, RelaxedPromptTuning, SoftPromptTuning
from lightning_prompts.prompts.initializers import FromText
from lightning_prompts.prompts.soft import ResidualMLP
from support.models import TINY
from support.training import data, resumable, trainer

LM = LMConfig(TINY)


def method(**settings: Any) -> SoftPromptTuning:
    return SoftPromptTuning(**{"length": 3, "lm": LM, "max_new_tokens": 2, **settings})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"length": 5}, r"another length \(3\) than this run's \(5\)"),
        ({"lm": LMConfig(TINY + ",rope_theta=500.0")}, "another model"),
        ({"lm": LMConfig(TINY, revision="x")}, "another revision"),
        ({"saved": LMConfig(TINY, revision="y"), "lm": LMConfig(TINY, revision="x")}, r"another revision \(y\)"),
        ({"reparametrization": ResidualMLP(4)}, "another reparametrization"),
        ({"fixed": True}, r"another method \(SoftPromptTuning\) than this run's \(FixedPrompt\)"),
    ],
)
def test_another_run_s_checkpoint_is_refused(other: dict[str, Any], words: str, tmp_path: Path) -> None:
    fit = trainer(tmp_path)
    fit.fit(method(lm=other.get("saved", LM)), datamodule=data())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    model = FixedPrompt("x", lm=LM) if "fixed" in other else method(**{k: v for k, v in other.items() if k != "saved"})
    with pytest.raises(UserError, match=words):
        trainer(tmp_path).test(model, datamodule=data(), ckpt_path=tmp_path / "x.ckpt", verbose=False)


def test_a_changed_learning_rate_changes_the_result(tmp_path: Path) -> None:
    prompts = []
    for rate in (1e-3, 1e-1):
        L.seed_everything(1)
        model = method(optimizer=lambda p, rate=rate: torch.optim.AdamW(p, lr=rate))
        trainer(tmp_path).fit(model, datamodule=data())
        prompts.append((model.current_prompt() - model.initial_prompt()).norm().item())
    assert prompts[1] > 10 * prompts[0]


def test_the_scheduler_steps_with_the_batches(tmp_path: Path) -> None:
    model = method(
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
    )
    fit = trainer(tmp_path)
    fit.fit(model, datamodule=data())
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.25


def test_a_scheduler_that_waits_for_a_metric(tmp_path: Path) -> None:
    model = method(
        scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, "val/nll", factor=0.5, patience=0, threshold=9)
    )
    fit = trainer(tmp_path, max_steps=-1, max_epochs=3)
    fit.fit(model, datamodule=data())
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.0025  # no NLL is good enough for that threshold


def test_trainables_stay_float32(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        model = method(lm=LMConfig(TINY, dtype=dtype))  # type: ignore[arg-type]
        trainer(tmp_path).fit(model, datamodule=data())
        assert model.lm.embedding_matrix().dtype == getattr(torch, dtype)
        assert model.current_prompt().dtype == torch.float32
        assert torch.isfinite(model.current_prompt()).all()
    mixed = method()
    trainer(tmp_path, precision="bf16-mixed").fit(mixed, datamodule=data())
    assert mixed.current_prompt().dtype == torch.float32
    assert torch.isfinite(mixed.current_prompt()).all()
    with pytest.raises(UserError, match=r"set model.lm.dtype"):
        trainer(tmp_path, precision="bf16-true").fit(method(), datamodule=data())


def test_fixed_prompt_is_the_text_on_the_same_path(tmp_path: Path) -> None:
    text = trainer(tmp_path).test(FixedPrompt("two", lm=LM, max_new_tokens=2), datamodule=data(), verbose=False)[0]
    soft = trainer(tmp_path).test(method(init=FromText("two")), datamodule=data(), verbose=False)[0]
    assert text["test/nll"] == pytest.approx(soft["test/nll"], abs=1e-6)
    with pytest.raises(UserError, match="trains nothing"):
        trainer(tmp_path).fit(FixedPrompt("two", lm=LM), datamodule=data())


def test_python_built_equals_cli_built(tmp_path: Path) -> None:
    L.seed_everything(0)
    model = method(optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    trainer(tmp_path, gradient_clip_val=1.0).fit(model, datamodule=data())
    cli = PromptCLI(
        [
            "fit",
            "--model",
            "SoftPromptTuning",
            "--model.length",
            "3",
            "--model.lm.name",
            TINY,
            "--model.max_new_tokens",
            "2",
            "--model.optimizer",
            "torch.optim.SGD",
            "--model.optimizer.lr",
            "0.5",
            "--data",
            "Antonyms",
            "--data.batch_size",
            "4",
            "--data.max_train_examples",
            "20",
            "--data.val_fraction",
            "0.01",
            "--data.test_fraction",
            "0.01",
            "--trainer.max_steps",
            "2",
            "--trainer.accelerator",
            "cpu",
            "--trainer.default_root_dir",
            str(tmp_path / "cli"),
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.enable_model_summary",
            "false",
        ]
    )
    assert torch.equal(cli.model.current_prompt(), model.current_prompt())


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_resuming_anywhere_ends_in_the_same_prompt(step: int, tmp_path: Path) -> None:
    """Epochs have five steps here, so one of the checkpoints is at an epoch's end and three are inside one."""
    L.seed_everything(1)
    whole = method()
    resumable(tmp_path / "whole").fit(whole, datamodule=data())
    L.seed_everything(1)
    rest = method()
    last = resumable(tmp_path / "rest")
    checkpoint = tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt"
    last.fit(rest, datamodule=data(), ckpt_path=checkpoint, weights_only=True)
    assert last.global_step == 10
    assert torch.equal(rest.current_prompt(), whole.current_prompt())


def test_the_learning_rate_falls_to_zero_over_the_run(tmp_path: Path) -> None:
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(tmp_path, max_steps=4, callbacks=[Watch()]).fit(method(), datamodule=data())
    assert rates == pytest.approx([0.02, 0.015, 0.01, 0.005])


def test_the_last_step_is_validated(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_steps=3, callbacks=[ValidateAtEnd()])  # an epoch has five steps
    fit.fit(method(), datamodule=data())
    assert fit.global_step == 3
    assert "val/nll" in fit.callback_metrics


@pytest.mark.parametrize(
    "settings",
    [
        {"check_val_every_n_epoch": 4, "max_epochs": 2, "max_steps": -1},
        {"check_val_every_n_epoch": 4, "max_steps": 3},
        {"check_val_every_n_epoch": None, "val_check_interval": 50, "max_epochs": 1, "max_steps": -1},
    ],
    ids=str,
)
def test_a_run_that_ends_before_its_first_validation_has_one(settings: dict[str, Any], tmp_path: Path) -> None:
    """The best tokens are those that were trained, not the initial ones."""
    L.seed_everything(0)
    method = RelaxedPromptTuning(3, lm=LM, max_new_tokens=1)
    nll = {0: 9.0}  # of the initial tokens
    method.keep_better = lambda value: type(method).keep_better(method, nll.get(method.trainer.global_step, 1.0))  # type: ignore[method-assign]
    best = ModelCheckpoint(tmp_path, "best", monitor="val/selection_loss")
    method.token_ids = lambda: torch.full([3], 65 + method.trainer.global_step)  # type: ignore[method-assign]
    callbacks = [ValidateAtEnd(), best, LastCheckpoint()]
    fit = trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks, **settings)
    fit.fit(method, datamodule=data())
    assert method.best_ids.tolist() == [65 + fit.global_step] * 3
    for path in (best.best_model_path, LastCheckpoint.path(fit)):
        assert torch.load(path, weights_only=True)["state_dict"]["best_ids"].tolist() == method.best_ids.tolist()


def test_callbacks_tell_what_happened(tmp_path: Path) -> None:
    model = method(length=2)
    fit = resumable(tmp_path)
    fit.fit(model, datamodule=data())
    readout = [json.loads(line) for line in (tmp_path / "prompt.jsonl").read_text().splitlines()]
    assert [row["step"] for row in readout] == [5, 10]
    ids, cosine = model.lm.nearest_tokens(model.current_prompt())
    assert readout[-1]["tokens"] == [model.lm.text([token]) for token in ids.tolist()]
    assert readout[-1]["cosine"] == pytest.approx(cosine.tolist(), abs=1e-4)
    distance = (model.current_prompt() - model.initial_prompt()).norm(dim=-1).mean()
    assert readout[-1]["distance"] == pytest.approx(float(distance), abs=1e-3)
    examples = fit.datamodule.examples("val")[:5]  # type: ignore[attr-defined]
    as_words = model.lm.score(examples, model.lm.embed(ids)).nll.mean()
    assert readout[-1]["nll_as_words"] == pytest.approx(float(as_words), abs=1e-3)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [5, 5, 10, 10]
    assert fit.callback_metrics["throughput/examples_per_second"] > 0


def test_sample_generations_span_several_batches(tmp_path: Path) -> None:
    samples = SampleGenerations(5)
    fit = trainer(tmp_path, callbacks=[samples, PromptReadout(5)], max_steps=1, val_check_interval=1)
    batches: list[int] = []

    def score(examples: list[Any], *args: Any) -> Any:
        batches.append(len(examples))
        return real(examples, *args)

    model = method(length=2)
    model.configure_model()
    real = model.lm.score
    model.lm.score = score  # type: ignore[method-assign,assignment]
    fit.fit(model, datamodule=Antonyms(batch_size=4, eval_batch_size=2, val_fraction=0.01, test_fraction=0.01))
    assert len(samples.rows) == 5
    assert batches[-3:] == [2, 2, 1], "the readout runs no larger batches than validation"


def test_the_metrics_are_means_over_examples(tmp_path: Path) -> None:
    """With an uneven last batch, and against the rows themselves."""
    model = method()
    data_ = Antonyms(eval_batch_size=7, val_fraction=0.01, test_fraction=0.01)
    rows: list[dict[str, Any]] = []

    class Keep(L.Callback):
        def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
            rows.extend(args[2]["rows"])

    result = trainer(tmp_path, callbacks=[Keep()]).test(model, datamodule=data_, verbose=False)[0]
    assert len(rows) % 7
    assert result["test/examples"] == len(rows) == len(data_.examples("test"))
    assert result["test/nll"] == pytest.approx(sum(row["nll"] for row in rows) / len(rows), rel=1e-5)
    assert result["test/exact_match"] == sum(row["correct"] for row in rows) / len(rows)


def test_a_row_too_long_is_told_before_training(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"question": f"{n} " + "x" * (10 if n != 7 else 300), "answer": "y"} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"long.jsonl row 8: prompt \(3\), text and answer are"):
        trainer(tmp_path).fit(method(), datamodule=QuestionAnswer(str(path), val_size=1, test_size=1, seed=1))
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(json.dumps({"question": f"a{n}", "answer": f"b{n}"}) for n in range(12)))
    for settings in ({"test": str(path)}, {"predict": str(path), "test_size": 1}):
        with pytest.raises(UserError, match=r"long.jsonl row 8: prompt \(3\), text and answer are"):
            trainer(tmp_path).fit(method(), datamodule=QuestionAnswer(str(short), val_size=1, **settings))


def test_gradients_wait_between_two_steps_only(tmp_path: Path) -> None:
    """Five batches, two to a step: the last one of an epoch makes a step of its own."""
    waiting = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            waiting.append(pl_module.accumulating)

    fit = trainer(tmp_path, max_steps=-1, max_epochs=2, accumulate_grad_batches=2, callbacks=[Watch()])
    fit.fit(method(), datamodule=data())
    assert fit.global_step == 6
    assert waiting == [True, False, True, False, False] * 2


def test_throughput_divides_counts_by_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))  # two seconds go by between any two looks at it
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    model = method()
    fit = trainer(tmp_path, max_steps=4, log_every_n_steps=2, limit_val_batches=0, callbacks=[throughput.Throughput()])
    tokens = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            tokens.append(pl_module.tokens_forwarded)

    fit.callbacks.append(Watch())
    fit.fit(model, datamodule=data())
    assert fit.callback_metrics["throughput/seconds_per_step"] == 2
    assert fit.callback_metrics["throughput/examples_per_second"] == 2  # four in a batch
    assert fit.callback_metrics["throughput/tokens_per_second"] == pytest.approx((tokens[3] - tokens[1]) / 4)
