"""The HTTP client against a scripted server on loopback, and once (slow) against a real vLLM server."""

import json
import random
import socket
import threading
import time
import warnings
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tiny import save_tiny
from vllm_server import free_port, start_server

from afterglow.core import engine_server, server_pool
from afterglow.core.checkpoint import read_checkpoint
from afterglow.core.errors import GenerationError, ModelError
from afterglow.core.generation import EngineConfig, Request, SamplingConfig, open_engine

SAMPLING = SamplingConfig(temperature=0.5, top_k=20, max_tokens=8)


class Stub(ThreadingHTTPServer):
    """Answers each completion with its prompt's first three tokens and an end token, unless the script says else."""

    daemon_threads = True

    def __init__(self, model, port=0):
        super().__init__(("127.0.0.1", port), StubHandler)
        self.model = model
        self.script: list[object] = []  # one entry per coming request: a status, a reply body, or a word
        self.bodies: list[dict] = []
        self.calls: list[str] = []
        self.routes: dict[str, tuple[int, str]] = {}
        self.running = self.most_running = 0
        self.delay = 0.0
        self.released = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def wait_for(self, requests):
        deadline = time.monotonic() + 60
        while len(self.bodies) < requests:
            assert time.monotonic() < deadline, f"{len(self.bodies)} of {requests} requests arrived"
            time.sleep(0.01)


class StubHandler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, format, *args):
        pass

    def reply(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        models = {"data": [{"id": self.server.model, "max_model_len": 64}]}
        self.reply(*self.server.routes.get(self.path, (200, json.dumps(models))))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null")
        if self.path != "/v1/completions":
            self.server.calls.append(self.path)
            return self.reply(*self.server.routes.get(self.path, (404, "no such route")))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
            step = self.server.script.pop(0) if self.server.script else "good"
        time.sleep(0.1 if step == "late" else self.server.delay)
        with self.server.lock:
            self.server.running -= 1
        if step == "hang":
            self.server.released.wait()
        elif step == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif isinstance(step, int):
            self.reply(step, "out of order")
        elif isinstance(step, str) and step not in ("good", "twice", "late"):
            self.reply(200, step)
        else:
            choice = step if isinstance(step, dict) else good(body)
            self.reply(200, json.dumps({"choices": [choice] * (2 if step == "twice" else 1)}))


def good(body):
    tokens = [*body["prompt"][:3], 258]
    logprobs = {"token_logprobs": [-float(i) for i in range(4)]} if body["logprobs"] else None
    return {"text": "abc", "token_ids": tokens, "finish_reason": "stop", "logprobs": logprobs}


@contextmanager
def serving(model, port=0):
    server = Stub(model, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def stub(tiny_folder):
    with serving(str(tiny_folder)) as server:
        yield server


@pytest.fixture
def connect(stub, monkeypatch):
    """Opens engines on the stub that wait next to nothing between tries, and closes them."""
    monkeypatch.setattr(server_pool, "FIRST_WAIT", 0.001)
    engines = []

    def open_one(**settings):
        config = EngineConfig(**({"model": stub.model, "engine": "server", "server_url": stub.url} | settings))
        engines.append(open_engine(config))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close()


def ask(count=1, **settings):
    return [Request(f"r{i}", (65 + i, 66, 67, 68), i, SAMPLING, **settings) for i in range(count)]


def test_request_and_reply(connect, stub):
    engine = connect(server_url=stub.url + "/v1/")
    (done,) = engine.generate(ask(logprobs=True))
    end = engine.tokenizer.eos_token_id
    assert done.token_ids == [65, 66, 67, 258] and done.finish_reason == "stop"
    assert done.text == engine.tokenizer.decode([65, 66, 67, 258] if end != 258 else [65, 66, 67])
    assert done.logprobs == [0.0, -1.0, -2.0, -3.0]
    assert engine.max_context == 64
    (body,) = stub.bodies
    expected = {"prompt": [65, 66, 67, 68], "seed": 0, "temperature": 0.5, "top_k": 20, "max_tokens": 8}
    assert expected.items() <= body.items()
    assert (body["repetition_penalty"], body["return_token_ids"], body["stop_token_ids"]) == (1.0, True, [end])


def test_many_requests_at_once_but_no_more_than_allowed(connect, stub):
    stub.delay = 0.02  # lets requests overlap
    done = {c.key: c for c in connect(max_num_seqs=4).generate(ask(40))}
    assert {key: c.token_ids[0] for key, c in done.items()} == {f"r{i}": 65 + i for i in range(40)}
    assert 1 < stub.most_running <= 4


def test_every_kind_of_failure_is_tried_again(connect, stub):
    stub.script = [500, 429, '{"choices": [', "drop", {"text": "", "finish_reason": "error"}]
    (done,) = connect().generate(ask())
    assert done.token_ids == [65, 66, 67, 258]
    assert len(stub.bodies) == engine_server.TRIES
    stub.script = ["[]", '{"choices": []}', {"finish_reason": "stop"}, {"finish_reason": "stop", "token_ids": ["x"]}]
    assert len(list(connect().generate(ask()))) == 1


def test_tries_are_limited_and_finished_work_is_kept(connect, stub):
    stub.script = ["good", "good", *[503] * engine_server.TRIES]
    results = connect(max_num_seqs=1).generate(ask(5))
    assert [next(results).key, next(results).key] == ["r0", "r1"]
    with pytest.raises(GenerationError, match=rf"'r2': {stub.url} failed 6 times: HTTP 503: out of order"):
        next(results)


def test_several_servers_share_the_work_by_their_room(connect, stub, tiny_folder):
    """The slow one gets less, no one more than its slots; what one of them drops, another answers."""
    with serving(str(tiny_folder)) as other:
        stub.delay, other.delay = 0.2, 0.01
        engine = connect(server_url=[stub.url, other.url + "/v1"], max_num_seqs=4)
        done = {c.key: c.token_ids[0] for c in engine.generate(ask(60))}
        assert done == {f"r{i}": 65 + i for i in range(60)}
        assert len(stub.bodies) + len(other.bodies) == 60, "nothing is asked twice"
        assert 4 <= len(stub.bodies) < len(other.bodies)
        assert stub.most_running <= 4 and other.most_running <= 4
        stub.script, stub.delay = ["drop"], 0.0
        other.bodies.clear()
        assert len(list(engine.generate(ask(1)))) == 1 and len(other.bodies) == 1
        stub.routes = {"/v1/models": (200, json.dumps({"data": [{"id": "another"}]}))}
        with pytest.raises(GenerationError, match=rf"{stub.url} serves 'another'"):
            connect(server_url=[other.url, stub.url])


def test_nothing_is_lost_or_counted_twice_whatever_the_servers_do(connect, stub, tiny_folder):
    """Two servers that drop, delay, duplicate, swap and garble a third of their replies at random."""
    rng = random.Random(0)
    with serving(str(tiny_folder)) as other:
        for server in (stub, other):
            swapped = {"token_ids": [1, 2], "finish_reason": "stop", "prompt_token_ids": [9, 9], "logprobs": None}
            faults = [500, 503, 429, "drop", "{", '{"choices": []}', "[]", swapped, "twice", "late"]
            server.script = [rng.choice(faults) if rng.random() < 0.33 else "good" for _ in range(200)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_server, "TRIES", 20)
            found = [(c.key, c.token_ids) for c in connect(server_url=[stub.url, other.url]).generate(ask(150))]
        assert sorted(found) == sorted((f"r{i}", [65 + i, 66, 67, 258]) for i in range(150))
        assert len(stub.bodies) + len(other.bodies) > 180, "a third was asked again"


def test_a_server_that_is_restarted_is_waited_for(connect, stub, tiny_folder):
    """Its absence costs no tries; with a time limit on it."""
    with serving(str(tiny_folder)) as first:
        url, port = first.url, first.server_address[1]
        engine = connect(server_url=url, server_timeout=30.0)
    results = engine.generate(ask(5))
    timer = threading.Timer(1.0, lambda: restarted.enter_context(serving(str(tiny_folder), port)))
    with ExitStack() as restarted, pytest.warns(UserWarning, match=rf"{url} does not answer .*waiting for it"):
        timer.start()
        assert {c.key for c in results} == {f"r{i}" for i in range(5)}
        timer.join()
    engine._timeout = 0.05
    with pytest.warns(UserWarning), pytest.raises(GenerationError, match=rf"{url} no answer for \d+ s: ConnectError"):
        list(engine.generate(ask(1)))


def test_a_refused_request_is_not_tried_again(connect, stub):
    stub.script = [400]
    with pytest.raises(GenerationError, match=r"'r0': .* failed once: HTTP 400"):
        list(connect().generate(ask()))
    assert len(stub.bodies) == 1


def test_hanging_reply_is_given_up(connect, stub, monkeypatch):
    monkeypatch.setattr(engine_server, "TRIES", 2)
    stub.script = ["hang", "hang"]
    with pytest.raises(GenerationError, match=r"'r0': .* failed 2 times: ReadTimeout"):
        list(connect(server_timeout=0.1).generate(ask()))
    stub.script = ["hang"]
    assert len(list(connect(server_timeout=0.1).generate(ask()))) == 1


def test_iterator_and_engine_closed_while_requests_hang(connect, stub):
    engine = connect()
    stub.script = ["good", "hang", "hang"]
    results = engine.generate(ask(3))
    next(results)
    stub.wait_for(3)  # a request still on its way would take its step from the next script
    results.close()
    stub.script = ["good", "hang"]
    results = engine.generate(ask(2))
    next(results)
    stub.wait_for(5)
    engine.close()
    engine.close()
    with pytest.raises(GenerationError, match="closed while it generated"):
        next(results)
    with pytest.raises(GenerationError, match="closed: open a new one"):
        engine.generate(ask())


def test_server_without_token_ids_warns_once(connect, stub):
    engine = connect()
    stub.script = [{"text": "x<think>", "finish_reason": "stop"}, {"text": "y", "finish_reason": "length"}]
    with pytest.warns(UserWarning, match="returns no token ids") as caught:
        first, second = sorted(engine.generate(ask(2)), key=lambda c: c.finish_reason, reverse=True)
    assert len(caught) == 1
    assert (first.text, first.token_ids) == (
        "x<think>",
        [*engine.tokenizer.encode("x<think>"), engine.tokenizer.eos_token_id],
    )
    assert (second.text, second.token_ids, second.finish_reason) == ("y", engine.tokenizer.encode("y"), "length")
    stub.script = [{"text": "y", "finish_reason": "length"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(engine.generate(ask()))
    stub.script = [{"text": "y", "finish_reason": "length"}]
    with pytest.raises(GenerationError, match=r"'r0': .* log-probabilities cannot be matched"):
        list(engine.generate(ask(logprobs=True)))


def test_opening_says_what_is_wrong(connect, stub, tiny_folder, tmp_path):
    with pytest.raises(GenerationError, match=r"no server answers at http://127\.0\.0\.1:9 .*Start one"):
        connect(server_url="http://127.0.0.1:9")
    stub.routes = {"/v1/models": (401, "")}
    with pytest.raises(GenerationError, match="set OPENAI_API_KEY"):
        connect()
    stub.routes = {"/v1/models": (200, "<html>")}
    with pytest.raises(GenerationError, match="is `server_url` right"):
        connect()
    stub.routes = {}
    with pytest.raises(GenerationError, match=rf"serves '{tiny_folder}', the recipe asks for '{tmp_path}'"):
        connect(model=str(tmp_path))


def test_key_is_sent_and_the_context_is_checked_before_asking(connect, stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine = connect(max_model_len=4)
    assert engine._client.headers["Authorization"] == "Bearer secret"
    with pytest.raises(GenerationError, match=r"'r0' \(4 tokens\)"):
        engine.generate(ask())
    assert stub.bodies == []


def test_weights_of_a_server(connect, stub, tiny_folder, tmp_path):
    engine = connect()
    tied, untied = str(save_tiny(tmp_path / "tied")), str(save_tiny(tmp_path / "untied", tie_word_embeddings=False))
    stub.routes = {"/server_info": (404, "")}
    with pytest.raises(GenerationError, match="VLLM_SERVER_DEV_MODE=1"):
        engine.load_weights(tied)
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        engine.load_weights(untied)
    stub.routes = {"/server_info": (200, '{"vllm_config": "device_config=cpu, seed=0"}')}
    with pytest.raises(GenerationError, match=r"tied to its embedding.*engine: vllm"):
        engine.load_weights(tied)
    assert stub.calls == []
    stub.routes = {"/server_info": (200, '{"vllm_config": "device_config=cuda"}')}
    stub.routes |= {"/collective_rpc": (200, "{}"), "/reset_prefix_cache": (200, "")}
    engine.load_weights(tied)
    assert stub.calls == ["/collective_rpc", "/reset_prefix_cache"]
    stub.routes["/collective_rpc"] = (500, "no such file")
    with pytest.raises(ModelError, match=r"HTTP 500\): no such file"):
        engine.load_weights(tied)


@pytest.mark.vllm
@pytest.mark.slow
def test_real_server_gives_what_transformers_gives(tmp_path):
    """Tokens, texts and log-probabilities of a real vLLM server, and its weights swapped (untied on a CPU)."""
    models = [
        str(save_tiny(tmp_path / name, seed=seed, initializer_range=0.3, tie_word_embeddings=False))
        for seed, name in enumerate("AB")
    ]
    port = free_port()
    server = start_server(models[0], port)
    try:
        settings = [
            SamplingConfig(temperature=0, max_tokens=20),
            SamplingConfig(temperature=0.9, top_k=40, max_tokens=20),
        ]
        asked = [
            Request(f"{s.temperature}-{i}", tuple(range(20 + i, 40 + 3 * i)), i, s, logprobs=True)
            for s in settings
            for i in range(8)
        ]
        config = EngineConfig(model=models[0], engine="server", server_url=f"http://127.0.0.1:{port}")
        with open_engine(config) as engine:
            assert engine.max_context == 512
            for model in (models[0], models[1]):
                if model != models[0]:
                    engine.load_weights(model)
                with open_engine(EngineConfig(model=model, engine="transformers", dtype="float32")) as reference:
                    expected = {done.key: done for done in reference.generate(asked)}
                for done in engine.generate(asked):
                    same = expected[done.key]
                    assert (done.token_ids, done.text, done.finish_reason) == (
                        same.token_ids, same.text, same.finish_reason
                    )  # fmt: skip
                    assert done.logprobs == pytest.approx(same.logprobs, abs=1e-4)
            if not torch.cuda.is_available():
                with pytest.raises(GenerationError, match="tied to its embedding"):
                    engine._refuse_cpu(read_checkpoint(models[0]))
    finally:
        server.terminate()
        server.wait(60)
