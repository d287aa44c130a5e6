"""Which frozen language model, in which precision, or behind which server."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning_prompts.errors import UserError, check_finite

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Quantization = Literal["int8", "nf4", "none"]
Attention = Literal["auto", "explicit", "cascade"]
Switch = Literal["auto"] | bool  # YAML reads on and off as truth values


@dataclass(frozen=True)
class Server:
    """A server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, Ollama, OpenAI and many others).

    Attributes:
        base_url: Its address up to the version, as in ``http://localhost:8000/v1``.
        api_key_variable: The environment variable with its key; ``None`` for no key. The key itself is in no config.
        chat: Whether its model has chats, which proposals are then asked for in.
        log_probs: Whether it gives log-probabilities of texts that it is sent (``echo`` with ``logprobs`` in
            ``/completions``), as vLLM and SGLang do; most paid services do not. What needs them refuses to run
            otherwise.
        context: Tokens that the model can take. Only the server knows its tokenizer, so a text's are estimated, as one
            for every three bytes.
        timeout: Seconds until a request without an answer is given up and sent again.
        retries: How often a request is sent again that had no answer, or was refused as one too many (429) or by a
            fault of the server's (5xx). The waits double from half a second to 8, or are what the server asks for.
        concurrency: Requests under way at the same time, of each process.
        cache: Keep answers under ``remote/`` of the cache folder, by address, model, parameters and text, so that none
            is paid for twice. Drawn texts are kept by their seed: a run with the same seed gets the same draws.
        parameters: Further settings of each request, as in ``{top_p: 0.9}``; null takes one out, as in
            ``{max_tokens: null, max_completion_tokens: 200}`` for models that think before they answer, or in ``{seed:
            null}`` for servers that know no seeds.
    """

    base_url: str
    api_key_variable: str | None = None
    chat: bool = True
    log_probs: bool = False
    context: int = 8192
    timeout: float = 120.0
    retries: int = 5
    concurrency: int = 8
    cache: bool = True
    parameters: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: The address is none, or has a secret in it; a number is out of range.
        """
        try:
            parts = urlsplit(self.base_url)
            whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            (parts.hostname or "").encode("idna")  # what of a name can be looked up
        except ValueError:
            whole = False
        if not whole:
            raise UserError(f"server.base_url must be an address as http://localhost:8000/v1, got {self.base_url!r}")
        if parts.username or parts.password or parts.query:
            raise UserError(
                f"server.base_url has a user, password or query in it (server {parts.hostname}), and a config is no "
                "place for secrets; put the key into an environment variable, and its name into server.api_key_variable"
            )
        for name, least in (("context", 1), ("retries", 0), ("concurrency", 1)):
            if getattr(self, name) < least:
                raise UserError(f"server.{name} must be at least {least}, got {getattr(self, name)}")
        check_finite("server.timeout", self.timeout, above=True)
        for name, value in (self.parameters or {}).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"server.parameters.{name} must be finite, got {value}")


@dataclass(frozen=True)
class LMConfig:
    """The frozen language model of a run; everything else about it is read from its own configuration.

    Attributes:
        name: ``smollm2-135m-instruct`` (embedded, needs no network), a hub id, a local folder, or
            ``random:TYPE[,key=value...]`` / ``random:FOLDER`` for a model of that shape with random weights.
        dtype: Precision of the LM's weights and activations, never of what is trained, which stays float32. ``auto``
            takes bfloat16 where a short measurement shows that the hardware is faster at it, else float32.
        quantization: ``int8`` or ``nf4`` weights through bitsandbytes; ``none`` or null for none. With ``int8``
            (LLM.int8) a score depends on the batch that it was computed in, since the outliers of all its tokens decide
            what is kept in half precision.
        revision: Commit, tag or branch of a hub model.
        gradient_checkpointing: Keep less for the backward pass and compute it again: less memory, a third more time.
        attention: How attention over a shared prefix is computed: ``cascade`` by flash kernels, one for each part of
            what a row sees, merged by their log-sum-exp; ``explicit`` with scores that are kept; ``auto`` chooses by
            device, precision and architecture. All give the same result up to rounding.
        graphs: Whether a step on CUDA is replayed as a CUDA graph from its second use of a shape on.
        compile: Whether the operations of a decoder layer are fused by `torch.compile`, for CUDA graphs. True from the
            first step, which takes some ten seconds; ``auto`` in runs of more than 500 steps that need not be
            deterministic; False never.
        calibrate_labels: Where answers are classes, take off what the model says without a question (contextual
            calibration, Zhao et al. 2021), whatever the method.
        server: Where the model runs, if not here; ``name`` is then the server's name for it. For methods whose prompts
            are texts and that need no gradient, as their LM, that of a layer, or as proposer.
    """

    name: str = "smollm2-135m-instruct"
    dtype: Dtype = "float32"
    quantization: Quantization | None = None
    revision: str | None = None
    gradient_checkpointing: bool = False
    attention: Attention = "auto"
    graphs: bool = True
    compile: Switch = "auto"
    calibrate_labels: bool = False
    server: Server | None = None

    def __post_init__(self) -> None:
        """Check what goes together.

        Raises:
            UserError: A setting is the server's own business.
        """
        if self.server is None:
            return
        plain = {"dtype": "float32", "quantization": (None, "none"), "revision": None, "gradient_checkpointing": False,
                 "attention": "auto", "graphs": True, "compile": "auto"}  # fmt: skip
        for name, default in plain.items():
            if getattr(self, name) not in (default if isinstance(default, tuple) else (default,)):
                raise UserError(f"{name} is decided where {self.name} runs ({self.server.base_url}); leave it out")
