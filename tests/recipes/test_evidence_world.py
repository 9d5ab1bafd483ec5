"""The data of the studies: what is held out is held out, and correctness is not style by another name."""

import json
from collections import Counter

from afterglow.core.answer_extraction import last_boxed
from afterglow.recipes.demo.world import WorldConfig, make_problems
from afterglow.recipes.evidence.world import SEEN, EvidenceConfig, make_world


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_held_out_is_held_out(tmp_path):
    config = EvidenceConfig(train_problems=40, heldout_seen=20, heldout_unseen=20)
    folder = make_world(tmp_path / "world", config)
    chains = rows(folder / "trajectories.jsonl")
    problems = {name: rows(folder / f"problems_{name}.jsonl") for name in ("seen", "unseen")}
    assert {row["family"] for row in problems["seen"]} <= set(SEEN)
    assert not {row["family"] for row in problems["unseen"]} & set(SEEN)
    assert all(len(of) == 20 for of in problems.values())
    asked = [{row["problem"] for row in of} for of in problems.values()] + [
        {row["prompt"][0]["content"] for row in chains}
    ]
    base = {problem.text for problem in make_problems(WorldConfig(heldout_id=0, heldout_ood=0))["pretrain"]}
    assert not asked[0] & asked[1] and not (asked[0] | asked[1]) & (asked[2] | base)
    assert not asked[2] & base and len(asked[2]) == 40
    assert {row["problem_id"].split("-")[0] for row in chains} <= set(SEEN)


def test_right_and_wrong_chains_come_in_the_same_styles(tmp_path):
    chains = rows(make_world(tmp_path / "world", EvidenceConfig()) / "trajectories.jsonl")
    right = Counter(row["source"] for row in chains if last_boxed(row["completion"][0]["content"]) == row["answer"])
    each = Counter(row["source"] for row in chains)
    assert set(each.values()) == {250} and set(each) == {"terse", "stepwise", "branching"}
    assert all(0.4 < right[style] / 250 < 0.6 for style in each)
    assert all(row["finish_reason"] == "stop" for row in chains)
