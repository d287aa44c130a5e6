"""Load the transformers model and the tokenizer of an `LMConfig`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    dynamic_module_utils,
)
from transformers.utils import logging as transformers_logging

from lightning_prompts.errors import UserError, check_installed, nearest
from lightning_prompts.lm.architectures import adapt, attention_of
from lightning_prompts.lm.attention import checkpoint_contexts
from lightning_prompts.lm.config import LMConfig
from lightning_prompts.lm.embedded import EMBEDDED, embedded_folder
from lightning_prompts.lm.precision import dtype_of
from lightning_prompts.lm.probe import probe, ropes
from lightning_prompts.randomness import seeded

log = logging.getLogger(__name__)

# Refuse custom code of a model folder even where a library does not pass trust_remote_code. 0 means "do not ask".
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

RANDOM = "random:"


def load_model(
    config: LMConfig, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load weights and tokenizer, frozen and in eval mode.

    Args:
        config: Settings of the model.
        device: Device of the weights, which are read directly onto it; ``None`` for torch's default device.

    Returns:
        The model, with the attention of this project, and its tokenizer.

    Raises:
        UserError: The name is unknown, weights are missing, or the architecture is not supported.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    dtype = dtype_of(config, device)
    if config.name.startswith(RANDOM):
        model, tokenizer = _random_model(config, dtype, device)
    else:
        with _files(config) as folder:
            model = _from_files(folder, config, dtype, device)
            tokenizer = AutoTokenizer.from_pretrained(folder, revision=config.revision, trust_remote_code=False)
    if config.gradient_checkpointing:
        _checkpoint_gradients(model)
    check_supported(model.config, config.name)
    _check_vocabulary(model, tokenizer, config.name)
    _warn_of_unquantized_experts(model, config)
    model.requires_grad_(False)
    for module in model.modules():
        # At the first pass without gradients, bitsandbytes repacks 4-bit weights for the CPU. Later passes then have no
        # gradients, without an error, so training would stop at the first validation.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model, tokenizer


def check_supported(config: PretrainedConfig, name: str) -> None:
    """Raise a `UserError` for an architecture that packed scoring does not support.

    Args:
        config: Configuration of the model.
        name: Name of the model in messages.
    """
    layer_types = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    if unknown := layer_types - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"model {name!r} has layers of type {', '.join(sorted(unknown))}, which packed scoring does not "
            "support; use a model with full or sliding-window attention"
        )
    probe(config, name)


def context_window(config: PretrainedConfig, name: str) -> int:
    """Return the number of tokens of the longest row that a model can read in a pass with other rows.

    LongRoPE (Phi-3-mini-128k) takes other rotary factors for all rows of a pass once one of them exceeds the original
    window, so that the scores of a row would depend on its neighbours. Its window is therefore the original one.

    Args:
        config: Configuration of the model.
        name: Name of the model in messages.
    """
    text = config.get_text_config()
    window = int(getattr(text, "max_position_embeddings", None) or 1 << 30)
    known = [rope for rope in ropes(text) if rope.get("rope_type") == "longrope"]
    context = min([window, *(int(rope["original_max_position_embeddings"]) for rope in known)])
    if context < window:
        log.warning(
            "%s reads at most %d tokens here and not %d: with longer texts, LongRoPE would make the scores of a row "
            "depend on the other rows of its batch",
            name,
            context,
            window,
        )
    return context


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise a `UserError` for tokens without embeddings; warn if all of them are special tokens."""
    rows = len(next(iter(model.get_input_embeddings().parameters())))
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    if not beyond:
        return
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    message = (
        f"model {name!r} has {rows} embeddings, but its tokenizer has {max(beyond.values()) + 1} tokens "
        f"({', '.join(map(repr, sorted(beyond, key=beyond.__getitem__)[:3]))} and so on have none)"
    )
    if not special.issuperset(beyond.values()):
        raise UserError(f"{message}; call resize_token_embeddings and save the model again, or use its own tokenizer")
    log.warning("%s; texts that contain one of these special tokens raise an error", message)


def _warn_of_unquantized_experts(model: PreTrainedModel, config: LMConfig) -> None:
    """Log the weights of experts, which bitsandbytes does not quantise because they are not in linear layers."""
    if config.quantization in (None, "none"):
        return
    left = [weight for weight in model.parameters() if weight.dim() > 2 and weight.is_floating_point()]
    if left:
        size = sum(weight.numel() * weight.element_size() for weight in left)
        log.warning(
            "model %r: quantization %s leaves the weights of its experts in %s, which take %.1f MiB; "
            "model.lm.dtype: bfloat16 halves the memory of float32",
            config.name,
            config.quantization,
            str(left[0].dtype).removeprefix("torch."),
            size / 2**20,
        )


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing."""
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"{type(model).__name__} does not support gradient checkpointing; set gradient_checkpointing: false"
        )
    # Re-entrant checkpointing loses gradients of tensors that are not inputs of the layer (a prefix). The frozen model
    # is deterministic, so no RNG state needs to be preserved, which CUDA graphs do not support.
    settings = {"use_reentrant": False, "context_fn": checkpoint_contexts, "preserve_rng_state": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name in newer versions
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)
    model.disable_input_require_grads()  # only re-entrant checkpointing needs it
    # transformers checkpoints layers only in training mode, in which some layers apply dropout (OPT, XGLM).
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            rates = vars(owner).items() if owner is not None else ()
            for name in [name for name, value in rates if "drop" in name and isinstance(value, float)]:
                setattr(owner, name, 0.0)


def load_tokenizer(config: LMConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, without its weights.

    Raises:
        UserError: The tokenizer cannot be loaded.
    """
    if config.name.startswith(RANDOM):
        return byte_tokenizer()
    with _files(config) as folder:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, revision=config.revision, trust_remote_code=False
        )
    return tokenizer


@contextmanager
def _files(config: LMConfig) -> Iterator[str]:
    """Give the folder or the hub id of a model, and turn errors of its files into one-line `UserError`s."""
    folder = str(embedded_folder(config.name)) if config.name in EMBEDDED else config.name
    if not Path(folder).is_dir():
        _check_hub(folder, config)
    try:
        yield folder
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model {config.name!r} does not load: {reason[:400]}") from error


def _from_files(folder: str, config: LMConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the model of a folder or hub id, quantised according to the config."""
    transformers_logging.disable_progress_bar()
    found = AutoConfig.from_pretrained(folder, revision=config.revision, trust_remote_code=False)
    check_supported(found, config.name)  # before loading, which can take minutes
    with device:  # transformers reads each weight directly onto the default device
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            config=found,
            dtype=dtype,
            revision=config.revision,
            attn_implementation=attention_of(found),
            quantization_config=_quantization(config, dtype),
            trust_remote_code=False,
        )
    return adapt(model)


def _check_hub(name: str, config: LMConfig) -> None:
    """Raise a `UserError` quickly for an unavailable hub id, without retries for each file."""
    if Path(name).is_absolute() or name.startswith("."):
        raise UserError(f"model folder {name!r} does not exist")
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=config.revision), str):
            return
        HfApi().model_info(name, revision=config.revision, timeout=10)
    except Exception as error:
        raise UserError(
            f"model {name!r} is neither embedded, nor a local folder, nor available on the hub "
            f"(no such id, or no network: {type(error).__name__}); {nearest(name, [*EMBEDDED, RANDOM + 'TYPE'])}"
        ) from error


def _quantization(config: LMConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if config.quantization in ("int8", "nf4"):
        check_installed(f"quantization {config.quantization}", "quantization", "bitsandbytes", "accelerate")
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if config.quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return None


def _random_model(
    config: LMConfig, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a model with random weights, equal on every device, and its tokenizer, byte-level if it has none."""
    with _of_shape(config.name), seeded(0), torch.device("cpu"):
        model_config, tokenizer = _random_config(config.name)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, attn_implementation=attention_of(model_config), trust_remote_code=False
        )
    if _quantization(config, dtype) is None:
        model.to(device)  # type: ignore[arg-type]
        return adapt(model), tokenizer
    with tempfile.TemporaryDirectory() as folder:  # bitsandbytes quantises while loading
        model.save_pretrained(folder)
        return _from_files(folder, replace(config, revision=None), dtype, device), tokenizer


def _random_config(name: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Parse the name of a random model into its configuration and its tokenizer."""
    shape, *pairs = name.removeprefix(RANDOM).split(",")
    tokenizer: PreTrainedTokenizerBase = byte_tokenizer()
    overrides = dict(pair.split("=", 1) for pair in pairs)
    settings: dict[str, Any] = {key: _value(value) for key, value in overrides.items()}
    if Path(shape).exists() or "/" in shape:
        config = AutoConfig.from_pretrained(shape, trust_remote_code=False, **settings)
        if Path(shape).is_dir() and (Path(shape) / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(shape, trust_remote_code=False)
    else:
        settings.setdefault("vocab_size", len(tokenizer))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            settings.setdefault(key, tokenizer.eos_token_id)
        config = AutoConfig.for_model(shape, **settings)
    if config.get_text_config().vocab_size < len(tokenizer):
        raise ValueError(f"vocab_size must be at least {len(tokenizer)}, the tokenizer's")
    return config, tokenizer


@contextmanager
def _of_shape(name: str) -> Iterator[None]:
    """Turn all errors of a random model's configuration into one-line `UserError`s."""
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError, AttributeError, StrictDataclassError) as error:
        raise UserError(
            f"model {name!r}: {' '.join(str(error).split())[:300]}; "
            "write random:TYPE,key=value,... with a transformers model type, such as random:llama,hidden_size=64"
        ) from error


def weightless_model(config: LMConfig, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Make the model of a config on the meta device, without weights.

    Args:
        config: Settings of the model.
        device: Device that the model would run on, which resolves ``dtype: auto``.

    Raises:
        UserError: The name is unknown, or the architecture is not supported.
    """
    if config.name.startswith(RANDOM):
        with _of_shape(config.name):
            model = _on_meta(_random_config(config.name)[0], dtype_of(config, device))
        check_supported(model.config, config.name)
        return model
    with _files(config) as folder:
        found = AutoConfig.from_pretrained(folder, revision=config.revision, trust_remote_code=False)
        model = _on_meta(found, dtype_of(config, device))
    check_supported(model.config, config.name)
    return model


def _on_meta(model_config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)
    return model


def _value(text: str) -> int | float | bool | str | None:
    if text in ("true", "false", "null"):
        return None if text == "null" else text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with the 256 bytes and an end token, for models without a tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
