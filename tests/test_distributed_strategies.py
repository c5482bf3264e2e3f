# SPDX-License-Identifier: BSD-3-Clause
"""The operator on DTensors equals the operator in one process, and nothing travels where placements match."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from processes import start

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)

COUNT, RANKS = 4, 16


def cases_of(rank: int) -> dict:
    from distributed_strategies import bits_cases, gate_cases, key_cases, line_cases, moving_cases
    from torch.distributed.device_mesh import init_device_mesh

    import torch_gated_attn.distributed  # noqa: F401

    line, grid = init_device_mesh("cpu", (COUNT,)), init_device_mesh("cpu", (2, COUNT // 2))
    groups = line_cases(line, grid), bits_cases(line), moving_cases(line, grid), key_cases(line), gate_cases(line)
    return {name: case for group in groups for name, case in group.items()}


def deep_cases_of(rank: int) -> dict:
    from distributed_strategies import deep_cases
    from torch.distributed._local_tensor import LocalTensorMode
    from torch.distributed.device_mesh import init_device_mesh

    import torch_gated_attn.distributed  # noqa: F401

    simulation = LocalTensorMode(RANKS)
    with simulation:
        mesh = init_device_mesh("cpu", (2, 2, 4))
    return deep_cases(mesh, simulation)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    return start(cases_of, COUNT, tmp_path_factory.mktemp("processes"))


def test_as_many_cases_as_promised(results):
    from distributed_strategies import CASES

    assert len(CASES) >= 22
    assert results[0].keys() >= CASES.keys()


def test_four_processes_equal_one(results):
    failures = {name: texts for name in results[0] if (texts := [r[name] for r in results if r[name]])}
    assert not failures, failures


def test_sixteen_simulated_processes_equal_one(tmp_path):
    results = start(deep_cases_of, 1, tmp_path, simulated=RANKS)[0]
    assert len(results) >= 22
    assert not any(results.values()), {name: text for name, text in results.items() if text}


def test_imported_by_name_only():
    code = "import sys, torch_gated_attn; print([n for n in sys.modules if n.startswith('torch_gated_attn.distributed')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


ONE_SENTENCE = (
    r"^torch_gated_attn\.distributed needs the DTensor of torch 2\.11 to 2\.15, but that of torch [^ ]+ keys its .*$"
)


def test_a_dtensor_without_the_record_ends_in_one_sentence(monkeypatch):
    from torch.distributed.tensor import DTensor, _op_schema

    from torch_gated_attn.distributed import _registration

    with monkeypatch.context() as patch:
        patch.delattr(DTensor._op_dispatcher.sharding_propagator, "op_to_schema_info")
        with pytest.raises(ImportError, match=ONE_SENTENCE):
            _registration.register()
    with monkeypatch.context() as patch:
        patch.delattr(_op_schema, "RuntimeSchemaInfo")
        with pytest.raises(ImportError, match=ONE_SENTENCE):
            _registration.register()


def test_a_record_that_means_something_else_ends_in_one_sentence(monkeypatch):
    from torch.distributed.tensor import _op_schema

    from torch_gated_attn.distributed import _registration

    def renamed(static_argnum=100, **options):
        return _op_schema.RuntimeSchemaInfo(**options)  # takes the place of the argument and ignores it

    keys = _registration._cache_keys()
    monkeypatch.setattr(_registration, "_cache_keys", lambda: (keys[0], renamed, keys[2]))
    with pytest.raises(ImportError, match=ONE_SENTENCE):
        _registration.register()
    monkeypatch.setattr(_registration, "_cache_keys", lambda: (keys[0], lambda: None, keys[2]))
    with pytest.raises(ImportError, match=ONE_SENTENCE):
        _registration.register()
