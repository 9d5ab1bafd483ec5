import pytest

from afterglow.data_filters.reasoning_steps import reasoning_spans, reasoning_text, split_steps, step_spans, word_count


def said(content=None, **fields):
    return {"role": "assistant", "content": content, **fields}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ([said("<think>\nA thought.\n</think>\nThe answer.")], "A thought."),
        ([said("opened in the prompt </think> The answer.")], "opened in the prompt"),
        ([said("<think>cut off in the mid")], "cut off in the mid"),
        ([said("<think></think>The answer.")], ""),
        ([said("<think>\n \n</think>The answer.")], ""),
        ([said("No marks at all.")], "No marks at all."),
        ([said("The answer.", reasoning_content="Thought apart.")], "Thought apart."),
        ([said("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>4")], "Hm."),
        ([said("It’s that")], "It's that"),
        ([said("<think>one</think>call"), {"role": "tool", "content": "perhaps"}, said("done")], "one"),
        ([said("first"), {"role": "tool", "content": "perhaps"}, said("second")], "first\n\nsecond"),
        ([said(None, tool_calls=[{"function": {"name": "f"}}])], ""),
    ],
)
def test_reasoning_text(completion, expected):
    assert reasoning_text(completion) == expected


def test_words_are_counted_over_all_that_the_assistant_wrote():
    completion = [said("a b", reasoning_content="c d e"), {"role": "tool", "content": "x y"}, said("f")]
    assert word_count(completion) == 6


LONG = "This step is longer than thirty characters."


def test_paragraphs_are_cut_at_blank_lines_and_short_ones_join_the_step_before():
    text = f"Short start.\n\n{LONG}\n\n \nHm.\n\n{LONG} Two."
    assert split_steps(text) == [f"Short start.\n\n{LONG}\n\n \nHm.", f"{LONG} Two."]


def test_a_line_that_announces_a_step_begins_it():
    heading = "**Step 2: the long way round, twice**"
    text = f"{LONG}\n\nNo.\n\nAlternative plan:\n\n1. Attack a.\n\n{LONG}\n\n{heading}\n\n{LONG}"
    assert split_steps(text) == [
        f"{LONG}\n\nNo.",
        "Alternative plan:\n\n1. Attack a.",
        LONG,
        f"{heading}\n\n{LONG}",
    ]
    assert split_steps(f"## One\n\nTwo:\n\n{LONG}") == [f"## One\n\nTwo:\n\n{LONG}"]
    assert split_steps(f"{LONG}\n\nSo:") == [f"{LONG}\n\nSo:"], "nothing follows"


def test_spans_are_places_in_the_completion():
    completion = [said("<think>one</think>call"), {"role": "tool", "content": "x"}, said("done", reasoning="two")]
    spans = reasoning_spans(completion)
    assert [completion[s.message][s.key][s.start : s.end] for s in spans] == ["one", "two"]
    assert step_spans(f"  {LONG}\n\n{LONG} ") == [(2, 2 + len(LONG)), (4 + len(LONG), 4 + 2 * len(LONG))]


@pytest.mark.parametrize(
    "block",
    [
        "```python\nx = 1\n\n\ny = 2  # a comment that is long enough\n```",
        "$$\na = b + c + d + e + f + g + h\n\nb = 2\n$$",
        "\\[\na = b + c + d + e + f + g + h\n\nb = 2\n\\]",
        "\\begin{align*}\na = b + c + d + e + f \\\\[2pt]\n\nb = 2\n\\end{align*}",
    ],
)
@pytest.mark.parametrize("segmentation", ["paragraph", "sentence"])
def test_code_and_display_math_are_never_cut(block, segmentation):
    assert split_steps(f"{LONG}\n\n{block}\n\n{LONG}", segmentation) == [LONG, block, LONG]
    assert split_steps(block, segmentation) == [block]


@pytest.mark.parametrize("opener", ["```", "$$", "\\[", "\\begin{align}"])
def test_a_block_that_never_closes_swallows_nothing(opener):
    assert split_steps(f"{opener} {LONG}\n\n{LONG}") == [f"{opener} {LONG}", LONG]


def test_sentences_end_at_marks_and_lines_but_not_in_numbers():
    text = (
        'We have 3.5 apples in the first basket. "Do we have any more of them here?" So the sum is still 7.0 in the '
        "end\nA new line of thought begins here."
    )
    assert split_steps(text, "sentence") == [
        "We have 3.5 apples in the first basket.",
        '"Do we have any more of them here?"',
        "So the sum is still 7.0 in the end",
        "A new line of thought begins here.",
    ]


def test_lcot2tree_cuts_before_its_words_once_the_running_step_is_long():
    text = f"{LONG} Wait, no. Alternatively we could count them one by one. Hmm, {LONG}"
    assert split_steps(text, "lcot2tree") == [
        LONG,
        "Wait, no. Alternatively we could count them one by one.",
        f"Hmm, {LONG}",
    ]


@pytest.mark.parametrize("segmentation", ["paragraph", "sentence", "lcot2tree"])
def test_empty_and_blank_texts_have_no_steps(segmentation):
    assert split_steps("", segmentation) == []
    assert split_steps(" \n\n\t\n ", segmentation) == []
    assert split_steps("Hi.", segmentation) == ["Hi."]


@pytest.mark.parametrize("segmentation", ["paragraph", "sentence", "lcot2tree"])
@pytest.mark.parametrize(
    "unit", ["a\n\n", "\n", " ", ".", "!\n", "\\[", "$$", "```\n\n", "\\begin{a}", "Wait", "\\", "x. ", "\n \n", ".)"]
)
def test_a_hostile_text_is_cut_in_linear_time_and_loses_nothing(unit, segmentation):
    text = unit * (200_000 // len(unit))
    steps = split_steps(text, segmentation)
    assert "".join("".join(steps).split()) == "".join(text.split())
