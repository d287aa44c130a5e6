"""Which frozen language model, in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Quantization = Literal["int8", "nf4", "none"]


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
        calibrate_labels: Where answers are classes, take off what the model says without a question (contextual
            calibration, Zhao et al. 2021), whatever the method.
    """

    name: str = "smollm2-135m-instruct"
    dtype: Dtype = "float32"
    quantization: Quantization | None = None
    revision: str | None = None
    gradient_checkpointing: bool = False
    calibrate_labels: bool = False
