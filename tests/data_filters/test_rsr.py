import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import save_tiny, tiny_model, tiny_tokenizer

from afterglow.core.errors import DataError, ModelError, RecipeError
from afterglow.core.recipe import read_recipe
from afterglow.core.run_folder import JsonlLog
from afterglow.core.token_stats import ScoredSequence, TokenScorer, TokenStats, score_tokens
from afterglow.core.tool_protocol import TOOLS
from afterglow.core.trajectory import write_trajectories
from afterglow.data_filters import chain, scoring
from afterglow.data_filters.rank_surprisal import trajectory_rsr
from afterglow.data_filters.rsr import RSRConfig, apply, check


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Scores of other tests, and of the machine's user, are out of reach."""
    monkeypatch.setenv("AFTERGLOW_CACHE", str(tmp_path / "cache"))


def trajectories(problems=3):
    """Two teachers; the second repeats one word, which a student with a peaked head finds likely."""
    rows = []
    for p in range(problems):
        for source, text in (
            ("varied", f"Take {p}, add 7, so it is {p + 7}."),
            ("dull", "the the the the the " + "the " * p),
        ):
            rows.append(
                {
                    "id": f"{source}-{p}",
                    "problem_id": f"p{p}",
                    "prompt": [{"role": "user", "content": f"What is {p}+7?"}],
                    "completion": [{"role": "assistant", "content": text}],
                    "source": source,
                    "correct": source == "varied",
                }
            )
    return Dataset.from_list(rows)


def config(folder, **changes):
    return RSRConfig(**({"model": str(folder), "dtype": "float32", "token_budget": 128} | changes))


def test_apply_keeps_the_lowest_of_each_problem(tiny_folder, tmp_path):
    table = trajectories()
    result = apply(table, config(tiny_folder), seed=0, cache_folder=tmp_path)
    ratio = result.scores["rsr"]
    for p in range(3):
        low, high = sorted((2 * p, 2 * p + 1), key=lambda i: ratio[i])
        assert low not in result.dropped
        assert result.dropped[high] == f"rsr: {ratio[high]:.3f}, while another of its problem has {ratio[low]:.3f}"
    text = table["completion"][0][0]["content"]
    assert result.scores["rsr_tokens"][0] == len(tiny_tokenizer()(text)["input_ids"])
    assert all(len(column) == len(table) for column in result.scores.values())


def test_scores_equal_a_plain_computation(tiny_folder, tmp_path):
    result = apply(trajectories(), config(tiny_folder, r_max=120), seed=0, cache_folder=tmp_path)
    tokenizer, model = tiny_tokenizer(), tiny_model().eval()
    for i, row in enumerate(trajectories()):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt + "<think>\n\n</think>\n\n")["input_ids"])
        ids = tokenizer(prompt + "<think>\n\n</think>\n\n" + row["completion"][0]["content"], return_tensors="pt")[
            "input_ids"
        ]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, start - 1 : -1].float()
        target = ids[0, start:, None]
        rank = 1 + (logits > logits.gather(1, target)).sum(1)
        surprisal = -logits.log_softmax(-1).gather(1, target)
        assert result.scores["rsr"][i] == pytest.approx((rank.clamp(max=120).sum() / surprisal.sum()).item(), rel=1e-5)


def test_only_what_the_model_wrote_is_scored_in_a_row_with_tools(tiny_folder, tmp_path):
    """The tools block and the tool's answer, however long, are context: neither counts as a token, both are read."""
    call = {"type": "function", "function": {"name": "python", "arguments": {"code": "6*7"}}}

    def row(key, output):
        completion = [
            {"role": "assistant", "content": "<think>\nlong\n</think>", "tool_calls": [call]},
            {"role": "tool", "content": output},
            {"role": "assistant", "content": "It is 42."},
        ]
        return {"id": key, "problem_id": key, "prompt": [{"role": "user", "content": "6*7?"}], "source": "t",
                "completion": completion, "correct": True, "tools": TOOLS}  # fmt: skip

    table = Dataset.from_list([row("short", "42\n"), row("long", "42 " * 50)], on_mixed_types="use_json")
    scores = apply(table, config(tiny_folder, select="none"), seed=0, cache_folder=tmp_path).scores
    call_text = '<tool_call>\n{"name": "python", "arguments": {"code": "6*7"}}\n</tool_call>'
    thought = "<think>\nlong\n</think>\n\n"
    written = len(tiny_tokenizer()(f"{thought}{call_text}It is 42.")["input_ids"])
    assert scores["rsr_tokens"] == [written, written]
    assert scores["rsr"][0] != scores["rsr"][1]


def test_bf16_scores_are_within_a_thousandth_of_full_logits(tmp_path):
    """Same weights in bf16, a vocabulary of several slices, against the logits that the model itself returns."""
    model = tiny_model(vocab_size=9000)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model = model.bfloat16().eval()
    ids = torch.randint(9000, (4, 200), generator=torch.Generator().manual_seed(0))
    asked = [ScoredSequence(i, row.tolist(), [False] + [True] * 199) for i, row in enumerate(ids)]
    given = {key: trajectory_rsr(stats, r_max=10_000).rsr for key, stats in score_tokens(model, asked)}
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].float()
    target = ids[:, 1:, None]
    rank = 1 + (logits > logits.gather(2, target)).sum(2)
    surprisal = -logits.log_softmax(-1).gather(2, target)[..., 0]
    assert [given[i] for i in range(4)] == pytest.approx((rank.sum(1) / surprisal.sum(1)).tolist(), rel=1e-3)


def test_report(tiny_folder, tmp_path):
    table = trajectories()
    result = apply(table, config(tiny_folder), seed=0, cache_folder=tmp_path)
    report = json.loads(json.dumps(result.report, allow_nan=False))
    assert {t["source"] for t in report["teachers"]} == {"varied", "dull"}
    assert report["teachers"][0]["rsr"] < report["teachers"][1]["rsr"]
    assert sum(t["kept"] for t in report["teachers"]) == report["kept"]["rows"] == 3
    assert sum(report["histogram"]["pool"]) == report["pool"]["rows"] == 6
    assert sum(report["histogram"]["kept"]) == 3
    assert report["pool"]["accuracy"] == 0.5
    kept = [i for i in range(6) if i not in result.dropped]
    assert report["kept"]["accuracy"] == np.mean([table["correct"][i] for i in kept])


def test_reasons(tiny_folder, tmp_path):
    table = trajectories()
    tokens = apply(table, config(tiny_folder), seed=0, cache_folder=tmp_path).scores["rsr_tokens"]
    short = config(tiny_folder, min_tokens=max(tokens), select="none")
    result = apply(table, short, seed=0, cache_folder=tmp_path)
    assert set(result.dropped) == {i for i, n in enumerate(tokens) if n < max(tokens)}
    assert result.dropped[1] == f"rsr: {tokens[1]} scored tokens, fewer than {max(tokens)}"
    cut = config(tiny_folder, max_length=64, drop_truncated=True, select="none")
    result = apply(table, cut, seed=0, cache_folder=tmp_path)
    assert {i for i, cut in enumerate(result.scores["rsr_truncated"]) if cut} == set(result.dropped) == {0, 2, 4, 5}
    assert result.dropped[0] == "rsr: longer than 64 tokens"
    none = apply(table, config(tiny_folder, max_length=20), seed=0, cache_folder=tmp_path)
    assert none.dropped[0] == "rsr: 0 scored tokens, fewer than 1" and none.scores["rsr"] == [None] * 6
    json.dumps(none.report, allow_nan=False)


def test_finished_scores_are_not_made_again(tiny_folder, tmp_path, monkeypatch):
    table = trajectories()
    whole = apply(table, config(tiny_folder), seed=0, cache_folder=tmp_path)
    monkeypatch.setattr(scoring, "_load_model", lambda share: pytest.fail("the model was loaded again"))
    again = apply(table, config(tiny_folder, select="none"), seed=0, cache_folder=tmp_path)
    assert again.scores == whole.scores and not again.dropped


def cached_lines(folder):
    return [json.loads(line) for file in folder.glob("*/*.jsonl") for line in file.read_text().splitlines()]


@pytest.mark.parametrize("left", [1, 3, 5])
def test_an_interrupted_call_is_continued(tiny_folder, tmp_path, monkeypatch, left):
    """In bf16 a score depends on its batch in the last bits: the batches of the first call are repeated."""
    table = trajectories()

    def asked(name):
        return config(tiny_folder, dtype="bfloat16", score_cache=str(tmp_path / name))

    whole = apply(table, asked("whole"), seed=0, cache_folder=tmp_path / "a")
    append, appended = JsonlLog.append, []

    def interrupted(log, row):
        if len(appended) == left:
            raise KeyboardInterrupt
        appended.append(row)
        append(log, row)

    with monkeypatch.context() as patch:
        patch.setattr(JsonlLog, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            apply(table, asked("cut"), seed=0, cache_folder=tmp_path / "b")
    (file,) = (tmp_path / "cut").glob("*/*.jsonl")
    with open(file, "a") as out:
        out.write('{"key": "cut off in the mid')
    assert apply(table, asked("cut"), seed=0, cache_folder=tmp_path / "b") == whole
    assert len(cached_lines(tmp_path / "cut")) == 6


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_rsr import apply, config, trajectories
print("ready", flush=True)
asked = config({model!r}, token_budget=1, score_cache={cache!r})
apply(trajectories(40), asked, seed=0, cache_folder=Path({cache!r} + "-work"))
"""


def test_kill_and_resume(tiny_folder, tmp_path):
    cache = tmp_path / "killed"
    tests = str(Path(__file__).parent)
    script = KILLED.format(tests=tests, model=str(tiny_folder), cache=str(cache))
    paths = os.pathsep.join([tests, str(Path(tests).parent)])
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if sum(file.read_bytes().count(b"\n") for file in cache.glob("*/*.jsonl")) >= 5:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    process.wait()
    (file,) = cache.glob("*/*.jsonl")
    before = file.read_text().count("\n")
    assert process.returncode == -signal.SIGKILL and 5 <= before < 80
    asked = config(tiny_folder, token_budget=1, score_cache=str(cache))
    resumed = apply(trajectories(40), asked, seed=0, cache_folder=tmp_path / "killed-work")
    other = config(tiny_folder, token_budget=1, score_cache=str(tmp_path / "whole"))
    assert resumed == apply(trajectories(40), other, seed=0, cache_folder=tmp_path / "whole-work")
    assert len(cached_lines(cache)) == 80  # nothing was scored twice


def test_progress_reaches_its_total(tiny_folder, tmp_path):
    seen = {}

    @contextmanager
    def progress(description, total):
        class Bar:
            def advance(self, steps=1, note=""):
                seen["done"] = seen.get("done", 0) + steps

        seen["total"] = total
        yield Bar()

    apply(trajectories(), config(tiny_folder), seed=0, cache_folder=tmp_path, progress=progress)
    assert seen["done"] == seen["total"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# teachers and students


def test_best_teacher_is_chosen_by_a_sample(tiny_folder, tmp_path):
    table = trajectories(12)
    whole = apply(table, config(tiny_folder, select="none"), seed=0, cache_folder=tmp_path / "whole")
    asked = config(tiny_folder, select="best_teacher", teacher_sample=4, score_cache=str(tmp_path / "own"))
    result = apply(table, asked, seed=0, cache_folder=tmp_path / "sample")
    scored = [i for i, ratio in enumerate(result.scores["rsr"]) if ratio is not None]
    assert [table["source"][i] for i in scored].count("dull") == 4 and len(scored) == 8
    assert all(result.scores["rsr"][i] == pytest.approx(whole.scores["rsr"][i], rel=1e-5) for i in scored)
    best, other = result.report["teachers"]
    assert {i for i, source in enumerate(table["source"]) if source == other["source"]} == set(result.dropped)
    reason = f"rsr: teacher {other['source']} has {other['rsr']:.3f}, while {best['source']} has {best['rsr']:.3f}"
    assert set(result.dropped.values()) == {reason}
    assert best["n"] == 4 and best["kept"] == 12 and result.report["rows_scored"] == 8
    assert best["low"] <= best["rsr"] <= best["high"] and best["best_share"] > 0.5 > other["best_share"]
    assert apply(table, asked, seed=1, cache_folder=tmp_path / "other").scores["rsr"] != result.scores["rsr"]


def test_best_teacher_needs_two(tiny_folder, tmp_path):
    one = trajectories().filter(lambda row: row["source"] == "dull")
    with pytest.raises(DataError, match="names one only"):
        check(one, config(tiny_folder, select="best_teacher"), set())
    empty = config(tiny_folder, select="best_teacher", max_length=20)
    with pytest.raises(DataError, match="no teacher has a trajectory with a ratio"):
        apply(trajectories(), empty, seed=0, cache_folder=tmp_path)


def test_several_students_in_one_run(tiny_folder, tmp_path):
    second = save_tiny(tmp_path / "second", seed=5)
    asked = config(tiny_folder, more_students=[str(second)])
    result = apply(trajectories(), asked, seed=0, cache_folder=tmp_path / "both")
    alone = [
        apply(trajectories(), config(folder), seed=0, cache_folder=tmp_path / f"{i}")
        for i, folder in enumerate((tiny_folder, second))
    ]
    assert result.scores["rsr"] == alone[0].scores["rsr"] != alone[1].scores["rsr"]
    assert result.scores["rsr_for_second"] == alone[1].scores["rsr"]
    assert result.dropped == alone[0].dropped
    other = result.report["more_students"][str(second)]["teachers"]
    assert [t["rsr"] for t in other] == [t["rsr"] for t in alone[1].report["teachers"]]
    assert alone[1].report["scored_now"] == 0  # one run scored under both
    with pytest.raises(RecipeError, match="different names"):
        config(tiny_folder, more_students=[str(tmp_path / "elsewhere" / tiny_folder.name)])


def test_baselines_equal_a_plain_computation(tiny_folder, tmp_path):
    text = "One is 1. Two is 2! Is 3 next? So it is.\nThen 4 comes.\nAnd 5 ends."
    row = trajectories(1)[0] | {"completion": [{"role": "assistant", "content": text}]}
    asked = config(tiny_folder, select="none", baselines=True)
    scores = apply(Dataset.from_list([row]), asked, seed=0, cache_folder=tmp_path).scores
    tokenizer, model = tiny_tokenizer(), tiny_model().eval()

    @torch.no_grad()
    def log_p(context, own):
        ids = tokenizer(context + own, return_tensors="pt")["input_ids"]
        first = max(1, len(tokenizer(context)["input_ids"]) if context else 0)
        return model(input_ids=ids).logits[0, first - 1 : -1].float().log_softmax(-1), ids[0, first:]

    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    log_q, target = log_p(prompt + "<think>\n\n</think>\n\n", text)
    own = log_q.gather(1, target[:, None])
    assert scores["rsr_entropy"][0] == pytest.approx(-(log_q.exp() * log_q).sum(-1).mean().item(), rel=1e-4)
    assert scores["rsr_mean_rank"][0] == pytest.approx((1 + (log_q > own).sum(1)).double().mean().item())
    sentences = ["One is 1. ", "Two is 2! ", "Is 3 next? ", "So it is.\n", "Then 4 comes.\n", "And 5 ends."]
    nll = [
        -log_q[torch.arange(len(target)), target]
        for i, sentence in enumerate(sentences)
        for log_q, target in [log_p("".join(sentences[max(0, i - 4) : i]), sentence)]
    ]
    assert scores["rsr_local_surprisal"][0] == pytest.approx(torch.cat(nll).mean().item(), rel=1e-5)
    assert scores["rsr_limo"] == [0.0]


def test_teacher_table_has_what_users_compare(tiny_folder, tmp_path):
    table = trajectories().add_column("branch_ratio", [0.5, 0.1] * 3)
    asked = config(tiny_folder, baselines=True, select="none")
    result = apply(table, asked, seed=0, cache_folder=tmp_path)
    for entry in result.report["teachers"]:
        rows = [i for i, source in enumerate(table["source"]) if source == entry["source"]]
        for title, column in (
            ("mean_rank", "rsr_mean_rank"), ("entropy", "rsr_entropy"), ("local_surprisal", "rsr_local_surprisal"),
            ("limo", "rsr_limo"), ("mean_tokens", "rsr_tokens"),
        ):  # fmt: skip
            assert entry[title] == pytest.approx(np.mean([result.scores[column][i] for i in rows]))
        assert entry["branch_ratio"] == pytest.approx(0.5 if entry["source"] == "varied" else 0.1)
        assert entry["accuracy"] == (1 if entry["source"] == "varied" else 0)


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def test_bad_configurations():
    for wrong in ({"r_max": 0}, {"token_budget": 0}, {"select": "best"}, {"dtype": "int8"}, {"min_tokens": 0}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            RSRConfig(model="m", **wrong)
    with pytest.warns(UserWarning, match="0.86 to 0.70"):
        RSRConfig(model="m", r_max=50)
    with warnings.catch_warnings(action="error"):
        RSRConfig(model="m")


def test_every_field_has_help():
    assert all(field.metadata["help"] for field in RSRConfig.__dataclass_fields__.values())


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match=r"cannot load `model: .*nowhere`"):
        apply(trajectories(), config(tmp_path / "nowhere"), seed=0, cache_folder=tmp_path)


def test_a_model_without_chat_template(tmp_path):
    folder = save_tiny(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        apply(trajectories(), config(folder), seed=0, cache_folder=tmp_path)


def test_a_trajectory_that_cannot_be_rendered_is_named(tmp_path):
    folder = save_tiny(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system message') }}")
    with pytest.raises(DataError, match=r"trajectory varied-0: .*no system message"):
        check(trajectories(), config(folder), set())
    with pytest.raises(DataError, match=r"reads none of 6 trajectories: .*no system message"):
        apply(trajectories(), config(folder), seed=0, cache_folder=tmp_path)


def test_a_chain_checks_the_student_before_its_first_step(tiny_folder, tmp_path):
    """A missing model, or one without template or weights, is known before an earlier step has written anything."""
    write_trajectories(trajectories(), tmp_path / "rows.jsonl")
    bare, light = save_tiny(tmp_path / "bare"), save_tiny(tmp_path / "light")
    (bare / "chat_template.jinja").unlink()
    (light / "model.safetensors").unlink()
    for model, message in (("nowhere", "cannot load"), (bare, "no chat template"), (light, "holds no weights")):
        recipe = tmp_path / "recipe.yaml"
        text = (
            f"data: {tmp_path}/rows.jsonl\noutput_dir: {tmp_path}/run\nsteps: [length, {{rsr: {{model: {model}}}}}]\n"
        )
        recipe.write_text(text)
        with pytest.raises(ModelError, match=message):
            chain.run(read_recipe(recipe))
        assert not (tmp_path / "run").exists()


def test_settings_that_exclude_each_other():
    for wrong, message in (
        ({"backend": "vllm", "baselines": True}, "`baselines` needs `backend: transformers`"),
        ({"backend": "vllm", "num_processes": 2}, "`num_processes` needs `backend: transformers`"),
        ({"select": "best_teacher", "drop_truncated": True}, "scores a sample only"),
        ({"teacher_sample": 1}, "at least 2"),
        ({"backend": "sglang"}, "transformers, vllm"),
    ):
        with pytest.raises(RecipeError, match=message):
            RSRConfig(model="m", **wrong)


def test_a_template_without_assistant_markers_is_scored_by_position(tmp_path):
    """The template writes the contents only; no header or end says where the answer stands."""
    folder = save_tiny(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    table = trajectories()
    scores = apply(table, config(folder, select="none"), seed=0, cache_folder=tmp_path).scores
    written = [len(tiny_tokenizer()(row["completion"][0]["content"].rstrip())["input_ids"]) for row in table]
    assert scores["rsr_tokens"] == written


def test_one_row_that_the_template_refuses_is_dropped_and_the_others_are_scored(tmp_path):
    folder = save_tiny(tmp_path / "model")
    template = folder / "chat_template.jinja"
    refuse = "{% for m in messages %}{{ '' if m.content else raise_exception('nothing said') }}{% endfor %}"
    template.write_text(refuse + template.read_text())
    rows = [*trajectories()]
    rows[3]["completion"] = [{"role": "assistant", "content": ""}]
    result = apply(Dataset.from_list(rows), config(folder, select="none"), seed=0, cache_folder=tmp_path)
    assert result.dropped == {3: "rsr: not scored: the chat template refuses the messages: nothing said"}
    assert [i for i, ratio in enumerate(result.scores["rsr"]) if ratio is None] == [3]
    assert result.report["pool"]["invalid"] == 1
    json.dumps(result.report, allow_nan=False)


def test_empty_answers_are_dropped(tiny_folder, tmp_path):
    rows = [*trajectories(1)]
    rows[0]["completion"] = [{"role": "assistant", "content": ""}]
    result = apply(Dataset.from_list(rows), config(tiny_folder), seed=0, cache_folder=tmp_path)
    assert result.dropped == {0: "rsr: 0 scored tokens, fewer than 1"}


def scored_as(monkeypatch, change):
    """Let the forward pass give every row the statistics that `change` makes of its own."""
    true_score = TokenScorer.score
    monkeypatch.setattr(
        TokenScorer,
        "score",
        lambda self, sequences, done=(): ((key, change(stats)) for key, stats in true_score(self, sequences, done)),
    )


@pytest.mark.parametrize(
    "value, reason",
    [(math.nan, "the student's logits are NaN"), (math.inf, "a token of probability zero"), (1e-5, "memorised")],
)
def test_rows_without_a_ratio_are_dropped_and_said_so(tiny_folder, tmp_path, monkeypatch, value, reason):
    """The longest rows overflow, or are known by heart: they are dropped, and a second run from the cache agrees."""

    def change(stats):
        return TokenStats(torch.full_like(stats.nll, value), stats.rank) if len(stats.nll) > 26 else stats

    scored_as(monkeypatch, change)
    results = [
        apply(trajectories(), config(tiny_folder, select="none"), seed=0, cache_folder=tmp_path / name)
        for name in ("first", "cached")
    ]
    assert results[1].report["scored_now"] == 0 and results[0].dropped == results[1].dropped
    long = [i for i, n in enumerate(results[0].scores["rsr_tokens"]) if n > 26]
    assert 0 < len(long) < 6 and sorted(results[0].dropped) == long
    assert all(reason in results[0].dropped[i] for i in long)
    assert all(results[0].scores["rsr"][i] is None for i in long)
    assert results[0].report["pool"]["invalid"] == len(long)
    for result in results:
        json.dumps(result.report, allow_nan=False)


def test_a_student_whose_logits_are_all_nan_is_refused(tmp_path):
    model = tiny_model()
    folder = save_tiny(tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match="NaN"):
        apply(trajectories(), config(folder), seed=0, cache_folder=tmp_path)


def test_rows_longer_than_the_students_context_are_flagged(tmp_path):
    folder = save_tiny(tmp_path / "model", max_position_embeddings=64)
    result = apply(trajectories(), config(folder, select="none"), seed=0, cache_folder=tmp_path)
    cut = [i for i, flag in enumerate(result.scores["rsr_truncated"]) if flag]
    assert cut == [0, 2, 4, 5] and not result.dropped
    assert (result.report["max_length"], result.report["truncated"]) == (64, 4)


def test_problems_with_one_candidate_or_only_wrong_ones_keep_their_lowest(tiny_folder, tmp_path):
    rows = [row | {"correct": row["problem_id"] != "p1" and row["correct"]} for row in trajectories()]
    rows = [row for row in rows if row["id"] != "dull-0"]
    result = apply(Dataset.from_list(rows), config(tiny_folder), seed=0, cache_folder=tmp_path)
    kept = {rows[i]["problem_id"] for i in range(len(rows)) if i not in result.dropped}
    assert kept == {"p0", "p1", "p2"} and 0 not in result.dropped
    assert result.report["problems"] == {"all": 3, "kept": 3, "kept_with_one_candidate": 1, "kept_with_all_wrong": 1}
