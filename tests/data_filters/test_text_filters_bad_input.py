"""The table "What happens to bad input" of docs/methods/text_filters.md; the rows that a single filter has stand in its
own tests."""

import json

import pytest
from filter_tables import row, write_jsonl

from afterglow.core.errors import DataError
from afterglow.core.recipe import read_recipe
from afterglow.data_filters.chain import run

STEPS = ["format", "length: {max_words: 50}", "decontamination: {benchmarks: [BENCH]}", "deduplication"]


def recipe(folder, *files, **keys):
    bench = write_jsonl(folder / "bench.jsonl", [{"problem": "What is 5+5?"}, {"problem": "?!"}])
    lines = "".join(f"  - {step.replace('BENCH', str(bench))}\n" for step in STEPS)
    named = [str(write_jsonl(folder / f"{n}.jsonl", rows)) for n, rows in enumerate(files)]
    path = folder / "recipe.yaml"
    text = f"data: {json.dumps(named)}\noutput_dir: {folder / 'run'}\nsteps:\n{lines}"
    path.write_text(text + "".join(f"{key}: {value}\n" for key, value in keys.items()))
    return read_recipe(path)


def outcome(folder):
    kept, dropped = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("kept.jsonl", "dropped.jsonl")
    )
    return {r["id"] for r in kept}, {r["id"]: (r["dropped_by"], r["reason"]) for r in dropped}


def test_every_odd_row_has_its_outcome(tmp_path):
    system_only = [{"role": "system", "content": "What is 5+5?"}]
    rows = [
        row("alone", "It is 4."),
        row("no user turn", "It is 10, of course.", prompt=system_only, problem_id="s"),
        row("no word asked", "What?", prompt="?!", problem_id="w"),
        row("in the benchmark", "It is ten.", prompt="What is  5+5", problem_id="b"),
        row("null reasoning", [{"role": "assistant", "content": "Four.", "reasoning_content": None}]),
        row("cut", "It is", finish_reason="length"),
        row("failed", "It", finish_reason="error"),
        row("long", "word " * 51),
        row("signs", "?!", problem_id="q"),
        row("same signs", "!?", problem_id="q"),
    ]
    kept, dropped = outcome(run(recipe(tmp_path, rows)))
    assert dropped.pop("in the benchmark") == ("decontamination", "equals an item of bench.jsonl (item 0)")
    assert dropped.pop("cut") == ("format", "finish_reason is length")
    assert dropped.pop("failed") == ("format", "finish_reason is error")
    assert dropped.pop("long") == ("length", "more than 50 words")
    ((name, (step, reason)),) = dropped.items()
    assert step == "deduplication" and reason.startswith("exact duplicate (of ") and "signs" in name
    assert kept == {r["id"] for r in rows} - {"in the benchmark", "cut", "failed", "long", name}


def test_two_files_with_clashing_ids(tmp_path):
    rows = [row("a", "One."), row("b", "Two.")], [row("b", "Three."), row("c", "Four.")]
    with pytest.raises(DataError, match=r"1.jsonl:1: id 'b' stands at .*0.jsonl:2 already"):
        run(recipe(tmp_path, *rows))
    folder = run(recipe(tmp_path, *rows, drop_invalid="true"))
    assert outcome(folder) == ({"a", "b", "c"}, {})
    assert "1.jsonl:1: id 'b' stands at" in (folder / "invalid.txt").read_text()


def test_half_a_character(tmp_path):
    rows = [row("a", "One."), row("half", "It is \ud83d.")]
    with pytest.raises(DataError, match=r"0.jsonl:2: `completion\[0\].content` has half a character at position 6"):
        run(recipe(tmp_path, rows))
    assert outcome(run(recipe(tmp_path, rows, drop_invalid="true")))[0] == {"a"}


def test_an_empty_benchmark_stops_the_chain_before_its_first_step(tmp_path):
    section = recipe(tmp_path, [row("a", "One.")])
    (tmp_path / "bench.jsonl").write_text("")
    with pytest.raises(DataError, match=r"bench\.jsonl has no item"):
        run(section)
    assert not (tmp_path / "run").exists()
