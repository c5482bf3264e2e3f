# SPDX-License-Identifier: BSD-3-Clause
"""Replacing attention in a live model.

A replaced module keeps everything, its parameters, hooks and place in the model; only its class changes, to a subclass made
here whose forward calls the operator. So `isinstance` still holds, `state_dict` is unchanged, `copy.deepcopy` and `pickle`
give replaced modules (the pickle names the original class and this package), and `unpatch` gives the class back, also under
a class that a wrapper (fully_shard, parametrize) has put before it since.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .. import _C
from ._adapter import Adapter
from ._report import Module, Report

__all__ = ["adapters", "patch", "patched", "unpatch"]

_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}  # (original, adapter) -> replaced
_originals: dict[type[nn.Module], type[nn.Module]] = {}
_given_back: dict[type[nn.Module], type[nn.Module]] = {}  # wrapper above replaced -> above original


def adapters() -> tuple[Adapter, ...]:
    """Every known attention class."""
    from . import alphafold3_pytorch, boltz, esmfold, foundry, openfold, protenix, qwen

    families = (openfold, esmfold, boltz, protenix, qwen, foundry, alphafold3_pytorch)
    return tuple(adapter for family in families for adapter in family.ADAPTERS)


def patch(model: nn.Module, *, dry_run: bool = False) -> Report:
    """Let the attention modules of `model` call the operator, weights untouched.

    Modules are recognised by the interface of their class, see the files of this package. What is not understood keeps its
    forward: whole modules with the reason in the report, single calls (an argument that selects something else) silently.
    An additive mask is told by its numbers, 0 and at most -1e4. Where looking at them would stall a CUDA device or end a
    graph of torch.compile, it is added, or, where the sum would be as large as all logits, the device asserts it to be one.

    Args:
        model: any module; modules inside it, and itself, are looked at.
        dry_run: only report.

    Returns:
        What was replaced, and what was left and why.

    Rows with at least one attended key agree with the original to rounding. A row that attends to no key is finite: the
    mean of the values for structure models, 0 for language models.
    """
    return _replace(model, dry_run)[0]


def unpatch(model: nn.Module) -> int:
    """Give every replaced module of `model` its own class back; returns how many there were.

    Raises:
        RuntimeError: a class that a wrapper has put before the replaced one cannot be rebuilt; then nothing is given back.
    """
    return _give_back(model.modules())


@contextlib.contextmanager
def patched(model: nn.Module) -> Iterator[Report]:
    """`patch` for the duration of a with block; modules that were replaced before it stay so."""
    report, modules = _replace(model, dry_run=False)
    try:
        yield report
    finally:
        _give_back(modules)


def _replace(model: nn.Module, dry_run: bool) -> tuple[Report, list[nn.Module]]:
    report, modules = Report(dry_run=dry_run), []
    for path, module in model.named_modules():
        adapter = next((a for a in adapters() if a.recognises(module)), None)
        class_name = f"{type(module).__module__}.{type(module).__qualname__}"
        if adapter is None:
            if _looks_like_attention(module):
                report.left.append(Module(path, class_name, "no adapter for this class"))
            continue
        why = "already replaced" if _is_patched(type(module)) else adapter.objection(module) or _device_objection(module)
        if why is not None:
            report.left.append(Module(path, class_name, why))
            continue
        report.replaced.append(Module(path, class_name, adapter.name))
        if not dry_run:
            module.__class__ = _patched_class(type(module), adapter)
            modules.append(module)
    return report, modules


def _is_patched(cls: type[nn.Module]) -> bool:
    """Whether `cls` is a replaced class, or a wrapper's above one."""
    return any(c in _originals for c in cls.__mro__)


def _give_back(modules: Iterable[nn.Module]) -> int:
    # Every class first: what cannot be given back is refused before anything changes.
    found = [(module, _original_of(type(module))) for module in modules if _is_patched(type(module))]
    for module, cls in found:
        module.__class__ = cls
    return len(found)


def _original_of(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with the original in place of the replaced class: itself, or under the classes that wrappers put before it."""
    if cls in _originals:
        return _originals[cls]
    if not _is_patched(cls):
        return cls
    if cls not in _given_back:
        for name, member in vars(cls).items():
            if _calls_super(member):
                raise RuntimeError(
                    f"{cls.__module__}.{cls.__qualname__} was put before a replaced class, and cannot be put before the "
                    f"original, because its {name} calls super(): undo that wrapper before unpatch"
                )
        bases = tuple(_original_of(base) for base in cls.__bases__)
        members = {name: member for name, member in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        metaclass: Any = type(cls)
        _given_back[cls] = metaclass(cls.__name__, bases, members)
    return _given_back[cls]


def _calls_super(member: Any) -> bool:
    """Whether a member of a class is tied to that class: another class with the same member would not work."""
    functions = (member.fget, member.fset, member.fdel) if isinstance(member, property) else (member,)
    codes = [getattr(getattr(f, "__func__", f), "__code__", None) for f in functions]
    return any(code is not None and ("super" in code.co_names or "__class__" in code.co_freevars) for code in codes)


def _looks_like_attention(module: nn.Module) -> bool:
    """An attention of its own, not a block around one that has been looked at."""
    if "Attention" not in type(module).__name__:
        return False
    return not any("Attention" in type(child).__name__ for child in module.modules() if child is not module)


def _device_objection(module: nn.Module) -> str | None:
    supported = {"cpu", "meta"} | ({"cuda"} if _C.cuda_version is not None else set())
    others = {p.device.type for p in module.parameters()} - supported
    return f"this build has no kernels for its device, {', '.join(sorted(others))}" if others else None


def _patched_class(base: type[nn.Module], adapter: Adapter) -> type[nn.Module]:
    """The subclass of `base` whose forward is the adapter's; one per class, so that modules of a kind stay of one type."""
    key = (base, adapter.name)
    if key not in _classes:
        original = base.forward

        @functools.wraps(original)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # A wrapper may keep this method beyond `unpatch`, as the forward that it calls.
            chosen = adapter.forward if isinstance(self, _classes[key]) else original
            return chosen(self, *args, **kwargs)

        def extra_repr(self: nn.Module) -> str:
            return ", ".join(filter(None, (base.extra_repr(self), "attention=torch_gated_attn")))

        def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
            if type(self) is not _classes[key]:  # a wrapper's class, which knows how to be copied or cannot be
                return object.__reduce_ex__(self, protocol)  # type: ignore[return-value]
            return _restore, (base, adapter.name), object.__reduce_ex__(self, 2)[2]

        members = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "forward": forward,
            "extra_repr": extra_repr,
            "__reduce_ex__": reduce,
            "_original_forward": original,
        }
        _classes[key] = type(base.__name__, (base,), members)
        _originals[_classes[key]] = base
    return _classes[key]


def _restore(base: type[nn.Module], name: str) -> nn.Module:
    """An empty replaced module; pickle and deepcopy fill in its state."""
    cls = _patched_class(base, next(a for a in adapters() if a.name == name))
    module: nn.Module = cls.__new__(cls)
    return module
