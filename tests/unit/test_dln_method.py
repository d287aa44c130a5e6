"""Deep Language Networks and their baselines through the Trainer."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_prompts.datamodules.base import SourceRow
from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.dln.memory import PromptMemory
from lightning_prompts.dln.messages import BanditStats
from lightning_prompts.dln.posterior import Posterior, PriorTemplate
from lightning_prompts.dln.proposals import InducedInstructions, Paraphrases
from lightning_prompts.dln.sharpening import UniformWeights
from lightning_prompts.dln.step import Stepper
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig, label_scores
from lightning_prompts.methods import Ape, ChainOfThought, DeepLanguageNetwork, FewShot, FixedPrompt
from support.dln_toys import YES_NO, Given, Toy, examples, generator, network, slot, stepper_of, trainer
from support.models import TINY
from support.references import plain_classes


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)  # type: ignore[arg-type]
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)  # type: ignore[attr-defined,index]
    return one == other


@pytest.mark.parametrize("kind", ["network", "ape"])
def test_a_resumed_run_goes_on_bit_by_bit(kind: str, tmp_path: Path) -> None:
    def build() -> DeepLanguageNetwork | Ape:
        if kind == "network":
            return network()
        return Ape(
            text="Say.",
            induced=InducedInstructions(3, max_new_tokens=8),
            paraphrases=Paraphrases(2, 0.7, 8),
            max_prompt_tokens=60,
            lm=LMConfig(f"{TINY},max_position_embeddings=700"),
        )

    L.seed_everything(3)
    trainer(tmp_path / "whole", 4).fit(build(), Toy())
    L.seed_everything(3)
    saved = tmp_path / "whole" / "saved" / "step=2.ckpt"
    trainer(tmp_path / "parts", 4).fit(build(), Toy(), ckpt_path=saved, weights_only=True)
    one, other = (
        torch.load(tmp_path / name / "saved" / "step=4.ckpt", weights_only=True) for name in ("whole", "parts")
    )
    assert same(one["text_prompts"], other["text_prompts"])
    assert one["global_step"] == other["global_step"] == 4
    assert (tmp_path / "whole" / "prompts.jsonl").read_text() == (tmp_path / "parts" / "prompts.jsonl").read_text()
    if kind == "ape":
        assert one["demonstration_search"] == other["demonstration_search"]
    assert len(one["text_prompts"]["cache"]["score_keys"]) > 20


def test_training_keeps_what_is_strictly_best_on_validation(tmp_path: Path) -> None:
    L.seed_everything(1)
    method, data = network(layers=[LanguageLayer(prompt="Say.")], posterior=None, error_weight=0.0), Toy()
    fitting = trainer(tmp_path, 6)
    fitting.fit(method, data)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    tested = [row for row in rows if row["kind"] == "validation"]
    assert [row["step"] for row in tested] == [2, 4, 6]
    assert {"current", "RuleRewrites"} <= {row["kind"] for row in rows}

    def accuracy(prompt: str) -> float:
        right = 0
        for example in data.examples("val"):
            vectors = slot(method.lm, example, prompt)[1]
            right += int(plain_classes(method.lm, example, vectors).argmax()) == example.label
        return right / len(data.examples("val"))

    best, prompt = accuracy("Say."), "Say."
    for row in tested:
        assert row["accuracy"] == pytest.approx(accuracy(row["prompts"][0]), abs=1e-5)
        if row["accuracy"] > best + 1e-9:
            best, prompt = row["accuracy"], row["prompts"][0]
        assert row["best_accuracy"] == pytest.approx(best, abs=1e-5)
    assert method.prompt_text() == prompt
    # A step starts from what the step before has chosen, or from the best where validation has led back to it.
    now = "Say."
    for row in rows:
        if row["kind"] == "current":
            assert row["prompt"] == now
        if row.get("chosen"):
            now = row["prompt"]
        if row.get("back_to_best"):
            now = max((r for r in tested if r["step"] <= row["step"]), key=lambda r: r["accuracy"])["prompts"][0]
            now = prompt if row["best_accuracy"] == accuracy("Say.") else now
    fitting.test(method, data, verbose=False)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    counts = {name: value for name, value in metrics.items() if "/predicted/" in name}
    assert sum(counts.values()) == metrics["test/examples"] == 12
    assert metrics["test/accuracy"] == metrics["test/exact_match"]
    fixed = FixedPrompt(text=prompt, lm=LMConfig(f"{TINY},max_position_embeddings=700"))
    alone = trainer(tmp_path / "fixed", 1)
    alone.test(fixed, Toy(), verbose=False)
    theirs = json.loads((tmp_path / "fixed" / "metrics.json").read_text())
    for name, value in metrics.items():
        assert value == pytest.approx(theirs[name], abs=1e-4), "the prompt does as text what it did here"


def test_a_network_with_fixed_prompts_is_chain_of_thought(tmp_path: Path) -> None:
    """The prior alone, no sharpening, nothing learned yet: `ChainOfThought`'s rows to the letter."""
    lm = LMConfig(f"{TINY},max_position_embeddings=700")
    thinks = "{prompt}\n\n{question}\n\nAnswer:\nLet's think step by step. {answer}"
    asks = "{prompt}\n\n{question}\n\nAnswer:\nLet's think step by step. {hidden}\nTherefore, the answer is {answer}"
    layers = [LanguageLayer("Say.", thinks, max_new_tokens=7), LanguageLayer("Say.", asks)]
    posterior = Posterior(1, 0.0, [PriorTemplate()], UniformWeights())
    found = []
    for labels in (True, False):
        for method in (
            ChainOfThought(text="Say.", reasoning_tokens=7, lm=lm, max_new_tokens=4),
            network(layers=layers, posterior=posterior, max_new_tokens=4, lm=lm),
        ):
            folder = tmp_path / f"{type(method).__name__}-{labels}"
            trainer(folder, 1).test(method, Toy(labels), verbose=False)
            found.append([json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()])
        for mine, theirs in zip(*found[-2:], strict=True):
            assert mine.keys() == theirs.keys()
            assert mine.pop("nll") == pytest.approx(theirs.pop("nll"), abs=1e-4)
            assert mine == theirs
            assert isinstance(mine["hidden"], str)
    # And the reward of its top prompt is what chain of thought gives the answers.
    stepper = Stepper(method.network, method.proposer, method.settings)  # type: ignore[union-attr]
    batch = Toy().examples("train")[:3]
    seen = stepper.forward(batch, ["Say.", "Say."])
    draws = stepper.posterior(seen, generator())
    assert draws[0].texts == [[text] for text in seen.hidden[0]]
    reward = stepper.rewards(1, ["Say."], seen, draws, 0.0)[0].item()
    cot = ChainOfThought(text="Say.", reasoning_tokens=7, lm=lm)
    cot.configure_model()
    vectors = cot.current_prompt()
    plain = [plain_classes(cot.lm, example, vectors)[example.label] for example in cot.prepare(batch)]
    kept = [value for value, text in zip(plain, seen.hidden[0], strict=True) if text]
    assert reward == pytest.approx(float(sum(kept)) / 3, abs=1e-4)


def test_few_shot_on_labels(tmp_path: Path) -> None:
    method = FewShot(shots=2, text="Say.", lm=LMConfig(f"{TINY},max_position_embeddings=700"))
    trainer(tmp_path, 1).test(method, Toy(), verbose=False)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} <= {"yes", "no"}
    prepared = method.prepare(Toy().examples("test"))
    for row, example in zip(rows, prepared, strict=True):
        classes = plain_classes(method.lm, example, method.current_prompt())
        assert row["label"] == YES_NO[int(classes.argmax())][0]
        assert row["correct"] == (row["label"] == row["answer"])


def test_each_run_has_the_text_of_its_own_data(tmp_path: Path) -> None:
    lm = LMConfig(f"{TINY},max_position_embeddings=700")
    first, second = Toy(instruction="One?", size=4), Toy(instruction="Two?", size=6)
    kept = FewShot(shots=2, text=None, lm=lm)
    for data in (first, second):
        trainer(tmp_path, 1).test(kept, data, verbose=False)
    new = FewShot(shots=2, text=None, lm=lm)
    trainer(tmp_path, 1).test(new, second, verbose=False)
    assert (kept.text, kept.demonstrations) == (new.text, new.demonstrations)
    assert "Two?" in kept.demonstrations


def test_every_method_can_calibrate(tmp_path: Path) -> None:
    lm = LMConfig(f"{TINY},max_position_embeddings=700", calibrate_labels=True)
    found = []
    for method in (
        FixedPrompt(text="Say.", lm=lm),
        network(layers=[LanguageLayer("Say.")], posterior=None, error_weight=0.0, lm=lm),
    ):
        folder = tmp_path / type(method).__name__
        trainer(folder, 1).test(method, Toy(), verbose=False)
        found.append([json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()])
    vectors = method.current_prompt()
    scores = label_scores(method.lm, Toy().examples("test"), vectors, calibrate=True).log_probs
    names = [YES_NO[label][0] for label in scores.argmax(-1).tolist()]
    assert [row["label"] for row in found[0]] == [row["label"] for row in found[1]] == names
    plain = label_scores(method.lm, Toy().examples("test"), vectors).log_probs
    assert names != [YES_NO[label][0] for label in plain.argmax(-1).tolist()], "it makes a difference here"


def test_prompts_start_at_the_task_s_own_instruction(tmp_path: Path) -> None:
    lm = LMConfig(f"{TINY},max_position_embeddings=700")
    data = Toy(instruction="Odd?")
    found = []
    for text in (None, "Odd?", ""):
        method = FixedPrompt(text=text, lm=lm)
        folder = tmp_path / str(text)
        trainer(folder, 1).test(method, data, verbose=False)
        found.append((folder / "predictions.jsonl").read_text())
    assert found[0] == found[1] != found[2]
    method = network(layers=[LanguageLayer("Think.", max_new_tokens=4), LanguageLayer(None)])
    trainer(tmp_path / "two", 1, 1).fit(method, data)
    assert method.initial_prompts == ["Think.", "Odd?"]
    ape = Ape(text=None, induced=InducedInstructions(2, max_new_tokens=4), max_prompt_tokens=60, lm=lm)
    trainer(tmp_path / "ape", 1, 1).fit(ape, data)
    assert ape.initial_prompts == ["Odd?"]
    single = network(layers=None, posterior=None, error_weight=0.0, lm=lm)
    trainer(tmp_path / "single", 1).test(single, data, verbose=False)
    assert single.initial_prompts == ["Odd?"]


def test_layers_share_an_lm_where_they_name_the_same(tmp_path: Path) -> None:
    other = LMConfig(f"{TINY},num_hidden_layers=1,max_position_embeddings=700")
    layers = [LanguageLayer("Think.", max_new_tokens=4, lm=other), LanguageLayer("Say.")]
    method = network(layers=layers, proposer=LMConfig(other.name))
    trainer(tmp_path, 2).fit(method, Toy())
    first, top = method.network.lms
    assert first is method.proposer
    assert top.lm is method.lm is not first.lm
    assert method.tokens_forwarded == first.lm.tokens_forwarded + method.lm.tokens_forwarded
    assert min(first.lm.tokens_forwarded, method.lm.tokens_forwarded) > 0
    saved = torch.load(tmp_path / "saved" / "step=2.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {"handle"}


def test_ape_keeps_the_best_on_validation(tmp_path: Path) -> None:
    L.seed_everything(2)
    method = Ape(
        text="Say.",
        induced=InducedInstructions(6, max_new_tokens=8),
        paraphrases=Paraphrases(3, 0.7, 8),
        max_prompt_tokens=60,
        lm=LMConfig(f"{TINY},max_position_embeddings=700"),
    )
    data = Toy()
    trainer(tmp_path, 2, 1).fit(method, data)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    for step, kind in ((1, "InducedInstructions"), (2, "Paraphrases")):
        mine = [row for row in rows if row["step"] == step and "reward" in row]
        assert kind in {row["kind"] for row in mine}
        for row in mine:
            right = [
                int(plain_classes(method.lm, e, slot(method.lm, e, row["prompt"])[1]).argmax()) == e.label
                for e in data.examples("val")
            ]
            assert row["reward"] == pytest.approx(sum(right) / len(right), abs=1e-5)
        best = max(row["reward"] for row in mine)
        assert next(row for row in mine if row["reward"] == best)["chosen"], "the first of equals, so the current one"


def test_no_score_is_one_of_another_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that of the initial prompt, nor one that a checkpoint brings."""
    mixed: list[bool] = []
    score = FrozenLM.text_scores

    def watched(lm: FrozenLM, *args: Any) -> Any:
        mixed.append(torch.is_autocast_enabled("cpu"))
        return score(lm, *args)

    monkeypatch.setattr(FrozenLM, "text_scores", watched)
    settings: dict[str, Any] = {"layers": [LanguageLayer("Say.")], "posterior": None, "error_weight": 0.0}
    method = network(**settings)
    trainer(tmp_path, 1, precision="bf16-mixed").fit(method, Toy())
    assert all(mixed)
    saved = tmp_path / "saved" / "step=1.ckpt"
    for again, path in ((method, None), (network(**settings), saved)):
        mixed.clear()
        trainer(tmp_path, 1).validate(again, Toy(), ckpt_path=path, verbose=False, weights_only=True)
        assert mixed == [False] * len(mixed) != []


def test_trust_needs_classes(tiny: FrozenLM) -> None:
    with pytest.raises(UserError, match="trust compares class probabilities"):
        stepper_of(tiny, [LanguageLayer()], trust=0.5).step(
            examples(labels=False), ["Start."], PromptMemory(0, -1), [BanditStats()], 0.0, generator()
        )


def test_trust_with_free_text_and_ape_without_validation_do_not_start(tmp_path: Path) -> None:
    one: dict[str, object] = {"layers": [LanguageLayer("Say.")], "posterior": None, "error_weight": 0.0}

    class Mixed(Toy):
        """The last example to learn from is of free text."""

        def load_rows(self) -> dict[str, list[SourceRow]]:
            rows = super().load_rows()
            rows["train"][-1] = replace(rows["train"][-1], labels=())
            return rows

    for data in (Toy(labels=False), Mixed()):
        method = network(trust=0.5, **one)
        with pytest.raises(UserError, match=r"row .*: trust compares class probabilities") as caught:
            trainer(tmp_path / "trust", 1).fit(method, data)
        assert "\n" not in str(caught.value)
        assert not hasattr(method, "lm"), "before anything is loaded"
    trainer(tmp_path / "mixed", 1).fit(network(**one), Mixed())
    ape = Ape(text="Say.", lm=LMConfig(f"{TINY},max_position_embeddings=700"), max_prompt_tokens=60)
    fitting = trainer(tmp_path / "ape", 1)
    fitting.limit_val_batches = 0
    with pytest.raises(UserError, match="give data a validation split"):
        fitting.fit(ape, Toy())
    assert not hasattr(ape, "lm")


def test_gradients_that_are_not_there_are_not_accumulated(tmp_path: Path) -> None:
    method, fitting = network(), trainer(tmp_path, 2)
    fitting.accumulate_grad_batches = 2
    with pytest.raises(UserError, match="no gradients to accumulate"):
        fitting.fit(method, Toy())
    assert not hasattr(method, "lm")


def test_all_filtered_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method = network(
        layers=[LanguageLayer(prompt="Say.")], posterior=None, error_weight=0.0, proposals=[Given(("", "Say."))]
    )
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, 1).fit(method, Toy())
    assert "no proposal for layer 0 was new" in caplog.text
    assert method.prompts == ["Say."]


def test_an_example_beyond_the_window_is_found_before_the_first_step(tmp_path: Path) -> None:
    method = network(lm=LMConfig(f"{TINY},max_position_embeddings=100"))
    with pytest.raises(UserError, match="context window"):
        trainer(tmp_path, 1).fit(method, Toy())
