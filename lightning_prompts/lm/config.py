"""Settings of the frozen language model: name, precision, and server."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning_prompts.errors import UserError, check_at_least, check_finite

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Quantization = Literal["int8", "nf4", "none"]
Attention = Literal["auto", "explicit", "cascade"]
Switch = Literal["auto"] | bool  # YAML parses on and off as booleans


@dataclass(frozen=True)
class Server:
    """A server with an OpenAI-compatible API (vLLM, SGLang, llama.cpp, Ollama, OpenAI and many others).

    Attributes:
        base_url: Address including the version, for example ``http://localhost:8000/v1``.
        api_key_variable: Environment variable that holds the API key; ``None`` for no key. The key itself must not be
            in a config.
        chat: Whether the model supports chats. Proposals are then requested as chats.
        log_probs: Whether the server returns log-probabilities of prompts (``echo`` with ``logprobs`` in
            ``/completions``). vLLM and SGLang do; most paid services do not. Methods that need log-probabilities raise
            an error without this.
        context: Context window of the model in tokens. The tokenizer of the server is unknown, so the length of a text
            is estimated as one token per three bytes.
        timeout: Seconds after which a request without an answer is sent again.
        retries: Number of times to resend a request after a timeout, a rate limit (429) or a server error (5xx). The
            waits double from 0.5 to 8 seconds, unless the server asks for another wait.
        concurrency: Number of concurrent requests per process.
        cache: Cache answers under ``remote/`` in the cache folder, by address, model, parameters and text, so that no
            request is paid for twice. Samples are cached by seed: a run with the same seed gets the same samples.
        parameters: Further parameters of each request for a text, for example ``{top_p: 0.9}``; requests for
            log-probabilities have none. null removes a parameter, for example ``{max_tokens: null,
            max_completion_tokens: 200, stop: null}`` for reasoning models, or ``{seed: null}`` for servers without
            seeds.
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
            UserError: The address is invalid or contains a secret, or a number is out of range.
        """
        try:
            parts = urlsplit(self.base_url)
            whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            (parts.hostname or "").encode("idna")  # raises for host names that DNS cannot resolve
        except ValueError:
            whole = False
        if not whole:
            raise UserError(f"server.base_url must be a URL such as http://localhost:8000/v1, got {self.base_url!r}")
        if parts.username or parts.password or parts.query:
            raise UserError(
                f"server.base_url contains a user, password or query (server {parts.hostname}), but a config must not "
                "contain secrets; put the key into an environment variable and set server.api_key_variable to its name"
            )
        for name, least in (("context", 1), ("retries", 0), ("concurrency", 1)):
            check_at_least(f"server.{name}", getattr(self, name), least)
        check_finite("server.timeout", self.timeout, above=True)
        for name, value in (self.parameters or {}).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"server.parameters.{name} must be finite, got {value}")


@dataclass(frozen=True)
class LMConfig:
    """The frozen language model of a run. All other properties come from the configuration of the model itself.

    Attributes:
        name: ``smollm2-135m-instruct`` (embedded, needs no network), a hub id, a local folder, or
            ``random:TYPE[,key=value...]`` / ``random:FOLDER`` for a model of that shape with random weights.
        dtype: Precision of the LM's weights and activations. Trained parameters are always float32. ``auto`` selects
            bfloat16 if a short measurement shows that it is faster on the hardware, otherwise float32.
        quantization: ``int8`` or ``nf4`` weights through bitsandbytes; ``none`` or null for none. With ``int8``
            (LLM.int8), scores depend on the composition of the batch, because the outliers of all tokens in the batch
            select the columns that stay in half precision.
        revision: Commit, tag or branch of a hub model.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        attention: How to compute attention over a shared prefix: ``cascade`` with flash kernels, one for each level
            that a row attends to, merged by their log-sum-exps; ``explicit`` with a matrix of scores; ``auto`` chooses
            by device, precision and architecture. All give the same result up to rounding.
        graphs: Whether to replay a step on CUDA as a CUDA graph, from the second use of a shape.
        compile: Whether `torch.compile` fuses the operations of a decoder layer, for CUDA graphs. True compiles at the
            first step, which takes about ten seconds; ``auto`` compiles in runs of more than 500 steps that need not be
            deterministic; False never compiles.
        calibrate_labels: For answers that are classes, correct the scores by those without a question (contextual
            calibration, Zhao et al. 2021), for every method.
        server: The server that runs the model, or ``None`` to run it locally. ``name`` is then the name of the model on
            the server. Supported by methods whose prompts are texts, for their LM, the LM of a layer, or the proposer.
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
        """Check the combination of settings.

        Raises:
            UserError: A setting has no effect on a model behind a server.
        """
        if self.server is None:
            return
        plain = {
            "dtype": "float32",
            "quantization": (None, "none"),
            "revision": None,
            "gradient_checkpointing": False,
            "attention": "auto",
            "graphs": True,
            "compile": "auto",
        }
        for name, default in plain.items():
            if getattr(self, name) not in (default if isinstance(default, tuple) else (default,)):
                raise UserError(
                    f"{name} has no effect: {self.name} runs on a server ({self.server.base_url}); remove it"
                )
