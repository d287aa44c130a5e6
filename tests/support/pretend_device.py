"""``torch.device("pretend")``: a device that is not the CPU, on a machine that has nothing else.

Its tensors are plain tensors of PyTorch's PrivateUse1 backend. Each of their storages keeps the CPU storage that holds
its numbers. One kernel for all operators takes the CPU tensors out, runs the CPU's kernel, and wraps the result, so the
numbers are the CPU's. Autograd, views and optimisers are PyTorch's own.

The device refuses what CUDA refuses: tensors of two devices in one operation, ``.numpy()``, a generator of another
device, a checkpoint that is loaded without ``map_location``. `waits` counts what makes the host wait for CUDA.

    with installed():
        L.Trainer(accelerator="pretend", strategy="pretend_single", ...)

There is one such device. It has no streams, no pinned memory, no memory statistics, no autocast and no kernels of its
own, and ``device.type`` is not ``cuda``.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
STRATEGY = "pretend_single"
ROOT = f"{Path(__file__).parents[2]}/"

waits: Counter[tuple[str, str]] = Counter()  # (kind, place) -> how often the host waited there

_aten = torch.ops.aten
_META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)  # its kernels set sizes and strides and touch no memory

# --- tensors ---------------------------------------------------------------------------------------------------------


def on_device(value: object) -> bool:
    """Whether ``value`` is a tensor of this device."""
    return isinstance(value, Tensor) and value.device.type == NAME


def to_host(tensor: Tensor) -> Tensor:
    """The CPU tensor behind a tensor of the device; it shares its memory."""
    host = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return host.set_(tensor.untyped_storage().host, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[attr-defined]


def to_device(host: Tensor, into: Tensor | None = None) -> Tensor:
    """A tensor of the device that shares the memory of a CPU tensor; ``into``, if given, becomes that tensor."""
    tensor = torch._C._acc.create_empty_tensor((0,), host.dtype) if into is None else into
    storage, memory = tensor.untyped_storage(), host.untyped_storage()
    storage.host = memory  # type: ignore[attr-defined]
    memory.of_device = True  # type: ignore[attr-defined]  # `_location` asks
    resize = _aten.set_.source_Storage_storage_offset.redispatch
    resize(_META, tensor, storage, 0, [memory.nbytes() // host.element_size()], [1])  # as large as any view needs
    return resize(_META, tensor, storage, host.storage_offset(), host.shape, host.stride())


# --- waiting ---------------------------------------------------------------------------------------------------------

# Operators whose result, or the size of it, the host has to know.
_WAITING = {
    "_local_scalar_dense": "item",
    "equal": "item",
    **dict.fromkeys(("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"), "size"),
}
_INDEXING = ("index", "_unsafe_index", "_index_put_impl_")


def _wait(kind: str) -> None:
    """Count a wait at the innermost line of this project; where Lightning is in between, its line is named as well."""
    frame, through = sys._getframe(2), ""
    while frame is not None:
        file, line = frame.f_code.co_filename, f"{frame.f_lineno} {frame.f_code.co_name}"
        if file.startswith(ROOT) and "site-packages" not in file and file != __file__:
            waits[kind, f"{file.removeprefix(ROOT)}:{line}{through and f' > {through}'}"] += 1
            return
        if not through and "/lightning/" in file:
            through = f"{'/'.join(Path(file).parts[-2:])}:{line}"
        frame = frame.f_back
    waits[kind, through or "elsewhere"] += 1


def _count(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count what an operator waits for: ``item``, ``size`` (of a result) or ``upload`` (of an index)."""
    if name in _WAITING:
        _wait(_WAITING[name])
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        _wait("size")
    elif name in _INDEXING and not _is_masked_fill(name, args):
        for index in args[1]:
            if index is not None and not on_device(index):
                _wait("upload")
            elif index is not None and index.dtype in (torch.bool, torch.uint8):
                _wait("size")


def _is_masked_fill(name: str, args: tuple[Any, ...]) -> bool:
    """Whether ``tensor[mask] = number``, which CUDA does without knowing how often the mask is true."""
    return name == "_index_put_impl_" and args[2].dim() == 0 and not any(args[3:4])


# --- operators -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Traits:
    """What the kernel asks about an operator.

    Attributes:
        name: Without namespace and overload.
        takes_numbers: Whether CUDA takes a CPU tensor without dimensions for a number.
        tensors: The positions of arguments that are tensors.
        written: The positions of arguments that it changes.
        random: Whether it draws random numbers.
    """

    name: str
    takes_numbers: bool
    tensors: tuple[int, ...]
    written: tuple[int, ...]
    random: bool

    @staticmethod
    @functools.cache
    def of(op: Any) -> _Traits:
        name = op._schema.name.split("::")[1]
        packet = getattr(_aten, name.rstrip("_"), None)
        overloads = [op, *(getattr(packet, overload) for overload in (packet.overloads() if packet else ()))]
        pointwise = any(torch.Tag.pointwise in overload.tags for overload in overloads)
        arguments = list(enumerate(op._schema.arguments))
        return _Traits(
            name,
            name != "equal" and (pointwise or name.rstrip("_") in ("floor_divide", "fill", "index_fill")),
            tuple(index for index, argument in arguments if str(argument.type) == "Tensor"),
            tuple(index for index, argument in arguments if argument.alias_info and argument.alias_info.is_write),
            torch.Tag.nondeterministic_seeded in op.tags,
        )


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to a tensor, or to all tensors of a list, tuple or dict of operands or results."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(_map(function, part) for part in value)
    return {key: _map(function, part) for key, part in value.items()} if isinstance(value, dict) else value


def _refuse_two_devices(traits: _Traits, args: tuple[Any, ...], foreign: list[Tensor]) -> None:
    """Raise CUDA's error for operands of two devices.

    Args:
        traits: Of the operator.
        args: Its positional arguments.
        foreign: All operands that are on the CPU.
    """
    if traits.name in _INDEXING and on_device(args[0]):  # indices may be on the CPU, and a value without dimensions
        foreign = [value for value in args[2:3] if value.dim() and not on_device(value)]
    numbers = traits.takes_numbers and all(value.dim() == 0 for value in foreign)
    changed = (value for index, value in enumerate(args) if index in traits.written)
    if foreign and not (numbers and all(map(on_device, changed))):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu! "
            f"(in aten::{traits.name})"
        )


def _with_numbers_as_tensors(traits: _Traits, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Python passes numbers where an operator wants tensors; as tensors they must not change the result's dtype."""
    for index in traits.tensors:
        if index < len(args) and isinstance(value := args[index], int | float):
            like = next((other.dtype for other in args if isinstance(other, Tensor)), torch.float32)
            fits = like.is_floating_point or isinstance(value, bool) or (isinstance(value, int) and like != torch.bool)
            tensor = torch.tensor(value, dtype=like if fits else None, device="cpu")
            args = (*args[:index], tensor, *args[index + 1 :])
    return args


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run any operator that PyTorch does not compose of others."""
    with torch._C.DisableTorchFunction():
        traits = _Traits.of(op)
        if traits.name in ("as_strided", "set_"):
            return op.redispatch(_META, *args, **kwargs)
        args = _with_numbers_as_tensors(traits, args)
        inner: dict[int, tuple[Tensor, Tensor]] = {}  # id of an operand -> the operand, the CPU tensor behind it
        foreign: list[Tensor] = []

        def unwrapped(value: Tensor) -> Tensor:
            if on_device(value):
                return inner.setdefault(id(value), (value, to_host(value)))[1]
            foreign.append(value)
            return value

        host_args, host_kwargs = _map(unwrapped, args), _map(unwrapped, kwargs)
        if foreign:
            _refuse_two_devices(traits, args, foreign)
        _count(traits.name, args, kwargs)
        if host_kwargs.get("device") is not None:
            host_kwargs |= {"device": torch.device("cpu"), "pin_memory": False}
        own_numbers = traits.random and kwargs.get("generator") is None
        with _own_random_numbers() if own_numbers else torch.no_grad():
            result = op(*host_args, **host_kwargs)
        given = {id(host): outer for outer, host in inner.values()}
        owner = {host.untyped_storage()._cdata: outer for outer, host in reversed(inner.values())}
        return _map(functools.partial(_wrapped, traits.name, given, owner), result)


def _wrapped(name: str, given: dict[int, Tensor], owner: dict[int, Tensor], value: Tensor) -> Tensor:
    """A result on the device: an operand that was changed in place, a view of an operand, or a new tensor."""
    if (changed := given.get(id(value))) is not None:
        same = changed.shape == value.shape and changed.stride() == value.stride()
        return changed if same else to_device(value, changed)
    base = owner.get(value.untyped_storage()._cdata)
    if base is None:
        return to_device(value)
    if base.dtype != value.dtype:
        raise NotImplementedError(f"a view of another dtype (aten::{name}) on {NAME}")
    return _aten.as_strided.default.redispatch(_META, base, value.shape, value.stride(), value.storage_offset())


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between or within devices. Uploads wait unless they are ``non_blocking``; downloads always do."""
    with torch._C.DisableTorchFunction():
        if on_device(source) and not on_device(target):
            _wait("download")
        elif not on_device(source) and not non_blocking:
            _wait("upload")
        (to_host(target) if on_device(target) else target).copy_(to_host(source) if on_device(source) else source)
        return target


def _to_copy(
    source: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """``tensor.to(...)``; a ``non_blocking`` download goes to pinned memory on CUDA, and the host does not wait."""
    del layout, pin_memory
    with torch._C.DisableTorchFunction():
        target = torch.empty_like(
            source,
            dtype=dtype or source.dtype,
            device=device or source.device,
            memory_format=memory_format or torch.preserve_format,
        )
        if non_blocking and not on_device(target):
            return target.copy_(to_host(source))
        return target.copy_(source, non_blocking)


# --- random numbers --------------------------------------------------------------------------------------------------


class _AnyGenerator(type(torch._C.Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, torch._C.Generator)


class Generator(torch._C.Generator, metaclass=_AnyGenerator):
    """``torch.Generator`` that may be of this device; like CUDA's, it then draws other numbers from the same seed."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        """Remember the device; to PyTorch it is a generator of the CPU."""
        self = super().__new__(cls)
        self._device = torch.device(device)
        return self

    device = property(lambda self: self._device)

    def _own(self, seed: int) -> int:
        return seed if self._device.type == "cpu" else seed ^ 0x5EED

    def manual_seed(self, seed: int) -> Generator:
        """See `torch.Generator`."""
        super().manual_seed(self._own(seed))
        return self

    def initial_seed(self) -> int:
        """See `torch.Generator`."""
        return self._own(super().initial_seed())


_default_generator = Generator("privateuseone")


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Draw from the device's generator, and leave the CPU's as it is."""
    host = torch.default_generator.get_state()
    torch.default_generator.set_state(_default_generator.get_state())
    try:
        yield
    finally:
        _default_generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(host)


class _RefuseGeneratorsOfOthers(TorchFunctionMode):
    """Raises CUDA's error for a generator of another device; operators cannot see of which device one is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (generator := kwargs.get("generator")) is not None:
            owner = next((value for value in (*args, kwargs.get("out")) if isinstance(value, Tensor)), None)
            default = torch.get_default_device() if owner is None else owner.device
            wanted = torch.device(kwargs.get("device") or default).type
            if wanted != (found := generator.device.type):
                raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")
        return func(*args, **kwargs)


# --- installation ----------------------------------------------------------------------------------------------------


class _Backend(_DummyBackendModule):
    """``torch.pretend``."""

    installed = False

    def is_available(self) -> bool:
        return self.installed

    def device(self, index: object) -> AbstractContextManager[None]:
        return nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]  # for gradient checkpointing, which asks

    def manual_seed_all(self, seed: int) -> None:
        _default_generator.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device: object = None) -> Tensor:
        return _default_generator.get_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        _default_generator.set_state(state)


_apply, _clone, _reduce = nn.Module._apply, torch.UntypedStorage.clone, Tensor.__reduce_ex__


def _move_module(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``module.to(...)``. Its Parameters stay the same objects, as they do with CUDA, unless a graph holds them."""
    with torch.no_grad():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        swap = any(on_device(value) != on_device(fn(value.detach().flatten()[:0])) for value in own)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        return _apply(module, fn, recurse)
    except RuntimeError as error:
        if "swap" not in str(error):
            raise
        torch.__future__.set_swap_module_params_on_conversion(False)
        return _apply(module, fn, recurse)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _clone_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """For ``copy.deepcopy``: PyTorch has no memory of this device to copy to."""
    if storage.device.type != NAME:
        return _clone(storage)
    copied = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage.host.clone())  # type: ignore[attr-defined]
    return to_device(copied).untyped_storage()


def _pickle(tensor: Tensor, protocol: int) -> Any:
    """For ``torch.save``: the numbers come from the host's memory, and `_location` says whose they are."""
    if not on_device(tensor):
        return _reduce(tensor, protocol)
    _wait("download")
    return _reduce(to_host(tensor), protocol)


def _location(storage: object) -> str | None:
    """Which device a checkpoint says that a storage is from."""
    return f"{NAME}:0" if getattr(storage, "of_device", False) else None


def _refuse_unmapped(storage: object, location: str) -> None:
    if location.startswith(NAME):
        raise RuntimeError(f"the checkpoint holds tensors of {location}; load it with map_location='cpu'")


class PretendAccelerator(Accelerator):
    """``Trainer(accelerator="pretend", strategy="pretend_single")``."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing to set up."""

    def teardown(self) -> None:
        """Nothing to tear down."""

    @staticmethod
    def parse_devices(devices: object) -> list[int]:
        """There is one, whatever is asked for."""
        return [0]

    @staticmethod
    def get_parallel_devices(devices: object) -> list[torch.device]:
        """The one device."""
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Always."""
        return True

    @staticmethod
    def name() -> str:
        """Its name in a Trainer's arguments."""
        return NAME


@functools.cache
def register() -> tuple[_Backend, list[Any]]:
    """Tell PyTorch and Lightning about the device, which cannot be undone and touches no other device.

    This must come before the first backward pass of the process, when PyTorch starts a thread for each device.
    """
    backend = _Backend()
    _setup_privateuseone_for_python_backend(NAME, backend)
    fallback, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings(action="ignore"):
        fallback.fallback(_kernel, "PrivateUse1")
        aten.impl("_copy_from", _copy_from, "PrivateUse1")
        for full_name in torch._C._dispatch_get_registrations_for_dispatch_key(
            "CompositeExplicitAutogradNonFunctional"
        ):
            name, _, overload = full_name.removeprefix("aten::").partition(".")
            op = getattr(getattr(_aten, name), overload or "default")  # its default would be two calls of the kernel
            aten.impl(op, functools.partial(_kernel, op), "PrivateUse1")
        aten.impl("_to_copy", _to_copy, "PrivateUse1")
    torch.serialization.register_package(0, _location, _refuse_unmapped)
    AcceleratorRegistry.register(NAME, PretendAccelerator)
    StrategyRegistry.register(STRATEGY, SingleDeviceStrategy, device=f"{NAME}:0")
    return backend, [fallback, aten]


@contextmanager
def installed() -> Iterator[None]:
    """Make the device usable; afterwards PyTorch is as it was, except that the device's name stays known."""
    backend, _ = register()
    with ExitStack() as stack:
        stack.enter_context(patch.object(backend, "installed", True))
        stack.enter_context(patch.object(torch, "Generator", Generator))
        stack.enter_context(patch.object(nn.Module, "_apply", _move_module))
        stack.enter_context(patch.object(torch.UntypedStorage, "clone", _clone_storage))
        stack.enter_context(patch.object(Tensor, "__reduce_ex__", _pickle))
        stack.enter_context(_RefuseGeneratorsOfOthers())
        yield
