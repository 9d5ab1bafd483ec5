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
from scipy.stats import spearmanr
from tiny import save_tiny, tiny_model, tiny_tokenizer

from afterglow.core.errors import DataError, ModelError, RecipeError
from afterglow.core.token_stats import ScoredSequence, TokenStats, score_tokens
from afterglow.core.tool_protocol import TOOLS
from afterglow.core.vocabulary_pass import VocabularyHead, token_statistics
from afterglow.data_filters import rsr
from afterglow.data_filters.rsr import (
    RSRConfig,
    RSRScore,
    apply,
    dataset_rsr,
    rank_teachers,
    select_per_problem,
    trajectory_rsr,
)


def stats(nll, rank):
    return TokenStats(torch.tensor(nll), torch.tensor(rank, dtype=torch.int32))


# ---------------------------------------------------------------------------------------------------------------------
# mathematics


def test_trajectory_by_hand():
    score = trajectory_rsr(stats([0.5, 1.5, 4.0], [1, 3, 250]))
    assert score == RSRScore(3, 104 / 3, 2.0)
    assert score.rsr == pytest.approx(104 / 6)
    assert trajectory_rsr(stats([0.5, 1.5, 4.0], [1, 3, 250]), r_max=1000).rsr == pytest.approx(254 / 6)


def test_dataset_is_the_ratio_of_means_of_averages():
    a, b = trajectory_rsr(stats([1.0], [2])), trajectory_rsr(stats([3.0, 3.0, 3.0], [3, 3, 3]))
    of = dataset_rsr([a, b])
    assert of.rsr == pytest.approx((2 + 3) / (1 + 3))  # pooled over tokens it would be 11 / 10
    assert of.simple_mean == pytest.approx((2 / 1 + 3 / 3) / 2)
    assert (of.n, of.n_invalid) == (2, 0)


def test_degenerate_trajectories_are_invalid_and_counted():
    empty, memorised = trajectory_rsr(stats([], [])), trajectory_rsr(stats([1e-4, 2e-4], [1, 1]))
    impossible = trajectory_rsr(stats([math.inf, 1.0], [9, 1]))
    good = RSRScore(4, 2.0, 1.0)
    assert empty.invalid == "no scored tokens"
    assert "memorised" in memorised.invalid and "probability zero" in impossible.invalid
    assert all(math.isnan(score.rsr) for score in (empty, memorised, impossible))
    assert dataset_rsr([empty, good, memorised]).n_invalid == 2
    assert dataset_rsr([empty, good]).rsr == 2.0
    assert math.isnan(dataset_rsr([empty]).rsr)


# arXiv 2601.14249, Table 27: Qwen2.5-7B as the student of eleven teachers, R1 ... Qwen3-4B.
RANK = [2.477, 2.416, 4.557, 1.842, 2.280, 2.264, 1.710, 5.189, 3.921, 1.869, 2.198]
SURPRISAL = [0.825, 0.799, 1.236, 0.597, 0.820, 0.767, 0.553, 1.356, 1.131, 0.647, 0.748]
RSR = [3.002, 3.023, 3.686, 3.086, 2.779, 2.951, 3.091, 3.827, 3.468, 2.888, 2.940]
RESULT = [47.3, 45.0, 40.7, 48.3, 52.0, 50.0, 47.6, 42.7, 35.2, 52.0, 51.8]


def test_published_ratios():
    given = [dataset_rsr([RSRScore(1, r, s)]).rsr for r, s in zip(RANK, SURPRISAL, strict=True)]
    assert given == pytest.approx(RSR, abs=0.003)
    assert spearmanr(given, RESULT).statistic == pytest.approx(-0.888, abs=0.05)


def test_published_ranking_of_teachers():
    ranked = rank_teachers({f"{i:02}": [RSRScore(1, RANK[i], SURPRISAL[i])] for i in range(11)})
    assert [name for name, _ in ranked[:2]] == ["04", "09"]  # QwQ-32B, then Qwen3-8B
    assert ranked[-1][0] == "07"  # GPT-OSS-20B


def test_teachers_without_a_ratio_come_last_and_ties_go_by_name():
    good, bad = [RSRScore(1, 2.0, 1.0)], [RSRScore(0, math.nan, math.nan)]
    assert [name for name, _ in rank_teachers({"a": bad, "z": good, "b": good})] == ["b", "z", "a"]


def test_published_simulation():
    """Section 3.3 and Table 3: a student that mixes two Zipf(2.3) modes over 50 tokens, 1,000,000 to 250,000.

    The paper samples; these are the expectations. Where its modes lie among the tokens is not printed: here the minor
    one starts at token 15, and the misaligned data's, of which nothing is said, at 6, near the printed value.
    """
    zipf = np.arange(1, 51) ** -2.3
    zipf /= zipf.sum()
    minor, misaligned = np.roll(zipf, 15), np.roll(zipf, 6)
    student = 0.8 * zipf + 0.2 * minor
    head = VocabularyHead(torch.tensor(np.log(student), dtype=torch.float32)[:, None])
    nll, rank, *_ = token_statistics(torch.ones(50, 1), torch.arange(50), head)
    ratio, surprisal, rank = (rank / nll).double().numpy(), nll.double().numpy(), rank.double().numpy()
    data = {"major": zipf, "minor": minor, "misaligned": misaligned, "mixed": student}
    printed = {"major": 1.69, "minor": 1.30, "misaligned": 2.23, "mixed": 1.62}
    assert {name: p @ ratio for name, p in data.items()} == pytest.approx(printed, abs=0.05)
    assert [zipf @ surprisal, minor @ surprisal, student @ surprisal] == pytest.approx([1.38, 2.73, 1.67], abs=0.03)
    assert [zipf @ rank, minor @ rank, student @ rank] == pytest.approx([2.49, 4.31, 2.93], abs=0.1)


def test_select_per_problem():
    problems = ["p", "p", "q", "q", "q", "r", "s"]
    teachers = ["b", "a", "b", "a", "a", "a", None]
    ids = ["1", "2", "3", "5", "4", "6", "7"]
    ratios = [2.0, 2.5, 1.0, 1.0, 1.0, None, math.nan]
    # q: three ties, the teacher a, then the id 4; r and s have no candidate
    assert select_per_problem(problems, teachers, ids, ratios) == [0, 4]
    order = [6, 5, 4, 3, 2, 1, 0]
    shuffled = select_per_problem(*([column[i] for i in order] for column in (problems, teachers, ids, ratios)))
    assert {order[i] for i in shuffled} == {0, 4}


# ---------------------------------------------------------------------------------------------------------------------
# the filter


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
    monkeypatch.setattr(rsr, "_load", lambda config: pytest.fail("the model was loaded again"))
    again = apply(table, config(tiny_folder, select="none"), seed=0, cache_folder=tmp_path)
    assert again.scores == whole.scores and not again.dropped


@pytest.mark.parametrize("left", [1, 3, 5])
def test_a_cut_off_file_is_continued(tiny_folder, tmp_path, left):
    table, asked = trajectories(), config(tiny_folder, dtype="bfloat16")
    whole = apply(table, asked, seed=0, cache_folder=tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:left]) + lines[left][:-7])
    resumed = apply(table, asked, seed=0, cache_folder=tmp_path)
    assert resumed == whole
    assert sorted(file.read_text().splitlines()) == sorted(line.strip() for line in lines)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_rsr import apply, config, trajectories
print("ready", flush=True)
apply(trajectories(40), config({model!r}, token_budget=1), seed=0, cache_folder=Path({cache!r}))
"""


def test_kill_and_resume(tiny_folder, tmp_path):
    cache = tmp_path / "killed"
    tests = str(Path(__file__).parent)
    script = KILLED.format(tests=tests, model=str(tiny_folder), cache=str(cache))
    paths = os.pathsep.join([tests, str(Path(tests).parent)])
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if sum(file.read_bytes().count(b"\n") for file in cache.glob("*.jsonl")) >= 5:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    process.wait()
    (file,) = cache.glob("*.jsonl")
    before = file.read_text().count("\n")
    assert process.returncode == -signal.SIGKILL and 5 <= before < 80
    asked = config(tiny_folder, token_budget=1)
    resumed = apply(trajectories(40), asked, seed=0, cache_folder=cache)
    assert resumed == apply(trajectories(40), asked, seed=0, cache_folder=tmp_path / "whole")
    assert file.read_text().count("\n") == 80  # nothing was scored twice


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
        apply(trajectories(), config(folder), seed=0, cache_folder=tmp_path)
