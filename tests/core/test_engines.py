"""What every engine promises, run against transformers and real vLLM alike."""

import json
import shutil

import pytest
import torch
from scipy.stats import chisquare
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from afterglow.core.errors import GenerationError, ModelError
from afterglow.core.generation import Engine, EngineConfig, Request, SamplingConfig, open_engine

GREEDY = SamplingConfig(temperature=0, max_tokens=20)
FILTERED = SamplingConfig(temperature=0.9, top_p=0.9, top_k=40, min_p=0.02, max_tokens=20)
ENGINES = ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two checkpoints of one shape with far from uniform predictions, their heads tied to their embeddings."""
    root = tmp_path_factory.mktemp("engines")
    return {name: str(save_tiny(root / name, seed=seed, initializer_range=0.3)) for seed, name in enumerate("AB")}


@pytest.fixture(scope="module")
def opened(models):
    """Each engine, opened once for the whole module, on first use."""
    engines: dict[str, Engine] = {}

    def get(name: str) -> Engine:
        if name not in engines:
            engines[name] = open_engine(
                EngineConfig(model=models["A"], engine=name, max_model_len=512, dtype="float32")
            )
        return engines[name]

    yield get
    for engine in engines.values():
        engine.close()


@pytest.fixture(params=ENGINES)
def engine(request, opened):
    return opened(request.param)


def requests(sampling, count=16, logprobs=False):
    """Prompts of 5 to 80 tokens, each with its own seed."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 80, (count,), generator=generator).tolist()
    prompts = [tuple(torch.randint(10, 250, (length,), generator=generator).tolist()) for length in lengths]
    return [Request(f"r{i}", prompt, 100 + i, sampling, logprobs) for i, prompt in enumerate(prompts)]


def run(engine, asked):
    return {done.key: done for done in engine.generate(asked)}


def raw_logprobs(model_folder, request, token_ids):
    """Log-probabilities of a plain forward pass, the reference for both engines."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")
    ids = torch.tensor([[*request.prompt_ids, *token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
    return logits, logits.log_softmax(-1)[torch.arange(len(token_ids)), torch.tensor(token_ids)]


@pytest.mark.parametrize("sampling", [GREEDY, FILTERED], ids=["greedy", "filtered"])
def test_logprobs_are_the_models_own(engine, models, sampling):
    asked = requests(sampling, count=3, logprobs=True)
    done = run(engine, asked)
    for request in asked:
        completion = done[request.key]
        logits, expected = raw_logprobs(models["A"], request, completion.token_ids)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)
        if sampling is GREEDY:
            assert completion.token_ids == logits.argmax(-1).tolist()
    assert all(c.logprobs is None for c in run(engine, requests(sampling, count=1)).values())


@pytest.mark.vllm
@pytest.mark.parametrize("sampling", [GREEDY, FILTERED], ids=["greedy", "filtered"])
def test_engines_agree_token_for_token(opened, sampling):
    """Also when sampling: on a CPU both draw the same noise from the same seed and filter in the same order."""
    asked = requests(sampling, logprobs=True)
    one, two = run(opened("transformers"), asked), run(opened("vllm"), asked)
    assert one.keys() == two.keys() == {request.key for request in asked}
    for key in one:
        assert (one[key].token_ids, one[key].text, one[key].finish_reason) == (
            two[key].token_ids, two[key].text, two[key].finish_reason
        )  # fmt: skip
        torch.testing.assert_close(torch.tensor(one[key].logprobs), torch.tensor(two[key].logprobs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampling", [GREEDY, FILTERED], ids=["greedy", "filtered"])
def test_a_sample_does_not_depend_on_its_batch(engine, sampling):
    asked = requests(sampling)
    together = run(engine, asked)
    for request in asked[::5]:
        assert run(engine, [request])[request.key] == together[request.key]
    assert run(engine, asked[::-1]) == together


def test_a_stream_takes_requests_while_others_run(engine):
    asked = requests(FILTERED)
    together = run(engine, asked)
    done = {}
    with engine.open_stream() as stream:
        for request in asked:  # one more after every poll
            stream.submit(request)
            done |= {completion.key: completion for completion in stream.poll()}
        with pytest.raises(GenerationError, match="leave no room"):
            stream.submit(Request("long", (20,) * 600, 0, FILTERED))
            stream.poll()
        stream.close()
    with engine.open_stream() as stream:  # what was cancelled leaves nothing behind
        for request in asked[len(done) :]:
            stream.submit(request)
        while stream.running:
            done |= {completion.key: completion for completion in stream.poll()}
        assert stream.poll() == []
    assert done == {key: together[key] for key in done} and done


def test_seeds(engine):
    prompt = requests(FILTERED, count=1)[0].prompt_ids
    asked = [Request(f"s{seed}", prompt, seed, FILTERED) for seed in (0, 1, 2, 2**63 - 1)]
    first = run(engine, asked)
    assert run(engine, asked) == first
    assert len({tuple(c.token_ids) for c in first.values()}) == 4


def test_samples_follow_the_softmax(engine, models):
    """4,000 one-token samples against the exact distribution over the 6 likeliest tokens at temperature 0.7."""
    sampling = SamplingConfig(temperature=0.7, top_k=6, top_p=1.0, max_tokens=1)
    prompt = (60, 61, 62, 63)
    asked = [Request(str(seed), prompt, seed, sampling) for seed in range(4000)]
    logits, _ = raw_logprobs(models["A"], asked[0], [0])
    top = (logits[0] / 0.7).topk(6)
    counts = dict.fromkeys(top.indices.tolist(), 0)
    for completion in engine.generate(asked):
        counts[completion.token_ids[0]] += 1  # a KeyError here is a token that top-k should have dropped
    assert chisquare(list(counts.values()), top.values.softmax(-1).double().numpy() * 4000).pvalue > 0.001


def test_mixed_settings_in_one_call(engine):
    asked = [
        *requests(GREEDY, 3),
        *(Request(f"x{r.key}", r.prompt_ids, r.seed, FILTERED) for r in requests(FILTERED, 3)),
    ]
    done = run(engine, asked)
    assert done == run(engine, asked[:3]) | run(engine, asked[3:])


def test_stops(engine, models, tmp_path):
    request = requests(GREEDY, count=1)[0]
    free = run(engine, [request])["r0"]
    assert (free.finish_reason, len(free.token_ids)) == ("length", 20)
    readable = next(i for i in range(3, 18) if engine.tokenizer.decode([free.token_ids[i]]).isascii())
    text = engine.tokenizer.decode(free.token_ids[readable])
    first = free.token_ids.index(free.token_ids[readable])
    stopped = run(engine, [Request("r0", request.prompt_ids, 0, SamplingConfig(temperature=0, stop=["@@@", text]))])[
        "r0"
    ]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: first + 1]  # the stop string's tokens are there, its text is not
    assert stopped.text == engine.tokenizer.decode(free.token_ids[:first])

    ending = tmp_path / "ending"  # a checkpoint whose generation config ends where the other one went on
    shutil.copytree(models["A"], ending)
    config = json.loads((ending / "generation_config.json").read_text())
    (ending / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [258, free.token_ids[first]]}))
    engine.load_weights(str(ending))
    ended = run(engine, [request])["r0"]
    engine.load_weights(models["A"])
    assert (ended.token_ids, ended.finish_reason) == (free.token_ids[: first + 1], "stop")
    assert ended.text == engine.tokenizer.decode(free.token_ids[:first])


def test_context_bounds_the_completion_and_refuses_the_prompt(engine):
    long = tuple(range(10, 210)) * 3
    fits = run(engine, [Request("fits", long[:505], 0, GREEDY)])["fits"]
    assert (len(fits.token_ids), fits.finish_reason) == (7, "length")
    with pytest.raises(GenerationError, match=r"'long' \(512 tokens\)"):
        engine.generate([Request("long", long[:512], 0, GREEDY)])  # before anything is generated


def test_iterator_closed_early(engine):
    asked = requests(FILTERED, count=8)
    expected = run(engine, asked)
    iterator = engine.generate(asked)
    first = next(iterator)
    iterator.close()
    assert first == expected[first.key]
    assert run(engine, asked) == expected
    assert run(engine, []) == {}


def test_weights_are_swapped_completely(engine, models):
    """The head is tied to the embedding: a stale copy of it would give neither A's tokens nor B's."""
    asked = requests(GREEDY, logprobs=True)
    before = run(engine, asked)
    engine.load_weights(models["B"])
    swapped = run(engine, asked)
    engine.load_weights(models["A"])
    assert run(engine, asked) == before
    for request in asked[:3]:
        completion = swapped[request.key]
        logits, expected = raw_logprobs(models["B"], request, completion.token_ids)
        assert completion.token_ids == logits.argmax(-1).tolist()
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_unfit_weights_are_refused_and_the_engine_goes_on(engine, tmp_path):
    asked = requests(GREEDY, count=2)
    before = run(engine, asked)
    with pytest.raises(ModelError, match="num_hidden_layers"):
        engine.load_weights(str(save_tiny(tmp_path / "deep", layers=3)))
    with pytest.raises(ModelError, match="nowhere"):
        engine.load_weights(str(tmp_path / "nowhere"))
    assert run(engine, asked) == before
