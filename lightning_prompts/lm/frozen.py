"""The frozen language model, which embeds, scores and generates.

Training losses, evaluation, candidate scores and rewards use the same scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_prompts.errors import UserError
from lightning_prompts.lm.config import Attention, LMConfig, Switch
from lightning_prompts.lm.encoding import Encoder, Row, check_fits
from lightning_prompts.lm.generation import Ending, generate_tokens
from lightning_prompts.lm.key_values import KeyValues, Prompt, ahead_of, prompt_length, same_for_all, slot_length
from lightning_prompts.lm.labels import rows_of_a_pass
from lightning_prompts.lm.language_model import Continuation, LabelSums, LanguageModel, Scored
from lightning_prompts.lm.layout import KVCache
from lightning_prompts.lm.loading import context_window, load_model
from lightning_prompts.lm.packed import PackedLM
from lightning_prompts.lm.passes import ContinuationScorer
from lightning_prompts.lm.plan import Plan, build_prefix_tree
from lightning_prompts.lm.sampling import Sampling
from lightning_prompts.lm.scores import Scores, answer_scores
from lightning_prompts.lm.transfer import to_device
from lightning_prompts.template import cut
from lightning_prompts.types import Example


class FrozenLM(PackedLM, LanguageModel):
    """A causal language model that never changes, and its tokenizer; see `PackedLM` for how it is run.

    Args:
        model: A causal LM of transformers with the attention of this project.
        tokenizer: The tokenizer of the model.
        name: Name of the model in messages and checkpoints.
        attention: See `LMConfig`.
        graphs: See `LMConfig`.
        compile: See `LMConfig`.
    """

    scores_together = True
    texts_at_once = 64

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        attention: Attention = "auto",
        graphs: bool = True,
        compile: Switch = "auto",
    ) -> None:
        """Wrap a loaded model; see `load`."""
        super().__init__(model, name, attention, graphs, compile)
        self.tokenizer = tokenizer
        text_config = model.config.get_text_config()
        self.width = int(text_config.hidden_size)
        self.layers = int(text_config.num_hidden_layers)
        self.context = context_window(model.config, name)
        self.vocabulary = len(self._embedding_weight())
        self.encoder = Encoder(tokenizer, name, self.vocabulary)
        self._matrix: Tensor | None = None
        self._scorers: dict[float, ContinuationScorer] = {}  # by the megabytes of a pass

    @classmethod
    def load(
        cls,
        config: LMConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
    ) -> FrozenLM:
        """Load a model.

        Args:
            config: Settings of the model.
            tokenizer: Replaces the tokenizer of the model, unless ``None``.
            device: Device of the weights, which are read directly onto it; ``None`` for torch's default device.

        Raises:
            UserError: The model is behind a server; or see `lightning_prompts.lm.loading.load_model`.
        """
        if config.server is not None:
            raise UserError(
                f"{config.name} is behind a server ({config.server.base_url}), which provides texts but no vectors or "
                "gradients; remove server to load the model itself"
            )
        model, own = load_model(config, device)
        return cls(model, tokenizer or own, config.name, config.attention, config.graphs, config.compile)

    def renewed(self, config: LMConfig) -> FrozenLM:
        """The same weights and tokenizer in a `FrozenLM` that was never used; this one has no model afterwards.

        Args:
            config: What this LM was loaded with.
        """
        self.unfuse()
        self._head_hook.remove()
        model = self.model
        del self.model
        return FrozenLM(model, self.tokenizer, config.name, config.attention, config.graphs, config.compile)

    def describe(self) -> str:
        """Return name, precision and size as text."""
        frozen = sum(parameter.numel() for parameter in self.parameters() if not parameter.requires_grad)
        return f"{self.name} in {str(self.model.dtype).removeprefix('torch.')}: {frozen:,} parameters, frozen"

    def connect(self) -> None:
        """See `LanguageModel`."""

    def identity(self, config: LMConfig) -> str:
        """See `LanguageModel`.

        The precision is the one that was loaded: what ``auto`` stands for depends on the machine.
        """
        return repr((config.name, config.revision, str(self.model.dtype), config.quantization or "none"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLM:
        """Move or cast the weights, and free the copy of the embeddings, which would stay on the device."""
        if not self.stays:
            self._matrix = None
        super()._apply(fn, recurse)
        return self

    # --- embeddings -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embedding_matrix(self) -> Tensor:
        """Return E, the embeddings ``[V, D]`` of the vocabulary in the LM's dtype; cached, do not modify."""
        if self._matrix is None or self._matrix.device != self.device:
            self._matrix = self.embed(torch.arange(self.vocabulary, device=self.device))
        return self._matrix

    def token_ids(self, text: str) -> Tensor:
        """Tokenise a piece of text into ids ``[P]`` on the LM's device; ``P`` may be 0."""
        return to_device(torch.tensor(self.encoder.tokens(text), dtype=torch.long, device="cpu"), self.device)

    def embed_text(self, text: str) -> Tensor:
        """Embed a piece of text as vectors ``[P, D]`` in the LM's dtype."""
        return self.embed(self.token_ids(text))

    def text_vectors(self, text: str) -> Tensor:
        """See `LanguageModel`."""
        return self.embed_text(text).float()

    def _vectors(self, prompt: Prompt | str) -> Prompt:
        return self.embed_text(prompt) if isinstance(prompt, str) else prompt

    def no_prompt(self) -> Tensor:
        """Return an empty prompt, ``[0, D]``."""
        return torch.empty(0, self.width, device=self.device)

    @torch.no_grad()
    def nearest_tokens(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Find the tokens of the vocabulary with the highest cosine similarity to vectors.

        Args:
            vectors: ``[P, D]``.

        Returns:
            Token ids ``[P]`` and cosine similarities ``[P]``.
        """
        matrix = functional.normalize(self.embedding_matrix().float(), dim=-1)
        similarity, ids = (functional.normalize(vectors.float(), dim=-1) @ matrix.T).max(-1)
        return ids, similarity

    def text(self, ids: Tensor | list[int], special: bool = True) -> str:
        """Decode token ids as they read inside a text; ``special`` decides whether to include special tokens."""
        return self.encoder.text(ids.tolist() if isinstance(ids, Tensor) else ids, special)

    # --- encoding ---------------------------------------------------------------------------------------------------

    def encode(self, examples: Sequence[Example], length: int, with_end: bool = False, ahead: int = 0) -> list[Row]:
        """Encode examples around a prompt.

        Args:
            examples: ``B`` examples.
            length: Tokens of the prompt slot.
            with_end: Whether to include the text after the answers.
            ahead: Keys and values before all tokens, which count towards the context window.

        Raises:
            UserError: See `Encoder.row`; or a row is longer than the context window.
        """
        rows = [self.encoder.row(example, length, with_end) for example in examples]
        for example, row in zip(examples, rows, strict=True):
            self.check_fits(example, ahead + len(row.context) + len(row.answer) + len(row.end), length + ahead)
        return rows

    def check_fits(self, example: Example, total: int, length: int) -> None:
        """Raise a `UserError` if ``total`` tokens, ``length`` of them the prompt, exceed the context window."""
        check_fits(example, total, length, self.name, self.context)

    def check_examples(self, examples: Sequence[Example], length: int, ahead: int = 0) -> None:
        """See `LanguageModel`; only examples that might exceed the context window are tokenised."""
        for example in examples:
            if example.chat or ahead + length + 64 + _bytes(example) > self.context:
                self.encode([example], length, with_end=True, ahead=ahead)
        self.encoder.warn_of_losses(examples)

    @torch.no_grad()
    def key_values(self, vectors: Tensor) -> KeyValues:
        """Compute the LM's keys and values of vectors ``[P, D]`` at the start of a text."""
        cache = KVCache(len(vectors))
        embeddings, layout = self.pack([[[-1 - p for p in range(len(vectors))]]], vectors, cache)
        self.logits(embeddings, layout, layout.last)
        self.usage.calls += 1
        own = KeyValues([cache.rows[layer] for layer in sorted(cache.rows)])
        return own if self.shards is None else self.shards.all_heads(own)

    def prompt_logits(self, before: list[int], vectors: Tensor) -> Tensor:
        """Compute the logits ``[P, V]`` that predict each of ``P`` consecutive vectors, differentiable in the vectors.

        Args:
            before: Token ids before the vectors, at least one.
            vectors: ``[P, D]``.
        """
        slot = [-1 - p for p in range(len(vectors) - 1)]  # the last vector predicts nothing
        embeddings, layout = self.pack([[before + slot]], vectors)
        self.usage.calls += 1
        return self.logits(embeddings, layout, range(len(before) - 1, len(before) + len(slot)))

    def score(self, examples: Sequence[Example], prompt: Prompt, with_end: bool = False) -> Scores:
        """Compute the teacher-forced log-likelihood of the reference answers, differentiable in the prompt.

        Args:
            examples: ``B`` examples with answers.
            prompt: Vectors in the prompt slot, ``[P, D]`` for all examples or ``[B, P, D]`` with one prompt per
                example; ``P`` may be 0. Or keys and values before all tokens, with an empty prompt slot. Gradients
                equal those of repeating the prompt in every row.
            with_end: Whether to score the text after the answers.

        Returns:
            The scores, on the LM's device.

        Raises:
            UserError: An example has no answer, or see `encode`.
        """
        return self.score_rows(self.encode_answers(examples, prompt, with_end), prompt)

    def score_rows(self, rows: Sequence[Row], prompt: Prompt, group: int | None = None) -> Scores:
        """Score encoded rows with answers; see `score` and `answer_logits`."""
        return answer_scores(self.answer_logits(rows, prompt, group), rows)

    def answer_logits(self, rows: Sequence[Row], prompt: Prompt, group: int | None = None) -> Tensor:
        """Compute float32 logits ``[N, V]`` that predict the answer and end tokens, in the order of the rows.

        Args:
            rows: ``B`` rows.
            prompt: See `score`.
            group: Number of consecutive rows with a longer common prefix than all rows have (a candidate prompt on
                several examples, or an example with several prompts). The common prefix runs once per group.
        """
        groups = [] if group is None else [group]
        return self.plan_logits(Plan.of_answers(rows, groups, same_for_all(prompt)), prompt)

    def plan_logits(self, plan: Plan, prompt: Prompt) -> Tensor:
        """Compute float32 logits ``[N, V]`` at the places of a plan, in one pass."""
        embeddings, layout = self.pack(plan.levels, prompt, rows=plan.rows)
        spots: list[int] = []
        for level, places in plan.heads:
            brought = layout.brought[level]
            assert brought is not None
            spots += (brought.offset + places).tolist()
        logits = self.logits(embeddings, layout, spots)
        self.usage.calls += plan.continuations  # after the pass, so that a retry after out-of-memory counts once
        return logits

    def continuation_scores(
        self,
        contexts: Sequence[list[int]],
        continuations: Sequence[Sequence[Sequence[int]]],
        prompt: Prompt,
        groups: Sequence[int] = (),
    ) -> Tensor:
        """Compute log-probabilities of continuations of ``N`` contexts, differentiable in the prompt.

        Each context runs once.

        Args:
            contexts: Token ids, at least one each, with ``-1 - p`` for position ``p`` of the prompt.
            continuations: For each context, the token ids of its continuations, at least one token each.
            prompt: See `score`.
            groups: Sizes of nested groups of consecutive contexts with a longer common prefix, from large to small;
                each size divides the one before. A common prefix runs once per group.

        Returns:
            Log-probabilities in nats, float32, summed over the tokens of each continuation, in the order of the
            contexts.
        """
        plan = Plan.of(contexts, continuations, groups, same_for_all(prompt))
        return plan.log_probs(self.plan_logits(plan, prompt))

    def hidden_states(self, rows: Sequence[list[int]], prompt: Prompt, layer: int = -1) -> list[Tensor]:
        """Compute the LM's hidden states at all tokens of texts, differentiable in the prompt.

        Args:
            rows: Token ids of ``B`` texts, with ``-1 - p`` for position ``p`` of the prompt.
            prompt: See `score`.
            layer: 0 for the embeddings, ``k`` below ``L`` for the output of layer ``k``, ``L`` or -1 for the output of
                the last layer after the norm.

        Returns:
            ``[T, D]`` for each text, in the LM's dtype.
        """
        levels = build_prefix_tree(rows, rows, [len(rows)], same_for_all(prompt))
        embeddings, layout = self.pack(levels, prompt, static=False)
        output = self.run(embeddings, layout, torch.empty(0, dtype=torch.long, device=self.device), states=True)
        self.usage.calls += len(rows)
        states = output.hidden_states[layer][0]
        shared, *own = states.split([len(levels[0][0]), *map(len, levels[1])])
        return [torch.cat([shared, part]) for part in own]

    def encode_answers(self, examples: Sequence[Example], prompt: Prompt, with_end: bool = False) -> list[Row]:
        """Encode examples for scoring with a prompt.

        Raises:
            UserError: An example has no answer, or see `encode`.
        """
        for example in examples:
            if example.answer is None:
                raise UserError(f"{example.source or 'example'} has no answer to score; use predict for it")
        return self.encode(examples, slot_length(prompt), with_end, ahead_of(prompt))

    @torch.no_grad()
    def generate(
        self, examples: Sequence[Example], prompt: Prompt | str, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[str]:
        """See `LanguageModel`; keys and values are cached, and texts end where the context window does."""
        prompt = self._vectors(prompt)
        questions = [replace(example, answer=None) for example in examples]
        rows = self.encode(questions, slot_length(prompt), ahead=ahead_of(prompt))
        stops = [example.stop for example in examples]
        tokens = self.generate_tokens(rows, prompt, max_new_tokens, stops, sampling)
        return [cut(self.text(ids, special=False), example.stop) for ids, example in zip(tokens, examples, strict=True)]

    @torch.no_grad()
    def generate_tokens(
        self,
        rows: Sequence[Row],
        prompt: Prompt,
        max_new_tokens: int,
        stops: Sequence[str] | None = None,
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """Generate token ids after the context of each row, without the end token.

        If memory runs out, the rows are generated in halves, with the same result.

        Args:
            rows: ``B`` rows.
            prompt: See `score`.
            max_new_tokens: Maximum number of tokens per row; fewer at the end of the context window.
            stops: Regular expression of each row that ends it early; the matched text is kept. ``None`` for none.
            sampling: How to sample; ``None`` for greedy decoding.
        """
        return generate_tokens(self, rows, prompt, self.ending(rows, prompt, max_new_tokens, stops), sampling)

    def ending(
        self, rows: Sequence[Row], prompt: Prompt, max_new_tokens: int, stops: Sequence[str] | None = None
    ) -> Ending:
        """Return the stopping criteria of `generate_tokens`, which has the same arguments."""
        ahead = ahead_of(prompt)
        limits = [min(max_new_tokens, self.context - ahead - len(row.context)) for row in rows]
        patterns = [None] * len(rows) if stops is None else stops
        return Ending(limits, patterns, self.end_tokens(), self.text)

    def end_tokens(self) -> set[int]:
        """Return the tokens that end a text or the model's turn in a chat."""
        ends = {self.tokenizer.eos_token_id, self.encoder.turn_end}
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ends.update(configured if isinstance(configured, list) else [configured])
        return {int(end) for end in ends if end is not None}

    # --- texts and their scores; see `LanguageModel` ----------------------------------------------------------------

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def count(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.encoder.tokens(text))

    def length(self, example: Example) -> int:
        """Number of tokens of an example's context with an empty prompt."""
        return len(self.encoder.row(replace(example, answer=None), 0).context)

    def continuation(self, text: str) -> tuple[int, ...]:
        """See `LanguageModel`."""
        return tuple(self.encoder.tokens(text))

    def label_texts(self, example: Example) -> Sequence[tuple[Continuation, int]]:
        """See `LanguageModel`."""
        known = self.encoder.label_tokens(example)
        return list(zip(known.tokens, known.owners, strict=True))

    def check_texts(
        self, examples: Sequence[Example], prompts: Sequence[str], texts: Sequence[Sequence[Continuation]]
    ) -> None:
        """See `LanguageModel`."""
        length = max(self.count(prompt) for prompt in prompts)
        for example, several in zip(examples, texts, strict=True):
            longest = max(map(len, several))
            total = len(self.encoder.row(example, 1).context) - 1 + length + longest
            self.check_fits(example, total, length)
            if total == longest:
                raise UserError(
                    f"{example.source or 'example'}: nothing precedes the answer; give the template some text"
                )

    def text_scores(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        texts: Sequence[Sequence[Continuation]],
        block: int = 1,
        memory_mb: float = 256.0,
    ) -> list[list[list[Scored]]]:
        """See `LanguageModel`; each context is run once for all its texts."""
        ids = [self.encoder.tokens(prompt) for prompt in prompts]
        tokens = [[self.continuation(text) if isinstance(text, str) else text for text in several] for several in texts]
        scorer = self._scorers.setdefault(memory_mb, ContinuationScorer(self, memory_mb))
        found: dict[int, list[list[float]]] = {}
        # A row around an empty prompt has no slot: some tokenizers read the text differently at its start.
        for slot in (0, 1):
            places = [place for place, prompt in enumerate(ids) if bool(prompt) == slot]
            if places:
                rows = [self.encoder.row(example, slot) for example in examples]
                lines = scorer.score(rows, [ids[place] for place in places], tokens, block)
                found.update(zip(places, lines, strict=True))
        return [
            [
                [(value, len(text)) for value, text in zip(*pair, strict=True)]
                for pair in zip(found[place], tokens, strict=True)
            ]
            for place in range(len(ids))
        ]

    def answer_nll(self, examples: Sequence[Example], prompt: Prompt | str) -> list[float | None]:
        """See `LanguageModel`."""
        nll: list[float | None] = self.score(examples, self._vectors(prompt)).nll.tolist()
        return nll

    @torch.no_grad()
    def label_sums(self, examples: Sequence[Example], prompt: Prompt | str) -> LabelSums:
        """See `LanguageModel`; one pass takes all examples, or as many as `rows_of_a_pass` allows."""
        prompt = self._vectors(prompt)
        labels = [self.encoder.label_tokens(example) for example in examples]
        length = prompt_length(prompt)
        ahead = length - slot_length(prompt)
        rows = self.encode(examples, slot_length(prompt), ahead=ahead)
        for example, known, row in zip(examples, labels, rows, strict=True):
            self.check_fits(example, ahead + len(row.context) + max(map(len, known.tokens)), length)
        continuations = [
            [*known.tokens, *([row.answer] if row.answer else [])] for known, row in zip(labels, rows, strict=True)
        ]
        size = rows_of_a_pass(labels, self.vocabulary)
        passes = []
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            own = prompt[part] if isinstance(prompt, Tensor) and prompt.dim() == 3 else prompt
            passes.append(self.continuation_scores([row.context for row in rows[part]], continuations[part], own))
        parts = torch.cat(passes).split([len(several) for several in continuations])
        last = torch.stack([part[-1] for part in parts]).tolist()  # the answer's, if there is one
        return LabelSums(
            [part[: len(known.tokens)] for part, known in zip(parts, labels, strict=True)],
            [known.owners for known in labels],
            [-value / len(row.answer) if row.answer else None for value, row in zip(last, rows, strict=True)],
        )


def _bytes(example: Example) -> int:
    """Upper bound on the tokens of an example, for a byte-level tokenizer."""
    return len(f"{example.before}{example.after}{example.answer or ''}{example.end or ''}".encode())
