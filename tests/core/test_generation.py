import json

import pytest
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoTokenizer, Qwen3Config

from afterglow.core.chat_encoding import encode_prompt
from afterglow.core.checkpoint import Checkpoint, read_checkpoint, resolve_dtype
from afterglow.core.errors import DataError, GenerationError, ModelError, RecipeError
from afterglow.core.generation import EngineConfig, Request, SamplingConfig, check_requests, make_completion, room
from afterglow.core.recipe import Section, build

GREEDY = SamplingConfig(temperature=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1.0), ("temperature", 0.001), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5),
        ("top_k", 0), ("min_p", -0.1), ("max_tokens", 0), ("stop", [""]),
    ],
)  # fmt: skip
def test_bad_sampling_value_is_named(key, value):
    with pytest.raises(RecipeError, match=f"{key} is"):
        SamplingConfig(**{key: value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": ""}, "model is missing"),
        ({"engine": "sglang"}, "use vllm, server or transformers"),
        ({"engine": "server"}, "needs one like http://localhost:8000"),
        ({"server_url": "http://x"}, "say `engine: server`"),
        ({"dtype": "half"}, "dtype is 'half'"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"gpu_memory_utilization": 90.0}, "gpu_memory_utilization is 90"),
        ({"engine": "server", "server_url": "http://x", "engine_kwargs": {"a": 1}}, "engine_kwargs have no effect"),
    ],
)
def test_bad_engine_value_is_named(settings, words):
    with pytest.raises(RecipeError, match=words):
        EngineConfig(**({"model": "m"} | settings))


def test_all_wrong_values_come_in_one_error():
    with pytest.raises(RecipeError, match=r"temperature.*top_p.*max_tokens"):
        SamplingConfig(temperature=-1, top_p=2, max_tokens=0)


def test_configs_are_one_flat_recipe_and_every_key_has_help():
    section = Section({"model": "m", "engine": "transformers", "temperature": 0, "stop": ["\n"], "max_model_len": 64})
    engine, sampling = build(section, EngineConfig, SamplingConfig)
    assert (engine.engine, sampling.temperature, sampling.stop, engine.max_model_len) == (
        "transformers",
        0.0,
        ["\n"],
        64,
    )
    fields = EngineConfig.__dataclass_fields__ | SamplingConfig.__dataclass_fields__
    assert all(field.metadata["help"] for field in fields.values())


def test_chat_prompt_ends_where_the_assistant_begins():
    tokenizer = tiny_tokenizer()
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "2+3?"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
    tools = [{"type": "function", "function": {"name": "calc", "description": "d", "parameters": {}}}]
    assert "calc" in tokenizer.decode(encode_prompt(tokenizer, [{"role": "user", "content": "2"}], tools=tools))
    quiet = encode_prompt(
        tokenizer, [{"role": "user", "content": "2"}], chat_template_kwargs={"enable_thinking": False}
    )
    assert tokenizer.decode(quiet).endswith("<think>\n\n</think>\n\n")


def test_folder_without_chat_template(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"tiny.*no chat template.*chat_template.jinja"):
        encode_prompt(tokenizer, [{"role": "user", "content": "2+3?"}])


def test_template_that_refuses_the_messages():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"roles: user, user.*roles must alternate"):
        encode_prompt(tokenizer, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_requests_that_no_engine_could_answer():
    def ask(key, length):
        return Request(key, tuple(range(length)), 0, GREEDY)

    check_requests([ask("a", 1), ask("b", 63)], max_context=64, vocab_size=100)
    with pytest.raises(GenerationError, match=r"2 of 3 prompts.*64 tokens: 'b' \(64 tokens\), 'c' \(80 tokens\)"):
        check_requests([ask("a", 1), ask("b", 64), ask("c", 80)], max_context=64, vocab_size=100)
    with pytest.raises(GenerationError, match="'a' stands twice"):
        check_requests([ask("a", 1), ask("a", 2)], max_context=64, vocab_size=100)
    with pytest.raises(GenerationError, match="'a': its prompt is empty"):
        check_requests([ask("a", 0)], max_context=64, vocab_size=100)
    with pytest.raises(GenerationError, match=r"'a': token 19 is outside the model's vocabulary of 19"):
        check_requests([ask("a", 20)], max_context=64, vocab_size=19)


def test_max_tokens_is_cut_to_the_context():
    assert room(Request("a", (1,) * 60, 0, SamplingConfig(max_tokens=10)), 64) == 4
    assert room(Request("a", (1,) * 50, 0, SamplingConfig(max_tokens=10)), 64) == 10


def test_text_keeps_markup_and_drops_the_stop_token_and_stop_string():
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    checkpoint = Checkpoint("m", Qwen3Config(), tokenizer, frozenset([end]))
    request = Request("a", (1,), 0, SamplingConfig(stop=["##", "!"]))
    markup = tokenizer.encode("<think>x</think><tool_call>")
    ended = make_completion(request, checkpoint, [*markup, end], True, None)
    assert (ended.text, ended.token_ids[-1], ended.finish_reason) == ("<think>x</think><tool_call>", end, "stop")
    cut = make_completion(request, checkpoint, tokenizer.encode("ab##c!"), True, None)
    assert (cut.text, cut.finish_reason, len(cut.token_ids)) == ("ab", "stop", 6)
    full = make_completion(request, checkpoint, tokenizer.encode("ab##"), False, None)
    assert (full.text, full.finish_reason) == ("ab##", "length")
    assert make_completion(request, checkpoint, [end], True, None).text == ""


def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(tmp_path):
    folder = save_tiny(tmp_path)
    end = read_checkpoint(str(folder)).tokenizer.eos_token_id
    assert read_checkpoint(str(folder)).stop_ids == {end}
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [7, 9]}))
    assert read_checkpoint(str(folder)).stop_ids == {7, 9, end}
    path.unlink()
    assert read_checkpoint(str(folder)).stop_ids == {end}


def test_unreadable_model_folders(tmp_path):
    with pytest.raises(ModelError, match=r"nothing-here"):
        read_checkpoint(str(tmp_path / "nothing-here"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"LoRA adapter\. Merge it"):
        read_checkpoint(str(tmp_path))
    folder = save_tiny(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="can be read"):
        read_checkpoint(str(folder))
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        read_checkpoint(str(folder))


def test_checkpoint_of_another_shape_is_refused(tiny_folder, tmp_path):
    one = read_checkpoint(str(tiny_folder))
    one.check_replaceable_by(one)
    for overrides, words in [
        ({"layers": 3}, "num_hidden_layers` is 3, not 2"),
        ({"tie_word_embeddings": False}, "tie_"),
    ]:
        other = read_checkpoint(str(save_tiny(tmp_path / words[:4], **overrides)))
        with pytest.raises(ModelError, match=words):
            one.check_replaceable_by(other)


@pytest.mark.parametrize(
    ("stored", "on_cpu", "on_gpu"),
    [
        ("float32", "float32", "bfloat16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float32", "float16"),
        (None, "float32", "bfloat16"),
    ],
)
def test_auto_dtype(stored, on_cpu, on_gpu):
    config = Qwen3Config(dtype=stored)
    assert resolve_dtype("auto", config, on_gpu=False) == on_cpu
    assert resolve_dtype("auto", config, on_gpu=True) == on_gpu
    assert resolve_dtype("float16", config, on_gpu=False) == "float16"
