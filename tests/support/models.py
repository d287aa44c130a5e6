"""Tiny random models, one of each architecture."""

from __future__ import annotations

SMALL = "hidden_size=32,intermediate_size=48,num_hidden_layers=3,num_attention_heads=4,num_key_value_heads=2"


SHAPES = {
    "llama": f"random:llama,{SMALL},max_position_embeddings=256",
    "gpt2": "random:gpt2,n_embd=32,n_layer=3,n_head=4,n_positions=256",
    "qwen2": f"random:qwen2,{SMALL},max_position_embeddings=256",
    "qwen3": f"random:qwen3,{SMALL},head_dim=8,max_position_embeddings=256",
    # A window of 6 is shorter than prompt and text, so what lies outside of it matters.
    "gemma3": f"random:gemma3_text,{SMALL},head_dim=8,sliding_window=6,sliding_window_pattern=2,"
    "max_position_embeddings=256",
    "gemma2": f"random:gemma2,{SMALL},head_dim=8,sliding_window=6,attn_logit_softcapping=0.05,"
    "max_position_embeddings=256",
    "mistral": f"random:mistral,{SMALL},sliding_window=6,max_position_embeddings=256",
}


TINY = SHAPES["llama"]
SMALLEST = TINY.replace("num_hidden_layers=3", "num_hidden_layers=1")  # where the LM is not the point
