"""Check that packed scores of an architecture equal its own scores, before it is used.

Packed scoring is correct only if attention follows its `PackedLayout` and nothing else mixes tokens. Architectures
violate this in many ways (a window that only the mask contains, a token mixer other than attention, an encoder loaded
as a decoder), mostly without an error. The probe therefore compares scores of a *twin*: a model of the same class with
the same features, but with two layers of each kind, a width of 64 and random weights, in float32 on the CPU. The model
itself is unsuitable: billions of weights would take seconds, rounding in bfloat16 or quantised weights would hide
differences, and the rows of a probe would be shorter than its window of thousands of tokens.

The reference is the output of transformers for one row at a time, from token ids, without a cache, with the default
attention (SDPA if supported, because Falcon's eager attention adds its ALiBi biases twice). Models with capped scores
use eager attention, because some versions of transformers silently ignore the cap in SDPA. The user's cache folder
stores successful probes under a digest of everything that they depend on.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightning_prompts.errors import UserError
from lightning_prompts.files import cache_root, write_atomic
from lightning_prompts.lm.architectures import adapt, attention_of
from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.generation import Ending, generate_tokens
from lightning_prompts.lm.key_values import KeyValues
from lightning_prompts.lm.layout import KVCache, PackedLayout
from lightning_prompts.lm.packed import PackedLM
from lightning_prompts.lm.plan import build_prefix_tree

log = logging.getLogger(__name__)

SHARED = [5, 9, 30, 7, 21]  # common prefix of both rows
ROWS = [[*SHARED, 11, 40, 8, 33, 17, 25, 12], [*SHARED, 42, 6, 19, 28]]
GENERATED = 3
# The modules of this package that the result of a probe depends on.
SOURCES = (
    "probe",
    "architectures",
    "attention",
    "cascade",
    "layout",
    "packed",
    "generation",
    "plan",
    "key_values",
    "encoding",
    "transfer",
)
TOLERANCE = 1e-3  # of log-probabilities in nats; with random weights they differ by whole nats between tokens


def probe(config: PretrainedConfig, name: str) -> None:
    """Raise a `UserError` if packed scores of a model would differ from its own scores.

    Args:
        config: Configuration of the model.
        name: Name of the model in messages.
    """
    try:
        twin = twin_config(config)
        right = cache_root() / "probes" / _key(twin)  # store only successes, because an error may be temporary
        if right.exists():
            return
        found = difference(twin)
    except Exception as error:  # noqa: BLE001 - an architecture can raise any error
        found = _failed(config, error)
    if found:
        raise UserError(f"model {name!r} ({config.model_type}) cannot be scored packed: {found}; use another model")
    try:
        write_atomic(right, "")
    except (OSError, UserError) as error:
        log.debug("cannot store the result of the probe: %s", error)


def difference(twin: PretrainedConfig) -> str:
    """Describe the first difference between packed scores and own scores of a small model; empty if there is none."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), _quiet():
            torch.manual_seed(0)
            own, packed = _build(twin)
            return _compare(own, _Watched(packed, twin.model_type))
    except Exception as error:  # noqa: BLE001 - see above
        return _failed(twin, error)


def _failed(config: PretrainedConfig, error: Exception) -> str:
    log.debug("the probe of %s failed", config.model_type, exc_info=True)
    return f"a small model of its kind fails with {type(error).__name__} ({' '.join(str(error).split())[:160]})"


def _build(config: PretrainedConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Build an unchanged model of transformers and an adapted one with the same weights."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    own = _model(config, "eager" if capped else None)
    for weight in own.parameters():
        # Default weights are too small for attention to matter, and default biases are zero.
        if weight.dim() > 1:
            weight.normal_(0, weight.shape[-1] ** -0.5 * 1.5)
        else:
            weight.add_(torch.randn_like(weight) * 0.2)
    packed = _model(config, attention_of(config))
    packed.load_state_dict(own.state_dict(), assign=True)
    packed.tie_weights()
    return own, adapt(packed)


def _model(config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )
    model.eval().requires_grad_(False)
    return model


def _compare(own: PreTrainedModel, lm: _Watched) -> str:
    nothing = lm.embed(torch.empty(0, dtype=torch.long, device="cpu"))
    first = [_logits(own, ids) for ids in ROWS]
    if not _close(*(logits[: len(SHARED)] for logits in first)):
        return "it is not causal: a token changes predictions before it"
    if not _close(torch.cat([part[len(SHARED) - 1 :] for part in first]), _packed(lm, ROWS, len(SHARED))):
        return "its packed log-probabilities differ from those that transformers computes row by row"
    cache = KVCache(3)
    embeddings, layout = lm.pack([[SHARED[:3]]], nothing, cache)
    lm.logits(embeddings, layout, layout.last)
    prefix = KeyValues([cache.rows[layer] for layer in sorted(cache.rows)])
    rest = [ids[3:] for ids in ROWS]
    if not _close(torch.cat([part[len(SHARED) - 1 :] for part in first]), _packed(lm, rest, len(SHARED) - 3, prefix)):
        return "keys and values before all tokens have another effect than the tokens they come from"
    ending = Ending([GENERATED] * len(ROWS), [None] * len(ROWS), set(), lambda ids, special: "")
    lm.seen.clear()
    generated = generate_tokens(lm, [Row(ids, []) for ids in ROWS], nothing, ending, None)
    for ids, new, steps in zip(ROWS, generated, torch.stack(lm.seen, 1), strict=True):
        if not _close(_logits(own, ids + new)[len(ids) - 1 : -1], steps):
            return "generation with cached keys and values differs from its own scores"
    return ""


class _Watched(PackedLM):
    """Records its logits."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        super().__init__(model, name)
        self.seen: list[Tensor] = []

    def logits(self, embeddings: Tensor, layout: PackedLayout, places: Sequence[int] | Tensor) -> Tensor:
        self.seen.append(super().logits(embeddings, layout, places))
        return self.seen[-1]


def _logits(own: PreTrainedModel, ids: list[int]) -> Tensor:
    """Compute the logits ``[T, V]`` of one row."""
    logits: Tensor = own(input_ids=torch.tensor([ids], device="cpu"), use_cache=False).logits
    return logits[0]


def _packed(lm: PackedLM, rows: list[list[int]], shared: int, prefix: KeyValues | None = None) -> Tensor:
    """Compute packed logits ``[N, V]`` of rows, from the last shared token on."""
    prompt = lm.embed(torch.empty(0, dtype=torch.long, device="cpu")) if prefix is None else prefix
    levels = build_prefix_tree(rows, rows, [len(rows)], shared_prompt=True)
    embeddings, layout = lm.pack(levels, prompt)
    ends = layout.ends
    spots = [
        spot for start, end in zip([shared, *ends], ends, strict=False) for spot in (shared - 1, *range(start, end))
    ]
    return lm.logits(embeddings, layout, torch.tensor(spots, device="cpu"))


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one.float().log_softmax(-1) - other.float().log_softmax(-1)).abs().max() < TOLERANCE)


# --- the twin --------------------------------------------------------------------------------------------------------

HEADS, WINDOW, VOCABULARY = 4, 4, 64
# Upper limits of a twin's settings, by the ends of their names.
_SIZES = {
    name: size
    for size, names in (
        (VOCABULARY, "vocab_size vocab_size_per_layer_input n_vocab group_vocab"),
        (VOCABULARY - 1, "token_id token_index"),
        (HEADS, "attention_heads n_heads"),
        (WINDOW, "sliding_window window_size attention_window attention_chunk_size index_topk"),
        (48, "intermediate_size intermediate_size_mlp ffn_dim ffn_hidden_size n_inner d_ff dff"),
        (16, "lora_rank low_rank_dim"),
        (8, "hidden_size_per_layer_input laurel_rank"),
        (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
        (2, "index_block_size num_experts_per_tok top_k_experts moe_topk moe_k"),
        (1, "index_topk_blocks first_k_dense_replace num_dense_layers n_shared_experts"),
        (1, "n_group topk_group zero_expert_num"),
    )
    for name in names.split()
}
_WIDTHS = ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size", "emb_dim")
_HEAD_WIDTHS = ("head_dim", "rotary_dim", "d_kv", "kv_channels")


def twin_config(config: PretrainedConfig) -> PretrainedConfig:
    """Make a small config with the features of a large one: two layers of each kind, and a window shorter than rows."""
    twin = copy.deepcopy(config)
    twin.__dict__.pop("quantization_config", None)
    for part in (twin, *(getattr(twin, name, None) for name in twin.sub_configs)):
        if isinstance(part, PretrainedConfig):
            _shrink(part)
    return twin


def _shrink(config: PretrainedConfig) -> None:
    layers, heads = (_number(config, key) for key in ("num_hidden_layers", "num_attention_heads"))
    width = 16 if all(int(16 * part) % 2 == 0 for part in _rotary_parts(config)) else 40
    if layers is not None:
        _pick_layers(config, layers)
    smaller = functools.partial(_smaller, heads=heads, width=width)
    spec = getattr(config, "_heterogeneity_spec", None)  # overrides for single layers (Gemma 4)
    for overrides in spec.per_layer_overrides.values() if spec else ():
        for key, value in overrides.items():
            wider = key.endswith(_HEAD_WIDTHS) and value > vars(config)[key]
            overrides[key] = 2 * width if wider else smaller(key, value)
    for key, value in list(vars(config).items()):
        if isinstance(value, int | float):
            setattr(config, key, smaller(key, value))
        elif isinstance(value, list):
            setattr(config, key, [smaller(key, one) for one in value])
    if heads is not None:
        config.num_attention_heads = HEADS
    if hasattr(config, "qk_head_dim") and hasattr(config, "qk_nope_head_dim"):
        config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    for rope in ropes(config):
        for key, value in rope.items():
            if isinstance(value, list | tuple) and key.endswith("_factor"):
                rope[key] = list(value[: int(width * rope.get("partial_rotary_factor", 1.0)) // 2])
            elif key == "mrope_section":
                rope[key] = [width // 2 - 2 * (width // 6), width // 6, width // 6]


def _smaller(key: str, value: Any, heads: int | None, width: int) -> Any:  # noqa: ANN401 - any value of a config
    """Reduce a number of a config for a twin; return other values unchanged."""
    if isinstance(value, float) and key.endswith(("softcapping", "softcap", "logit_cap")):
        return min(value, 1.0)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if key.endswith(_WIDTHS) and value > HEADS:
        return HEADS * width
    if key.endswith(("key_value_heads", "kv_heads")):
        return HEADS if value == heads else min(value, 2)
    if key.endswith(_HEAD_WIDTHS):
        return min(value, width)
    special = ("pad_token_id", "bos_token_id", "eos_token_id")
    if key in special:
        return min(value, special.index(key))
    return min(value, next((size for name, size in _SIZES.items() if key == name or key.endswith("_" + name)), value))


def _pick_layers(config: PretrainedConfig, layers: int) -> None:
    """Reduce a config to two layers of each kind, where kinds differ in any list with one entry per layer."""
    lists = {
        key: value for key, value in vars(config).items() if isinstance(value, list | tuple) and len(value) == layers
    }
    spec = getattr(config, "_heterogeneity_spec", None)
    overrides = spec.per_layer_overrides if spec else {}
    kinds = [repr([overrides.get(index), *(value[index] for value in lists.values())]) for index in range(layers)]
    picks = [index for index in range(layers) if kinds[index] not in kinds[:index]][:4] * 2
    for key, value in lists.items():
        setattr(config, key, [value[index] for index in picks])
    if spec:
        new = {index: dict(overrides[old]) for index, old in enumerate(picks) if old in overrides}
        config._heterogeneity_spec = dataclasses.replace(spec, per_layer_overrides=new)
    config.num_hidden_layers = len(picks)
    if shared := getattr(config, "num_kv_shared_layers", 0):
        config.num_kv_shared_layers = min(shared, len(picks) // 2)


def _number(config: PretrainedConfig, name: str) -> int | None:
    """Read a number by its common name, which some architectures spell differently."""
    value = vars(config).get(config.attribute_map.get(name, name))
    return value if isinstance(value, int) else None


def ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the dictionaries of rotary settings; some configs have one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return []
    nested = [part for part in rope.values() if isinstance(part, dict)]
    return nested or [rope]


def _rotary_parts(config: PretrainedConfig) -> list[float]:
    parts = [rope.get("partial_rotary_factor") for rope in ropes(config)]
    return [float(part) for part in [*parts, getattr(config, "partial_rotary_factor", None)] if part is not None]


def _key(twin: PretrainedConfig) -> str:
    """Compute the file name of a result from the twin, the versions of torch and transformers, and this code."""
    features = {key: value for key, value in twin.to_dict().items() if key not in ("_name_or_path", "dtype")}
    described = json.dumps(features, sort_keys=True, default=str)
    return f"{twin.model_type}-{_digest_of(described + transformers.__version__ + torch.__version__ + _code())}"


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@functools.cache
def _code() -> str:
    """Digest the source files that the result of a probe depends on."""
    return _digest_of("".join(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in SOURCES))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of a twin, which do not concern the user."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
