"""One step of a soft prompt and of a prefix for each architecture: loss, gradient and answers are the CPU's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.cases import TRAINED
from support.models import SHAPES
from support.pretend_device import NAME


@pytest.mark.parametrize(
    ("name", "shape"),
    [*(("soft, infill", shape) for shape in SHAPES), *(("prefix", shape) for shape in ("llama", "gpt2", "gemma3"))],
)
def test_one_step_gives_the_results_of_the_cpu(name: str, shape: str) -> None:
    found: list[tuple[Tensor, list[Tensor], list[str]]] = []
    for device in ("cpu", NAME):
        torch.manual_seed(0)
        method = TRAINED[name].make(model=f"{SHAPES[shape]},initializer_range=0.2")
        with torch.device(device):
            method.configure_model()
        examples = TRAINED[name].data().examples("train")[:4]
        prompt = method.current_prompt()
        loss = method.lm.score(examples, prompt, with_end=True).nll.mean()
        loss.backward()
        gradients = [value.grad.cpu() for value in method.trainable_parameters()]
        found.append((loss.detach().cpu(), gradients, method.lm.generate(examples, method.current_prompt(), 3)))
    (ours, our_gradients, our_answers), (theirs, their_gradients, their_answers) = found
    assert torch.allclose(ours, theirs, atol=1e-4)
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        assert torch.allclose(mine, other, atol=1e-4)
        assert mine.abs().max() > 1e-4
    assert our_answers == their_answers
