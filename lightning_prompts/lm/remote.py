"""An LM behind a server that speaks OpenAI's protocol: texts in, texts out, and log-probabilities where it has them."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from lightning_prompts.errors import UserError, nearest
from lightning_prompts.lm.answer_cache import AnswerCache
from lightning_prompts.lm.config import LMConfig
from lightning_prompts.lm.sampling import Sampling
from lightning_prompts.lm.usage import Usage
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


class RemoteLM:
    """Has a server write and score texts, several requests at a time, each of them paid for once.

    The client of the package `openai` sends requests again, with growing waits. The key comes from the environment and
    goes nowhere but into the requests' headers. Neither is asked for before there is a request: see `connect`.

    Args:
        config: With a server.
        cache: Where answers are kept; by default in the user's cache folder, unless the config says not at all.
    """

    width = vocabulary = 0  # a server shows no vectors

    def __init__(self, config: LMConfig, cache: AnswerCache | None = None) -> None:
        """Nothing is sent yet."""
        assert config.server is not None
        self.config, self.server, self.name = config, config.server, config.name
        self._empty_told = False
        self.context = self.server.context
        self.usage = Usage()
        self.cache = (cache or AnswerCache()) if self.server.cache else None
        self._key = ""
        self._client: Any = None
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Get all that a request needs, ahead of the first one; sends nothing.

        Raises:
            UserError: The package is not there, or the environment variable is not set.
        """
        with self._lock:
            if self._client is not None:
                return
            try:
                import openai
            except ImportError as error:
                raise UserError("a server needs the package openai: pip install openai") from error
            variable = self.server.api_key_variable
            # Of a file or a line of Windows' there is often a line end with it, which no header can carry.
            self._key = os.environ.get(variable, "").strip() if variable else ""
            if variable and not self._key:
                raise UserError(
                    f"server.api_key_variable: the environment variable {variable} is not set; put the key of "
                    f"{self.server.base_url} into it (export {variable}=...)"
                )
            if not (self._key.isascii() and self._key.isprintable()):
                raise UserError(
                    f"server.api_key_variable: what stands in the environment variable {variable} is no key: it has "
                    "characters that no request can carry; set it again"
                )
            self._openai = openai
            self._client = openai.OpenAI(
                base_url=self.server.base_url, api_key=self._key or NO_KEY, timeout=self.server.timeout,
                max_retries=self.server.retries,
            )  # fmt: skip

    def describe(self) -> str:
        """Name and address."""
        return f"{self.name} behind {self.server.base_url}"

    def barrier(self) -> None:
        """See `FrozenLM`; nobody waits for a server's passes."""

    @property
    def tokens_forwarded(self) -> int:
        """Tokens that the server says it has read and written."""
        return self.usage.tokens

    # --- text; see `TextModel` --------------------------------------------------------------------------------------

    @property
    def chats(self) -> bool:
        """Whether it can be asked in a chat."""
        return self.server.chat

    def count(self, text: str) -> int:
        """Tokens of a text, about: the tokenizer is the server's."""
        return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)

    def length(self, example: Example) -> int:
        """Tokens of an example's context with an empty prompt, about."""
        return self.count(f"{example.system or ''}{example.before}{example.after}")

    def check_lengths(self, examples: Sequence[Example], length: int, ahead: int = 0) -> None:
        """Nothing is refused by an estimate; the server says what does not fit."""

    def write(
        self, examples: Sequence[Example], prompt: str, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[str]:
        """Texts after examples with a prompt, each by a request of its own.

        Draws are asked for with the seed of each; servers that know none draw freely, and still each by itself.

        Args:
            examples: ``B`` examples; those of a chat go to ``/chat/completions``, others to ``/completions``.
            prompt: What stands in the prompt slot.
            max_new_tokens: At most so many tokens each.
            sampling: How to draw; ``None`` for temperature 0.

        Returns:
            One text per example, up to its ``stop`` pattern or the end token, stripped.

        Raises:
            UserError: See `_send`.
        """
        requests = []
        for index, example in enumerate(examples):
            body = self._question(example, prompt)
            body |= {"max_tokens": max_new_tokens, "temperature": 0.0 if sampling is None else sampling.temperature}
            if sampling is not None:
                body["seed"] = sampling.seeds[index] % 2**31  # some servers take no larger ones
            body |= self.server.parameters or {}
            body = {name: value for name, value in body.items() if value is not None}
            # A server that is told no seed draws all the same: each of its draws is a request of its own.
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
        text, finish = self._text(path, body if (ends := literal(stop)) is None else {**body, "stop": [ends]}, draw)
        if ends is not None and finish == "stop" and not text.strip():
            # It stopped at white space that the text begins with, which `cut` does not count.
            text, _ = self._text(path, body, draw)
        return cut(text, stop)

    def _text(self, path: str, body: dict[str, Any], draw: int | None) -> tuple[str, str]:
        """A text, and why it ends."""
        choice = self._ask(path, body, draw)
        text, finish = _content(choice, path) or "", str(choice.get("finish_reason"))
        if not text and finish == "length" and not self._empty_told:
            self._empty_told = True
            log.warning(
                "%s behind %s has used up its %s tokens without a word of an answer, as models do that think first; "
                "raise the number of new tokens, or turn thinking off in server.parameters", self.name,
                self.server.base_url, body.get("max_tokens"),
            )  # fmt: skip
        return text, finish

    # --- scores -----------------------------------------------------------------------------------------------------

    def check_scores(self, examples: Sequence[Example]) -> None:
        """Raise a `UserError` if the server cannot say how likely given texts after examples are."""
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

    def log_probs(self, contexts: Sequence[str], texts: Sequence[str]) -> list[tuple[float, int]]:
        """How likely texts are after contexts, each by a request of its own.

        The server cuts context and text into tokens together; one that has parts of both counts.

        Args:
            contexts: ``N`` beginnings.
            texts: What follows each.

        Returns:
            Sum over the text's tokens in nats, and their number.

        Raises:
            UserError: The server answers without log-probabilities, or see `_send`.
        """
        return self._each(self._scored, list(zip(contexts, texts, strict=True)))

    def _scored(self, pair: tuple[str, str]) -> tuple[float, int]:
        context, text = pair
        if not text:
            return 0.0, 0
        tokens, values = self._echo(context + text)
        if "".join(tokens).endswith(context + text):
            left, start = len(text), len(tokens)
            while left > 0:
                start -= 1
                left -= len(tokens[start])
        else:  # characters of several tokens, which are no texts by themselves
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
        """The tokens of a text as the server cuts it, and their log-probabilities; of the first there is none."""
        # One token more is written, since not all servers will write none. It is the last one, where it is no end token
        # that the server keeps for itself.
        body = {"prompt": text, "max_tokens": 1, "temperature": 0.0, "logprobs": 1, "echo": True}
        choice = self._ask(PLAIN, body)
        found: Any = choice.get("logprobs")
        count = choice["usage"].get("prompt_tokens")
        try:
            tokens, values = list(map(str, found["tokens"])), list(found["token_logprobs"])
        except (TypeError, KeyError):
            raise self._silent() from None
        own = count if count in (len(tokens), len(tokens) - 1) else len(tokens) - 1
        if own < 1 or len(tokens) != len(values):
            raise self._silent()
        return tokens[:own], values[:own]

    def _silent(self) -> UserError:
        return UserError(
            f"{self._where(PLAIN)} answers without log-probabilities of the text that it was sent (echo: true with "
            "logprobs: 1); set server.log_probs: false, or take a server that gives them, vLLM for one"
        )

    # --- requests ---------------------------------------------------------------------------------------------------

    def _ask(self, path: str, body: dict[str, Any], draw: int | None = None) -> dict[str, Any]:
        """The first choice of the answer to a request, known or new; ``draw`` tells equal requests apart."""
        body = _encodable({"model": self.name, **body})
        request: dict[str, Any] = {"url": self.server.base_url.rstrip("/") + path, "body": body}
        if draw is not None:
            request["draw"] = draw
        known = self.cache.get(request) if self.cache else None
        if known is not None and _content(known, path) is not None:
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
        if self.cache:
            self.cache.put(request, choice)
        return choice

    def _send(self, path: str, body: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
        """Post a request, again where that may help.

        Raises:
            UserError: The server does not answer, refuses, or answers with something else than JSON, or see `connect`.
        """
        self.connect()
        for attempt in range(self.server.retries + 1):
            try:
                text: str = self._client.post(path, cast_to=str, body=body)
            except self._openai.APIError as error:
                # Without the error itself, which has the request and its headers with it.
                raise self._told(error, path) from None
            try:
                return _encodable(json.loads(text))
            except ValueError:  # cut off on its way, or a page of a proxy's
                if attempt < self.server.retries:
                    time.sleep(min(0.5 * 2**attempt, 8.0))
        raise UserError(
            f"{self._where(path)} answered {self.server.retries + 1} times with something that is no JSON: "
            f"{self._clean(text) or 'nothing at all'!r}; check server.base_url, which mostly ends in /v1"
        )

    def _told(self, error: Exception, path: str) -> UserError:
        """What a failed request means, in words."""
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
            what = f"check the key in the environment variable {variable}" if variable else (
                "name the environment variable with its key in server.api_key_variable"
            )  # fmt: skip
            return UserError(f"{where} refuses the key ({status}); {what}")
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
        """What to do about a 404: is it the model or the endpoint?"""
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
        """A server's words in one short line, without the key, which some repeat."""
        line = " ".join(text.split())
        if self._key:
            line = line.replace(self._key, "[key]")
        return line if len(line) <= SHOWN else line[:SHOWN] + "..."

    def _each(self, work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """Do the work for each item, several at a time; equal ones are done once.

        The threads are daemons, since those of a pool would hold up a run that was told to end until the last of their
        requests has timed out.
        """
        keys = [json.dumps(item, sort_keys=True) for item in items]
        waiting: queue.SimpleQueue[tuple[str, _Item]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[str, _Result | None, BaseException | None]] = queue.SimpleQueue()
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
                    done.put((key, work(item), None))
                except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                    done.put((key, None, error))

        for _ in range(min(self.server.concurrency, len(single))):
            threading.Thread(target=serve, daemon=True).start()
        results: dict[str, _Result] = {}
        try:
            while len(results) < len(single):
                key, result, error = done.get()
                if error is not None:
                    raise error
                results[key] = cast("_Result", result)
        finally:
            stopped.set()
        return [results[key] for key in keys]


def _content(choice: Any, path: str) -> str | None:  # noqa: ANN401 - JSON
    """The text of a choice, empty where the model has written none; ``None`` where it is no choice with a text."""
    try:
        text = choice["message"].get("content") if path == CHAT else choice["text"]
    except (TypeError, KeyError, AttributeError):
        return None
    if path == CHAT and text is None:
        return ""
    return text if isinstance(text, str) else None


def _encodable(data: Any) -> Any:  # noqa: ANN401 - JSON
    """JSON, half characters replaced: it can name them, but no file, request or tokenizer takes them."""
    text = json.dumps(data, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.loads(text.encode(errors="replace"))
    return data


def literal(stop: str) -> str | None:
    r"""The text that a pattern stands for, where it stands for one alone: a server takes no patterns.

    >>> literal(r"\n\n"), literal(r"\n\s*\n")
    ('\n\n', None)
    """
    text = stop.replace(r"\n", "\n").replace(r"\t", "\t")
    return text if text and not set(text) & set(r".^$*+?{}[]\|()") else None
