"""Module-based batching: the tokens of one batch, experts called once in a step, and no thread left behind."""

import threading

import pytest
import torch
from torch import nn

import headgate
from headgate.moe.offload.batching import BatchSizes, batch_sizes, generate_offline, meet
from headgate.placement.caching.costs import FREE, Costs
from headgate.placement.cluster.links import Link

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, max_position_embeddings=64, eos_token_id=1,
    pad_token_id=0,
)  # fmt: skip
RULES = dict(max_new_tokens=6, do_sample=False)


def qwen():
    config = transformers.Qwen3MoeConfig(num_experts=8, moe_intermediate_size=16, **SIZES)
    return drawn(transformers.Qwen3MoeForCausalLM(config))


def gpt_oss():
    return drawn(transformers.GptOssForCausalLM(transformers.GptOssConfig(num_local_experts=8, **SIZES)))


def drawn(model):
    """Weights so large that tokens differ; in double, so that no padding can turn one into another."""
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    model.set_experts_implementation("eager")
    return model.double().eval()


def prompts():
    return [torch.randint(2, 64, (n,)) for n in (5, 3, 9, 1, 7, 7, 2)]


def one_batch(model, prompts, **rules):
    """The tokens that transformers gives for all prompts in one batch, cut after the first end."""
    longest = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), longest, dtype=torch.long) for _ in range(2))
    for i, p in enumerate(prompts):
        ids[i, longest - len(p) :], mask[i, longest - len(p) :] = torch.as_tensor(p), 1
    made = model.generate(input_ids=ids, attention_mask=mask, **RULES | rules)[:, longest:].tolist()
    return [row[: row.index(1) + 1] if 1 in row else row for row in made]


def steps_of(report, layers=3):
    calls = set(report.calls.values())
    assert len(report.calls) == layers
    assert len(calls) == 1
    return calls.pop()


def texts(made):
    return [t.tolist() for t in made]


@pytest.mark.parametrize("make", [qwen, gpt_oss])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_tokens_are_those_of_one_batch(make, swapped):
    model, given = make(), prompts()
    want = one_batch(model, given)
    assert len({tuple(w) for w in want}) > 3
    if swapped:
        headgate.replace(model)
    for micro_batch, at_once in ((2, None), (3, 1), (1, 3), (7, None), (20, 5)):
        got = generate_offline(model, given, micro_batch=micro_batch, at_once=at_once, **RULES)
        assert texts(got) == want
    lists = [p.tolist() for p in given]
    assert texts(generate_offline(model, lists, micro_batch=4, **RULES)) == want


def test_experts_are_called_once_in_a_step():
    model, given = qwen(), prompts()
    report = headgate.replace(model)
    generate_offline(model, given, micro_batch=2, max_new_tokens=6, eos_token_id=None)
    assert steps_of(report) == 6
    # two at a time of seven: the third begins where the first ends, in four rounds
    generate_offline(model, given, micro_batch=1, at_once=2, max_new_tokens=5, eos_token_id=None)
    assert steps_of(report) == 6 + 4 * 5


def test_ends_of_sequences():
    model, given = qwen(), prompts()
    want = one_batch(model, given, max_new_tokens=20)
    ended = next(w for w in want if len(w) > 2)[1]  # made the end of all texts, some of them end at once
    cut = [w[: w.index(ended) + 1] if ended in w else w for w in want]
    got = generate_offline(model, given, micro_batch=2, max_new_tokens=20, do_sample=False, eos_token_id=[1, ended])
    assert texts(got) == cut
    assert len({len(t) for t in got}) > 1


def test_an_offloaded_model_fetches_once_for_all(tmp_path):
    model, given = qwen(), prompts() * 3
    want = one_batch(model, given)
    headgate.replace(model)
    loads = {}
    for at_once in (1, None):
        with headgate.offload(model, budget="25%", disk=tmp_path, prefetch=None) as offloaded:
            assert texts(generate_offline(model, given, micro_batch=1, at_once=at_once, **RULES)) == want
            loads[at_once] = offloaded.stats().loads
    assert loads[None] <= 6 * 3 * 8  # steps, layers, experts
    assert loads[1] > 2 * loads[None]


def test_nothing_to_do():
    assert generate_offline(qwen(), [], micro_batch=2) == []


# --- errors ----------------------------------------------------------------------------------------------------------


def ends_soon(work):
    """What `work` raised, in a thread that must end; no other thread of its own is left then."""
    before, raised = threading.active_count(), []

    def run():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it hangs"
    assert threading.active_count() == before
    return raised[0] if raised else None


class Door(nn.Module):
    """Experts at the boundary: twice the rows; notes how many came."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, hidden_states, top_k_index, top_k_weights):
        self.seen.append(len(hidden_states))
        return 2 * hidden_states


def rows(n=1):
    return torch.ones(n, 4), torch.zeros(n, 2, dtype=torch.int32), torch.ones(n, 2)


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [0, 1, 5])
def test_an_error_in_one_micro_batch_ends_all(fault, when):
    model, given, calls = qwen(), prompts(), []

    def hook(*_):
        calls.append(None)
        if len(calls) == when + 1:
            raise fault("the second layer gives up")

    handle = model.model.layers[1].register_forward_pre_hook(hook)
    error = ends_soon(lambda: generate_offline(model, given, micro_batch=2, **RULES))
    assert isinstance(error, fault)
    assert "gives up" in str(error)
    assert len(calls) == when + 1
    handle.remove()
    assert "forward" not in vars(model.model.layers[0].mlp.experts)
    assert texts(generate_offline(model, given, micro_batch=2, **RULES)) == one_batch(model, given)


def test_an_error_of_the_experts_ends_all():
    class Broken(Door):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise OSError("no such expert")

    door, swallowed = Broken(), []

    def work():
        try:
            door(*rows())
        except Exception as error:  # nobody may go on without its rows
            swallowed.append(error)

    error = ends_soon(lambda: meet([door], [work, work]))
    assert isinstance(error, OSError)
    assert not swallowed


def test_who_is_behind_catches_up():
    first, second, order = Door(), Door(), []

    def work(name, doors, repeat):
        def run():
            for _ in range(repeat):
                for door in doors:
                    out = door(*rows(name))
                    assert out.tolist() == [[2.0] * 4] * name
                    order.append(name)

        return run

    # the second piece of work goes through the second door only, once more than the first
    assert ends_soon(lambda: meet([first, second], [work(1, [first, second], 2), work(2, [second], 3)])) is None
    assert first.seen == [1, 1]
    assert second.seen == [3, 3, 2]


def test_other_threads_go_through_the_doors_by_themselves():
    door, outside = Door(), []

    def other():
        outside.append(door(*rows(5)))

    def work():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        door(*rows(1))

    assert ends_soon(lambda: meet([door], [work, work])) is None
    assert len(outside) == 2
    assert door.seen == [5, 5, 2]


def test_modes_and_threads_are_those_of_the_caller():
    seen, door = [], Door()

    def work():
        door(*rows())
        cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), cast, torch.get_num_threads()))

    meet([door], [work])
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        meet([door], [work])
    threads = torch.get_num_threads()
    assert seen == [(False, False, False, threads), (True, False, torch.float16, threads)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(micro_batch=0), "micro_batch must be at least 1, got 0"),
        (dict(at_once=0), "at_once must be at least 1, got 0"),
        (dict(num_return_sequences=2), "generate must not hold .*, got num_return_sequences"),
        (dict(prompts=[[1, 2], []]), r"prompts must be runs of token ids, one or more each, got \(0,\)"),
        (dict(prompts=[torch.ones(1, 2, dtype=torch.long)]), r"prompts must be .*, got \(1, 2\)"),
    ],
)
def test_bad_input(changed, message):
    with pytest.raises(ValueError, match=f"generate_offline: {message}"):
        generate_offline(**{"model": qwen(), "prompts": [[3]], "micro_batch": 1} | changed)


def test_other_models():
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        generate_offline(nn.Linear(2, 2), [[3]], micro_batch=1)
    small = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    with pytest.raises(ValueError, match="model must have experts called at transformers' boundary, got none"):
        generate_offline(dense, [[3]], micro_batch=1)


# --- sizes -----------------------------------------------------------------------------------------------------------

COSTS = Costs((1, 64), (1e-4, 4e-4), None, Link(0, 25), Link(0, 12.5), 10**7)  # 0.4 ms host to device, 0.8 from disk
ROOM = dict(experts=8, top_k=2, memory_bytes=10**10, sequence_bytes=10**7, work_bytes=10**7)


def test_as_many_as_hide_the_fetches():
    found = batch_sizes(COSTS, **ROOM)
    # 64 rows an expert last as long as its fetch: 256 sequences; an eighth of the memory holds 125 in attention
    assert found == BatchSizes(micro_batch=125, at_once=3, rows=375 / 4, hidden=1.0)
    # three quarters stay: 8 experts must last as long as 2 fetches, which they do on one row
    assert batch_sizes(COSTS, **ROOM, slots=6).rows < 5
    assert batch_sizes(COSTS, **ROOM, slots=8).hidden == 1
    from_disk = batch_sizes(COSTS, **ROOM, disk=True)
    assert 8 * float(COSTS.on_device(from_disk.rows)) >= 8 * 1.2e-3 * from_disk.hidden * (1 - 1e-12)


@pytest.mark.parametrize("memory", [2 * 10**7, 3 * 10**7, 10**8, 10**9, 10**10])
@pytest.mark.parametrize("work", [0, 10**6, 10**7])
def test_what_fits(memory, work):
    found = batch_sizes(COSTS, **ROOM | dict(memory_bytes=memory, work_bytes=work), disk=True)
    total = found.micro_batch * found.at_once
    assert total >= 1
    assert total * 10**7 + found.micro_batch * work <= memory
    wanted = COSTS.rows_in(1.2e-3) * 4
    more = (total + found.micro_batch) * 10**7 + found.micro_batch * work
    assert total >= wanted or more > memory  # nothing is left unused that would help
    assert found.hidden == pytest.approx(min(1, float(COSTS.on_device(found.rows)) / 1.2e-3))


def test_a_device_that_rows_never_fill():
    flat = Costs((1, 2), (1e-4, 1e-4), None, Link(0, 1), FREE, 10**7)
    found = batch_sizes(flat, **ROOM)
    assert found.micro_batch * found.at_once > 800
    assert found.hidden == pytest.approx(1e-4 / 1e-2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(experts=0), "experts must be at least 1, got 0"),
        (dict(top_k=9), "top_k must be at most experts=8, got 9"),
        (dict(slots=9), r"slots must be in 0 .. experts=8, got 9"),
        (dict(work_bytes=-1), "work_bytes must be not negative, got -1"),
        (dict(work_share=0), "work_share must be above 0 and at most 1, got 0"),
        (dict(memory_bytes=10**7), "memory_bytes must be at least 20000000, one sequence's, got 10000000"),
    ],
)
def test_bad_sizes(changed, message):
    with pytest.raises(ValueError, match=f"batch_sizes: {message}"):
        batch_sizes(COSTS, **ROOM | changed)
