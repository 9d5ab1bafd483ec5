import json

import pytest
from filter_tables import dropped_ids, row, run_filter, write_jsonl

from afterglow.core.errors import DataError, RecipeError
from afterglow.data_filters import decontamination
from afterglow.data_filters.decontamination import BenchmarkIndex, DecontaminationConfig
from afterglow.data_filters.text_match import normalise, without_numbers

LONG = "A train leaves Rome at 3 and drives 60 miles in each hour."  # 13 words: 6 runs of 8
FORMULA = r"Find $\frac{x^2+3x+2}{x+1}\cdot\frac{x^2-1}{x-1}$ for $x=12,345.50$."  # 4 words, more than 50 characters


def index_of(*items, **keys):
    index = BenchmarkIndex(**keys)
    for number, text in enumerate(items):
        index.add("bench", str(number), text)
    return index


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("What is  $2+2$?", "what is 2+2"),
        ("It costs $1,234,567.50, or 3.00.", "it costs 1234567.5 or 3"),
        ("A list: 1,2,3 and .5", "a list 1,2,3 and .5"),
        (r"\(x\) is “x”", "x is x"),
        ("ＦＵＬＬ １２", "full 12"),
        ("10 and 100.010", "10 and 100.01"),
    ],
)
def test_normal_form(text, normal):
    assert normalise(text) == normal and normalise(normal) == normal


def test_numbers_are_masked_whole():
    assert without_numbers(normalise("Add 1,000.5 to 7")) == "add 0 to 0"


def test_each_check_finds_its_copy_and_names_the_item():
    index = index_of("What is 2+2?", LONG, FORMULA)
    assert index.find("Solve: a TRAIN leaves rome at 3 and drives far") == ("words", "bench", "1", 1 / 6)
    assert index.find("what is $2+2$") == ("exact", "bench", "0", 1.0)
    assert index.find("What is 2+2?\nPut your final answer within \\boxed{}.") == ("exact", "bench", "0", 1.0)
    found = index.find(f"Here is one:   {FORMULA.replace('$', ' $ ')} Reason step by step.")
    assert found[:3] == ("characters", "bench", "2") and found.share > 0.9
    other = LONG.replace("3", "4").replace("60", "75").replace("A train", "a train")
    assert index.find(other) == ("numbers", "bench", "1", 1.0)


def test_what_is_no_copy():
    index = index_of("What is 2+2?", LONG, FORMULA, "", "$$")
    assert index.find("What is 2+3?") is None, "a short item with other numbers is another problem"
    assert index.find("") is None and index.find("A train leaves Rome at 3 and drives") == (
        "words",
        "bench",
        "1",
        1 / 6,
    )
    assert index.find("A train leaves Rome at 3 and") is None, "seven words"
    assert len(index.items) == 3, "an item without a word matches nothing"


def test_the_item_with_the_largest_share_is_named_and_min_overlap_is_inclusive():
    common = "how many of them are there in the end"  # 9 words
    index = index_of(f"{common} of a very long story about frogs", common)
    assert index.find(f"So {common} ?") == ("words", "bench", "1", 1.0)
    half = f"{common[: common.rindex(' ')]} middle"
    assert index.find(half) == ("words", "bench", "1", 0.5)
    assert index_of(common, min_overlap=0.5).find(half) and not index_of(common, min_overlap=0.51).find(half)


def rows():
    return [
        row("copy", prompt=f"{LONG} How far is it?", source="a"),
        row("short", prompt="What is 2+2 ?", source="a"),
        row("clean", prompt="What is 7+8?", source="b"),
        row("twin", prompt="What is 2+2 ?", source="b"),
    ]


def test_the_filter(tmp_path):
    bench = write_jsonl(tmp_path / "bench.jsonl", [{"problem": LONG}, {"problem": "What is 2+2?", "problem_id": "sum"}])
    table = rows()
    result = run_filter(decontamination, table, DecontaminationConfig([str(bench)]), tmp_path)
    assert dropped_ids(table, result) == {
        "copy": "has 8 words in a row of bench.jsonl (item 0, 100% of its n-grams)",
        "short": "equals an item of bench.jsonl (item sum)",
        "twin": "equals an item of bench.jsonl (item sum)",
    }
    assert result.scores == {
        "contaminated_by": ["bench.jsonl/0", "bench.jsonl/sum", None, "bench.jsonl/sum"],
        "contamination": [1.0, 1.0, None, 1.0],
    }
    assert result.report["items"] == {"bench.jsonl": 2} == result.report["items_found"]
    assert result.report["checks"] == {"exact": 2, "words": 1}


def test_task_files_chat_messages_and_named_columns(tmp_path):
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": LONG}], "problem_id": 7}])
    named = write_jsonl(tmp_path / "named.jsonl", [{"q": "What is 2+2?", "nr": "n1"}])
    (tmp_path / "task.yaml").write_text(f"name: t\ndata: {named}\ncolumns: {{prompt: q, problem_id: nr}}\nn: 4\n")
    config = DecontaminationConfig([str(chat), str(tmp_path / "task.yaml")])
    assert config.sources == [str(chat), str(tmp_path / "task.yaml"), str(named)], "a changed file is another run"
    table = rows()
    result = run_filter(decontamination, table, config, tmp_path)
    assert result.scores["contaminated_by"] == ["chat.jsonl/7", "task.yaml/n1", None, "task.yaml/n1"]


def test_a_benchmark_of_the_package_is_known_by_its_name():
    task, data = DecontaminationConfig(["aime24"]).sources
    assert task.endswith("aime24.yaml") and data == "HuggingFaceH4/aime_2024"


@pytest.mark.parametrize("keys, split", [("", "test"), ("split: dev\n", "dev")])
def test_a_task_file_without_a_split_means_the_one_that_is_scored(keys, split, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(decontamination, "source_rows", lambda *source: asked.append(source) or [("row 0", {"q": "x"})])
    (tmp_path / "t.yaml").write_text(f"name: t\ndata: some/set\ncolumns: {{prompt: q}}\n{keys}")
    assert list(decontamination.read_benchmark(str(tmp_path / "t.yaml"), {})) == [("0", "x")]
    assert asked == [("some/set", split, None)]


def test_bad_benchmarks_stop_the_chain_before_it_starts(tmp_path):
    def refusal(text, **keys):
        (tmp_path / "b.jsonl").write_text(text)
        with pytest.raises(DataError) as error:
            decontamination.check(None, DecontaminationConfig([str(tmp_path / "b.jsonl")], **keys), set())
        return str(error.value)

    assert "b.jsonl has no item" in refusal("\n")
    assert "b.jsonl:1: not valid JSON" in refusal("{")
    message = refusal(json.dumps({"text": "x"}))
    assert "b.jsonl:1: no text in `prompt` or `problem` or `question`; the row has ['text']" in message
    assert "columns: {prompt:" in message
    assert "no text in `q`" in refusal(json.dumps({"q": None}), columns={"prompt": "q"})
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file"):
        decontamination.check(None, DecontaminationConfig(["missing.jsonl"]), set())
    (tmp_path / "no_task.yaml").write_text("steps: []\n")
    with pytest.raises(RecipeError, match="`data` is missing"):
        _ = DecontaminationConfig([str(tmp_path / "no_task.yaml")]).sources


@pytest.mark.parametrize(
    "keys", [{"benchmarks": []}, {"ngram_words": 1}, {"ngram_chars": 5}, {"min_overlap": 1.5}], ids=str
)
def test_values_that_make_no_sense(keys):
    with pytest.raises(ValueError, match=next(iter(keys))):
        DecontaminationConfig(**{"benchmarks": ["x"], **keys})
