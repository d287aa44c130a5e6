"""The frozen language model: the one place that embeds, scores and generates.

Training loss, evaluation, candidate scores and rewards all come from `FrozenLM.score`.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_prompts.errors import UserError
from lightning_prompts.lm.attention import ATTENTION_NAME, Layout, RowMemory
from lightning_prompts.lm.config import LMConfig
from lightning_prompts.lm.encoding import Encoder, Row, check_fits, share
from lightning_prompts.lm.finite import first_not_finite
from lightning_prompts.lm.key_values import KeyValues, Prompt, slot_length
from lightning_prompts.lm.loading import load_model
from lightning_prompts.lm.memory import out_of_memory
from lightning_prompts.lm.sampling import Sampling
from lightning_prompts.lm.sharding import Shards, shard
from lightning_prompts.lm.usage import Usage
from lightning_prompts.template import cut
from lightning_prompts.types import Example

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """How well answers follow from a prompt.

    Attributes:
        nll: Mean negative log-likelihood of each example's answer tokens, in nats, ``[B]`` float32.
        tokens: Answer tokens of each example, ``[B]``.
        greedy: Whether every answer token is the LM's first choice, ``[B]`` bool.
        end_nll: Mean negative log-likelihood of what follows the answer, in nats, ``[B]``; 0 where not asked for.
        mean_tokens: Answer tokens per example of the whole batch, where these are one process's part of it.
    """

    nll: Tensor
    tokens: Tensor
    greedy: Tensor
    end_nll: Tensor
    mean_tokens: float | None = None


class FrozenLM(nn.Module):
    """A causal language model that never changes.

    It has no trainable parameter, stays in eval mode whatever the trainer does, and contributes nothing to checkpoints.

    Args:
        model: A transformers causal LM that runs with this project's attention.
        tokenizer: Its tokenizer.
        name: What to call it in messages and checkpoints.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """Wrap a loaded model; see `load`."""
        super().__init__()
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)
        self.usage = Usage()  # by this process
        text_config = model.config.get_text_config()
        self.width = int(text_config.hidden_size)
        self.layers = int(text_config.num_hidden_layers)
        self.context = int(getattr(text_config, "max_position_embeddings", None) or 1 << 30)
        self.vocabulary = len(self._embedding_weight())
        self._head_rows: Tensor | None = None
        self._overflow_told = False
        self.shards: Shards | None = None  # where the weights are spread over processes
        self._matrix: Tensor | None = None
        head = model.get_output_embeddings()
        if head is None:
            raise UserError(f"model {name!r} has no language-model head")
        head.register_forward_pre_hook(self._keep_head_rows)
        self.register_load_state_dict_post_hook(_nothing_missing)  # type: ignore[no-untyped-call]
        self.train(False)

    @classmethod
    def load(cls, config: LMConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> FrozenLM:
        """Load the model that ``config`` names, with another tokenizer if one is given.

        Raises:
            UserError: See `lightning_prompts.lm.loading.load_model`.
        """
        if config.server is not None:
            raise UserError(
                f"{config.name} is behind a server ({config.server.base_url}), which gives texts and no vectors or "
                "gradients; leave out server, so that the model itself is loaded"
            )
        model, own = load_model(config)
        return cls(model, tokenizer or own, name=config.name)

    @property
    def tokens_forwarded(self) -> int:
        """Prompt, text and answer tokens run through the model, by this process."""
        return self.usage.tokens

    def describe(self) -> str:
        """Name, precision and size."""
        frozen = sum(parameter.numel() for parameter in self.parameters() if not parameter.requires_grad)
        return f"{self.name} in {str(self.model.dtype).removeprefix('torch.')}: {frozen:,} parameters, frozen"

    def spread_over(self, mesh: DeviceMesh) -> None:
        """Spread the weights over processes, all of which call this; see `lightning_prompts.lm.sharding`.

        Args:
            mesh: With dimensions ``data_parallel`` and ``tensor_parallel``.

        Raises:
            UserError: The model cannot be split like that.
        """
        shard(self.model, mesh, self.name)
        self.shards = Shards(mesh, self._idle)

    def meet(self) -> None:
        """Wait until no other process needs this one for a pass; before anything else that processes do together."""
        if self.shards is not None and self.shards.lockstep is not None:
            self.shards.lockstep.wait()

    def _idle(self) -> None:
        """A pass for the others' sake, which is not counted."""
        start = torch.zeros(1, dtype=torch.long, device=self.device)
        usage = self.usage + Usage()
        self._run(self.embed(start), Layout([[1]], self.device), start)
        self.usage = usage

    def _embedding_weight(self) -> Tensor:
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._embedding_weight().device

    def train(self, mode: bool = True) -> FrozenLM:
        """Stay in eval mode: dropout in a frozen model would only add noise."""
        del mode
        super().train(False)
        for module in self.model.modules():
            # transformers checkpoints gradients in training mode only. The flag of the layer alone turns no dropout on:
            # what is inside of the layer stays in eval mode.
            if getattr(module, "gradient_checkpointing", False) and isinstance(module, GradientCheckpointingLayer):
                module.training = True
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # noqa: ANN401 - nn.Module's own signature
        """Nothing: the weights are named by the run's config, so a checkpoint stays small."""
        return kwargs.get("destination") or (args[0] if args else {})

    # --- embeddings -------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids, ``[...]`` -> ``[..., D]``, as the model's own embedding layer scales them."""
        return self.model.get_input_embeddings()(ids)  # type: ignore[no-any-return]

    @torch.no_grad()
    def embedding_matrix(self) -> Tensor:
        """E, the embeddings of the whole vocabulary, ``[V, D]`` in the LM's dtype; made once, not to be changed."""
        if self._matrix is None or self._matrix.device != self.device:
            self._matrix = self.embed(torch.arange(self.vocabulary, device=self.device))
        return self._matrix

    @torch.no_grad()
    def nearest_tokens(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The vocabulary tokens most similar to some vectors.

        Args:
            vectors: ``[P, D]``.

        Returns:
            Token ids ``[P]`` and cosine similarities ``[P]``.
        """
        matrix = functional.normalize(self.embedding_matrix().float(), dim=-1)
        similarity, ids = (functional.normalize(vectors.float(), dim=-1) @ matrix.T).max(-1)
        return ids, similarity

    def text(self, ids: Tensor | list[int], special: bool = True) -> str:
        """Token ids as text, special tokens included unless told otherwise."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=not special))

    # --- encoding ---------------------------------------------------------------------------------------------------

    def encode(self, examples: Sequence[Example], length: int, with_end: bool = False, ahead: int = 0) -> list[Row]:
        """Token ids of examples around a prompt.

        Args:
            examples: ``B`` examples.
            length: Places of the prompt slot.
            with_end: Encode what follows the answers, too.
            ahead: Keys and values in front of everything, which take places of the context window.

        Raises:
            UserError: See `Encoder.row`; or a row is longer than the context window.
        """
        rows = [self.encoder.row(example, length, with_end) for example in examples]
        for example, row in zip(examples, rows, strict=True):
            self.check_fits(example, ahead + len(row.context) + len(row.answer) + len(row.end), length + ahead)
        return rows

    def check_fits(self, example: Example, total: int, length: int) -> None:
        """Raise a `UserError` if ``total`` tokens, ``length`` of them the prompt, are more than the context window."""
        check_fits(example, total, length, self.name, self.context)

    def check_lengths(self, examples: Sequence[Example], length: int, ahead: int = 0) -> None:
        """Raise a `UserError` if an example does not fit the context window, tokenising only those that might not."""
        for example in examples:
            if example.chat or ahead + length + 64 + _bytes(example) > self.context:
                self.encode([example], length, with_end=True, ahead=ahead)

    # --- running the model ------------------------------------------------------------------------------------------

    def _keep_head_rows(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Hand the LM head only the positions asked for, ``[1, M, D]`` -> ``[N, D]``.

        A hook and not a slice of the logits, because the vocabulary makes the head the widest layer; a hook and not a
        head call of our own, because architectures scale and cap their logits after it.
        """
        del head
        if self._head_rows is None:
            return None
        return (inputs[0].flatten(0, -2).index_select(0, self._head_rows), *inputs[1:])

    def _logits(self, embeddings: Tensor, layout: Layout, head_rows: Tensor) -> Tensor:
        """Logits ``[N, V]`` in float32 at positions ``head_rows [N]`` of packed embeddings ``[M, D]``."""
        logits: Tensor = self._run(embeddings, layout, head_rows).logits.float()
        if self.model.dtype == torch.float16 and not bool(torch.isfinite(logits).all()):
            self._overflowed(embeddings.detach(), layout, head_rows)
        return logits

    def _overflowed(self, embeddings: Tensor, layout: Layout, head_rows: Tensor) -> None:
        """Say where float16 has overflowed: as a warning in training, where steps can be skipped, else as an error."""
        if torch.is_grad_enabled() and self._overflow_told:
            return
        self._overflow_told = True
        training = torch.is_grad_enabled()
        with torch.no_grad():  # what is kept for later passes is only written again
            found = first_not_finite(self.model, lambda: self._run(embeddings, layout, head_rows))
        message = (
            f"{self.name} has no finite numbers in float16 from {found or 'its head'} on, probably an overflow: beyond "
            "65,504 there is only infinity, and loss scaling cannot help against that; set model.lm.dtype to bfloat16 "
            "or float32"
        )
        if not training:
            raise UserError(message)
        log.warning(message)

    def _run(self, embeddings: Tensor, layout: Layout, head_rows: Tensor, states: bool = False) -> Any:  # noqa: ANN401
        """The model's own output, with logits at ``head_rows`` alone."""
        if self.shards is not None and self.shards.lockstep is not None:
            self.shards.lockstep.before_pass()
        self._head_rows = head_rows
        self.usage.passes += 1
        gradient = False
        try:
            output = self.model(
                inputs_embeds=embeddings[None],
                position_ids=layout.positions,
                # Visibility is the layout's; a 4-D mask keeps transformers from building one of its own.
                attention_mask=embeddings.new_zeros(1, 1, 1, 1),
                use_cache=False,
                output_hidden_states=states,
                layout=layout,
            )
            gradient = output.logits.requires_grad
        finally:
            self._head_rows = None
            if gradient:
                self.usage.tokens_with_gradient += len(embeddings)
            else:
                self.usage.tokens_without_gradient += len(embeddings)
        if not layout.followed:
            raise RuntimeError(f"{self.name} does not run with the attention implementation {ATTENTION_NAME!r}")
        return output

    def _embed_packed(self, ids: list[int], rows: Tensor, prompt: Prompt) -> Tensor:
        """Embeddings ``[M, D]`` of packed ids, with the prompt's vectors at its (negative) positions.

        Args:
            ids: Token ids, ``-1 - p`` for prompt position ``p``.
            rows: The row of each id ``[M]``, for a prompt per row.
            prompt: ``[P, D]`` or ``[B, P, D]``, or keys and values, which have no positions.
        """
        index = torch.tensor(ids, device=self.device)
        text = self.embed(index.clamp(min=0))
        if min(ids) >= 0:
            return text
        assert isinstance(prompt, Tensor)
        spots = (index < 0).nonzero()[:, 0]
        positions = -1 - index[spots]
        soft = prompt[positions] if prompt.dim() == 2 else prompt[rows[spots], positions]
        return text.index_copy(0, spots, soft.to(text.dtype))

    def _pack(
        self, levels: list[list[list[int]]], prompt: Prompt, memory: RowMemory | None = None, rows: int = -1
    ) -> tuple[Tensor, Layout]:
        """Pack levels of segments into ``[M, D]``; see `share`. Level ``rows`` has a segment for each row."""
        past = prompt if isinstance(prompt, KeyValues) else None
        if past is not None and self.shards is not None:
            past = self.shards.own_heads(past)
        layout = Layout([[len(part) for part in level] for level in levels], self.device, past, memory)
        # Of a prompt per row nothing is shared, so the owner of other levels' tokens does not matter.
        own = levels[rows]
        owner = [b if level is own else 0 for level in levels for b, part in enumerate(level) for _ in part]
        ids = [token for level in levels for part in level for token in part]
        return self._embed_packed(ids, torch.tensor(owner, device=self.device), prompt), layout

    @torch.no_grad()
    def key_values(self, vectors: Tensor) -> KeyValues:
        """Keys and values of vectors ``[P, D]`` that start a text, as the LM itself computes them."""
        memory = RowMemory(len(vectors))
        embeddings, layout = self._pack([[[-1 - p for p in range(len(vectors))]]], vectors, memory)
        self._logits(embeddings, layout, layout.last)
        self.usage.calls += 1
        own = KeyValues([memory.rows[layer] for layer in sorted(memory.rows)])
        return own if self.shards is None else self.shards.all_heads(own)

    def prompt_logits(self, before: list[int], vectors: Tensor) -> Tensor:
        """Logits ``[P, V]`` that predict each of ``P`` vectors in a row from what precedes it, differentiable in them.

        Args:
            before: Token ids ahead of the vectors, at least one.
            vectors: ``[P, D]``.
        """
        slot = [-1 - p for p in range(len(vectors) - 1)]  # nothing follows the last one
        embeddings, layout = self._pack([[before + slot]], vectors)
        spots = torch.arange(len(before) - 1, len(before) + len(slot), device=self.device)
        self.usage.calls += 1
        return self._logits(embeddings, layout, spots)

    def score(self, examples: Sequence[Example], prompt: Prompt, with_end: bool = False) -> Scores:
        """Teacher-forced log-likelihood of the reference answers, differentiable in the prompt.

        Args:
            examples: ``B`` examples with answers.
            prompt: Vectors in the prompt slot, ``[P, D]`` for all examples or ``[B, P, D]`` for each its own; ``P``
                may be 0. Or keys and values in front of everything; the slot is empty then. Gradients are those of
                repeating the prompt in every row.
            with_end: Score what follows the answers, too.

        Returns:
            The scores, on the LM's device.

        Raises:
            UserError: An example has no answer, or see `encode`.
        """
        return self.score_rows(self.encode_answers(examples, prompt, with_end), prompt)

    def score_rows(self, rows: Sequence[Row], prompt: Prompt, group: int | None = None) -> Scores:
        """`score` for rows that are token ids already, each with an answer; see `answer_logits`."""
        return answer_scores(self.answer_logits(rows, prompt, group), rows)

    def answer_logits(self, rows: Sequence[Row], prompt: Prompt, group: int | None = None) -> Tensor:
        """Logits ``[N, V]`` in float32 that predict the rows' answer and end tokens, one row after another.

        Args:
            rows: ``B`` rows.
            prompt: See `score`.
            group: Every ``group`` rows share more than all do (a candidate prompt on several examples, or an example
                under several prompts): what they share is run once per group.
        """
        targets = [row.answer + row.end for row in rows]
        # Nothing follows the last token, so it is not fed.
        feeds = [row.context + target[:-1] for row, target in zip(rows, targets, strict=True)]
        groups = [len(rows), *([] if group is None else [group])]
        embeddings, layout = self._pack(share(rows, feeds, groups, _same_for_all(prompt)), prompt)
        counts = [len(target) for target in targets]
        last = layout.last.tolist()
        spots = [end - count + 1 + i for end, count in zip(last, counts, strict=True) for i in range(count)]
        logits = self._logits(embeddings, layout, torch.tensor(spots, device=self.device))
        self.usage.calls += len(rows)  # not where memory has run out, after which smaller parts are run
        return logits

    @torch.no_grad()
    def continuation_scores(
        self,
        contexts: Sequence[list[int]],
        continuations: Sequence[Sequence[Sequence[int]]],
        prompt: Prompt,
        groups: Sequence[int] = (),
    ) -> Tensor:
        """Log-probabilities of several continuations of each of ``N`` contexts, each context run once.

        Args:
            contexts: Token ids, at least one each, ``-1 - p`` for position ``p`` of the prompt.
            continuations: Of each context, token ids of as many continuations as it has, at least one token each.
            prompt: See `score`.
            groups: Every so many contexts share more than all do, and of these every so many still more; each a
                divisor of the one before. What they share is run once per group.

        Returns:
            Sums over tokens, in nats, float32: of the first context's continuations, then of the second's, ...
        """
        feeds = [_distinct_feeds(several) for several in continuations]
        most = max(map(len, feeds))
        rows = [Row(context, []) for context in contexts]
        levels = share(rows, contexts, [len(contexts), *groups], _same_for_all(prompt))
        after = sum(len(part) for level in levels[:-1] for part in level)
        ends = list(itertools.accumulate((len(part) for part in levels[-1]), initial=after))
        padded = [feed for several in feeds for feed in (several + [[]] * (most - len(several)))]
        embeddings, layout = self._pack([*levels, padded] if most else levels, prompt, rows=len(levels) - 1)
        spots = [end - 1 for end in ends[1:]] + list(range(ends[-1], len(embeddings)))
        logits = self._logits(embeddings, layout, torch.tensor(spots, device=self.device))
        self.usage.calls += sum(map(len, continuations))
        places: list[int] = []  # which row of the logits predicts a token
        tokens: list[int] = []
        owners: list[int] = []
        start, count = len(contexts), 0
        for n, (several, fed) in enumerate(zip(continuations, feeds, strict=True)):
            starts = list(itertools.accumulate(map(len, fed), initial=start))
            for ids in several:
                rest = list(ids[:-1])
                mine = next((at for at, feed in zip(starts, fed, strict=False) if feed[: len(rest)] == rest), start)
                places += [n, *range(mine, mine + len(rest))]
                tokens += ids
                owners += [count] * len(ids)
                count += 1
            start = starts[-1]
        where, what, whose = (torch.tensor(part, device=self.device) for part in (places, tokens, owners))
        values = logits[where, what] - torch.logsumexp(logits, -1)[where]
        return torch.zeros(count, device=self.device).index_add(0, whose, values)

    def hidden_states(self, rows: Sequence[list[int]], prompt: Prompt, layer: int = -1) -> list[Tensor]:
        """The LM's hidden states at every token of some texts, differentiable in the prompt.

        Args:
            rows: Token ids of ``B`` texts, ``-1 - p`` for position ``p`` of the prompt.
            prompt: See `score`.
            layer: 0 for the embeddings, ``k`` for what layer ``k`` puts out, -1 for the last layer behind its norm.

        Returns:
            ``[T, D]`` for each text, in the LM's dtype.
        """
        levels = share([Row(row, []) for row in rows], rows, [len(rows)], _same_for_all(prompt))
        embeddings, layout = self._pack(levels, prompt)
        output = self._run(embeddings, layout, torch.empty(0, dtype=torch.long, device=self.device), states=True)
        self.usage.calls += len(rows)
        states = output.hidden_states[layer][0]
        shared, *own = states.split([len(levels[0][0]), *map(len, levels[1])])
        return [torch.cat([shared, part]) for part in own]

    def encode_answers(self, examples: Sequence[Example], prompt: Prompt, with_end: bool = False) -> list[Row]:
        """`encode` for scoring with a prompt: every example must have an answer."""
        for example in examples:
            if example.answer is None:
                raise UserError(f"{example.source or 'example'} has no answer to score; use predict for it")
        return self.encode(examples, slot_length(prompt), with_end, _ahead(prompt))

    @torch.no_grad()
    def generate(
        self, examples: Sequence[Example], prompt: Prompt, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[str]:
        """Answers, greedy or drawn, batched, with keys and values cached.

        Args:
            examples: ``B`` examples; their reference answers are not looked at.
            prompt: As in `score`.
            max_new_tokens: At most so many tokens each, fewer where the context window ends.
            sampling: How to draw; ``None`` takes the likeliest token each time.

        Returns:
            One text per example, up to its ``stop`` pattern or the end token, stripped.
        """
        questions = [replace(example, answer=None) for example in examples]
        rows = self.encode(questions, slot_length(prompt), ahead=_ahead(prompt))
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
        """Token ids after each row's context, without an end token; ``stops`` only end rows early.

        Where memory runs out, halves of the rows are run one after the other, with the same result.
        """
        try:
            return self._generate_tokens(rows, prompt, max_new_tokens, stops, sampling)
        except RuntimeError as error:
            if not out_of_memory(error) or len(rows) == 1:
                raise
        half = (len(rows) + 1) // 2
        if sampling is not None and sampling.group is not None and len(rows) > sampling.group:
            half = -(-half // sampling.group) * sampling.group
        log.warning("out of memory: generating %d texts at a time instead of %d", half, len(rows))
        generated: list[list[int]] = []
        for part in (slice(0, half), slice(half, len(rows))):
            own = prompt if _same_for_all(prompt) else prompt[part]  # type: ignore[index]
            draws = None if sampling is None else sampling.part(part)
            generated += self.generate_tokens(
                rows[part], own, max_new_tokens, None if stops is None else stops[part], draws
            )
        return generated

    def _generate_tokens(
        self,
        rows: Sequence[Row],
        prompt: Prompt,
        max_new_tokens: int,
        stops: Sequence[str] | None,
        sampling: Sampling | None,
    ) -> list[list[int]]:
        generated: list[list[int]] = [[] for _ in rows]
        limits = [min(max_new_tokens, self.context - _ahead(prompt) - len(row.context)) for row in rows]
        done = [limit <= 0 for limit in limits]
        steps = max(limits)
        if steps <= 0:
            return generated
        groups = [len(rows), *([] if sampling is None or sampling.group is None else [sampling.group])]
        levels = share(rows, [row.context for row in rows], groups, _same_for_all(prompt))
        lengths = [len(own) for own in levels[-1]]
        memory = RowMemory(max(lengths) + steps)
        embeddings, layout = self._pack(levels, prompt, memory)
        ends = self._end_tokens()
        for step in range(steps):
            logits = self._logits(embeddings, layout, layout.last)
            chosen = logits.argmax(-1) if sampling is None else sampling.choose(logits, step)
            for b, token in enumerate(chosen.tolist()):
                if done[b] or token in ends:
                    done[b] = True
                    continue
                generated[b].append(token)
                done[b] = len(generated[b]) == limits[b] or (
                    stops is not None and self._stopped(generated[b], stops[b])
                )
            if all(done):
                break
            # A row that has met its limit is fed along in its last place, where it can overrun nothing.
            columns = [length + min(step, limit - 1) for length, limit in zip(lengths, limits, strict=True)]
            layout = Layout([[1] * len(rows)], self.device, memory=memory, columns=columns)
            embeddings = self.embed(chosen)
        self.usage.calls += len(rows)
        return generated

    # --- text alone; see `TextModel` --------------------------------------------------------------------------------

    @property
    def chats(self) -> bool:
        """Whether its tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.encoder.tokens(text))

    def length(self, example: Example) -> int:
        """Tokens of an example's context, with an empty prompt."""
        return len(self.encoder.row(replace(example, answer=None), 0).context)

    def write(
        self, examples: Sequence[Example], prompt: str, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[str]:
        """`generate` with a prompt of text."""
        ids = torch.tensor(self.encoder.tokens(prompt), dtype=torch.long, device=self.device)
        return self.generate(examples, self.embed(ids), max_new_tokens, sampling)

    def _stopped(self, ids: list[int], stop: str) -> bool:
        text = self.text(ids, special=False).lstrip()
        return not text.endswith("\ufffd") and re.search(stop, text) is not None  # half a character is no reason yet

    def _end_tokens(self) -> set[int]:
        ends = {self.tokenizer.eos_token_id}
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ends.update(configured if isinstance(configured, list) else [configured])
        return {int(end) for end in ends if end is not None}


def _distinct_feeds(continuations: Sequence[Sequence[int]]) -> list[list[int]]:
    """What must be run to predict continuations: all but the last token of each, without what others begin with."""
    kept: list[list[int]] = []
    for ids in sorted(continuations, key=len, reverse=True):
        feed = list(ids[:-1])
        if feed and all(other[: len(feed)] != feed for other in kept):
            kept.append(feed)
    return kept


def _same_for_all(prompt: Prompt) -> bool:
    """Whether the prompt is one for all rows."""
    return isinstance(prompt, KeyValues) or prompt.dim() == 2


def _ahead(prompt: Prompt) -> int:
    """Keys and values in front of everything."""
    return prompt.length if isinstance(prompt, KeyValues) else 0


def answer_scores(logits: Tensor, rows: Sequence[Row]) -> Scores:
    """Scores from the logits that predict the answers' tokens, and those that follow.

    Args:
        logits: ``[N, V]`` float32, the rows' answer and end tokens one after another.
        rows: ``B`` rows with ``N`` answer and end tokens in all.
    """
    device, size = logits.device, len(rows)
    targets = torch.tensor([token for row in rows for token in row.answer + row.end], device=device)
    answer, end = (torch.tensor([len(part) for part in parts], device=device) for parts in
                   (([row.answer for row in rows]), ([row.end for row in rows])))  # fmt: skip
    # Slot b collects the tokens of row b's answer, slot B + b those of its end.
    slot = torch.arange(2 * size, device=device).view(2, size).T.flatten()
    slot = slot.repeat_interleave(torch.stack([answer, end], 1).flatten())
    token_nll = functional.cross_entropy(logits, targets, reduction="none")
    sums = torch.zeros(2 * size, device=device).index_add(0, slot, token_nll)
    misses = torch.zeros(2 * size, device=device).index_add(0, slot, (logits.argmax(-1) != targets).float())
    return Scores(
        nll=sums[:size] / answer, tokens=answer, greedy=misses[:size] == 0, end_nll=sums[size:] / end.clamp(min=1)
    )


def _nothing_missing(module: nn.Module, incompatible: Any) -> None:  # noqa: ANN401 - torch's private named tuple
    """Loading a checkpoint is strict on every key but the LM's own, which no checkpoint has."""
    own = set(nn.Module.state_dict(module))
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not any(key.endswith(f".{name}") or key == name for name in own)
    ]


def _bytes(example: Example) -> int:
    """An upper bound on a byte-level tokenizer's tokens."""
    return len(f"{example.before}{example.after}{example.answer or ''}{example.end or ''}".encode())
