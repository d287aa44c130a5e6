"""A language model behind a server that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_prompts.errors import UserError, check_installed, nearest
from lightning_prompts.lm.config import LMConfig
from lightning_prompts.lm.encoding import begin_alike, with_ends, written
from lightning_prompts.lm.key_values import Prompt
from lightning_prompts.lm.labels import text_label_sums
from lightning_prompts.lm.language_model import Continuation, LabelSums, LanguageModel, Scored, Usage
from lightning_prompts.lm.sampling import Sampling
from lightning_prompts.lm.server_cache import ServerCache
from lightning_prompts.template import cut
from lightning_prompts.types import Example

BYTES_PER_TOKEN = 3  # an estimate on the safe side: English has four or more
CHAT, PLAIN = "/chat/completions", "/completions"
ROUNDING = 0.1  # nats above 0 that are taken for a rounding error: bfloat16 has steps of 1/8 near 20
SHOWN = 200  # characters of a server's own message
NO_KEY = "none"  # the client insists on one, servers without keys ignore it

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


class RemoteLM(LanguageModel):
    """Asks a server to write and score texts: several requests at a time, and each only once.

    The client of the package `openai` repeats failed requests with growing waits. The key comes from the environment
    and goes into the requests' headers only. Neither is needed before the first request; see `connect`.

    Args:
        config: With a server.
        cache: Where answers are kept; by default the user's cache folder, and nowhere if ``server.cache`` is false.
    """

    scores_together = False
    texts_at_once = 1 << 30  # the server makes its own batches

    def __init__(self, config: LMConfig, cache: ServerCache | None = None) -> None:
        """Keep the settings; nothing is sent yet."""
        assert config.server is not None
        self.config, self.server, self.name = config, config.server, config.name
        self.width = self.vocabulary = 0
        self._warned_of_empty = False
        self.context = self.server.context
        self.usage = Usage()
        self.cache = (cache or ServerCache()) if self.server.cache else None
        self._key = ""
        self._client: Any = None
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Create the client ahead of the first request; nothing is sent.

        Raises:
            UserError: The package ``openai`` is missing, or the environment variable holds no key.
        """
        with self._lock:
            if self._client is not None:
                return
            check_installed("a server", "remote", "openai")
            import openai

            variable = self.server.api_key_variable
            # A key from a file often ends with a line break, which no header can carry.
            self._key = os.environ.get(variable, "").strip() if variable else ""
            if variable and not self._key:
                raise UserError(
                    f"server.api_key_variable: the environment variable {variable} is not set; put the key of "
                    f"{self.server.base_url} into it (export {variable}=...)"
                )
            if not (self._key.isascii() and self._key.isprintable()):
                raise UserError(
                    f"server.api_key_variable: the environment variable {variable} is no key: some of its "
                    "characters fit into no request; set it again"
                )
            self._openai = openai
            self._client = openai.OpenAI(
                base_url=self.server.base_url,
                api_key=self._key or NO_KEY,
                timeout=self.server.timeout,
                max_retries=self.server.retries,
            )

    def describe(self) -> str:
        """Name and address."""
        return f"{self.name} behind {self.server.base_url}"

    def identity(self, config: LMConfig) -> str:
        """See `LanguageModel`."""
        del config
        return repr((self.server.base_url, self.name, sorted((self.server.parameters or {}).items())))

    def barrier(self) -> None:
        """See `LanguageModel`; no process waits for a server's passes."""

    # --- texts ------------------------------------------------------------------------------------------------------

    @property
    def chats(self) -> bool:
        """Whether the server takes chats."""
        return self.server.chat

    def count(self, text: str) -> int:
        """Number of tokens of a text, an estimate: the tokenizer is the server's."""
        return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)

    def length(self, example: Example) -> int:
        """Number of tokens of an example's context with an empty prompt, an estimate."""
        return self.count(f"{example.system or ''}{example.before}{example.after}")

    def check_examples(self, examples: Sequence[Example], length: int, ahead: int = 0) -> None:
        """See `LanguageModel`; an estimate refuses nothing."""

    def text_vectors(self, text: str) -> Tensor:
        """See `LanguageModel`."""
        del text
        return torch.empty(0, 0, device="cpu")

    def _text_of(self, prompt: Prompt | str) -> str:
        """A prompt that is a text."""
        if isinstance(prompt, str):
            return prompt
        raise UserError(
            f"{self.name} is behind a server ({self.server.base_url}), which takes texts and no vectors or keys and "
            "values; leave out server, so that the model itself is loaded"
        )

    def generate(
        self, examples: Sequence[Example], prompt: Prompt | str, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[str]:
        """See `LanguageModel`; each text is a request of its own.

        Chats go to ``/chat/completions``, other examples to ``/completions``. Each draw sends its seed; a server that
        knows no seeds draws freely, and still gets a request for each draw.

        Raises:
            UserError: The prompt is not a text, or see `_send`.
        """
        prompt = self._text_of(prompt)
        requests = []
        for index, example in enumerate(examples):
            body = self._question(example, prompt)
            body |= {"max_tokens": max_new_tokens, "temperature": 0.0 if sampling is None else sampling.temperature}
            if sampling is not None:
                body["seed"] = sampling.seeds[index] % 2**31  # some servers take no larger ones
            body |= self.server.parameters or {}
            body = {name: value for name, value in body.items() if value is not None}
            # Without a seed in the body, equal requests would be taken for one draw.
            draw = None if sampling is None or "seed" in body else sampling.seeds[index]
            requests.append((CHAT if example.chat else PLAIN, body, example.stop, draw))
        return self._each(self._written, requests)

    def _question(self, example: Example, prompt: str) -> dict[str, Any]:
        text = f"{example.before}{prompt}{example.after}"
        if not example.chat:
            return {"prompt": text}
        system = [] if example.system is None else [{"role": "system", "content": example.system}]
        return {"messages": [*system, {"role": "user", "content": text}]}

    def _written(self, request: tuple[str, dict[str, Any], str, int | None]) -> str:
        path, body, stop, draw = request
        # A stop in `server.parameters` stays as it is; some models take none, and `cut` applies the pattern anyway.
        ends = None if "stop" in (self.server.parameters or {}) else literal(stop)
        text, finish = self._text(path, body if ends is None else {**body, "stop": [ends]}, draw)
        if ends is not None and finish == "stop" and not text.strip():
            # The server stopped at white space that the text begins with, which `cut` ignores.
            text, _ = self._text(path, body, draw)
        return cut(text, stop)

    def _text(self, path: str, body: dict[str, Any], draw: int | None) -> tuple[str, str]:
        """Ask for a text, and why it ends."""
        choice = self._ask(path, body, draw)
        text, finish = _content(choice, path) or "", str(choice.get("finish_reason"))
        if not text and finish == "length" and not self._warned_of_empty:
            self._warned_of_empty = True
            log.warning(
                "%s behind %s has used up its %s tokens without a word of an answer, as models do that think first; "
                "raise the number of new tokens, or turn thinking off in server.parameters",
                self.name,
                self.server.base_url,
                body.get("max_tokens"),
            )
        return text, finish

    # --- scores -----------------------------------------------------------------------------------------------------

    def can_score(self, examples: Sequence[Example]) -> bool:
        """See `LanguageModel`."""
        return self.server.log_probs and not any(example.chat for example in examples)

    def check_scores(self, examples: Sequence[Example]) -> None:
        """See `LanguageModel`."""
        if not self.server.log_probs:
            raise UserError(
                f"{self.name} behind {self.server.base_url} gives no log-probabilities of given texts, which class "
                "scores, likelihood rewards and posterior weights are made of; take a server that does (vLLM, SGLang) "
                "and say server.log_probs: true, or give that part to a local model"
            )
        chat = next((example for example in examples if example.chat), None)
        if chat is not None:
            raise UserError(
                f"{chat.source or 'example'}: no server gives log-probabilities of given texts in a chat; set "
                "data.chat: false, or give that part to a local model"
            )

    def continuation(self, text: str) -> Continuation:
        """See `LanguageModel`; the server cuts the text into tokens."""
        return text

    def label_texts(self, example: Example) -> Sequence[tuple[Continuation, int]]:
        """See `LanguageModel`; labels of which one begins another get the text after the answer.

        Raises:
            UserError: They begin alike, and the template has no text after the answer; a server scores no end token.
        """
        texts = dict(written(example.labels))
        if begin_alike(texts, example.labels):
            texts = with_ends(texts, example.labels, example.end or "")
        return list(texts.items())

    def check_texts(
        self, examples: Sequence[Example], prompts: Sequence[str], texts: Sequence[Sequence[Continuation]]
    ) -> None:
        """See `LanguageModel`."""
        self.check_scores(examples)

    def text_scores(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        texts: Sequence[Sequence[Continuation]],
        block: int = 1,
        memory_mb: float = 256.0,
    ) -> list[list[list[Scored]]]:
        """See `LanguageModel`; each text is a request of its own.

        The server cuts context and text into tokens together; a token with parts of both counts.

        Raises:
            UserError: See `check_scores`; the server answers without log-probabilities; or see `_send`.
        """
        self.check_scores(examples)
        pairs = [
            (f"{example.before}{prompt}{example.after}", text)
            for prompt in prompts
            for example, several in zip(examples, texts, strict=True)
            for text in several
        ]
        scores = iter(self._each(self._scored, pairs))
        return [[[next(scores) for _ in several] for several in texts] for _ in prompts]

    def answer_nll(self, examples: Sequence[Example], prompt: Prompt | str) -> list[float | None]:
        """See `LanguageModel`."""
        prompt = self._text_of(prompt)
        if not self.can_score(examples):
            return [None] * len(examples)
        (line,) = self.text_scores(examples, [prompt], [[str(example.answer)] for example in examples])
        return [-total / max(count, 1) for ((total, count),) in line]

    def label_sums(self, examples: Sequence[Example], prompt: Prompt | str) -> LabelSums:
        """See `LanguageModel`."""
        scored = text_label_sums(self, examples, [self._text_of(prompt)], self.text_scores, answers=True)
        return LabelSums([sums[0] for sums in scored.sums], scored.owners, scored.nll)

    def _scored(self, pair: tuple[str, Continuation]) -> Scored:
        context, text = pair[0], str(pair[1])
        if not text:
            return 0.0, 0
        tokens, values = self._echo(context + text)
        if "".join(tokens).endswith(context + text):
            left, start = len(text), len(tokens)
            while left > 0:
                start -= 1
                left -= len(tokens[start])
        else:  # some tokens are parts of a character, so their texts do not add up
            start = len(self._echo(context)[0])
        mine = values[start:]
        if not mine or not all(isinstance(value, int | float) and math.isfinite(value) for value in mine):
            raise self._silent()
        if max(mine) > ROUNDING:
            raise UserError(
                f"{self._where(PLAIN)} gives log-probabilities above 0 ({max(mine):.4g}), which cannot be; "
                "set server.log_probs: false, or take another server"
            )
        return math.fsum(min(value, 0.0) for value in mine), len(mine)

    def _echo(self, text: str) -> tuple[list[str], list[float]]:
        """Ask for a text's tokens and their log-probabilities; the first token has none."""
        # Some servers insist on writing a token. It comes last, unless it is an end token that the server leaves out.
        body = {"prompt": text, "max_tokens": 1, "temperature": 0.0, "logprobs": 1, "echo": True}

        def usable(choice: dict[str, Any]) -> bool:
            tokens, values = _echoed(choice, text)
            return bool(tokens) and all(
                isinstance(value, int | float) and -math.inf < value <= ROUNDING for value in values[1:]
            )

        tokens, values = _echoed(self._ask(PLAIN, body, usable=usable), text)
        if not tokens:
            raise self._silent()
        return tokens, values

    def _silent(self) -> UserError:
        return UserError(
            f"{self._where(PLAIN)} answers without log-probabilities of the text that it was sent (echo: true with "
            "logprobs: 1); set server.log_probs: false, or take a server that gives them, vLLM for one"
        )

    # --- requests ---------------------------------------------------------------------------------------------------

    def _ask(
        self,
        path: str,
        body: dict[str, Any],
        draw: int | None = None,
        usable: Callable[[dict[str, Any]], bool] = lambda choice: True,
    ) -> dict[str, Any]:
        """Return the first choice of an answer, from the cache or the server; ``draw`` tells equal requests apart.

        The cache keeps usable choices only: another server at the same address may give better ones.
        """
        body = _encodable({"model": self.name, **body})
        request: dict[str, Any] = {"url": self.server.base_url.rstrip("/") + path, "body": body}
        if draw is not None:
            request["draw"] = draw
        known = self.cache.get(request) if self.cache else None
        if known is not None and _content(known, path) is not None and usable(known):
            return known
        data = self._send(path, body)
        try:
            choice: dict[str, Any] = data["choices"][0]
        except (TypeError, KeyError, IndexError):
            choice = {}
        if _content(choice, path) is None:
            raise UserError(
                f"{self._where(path)} answered without a text: {self._clean(json.dumps(data))}; is it a server of "
                "OpenAI's protocol? check server.base_url, which mostly ends in /v1"
            )
        usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
        choice = {**choice, "usage": usage}
        with self._lock:
            self.usage.calls += 1
            self.usage.calls_remote += 1
            self.usage.tokens_remote += sum(
                max(0, count)
                for name in ("prompt_tokens", "completion_tokens")
                if isinstance(count := usage.get(name), int)
            )
        if self.cache and usable(choice):
            self.cache.put(request, choice)
        return choice

    def _send(self, path: str, body: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
        """Post a request, and repeat it if the answer is broken.

        Raises:
            UserError: The server does not answer, refuses the request, or answers without JSON; or see `connect`.
        """
        self.connect()
        for attempt in range(self.server.retries + 1):
            try:
                text: str = self._client.post(path, cast_to=str, body=body)
            except self._openai.APIError as error:
                # The error itself holds the request with its headers, and so the key.
                raise self._to_user_error(error, path) from None
            try:
                return _encodable(json.loads(text))
            except ValueError:  # cut off, or a proxy's page
                if attempt < self.server.retries:
                    time.sleep(min(0.5 * 2**attempt, 8.0))
        raise UserError(
            f"{self._where(path)} answered {self.server.retries + 1} times with something that is no JSON: "
            f"{self._clean(text) or 'nothing at all'!r}; check server.base_url, which mostly ends in /v1"
        )

    def _to_user_error(self, error: Exception, path: str) -> UserError:
        """Say what went wrong with a request, and what to do."""
        api, where, tries = self._openai, self._where(path), f"{self.server.retries + 1} tries"
        kept = "; answers so far are kept, so a run that starts again asks for the rest only" if self.cache else ""
        if isinstance(error, api.APITimeoutError):
            return UserError(
                f"{where} did not answer within {self.server.timeout:g} s in {tries}; raise server.timeout, or lower "
                f"server.concurrency ({self.server.concurrency}){kept}"
            )
        if isinstance(error, api.APIConnectionError):
            cause = self._clean(str(error.__cause__ or error))
            return UserError(
                f"{where} cannot be reached in {tries} ({cause}); start the server, or correct server.base_url{kept}"
            )
        says = self._clean(str(getattr(error, "message", error)))
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            variable = self.server.api_key_variable
            advice = "name the environment variable with its key in server.api_key_variable"
            if variable:
                advice = f"check the key in the environment variable {variable}"
            return UserError(f"{where} refuses the key ({status}); {advice}")
        if status == 404:
            return UserError(f"{where} is not there (404: {says}); {self._missing(path)}")
        if status == 429:
            return UserError(
                f"{where} has had too many requests (429) in {tries}: {says}; lower server.concurrency "
                f"({self.server.concurrency}), raise server.retries, or look at your account there{kept}"
            )
        if status is not None and status >= 500:
            return UserError(f"{where} fails with {status} in {tries}: {says}; look at the server's own log{kept}")
        return UserError(
            f"{where} refuses a request ({status}): {says}; where it is too long, lower server.context or show less; a "
            "setting that it does not know is taken out by server.parameters: {NAME: null}"
        )

    def _missing(self, path: str) -> str:
        """Say what to do about a 404: find out whether the model or the endpoint is missing."""
        try:
            listed = json.loads(self._client.get("/models", cast_to=str))["data"]
            names = [str(model["id"]) for model in listed]
        except (self._openai.APIError, ValueError, TypeError, KeyError):
            return "check server.base_url, which mostly ends in /v1, and name"
        if self.name not in names:
            return f"the server has no model {self.name!r}; {nearest(self.name, names)}"
        if path == PLAIN:
            return "this server has chats only; set data.chat: true and server.chat: true"
        return "this server has no chats; set data.chat: false and server.chat: false"

    def _where(self, path: str) -> str:
        return f"{self.server.base_url.rstrip('/')}{path} ({self.name})"

    def _clean(self, text: str) -> str:
        """Shorten a server's message to one line, without the key, which some servers repeat."""
        line = " ".join(text.split())
        if self._key:
            line = line.replace(self._key, "[key]")
        return line if len(line) <= SHOWN else line[:SHOWN] + "..."

    def _each(self, work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """Do the work for each item, several at a time; equal items are done once.

        The threads are daemons: those of a pool would keep an interrupted run alive until their last request times out.
        """
        keys = [json.dumps(item, sort_keys=True) for item in items]
        waiting: queue.SimpleQueue[tuple[str, _Item]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[str, _Result | BaseException]] = queue.SimpleQueue()
        single = dict(zip(keys, items, strict=True))
        for pair in single.items():
            waiting.put(pair)
        stopped = threading.Event()

        def serve() -> None:
            while not stopped.is_set():
                try:
                    key, item = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((key, work(item)))
                except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
                    done.put((key, error))

        for _ in range(min(self.server.concurrency, len(single))):
            threading.Thread(target=serve, daemon=True).start()
        results: dict[str, _Result] = {}
        try:
            while len(results) < len(single):
                key, result = done.get()
                if isinstance(result, BaseException):
                    raise result
                results[key] = result
        finally:
            stopped.set()
        return [results[key] for key in keys]


def _content(choice: Any, path: str) -> str | None:  # noqa: ANN401 - JSON
    """The text of a choice, empty if the model has written none; ``None`` if this is no choice with a text."""
    try:
        text = choice["message"].get("content") if path == CHAT else choice["text"]
    except (TypeError, KeyError, AttributeError):
        return None
    if path == CHAT and text is None:
        return ""
    return text if isinstance(text, str) else None


def _echoed(choice: dict[str, Any], text: str) -> tuple[list[str], list[float]]:
    """The tokens of a text that a choice repeats, and their log-probabilities; none if it does not give them."""
    found: Any = choice.get("logprobs")
    try:
        tokens, values = list(map(str, found["tokens"])), list(found["token_logprobs"])
    except (TypeError, KeyError):
        return [], []
    if len(tokens) != len(values):
        return [], []
    # Most servers write a token more. Try the tokens without the last one first: "no no no" also ends with "no no".
    counts = (len(tokens) - 1, len(tokens))
    own = next((count for count in counts if "".join(tokens[:count]).endswith(text)), None)
    if own is None:  # some tokens are parts of a character
        count = choice["usage"].get("prompt_tokens")
        own = count if count in counts else counts[0]
    return (tokens[:own], values[:own]) if own > 0 else ([], [])


def _encodable(data: Any) -> Any:  # noqa: ANN401 - JSON
    """Replace half characters, which JSON can name but no file, request or tokenizer takes."""
    text = json.dumps(data, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.loads(text.encode(errors="replace"))
    return data


def literal(stop: str) -> str | None:
    r"""Return the one text that a pattern matches, or ``None`` if it matches several: a server takes no patterns.

    >>> literal(r"\n\n"), literal(r"\n\s*\n")
    ('\n\n', None)
    """
    text = stop.replace(r"\n", "\n").replace(r"\t", "\t")
    return text if text and not set(text) & set(r".^$*+?{}[]\|()") else None
