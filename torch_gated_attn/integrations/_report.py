# SPDX-License-Identifier: BSD-3-Clause
"""What `patch` did: every attention module of a model, replaced or left, with the reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Module", "Report"]


@dataclass(frozen=True)
class Module:
    """One attention module of the model."""

    path: str  # as in model.named_modules(); "" is the model itself
    class_name: str  # package.module.Class
    note: str  # the adapter that replaces it, or why it is left


@dataclass
class Report:
    """The attention modules of a model. `print(report)` groups them by class.

    Attributes:
        replaced: modules that call the operator now, or would with `dry_run=False`.
        left: attention modules that keep their own forward, with the reason.
        dry_run: whether the model was left as it was.
    """

    replaced: list[Module] = field(default_factory=list)
    left: list[Module] = field(default_factory=list)
    dry_run: bool = False

    def __str__(self) -> str:
        verb = "would be replaced" if self.dry_run else "replaced"
        lines = [f"torch_gated_attn: {_count(len(self.replaced))} {verb}, {len(self.left)} left"]
        for title, modules in ((verb, self.replaced), ("left", self.left)):
            if modules:
                lines.append(f"  {title}")
                lines += [f"    {line}" for line in _grouped(modules)]
        return "\n".join(lines)


def _count(number: int) -> str:
    return f"{number} attention module{'' if number == 1 else 's'}"


def _grouped(modules: Iterable[Module]) -> list[str]:
    """One line for the modules that differ only in the numbers of their paths."""
    groups: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for module in modules:
        pattern = re.sub(r"\d+", "*", module.path) or "(the model itself)"
        groups[module.class_name, module.note, pattern].append(module.path)
    return [
        f"{len(paths)} x {class_name} at {pattern if len(paths) > 1 else paths[0] or pattern}: {note}"
        for (class_name, note, pattern), paths in groups.items()
    ]
