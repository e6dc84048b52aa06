"""Every loader of files from strangers, by name: good files for it, and how a file is read and used.

A new loader is one line in LOADERS: then it is fuzzed. `make(folder)` writes good files and returns their paths (a path
of a folder: one of its files is spoiled). `load(path)` reads the file and uses it as a program would, and returns what
can be compared: bytes, numbers, text.

Files are small, so that a spoiled byte meets something.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import headgate
from headgate.moe.hf.pretrained import quantization_in
from headgate.moe.offload import FileStore, Layer
from headgate.moe.offload.checkpoint import INDEX, Checkpoint
from headgate.moe.offload.few_bits import Translated
from headgate.moe.offload.gguf_file import Gguf
from headgate.moe.offload.seen import seen
from headgate.placement.caching import predict
from headgate.placement.caching.policies.learned import Learned
from headgate.placement.caching.policies.state import Setting
from headgate.placement.cluster.topology import Topology
from headgate.placement.formats import EXPORTS, export, import_map
from headgate.placement.placement import Placement
from headgate.placement.traces.file import TraceFile
from headgate.placement.traces.readers import read
from headgate.placement.traces.statistics import Statistics
from headgate.placement.traces.trace import Trace

L, T, K, E = 2, 24, 2, 4
TWO = Topology(1, 2)


@dataclass(frozen=True)
class Loader:
    make: Callable[[Path], list[Path]]
    load: Callable[[Path], Any]
    share: float = 1.0  # of the files that others get, where each takes long


def ids(layers: int = L, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((layers, T, E)).argsort(-1)[..., :K]


def a_trace() -> Trace:
    weights = np.full((L, T, K), 0.5, np.float16)
    sequence = np.repeat(np.arange(3, dtype=np.int32), T // 3)
    of_layer = np.full(L, E, np.int32)
    return Trace(ids().astype(np.uint8), E, weights, sequence, ("layers.0", "layers.1"), of_layer)


def content(found: Any) -> Any:
    """What a loader gave, to be compared."""
    if isinstance(found, Trace | Statistics | Placement):
        return tuple(content(getattr(found, name)) for name in found.__dataclass_fields__)
    if isinstance(found, np.ndarray):
        return str(found.dtype), found.shape, found.tobytes()
    if isinstance(found, list | tuple):
        return tuple(content(one) for one in found)
    if hasattr(found, "tocsr"):
        return content(found.toarray())
    return repr(found)


# --- ours ------------------------------------------------------------------------------------------------------------


def trace_files(folder: Path) -> list[Path]:
    a_trace().save(folder / "whole.npz")
    Trace(ids().astype(np.uint16), E).save(folder / "plain.npz")
    return [folder / "whole.npz", folder / "plain.npz"]


def streamed(path: Path) -> Any:
    with TraceFile(path) as file:
        chunks = [content(ids) for layer in range(file.shape[0]) for ids in file.chunks(layer, 7)]
        return file.shape, file.num_experts, file.layer_names, content(file.sequence), chunks


def placement_files(folder: Path) -> list[Path]:
    slots = np.array([[0, 1, 2, 3, 0, 2], [3, 1, 2, 0, 2, 1]])
    found = Placement(slots, E, TWO, cost={"copies": 1.5}, bound={"copies": 1.0}, method={"name": "auto"})
    found.save(folder / "p.json")
    return [folder / "p.json"]


def used_placement(path: Path) -> Any:
    found = Placement.load(path)
    found.save(path.with_name("again.json"))
    return content(found), content(found.gpu_of_slot), content(found.standing), content(found.replicas)


def maps(folder: Path) -> list[Path]:
    found = Placement.load(placement_files(folder)[0])
    names = {"sglang": "s.json", "vllm": "v.json", "trtllm": "t.yaml"}
    for system in EXPORTS:
        export(found, folder / names[system], system)
    np.save(folder / "m.npy", found.expert_of_slot)
    np.savez_compressed(folder / "m.npz", physical_to_logical_map=found.expert_of_slot)
    return [folder / name for name in (*names.values(), "m.npy", "m.npz")]


def predictors(folder: Path) -> list[Path]:
    trace = a_trace()
    tokens = np.arange(T, dtype=np.int64) % 5
    for method in ("popular", "ridge"):
        predict.fit(trace, method).save(folder / f"{method}.npz")
    predict.fit(trace, "ngram", tokens=tokens).save(folder / "ngram.npz")
    return [folder / f"{method}.npz" for method in ("popular", "ridge", "ngram")]


def used_predictor(path: Path) -> Any:
    found = predict.load(path)
    layers, experts = found.shape
    found.start()
    scores = []
    for token in (1, 2, 3):
        found.token(token)
        for layer in range(min(layers, 4)):
            scores.append(content(found.scores(layer)))
            found.observe(layer, [0, 1, experts - 1])
    return scores


def learned(folder: Path) -> list[Path]:
    Learned.fit(a_trace(), 4).save(folder / "learned.npz")
    return [folder / "learned.npz"]


def used_learned(path: Path) -> Any:
    found = Learned.load(path)
    state = found.begin(Setting(*found.often.shape, 4))
    return content(found.weights), content(state.tables)


def experts_file(folder: Path) -> list[Path]:
    weights = [{"w": torch.arange(24.0).reshape(4, 3, 2)}]
    FileStore.write(
        folder / "experts.safetensors", [Layer.of("mlp", (range(4), weights[0]))], lambda i: weights
    ).close()
    return [folder / "experts.safetensors"]


def used_experts(path: Path) -> Any:
    store = FileStore(path, verify=True)
    try:
        shapes = {part.name: torch.empty(part.shape, dtype=part.dtype) for part in store.layers[0].kind(0).parts}
        found = []
        for expert in range(store.layers[0].experts):
            store.read(0, expert, shapes)
            found.append([t.tolist() for t in shapes.values()])
        return content(store.layers), found
    except OSError as error:  # a checksum that does not fit: `verify` is documented to raise this
        raise ValueError(str(error)) from error
    finally:
        store.close()


def a_module(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return headgate.MoE(hidden_size=4, intermediate_size=2, num_experts=4, top_k=2)


def shards(folder: Path) -> list[Path]:
    """A checkpoint in two safetensors files, in the words that headgate.load reads."""
    from safetensors.torch import save_file

    made, index = folder / "shards", {}
    made.mkdir()
    for name in ("one.safetensors", "two.safetensors"):
        tensors = {f"{name[:3]}.{e}.w": torch.full((2, 3), float(e)) for e in range(3)}
        save_file(tensors, made / name, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (made / INDEX).write_text(json.dumps({"metadata": {"total_size": 144}, "weight_map": index}))
    return [made]


def used_shards(path: Path) -> Any:
    try:
        found = Checkpoint(path)
    except FileNotFoundError as error:  # the index names a file that is not there: documented to raise this
        raise ValueError(str(error)) from error
    try:
        return {key: (stored.shape, found.read(key).tolist()) for key, stored in found.tensors.items()}
    finally:
        found.close()


def ggufs(folder: Path) -> list[Path]:
    """A GGUF file, and one in two parts, of a model so small that its header is most of it."""
    import gguf

    sizes = {"context_length": 64, "block_count": 1, "embedding_length": 32, "feed_forward_length": 32,
             "head_count": 1, "head_count_kv": 1, "layer_norm_rms_eps": 1e-6, "rope_freq_base": 1e4, "expert_count": 2,
             "expert_used_count": 1, "expert_feed_forward_length": 32, "key_length": 8}  # fmt: skip
    shapes = {
        "token_embd.weight": (3, 32), "output_norm.weight": (32,), "blk.0.attn_q.weight": (8, 32),
        "blk.0.attn_k.weight": (8, 32), "blk.0.attn_v.weight": (8, 32), "blk.0.attn_output.weight": (32, 8),
        "blk.0.attn_q_norm.weight": (8,), "blk.0.attn_k_norm.weight": (8,), "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,), "blk.0.ffn_gate_inp.weight": (2, 32),
        **{f"blk.0.ffn_{kind}_exps.weight": (2, 32, 32) for kind in ("gate", "up", "down")},
    }  # fmt: skip
    (folder / "split").mkdir()
    for path, most in ((folder / "m.gguf", 0), (folder / "split" / "m.gguf", 8)):
        file = gguf.GGUFWriter(path, "qwen3moe", split_max_tensors=most)
        for name, value in sizes.items():
            getattr(file, f"add_{name}")(value)
        file.add_token_list(["a", "b", "c"])
        file.add_array("numbers", [1, 2, 3])
        for name, shape in shapes.items():
            w = np.full(shape, 0.5, np.float32)
            kind = gguf.GGMLQuantizationType.Q8_0 if "exps" in name else None
            file.add_tensor(name, w if kind is None else gguf.quants.quantize(w, kind), raw_dtype=kind)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
    return [folder / "m.gguf", folder / "split"]


def used_gguf(path: Path) -> Any:
    try:
        with closing(Gguf(path)) as found:
            return found.metadata, {n: (t.type, t.shape, found.read(n).tolist()) for n, t in found.tensors.items()}
    except FileNotFoundError as error:  # a part that is not there: documented to raise this
        raise ValueError(str(error)) from error


def used_gguf_model(path: Path) -> Any:
    with seen(path) as found:
        return found.model.config.to_dict(), [layer.nbytes for layer in found.layers]


def few_bits(folder: Path) -> list[Path]:
    """A weight in few bits beside one that is not, of each kind, as headgate.load reads them."""
    from few_bits_files import SCHEMES
    from safetensors.torch import save_file

    made = []
    torch.manual_seed(0)
    for scheme in ("compressed-tensors int4 with zeros", "gptq", "awq", "fp8"):
        pack, config = SCHEMES[scheme]
        made.append(folder / scheme)
        made[-1].mkdir()
        tensors = pack("x", torch.randn(8, 64))[0] | {"norm.weight": torch.ones(4)}
        save_file(tensors, made[-1] / "model.safetensors", {"format": "pt"})
        (made[-1] / "config.json").write_text(json.dumps({"quantization_config": config}))
    return made


def used_few_bits(path: Path) -> Any:
    with closing(Checkpoint(path)) as found:
        there = Translated(found, quantization_in(path))
        read = {key: there.read(key, torch.float32).float().nan_to_num() for key in there.tensors}
        return {key: (t.shape, t.tolist()) for key, t in read.items()}


def checkpoint(folder: Path) -> list[Path]:
    headgate.save_checkpoint(folder / "step", a_module(0), extra={"step": 1})
    return [folder / "step"]


def used_checkpoint(path: Path) -> Any:
    module = a_module(1)
    extra = headgate.load_checkpoint(path, module)
    return extra, [t.tolist() for t in module.state_dict().values()]


# --- others' ---------------------------------------------------------------------------------------------------------


def sglang(folder: Path) -> list[Path]:
    table = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 1, 0]])
    chosen = torch.from_numpy(ids().astype(np.int32))
    records = [
        {"extend_seq_lens": [4, 8], "input_ids": list(range(12)), "topk_ids_of_layer": chosen[:, :12].clone()},
        {"extend_seq_lens": [12], "input_ids": list(range(12)), "topk_ids_of_layer": chosen[:, 12:].clone()},
    ]
    torch.save({"records": records, "last_physical_to_logical_map": table}, folder / "tokens.pt")
    counts = torch.ones(2, 6, dtype=torch.int32)
    passes = [{"global_physical_count": counts}, {"global_physical_count": counts}]
    torch.save({"records": passes, "last_physical_to_logical_map": table}, folder / "passes.pt")
    torch.save({"rank": 0, "logical_count": torch.ones(3, 2, 4, dtype=torch.bfloat16)}, folder / "stat.pt")
    return [folder / f"{name}.pt" for name in ("tokens", "passes", "stat")]


def vllm(folder: Path) -> list[Path]:
    routed = np.ascontiguousarray(ids().transpose(1, 0, 2)).astype(np.uint8)
    np.save(folder / "v.npy", routed)
    np.savez_compressed(folder / "v.npz", routed[:9], routed[9:])
    stream = io.BytesIO()
    np.save(stream, routed)
    text = base64.b64encode(stream.getvalue()).decode()
    response = {"choices": [{"routed_experts": text}], "usage": {"prompt_tokens": 9, "completion_tokens": 16}}
    (folder / "v.json").write_text(json.dumps(response))
    lines = [{"prompt_routed_experts": routed[:9].tolist(), "choices": [{"routed_experts": routed[9:].tolist()}]}]
    (folder / "v.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return [folder / f"v.{kind}" for kind in ("npy", "npz", "json", "jsonl")]


def router_logits(folder: Path) -> list[Path]:
    logits = np.random.default_rng(0).random((L, T, E)).astype(np.float32)
    torch.save(tuple(torch.from_numpy(one).bfloat16() for one in logits), folder / "l.pt")
    np.savez(folder / "l.npz", *logits)
    return [folder / "l.pt", folder / "l.npz"]


def tables(folder: Path) -> list[Path]:
    choice = [(layer, token, k, e) for (layer, token, k), e in np.ndenumerate(ids())]
    plain = [(layer, e) for token in range(T) for layer, t, _, e in choice if t == token]
    (folder / "plain.csv").write_text("".join(f"{layer},{e}\n" for layer, e in plain))
    named = ["phase,token,layer,rank,expert", *(f"decode,{t},{layer},{k},{e}" for layer, t, k, e in choice)]
    (folder / "named.csv").write_text("\n".join(named) + "\n")
    counts = ["layer_id,expert_id,count", *(f"{layer},{e},{7 * e}" for layer in range(L) for e in range(E))]
    (folder / "counts.csv").write_text("\n".join(counts) + "\n")
    return [folder / f"{name}.csv" for name in ("plain", "named", "counts")]


def flame(folder: Path) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = folder / "flame"
    made.mkdir()
    for layer, chosen in enumerate(ids()):
        column = pa.array(chosen.tolist(), pa.list_(pa.int16()))
        pq.write_table(pa.table({"indices": column}), made / f"layer_{layer:02d}.parquet", row_group_size=10)
    return [made]


def esft(folder: Path) -> list[Path]:
    made = folder / "esft"
    made.mkdir()
    for layer, chosen in enumerate(ids()):
        lines = [chosen[at : at + 8].ravel() for at in range(0, T, 8)]
        text = ["\t".join(map(str, one)) + "\t\t" + "\t".join(["0.5"] * len(one)) + "\n" for one in lines]
        (made / f"expert_weights_{layer}.txt").write_text("".join(text))
    return [made]


def weights(folder: Path) -> list[Path]:
    load = np.arange(L * E).reshape(L, E)
    np.save(folder / "w.npy", load)
    torch.save(torch.from_numpy(load), folder / "w.pt")
    (folder / "w.json").write_text(json.dumps({"logical_count": load.tolist()}))
    return [folder / f"w.{kind}" for kind in ("npy", "pt", "json")]


def recording(path: Path) -> Any:
    return content(read(path, top_k=K))


def _layer() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"moe": headgate.MoE(8, 4, E, 2)})


def adapter(folder: Path) -> list[Path]:
    lora = headgate.lora(_layer(), 2)
    with torch.no_grad():
        for p in lora.parameters():
            p.normal_()
    lora.save(folder)
    said = folder / "adapter_config.json"
    said.write_text(json.dumps(json.loads(said.read_text())))  # in one line, as values are exchanged
    return [folder / "adapter_config.json", folder / "adapter_model.safetensors"]


def used_adapter(path: Path) -> Any:
    model = _layer()
    lora = headgate.load_lora(model, path.parent)
    with torch.no_grad():
        y = model["moe"](torch.ones(3, 8))
    return y.shape, [p.numpy(force=True).tobytes() for p in lora.parameters()]


def tuned_file(folder: Path) -> list[Path]:
    tuned = headgate.tune_only(_layer(), Trace(ids(1).astype(np.uint8), E), 0.5)
    tuned.save(folder / "tuned.safetensors")
    return [folder / "tuned.safetensors"]


def used_tuned(path: Path) -> Any:
    model = headgate.load_tuned(_layer(), path)
    return [p.numpy(force=True).tobytes() for p in model.parameters()]


LOADERS = {
    "Trace.load": Loader(trace_files, lambda path: content(Trace.load(path))),
    "TraceFile": Loader(trace_files, streamed),
    "Placement.load": Loader(placement_files, used_placement),
    "import_map": Loader(maps, lambda path: content(import_map(path, TWO))),
    "predict.load": Loader(predictors, used_predictor),
    "Learned.load": Loader(learned, used_learned),
    "FileStore": Loader(experts_file, used_experts),
    "load": Loader(shards, used_shards),
    "load gguf": Loader(ggufs, used_gguf),
    "load gguf's model": Loader(ggufs, used_gguf_model, share=0.2),
    "load_lora": Loader(adapter, used_adapter),
    "load_tuned": Loader(tuned_file, used_tuned),
    "load few bits": Loader(few_bits, used_few_bits),
    "load_checkpoint": Loader(checkpoint, used_checkpoint, share=0.1),
    "read sglang": Loader(sglang, recording),
    "read vllm": Loader(vllm, recording),
    "read router-logits": Loader(router_logits, recording),
    "read csv": Loader(tables, recording),
    "read flame-moe": Loader(flame, recording, share=0.04),
    "read esft": Loader(esft, recording),
    "read eplb": Loader(weights, recording),
}
