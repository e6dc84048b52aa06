"""Checkpoints of one process: a compiled module and a plain one read each other's."""

import torch
from torch import nn

import headgate


class _Counted(nn.Module):
    """A module with state that is no tensor."""

    def __init__(self, steps=0):
        super().__init__()
        self.moe = headgate.MoE(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2)
        self.head = nn.Linear(8, 2)
        self.steps = steps

    def get_extra_state(self):
        return {"steps": self.steps}

    def set_extra_state(self, state):
        self.steps = state["steps"]


def trained(module, optimizer):
    """One step by hand, without a forward pass: nothing is compiled."""
    for number, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()


def test_compiled_and_plain_modules_read_each_others_checkpoints(tmp_path):
    model = _Counted(steps=7)
    model.moe = torch.compile(model.moe)  # inside, and around
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(compiled.parameters())
    trained(compiled, optimizer)
    headgate.save_checkpoint(tmp_path / "a", compiled, optimizer, extra={"step": 1})
    keys = torch.distributed.checkpoint.FileSystemReader(tmp_path / "a").read_metadata().state_dict_metadata
    assert not [key for key in keys if "_orig_mod" in key]

    plain = _Counted()
    other = torch.optim.AdamW(plain.parameters())
    assert headgate.load_checkpoint(tmp_path / "a", plain, other) == {"step": 1}
    assert plain.steps == 7
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["exp_avg"], other.state[b]["exp_avg"])

    headgate.save_checkpoint(tmp_path / "b", plain, other)
    fresh = torch.compile(_Counted(steps=1))
    headgate.load_checkpoint(tmp_path / "b", fresh, torch.optim.AdamW(fresh.parameters()))
    assert fresh.steps == 7
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), fresh.parameters(), strict=True))
