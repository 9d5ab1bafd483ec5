import gzip
import json

import pytest
from datasets import Dataset

from afterglow.core.errors import DataError
from afterglow.core.fingerprint import fingerprint
from afterglow.core.trajectory import (
    DataConfig,
    completion_text,
    final_text,
    load_trajectories,
    trajectory_id,
    write_trajectories,
)


def write(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


ROW = {"prompt": "1+1?", "completion": "<think>easy</think>\\boxed{2}", "answer": 2, "source": "t"}


def test_plain_strings_become_messages_and_ids_are_stable(tmp_path):
    table = load_trajectories(DataConfig(data=write(tmp_path / "a.jsonl", [ROW, ROW | {"prompt": "2+2?"}])))
    assert table[0]["prompt"] == [{"role": "user", "content": "1+1?"}]
    assert table[0]["completion"] == [{"role": "assistant", "content": ROW["completion"]}]
    assert table[0]["answer"] == "2"
    again = load_trajectories(DataConfig(data=write(tmp_path / "b.jsonl.gz", [ROW | {"prompt": "2+2?"}, ROW])))
    assert table["id"] == list(reversed(again["id"]))
    assert table[0]["id"] == trajectory_id(table[0])


def test_a_list_of_answers_becomes_one_text(tmp_path):
    table = load_trajectories(DataConfig(data=write(tmp_path / "a.jsonl", [ROW | {"answer": ["1", 2]}])))
    assert table[0]["answer"] == "1, 2"


def test_gold_behind_a_mark(tmp_path):
    rows = [ROW | {"answer": "2 + 2 = 4\n#### 4 "}, ROW | {"answer": "5", "problem_id": "q"}]
    table = load_trajectories(DataConfig(data=write(tmp_path / "a.jsonl", rows), answer_after="####"))
    assert table["answer"][:] == ["4", "5"]


def test_repeated_samples_get_an_index_and_so_different_ids(tmp_path):
    table = load_trajectories(DataConfig(data=write(tmp_path / "a.jsonl", [ROW, ROW])))
    assert table["sample_index"] == [0, 1]
    assert len(set(table["id"])) == 2


def test_columns_problems_template_and_system_prompt(tmp_path):
    rows = [{"pid": 7, "response": "so 4", "gold": "4", "teacher": "x", "extra": 1.5}]
    problems = [{"id": "7", "question": "2+2?", "gold": "9"}]
    config = DataConfig(
        data=write(tmp_path / "a.jsonl", rows),
        columns={"problem_id": "pid", "completion": "response", "answer": "gold", "source": "teacher"},
        problems=write(tmp_path / "p.jsonl", problems),
        problem_columns={"problem_id": "id", "prompt": "question", "answer": "gold"},
        prompt_template="{problem}\nThink.",
        system_prompt="Be brief.",
    )
    row = load_trajectories(config)[0]
    assert [m["content"] for m in row["prompt"]] == ["Be brief.", "2+2?\nThink."]
    assert row["answer"] == "4", "the trajectory's own answer wins over the problem's"
    assert row["extra"] == 1.5


def test_messages_split_at_the_first_assistant_turn_and_tool_arguments_survive(tmp_path):
    call = {"type": "function", "function": {"name": "calc", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "run", "arguments": {"code": "x", "n": [1]}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [c]},
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": "done"},
            ]
        }
        for c in (call, other)
    ]
    path = write(tmp_path / "a.jsonl", rows)
    table = load_trajectories(DataConfig(data=path))
    assert table[0]["completion"][0]["tool_calls"] == [call], "no key of the other row's arguments leaks in"
    assert completion_text(table[0]["completion"]) == "\ndone" and final_text(table[0]["completion"]) == "done"
    for name in ("b.jsonl", "b.parquet"):
        copy = load_trajectories(DataConfig(data=str(write_trajectories(table, tmp_path / name))))
        assert copy.to_list() == table.to_list()


@pytest.mark.parametrize(
    "row, message",
    [
        ({"completion": "x"}, "no `prompt`"),
        ({"prompt": "x"}, "no `completion`"),
        (ROW | {"completion": "  "}, "empty completion"),
        (ROW | {"completion": [{"role": "robot", "content": "x"}]}, r"`completion\[0\]` needs a `role`"),
        (ROW | {"completion": "It is \ud83d."}, r"`completion\[0\].content` has half a character at position 6"),
        (ROW | {"completion": [{"role": "assistant", "content": 3}]}, r"`completion\[0\].content` must be text"),
        (ROW | {"finish_reason": "tired"}, "finish_reason 'tired' is none of"),
        (ROW | {"correct": "yes"}, "correct must be true, false or null"),
        (ROW | {"sample_index": 1.5}, "sample_index must be a whole number"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", [ROW, row])
    with pytest.raises(DataError, match=message) as error:
        load_trajectories(DataConfig(data=path))
    assert f"{path}:2" in str(error.value)
    left_out = []
    table = load_trajectories(DataConfig(data=path, drop_invalid=True), on_invalid=left_out.append)
    assert len(table) == 1 and len(left_out) == 1


def test_all_faults_come_at_once_and_long_lists_are_cut(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x"}] * 30)
    with pytest.raises(DataError, match=r"30 invalid row\(s\)") as error:
        load_trajectories(DataConfig(data=path))
    assert "... and 10 more" in str(error.value)


def test_duplicate_ids_name_both_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROW | {"id": "same"}, ROW | {"prompt": "other", "id": "same"}])
    with pytest.raises(DataError, match=r"a.jsonl:2: id 'same' stands at .*a.jsonl:1 already"):
        load_trajectories(DataConfig(data=path))


def test_malformed_files(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(ROW) + '\n{"prompt": \n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: not valid JSON"):
        load_trajectories(DataConfig(data=str(bad)))
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="must be a JSON object"):
        load_trajectories(DataConfig(data=str(tmp_path / "list.jsonl")))
    with pytest.raises(DataError, match="no such file"):
        load_trajectories(DataConfig(data=str(tmp_path / "none.jsonl")))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no usable row"):
        load_trajectories(DataConfig(data=str(tmp_path / "empty.jsonl")))


def test_a_mapped_column_must_exist(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROW])
    with pytest.raises(DataError, match="no column 'resp'"):
        load_trajectories(DataConfig(data=path, columns={"completion": "resp"}))


def test_max_rows_and_mixed_extra_columns(tmp_path):
    rows = [ROW | {"prompt": str(i), "meta": v} for i, v in enumerate([1, 2.5, None, 4])]
    table = load_trajectories(DataConfig(data=write(tmp_path / "a.jsonl", rows), max_rows=3))
    assert table["meta"] == [1.0, 2.5, None]
    rows = [ROW | {"prompt": str(i), "meta": v} for i, v in enumerate(["a", {"b": 1}])]
    table = load_trajectories(DataConfig(data=write(tmp_path / "b.jsonl", rows)))
    assert table["meta"] == ["a", {"b": 1}]


def test_fingerprint_follows_the_content_not_the_name(tmp_path):
    first, second = write(tmp_path / "a.jsonl", [ROW]), write(tmp_path / "b.jsonl", [ROW])
    assert fingerprint(first) == fingerprint(second)
    write(tmp_path / "b.jsonl", [ROW, ROW])
    assert fingerprint(first) != fingerprint(second)


def test_fingerprint_of_a_model_folder_follows_its_weights_not_its_logs(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = fingerprint(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "training_args.bin").write_bytes(b"when it was saved")
    assert fingerprint(str(tmp_path)) == first
    with open(tmp_path / "model.safetensors", "r+b") as weights:
        weights.truncate(100 << 20)
    large = fingerprint(str(tmp_path))
    with open(tmp_path / "model.safetensors", "r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"x")
    assert len({first, large, fingerprint(str(tmp_path))}) == 3


def test_a_source_on_the_hub_names_its_own_subset_and_split(monkeypatch):
    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return Dataset.from_list([{"question": f"{subset}?", "text": "yes"}], split=split)

    monkeypatch.setattr("afterglow.core.row_sources.load_dataset", load)
    sources = ["owner/one", "owner/two:forget10", "owner/three:raw:retain1"]
    config = DataConfig(data=sources, subset="s", split="test", columns={"prompt": "question", "completion": "text"})
    assert len(load_trajectories(config)) == 3
    one, two, three = asked[:3]
    assert one == ("owner/one", "s", "test")
    assert two == ("owner/two", "forget10", "test") and three == ("owner/three", "raw", "retain1")


def test_a_file_of_nothing_but_invalid_rows_says_what_is_wrong(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROW | {"completion": " "}, ROW | {"finish_reason": "tired"}])
    with pytest.raises(DataError, match=r"2 invalid row\(s\) and no sound one") as error:
        load_trajectories(DataConfig(data=path, drop_invalid=True))
    assert "a.jsonl:1: empty completion" in str(error.value) and "a.jsonl:2: finish_reason" in str(error.value)


def test_of_rows_with_one_id_the_first_stays(tmp_path):
    rows = [ROW | {"id": name, "prompt": text} for name, text in zip("abacb", "12345", strict=True)]
    path, faults = write(tmp_path / "a.jsonl", rows), []
    table = load_trajectories(DataConfig(data=[path, path], drop_invalid=True), on_invalid=faults.append)
    assert [(row["id"], row["prompt"][0]["content"]) for row in table] == [("a", "1"), ("b", "2"), ("c", "4")]
    assert [fault.split(": id")[0].removeprefix(path) for fault in faults] == [":3", ":5", ":1", ":2", ":3", ":4", ":5"]
