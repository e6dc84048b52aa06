"""`headgate serve`, asked by real clients over HTTP on loopback: answers, several at once, and who is turned away."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import small_configs
import talking
import torch
from signalled import Process

import headgate

transformers = pytest.importorskip("transformers")
pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx2")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from headgate.cli.serve import command, managers  # noqa: E402
from headgate.cli.serve.app import application  # noqa: E402
from headgate.cli.serve.connections import connections  # noqa: E402

NAME, MOST_BYTES = "talking", 20_000
LONG = 400  # tokens: seconds of work


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return talking.save(tmp_path_factory.mktemp("models") / NAME)


@pytest.fixture(scope="module")
def whole(folder):
    """(text, new, more for generate) -> the greedy answer of the model in memory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def answer(text: str, new: int, **more) -> str:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=new, do_sample=False, **more)[0, ids.shape[1] :]
        return tokenizer.decode(out, skip_special_tokens=True)

    return answer


@pytest.fixture(scope="module")
def loaded(folder):
    """(model, Offload, tokenizer), a third of the experts in memory."""
    model, offloaded = headgate.load(folder, "30%")
    with offloaded:
        yield model, offloaded, transformers.AutoTokenizer.from_pretrained(folder)


@contextmanager
def listening(model, tokenizer, manager, **options):
    """A server in a thread; its address."""
    app = application(
        model, tokenizer, NAME, manager,
        **{"max_waiting": 1, "most_bytes": MOST_BYTES, "key": None, "hosts": ["127.0.0.1"]} | options,
    )  # fmt: skip
    listener = command._listening("127.0.0.1", 0)
    config = uvicorn.Config(
        app, log_level="error", lifespan="off", timeout_graceful_shutdown=5, http=connections(manager.at_once + 1)
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        manager.stop()
        listener.close()


@pytest.fixture(scope="module", params=["together", "in turn"])
def server(request, loaded):
    """A client of a server that answers two requests at once, or one, and lets one more wait."""
    model, _, tokenizer = loaded
    if request.param == "together":
        manager = managers.Together(model, talking.CONTEXT, 2)
        manager.warm_up()
    else:
        manager = managers.InTurn(model, talking.CONTEXT)
    with listening(model, tokenizer, manager) as address, httpx.Client(base_url=address, timeout=60) as client:
        client.manager = manager
        yield client


def ask(client, text="why?", new=6, **more):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": new, "temperature": 0} | more
    return client.post("/v1/chat/completions", json=body)


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def templated(text: str) -> str:
    return f"user: {text}\nassistant: "


def until(what, seconds=30.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def idle(client):
    return client.get("/health").json()["inside"] == 0


def nested(depth: int) -> list:
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


# --- what is answered ------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_model_in_memory(server, whole):
    said = ask(server, new=20)
    assert text_of(said) == whole(templated("why?"), 20)
    found = said.json()
    assert found["model"] == NAME
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["prompt_tokens"] == len(templated("why?"))
    assert found["usage"]["completion_tokens"] == 20
    parts = server.post(
        "/v1/chat/completions",
        json={
            "model": NAME, "max_completion_tokens": 4, "temperature": 0,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "why?"}]}],
        },
    )  # fmt: skip
    assert text_of(parts) == whole(templated("why?"), 4)
    plain = server.post("/v1/completions", json={"prompt": "Once", "max_tokens": 7, "temperature": 0}).json()
    assert plain["choices"][0]["text"] == whole("Once", 7)
    assert plain["model"] == NAME
    response = server.post("/v1/responses", json={"input": "why?", "max_output_tokens": 5, "temperature": 0}).json()
    assert response["output"][0]["content"][0]["text"] == whole(templated("why?"), 5)


def test_a_stream_comes_in_pieces(server, whole):
    body = {"messages": [{"role": "user", "content": "why?"}], "max_tokens": 20, "temperature": 0, "stream": True}
    with server.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line)["choices"][0] for line in lines[:-1]]
    pieces = [event["delta"].get("content") for event in events if event["delta"].get("content")]
    assert "".join(pieces) == whole(templated("why?"), 20)
    assert len(pieces) > 5
    assert events[-1]["finish_reason"] == "length"


def test_several_clients_at_once_each_get_their_own(server, whole):
    texts = ["a", "What is this, please?"]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda text: text_of(ask(server, text, 30)), texts))
    assert found == [whole(templated(text), 30) for text in texts]


def test_a_seed_repeats_an_answer_whoever_else_asks(server):
    sampled = {"temperature": 1.5, "top_p": 0.95, "seed": 5, "new": 20}
    alone = text_of(ask(server, **sampled))
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(ask, server, "other", 25)
        assert text_of(ask(server, **sampled)) == alone
        text_of(beside.result())
    assert text_of(ask(server, **sampled | {"seed": 6})) != alone
    assert text_of(ask(server, new=20)) != alone


def test_a_stop_string_ends_an_answer_and_is_not_in_it(server, whole):
    answer = whole(templated("why?"), 20)
    stop = answer[7:10]
    found = ask(server, new=20, stop=["never said", stop])
    assert text_of(found) == answer[: answer.index(stop)]
    assert found.json()["choices"][0]["finish_reason"] == "stop"
    until(lambda: idle(server))


def test_penalties_and_biases_are_those_of_generate(server, whole):
    penalised = text_of(ask(server, new=20, frequency_penalty=1.5))
    assert penalised == whole(templated("why?"), 20, repetition_penalty=2.5) != whole(templated("why?"), 20)
    assert len(set(text_of(ask(server, new=5, logit_bias={"60": 100})))) == 1 < len(set(penalised))


def test_the_client_of_openai(server, whole):
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0)
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "headgate"
    ask_it = {"model": NAME, "messages": [{"role": "user", "content": "why?"}], "max_tokens": 9, "temperature": 0}
    assert client.chat.completions.create(**ask_it).choices[0].message.content == whole(templated("why?"), 9)
    stream = client.chat.completions.create(**ask_it, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole(templated("why?"), 9)
    with pytest.raises(openai.NotFoundError, match="the one that is loaded"):
        client.chat.completions.create(**ask_it | {"model": "another/model"})


# --- who leaves, and who is turned away ------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_is_not_computed_for(server, loaded, stream):
    body = {"messages": [{"role": "user", "content": "why?"}], "max_tokens": LONG, "stream": stream}
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
    said = json.dumps(body).encode()
    with socket.create_connection((server.base_url.host, server.base_url.port)) as raw:
        raw.sendall(f"{head}{len(said)}\r\n\r\n".encode() + said)
        if stream:
            assert raw.recv(20).startswith(b"HTTP/1.1 200")
        until(lambda: server.manager._answers)
        (answer,) = server.manager._answers.values()
    until(lambda: idle(server))
    accesses = []
    until(lambda: accesses.append(loaded[1].stats().accesses) or accesses[-1] in accesses[-30:-25])
    assert len(answer.tokens) < LONG - 50
    assert not server.manager._answers


def test_too_many_are_told_when_to_come_again(server):
    most = server.manager.at_once + 1
    with ThreadPoolExecutor(most) as pool:
        inside = [pool.submit(ask, server, f"{i}", 150) for i in range(most)]
        until(lambda: server.get("/health").json()["inside"] == most)
        refused = ask(server)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "try again in" in refused.json()["error"]["message"]
        assert server.get("/health").status_code == 200
        assert all(len(text_of(one.result())) > 100 for one in inside)
    text_of(ask(server))


@pytest.mark.parametrize(
    ("status", "says", "body"),
    [
        (400, "at most 512 tokens, got a prompt of 618", {"messages": [{"role": "user", "content": "a" * 600}]}),
        (400, "and an answer of 500", {"max_tokens": 500}),
        (413, f"at most {MOST_BYTES:,} bytes", {"messages": [{"role": "user", "content": "a" * 30_000}]}),
        (404, "model must be 'talking'", {"model": "other/model"}),
        (404, "model must be 'talking'", {"model": "talking@main"}),
        (400, "messages: ", {"messages": []}),
        (400, "messages.0.role: ", {"messages": [{"content": "a"}]}),
        (
            400,
            "messages.0.content",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        ),
        (400, "logit_bias must be of tokens below 97, got 97", {"logit_bias": {"96": 1, "97": 1}}),
        (400, "could not be made a prompt of", {"messages": [{"role": "user", "tool_calls": [nested(900)]}]}),
        (400, "tools must be of type function", {"tools": [{"type": "web_search"}]}),
        (400, "logit_bias", {"logit_bias": {"\ud800": 1}}),
        (400, "reasoning_effort is not served", {"reasoning_effort": "low"}),
        (400, "temperature: ", {"temperature": -1}),
        (400, "temperature: ", {"temperature": "warm"}),
        (400, "top_p: ", {"top_p": 0}),
        (400, "max_tokens: ", {"max_tokens": 0}),
        (400, "max_tokens: ", {"max_tokens": 10**30}),
        (400, "seed: ", {"seed": -1}),
        (400, "stop.", {"stop": ""}),
        (400, "n is not served", {"n": 2}),
        (400, "response_format is not served", {"response_format": {"type": "json_object"}}),
        (400, "generation_config is not served", {"generation_config": "{}"}),
        (400, "chat_template_kwargs must not hold 'chat_template'", {"chat_template_kwargs": {"chat_template": "x"}}),
        (400, "could not be made a prompt of", {"messages": [{"role": "user", "tool_calls": [{"x": 1}]}]}),
        (400, "Unexpected fields", {"no_such_field": 1}),
    ],
)
def test_what_cannot_be_answered_is_refused(server, status, says, body):
    said = json.dumps({"messages": [{"role": "user", "content": "a"}]} | body)
    found = server.post("/v1/chat/completions", content=said, headers={"Content-Type": "application/json"})
    assert (found.status_code, says in found.text.replace('\\"', '"')) == (status, True), found.text
    assert set(found.json()["error"]) == {"message", "type", "code"}
    assert idle(server)


def test_a_response_of_images_is_refused_and_earlier_items_are_not(server):
    image = {"type": "input_image", "image_url": "http://127.0.0.1:1/x.png"}
    for given in ([image], [{"role": "user", "content": [{"type": "input_text", "text": "a"}, image]}], [], [{}]):
        found = server.post("/v1/responses", json={"input": given, "max_output_tokens": 2})
        assert (found.status_code, "input" in found.text) == (400, True), found.text
    call = {"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"}
    items = [{"role": "user", "content": "a"}, call, {"type": "function_call_output", "call_id": "x", "output": "b"}]
    assert server.post("/v1/responses", json={"input": items, "max_output_tokens": 2}).status_code == 200


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff", b'{"messages": NaN}', b"[" * 9_000])
def test_what_is_no_json_is_refused(server, raw):
    found = server.post("/v1/chat/completions", content=raw, headers={"Content-Type": "application/json"})
    assert found.status_code == 400, found.text


def test_only_json_is_read_and_only_what_there_is_is_served(server):
    assert server.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    endless = server.post(
        "/v1/completions", content=(b"a" * 1000 for _ in range(100)), headers={"Content-Type": "application/json"}
    )
    assert endless.status_code == 413
    assert server.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400
    for path in ("/load_model", "/reset", "/v1/audio/transcriptions", "/docs"):
        assert server.post(path, json={"model": "a/b"}).status_code == 404
    assert server.get("/v1/chat/completions").status_code == 405
    assert server.get("/v1/models/other").status_code == 404


def test_an_error_of_the_model_is_one_of_the_server_and_the_next_is_answered(server, loaded, monkeypatch, capfd):
    offloaded = loaded[1]
    expected = text_of(ask(server))

    def broken(index, rows, routing):
        raise OSError("the disk is gone, /secret/path")

    monkeypatch.setattr(offloaded, "compute", broken)
    for stream in (False, True):
        found = ask(server, stream=stream)
        assert found.status_code == (200 if stream else 500)
        assert "could not be computed" in found.text
        assert "secret" not in found.text
    assert "the disk is gone" in capfd.readouterr().err
    assert server.get("/health").status_code == (503 if server.manager.at_once > 1 else 200)
    monkeypatch.undo()
    assert text_of(ask(server)) == expected
    assert server.get("/health").status_code == 200


def test_an_answer_that_goes_wrong_is_no_ones_but_its_own(server, whole, monkeypatch):
    """Scores are divided by a temperature; one that no float can divide by is 0."""
    assert text_of(ask(server, temperature=1e-40)) == whole(templated("why?"), 6)
    if server.manager.at_once == 1:
        return
    real = managers.Chooser.__call__

    def call(self, ids, scores):
        if self.sample and len(ids) > len(templated("why?")) + 2:
            raise RuntimeError("no probabilities")
        return real(self, ids, scores)

    monkeypatch.setattr(managers.Chooser, "__call__", call)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(ask, server, "other", 60)
        until(lambda: server.manager._answers)
        assert ask(server, temperature=1, new=20).status_code == 500
        assert "could not be computed" in ask(server, temperature=1, new=20, stream=True).text
        assert text_of(beside.result()) == whole(templated("other"), 60)
    assert server.get("/health").status_code == 200
    until(lambda: idle(server))
    assert not server.manager._answers


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_serves_with_a_key_and_ends_when_the_answer_has(folder, tmp_path, monkeypatch, whole):
    monkeypatch.setenv(command.KEY, "s3cret")
    process = Process(["serve", str(folder), "--budget", "30%", "--port", "0", "--at-once", "2"], tmp_path)
    process.wait_until(lambda: "/v1" in process.output())
    address = process.output().split(" on ")[1].split("/v1")[0]
    with httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            refused = client.get("/v1/models", headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
        client.headers["Authorization"] = "Bearer s3cret"
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(ask, client, "why?", 40)
            until(lambda: client.get("/health").json()["inside"] == 1)
            process.process.send_signal(signal.SIGTERM)
            assert text_of(last.result()) == whole(templated("why?"), 40)
    ended = process.ended()
    assert (ended.status, ended.said) == (143, "headgate: terminated\n")
    assert (
        ended.out == f"serving {NAME} on {address}/v1, 2 answers at once, 512 tokens each; " + ended.out.split("; ")[1]
    )
    assert not ended.children


def test_a_model_that_cannot_be_batched_is_served_in_turn_and_it_is_said(tmp_path, capsys):
    """Latent attention: keys and values are not of one size, as transformers' paged cache wants them."""
    config = transformers.DeepseekV3Config(
        **small_configs.small_values(transformers.DeepseekV3Config) | {"vocab_size": 97, "eos_token_id": None}
    )
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    talking.save_tokenizer(tmp_path)
    model, offloaded = headgate.load(tmp_path, "50%")
    with offloaded:
        manager = command._manager(model, 64, 4)
        assert (type(manager), manager.at_once) == (managers.InTurn, 1)
        assert "one answer after another, as continuous batching failed: index_copy_()" in capsys.readouterr().err
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        with listening(model, tokenizer, manager) as address, httpx.Client(base_url=address, timeout=60) as client:
            assert ask(client, "a").json()["usage"]["completion_tokens"] == 6


def test_continuous_batching_begins_no_text_at_every_step(loaded, monkeypatch):
    model, offloaded, _ = loaded
    began = []
    monkeypatch.setattr(offloaded, "new_sequence", lambda: began.append(1))
    manager = managers.Together(model, talking.CONTEXT, 2)
    try:
        manager.warm_up()
        assert not began
    finally:
        manager.stop()
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long))
    assert began == [1]


def test_a_model_without_a_template_is_asked_for_completions(loaded, folder, whole):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    manager = managers.InTurn(loaded[0], talking.CONTEXT)
    with listening(loaded[0], tokenizer, manager) as address, httpx.Client(base_url=address, timeout=60) as client:
        found = ask(client)
        assert found.status_code == 400
        assert "no chat template: ask /v1/completions" in found.text
        plain = client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 5, "temperature": 0}).json()
        assert plain["choices"][0]["text"] == whole("Once", 5)
