"""Readers: files written as their real writers write them come in as the trace they mean; the rest is refused."""

import base64
import io
import json

import numpy as np
import pytest
import torch

from headgate.placement.traces.readers import READERS, convert, flame_moe, read
from headgate.placement.traces.readers.common import open_recording
from headgate.placement.traces.statistics import Statistics
from headgate.placement.traces.trace import Trace


def choices(layers, tokens, top_k, experts, seed=0):
    """int64 [L, T, K], distinct in a token."""
    return np.random.default_rng(seed).random((layers, tokens, experts)).argsort(-1)[..., :top_k]


def same(trace, ids, experts=None, names=None):
    assert isinstance(trace, Trace)
    np.testing.assert_array_equal(np.where(trace.live, trace.expert_ids.astype(int), -1), ids)
    assert experts in (None, trace.num_experts)
    assert names in (None, trace.layer_names)


# --- SGLang ----------------------------------------------------------------------------------------------------------


def sglang_recording(tmp_path, extend=True):
    """As _DetailAccumulator.dump: 3 layers, the first dense; top-2 of 4, 6 physical slots, ids padded to 8 with -1."""
    logical = choices(2, 12, 2, 4)
    # physical -> logical of each layer; the other copy of 0 and 1 is used for odd tokens
    table = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 1, 0], [1, 0, 3, 2, 0, 1]])
    physical = np.full((3, 12, 8), -1)
    for layer in (1, 2):
        for token in range(12):
            for k, expert in enumerate(logical[layer - 1, token]):
                copies = np.flatnonzero(table[layer].numpy() == expert)
                physical[layer, token, k] = copies[token % len(copies)]
    records = []
    for number, part in enumerate((slice(0, 7), slice(7, 12))):
        size = part.stop - part.start
        records.append(
            {
                "forward_pass_id": number,
                "rank": 0,
                "gatherer_key": "primary",
                "input_ids": list(range(size)),
                "positions": list(range(size)),
                "extend_seq_lens": [4, size - 4] if extend else None,
                "forward_mode": 1 if extend else 2,
                "topk_ids_of_layer": torch.from_numpy(physical[:, part].astype(np.int32)),
                "misc_objects": [],
                "global_physical_count": torch.tensor(
                    [np.bincount(p[p >= 0], minlength=6).tolist() for p in physical[:, part]], dtype=torch.int32
                ),
            }
        )
    output = {"records": records, "last_physical_to_logical_map": table}
    path = tmp_path / "expert_distribution_recorder_1764088000.25_0.pt"
    torch.save(output, str(path))
    return path, logical, output


def test_sglang_per_token(tmp_path):
    path, logical, _ = sglang_recording(tmp_path)
    trace = read(path)
    same(trace, logical, 4, ("layers.1", "layers.2"))
    assert trace.sequence.tolist() == [0] * 4 + [1] * 3 + [2] * 4 + [3]
    assert read(path, max_tokens=5).sequence.tolist() == [0] * 4 + [1]
    path, logical, _ = sglang_recording(tmp_path, extend=False)
    assert read(path).sequence is None


def test_sglang_per_pass_and_stat(tmp_path):
    path, logical, output = sglang_recording(tmp_path)
    load = [np.bincount(one.ravel(), minlength=4).tolist() for one in logical]
    for record in output["records"]:
        del record["topk_ids_of_layer"]
    torch.save(output, path)
    found = read(path, top_k=2)
    assert isinstance(found, Statistics)
    assert (found.load.tolist(), found.tokens, found.top_k, found.transitions) == (load, 12, 2, ())
    steps = np.zeros((5, 3, 4), np.int32)
    steps[1, 1:], steps[4, 1:] = load, load
    stat = {"rank": 0, "logical_count": torch.from_numpy(steps), "average_utilization_rate_over_window": None}
    torch.save(stat, path)
    found = read(path)
    assert found.load.tolist() == (2 * np.array(load)).tolist()
    assert (found.tokens, found.top_k, found.layer_names) == (48, 1, ("layers.1", "layers.2"))


def test_sglang_recordings_that_do_not_hold_together(tmp_path):
    def spoil(change, message):
        path, _, output = sglang_recording(tmp_path)
        change(output)
        torch.save(output, path)
        with pytest.raises(ValueError, match=message):
            read(path, "sglang")

    def record(output):
        return output["records"][1]

    spoil(lambda o: o.update(records=[]), "records of .* must be a list of dicts, at least one")
    spoil(lambda o: record(o)["topk_ids_of_layer"][1, 2].fill_(6), r"records\[1\].*physical ids below 6, got 6")
    spoil(
        lambda o: record(o).update(topk_ids_of_layer=torch.zeros(2, 5, 8, dtype=torch.int32)), r"must be \[L=3, T, K\]"
    )
    spoil(lambda o: record(o).update(topk_ids_of_layer=torch.zeros(3, 5, 8)), "must be whole numbers, got float32")
    spoil(lambda o: record(o).update(extend_seq_lens=[1]), r"extend_seq_lens of .* adding up to 5 tokens, got 1")
    spoil(lambda o: o["last_physical_to_logical_map"].fill_(-1), "map of .* must be not negative, got -1")
    spoil(lambda o: [r["topk_ids_of_layer"].fill_(-1) for r in o["records"]], "at least one, with a choice")


# --- vLLM ------------------------------------------------------------------------------------------------------------


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def responses(arrays):
    """As OpenAIServingCompletion answers: routed_experts is an .npy file in base64."""
    return [
        {"id": f"cmpl-{i}", "choices": [{"index": 0, "text": "", "routed_experts": base64.b64encode(npy(a)).decode()}]}
        for i, a in enumerate(arrays)
    ]


def test_vllm_in_all_its_files(tmp_path):
    ids = choices(3, 20, 2, 9)
    captured = np.zeros((20, 4, 2), np.int16)  # layer 0 is dense: the capture's buffer stays 0 there
    captured[:, 1:] = ids.transpose(1, 0, 2)
    parts = [captured[:12], captured[12:]]
    np.save(tmp_path / "one.npy", captured)
    np.savez(tmp_path / "two.npz", *parts)
    (tmp_path / "one.json").write_text(json.dumps(responses([captured.astype(np.uint8)])[0]))
    (tmp_path / "list.json").write_text(json.dumps(responses(parts)))
    (tmp_path / "nested.json").write_text(json.dumps({"choices": [{"routed_experts": captured.tolist()}]}))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(r) + "\n" for r in responses(parts)))
    names = ("layers.1", "layers.2", "layers.3")
    for name, sequences in {
        "one.npy": 1, "two.npz": 2, "one.json": 1, "list.json": 2, "nested.json": 1, "lines.jsonl": 2,
    }.items():  # fmt: skip
        trace = read(tmp_path / name)
        same(trace, ids, 9, names)
        assert trace.sequence.tolist() == ([0] * 20 if sequences == 1 else [0] * 12 + [1] * 8)
    assert read(tmp_path / "one.npy", num_experts=300).num_experts == 300


def vllm_response(prompt, answers, usage=True, name="prompt_routed_experts"):
    """As vLLM 0.21 answers: the prompt's part beside the choices, which hold what was generated."""
    counts = {"prompt_tokens": len(prompt), "completion_tokens": len(answers[0]) + 1}
    coded = [base64.b64encode(npy(a)).decode() for a in [prompt, *answers]]
    choices = [{"index": i, "routed_experts": text} for i, text in enumerate(coded[1:])]
    return {"choices": choices, name: coded[0], **({"usage": counts} if usage else {})}


@pytest.mark.parametrize("usage", [True, False], ids=["counted", "uncounted"])
def test_vllm_prompts_beside_the_choices(usage, tmp_path):
    ids = choices(3, 12, 2, 9)
    rows = ids.transpose(1, 0, 2).astype(np.int16)

    def told(response):
        (tmp_path / "a.json").write_text(json.dumps(response))
        lines = []
        return read(tmp_path / "a.json", tell=lines.append), lines

    trace, lines = told(vllm_response(rows[:10], [rows[10:]], usage))
    same(trace, ids, 9)
    assert trace.sequence.tolist() == [0] * 12
    assert lines == ["tokens: 10 in prompt_routed_experts, 2 generated"]
    trace, lines = told(vllm_response(rows[:8], [rows[8:10], rows[10:]], usage))  # the second choice ran no prompt
    same(trace, ids, 9)
    assert trace.sequence.tolist() == [0] * 10 + [1] * 2
    assert lines == ["tokens: 8 in prompt_routed_experts, 4 generated"]
    trace, lines = told([{"choices": [], "prompt_routed_experts": rows.tolist()}])  # one token was asked for
    same(trace, ids, 9)
    with pytest.raises(
        ValueError, match=r"choice 0, routed_experts of .*as its prompt's \[10, 3, 2\], got \[2, 1, 2\]"
    ):
        told(vllm_response(rows[:10], [rows[10:, :1]], usage))


def test_vllm_whole_sequences_and_lost_prompts_are_told(tmp_path):
    """By the response's own count: an array longer than the answer holds the prompt too, whatever stands beside it."""
    ids = choices(3, 12, 2, 9)
    rows = ids.transpose(1, 0, 2).astype(np.int16)
    whole = vllm_response(rows[:10], [rows])
    whole["usage"]["completion_tokens"] = 3
    bare = vllm_response(rows[:10], [rows[10:]], name="other")
    for response, expected, said in (
        (whole, ids, ["tokens: 12 of prompts and answers in one array"]),
        (
            bare,
            ids[:, 10:],
            ["tokens: 2 generated", "1 choices have generated tokens alone: their prompts were not recorded"],
        ),
    ):
        (tmp_path / "a.json").write_text(json.dumps(response))
        lines = []
        same(read(tmp_path / "a.json", tell=lines.append), expected)
        assert lines == said


def test_vllm_files_that_are_wrong(tmp_path):
    ids = choices(3, 5, 2, 9).transpose(1, 0, 2).astype(np.int16)
    np.save(tmp_path / "a.npy", ids)
    with pytest.raises(ValueError, match=r"expert id \(layer \d, token \d\) of .* must be below num_experts=4, got"):
        read(tmp_path / "a.npy", num_experts=4)
    np.savez(tmp_path / "a.npz", ids, ids[:, :2])
    with pytest.raises(ValueError, match=r"routed_experts of .* must be of one \[., L, K\]"):
        read(tmp_path / "a.npz")
    (tmp_path / "a.json").write_text(json.dumps({"choices": [{"routed_experts": "no base64!"}]}))
    with pytest.raises(ValueError, match=r"response 0, choice 0, routed_experts of .* must be an .npy file in base64"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"choices": [{"routed_experts": [[[1], [1, 2]]]}]}))
    with pytest.raises(ValueError, match="must be an array of numbers"):
        read(tmp_path / "a.json")
    np.savez_compressed(tmp_path / "a.npz", ids)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[60:70] = bytes(10)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"arr_0 of .*a\.npz must be a whole array"):
        read(tmp_path / "a.npz")
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.json must be JSON"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json must be JSON"):
        read(tmp_path / "a.json")


# --- router logits ---------------------------------------------------------------------------------------------------


def test_router_logits_of_a_transformers_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    from headgate.moe.record import record

    shape = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_experts": 6, "num_experts_per_tok": 2, "pad_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**shape)).eval()
    batches = [torch.randint(0, 32, (2, 7)), torch.randint(0, 32, (1, 5))]
    with torch.no_grad():
        logits = [model(input_ids=b, output_router_logits=True).router_logits for b in batches]
    expected = record(model, batches).expert_ids.astype(int)
    torch.save(logits, tmp_path / "passes.pt")
    same(read(tmp_path / "passes.pt", top_k=2), expected, 6, ("layers.0", "layers.1", "layers.2"))
    torch.save(logits[0], tmp_path / "one.pt")
    same(read(tmp_path / "one.pt", top_k=2), expected[:, :14], 6)
    torch.save({"router_logits": logits[0]}, tmp_path / "dict.pt")
    same(read(tmp_path / "dict.pt", top_k=2), expected[:, :14], 6)
    np.savez(tmp_path / "one.npz", *[layer.numpy() for layer in logits[0]])
    same(read(tmp_path / "one.npz", top_k=2), expected[:, :14], 6)
    with pytest.raises(ValueError, match=r"top_k of .* must be given, for router logits do not say it, got None"):
        read(tmp_path / "one.pt")
    with pytest.raises(ValueError, match=r"top_k of .* must be at most E=6, got 7"):
        read(tmp_path / "one.pt", top_k=7)


def test_router_logits_with_dense_layers_batches_and_flaws(tmp_path):
    path = tmp_path / "t.pt"
    logits = torch.randn(2, 3, 5)
    torch.save((None, logits.bfloat16()), path)
    found = read(path, top_k=1)
    same(found, logits.bfloat16().float().argmax(-1).flatten()[None, :, None].numpy(), 5, ("layers.1",))
    logits[1, 1, 1] = float("nan")
    torch.save((logits,), path)
    with pytest.raises(ValueError, match=r"pass 0, layer 0 of .* must be finite, got NaN or Inf"):
        read(path, top_k=1)
    torch.save((torch.randn(4, 5), torch.randn(4, 6)), path)
    with pytest.raises(ValueError, match=r"pass 0 of .* must be of one \[tokens, E\] in all layers"):
        read(path, top_k=1)
    torch.save([(torch.randn(4, 5), torch.randn(4, 5)), (torch.randn(4, 5), None)], path)
    with pytest.raises(ValueError, match=r"pass 1 of .* must be logits of layers \[0, 1\], got \[0\]"):
        read(path, top_k=1)


# --- llama.cpp -------------------------------------------------------------------------------------------------------


def llama_csv(ids, passes, outputs_only=True, header=False):
    """As moe_cb writes: pass by pass, layer by layer; the last layer of a pass for its last token alone."""
    lines, at = ["phase,token,layer,rank,expert"] if header else [], 0
    for size in passes:
        for layer in range(len(ids)):
            for token in range(at, at + size):
                if outputs_only and layer == len(ids) - 1 and token < at + size - 1:
                    continue
                for rank, expert in enumerate(ids[layer, token]):
                    phase = "prefill" if size > 1 else "decode"
                    lines.append(f"{phase},{token},{layer},{rank},{expert}" if header else f"{layer},{expert}")
        at += size
    return "".join(line + "\n" for line in lines)


@pytest.mark.parametrize("header", [False, True])
def test_llama_cpp(tmp_path, header):
    path, ids, passes = tmp_path / "moe_trace.csv", choices(3, 12, 2, 9), (6, 4, 1, 1)
    path.write_text(llama_csv(ids, passes, outputs_only=False, header=header))
    same(read(path, top_k=2), ids, names=("layers.0", "layers.1", "layers.2"))
    path.write_text(llama_csv(ids, passes, header=header))
    shown = ids.copy()
    shown[2, [0, 1, 2, 3, 4, 6, 7, 8]] = -1
    same(read(path), shown, int(shown.max()) + 1)
    same(read(path, max_tokens=7), shown[:, :7])


COUNTED = "0,0,5\n0,2,1\n2,1,4\n2,2,2\n"


@pytest.mark.parametrize(
    "text",
    [
        COUNTED,
        "layer_id,expert_id,count\n" + COUNTED,
        "rank,count,layer,expert\n7,5,0,0\n7,1,0,2\n7,4,2,1\n7,2,2,2\n",
        "layer,expert,count\n" + COUNTED.replace("0,0,5", "0,0,3\n0,0,2"),
    ],
    ids=["bare", "sglang", "named", "added"],
)
def test_counts_are_loads_not_choices(text, tmp_path):
    path = tmp_path / "expert_distribution_rank0.csv"
    path.write_text(text)
    found = read(path)
    assert isinstance(found, Statistics)
    assert (found.load.tolist(), found.layer_names) == ([[5, 0, 1], [0, 4, 2]], ("layers.0", "layers.2"))
    assert read(path, num_experts=4).num_experts == 4
    with pytest.raises(ValueError, match="to become a trace, got loads only"):
        convert(path, tmp_path / "out.npz")


def test_counts_that_are_wrong(tmp_path):
    path = tmp_path / "c.csv"
    for text, message in {
        "0,1,x\n": "must be rows of 2 columns",
        "0,1,2\n0,1\n": "rows layer,expert,count of .* must be whole numbers",
        "0,1,2\n0,-1,2\n": "expert of .* must be not negative, got -1",
        "0,1,2\n999999999,1,2\n": "layer and expert of .* must be dense",
        "0,1,0\n": "count of .* must be more than zeros",
        "layer,expert,count\n": "rows of .* must be at least one",
        "a,b,c\n0,1,2\n": r"content of .* must be rows of 2 columns, layer,expert \(or .*\), got 'a,b,c'",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(path)
    path.write_text(COUNTED)
    with pytest.raises(ValueError, match=r"expert of .* must be below num_experts=2, got 2"):
        read(path, num_experts=2)


def test_a_recorders_fractions_are_no_router_logits(tmp_path):
    counts = torch.tensor([[[0.5, 1.5], [2.0, 0.0]]])
    for content in ({"rank": 0, "logical_count": counts}, {"logical_count": counts}):
        torch.save(content, tmp_path / "stat.pt")
        found = read(tmp_path / "stat.pt", top_k=1)
        assert isinstance(found, Statistics)
        np.testing.assert_allclose(found.load / found.load.sum(1, keepdims=True), [[0.25, 0.75], [1, 0]])


def test_llama_cpp_files_that_are_wrong(tmp_path):
    path, ids = tmp_path / "t.csv", choices(3, 12, 2, 9)

    def refused(text, message, **options):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(path, **options)

    refused(llama_csv(ids, (6, 6), outputs_only=False), "top_k of .* must be given: every pass has several tokens")
    refused(llama_csv(ids, (6, 6)), "must be a multiple of K=5", top_k=5)
    refused("", "content of .* must be rows of 2 columns")
    refused("0,1\n0,x\n", "rows layer,expert of .* must be whole numbers")
    refused("0,1\n0\n", "rows layer,expert of .* must be whole numbers")
    refused("0,1\n0,-3\n", "expert of .* must be not negative, got -3")
    refused("phase,token,layer,rank,expert\ndecode,999999999,0,0,1\n", "must be dense")
    refused("phase,token,layer,rank,expert\n" + "decode,0,0,0,1\n" * 2, "one for each token, layer and rank")


# --- FLAME-MoE -------------------------------------------------------------------------------------------------------


def flame_folder(tmp_path, ids, layers):
    pa = pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    import pyarrow.parquet as pq

    folder = tmp_path / "actives" / "iter_5473"
    folder.mkdir(parents=True, exist_ok=True)
    for layer, chosen in zip(layers, ids, strict=True):
        columns = {
            "scores": pa.array(np.full(chosen.shape, 0.1, np.float16).tolist(), pa.list_(pa.float16())),
            "indices": pa.array(chosen.tolist(), pa.list_(pa.int16())),
        }
        pq.write_table(pa.table(columns), folder / f"layer_{layer:02d}.parquet", row_group_size=40)
    return folder


def test_flame_moe(tmp_path):
    ids = choices(3, 100, 6, 64)
    folder = flame_folder(tmp_path, ids, (2, 3, 10))
    same(read(folder), ids, 64, ("layers.2", "layers.3", "layers.10"))
    same(read(folder, max_tokens=55), ids[:, :55])
    same(read(folder / "layer_03.parquet"), ids[1:2])
    pieces = list(flame_moe.chunks(open_recording(folder), rows=30))
    assert [p.shape[1] for p in pieces] == [30, 30, 30, 10]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), ids)


def test_recordings_become_trace_files(tmp_path):
    ids = choices(3, 100, 6, 64)
    folder = flame_folder(tmp_path, ids, (2, 3, 10))
    for limit in (None, 55):
        with convert(folder, tmp_path / "t.npz", max_tokens=limit) as streamed:
            assert streamed.layer_names == ("layers.2", "layers.3", "layers.10")
            same(streamed.trace(), ids[:, :limit], 64)
    with pytest.raises(ValueError, match="must be below num_experts=4, got"):
        convert(folder, tmp_path / "t.npz", num_experts=4)
    np.save(tmp_path / "v.npy", ids.transpose(1, 0, 2).astype(np.int16))
    with convert(tmp_path / "v.npy", tmp_path / "u.npz") as saved:
        same(saved.trace(), ids)
    np.save(tmp_path / "w.npy", np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"w\.npy must hold the choices of tokens to become a trace, got loads only"):
        convert(tmp_path / "w.npy", tmp_path / "w.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["actives", "t.npz", "u.npz", "v.npy", "w.npy"]


def test_pyarrow_is_taken_from_where_this_process_has_it(tmp_path, monkeypatch):
    folder = flame_folder(tmp_path, np.zeros((1, 4, 2), int), (2,))
    (tmp_path / "pyarrow").mkdir()
    (tmp_path / "pyarrow" / "__init__.py").write_text(f"open({str(tmp_path / 'taken')!r}, 'w')\nraise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="files that pyarrow can read"):
        read(folder)
    assert (tmp_path / "taken").exists()


def test_flame_moe_folders_that_are_wrong(tmp_path):
    ids = choices(3, 50, 6, 64)
    folder = flame_folder(tmp_path, ids, (2, 3, 4))
    flame_folder(tmp_path, ids[:1, :40], (3,))
    with pytest.raises(ValueError, match=r"layers of .* must be of one number of rows, got \[40, 50\]"):
        read(folder)
    flame_folder(tmp_path, ids[:1, :, :5], (3,))
    with pytest.raises(ValueError, match=r"indices from row 0 of .* must be alike in all layers"):
        read(folder)
    good = (folder / "layer_02.parquet").read_bytes()
    (folder / "layer_03.parquet").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"layer_03\.parquet of .* must be a whole parquet file"):
        read(folder)
    import pyarrow as pa
    import pyarrow.parquet as pq

    for column, message in (
        (pa.array([[1, 2], [3]] * 25, pa.list_(pa.int16())), "must be lists"),
        (pa.array([[1, 2], None] * 25, pa.list_(pa.int16())), "must be lists"),
        (pa.array([1] * 50), "must be lists"),
    ):
        pq.write_table(pa.table({"indices": column}), folder / "layer_03.parquet")
        with pytest.raises(ValueError, match=message):
            read(folder)
    pq.write_table(pa.table({"token_id": pa.array([1])}), folder / "layer_03.parquet")
    with pytest.raises(ValueError, match=r"columns in layer_03\.parquet of .* must be indices and others"):
        read(folder)


# --- ESFT, EPLB ------------------------------------------------------------------------------------------------------


def esft_folder(tmp_path, ids, lengths):
    for layer, chosen in enumerate(ids, 1):
        lines, at = [], 0
        for length in lengths:
            part = chosen[at : at + length].ravel()
            lines.append("\t".join(map(str, part)) + "\t\t" + "\t".join(["0.125"] * len(part)) + "\n")
            at += length
        (tmp_path / f"expert_weights_{layer}.txt").write_text("".join(lines))


def test_esft(tmp_path):
    ids = choices(11, 9, 6, 64)
    esft_folder(tmp_path, ids, (4, 5))
    trace = read(tmp_path)
    same(trace, ids, names=tuple(f"layers.{n}" for n in range(1, 12)))
    assert trace.sequence.tolist() == [0] * 4 + [1] * 5
    assert (trace.weights == 0.125).all()
    for text, message in (
        ("1\t2\n", "line 1 in expert_weights_3.txt of .* must be ids, two tabs, weights"),
        ("1\t2\t3\t4\t5\t6\t\t0.1\n", "one weight for each id, got 6 ids, 1 weights"),
        ("1\t2\t\t0.1\t0.2\n", "a multiple of K=6 ids, got 2"),
        ("1\t2\t3\t4\t5\t6\t\t1\t1\t1\t1\t1\t1\n", "lines of layer 3 of .* of the same lengths in all layers"),
        ("", "at least one"),
    ):
        (tmp_path / "expert_weights_3.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


def test_eplb_weights(tmp_path):
    weight = [[90, 132, 40, 61], [20, 107, 104, 64]]
    torch.save(torch.tensor(weight), tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", np.array(weight, np.float32))
    np.savez(tmp_path / "a.npz", np.array(weight))
    (tmp_path / "a.json").write_text(json.dumps(weight))
    (tmp_path / "b.json").write_text(json.dumps({"logical_count": [weight, np.zeros_like(weight).tolist()]}))
    for name in ("a.pt", "a.npy", "a.npz", "a.json", "b.json"):
        found = read(tmp_path / name)
        assert (found.load.tolist(), found.tokens, found.transitions) == (weight, 323, ())
    np.save(tmp_path / "a.npy", np.array(weight) / 1000)
    assert read(tmp_path / "a.npy").load.tolist() == np.rint(np.array(weight) * 1.024).astype(int).tolist()
    for wrong, message in (
        (np.array([[1.0, np.nan]]), "weights of .* must be finite"),
        (np.array([[1, -2]]), "weights of .* must be not negative, got -2"),
        (np.zeros((2, 3)), "more than zeros"),
        (np.zeros((0, 3)), r"\[L, E\], not empty"),
    ):
        np.save(tmp_path / "a.npy", wrong)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "a.npy")


# --- which format ----------------------------------------------------------------------------------------------------


def test_formats_that_cannot_be_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.npz")
    for name, content in (("a.json", "[]"), ("a.json", '{"a": "b"}'), ("a.txt", "?")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"content of .*{name} must be in a format of sglang, .*, got something"):
            read(tmp_path / name)
    (tmp_path / "a.bin").write_text("?")
    with pytest.raises(ValueError, match=r"a\.bin must be a folder or a \.pt, .* got '\.bin'"):
        read(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"format must be one of sglang, .*, got 'nonsense'"):
        read(tmp_path / "a.json", "nonsense")
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        read(tmp_path / "a.json", top_k=0)


@pytest.mark.parametrize("name", READERS)
def test_a_reader_refuses_what_is_not_its_own(tmp_path, name):
    """Asked for by name, on a file of another kind: an error that names the file, never another's trace."""
    (tmp_path / "a.json").write_text('{"a": [1, 2, {}]}')
    torch.save({"a": [1, "x", None]}, tmp_path / "a.pt")
    for file in ("a.json", "a.pt"):
        with pytest.raises(ValueError, match=f"read: .* of .*{file} must be"):
            read(tmp_path / file, name)
