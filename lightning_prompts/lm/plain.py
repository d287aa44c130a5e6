"""Score answers without packing: padded rows, and logits at every position.

This is the reference for tests and benchmarks of the packed path. It uses the masks and the attention of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_prompts.lm.frozen import FrozenLM
from lightning_prompts.lm.scores import Scores, answer_scores
from lightning_prompts.types import Example


def score_plain(
    lm: FrozenLM, examples: Sequence[Example], prompt: Tensor, padding: Literal["left", "right"] = "right"
) -> Scores:
    """Compute `FrozenLM.score` without packing or shared prefixes.

    Args:
        lm: The model.
        examples: ``B`` examples with answers.
        prompt: ``[P, D]`` or ``[B, P, D]``.
        padding: The side of the padding tokens.
    """
    rows = lm.encode_answers(examples, prompt)
    full = [row.context + row.answer for row in rows]  # without the text after the answer
    width = max(map(len, full))
    starts = [width - len(ids) if padding == "left" else 0 for ids in full]
    prompts = prompt if prompt.dim() == 3 else prompt.expand(len(rows), *prompt.shape)
    mask = torch.zeros(len(rows), width, dtype=torch.long, device=lm.device)
    filled = []
    for b, (ids, start) in enumerate(zip(full, starts, strict=True)):
        index = torch.tensor(ids, device=lm.device)
        vectors = lm.embed(index.clamp(min=0))
        soft = prompts[b][(-1 - index).clamp(min=0)] if prompts.shape[1] else vectors
        vectors = torch.where((index < 0)[:, None], soft.to(vectors.dtype), vectors)
        filled.append(torch.nn.functional.pad(vectors, (0, 0, start, width - start - len(ids))))
        mask[b, start : start + len(ids)] = 1
    embeddings = torch.stack(filled)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = lm.model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits.float()
    kept = [
        logits[b, start + len(ids) - len(row.answer) - 1 : start + len(ids) - 1]
        for b, (row, ids, start) in enumerate(zip(rows, full, starts, strict=True))
    ]
    return answer_scores(torch.cat(kept), rows)
