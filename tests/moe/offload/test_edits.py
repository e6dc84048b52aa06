"""Edits of weights that are offloaded: never lost without a word. Edits of all others: they take effect."""

from __future__ import annotations

import copy
import io
import re

import numpy as np
import pytest
import torch
from offload_cases import Stack
from torch import nn

import headgate
from headgate.moe.offload import Engine, HostStore, Layer
from headgate.moe.offload.forms import survey
from headgate.moe.offload.offload import Offload

NAME = "blocks.1.experts.w_down"


def start(stack, store: str, folder) -> Offload:
    if store != "host":
        formats = {"blocks.1.experts": ["int4", None] * 4} if store == "few bits" else None
        return headgate.offload(stack, "40%", "lru", "gate", folder, formats=formats)
    found, skipped = survey(stack)
    made = [{ours: p.detach().clone() for ours, p in form.weights(module).items()} for _, module, form in found]
    layers = [Layer.of(name, (range(8), w)) for (name, _, _), w in zip(found, made, strict=True)]
    kept = HostStore(layers, lambda i: [made[i]])
    return Offload(stack, found, skipped, Engine(kept, "40%"), kept, None, torch.device("cpu"))


def run(stack) -> torch.Tensor:
    with torch.no_grad():
        return stack(x=torch.linspace(-1, 1, 5 * 32).reshape(5, 32))


def add_to_data(stack, w):
    w.data += 1


def add_to_a_view_of_data(stack, w):
    w.data[3].view(-1)[2:7].mul_(0)


def replace_data(stack, w):
    w.data = torch.ones_like(w, device="cpu")


def replace_data_by_the_same_shape(stack, w):
    w.data = torch.ones_like(w)


def in_place(stack, w):
    with torch.no_grad():
        w.mul_(2)


def set_item(stack, w):
    with torch.no_grad():
        w[0] = 1


def out(stack, w):
    with torch.no_grad():
        torch.neg(w.detach(), out=w.detach())


def foreach(stack, w):
    torch._foreach_add_([w.data], 1)


def initialise(stack, w):
    nn.init.zeros_(w)


def set_(stack, w):
    with torch.no_grad():
        w.set_(torch.ones_like(w, device="cpu"))


def numpy(stack, w):
    w.numpy()[1] = 0


def numpy_of_a_detached_view(stack, w):
    np.asarray(w.detach()[1])[...] = 0


def dlpack(stack, w):
    torch.from_dlpack(w).zero_()


def numpy_by_dlpack(stack, w):
    np.from_dlpack(w.detach()[2:])[0] = 7


def load_state_dict(stack, w):
    experts = {name: torch.zeros_like(p, device="cpu") for name, p in stack.state_dict().items() if "experts" in name}
    stack.load_state_dict(experts, strict=False)


def another_parameter(stack, w):
    stack.blocks[1].experts.w_down = nn.Parameter(torch.ones_like(w, device="cpu"), requires_grad=False)


def swapped_tensors(stack, w):
    torch.utils.swap_tensors(w, nn.Parameter(torch.ones_like(w)))


def another_dtype(stack, w):
    stack.blocks[1].experts.half()


AT_ONCE = [
    add_to_data, add_to_a_view_of_data, replace_data, replace_data_by_the_same_shape, in_place, set_item, out, foreach,
    initialise, set_, load_state_dict, another_dtype,
]  # fmt: skip
LATER = [dlpack, numpy_by_dlpack, another_parameter, swapped_tensors]
WHEN = pytest.mark.parametrize("when", ["before the first forward", "between forwards", "before close"])


@WHEN
@pytest.mark.parametrize("store", ["file", "host", "few bits"])
@pytest.mark.filterwarnings("ignore:for blocks")  # torch's own, of load_state_dict on meta
def test_an_edit_raises_where_it_is_made(stack, tmp_path, store, when):
    """And changes nothing: calls and close go on."""
    offloaded, w = start(stack, store, tmp_path), stack.blocks[1].experts.w_down
    want = run(stack) if when != "before the first forward" else None
    for edit in AT_ONCE:
        with pytest.raises(RuntimeError, match=r"blocks\.\d\.experts\.\w+ must stay as it was when it was offloaded"):
            edit(stack, w)
        if when == "between forwards":
            assert torch.equal(run(stack), want)
    if store != "few bits":  # there is no memory on meta
        for edit in (numpy, numpy_of_a_detached_view):
            with pytest.raises(ValueError, match="read-only"):
                edit(stack, w)
    offloaded.close()
    if store != "few bits" and want is not None:
        assert torch.equal(run(stack), want)


@WHEN
@pytest.mark.parametrize("store", ["file", "host"])
@pytest.mark.parametrize("edit", LATER, ids=lambda edit: edit.__name__)
def test_an_edit_that_nothing_announces_is_named_by_the_next_call_and_by_close(stack, tmp_path, store, edit, when):
    offloaded = start(stack, store, tmp_path)
    if when != "before the first forward":
        run(stack)
    if store == "file" and edit in (dlpack, numpy_by_dlpack):
        with pytest.raises(BufferError, match=rf"{re.escape(NAME)} is a read-only map of a file"):
            edit(stack, stack.blocks[1].experts.w_down)
        offloaded.close()
        return
    edit(stack, stack.blocks[1].experts.w_down)
    said = rf"{re.escape(NAME)} must stay as it was when it was offloaded"
    if when != "before close":
        with pytest.raises(RuntimeError, match=said):
            run(stack)
    with pytest.raises(RuntimeError, match=said):
        offloaded.close()
    offloaded.close(discard=True)


def test_what_stays_in_the_file_refuses_edits_when_all_is_over(stack, tmp_path):
    """Its memory is a read-only map: a write that nobody stops would end the process."""
    want = run(stack)
    headgate.offload(stack, "40%", "lru", None, tmp_path).close(restore=False)
    assert torch.equal(run(stack), want)
    for edit in (in_place, set_item, foreach, load_state_dict):
        with pytest.raises(RuntimeError, match=r"experts\.\w+ must stay as it is in the experts file, .*restore=True"):
            edit(stack, stack.blocks[1].experts.w_down)
    with pytest.raises(BufferError):
        dlpack(stack, stack.blocks[1].experts.w_down)
    headgate.offload(stack, "40%", "lru", None, tmp_path / "again").close()  # and can go on from there
    in_place(stack, stack.blocks[1].experts.w_down)
    assert not torch.equal(run(stack), want)


def test_memory_that_is_not_there_is_not_lent(stack, tmp_path):
    with start(stack, "few bits", tmp_path):
        for edit in (numpy, numpy_of_a_detached_view, dlpack, numpy_by_dlpack):
            with pytest.raises((TypeError, BufferError, RuntimeError, ValueError)):
                edit(stack, stack.blocks[1].experts.w_down)


@pytest.mark.parametrize("store", ["file", "host"])
def test_what_only_reads_goes_on_working(stack, tmp_path, store):
    whole = copy.deepcopy(stack.state_dict())
    offloaded = start(stack, store, tmp_path)
    w = stack.blocks[1].experts.w_down
    assert isinstance(w, nn.Parameter)
    lent = (np.from_dlpack(w), torch.from_dlpack(w)) if store == "host" else ()
    for got in (w.numpy(), np.asarray(w), *lent, copy.deepcopy(w), w.data.clone()):
        assert torch.equal(torch.as_tensor(np.array(got)), whole[NAME])
    assert all(torch.equal(row, want) for row, want in zip(w, whole[NAME], strict=True))
    assert torch.equal(torch.stack(w.unbind()), whole[NAME])
    assert int(w.sum() > 0) == int(whole[NAME].sum() > 0)
    twice = copy.deepcopy([w, w])
    assert twice[0] is twice[1]
    clone = w.data.clone()
    clone += 1
    torch.zeros_like(clone).copy_(w)
    w.data = w.data
    stack.cpu().float().eval()
    stack.requires_grad_(False)
    file = io.BytesIO()
    torch.save({**stack.state_dict(), "parameter": w}, file)
    file.seek(0)
    for name, t in torch.load(file, weights_only=True).items():
        assert type(t) in (torch.Tensor, nn.Parameter)
        assert torch.equal(t, whole[NAME if name == "parameter" else name])
    run(stack)
    offloaded.close()
    assert type(stack.blocks[1].experts.w_down) is nn.Parameter
    assert "_about" not in vars(stack.blocks[1].experts.w_down)


@pytest.mark.parametrize("store", ["file", "host", "few bits"])
def test_edits_of_other_weights_take_effect(stack, tmp_path, store):
    """Routers in place, by `.data`, by numpy, by an optimizer's step."""
    whole = Stack().eval()
    whole.load_state_dict(stack.state_dict())

    def edit(model):
        gate = model.blocks[0].router.weight
        gate.data *= -1
        model.blocks[1].router.weight.detach().numpy()[...] *= -1
        gate.grad = torch.ones_like(gate)
        torch.optim.SGD([*model.parameters()], lr=0.1).step()

    before = run(whole)
    with start(stack, store, tmp_path) as offloaded:
        if store == "few bits":  # rounded
            offloaded.close()
            whole.load_state_dict(stack.state_dict())
            offloaded = start(stack, "file", tmp_path)
        run(stack)
        edit(whole)
        edit(stack)
        assert torch.equal(run(stack), run(whole))
        assert not torch.equal(run(whole), before)
        offloaded.close()
    assert torch.equal(run(stack), run(whole))
