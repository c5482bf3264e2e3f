# SPDX-License-Identifier: BSD-3-Clause
"""torch.export programs, for sizes other than those at export. test_deployment.py has AOTInductor packages."""

from __future__ import annotations

import torch
from inputs import draw

from torch_gated_attn import GatedAttention, gated_attention


class Call(torch.nn.Module):
    def forward(self, query, key, value, gate, bias, mask):
        return gated_attention(query, key, value, gate, bias, mask)


def test_export_with_dynamic_sizes(device):
    batch, q, k = (torch.export.Dim(name, min=2, max=4096) for name in ("batch", "q", "k"))
    dynamic = {
        "query": {0: batch, 2: q},
        "key": {0: batch, 2: k},
        "value": {0: batch, 2: k},
        "gate": {0: batch, 2: q},
        "bias": {2: q, 3: k},
        "mask": {0: batch, 3: k},
    }
    inputs = draw(seed=1, device=device, batch=(3,), q=9, k=11, bias=(1, 2, 9, 11))
    program = torch.export.export(Call(), inputs.tensors, dynamic_shapes=dynamic)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["torch_gated_attn.gated_attention.default"]
    for decomposed in (program, program.run_decompositions()):
        for sizes in ({"batch": (3,), "q": 9, "k": 11}, {"batch": (5,), "q": 21, "k": 40}):
            other = draw(seed=2, device=device, bias=(1, 2, sizes["q"], sizes["k"]), **sizes)
            assert torch.equal(decomposed.module()(*other.tensors), gated_attention(*other.tensors))


def test_save_and_load_of_the_module(device, tmp_path):
    module = GatedAttention(16, 4, device=device, zero_init=False)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).to(device)
    length = torch.export.Dim("length", min=2, max=1024)
    program = torch.export.export(module, (x,), dynamic_shapes={"q_data": {1: length}})
    torch.export.save(program, str(tmp_path / "module.pt2"))
    loaded = torch.export.load(str(tmp_path / "module.pt2")).module()
    longer = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(1)).to(device)
    for y in (x, longer):
        assert torch.equal(loaded(y), module(y))


def test_the_joint_graph_of_training_exports(device):
    """What export-based trainers and quantisers use: the program in training form still has the operator, not its parts."""
    module = GatedAttention(16, 4, device=device, zero_init=False)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).to(device)
    trained = torch.export.export(module.train(), (x,)).module()
    for target in (trained, module):
        target.zero_grad()
        target(x).square().sum().backward()
    grads = dict(trained.named_parameters())
    for name, parameter in module.named_parameters():
        assert parameter.grad.any()
        torch.testing.assert_close(grads[name].grad, parameter.grad, rtol=1e-6, atol=1e-7)
