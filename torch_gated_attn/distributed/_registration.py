# SPDX-License-Identifier: BSD-3-Clause
"""Tells DTensor the strategies of the operators, and what its cache of decisions has to distinguish.

`register_sharding` is PyTorch's way, but it keys the cache by tensors and by what follows the first *int*: grad_mask, a
bool[], and is_causal, a bool, are missing. A backward without d_bias and then one with it would end in "output tensor
should be scalar!", and a causal call would get the placements of one that is not. The key is a private record.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import register_sharding

from ._strategies import STRATEGIES

_TESTED = "2.11 to 2.15"


def _cache_keys() -> tuple[dict[Any, Any], Any, Any]:
    """DTensor's record of each operator's cache key, and the classes of a record and of a call."""
    try:
        from torch.distributed.tensor._op_schema import OpSchema, RuntimeSchemaInfo

        return DTensor._op_dispatcher.sharding_propagator.op_to_schema_info, RuntimeSchemaInfo, OpSchema
    except (ImportError, AttributeError) as error:
        raise ImportError(_unknown(error)) from error


def _unknown(why: object) -> str:
    return (
        f"torch_gated_attn.distributed needs the DTensor of torch {_TESTED}, but that of torch {torch.__version__} keys "
        f"its sharding decisions in another way: {why}"
    )


def _argument(op: Any, name: str) -> int:
    return [argument.name for argument in op._schema.arguments].index(name)


def _check_distinguished(op: Any, first: int, record: Any, call: Any) -> None:
    """Two calls that differ in nothing but this argument must not share a decision."""
    value = [[True], [False]] if op._schema.arguments[first].name == "grad_mask" else [True, False]
    one, other = (call(op, (None,) * first + (v,), {}, record) for v in value)
    if one == other:
        raise ImportError(_unknown(f"{op._schema.arguments[first].name} of {op} is not part of the key"))


def register() -> None:
    """Register the strategies; called once, when the subpackage is imported."""
    infos, record_type, call_type = _cache_keys()
    for name, (strategy, decides) in STRATEGIES.items():
        op = getattr(torch.ops.torch_gated_attn, name).default
        register_sharding(op)(strategy)
        if decides is None:
            continue
        first = _argument(op, decides)
        try:
            record = record_type(static_argnum=first, needs_pytree=True)
            _check_distinguished(op, first, record, call_type)
        except (TypeError, AttributeError) as error:
            raise ImportError(_unknown(error)) from error
        infos[op] = record
