"""budget="auto": what a machine has free, what a model needs of it beside its experts, and runs under limits."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap

import pytest
import torch

transformers = pytest.importorskip("transformers")

import headgate  # noqa: E402
from headgate.moe.offload import room  # noqa: E402
from headgate.moe.offload.forms import survey  # noqa: E402

SIZES = {
    "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Qwen3Moe": {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    "DeepseekV3": {
        "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}  # fmt: skip


def make(family: str):
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family]})
    return getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(1)
    made = tmp_path_factory.mktemp("qwen3")
    make("Qwen3Moe").save_pretrained(made)
    return made


# --- what is free ----------------------------------------------------------------------------------------------------


def tell(root, files: dict[str, str]):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 1000 kB\nMemAvailable: 900 kB\nCommitLimit: 800 kB\nCommitted_AS: 100 kB\n"
CASES = {
    "memory": ({}, {"MemAvailable": 900 << 10}),
    "overcommit by guess": ({"proc/sys/vm/overcommit_memory": "0\n"}, {"MemAvailable": 900 << 10}),
    "strict overcommit": (
        {"proc/sys/vm/overcommit_memory": "2\n"}, {"MemAvailable": 900 << 10, "CommitLimit": 700 << 10}),
    "cgroup v2, of a parent, its page cache free": (
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n",
         "sys/fs/cgroup/a/memory.max": "5000\n", "sys/fs/cgroup/a/memory.high": "4000\n",
         "sys/fs/cgroup/a/memory.current": "3000\n",
         "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 700\nactive_file 40\nfile 2000\n"},
        {"MemAvailable": 900 << 10, "cgroup memory": 4000 - 3000 + 740}),
    "cgroup v1, seen from within a container": (
        {"proc/self/cgroup": "5:cpu:/x\n4:memory,hugetlb:/docker/1\n0::/\n",
         "sys/fs/cgroup/memory/memory.limit_in_bytes": "6000\n",
         "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000\n",
         "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 30\ntotal_active_file 5\n"},
        {"MemAvailable": 900 << 10, "cgroup memory": 4035}),
    "cgroup v1 without a limit": (
        {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
         "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000\n"}, {"MemAvailable": 900 << 10}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_each_limit_leaves(tmp_path, monkeypatch, case):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    files, want = CASES[case]
    assert room.host_bounds(tell(tmp_path, {"proc/meminfo": MEMINFO, **files})) == want


def test_limits_of_the_process_count_from_what_it_has(tmp_path, monkeypatch):
    limits = {resource.RLIMIT_AS: 9 << 20, resource.RLIMIT_DATA: 7 << 20}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], resource.RLIM_INFINITY))
    tell(tmp_path, {"proc/self/status": "Name:\tx\nVmSize:\t    2048 kB\nVmData:\t   1024 kB\n"})
    assert room.host_bounds(tmp_path) == {"RLIMIT_AS": 7 << 20, "RLIMIT_DATA": 6 << 20}
    monkeypatch.setattr(room, "host_bounds", lambda: {"a": 5, "b": -3})
    assert room.free_bytes(torch.device("cpu")) == (0, "b")
    monkeypatch.setattr(room, "host_bounds", dict)
    with pytest.raises(ValueError, match="where the system does not say what is free"):
        room.free_bytes(torch.device("cpu"))
    with pytest.raises(ValueError, match='on meta, got "auto", which is for CPU and CUDA'):
        room.free_bytes(torch.device("meta"))


def test_this_machine_says_it():
    assert not os.path.exists("/proc/meminfo") or 0 < room.free_bytes(torch.device("cpu"))[0] < 2**50


# --- what a model needs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kv_cache_is_counted_as_it_will_be(family):
    torch.manual_seed(2)
    model = make(family)
    headgate.replace(model)
    found, _ = survey(model)
    before = {n: (id(t), t.device) for n, t in (*model.named_parameters(), *model.named_buffers())}
    with torch.no_grad():
        out = model(torch.arange(30)[None], use_cache=True)
        again = model(torch.arange(30)[None]).logits
    want = sum(t.nbytes for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
    assert room.cache_bytes(model, found, 30) == want > 0
    assert room.cache_bytes(model, found, 0) == 0
    assert {n: (id(t), t.device) for n, t in (*model.named_parameters(), *model.named_buffers())} == before
    with torch.no_grad():
        assert torch.equal(model(torch.arange(30)[None]).logits, again), "the model is as it was"


def test_a_cache_that_cannot_be_counted_is_said(stack):
    stack.config = transformers.Qwen3MoeConfig()
    with pytest.raises(ValueError, match=r"for a Stack, or context=0: what its KV cache takes cannot be counted"):
        room.cache_bytes(stack, survey(stack)[0], 8)


def test_auto_shares_out_what_is_free(folder, monkeypatch):
    margin = room._LEAST
    with_all, offloaded = headgate.load(folder, "auto", context=16)
    whole = offloaded.split
    assert whole.budget == whole.experts == sum(p.nbytes for n, p in with_all.named_parameters() if ".experts." in n)
    assert whole.rest == sum(t.nbytes for t in {*with_all.parameters(), *with_all.buffers()}) - whole.experts
    assert whole.cache == 2 * 2 * 2 * 8 * 2 * 16  # layers, keys and values, heads, their width, bytes, tokens
    assert "% of all" in str(whole)
    assert f"({whole.limit})" in str(whole)
    offloaded.close()
    need = whole.rest + whole.cache + whole.step + margin
    monkeypatch.setattr(room, "host_bounds", lambda: {"MemAvailable": need + whole.experts // 2})
    model, offloaded = headgate.load(folder, " Auto ", context=16)
    assert whole.experts // 3 < offloaded.engine.arena.nbytes <= offloaded.split.budget == whole.experts // 2
    with offloaded, torch.no_grad():
        model.generate(torch.arange(8)[None], max_new_tokens=2)
    monkeypatch.setattr(room, "host_bounds", lambda: {"MemAvailable": 2 * need, "RLIMIT_DATA": need})
    with pytest.raises(ValueError, match=r'where "auto" leaves none, got 0 MB for experts: .* free \(RLIMIT_DATA\)'):
        headgate.load(folder, "auto", context=16)


def test_experts_that_are_absent_stay_so(folder, tmp_path, monkeypatch):
    """Counting a cache puts something else in their place for a while."""
    headgate.pack(folder, tmp_path / "experts.safetensors")
    model, offloaded = headgate.load(folder, "25%")
    offloaded.close()
    monkeypatch.setattr(room, "host_bounds", lambda: {"MemAvailable": 1})
    with pytest.raises(ValueError, match='where "auto" leaves none'):
        headgate.offload(model, "auto", disk=tmp_path)
    with pytest.raises(RuntimeError, match="must be in memory or served by an Offload"):
        model(torch.arange(8)[None])


def test_of_a_model_in_memory_the_experts_go_first(stack, tmp_path, monkeypatch):
    experts = sum(p.nbytes for b in stack.blocks for p in b.experts.parameters())
    free = 2 << 30
    for bounds, want in (
        ({"MemAvailable": free}, (free + experts, "MemAvailable")),
        ({"RLIMIT_AS": free, "cgroup memory": free + 1}, (free, "RLIMIT_AS")),
        ({"RLIMIT_DATA": free, "MemAvailable": free - 1}, (free, "RLIMIT_DATA")),
    ):
        monkeypatch.setattr(room, "host_bounds", lambda bounds=bounds: bounds)
        with headgate.offload(stack, "auto", disk=tmp_path) as offloaded:
            assert (offloaded.split.free, offloaded.split.limit) == want
            assert (offloaded.split.rest, offloaded.split.cache) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "50%", "context": 10}, 'context must be None but for budget="auto", got 10'),
        ({"budget": "auto", "context": -1}, "context must be tokens of at least 0, got -1"),
        ({"budget": "auto", "context": True}, "context must be tokens of at least 0, got True"),
        ({"budget": "automatic"}, r'budget must be bytes .* or "auto" for a model, got \'automatic\''),
    ],
)
def test_bad_settings(folder, options, message):
    with pytest.raises(ValueError, match=message):
        headgate.load(folder, **options)


# --- under limits ----------------------------------------------------------------------------------------------------

CHILD = """
import resource, sys, torch, transformers, headgate
import transformers.models.olmoe.modeling_olmoe
from headgate.moe.offload import room

def taken(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1]) << 10

path, disk, budget, kind, more = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5])
small, large = path + "/small", path + "/large"
model, offloaded = headgate.load(small, 1.0)  # what is imported and started on the way
with offloaded, torch.no_grad():
    model.generate(torch.arange(8)[None], max_new_tokens=2)
limit = taken({"AS": "VmSize", "DATA": "VmData"}[kind]) + more
resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (limit, limit))
model, offloaded = headgate.load(large, budget, disk=disk or None, **({"context": 64} if budget == "auto" else {}))
with offloaded, torch.no_grad():
    tokens = model.generate(torch.arange(8)[None], max_new_tokens=3, do_sample=False)
print(tokens.tolist(), offloaded.engine.arena.nbytes, offloaded.split.limit if offloaded.split else "")
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_a_run_within_limits_on_memory(tmp_path):
    """`ulimit -d` and `ulimit -v` a little above the budget: nothing takes what a budget does not say. Maps of the
    experts' file are not counted as the process's own; where no addresses are left for them there are none."""
    for name, width, experts in (("small", 32, 4), ("large", 1024, 32)):
        config = transformers.OlmoeConfig(
            **{**SIZES, "hidden_size": width, "intermediate_size": width, "vocab_size": 512},
            num_experts=experts, num_experts_per_tok=2,
        )  # fmt: skip
        model = transformers.OlmoeForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name, max_shard_size="50MB")
    whole = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    rest = sum(p.nbytes for p in model.parameters()) - whole
    assert whole == 384 << 20
    few = rest + whole // 10 + (96 << 20)

    def run(*args):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CHILD), tmp_path, *map(str, args)], cwd=tmp_path,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.split("]]")[0], int(done.stdout.split()[-1 - (args[1] == "auto")]), done.stderr

    want, *_ = run("", "10%", "DATA", 4 << 30)
    for disk, kind, more in ((tmp_path / "d", "DATA", few), ("", "AS", few + (512 << 20))):
        tokens, arena, said = run(disk, "10%", kind, more)
        assert tokens == want
        assert "no numbers" not in said
        assert arena <= whole // 10
    tokens, _, said = run(tmp_path / "d", "10%", "AS", few + (256 << 20))
    assert tokens == want
    assert "experts' parameters have no numbers: a limit (ulimit -v or -d) leaves no addresses" in said
    tokens, arena, _ = run("", "auto", "DATA", rest + (400 << 20))
    assert tokens == want
    assert whole // 10 < arena < 160 << 20
