import json

import pytest

from afterglow.core.benchmark_files import benchmark_names
from afterglow.core.errors import DataError, RecipeError
from afterglow.eval.tasks import Task, find_task, load_tasks

SETS = [
    "aime24", "aime25", "aime26", "amc23", "bbh", "beyondaime", "cmimc_2025", "gpqa_diamond", "gsm8k", "headqa",
    "hmmt_feb_2025", "hmmt_feb_2026", "livecodebench", "math500", "minerva", "mmlu", "mmlu_pro", "olympiadbench",
    "svamp",
]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problems(tmp_path, answers=("4", "6")):
    rows = [{"problem": f"Compute {i}+{i}.", "answer": answer, "key": i} for i, answer in enumerate(answers)]
    return write(tmp_path / "sums.jsonl", rows)


def test_every_benchmark_of_the_package_is_sound():
    assert benchmark_names() == SETS
    for name in SETS:
        task, made_of = find_task(name)
        assert task.name == name and made_of[0].endswith(f"{name}.yaml") and made_of[1] == task.data
        assert task.source and task.pitfalls and task.sampling().temperature == 0.6
        assert ("```python" if task.grader == "code" else "\\boxed{}") in task.prompt_template


def test_a_file_of_problems_is_a_task(tmp_path):
    (task,), made_of = load_tasks(
        [problems(tmp_path)], {"columns": {"prompt": "problem", "problem_id": "key"}, "n": 3, "top_p": None}
    )
    assert (task.name, task.n, task.top_p) == ("sums", 3, 0.95)
    assert made_of == {"sums": [task.data]}
    first = task.load_problems()[0]
    assert first.problem_id == "0" and first.answer == "4"
    assert first.prompt[0]["content"].startswith("Compute 0+0.\nPlease reason step by step")


def test_a_task_file_of_ones_own(tmp_path):
    (tmp_path / "sums.yaml").write_text(
        f"name: mine\nversion: 3\ndata: {problems(tmp_path, ('so #### 4', 'no #### 5 #### 6', '?'))}\n"
        "columns: {prompt: problem, problem_id: key}\nanswer_after: '####'\nsystem_prompt: Be brief.\n"
        "exclude: {'2': has no answer}\ntemperature: 1e-1\n"
    )
    (task,), _ = load_tasks([str(tmp_path / "sums.yaml")], {})
    loaded = task.load_problems()
    assert [problem.answer for problem in loaded] == ["4", "6"], "what follows the last mark; row 3 is excluded"
    assert loaded[0].prompt[0] == {"role": "system", "content": "Be brief."} and task.temperature == 0.1


def test_several_answers_of_one_problem_are_joined(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "Roots?", "answer": ["1", "-1"]}])
    assert Task("t", path).load_problems()[0].answer == "1, -1"


def test_golds_that_nothing_can_be_graded_against_are_refused_with_their_place(tmp_path):
    path = problems(tmp_path, ("4", "$t(0,4]$", " "))
    task = Task("sums", path, columns={"prompt": "problem", "problem_id": "key"})
    with pytest.raises(DataError, match=r"sums.jsonl \(task sums\): 2 problem\(s\) cannot be scored:") as error:
        task.load_problems()
    assert "problem '1': answer '$t(0,4]$': gold cannot be parsed" in str(error.value)
    assert "problem '2': answer ' ': gold is empty" in str(error.value)
    assert len(task.load_problems(graded=False)) == 3, "sampling alone needs no gold"


def test_a_missing_column_a_missing_file_and_a_repeated_problem(tmp_path):
    with pytest.raises(DataError, match=r"sums.jsonl:1: .*prompt"):
        Task("sums", problems(tmp_path)).load_problems()
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file. Check `data` of task sums"):
        Task("sums", "nowhere.jsonl").load_problems()
    twice = write(tmp_path / "twice.jsonl", [{"prompt": "1+1?", "answer": "2", "id": i} for i in "ab"])
    with pytest.raises(DataError, match=r"row 2: problem .* stands twice"):
        Task("t", twice).load_problems()


def test_wrong_names_and_values(tmp_path):
    with pytest.raises(RecipeError, match=r"'gsm8' is neither a benchmark .*Did you mean gsm8k\?"):
        load_tasks(["gsm8"], {})
    with pytest.raises(RecipeError, match=r"two tasks are called 'gsm8k'"):
        load_tasks(["gsm8k", "gsm8k"], {})
    with pytest.raises(RecipeError, match=r"temperature 0 makes all samples the same"):
        load_tasks(["gsm8k"], {"temperature": 0.0})
    with pytest.raises(RecipeError, match=r"`grader`|kind"):
        load_tasks(["gsm8k"], {"grader": "regex"})
    (tmp_path / "t.yaml").write_text("name: t\ndata: x.jsonl\npromt_template: '{problem}'\n")
    with pytest.raises(RecipeError, match=r"t.yaml:3: unknown key `promt_template`. Did you mean `prompt_template`\?"):
        load_tasks([str(tmp_path / "t.yaml")], {})


# ---------------------------------------------------------------------------------------------------------------------
# choices


@pytest.mark.parametrize(
    ("row", "keys", "letter"),
    [
        ({"answer": 2, "choices": ["x", "y", "z"]}, {"choices": ["choices"], "answer_index": 0}, "C"),  # MMLU
        ({"answer": "B", "options": ["x", "B.", "z"]}, {"choices": ["options"]}, "B"),  # MMLU-Pro
        ({"answer": "right", "w1": "a", "w2": "b"}, {"choices": ["answer", "w1", "w2"]}, "A"),  # GPQA, not shuffled
        (
            {"answer": 2, "answers": [{"aid": 1, "atext": "x"}, {"aid": 2, "atext": "y"}]},
            {"choices": ["answers"], "answer_index": 1},
            "B",
        ),  # HEAD-QA
        ({"answer": "3", "choices": {"text": ["5", "3"], "label": ["A", "B"]}}, {"choices": ["choices"]}, "B"),  # ARC
    ],
)
def test_choices_of_every_known_shape(tmp_path, row, keys, letter):
    path = write(tmp_path / "mc.jsonl", [{"prompt": "Which?", **row}])
    (problem,) = Task("mc", path, grader="choice", system_prompt="Hi.", **keys).load_problems()
    assert problem.answer == letter
    asked = problem.prompt[-1]["content"]
    assert asked.startswith("Which?\n\nA. ") and f"\n{letter}. " in asked and "\\boxed{}" in asked
    assert problem.prompt[0]["role"] == "system"


def test_shuffled_choices_depend_on_the_question_only(tmp_path):
    rows = [{"prompt": f"Which is {i}?", "answer": "right", "w1": "a", "w2": "b", "w3": "c"} for i in range(40)]
    task = Task("mc", write(tmp_path / "mc.jsonl", rows), grader="choice", choices=["answer", "w1", "w2", "w3"],
                shuffle_choices=True)  # fmt: skip
    first, again = task.load_problems(), task.load_problems()
    assert first == again
    assert {problem.answer for problem in first} == set("ABCD")
    assert all(f"{problem.answer}. right" in problem.prompt[-1]["content"] for problem in first)


def test_wrong_choices_are_refused_with_their_place(tmp_path):
    rows = [
        {"id": "a", "prompt": "?", "answer": 4, "choices": ["x", "y"]},
        {"id": "b", "prompt": "??", "answer": 0, "choices": ["x"]},
        {"id": "c", "prompt": "???", "answer": 0, "choices": "xy"},
    ]
    keys = {"columns": {"problem_id": "id"}, "grader": "choice", "answer_index": 0}
    with pytest.raises(DataError) as error:
        Task("mc", write(tmp_path / "mc.jsonl", rows), choices=["choices"], **keys).load_problems()
    for fault in (
        "problem 'a': answer '4' is none of the 2 choices", "problem 'b': 1 choices; there must be 2 to 10",
        "problem 'c': the column of `choices` holds no list: 'xy'",
    ):  # fmt: skip
        assert fault in str(error.value)
    with pytest.raises(DataError, match="no column 'options' \\(named by `choices`\\)"):
        Task("mc", write(tmp_path / "mc.jsonl", rows[:1]), choices=["options"], **keys).load_problems()
    with pytest.raises(RecipeError, match="say `grader: choice`"):
        Task("mc", "mc.jsonl", choices=["choices"])


def test_several_subsets_are_one_task(tmp_path, monkeypatch):

    def hub(name, subset, split):
        class Table(list):
            pass

        table = Table({"prompt": f"{subset} {i}?", "answer": str(i), "n": i} for i in range(2))
        table.split = split
        return table

    monkeypatch.setattr("afterglow.core.row_sources.load_dataset", hub)
    task = Task("bbh", "someone/bbh", subset=["sums", "words"], columns={"problem_id": "n"})
    assert [problem.problem_id for problem in task.load_problems()] == ["sums/0", "sums/1", "words/0", "words/1"]
