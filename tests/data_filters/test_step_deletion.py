import pytest
from filter_tables import row, run_filter, write_jsonl

from afterglow.core.errors import RecipeError
from afterglow.core.recipe import Section, build, read_recipe
from afterglow.core.trajectory import DataConfig, load_trajectories
from afterglow.data_filters import chain, step_deletion
from afterglow.data_filters.reasoning_steps import reasoning_text, split_steps
from afterglow.data_filters.step_deletion import StepDeletionConfig, delete_steps

STEPS = [f"This is the step number {i}, long enough." for i in range(10)]
ANSWER = "So the answer is \\boxed{4}, we are done."


def said(content, **fields):
    return [{"role": "assistant", "content": content, **fields}]


def test_a_tenth_of_the_steps_goes_and_the_rest_keeps_its_order():
    completion = said("<think>\n" + "\n\n".join(STEPS) + "\n</think>\n\n" + ANSWER)
    left, steps, gone = delete_steps(completion, "a", StepDeletionConfig(share=0.1), seed=0)
    assert (steps, gone) == (10, 1)
    after = split_steps(reasoning_text(left))
    assert len(after) == 9 and [step for step in STEPS if step in after] == after
    assert left[0]["content"].startswith("<think>\n") and left[0]["content"].endswith("</think>\n\n" + ANSWER)
    assert completion[0]["content"].count("step number") == 10, "the input is not changed"


@pytest.mark.parametrize("seed", range(5))
def test_the_answer_and_the_last_step_are_never_deleted(seed):
    early = [STEPS[0], ANSWER, STEPS[1], STEPS[2]]
    left, _, gone = delete_steps(said("\n\n".join(early)), "a", StepDeletionConfig(share=0.99), seed)
    assert split_steps(left[0]["content"]) == [ANSWER, STEPS[2]] and gone == 2


@pytest.mark.parametrize("content", ["", None, "4", "<think></think>4"])
def test_there_is_nothing_to_delete(content):
    completion = said(content)
    assert delete_steps(completion, "a", StepDeletionConfig(share=0.9), 0)[0] == completion


def test_short_chains_lose_their_share_on_average():
    text = "\n\n".join(STEPS[:3])
    gone = [delete_steps(said(text), f"row {i}", StepDeletionConfig(share=0.1), 0)[2] for i in range(2000)]
    assert set(gone) == {0, 1}
    assert 0.27 < sum(gone) / 2000 < 0.33, "0.1 of 3 steps; the draw is fixed by the ids"


def test_code_and_several_blocks():
    code = "```python\nx = 1\n\n\ny = 2  # long enough to be a step\n```"
    completion = [
        *said("call", reasoning_content="\n\n".join([STEPS[0], code])),
        {"role": "tool", "content": "2"},
        *said(f"<think>{STEPS[1]}</think>{ANSWER}"),
    ]
    left, steps, gone = delete_steps(completion, "a", StepDeletionConfig(share=0.99), 0)
    assert (steps, gone) == (3, 2)
    assert left[0]["reasoning_content"] == "" and left[0]["content"] == "call" and left[1:] == completion[1:]


def test_another_seed_is_another_draw_and_the_same_seed_the_same():
    completion, config = said("\n\n".join(STEPS)), StepDeletionConfig(share=0.3)
    draws = [str(delete_steps(completion, "a", config, seed)) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1] and len(set(draws)) > 1


def test_the_report_counts_what_went(tmp_path):
    rows = [row(f"{i}", "\n\n".join(STEPS), source="ab"[i % 2]) for i in range(4)] + [row("x", "4", source="b")]
    result = run_filter(step_deletion, rows, StepDeletionConfig(share=0.5), tmp_path)
    assert result.dropped == {} and result.scores["n_steps_deleted"] == [5, 5, 5, 5, 0]
    report = result.report
    assert (report["steps"], report["deleted"], report["rows_untouched"]) == (41, 20, 1)
    assert report["by_source"]["b"] == {"rows": 3, "mean_steps": 7.0, "mean_deleted": pytest.approx(10 / 3)}


def test_a_chain_trains_on_what_is_left(tmp_path):
    """Rows that an earlier step dropped keep their text, and tool calls survive."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    rows = [row("short", "4"), row("long", "\n\n".join(STEPS)), row("tool", [call, *said("\n\n".join(STEPS))])]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {data}\noutput_dir: {tmp_path / 'run'}\n"
        "steps:\n  - length: {min_words: 3}\n  - delete_steps: {share: 0.5}\n  - branching\n"
    )
    chain.run(read_recipe(str(recipe)))
    kept = load_trajectories(DataConfig(data=str(tmp_path / "run" / "kept.jsonl")))
    assert list(kept["id"]) == ["long", "tool"] and list(kept["n_steps"]) == [5, 5]
    assert kept[1]["completion"][0] == rows[2]["completion"][0]
    gone = load_trajectories(DataConfig(data=str(tmp_path / "run" / "dropped.jsonl")))
    assert gone[0]["completion"] == rows[0]["completion"]


@pytest.mark.parametrize("share", [0, 1, -0.1, 10])
def test_a_wrong_share_is_refused(share):
    with pytest.raises(RecipeError, match=r"r\.yaml:3: `share` must be above 0 and below 1"):
        build(Section({"share": float(share)}, {"share": "r.yaml:3"}, "r.yaml:2"), StepDeletionConfig)
