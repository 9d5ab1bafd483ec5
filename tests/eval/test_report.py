import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import yaml
from stub_engine import StubEngine

from afterglow.core.errors import RunFolderError
from afterglow.core.recipe import read_recipe
from afterglow.core.run_folder import RunFolder
from afterglow.eval import evaluate
from afterglow.eval.report import run_report
from afterglow.eval.report_heat_map import heat_map
from afterglow.eval.report_ledger import describe_ledger, most_regressed, stagnating
from afterglow.eval.report_results import _Entry, _headlines, _pairs, find_histograms
from afterglow.eval.report_samples import TaskSamples, examples, kind_of, mark_answer

VOID = {"meta", "br", "hr", "img", "link", "input"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    """A pipeline's folder: evaluation, filter, training, evaluation; with text that would break a careless page."""
    root = tmp_path_factory.mktemp("pipeline") / "runs"
    root.mkdir()
    rows = [{"prompt": f"<script>alert({i})</script> & {i}+{4 - i}?", "answer": "4"} for i in range(8)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(("eval_base", "eval_glow")):
        keys = {"model": str(tiny_folder), "tasks": [str(root / "sums.jsonl")], "n": 4, "seed": seed}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(keys | {"output_dir": str(root / name)}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "open_engine", StubEngine)
            evaluate.run(read_recipe(root / f"{name}.yaml"))
    write_filter(root / "filter")
    write_training(root / "glow", root / "filter" / "kept.jsonl")
    stages = {"eval_base": {"seconds": 75.2, "peak_memory_gb": 1.5}}
    (root / "stages.json").write_text(json.dumps({"stages": stages}))
    return root


def write_filter(path):
    histogram = {"edges": [0, 0.5, 1], "counts": {"terse": [3, 1], "wordy <b>": [0, 4]}}
    step = {
        "step": "branching", "rows_in": 8, "kept": 6, "dropped": 2, "reasons": {"among the most branching 25%": 2},
        "by_source": {"terse": {"rows_in": 4, "kept": 4}, "wordy <b>": {"rows_in": 4, "kept": 2}},
        "report": {"histogram": histogram, "length": {"edges": [0, 1, 2], "pool": [5, 3], "kept": [4, 2]}},
    }  # fmt: skip
    with RunFolder.open(path, "filter", {"output_dir": str(path)}) as run:
        (path / "steps.json").write_text(json.dumps({"rows_in": 8, "kept": 6, "dropped": 2, "steps": [step]}))
        kept = [
            {"id": f"t{i}", "correct": i % 2 == 0, "source": "terse" if i < 3 else "wordy",
             "prompt": f"<i>{i}</i>?",
             "completion": f"chain {i}", "answer": "4"} for i in range(6)
        ]  # fmt: skip
        (path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        run.finish({"kept": 6})


def write_training(path, data):
    with RunFolder.open(path, "train", {"data": str(data), "output_dir": str(path)}) as run:
        losses = np.linspace(2, 0.1, 18, dtype="float32").reshape(6, 3)
        losses[0, 2] = np.nan
        losses[2, 2] = losses[2, 1] + 0.5
        table = pd.DataFrame(losses, columns=["epoch_1", "epoch_2", "epoch_3"])
        table.insert(0, "id", [f"t{i}" for i in range(6)])
        table["weight"] = np.linspace(0.5, 1.5, 6, dtype="float32")
        (path / "checkpoint-9").mkdir()
        table.to_parquet(path / "checkpoint-9" / "loss_ledger.parquet")
        log = run.log("metrics.jsonl")
        for step in (1, 2, 3):
            log.append({"step": step, "loss": 2 / step, "glow/weight_mean": 1.0, "grad_norm": 0.5, "reward": step / 4})
        log.close()
        run.finish({"train_loss": 1.25, "steps": 3})


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what the page refers to and says."""

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.tags, self.said = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


@pytest.fixture(scope="module")
def page(folder):
    return Page(run_report(folder).read_text())


def test_the_page_stands_alone(folder, page):
    text = (folder / "report.html").read_text()
    assert all(reference.startswith("#") for reference in page.references), "nothing is loaded"
    assert "script" not in page.tags and "url(http" not in text and "@import" not in text
    assert "&lt;script&gt;alert(" in text, "what models and data say is text"
    assert "width=device-width" in text and "prefers-color-scheme: dark" in text


def test_figures_are_sound_and_follow_the_page(folder, page):
    text = (folder / "report.html").read_text()
    drawn = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    labels = [re.search(r'aria-label="([^"]*)"', svg)[1] for svg in drawn]
    assert labels == [
        "pass@k", "how often each problem is solved", "each problem", "tokens: eval_base", "tokens: eval_glow",
        "rows of filter, step by step", "branching", "branching, length", "loss", "weights", "gradient norm",
        "reward", "loss of each sample", "gain in the last epoch, nats", "gain in the last epoch, nats, by source",
        "weight in the last epoch", "weight in the last epoch, by source",
        "samples that do not learn",
    ]  # fmt: skip
    ids = []
    for svg in drawn:
        ElementTree.fromstring(svg)
        assert "var(--s" in svg and not re.search(r"#0[123]0[01]0[0-9a-f]\b", svg)
        ids += set(re.findall(r'id="([^"]+)"', svg))
    assert len(ids) == len(set(ids)), "no figure borrows from another"


def test_what_the_page_says(folder, page):
    said = " ".join(" ".join(page.said).split())
    scores = json.loads((folder / "eval_glow" / "scores.json").read_text())["sums"]
    assert f"{100 * scores['pass@4']['value']:.1f}" in said and "pass@1" in said and "maj@4" in said
    assert "eval_base → eval_glow" in said and "paired over 8 problems" in said
    assert "filter: 6 of 8 rows kept" in said and "2 among the most branching 25%" in said
    assert "right (3)" in said and "wrong (3)" in said, "the ledger is split by the labels of the training set"
    assert "1 min 15 s" in said and "train loss 1.25" in said
    assert "most regressed : the loss rose most" in said and "chain 2" in said and "weight 0.9" in said
    assert said.count("no boxed answer") >= 2 and "read as" in said and "torch 2." in said and "commit" in said


def test_regressed_and_stagnating_samples_by_hand():
    nan = np.nan
    losses = np.array(
        [[1.0, 0.9, 1.4], [2.0, 1.0, 1.1], [3.0, 2.9, 2.8], [3.0, 2.0, 1.9], [nan, nan, nan], [1.0, 0.5, 0.1]],
        "float32",
    )
    assert most_regressed(losses) == [0, 1], "by 0.5 and by 0.1; who fell is not there"
    assert most_regressed(losses, 1) == [0] and most_regressed(losses[:, :1]) == []
    assert stagnating(losses) == [2, 3], "the hardest quarter begins at 1.9: they fell by 7% and by 37%"
    assert stagnating(losses[:, :1]) == [] and stagnating(losses[4:5]) == []


def test_a_ledger_without_its_data_is_still_drawn(folder, tmp_path):
    write_training(tmp_path / "glow", tmp_path / "gone.jsonl")
    found = describe_ledger(tmp_path / "glow")
    assert [group["kind"] for group in found["notable"]] == ["most regressed", "stagnating"]
    sample = found["notable"][0]["samples"][0]
    assert (sample["id"], sample["label"], sample["problem"]) == ("t2", "not graded", None)
    assert len(found["figures"]) == 4, "no sources, no labels"
    assert "no longer where they were" in run_report(tmp_path).read_text()


def test_one_evaluation_alone(folder):
    text = run_report(folder / "eval_base").read_text()
    assert Page(text) and "eval_base" in text and "paired over" not in text and "Filters" not in text


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="no run folder in it or below"):
        run_report(tmp_path)


def test_histograms_are_found_at_any_depth_and_large_groups_are_kept():
    counts = {f"g{i}": [i, i] for i in range(12)}
    report = {"a": [{"histogram": {"edges": [0, 1, 2], "counts": counts}}], "b": {"edges": [], "counts": {}}}
    ((where, edges, shown),) = find_histograms(report)
    assert (where, edges) == (", a", [0, 1, 2])
    assert list(shown)[:2] == ["g11", "g10"] and shown["5 others"] == [10, 10]
    assert list(find_histograms({"edges": [0, 1], "counts": [4]})) == [("", [0, 1], {"rows": [4]})]


def test_the_heat_map_has_a_cell_for_each_problem_hardest_first():
    runs = {"a": {"easy": (4, 4), "<hard>": (0, 4), "mid": (1, 4)}, "b": {"easy": (4, 4), "<hard>": (2, 4)}}
    svg = ElementTree.fromstring(heat_map("each problem", runs))
    cells = [rect for rect in svg.iter("{http://www.w3.org/2000/svg}rect") if len(rect)]
    tips = [cell[0].text for cell in cells]
    assert tips == ["<hard>: 0 of 4", "mid: 1 of 4", "easy: 4 of 4", "<hard>: 2 of 4", "easy: 4 of 4"]
    assert [cell.get("fill-opacity") for cell in cells] == [None, "0.39", "1.00", "0.59", "1.00"]
    assert cells[0].get("x") == cells[3].get("x") and cells[2].get("x") == cells[4].get("x"), "columns are problems"
    many = heat_map("m", {"a": {f"p{i:04}": (i, 1000) for i in range(1000)}})
    assert many.count("<title>") == 300 and "300 of 1,000 problems" in many and ">p0000: 0 of" in many


def test_the_graded_answer_is_marked_where_it_stands():
    assert mark_answer("7? No: \\boxed{7}. So 7 it is", "7") == ("7? No: \\boxed{", "7", "}. So 7 it is")
    assert mark_answer("17 or 7, not 77", "7") == ("17 or ", "7", ", not 77")
    assert mark_answer("one half", "1/2") == ("one half", "", "") == mark_answer("one half", None)


def row(**changes):
    said = [{"role": "assistant", "content": "<think>hm</think>\nIt is \\boxed{4}."}]
    return {
        "id": "x", "problem_id": "p", "prompt": [{"role": "user", "content": "2+2?"}], "completion": said,
        "answer": "4", "correct": True, "finish_reason": "stop", "extracted": "4", "n_tokens": 9, "sample_index": 3,
    } | changes  # fmt: skip


def test_samples_to_read_fold_reasoning_and_show_calls():
    samples = TaskSamples()
    call = {"type": "function", "function": {"name": "python", "arguments": {"code": "2+2"}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "First 2. " * 60 + "\nSo \\boxed{4}."},
    ]  # fmt: skip
    for index, of in enumerate((row(), row(completion=turns, n_calls=1, first_call_position=5), row(correct=None))):
        samples.add(of | {"id": f"x{index}"})
    plain, unclear = [
        next(found for found in examples(samples) if found["kind"] == kind) for kind in ("right", "no verdict")
    ]
    by_length = sorted(
        (found for found in examples(samples) if found["kind"] == "right"), key=lambda f: len(f["turns"])
    )
    (turn,), (first, result, last) = (found["turns"] for found in by_length)
    assert (turn["thought"], turn["before"], turn["answer"], turn["after"]) == ("hm", "It is \\boxed{", "4", "}.")
    assert first["calls"] == ["2+2"] and result["answer"] == "" and result["role"] == "tool"
    assert last["thought"].startswith("First 2.") and last["before"] == "So \\boxed{" and last["answer"] == "4"
    assert plain["gold"] == "4" and unclear["tokens"] == 9
    assert samples.calls["right"] == [1] and samples.first_calls["right"] == [5] and samples.tokens["no verdict"] == [9]


def test_kinds_of_samples():
    assert kind_of(row(finish_reason="length")) == "right", "cut off after its answer"
    assert (
        kind_of(row(correct=None, finish_reason="length"))
        == "cut off"
        == kind_of(row(correct=False, finish_reason="length"))
    )
    assert kind_of(row(correct=False)) == "wrong" and kind_of(row(correct=None, finish_reason=None)) == "no verdict"


def test_the_page_opens_with_what_training_did_in_every_mode():
    def entry(run, mode, right):
        return _Entry(run, mode, {}, [{"problem_id": "p", "n": 4, "correct": right}], None)

    first, tooled, later, later_tooled = (entry(run, mode, 1) for run in ("sft", "rlvr") for mode in ("none", "python"))
    pairs = list(_pairs([first, tooled, later, later_tooled]))
    changes = [{"first": one.name, "second": two.name, "rows": [1]} for one, two in pairs]
    shown = [(found["first"], found["second"]) for found in _headlines(pairs, changes)]
    assert shown == [("sft", "rlvr"), ("sft +python", "rlvr +python")]
    alone = list(_pairs([first, tooled]))
    (only,) = _headlines(alone, [{"first": one.name, "second": two.name, "rows": [1]} for one, two in alone])
    assert (only["first"], only["second"]) == ("sft", "sft +python")
    assert _headlines([], []) == [] == _headlines(alone, [{"rows": []}])
