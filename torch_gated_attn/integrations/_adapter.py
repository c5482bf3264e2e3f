# SPDX-License-Identifier: BSD-3-Clause
"""How a class of a model is recognised, and what replaces its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["Adapter", "described", "has_hooks", "owner_of_forward"]


def _accept(module: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class Adapter:
    """One attention class, known by its interface; its package is not imported.

    Attributes:
        name: shown in the report.
        class_names: of the class that defines `forward`.
        first: the leading parameters of its forward, in order.
        others: every other parameter that `forward` below understands.
        attributes: what an instance must have.
        forward: the replacement, a function of the module and the forward's arguments. For a call that it does not cover it
            returns `module._original_forward(...)`.
        refuse: why an instance cannot be replaced, None if it can.
        helpers: methods that the replacement does not call; a subclass that overrides one is not understood.
    """

    name: str
    class_names: frozenset[str]
    first: tuple[str, ...]
    others: frozenset[str]
    attributes: tuple[str, ...]
    forward: Callable[..., Any]
    refuse: Callable[[nn.Module], str | None] = _accept
    helpers: tuple[str, ...] = ()

    def recognises(self, module: nn.Module) -> bool:
        """Whether the class that defines the module's forward is this one, by its name and leading parameters."""
        owner = owner_of_forward(module)
        if owner.__name__ not in self.class_names:
            return False
        names = list(inspect.signature(described(owner.forward)).parameters)[1:]
        return tuple(names[: len(self.first)]) == self.first

    def objection(self, module: nn.Module) -> str | None:
        """Why a recognised module cannot be replaced."""
        owner = owner_of_forward(module)
        parameters = inspect.signature(described(owner.forward)).parameters.values()
        named = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
        unknown = named - {"self", *self.first, *self.others}
        if unknown:
            return f"its forward has parameters that are not understood: {', '.join(sorted(unknown))}"
        missing = [name for name in self.attributes if not hasattr(module, name)]
        if missing:
            return f"it has no {', '.join(missing)}"
        for helper in self.helpers:
            if getattr(type(module), helper, None) is not getattr(owner, helper, None):
                return f"a subclass overrides {helper}"
        if "forward" in module.__dict__:
            return "its forward was replaced on the instance"
        if parametrize.is_parametrized(module):
            return "it is parametrized, which could not be removed under another class; patch before that"
        for name, child in module.named_children():
            if not any(True for _ in child.parameters()) and has_hooks(child):
                return f"{name} has hooks, which would not run"
        return self.refuse(module)


def owner_of_forward(module: nn.Module) -> type[nn.Module]:
    """The class that defines the module's forward: wrappers such as FSDP's put a subclass before it."""
    return next(c for c in type(module).__mro__ if "forward" in c.__dict__)


def described(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function whose parameters `forward` takes: what a decorator that has only *args and **kwargs closes over."""
    found: Callable[..., Any] = inspect.unwrap(forward)
    kinds = {p.kind for p in inspect.signature(found).parameters.values()}
    if kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        inner = [c.cell_contents for c in found.__closure__ or () if inspect.isfunction(c.cell_contents)]
        if len(inner) == 1:
            return inner[0]
    return found


def has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)
