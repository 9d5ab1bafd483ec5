"""lm-eval's tasks on our engines. What needs lm-eval itself runs where it is installed (`afterglow[lm-eval]`)."""

import json
import math
import sys

import pytest
import torch
import yaml

from afterglow.core.engine_transformers import TransformersEngine
from afterglow.core.errors import DataError, GenerationError, MissingDependencyError, RecipeError
from afterglow.core.generation import EngineConfig, SamplingConfig
from afterglow.core.recipe import read_recipe
from afterglow.core.run_folder import JsonlLog
from afterglow.eval import evaluate
from afterglow.eval.lm_eval_bridge import (
    ANSWERS_FILE,
    RESULTS_FILE,
    Answers,
    HarnessTasks,
    harness_scores,
    harness_table,
    sampling_of,
)


@pytest.fixture(scope="module")
def engine(tiny_folder):
    with TransformersEngine(EngineConfig(model=str(tiny_folder), dtype="float32")) as found:
        yield found


def test_log_likelihoods_are_those_of_a_forward_pass(engine, tmp_path):
    pairs = [([5, 6, 7], [8, 9]), ([5], [6]), (list(range(4, 20)), [21, 22, 23])]
    found = Answers(engine, JsonlLog(tmp_path / "log.jsonl")).log_likelihoods(pairs)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        with torch.no_grad():
            logprobs = engine.model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        at = range(len(context) - 1, len(context) + len(continuation) - 1)
        wanted = sum(logprobs[i, token].item() for i, token in zip(at, continuation, strict=True))
        assert math.isclose(value, wanted, rel_tol=1e-5)
        assert greedy == all(logprobs[i].argmax() == token for i, token in zip(at, continuation, strict=True))


def test_a_context_too_long_loses_its_beginning(engine, tmp_path):
    answers = Answers(engine, JsonlLog(tmp_path / "log.jsonl"))
    context = [5 + i % 20 for i in range(engine.max_context + 50)]
    (whole,) = answers.log_likelihoods([(context, [7, 8])])
    (cut,) = answers.log_likelihoods([(context[-(engine.max_context - 3) :], [7, 8])])
    assert whole == cut
    assert isinstance(answers.texts([(context, SamplingConfig(temperature=0, max_tokens=3))])[0], str)


def test_answers_are_kept_and_a_question_asked_twice_has_two(engine, tmp_path, monkeypatch):
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_tokens=8)
    asked = [([5, 6], sampling), ([5, 6], sampling), ([7], sampling)]
    first = Answers(engine, JsonlLog(tmp_path / "log.jsonl")).texts(asked)
    assert first[0] != first[1]
    lines = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines[:2]))  # killed before the third
    drawn = []
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda requests: drawn.extend(requests) or generate(requests))
    assert Answers(engine, JsonlLog(tmp_path / "log.jsonl")).texts(asked) == first
    assert len(drawn) == 1


def test_settings_of_lm_eval_become_ours():
    given = {"until": ["\n", ""], "max_gen_toks": 32, "do_sample": False, "temperature": 0.0, "num_beams": 1}
    assert sampling_of(given) == SamplingConfig(temperature=0, top_p=1, max_tokens=32, stop=["\n"])
    given = {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}
    assert sampling_of(given) == SamplingConfig(temperature=0.8, top_p=0.9, max_tokens=9)
    with pytest.raises(RecipeError, match="repetition_penalty, which no engine"):
        sampling_of(given | {"repetition_penalty": 1.2})


def test_a_server_tells_no_log_likelihoods(engine, tmp_path):
    from scripted import ScriptedEngine

    with pytest.raises(GenerationError, match="need `engine: vllm` or `engine: transformers`"):
        Answers(ScriptedEngine(str), JsonlLog(tmp_path / "log.jsonl")).log_likelihoods([([1], [2])])


def sample(doc, metrics, **more):
    return {"doc_id": doc, "metrics": list(metrics), **metrics, **more}


def test_results_become_scores(tmp_path):
    """Documents right by 3 of 4; of two filters the first; a task without right and wrong has no pass@1."""
    several = {
        "results": {
            "quiz": {"alias": "quiz", "acc,none": 0.75, "acc_stderr,none": 0.25, "sample_len": 4},
            "essay": {"bleu,none": 12.5, "bleu_stderr,none": "N/A"},
        },
        "versions": {"quiz": 2},
    }
    quiz = [sample(i, {"ppl": 3.5, "acc": float(i > 0)}, filter="strict") for i in range(4)]
    quiz += [sample(i, {"ppl": 3.5, "acc": 0.0}, filter="flexible") for i in range(4)]
    essay = [sample(0, {"bleu": 12.5})]
    found = {"quiz": several | {"samples": {"quiz": quiz}}, "essay": several | {"samples": {"essay": essay}}}
    (tmp_path / RESULTS_FILE).write_text(json.dumps(found))
    scores, rows = harness_scores(tmp_path)
    assert list(scores) == ["lm_eval:quiz"]
    of = scores["lm_eval:quiz"]
    assert (of["pass@1"]["value"], of["n_problems"], of["version"], of["lm_eval"]) == (0.75, 4, 2, "acc")
    assert [(row["problem_id"], row["correct"]) for row in rows] == [
        ("quiz/0", 0), ("quiz/1", 1), ("quiz/2", 1), ("quiz/3", 1)
    ]  # fmt: skip
    table = list(harness_table(tmp_path))[:2]
    assert table == [("quiz", "acc,none", 0.75, 0.25), ("essay", "bleu,none", 12.5, None)]


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'afterglow\[lm-eval\]'"):
        HarnessTasks(["arc_easy"], {})


def test_only_evaluations_take_them(tmp_path, tiny_folder):
    recipe = tmp_path / "sample.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(tiny_folder), "tasks": ["lm_eval:x"], "output_dir": "o"}))
    with pytest.raises(RecipeError, match=r"lm_eval:x can be evaluated \(`afterglow eval`\), not sampled"):
        evaluate.run_sample(read_recipe(recipe))


# ---------------------------------------------------------------------------------------------------------------------
# with lm-eval


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """Two tasks of six rows each, one of choices and one of texts, beside a task of our own."""
    pytest.importorskip("lm_eval", reason="afterglow[lm-eval] is not installed")
    rows = [{"question": f"{i} + {i} =", "choices": [f" {2 * i}", f" {2 * i + 1}"], "gold": i % 2} for i in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test", "doc_to_text": "{{question}}", "metadata": {"version": 3},
    }  # fmt: skip
    choice = common | {
        "task": "sums_choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
    }  # fmt: skip
    text = common | {
        "task": "sums_text", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    for task in (choice, text):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}) + "\n")

    def write(name, **changes):
        harness = [f"lm_eval:{tmp_path / task}.yaml" for task in ("sums_choice", "sums_text")]
        values = {
            "model": str(tiny_folder), "engine": "transformers", "dtype": "float32", "output_dir": str(tmp_path / name),
            "tasks": [str(tmp_path / "own.jsonl"), *harness], "n": 1, "max_tokens": 8,
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values | changes))
        return read_recipe(tmp_path / f"{name}.yaml")

    return write


def test_a_local_task_agrees_with_lm_evals_own_model(recipe, tmp_path, tiny_folder, capsys):
    import lm_eval

    folder = evaluate.run(recipe("run"))
    shown = capsys.readouterr().out
    assert "sums_choice" in shown and "acc,none" in shown and "exact_match,none" in shown
    scores = json.loads((folder / "scores.json").read_text())
    ours = {
        task: found
        for of in json.loads((folder / RESULTS_FILE).read_text()).values()
        for task, found in of["samples"].items()
    }
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(tiny_folder), "dtype": "float32"}, device="cpu",
        tasks=[str(tmp_path / "sums_choice.yaml"), str(tmp_path / "sums_text.yaml")],
    )  # fmt: skip
    for one, other in zip(ours["sums_choice"], theirs["samples"]["sums_choice"], strict=True):
        assert one["acc"] == other["acc"]
        for (value, greedy), (their_value, their_greedy) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert math.isclose(value, float(their_value), rel_tol=1e-4) and greedy == bool(their_greedy)
    assert [row["exact_match"] for row in ours["sums_text"]] == [
        row["exact_match"] for row in theirs["samples"]["sums_text"]
    ]
    label = f"lm_eval:{tmp_path / 'sums_choice.yaml'}"
    assert scores[label]["pass@1"]["value"] == pytest.approx(theirs["results"]["sums_choice"]["acc,none"])
    assert scores[label]["version"] == 3 and "own" in scores


def test_a_killed_run_asks_only_what_is_missing(recipe, tmp_path, monkeypatch):
    whole = evaluate.run(recipe("whole"))
    folder = evaluate.run(recipe("killed"))
    lines = (folder / ANSWERS_FILE).read_text().splitlines(keepends=True)
    (folder / ANSWERS_FILE).write_text("".join(lines[:5]))
    for name in (RESULTS_FILE, "scores.json", "problems.jsonl"):
        (folder / name).unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    asked = []
    score = TransformersEngine.token_stats
    monkeypatch.setattr(TransformersEngine, "token_stats", lambda self, s: asked.extend(s) or score(self, s))
    evaluate.run(recipe("killed"))
    assert len(asked) == 12 - 5
    for name in ("scores.json", "problems.jsonl"):
        assert (folder / name).read_text() == (whole / name).read_text()


def test_tasks_that_are_not_there(recipe):
    with pytest.raises(RecipeError, match=r"no task 'arc_esy'.*Did you mean lm_eval:arc_easy\?"):
        evaluate.run(recipe("typo", tasks=["lm_eval:arc_esy"]))
    with pytest.raises(DataError, match="lm-eval could not load 'arc_easy'"):
        evaluate.run(recipe("offline", tasks=["lm_eval:arc_easy"]))
