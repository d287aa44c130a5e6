"""The pretend device computes the CPU's numbers, refuses what CUDA refuses, and counts what the host waits for."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from support.pretend_device import NAME, STRATEGY, waits


@pytest.fixture(autouse=True)
def _count_anew() -> Iterator[None]:
    waits.clear()
    yield
    waits.clear()


@pytest.fixture
def there() -> Tensor:
    return torch.arange(6.0, device="cpu").view(2, 3).to(NAME)


def kinds() -> list[str]:
    return sorted(kind for (kind, _), count in waits.items() for _ in range(count))


# --- numbers ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        states = self.norm(self.embed(ids))
        states = states + functional.softmax(states @ states.mT, -1) @ functional.gelu(self.mix(states))
        return self.head(states)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_training_gives_the_numbers_of_the_cpu(make: Callable[..., torch.optim.Optimizer]) -> None:
    found = []
    for device in ("cpu", NAME):
        torch.manual_seed(0)
        network = Network().to(device)
        optimizer = make(network.parameters(), lr=0.1)
        ids = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device)
        for _ in range(3):
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        found.append({"loss": loss.cpu(), **{key: value.cpu() for key, value in network.state_dict().items()}})
    for key, value in found[0].items():
        assert torch.allclose(value, found[1][key], atol=1e-5), key


def test_views_share_memory(there: Tensor) -> None:
    view = there.t()[1:].detach()
    view.zero_()
    there.data[0, 0] = 9.0
    assert there.tolist() == [[9.0, 0.0, 0.0], [3.0, 0.0, 0.0]]


def test_a_module_keeps_its_parameters_when_it_moves() -> None:
    network = Network()
    before = list(network.parameters())
    network.to(NAME)
    assert {value.device.type for value in network.parameters()} == {NAME}
    assert all(mine is old for mine, old in zip(network.parameters(), before, strict=True))
    assert network.head.weight is network.embed.weight


def test_a_tensor_and_a_module_can_be_deeply_copied(there: Tensor) -> None:
    for value in (there, nn.Parameter(there)):
        copied = copy.deepcopy(value)
        assert type(copied) is type(value)
        assert copied.device == value.device
        assert torch.equal(copied, value)
        value.data.add_(1.0)
        assert not torch.equal(copied, value)
    network = copy.deepcopy(Network().to(NAME))
    assert network.head.weight is network.embed.weight


def test_a_seed_means_other_numbers_than_on_the_cpu() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = torch.randn(4, device=NAME)
    assert torch.equal(torch.get_rng_state(), state), "the CPU's generator is not drawn from"
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4, device=NAME), first)
    own = torch.Generator(NAME).manual_seed(3)
    assert own.initial_seed() == 3
    assert torch.equal(torch.randn(4, device=NAME, generator=own), first)
    assert not torch.equal(torch.randn(4, generator=torch.Generator().manual_seed(3)), first.cpu())


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "work",
    [
        lambda there, here: there + here,
        lambda there, here: there @ here.t(),
        lambda there, here: torch.cat([there, here]),
        lambda there, here: torch.where(there > 1, there, here),
        lambda there, here: torch.equal(there, here),
        lambda there, here: functional.linear(there, here),
        lambda there, here: functional.embedding(torch.tensor([0]), there),
        lambda there, here: there.index_select(0, torch.tensor([0])),
        lambda there, here: there.gather(0, torch.zeros(1, 3, dtype=torch.long)),
        lambda there, here: here.index_add_(0, torch.tensor([0, 1]), there),
        lambda there, here: here.add_(there[0, 0]),
        lambda there, here: here[torch.tensor([0], device=NAME)],
        lambda there, here: there.masked_fill(here > 1, 0.0),
        lambda there, here: there.__setitem__(0, here[0]) if there.index_copy_(0, torch.tensor([0]), here) else None,
        lambda there, here: there.index_put_((torch.tensor([0]),), here[0]),
        lambda there, here: nn.Linear(3, 3)(there),
    ],
)
def test_two_devices_in_one_operation_are_refused(work: Callable[[Tensor, Tensor], Any], there: Tensor) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        work(there, torch.ones(2, 3))


def test_a_number_on_the_cpu_is_a_number(there: Tensor) -> None:
    number = torch.tensor(2.0)
    for result in (there * number, number * there, torch.where(there > 0, there, number), there / number):
        assert result.device.type == NAME
    there[0] = number
    there[torch.tensor([1])] = number
    assert there.tolist() == [[2.0] * 3] * 2
    assert (torch.tensor([1, 2], device=NAME) * 2.5).tolist() == [2.5, 5.0]
    assert (torch.ones(2, dtype=torch.bfloat16, device=NAME) * 2.5).dtype == torch.bfloat16


def test_numpy_is_refused(there: Tensor) -> None:
    with pytest.raises(TypeError, match=r"can't convert pretend:0 device type tensor to numpy"):
        there.numpy()


@pytest.mark.parametrize(
    ("device", "owner", "work"),
    [
        (NAME, "cpu", lambda generator: torch.randn(3, device=NAME, generator=generator)),
        (NAME, "cpu", lambda generator: torch.empty(3, device=NAME).uniform_(generator=generator)),
        (NAME, "cpu", lambda generator: torch.multinomial(torch.ones(3, device=NAME), 1, generator=generator)),
        ("cpu", NAME, lambda generator: torch.randperm(3, generator=generator)),
        ("cpu", NAME, lambda generator: torch.rand(3, device="cpu", generator=generator)),
    ],
)
def test_a_generator_of_another_device_is_refused(device: str, owner: str, work: Callable[[Any], Any]) -> None:
    with pytest.raises(RuntimeError, match=f"Expected a '{device}' device type for generator but found '{owner}'"):
        work(torch.Generator(owner))


def test_a_generator_of_the_cpu_is_refused_under_a_default_device() -> None:
    with torch.device(NAME), pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(3, generator=torch.Generator())


def test_a_checkpoint_needs_a_map_location(there: Tensor) -> None:
    file = io.BytesIO()
    torch.save({"whole": there, "part": there[1:], "parameter": nn.Parameter(there)}, file)
    file.seek(0)
    with pytest.raises(RuntimeError, match="pretend:0; load it with map_location='cpu'"):
        torch.load(file, weights_only=True)
    file.seek(0)
    loaded = torch.load(file, weights_only=True, map_location="cpu")
    assert {value.device.type for value in loaded.values()} == {"cpu"}
    assert loaded["part"].tolist() == [[3.0, 4.0, 5.0]]
    assert loaded["part"].untyped_storage()._cdata == loaded["whole"].untyped_storage()._cdata
    assert isinstance(loaded["parameter"], nn.Parameter)
    file = io.BytesIO()
    torch.save(there.cpu(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).device.type == "cpu"


# --- waits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda there: there.sum().item(), ["item"]),
        (lambda there: float(there[0, 0]), ["item"]),
        (lambda there: bool((there > 0).all()), ["item"]),
        (lambda there: torch.equal(there, there), ["item"]),
        (lambda there: there.nonzero(), ["size"]),
        (lambda there: there[there > 1], ["size"]),
        (lambda there: torch.unique(there), ["size"]),
        (lambda there: there.unique(dim=0), ["size"]),
        (lambda there: there.masked_select(there > 1), ["size"]),
        (
            lambda there: there.repeat_interleave(torch.tensor([1, 2], device="cpu").to(NAME, non_blocking=True), 0),
            ["size"],
        ),
        (lambda there: there.cpu(), ["download"]),
        (lambda there: there.tolist(), ["download"]),
        (lambda there: torch.zeros(2, 3).copy_(there, non_blocking=True), ["download"]),
        (lambda there: torch.save(there, io.BytesIO()), ["download"]),
        (lambda there: torch.tensor([1.0, 2.0], device=NAME), ["upload"]),
        (lambda there: torch.ones(2).to(NAME), ["upload"]),
        (lambda there: there[torch.tensor([0])], ["upload"]),
        (lambda there: there.copy_(torch.ones(2, 3)), ["upload"]),
    ],
)
def test_a_wait_is_counted_by_kind(work: Callable[[Tensor], Any], expected: list[str], there: Tensor) -> None:
    waits.clear()
    work(there)
    assert kinds() == expected


@pytest.mark.parametrize(
    "work",
    [
        lambda there: there.sum() + 1,
        lambda there: there[:, 1],
        lambda there: there[0, torch.zeros(2, dtype=torch.long, device=NAME)],
        lambda there: there.masked_fill(there > 1, 0.0),
        lambda there: there.__setitem__(there > 1, 0.0),
        lambda there: torch.where(there > 1, there, 0.0),
        lambda there: there.to("cpu", non_blocking=True),
        lambda there: torch.ones(2).to(NAME, non_blocking=True),
        lambda there: there.clone().double(),
        lambda there: there.repeat_interleave(2, 0),
        lambda there: there.repeat_interleave(torch.ones(2, dtype=torch.long, device=NAME), 0, output_size=2),
        lambda there: torch.randn(3, device=NAME).argmax(),
        lambda there: functional.cross_entropy(there, torch.zeros(2, dtype=torch.long, device=NAME)),
    ],
)
def test_what_does_not_wait_is_not_counted(work: Callable[[Tensor], Any], there: Tensor) -> None:
    waits.clear()
    work(there)
    assert kinds() == []


def test_a_wait_names_its_line(there: Tensor) -> None:
    waits.clear()
    there.sum().item()
    line = test_a_wait_names_its_line.__code__.co_firstlineno + 2
    assert list(waits) == [("item", f"tests/accelerator/test_pretend_device.py:{line} test_a_wait_names_its_line")]


def test_lightning_puts_a_model_on_the_device() -> None:
    trainer = L.Trainer(accelerator=NAME, strategy=STRATEGY, barebones=True)
    assert trainer.strategy.root_device == torch.device(NAME, 0)
