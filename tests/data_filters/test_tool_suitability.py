import pytest
from filter_tables import dropped_ids, row, run_filter, table, write_jsonl

from afterglow.core.errors import DataError, RecipeError
from afterglow.core.recipe import Section, build, read_recipe
from afterglow.data_filters import chain, tool_suitability
from afterglow.data_filters.tool_suitability import NOT_MEASURED, ToolSuitabilityConfig

ANSWERED = [{"role": "assistant", "content": "\\boxed{4}"}]


def samples(problem, tool, text, n=8, calls=2, failed=0):
    """n samples of each mode, of which `tool` and `text` are right; None is not gradable."""
    rows = []
    for mode, right in (("tool", tool), ("text", text)):
        for i in range(n):
            extra = (
                {"tools": [{}], "n_calls": calls + failed, "n_failed": failed} if mode == "tool" else {"tools": None}
            )
            rows.append({"problem_id": problem, "completion": ANSWERED, "correct": i < right} | extra)
    return rows


def run(tmp_path, rows, found, **config):
    file = write_jsonl(tmp_path / "samples.jsonl", found)
    result = run_filter(tool_suitability, rows, ToolSuitabilityConfig(str(file), **config), tmp_path)
    return dropped_ids(rows, result), result


def problems(names):
    return [row(f"{name}-{i}", problem_id=name) for name in names for i in range(2)]


def test_problems_where_tools_help_stay(tmp_path):
    found = [
        *samples("helps", tool=6, text=4),  # gain 2/8, just enough
        *samples("little", tool=5, text=4),  # gain 1/8
        *samples("rescued", tool=3, text=2),  # gain 1/8, but hard without
        *samples("hurts", tool=2, text=8),
        *samples("never", tool=0, text=0),
        *samples("idle", tool=8, text=0, calls=1),
        *samples("failing", tool=8, text=0, calls=1, failed=1),  # two calls, one of them in vain
        *samples("few", tool=7, text=0, n=7),
    ]
    names = ["helps", "little", "rescued", "hurts", "never", "idle", "failing", "few", "unknown"]
    gone, result = run(tmp_path, problems(names), found)
    reasons = {name.partition("-")[0]: reason for name, reason in gone.items()}
    assert reasons == {
        "little": "tools do not help enough",
        "hurts": "tools hurt",
        "never": "never solved",
        "idle": "solved almost without calls",
        "failing": "solved almost without calls",
        "few": "fewer than 8 graded samples of a mode",
        "unknown": NOT_MEASURED,
    }
    assert len(gone) == 14, "both rows of a problem go"
    by_problem = dict(zip(names, list(zip(*result.scores.values(), strict=True))[::2], strict=True))
    assert by_problem["helps"] == (0.75, 0.5, 2.0) and by_problem["unknown"] == (None, None, None)
    assert result.report["problems"]["helped"] == 2 and result.report["problems_not_measured"] == 1
    assert sum(result.report["gain_histogram"]["counts"]["all problems"]) == 8


def test_problems_with_variance_stay(tmp_path):
    found = [*samples("some", 1, 0), *samples("all", 8, 0), *samples("none", 0, 8)]
    gone, _ = run(tmp_path, problems(["some", "all", "none"]), found, keep="varied")
    assert {name.partition("-")[0]: reason for name, reason in gone.items()} == {
        "all": "always solved with tools",
        "none": "never solved with tools",
    }


def test_samples_that_are_not_gradable_count_nowhere(tmp_path):
    found = samples("p", tool=4, text=0, n=9)
    found[0]["correct"] = None  # a right one of those with tools: 3 of 8 are left
    _, result = run(tmp_path, problems(["p"]), found)
    assert result.scores["accuracy_tool"] == [3 / 8, 3 / 8]


def test_calls_are_counted_from_the_messages_where_no_count_is_given(tmp_path):
    called = [{"role": "assistant", "content": "", "tool_calls": [{}]}, {"role": "tool", "content": "4"}]
    found = samples("p", tool=8, text=0)
    for sample in found[:8]:
        del sample["n_calls"], sample["n_failed"]
        sample["completion"] = called * 3 + ANSWERED
    _, result = run(tmp_path, problems(["p"]), found)
    assert result.scores["calls_when_right"] == [3.0, 3.0] and not result.dropped


def test_a_row_whose_calls_mostly_fail_goes(tmp_path):
    """Failed shares 1/2, 2/3, none without calls, and nothing counted."""
    counts = {"half": (4, 2), "most": (3, 2), "none": (0, 0), "null": (None, None)}
    data = table([row(name, problem_id="p") for name in counts])
    for i, column in enumerate(("n_calls", "n_failed")):
        data = data.add_column(column, [of[i] for of in counts.values()])
    gone, _ = run(tmp_path, data, samples("p", tool=8, text=0))
    assert gone == {"most": "more than 50% of its calls failed"}
    assert run(tmp_path, data, samples("p", tool=8, text=0), max_failed=1.0)[0] == {}


def test_two_files_are_read_as_one(tmp_path):
    found = samples("p", tool=8, text=0)
    files = [str(write_jsonl(tmp_path / f"{i}.jsonl", part)) for i, part in enumerate((found[:8], found[8:]))]
    assert not run_filter(tool_suitability, problems(["p"]), ToolSuitabilityConfig(files), tmp_path).dropped


def test_what_is_no_evaluation_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no `correct`.*samples\.jsonl"):
        run(tmp_path, problems(["p"]), [{"problem_id": "p", "completion": ANSWERED}])
    with pytest.raises(DataError, match=r"no problem of .* is in the data .*'q' there and 'p' here"):
        run(tmp_path, problems(["p"]), samples("q", 8, 0))
    with pytest.raises(DataError, match="no such file"):
        run_filter(tool_suitability, problems(["p"]), ToolSuitabilityConfig(str(tmp_path / "gone.jsonl")), tmp_path)


def test_a_missing_evaluation_is_missed_before_the_first_step(tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [row("a", correct=True)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {data}\noutput_dir: {tmp_path / 'run'}\nsteps:\n  - length\n"
        f"  - tool_suitability: {{samples: {tmp_path / 'gone.jsonl'}}}\n"
    )
    with pytest.raises(DataError, match="no such file"):
        chain.run(read_recipe(str(recipe)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("values, message", [({"min_gain": 25}, "from 0 to 1"), ({"min_samples": 0}, "at least 1")])
def test_a_wrong_recipe_is_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        build(Section({"samples": "x.jsonl"} | values), ToolSuitabilityConfig)
