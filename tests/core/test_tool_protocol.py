"""Chat templates as they are: which ones can call Python, and with which tokens they are answered."""

from pathlib import Path

import pytest
import trl
from tiny import tiny_tokenizer

from afterglow.core.errors import DataError, ModelError
from afterglow.core.tool_protocol import CODE_BLOCK_INSTRUCTION, TOOLS, open_protocol

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
QUESTION = [{"role": "user", "content": "6 * 7?"}]


def tokenizer(template):
    made = tiny_tokenizer()
    path = TEMPLATES / f"{template}.jinja"
    made.chat_template = path.read_text() if path.exists() else template
    return made


@pytest.mark.parametrize("template", ["qwen3", "qwen2_5", "qwen3_instruct_2507", "qwen3_vl"])
def test_the_answer_is_what_the_template_writes_behind_a_call(template):
    """Also where the template renders earlier turns differently (qwen3); trl's training variant is the rule."""
    made = tokenizer(template)
    protocol = open_protocol("template", made)
    call = {"type": "function", "function": {"name": "python", "arguments": {"code": "6*7"}}}
    chat = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    answer = protocol.reply_messages(["42\n"])
    training = (TEMPLATES / f"{template}_training.jinja").read_text()
    before, after = (
        made.apply_chat_template(messages, tools=TOOLS, tokenize=False, chat_template=training, **more)
        for messages, more in ((chat, {}), ([*chat, *answer], {"add_generation_prompt": True}))
    )
    ended = before.rstrip("\n")
    assert after.startswith(ended) and ended.endswith("<|im_end|>")
    assert made.decode(protocol.reply_ids(answer, ended=True)) == after[len(ended) :]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("llama3", "refuses tools: 'bos_token' is undefined"),
        ("phi3", "does not tell the model of its tools"),
        ("llama3_1", "does not write calls between <tool_call> tags"),
        ("{{ tools[0].function.description }}{{ messages[0].content }}", "between <tool_call> tags"),
        ("{{ raise_exception('no') }}", "refuses tools: no"),
        (
            "{% for t in tools or [] %}{{ t.function.description }}{% endfor %}{% for m in messages %}{{ m.content }}"
            "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.code }}</tool_call>{% endfor %}"
            "{% endfor %}",
            "ends an assistant's turn with none of the model's end tokens",
        ),
        (
            "{% for t in tools or [] %}{{ t.function.description }}{% endfor %}{% for m in messages %}"
            "{% if m.role != 'tool' %}{{ m.content }}{% endif %}"
            "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.code }}</tool_call>{% endfor %}"
            "<|im_end|>{% endfor %}",
            "does not show the model what a tool answered",
        ),
    ],
)
def test_templates_that_cannot_are_refused_with_the_way_out(template, says):
    with pytest.raises(ModelError, match=says):
        open_protocol("template", tokenizer(template))


def test_without_a_template():
    made = tiny_tokenizer()
    made.chat_template = None
    for name in ("template", "code_block"):
        with pytest.raises(ModelError, match="has no chat template"):
            open_protocol(name, made)


def test_code_blocks_need_no_tools_in_the_template():
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" \
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # fmt: skip
    protocol = open_protocol("code_block", tokenizer(chatml))
    assert protocol.decode(protocol.encode(QUESTION)) == (
        f"<|im_start|>user\n6 * 7?\n\n{CODE_BLOCK_INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert QUESTION == [{"role": "user", "content": "6 * 7?"}], "the problem itself is left alone"
    with pytest.raises(DataError, match="without a user message"):
        protocol.encode([{"role": "system", "content": "x"}])


def test_variables_of_the_template_count_behind_every_turn():
    protocol = open_protocol("template", tokenizer("qwen3"), chat_template_kwargs={"enable_thinking": False})
    assert protocol.decode(protocol.reply_ids(protocol.reply_messages(["1"]), True)).endswith("<think>\n\n</think>\n\n")


def test_long_results_keep_head_and_tail():
    protocol = open_protocol(None, tiny_tokenizer())
    assert protocol.shorten("abcdefgh", 8) == "abcdefgh"
    assert protocol.shorten("abcdefghijkl", 5) == "abc\n[... 7 tokens left out ...]\nkl"
    assert protocol.shorten("abc", 0) == "\n[... 3 tokens left out ...]\n"
