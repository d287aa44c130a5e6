"""What is particular to each family of prompts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import Precision
from transformers import DynamicCache

from lightning_prompts.callbacks import Budget, PromptReadout, ValidateAtEnd
from lightning_prompts.datamodules import Addition, Antonyms
from lightning_prompts.errors import UserError
from lightning_prompts.estimators.relaxations import Argmax, Softmax
from lightning_prompts.estimators.temperature import Temperature
from lightning_prompts.lm import FrozenLM, KeyValues, LMConfig
from lightning_prompts.lm.loading import byte_tokenizer
from lightning_prompts.methods import (
    ChainOfThought,
    FewShot,
    FixedPrompt,
    HardPromptSearch,
    LoraTuning,
    PrefixTuning,
    PromptMethod,
    RelaxedPromptTuning,
    ScratchTransformer,
    SoftPromptTuning,
)
from lightning_prompts.methods.few_shot import draw_shots
from lightning_prompts.objectives import BertScoreLoss, Likelihood
from lightning_prompts.prompts.initializers import FromText, Hybrid, RandomTokens, VocabNormal
from lightning_prompts.prompts.prefix import PrefixMLP
from lightning_prompts.prompts.soft import ResidualMLP
from lightning_prompts.search.candidates import round_trips
from lightning_prompts.search.rounding import Rounding
from lightning_prompts.template import Template
from lightning_prompts.types import Batch, Example
from support.models import SHAPES, TINY
from support.training import MAKE, data, trainer

LM = LMConfig(TINY)

# --- prefix tuning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prefix_of_a_text_is_the_text(
    shape: str, shapes: Callable[[str], FrozenLM], prompt_first: list[Example]
) -> None:
    """Grouped heads, sliding windows, learned positions: keys and values stand where the tokens would."""
    lm = shapes(shape)
    vectors = VocabNormal()(lm, 9)
    prefix = lm.key_values(vectors)
    assert prefix.length == 9
    assert torch.allclose(
        lm.score(prompt_first, prefix, with_end=True).nll, lm.score(prompt_first, vectors, with_end=True).nll, atol=1e-4
    )
    assert lm.generate(prompt_first, prefix, 6) == lm.generate(prompt_first, vectors, 6)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "qwen3"])
def test_any_prefix_and_its_gradient_equal_transformers_cache(
    shape: str, shapes: Callable[[str], FrozenLM], antonyms: list[Example]
) -> None:
    lm = shapes(shape)
    widths = lm.key_values(VocabNormal()(lm, 1)).widths
    flat = torch.randn(5, sum(part.numel() for pair in widths for part in pair), requires_grad=True)
    scores = lm.score(antonyms, KeyValues.unflatten(flat, widths))
    scores.nll.sum().backward()
    model = copy.deepcopy(lm.model)
    model.set_attn_implementation("eager")
    reference = flat.detach().clone().requires_grad_(True)
    total = torch.zeros(())
    for row, nll in zip(lm.encode(antonyms, 0), scores.nll, strict=True):
        cache = DynamicCache()
        for layer, (key, value) in enumerate(KeyValues.unflatten(reference, widths).layers):
            cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
        ids = torch.tensor([row.context + row.answer])
        logits = model(ids, past_key_values=cache, position_ids=torch.arange(5, 5 + ids.shape[1])[None]).logits[0]
        wanted = torch.tensor(row.answer)
        alone = torch.nn.functional.cross_entropy(logits[-len(wanted) - 1 : -1], wanted)
        assert nll.item() == pytest.approx(alone.item(), abs=1e-4)
        total = total + alone
    total.backward()
    assert torch.allclose(flat.grad, reference.grad, atol=1e-4)
    assert flat.grad.abs().max() > 1e-3


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gemma3"])
def test_gradient_checkpointing_changes_no_gradient(shape: str, prompt_first: list[Example]) -> None:
    gradients = []
    for switch in (False, True):
        lm = FrozenLM.load(LMConfig(SHAPES[shape], gradient_checkpointing=switch))
        passes = []
        inner = lm.model.get_submodule("transformer.h.0.mlp" if shape == "gpt2" else "model.layers.0.mlp")
        inner.register_forward_pre_hook(lambda *args, passes=passes: passes.append(1))
        vectors = VocabNormal()(lm, 4)
        flat = lm.key_values(vectors).flatten().requires_grad_(True)
        widths = lm.key_values(vectors).widths
        passes.clear()
        soft = vectors.clone().requires_grad_(True)
        loss = lm.score(prompt_first, KeyValues.unflatten(flat, widths)).nll.sum()
        (loss + lm.score(prompt_first, soft).nll.sum()).backward()
        assert len(passes) == (4 if switch else 2), "the layer is run again in the backward pass"
        gradients.append((flat.grad, soft.grad))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_gradient_checkpointing_applies_no_dropout(prompt_first: list[Example]) -> None:
    """OPT's layers drop values out in training mode, in which transformers checkpoints them."""
    size = "hidden_size=32,ffn_dim=48,num_hidden_layers=2,num_attention_heads=4,word_embed_proj_dim=32"
    losses = []
    for switch in (False, True):
        lm = FrozenLM.load(LMConfig(f"random:opt,{size},dropout=0.5", gradient_checkpointing=switch))
        vectors = lm.embed(torch.tensor([5, 6])).requires_grad_(True)
        losses.append(lm.score(prompt_first, vectors).nll.tolist())
    assert losses[0] == losses[1]


def test_a_prefix_starts_at_its_initialiser_and_takes_the_place_of_no_slot() -> None:
    for init in (RandomTokens(), FromText(" abcdef"), Hybrid(" a")):
        for mlp in (None, PrefixMLP(4, 4)):
            model = PrefixTuning(4, init, mlp, lm=LM)
            model.configure_model()
            expected = model.lm.key_values(init(model.lm, 4))
            for pair, wanted in zip(model.current_prompt().layers, expected.layers, strict=True):
                assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(pair, wanted, strict=True))
            assert model.prompt_length == 4


def test_a_prefix_counts_towards_the_context_window(tmp_path: Path) -> None:
    model = PrefixTuning(250, lm=LM, mlp=None)
    with pytest.raises(UserError, match=r"prompt \(250\)"):
        trainer(tmp_path).fit(model, datamodule=data())


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "rounded", "search"])
def test_the_best_tokens_by_validation_are_the_result(name: str, tmp_path: Path) -> None:
    L.seed_everything(0)
    model = MAKE[name]()
    seen: list[tuple[float, list[int]]] = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            seen.append((trainer.callback_metrics["val/nll"].item(), pl_module.token_ids().tolist()))

        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            seen.append((pl_module.best_nll.item(), pl_module.best_ids.tolist()))

    fit = trainer(tmp_path, max_steps=6, val_check_interval=1, callbacks=[PromptReadout(), Watch()])
    fit.fit(model, datamodule=data())
    assert len(seen) >= 6
    alike = round_trips(model.lm, torch.tensor([ids for _, ids in seen])).tolist()
    best = min((not text, nll, ids) for text, (nll, ids) in zip(alike, seen, strict=True))[1:]
    assert model.best_nll.item() == pytest.approx(best[0], abs=1e-6)
    assert model.best_ids.tolist() == best[1]
    assert model.best_round_trips == any(alike)
    text = (tmp_path / "prompt.txt").read_bytes().decode()
    assert text == model.prompt_text() == model.lm.text(best[1])
    fit.save_checkpoint(tmp_path / "x.ckpt")
    tested = trainer(tmp_path).test(MAKE[name](), datamodule=data(), ckpt_path=tmp_path / "x.ckpt", verbose=False)[0]
    if name == "search" or model.best_round_trips:  # taken home as text, the prompt does the same
        fixed = trainer(tmp_path).test(FixedPrompt(text, model.lm_config, 2), datamodule=data(), verbose=False)[0]
        assert fixed["test/nll"] == pytest.approx(tested["test/nll"], abs=1e-6)
    if name != "search":
        assert {"test/relaxed_nll", "test/nll"} <= set(tested)
        assert tested["test/relaxed_nll"] != pytest.approx(tested["test/nll"], abs=1e-6)


def test_a_search_that_finds_nothing_better_keeps_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prompts.methods import hard_prompt_search

    L.seed_everything(0)
    real = hard_prompt_search.race
    monkeypatch.setattr(hard_prompt_search, "race", lambda *args: -real(*args))  # it prefers what is worst
    model = HardPromptSearch(init=FromText(" ab"), candidates=20, top_k=200, lm=LM, max_new_tokens=1)
    trainer(tmp_path, max_steps=4, val_check_interval=1).fit(model, datamodule=data())
    assert model.prompt_text() == " ab" != model.lm.text(model.token_ids())


def test_rounding_is_done_once_the_run_is_over(tmp_path: Path) -> None:
    L.seed_everything(0)
    model = RelaxedPromptTuning(3, rounding=Rounding(75, 4, 5), lm=LM, max_new_tokens=1)
    calls: list[int] = []

    class Watch(L.Callback):
        def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            calls.append(int(pl_module.rounded_at))

    watched_run = trainer(tmp_path, max_steps=3, val_check_interval=1, callbacks=[Watch(), ValidateAtEnd()])
    watched_run.fit(model, datamodule=data())
    assert calls[0] == 0, "until then, the tokens are each position's likeliest"
    assert calls[-1] == 3
    accumulated = RelaxedPromptTuning(3, rounding=Rounding(1, 4, 5), lm=LM, max_new_tokens=1)
    rounded: list[int] = []
    real = accumulated.on_train_batch_end

    def watched(*args: Any) -> None:
        real(*args)
        rounded.append(int(accumulated.rounded_at))

    accumulated.on_train_batch_end = watched  # type: ignore[method-assign]
    trainer(tmp_path, max_steps=2, accumulate_grad_batches=2, limit_val_batches=0).fit(accumulated, datamodule=data())
    assert rounded == [0, 1, 1, 2]


def test_the_relaxed_nll_is_that_of_the_temperature_of_now(tmp_path: Path) -> None:
    L.seed_everything(0)
    model = RelaxedPromptTuning(3, temperature=Temperature(5.0, 0.05), init_logit=3.0, lm=LM, max_new_tokens=1)
    found: list[tuple[float, float]] = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            warm = Softmax().train_vectors(
                pl_module.parameters_,
                pl_module.matrix,
                pl_module.allowed_ids,
                pl_module.temperature.at(trainer.global_step / 4),
            )
            with torch.no_grad():
                wanted = pl_module.lm.score(data().examples("val"), warm).nll.mean().item()
            found.append((trainer.callback_metrics["val/relaxed_nll"].item(), wanted))

    trainer(tmp_path, max_steps=4, val_check_interval=1, callbacks=[Watch()]).fit(model, datamodule=data())
    for value, wanted in found[:4]:
        assert value == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("fluency", [0.0, 0.7])
def test_the_token_gradient_is_the_finite_difference(fluency: float, antonyms: list[Example]) -> None:
    """Of the loss by one-hot rows, which are what the LM reads and, with fluency, what it should have predicted."""
    L.seed_everything(0)
    model = HardPromptSearch(init=FromText(" abc"), candidates=4, top_k=5, fluency=fluency, lm=LM)
    model.configure_model()
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    model.training_step(Batch(antonyms), 0).backward()
    found = model.token_gradient()
    ids = model.token_ids()
    matrix = model.lm.embedding_matrix()

    def loss(rows: torch.Tensor) -> float:
        with torch.no_grad():
            vectors = rows @ matrix
            value = Likelihood()(model.lm.score(antonyms, vectors, with_end=True))
            logits = model.lm.prompt_logits(model._before(), vectors)
            return float(value - fluency * (rows * logits.log_softmax(-1)).sum() / len(rows))

    one_hot = torch.nn.functional.one_hot(ids, model.lm.vocabulary).float()
    for position, token in [(0, 3), (1, 70), (2, 200), (2, int(ids[2]))]:
        step = torch.zeros_like(one_hot)
        step[position, token] = 1e-2
        difference = (loss(one_hot + step) - loss(one_hot - step)) / 2e-2
        assert found[position, token].item() == pytest.approx(difference, rel=0.02, abs=2e-3)


def test_fluency_is_accumulated_like_the_rest_of_the_gradient(tmp_path: Path) -> None:
    """Two halves of a batch, or the batch at once."""
    found = []
    for batch, accumulate in ((8, 1), (4, 2)):
        L.seed_everything(0)
        model = HardPromptSearch(init=FromText(" abc"), candidates=4, top_k=5, fluency=0.7, lm=LM)
        model._search = lambda model=model: (found.append(model.token_gradient()), model._start_over())  # type: ignore[method-assign]
        same = Antonyms(batch_size=batch, max_train_examples=8, val_fraction=0.01, test_fraction=0.01)
        fit = trainer(tmp_path, max_steps=1, limit_val_batches=0, accumulate_grad_batches=accumulate)
        fit.fit(model, datamodule=same)
    assert torch.allclose(found[0], found[1], atol=1e-4)


def test_a_skipped_search_leaves_no_batch_behind(tmp_path: Path) -> None:
    """Mixed precision skips a step whose gradient overflows."""

    class Skips(Precision):
        def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
            return closure()

    model = HardPromptSearch(init=FromText(" abc"), candidates=4, top_k=5, fluency=0.7, lm=LM)
    trainer(tmp_path, max_steps=2, limit_val_batches=0, plugins=[Skips()]).fit(model, datamodule=data())
    assert model._rows == []
    assert not model._fluency_gradient.any()


def test_a_pool_larger_than_what_is_left_has_no_dropped_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_prompts.methods import hard_prompt_search

    L.seed_everything(0)
    real = hard_prompt_search.race

    def one_left(*args: Any) -> torch.Tensor:
        losses = real(*args)
        return torch.where(losses == losses.min(), losses, torch.inf)

    monkeypatch.setattr(hard_prompt_search, "race", one_left)
    model = HardPromptSearch(init=FromText(" ab"), candidates=20, top_k=50, buffer=3, lm=LM, max_new_tokens=1)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, datamodule=data())
    assert len(torch.unique(model.buffer_ids, dim=0)) == 1


def test_a_search_on_the_same_examples_never_gets_worse(tmp_path: Path) -> None:
    L.seed_everything(0)
    losses: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            losses.append(trainer.callback_metrics["train/best_candidate"].item())

    model = HardPromptSearch(init=FromText(" abcd"), candidates=20, top_k=50, buffer=2, lm=LM, max_new_tokens=1)
    same = Antonyms(batch_size=8, max_train_examples=8, val_fraction=0.01, test_fraction=0.01)
    trainer(tmp_path, max_steps=8, limit_val_batches=0, callbacks=[Watch()]).fit(model, datamodule=same)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-3
    rows = model.lm.encode_answers(same.examples("train"), model.embeddings, with_end=True)
    now = Likelihood()(model.lm.score_rows(rows, model.current_prompt()))
    assert losses[-1] == pytest.approx(now.item(), abs=1e-5)


def test_fluency_counts_the_prompt_s_own_likelihood(tmp_path: Path) -> None:
    """With a weight that drowns the task, the search writes what the LM finds likely."""
    L.seed_everything(0)
    found = {}
    for weight in (0.0, 1000.0):
        model = HardPromptSearch(init=FromText(" abcdef"), candidates=40, top_k=200, fluency=weight, lm=LM)
        trainer(tmp_path, max_steps=6, limit_val_batches=0).fit(model, datamodule=data())
        model._rows = model.lm.encode_answers(data().examples("train")[:1], model.embeddings)
        found[weight] = model._prompt_nll(model.buffer_ids[:1]).item()
    assert found[1000.0] < found[0.0] - 0.05


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HardPromptSearch(candidates=0), "candidates must be at least 1, got 0"),
        (lambda: HardPromptSearch(top_k=0), "top_k must be at least 1"),
        (lambda: HardPromptSearch(init=RandomTokens()), "length is needed"),
        (lambda: HardPromptSearch(fluency=-1.0), "fluency must not be negative"),
        (lambda: HardPromptSearch(fluency=float("nan")), "fluency must not be negative"),
        (lambda: HardPromptSearch(memory_mb=0.0), "memory_mb must be above 0"),
        (lambda: RelaxedPromptTuning(memory_mb=0.0), "memory_mb must be above 0"),
        (lambda: RelaxedPromptTuning(0), "length must be at least 1"),
        (lambda: RelaxedPromptTuning(init_logit=-1.0), "init_logit must not be negative"),
        (lambda: PrefixTuning(0), "length must be at least 1"),
        (lambda: PrefixMLP(0, 3), "must be at least 1"),
        (lambda: ScratchTransformer(width=30, heads=4), "even multiple of heads"),
        (lambda: LoraTuning(rank=0), "rank must be at least 1"),
        (lambda: Rounding(top_k=0), "rounding.top_k must be at least 1"),
        (lambda: FewShot(0), "shots must be at least 1"),
        (lambda: ChainOfThought(reasoning_tokens=0), "reasoning_tokens must be at least 1"),
        (lambda: ChainOfThought(reasoning_stop="("), r"reasoning_stop '\(' is not a regular expression"),
        (lambda: ChainOfThought(reasoning_stop=""), "reasoning_stop is empty"),
        (lambda: ResidualMLP(-1), "reparametrization.hidden must be at least 1, got -1"),
        (lambda: BertScoreLoss(estimator=Argmax()), r"objective\.estimator Argmax\(\) passes no gradient"),
        (lambda: Budget(tokens=0), "budget.tokens must be above 0"),
    ],
)
def test_settings_are_checked_at_once(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HardPromptSearch(top_k=999, lm=LM), r"top_k \(999\) is more than the 256 tokens"),
        (lambda: LoraTuning(target_modules=["nothing"], lm=LM), "target_modules"),
        (lambda: RelaxedPromptTuning(rounding=Rounding(top_k=999), lm=LM), r"rounding.top_k \(999\) is more than"),
        (lambda: PrefixTuning(300, lm=LMConfig(SHAPES["gpt2"])), r"length \(300\) leaves no room in the context"),
    ],
)
def test_settings_that_the_model_decides_on(make: Callable[[], PromptMethod], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make().configure_model()


def test_when_all_candidates_are_filtered_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prompts.methods import hard_prompt_search

    model = MAKE["search"]()
    model.configure_model()
    monkeypatch.setattr(hard_prompt_search, "round_trips", lambda lm, ids: torch.zeros(len(ids), dtype=torch.bool))
    with pytest.raises(UserError, match="all candidates of step 0 were filtered out"):
        trainer(tmp_path).fit(model, datamodule=data())


def test_when_no_candidate_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prompts.methods import hard_prompt_search

    model = MAKE["search"]()
    model.configure_model()
    monkeypatch.setattr(hard_prompt_search, "top_tokens", lambda *args: model.buffer_ids[0][:, None])
    with pytest.raises(UserError, match="step 0: none of the candidates differs from the prompt"):
        trainer(tmp_path).fit(model, datamodule=data())


def test_a_start_that_is_no_text_is_refused() -> None:
    bad = HardPromptSearch(length=40, init=RandomTokens(), lm=LM)  # bytes that are no characters
    L.seed_everything(0)
    with pytest.raises(UserError, match="becomes other tokens when it is tokenised again"):
        bad.configure_model()
    HardPromptSearch(length=40, init=RandomTokens(), filter=False, lm=LM).configure_model()


# --- baselines -------------------------------------------------------------------------------------------------------


def test_few_shot_puts_solved_training_examples_in_front(tmp_path: Path) -> None:
    model, module = FewShot(2, text=" opposites", lm=LM, max_new_tokens=2), data()
    asked: list[str] = []

    class Watch(L.Callback):
        def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            asked.extend(example.before for example in pl_module.prepare(module.examples("test")))

    trainer(tmp_path, callbacks=[Watch()]).test(model, datamodule=module, verbose=False)
    texts = {
        f"Here are two opposites {row.fields['question']} and {row.reference}.\n" for row in module.examples("train")
    }
    assert len(asked) == len(module.examples("test"))
    for before in asked:
        first, second, rest = before.split("\n")
        assert {first + "\n", second + "\n"} <= texts
        assert first != second
        assert rest == "Here are two"
    assert model.added_tokens() == len(asked[0]) - len("Here are two"), "a byte is a token here"


def test_few_shot_draws_solved_examples() -> None:
    train = [Example("", f"{n}", None if n % 2 else f"{n}") for n in range(6)]
    assert {example.answer for example in draw_shots(train, 3)} == {"0", "2", "4"}
    with pytest.raises(UserError, match=r"shots \(4\) is more than the 3 training examples with an answer"):
        draw_shots(train, 4)


def test_few_shot_asks_for_more_than_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shots \(21\) is more than the 20 training examples with an answer"):
        trainer(tmp_path).test(FewShot(21, lm=LM), datamodule=data(), verbose=False)


def test_chain_of_thought_thinks_first_and_answers_after_it(real: FrozenLM) -> None:
    model = ChainOfThought(text="", reasoning_tokens=8)
    model.lms = {model.lm_config: real}
    model.build_prompt()
    example = Template("{prompt}Q: {question}\nA:{answer}").render({"question": "What is 2+2?", "answer": "4"})
    (prepared,) = model.prepare([example])
    thought = real.generate(
        [Template("{prompt}Q: {question}\nA:\nLet's think step by step.{answer}", stop=r"\n\n").render(example.fields)],
        torch.empty(0, real.width),
        8,
    )[0]
    assert len(thought) > 5
    assert prepared.after == f"Q: What is 2+2?\nA:\nLet's think step by step. {thought}\nTherefore, the answer is"
    assert prepared.answer == " 4"
    assert prepared.stop == example.stop
    row = model.evaluate([example], model.current_prompt())[0]
    assert row["question"] == "What is 2+2?"
    assert row["nll"] == pytest.approx(real.score([prepared], model.current_prompt()).nll.item(), abs=1e-5)


def test_an_answer_after_a_thought_starts_as_elsewhere() -> None:
    model = ChainOfThought(text="", lm=LM)
    model.lms = {LM: cast("Any", SimpleNamespace(generate=lambda *_: [" So it is."]))}
    for chat in (False, True):
        example = Template("{prompt}Q: {question}\nA: {answer}", chat=chat).render({"question": "?", "answer": "4"})
        (prepared,) = model.prepare([example])
        assert prepared.answer == example.answer == ("4" if chat else " 4")


def test_lora_starts_as_the_model_itself_and_moves_away(tmp_path: Path) -> None:
    model = LoraTuning(rank=2, lm=LM, max_new_tokens=1)
    model.configure_model()
    rows = data().examples("test")[:4]
    plain = FrozenLM.load(LM)
    empty = torch.empty(0, plain.width)
    assert torch.allclose(model.lm.score(rows, empty).nll, plain.score(rows, empty).nll, atol=1e-5)
    assert all(value.dtype == torch.float32 for value in model.trainable_parameters())
    assert len(model.trainable_parameters()) == 2 * 7 * 3  # two matrices for each linear layer
    trainer(tmp_path, limit_val_batches=0).fit(model, datamodule=data())
    assert not torch.allclose(model.lm.score(rows, empty).nll, plain.score(rows, empty).nll, atol=1e-5)


def test_a_transformer_from_scratch_starts_as_the_seed_says() -> None:
    weights = []
    for seed in (0, 1, 1):
        L.seed_everything(seed)
        model = ScratchTransformer(2, 16, 2)
        model.configure_model()
        weights.append(torch.cat([value.flatten() for value in model.trainable_parameters()]))
        head, table = model.lm.model.get_output_embeddings().weight, model.lm.model.get_input_embeddings().weight
        assert head is table
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)
    assert torch.equal(weights[1], weights[2])


def test_a_transformer_from_scratch_may_have_the_lms_tokens(tmp_path: Path, real: FrozenLM) -> None:
    model = ScratchTransformer(1, 16, 2, tokens="lm", max_new_tokens=1)
    trainer(tmp_path, limit_val_batches=0).fit(model, datamodule=data())
    assert model.lm.vocabulary == len(real.tokenizer)
    assert model.lm.encoder.tokens(" antonyms") == real.encoder.tokens(" antonyms")


@pytest.mark.parametrize("end", ["A", None])
def test_a_transformer_from_scratch_ends_where_the_lms_tokenizer_does(
    end: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = end
    monkeypatch.setattr("lightning_prompts.methods.scratch_transformer.load_tokenizer", lambda _: tokenizer)
    model = ScratchTransformer(1, 16, 2, tokens="lm")
    model.configure_model()
    assert model.lm.end_tokens() == ({tokenizer.eos_token_id} if end else set())
    assert cast("torch.nn.Embedding", model.lm.model.get_input_embeddings()).padding_idx is None


def test_a_transformer_from_scratch_learns_addition(tmp_path: Path) -> None:
    L.seed_everything(0)
    task = Addition(max_digits=1, ood_digits=[2], train_size=60, val_size=10, test_size=10, batch_size=30)
    model = ScratchTransformer(2, 64, 2, max_new_tokens=3, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    before = trainer(tmp_path).test(model, datamodule=task, verbose=False)
    trainer(tmp_path, max_steps=60, limit_val_batches=0).fit(model, datamodule=task)
    after = {
        key: value
        for part in trainer(tmp_path).test(model, datamodule=task, verbose=False)
        for key, value in part.items()
    }
    assert after["test/nll"] < before[0]["test/nll"] / 2
    assert "test/2_digits/exact_match" in after


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"tokens": 500}, {"seconds": 1e-9}])
def test_a_budget_stops_training_where_it_is_used_up(limit: dict[str, float], tmp_path: Path) -> None:
    L.seed_everything(0)
    model = SoftPromptTuning(3, lm=LM, max_new_tokens=1)
    budget = Budget(**limit)
    fit = trainer(tmp_path, max_steps=200, max_epochs=100, callbacks=[budget], limit_val_batches=0)
    fit.fit(model, datamodule=data())
    counts = json.loads((tmp_path / "budget.json").read_text())
    assert counts["steps"] == fit.global_step < 100
    if "tokens" in limit:
        per_step = counts["tokens"] / counts["steps"]
        assert 500 <= counts["tokens"] < 500 + 2 * per_step
        assert fit.optimizers[0].param_groups[0]["lr"] < 2e-3, "the learning rate has fallen"
    else:
        assert counts["steps"] == 1


def test_a_limit_of_memory_is_one_of_this_process(tmp_path: Path) -> None:
    """A peak before a resume is in the counts, and does not stop the run."""
    budget = Budget(memory_gb=1000)
    budget.load_state_dict({"memory_gb": 2000.0})
    fit = trainer(tmp_path, max_steps=3, callbacks=[budget], limit_val_batches=0)
    fit.fit(SoftPromptTuning(3, lm=LM, max_new_tokens=1), datamodule=data())
    assert fit.global_step == 3
    assert budget.used["memory_gb"] == 2000


def test_a_resumed_run_goes_on_with_its_budget(tmp_path: Path) -> None:
    """Tokens and learning rate: the decay follows the budget here, which ends long before the epochs do."""
    prompts = []
    for folder, resume in (("whole", None), ("rest", tmp_path / "whole" / "checkpoints" / "step=3.ckpt")):
        L.seed_everything(3)
        model = SoftPromptTuning(3, lm=LM, max_new_tokens=1)
        saves = ModelCheckpoint(
            tmp_path / folder / "checkpoints", save_top_k=-1, every_n_train_steps=1, filename="{step}"
        )
        fit = trainer(
            tmp_path / folder,
            callbacks=[saves, budget := Budget(tokens=450)],
            enable_checkpointing=True,
            max_epochs=100,
            max_steps=-1,
            limit_val_batches=0,
        )
        fit.fit(model, datamodule=data(), ckpt_path=resume, weights_only=True)
        prompts.append((fit.global_step, budget.used["tokens"], model.current_prompt().tolist()))
    assert prompts[0] == prompts[1]
    assert prompts[0][0] > 4
