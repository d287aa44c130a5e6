"""A small server of OpenAI's protocol that serves models of this project, with faults on demand.

`serve` sends its port, and ends when the other end of its pipe is closed. The server has /v1/models, /v1/completions
(max_tokens, temperature, seed, n, stop, logprobs, echo) and /v1/chat/completions. POST /control takes {"faults": [...],
"always": ..., "slow": seconds, "log_probs": bool, "chat_only": bool, "said": TEXT, "clear": true}; GET /control tells
what was asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any

import torch

from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig, Sampling
from lightning_prompts.lm.encoding import Row
from lightning_prompts.types import Example

CHAT = "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}assistant: "


class State:
    """What all requests share."""

    def __init__(self, models: dict[str, str], key: str | None) -> None:
        self.models, self.key = models, key
        self.loaded: dict[str, FrozenLM] = {}
        self.model_lock, self.lock = threading.Lock(), threading.Lock()
        self.running = self.epoch = 0
        self.control({"clear": True})

    def control(self, wanted: dict[str, Any]) -> None:
        if wanted.pop("clear", False):
            self.faults: list[str] = []
            self.always: str | None = None
            self.slow, self.log_probs, self.chat_only, self.most_at_once = 0.0, True, False, 0
            self.said: str | None = None  # instead of an answer of the model's
            self.requests: list[dict[str, Any]] = []
            self.running, self.epoch = 0, self.epoch + 1  # what still runs is of another test
        for name, value in wanted.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    def fault(self) -> str | None:
        with self.lock:
            return self.faults.pop(0) if self.faults else self.always

    def model(self, name: str) -> FrozenLM:
        if name not in self.loaded:
            self.loaded[name] = lm = FrozenLM.load(LMConfig(self.models[name]))
            lm.tokenizer.chat_template = lm.tokenizer.chat_template or CHAT
        return self.loaded[name]

    def complete(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        lm = self.model(body["model"])
        none = torch.empty(0, lm.width)
        if chat:
            turns = {message["role"]: message["content"] for message in body["messages"]}
            example = Example(turns["user"], "", None, chat=True, system=turns.get("system"))
        else:
            example = Example(body["prompt"], "", None)
        (row,) = lm.encode([example], 0)
        limit, temperature, count = body["max_tokens"], body.get("temperature", 1.0), body.get("n", 1)
        draws = [body.get("seed", time.time_ns() % 2**31) + k for k in range(count)]
        sampling = Sampling(temperature, draws) if temperature else None
        ends = [re.escape(text) for text in body.get("stop", [])]
        stops = [f"(?:{'|'.join(ends)})"] * count if ends else None
        choices = []
        written = lm.generate_tokens([row] * count, none, limit, stops, sampling)
        for index, ids in enumerate(written):
            text = lm.text(ids, special=False)
            found = min((at for end in body.get("stop", []) if (at := text.find(end)) >= 0), default=None)
            finish = "stop" if found is not None or len(ids) < limit else "length"
            text = text[:found]
            choice: dict[str, Any] = {"index": index, "finish_reason": finish}
            if chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = (body["prompt"] if body.get("echo") else "") + text
                if body.get("logprobs") is not None and self.log_probs:
                    choice["logprobs"] = self.scores(lm, row.context, ids, bool(body.get("echo")))
            choices.append(choice)
        usage = {"prompt_tokens": len(row.context), "completion_tokens": sum(map(len, written))}
        return {"object": "text_completion", "model": body["model"], "choices": choices, "usage": usage}

    @staticmethod
    def scores(lm: FrozenLM, context: list[int], ids: list[int], echo: bool) -> dict[str, Any]:
        whole = context + ids
        with torch.no_grad():
            logits = lm.answer_logits([Row(whole[:1], whole[1:])], torch.empty(0, lm.width))
        values = torch.log_softmax(logits, -1).gather(1, torch.tensor(whole[1:])[:, None])[:, 0].tolist()
        tokens = [lm.text([token]) for token in whole]
        offsets = [sum(map(len, tokens[:k])) for k in range(len(tokens))]
        start = 0 if echo else len(context)
        return {"tokens": tokens[start:], "token_logprobs": [None, *values][start:], "text_offset": offsets[start:]}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: object, kind: str = "application/json", **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str) -> None:
        self.reply(status, {"error": {"message": message, "type": "error", "code": status}}, retry_after_ms="20")

    def allowed(self) -> bool:
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.state.key in (None, sent):
            return True
        self.refuse(401, f"Incorrect API key provided: {sent}.")
        return False

    def do_GET(self) -> None:
        state = self.state
        if self.path == "/control":
            self.reply(200, {"requests": state.requests, "most_at_once": state.most_at_once})
        elif self.allowed() and self.path == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in state.models]})
        else:
            self.refuse(404, "Not Found")

    def do_POST(self) -> None:
        state = self.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/control":
            state.control(body)
            return self.reply(200, {})
        with state.lock:
            state.running += 1
            state.most_at_once = max(state.most_at_once, state.running)
            epoch = state.epoch
            entry = {"path": self.path, "body": body}
            state.requests.append(entry)
        try:
            return self.answer(body, entry)
        finally:
            with state.lock:
                state.running -= epoch == state.epoch

    def answer(self, body: dict[str, Any], entry: dict[str, Any]) -> None:
        state = self.state
        fault = state.fault()
        if fault == "drop":
            self.close_connection = True
            return None
        if fault == "slow" or state.slow:
            time.sleep(state.slow)
        if fault in ("500", "503", "429", "400"):
            return self.refuse(int(fault), "this was ordered")
        if fault in ("garbage", "html"):
            page = '{"choices": [{"te' if fault == "garbage" else "<html><body>Bad gateway</body></html>"
            return self.reply(200, page, "application/json" if fault == "garbage" else "text/html")
        if fault == "empty":
            return self.reply(200, {"choices": []})
        if state.said is not None:
            return self.reply(200, state.said)
        chat = self.path == "/v1/chat/completions"
        if not chat and (self.path != "/v1/completions" or state.chat_only):
            return self.refuse(404, "Not Found")
        if not self.allowed():
            return None
        if body["model"] not in state.models:
            return self.refuse(404, f"The model `{body['model']}` does not exist.")
        try:
            with state.model_lock:
                answer = state.complete(body, chat)
        except UserError as error:
            return self.refuse(400, str(error))
        entry["usage"] = answer["usage"]
        return self.reply(200, answer)


def serve(models: dict[str, str], key: str | None, pipe: Connection, other_end: Connection) -> None:
    """Serve models by their names, until nobody holds the other end of the pipe."""
    other_end.close()  # this process's copy
    torch.set_num_threads(1)
    Handler.state = State(models, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(server.server_address[1])
    with contextlib.suppress(EOFError):
        pipe.recv()
    os._exit(0)  # whatever is still being written
