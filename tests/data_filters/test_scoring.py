"""Scores that runs and processes share."""

import shutil

import pytest
import torch
from datasets import Dataset
from tiny import save_tiny
from transformers import AutoTokenizer

from afterglow.core.errors import DataError, ModelError
from afterglow.core.token_stats import ScoredSequence
from afterglow.data_filters import scoring
from afterglow.data_filters.score_cache import ScoreCache, row_key
from afterglow.data_filters.scoring import score
from afterglow.data_filters.student import Scoring, Student

SETTINGS = {
    "backend": "transformers", "dtype": "float32", "r_max": 100, "max_length": 1024, "include_eos": False,
    "baselines": False,
}  # fmt: skip


def table(rows, **changes):
    """Rows of different length, without tools."""
    return Dataset.from_list(
        [
            {
                "id": f"r{i}",
                "prompt": [{"role": "user", "content": f"{i}?"}],
                "completion": [{"role": "assistant", "content": f"{i} and so on" + " and on" * (i % 7)}],
            }
            | changes
            for i in rows
        ]
    )


def run(rows, folder, work, cache, **keys):
    keys = {"token_budget": 64} | keys
    return score(rows, Scoring(model=str(folder), **SETTINGS), cache=cache, work=work, **keys)


# ---------------------------------------------------------------------------------------------------------------------
# the cache


def test_a_grown_table_scores_its_new_rows_and_the_same_table_none(tiny_folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = run(table(range(10)), tiny_folder, tmp_path / "1", cache)
    grown = run(table(range(14)), tiny_folder, tmp_path / "2", cache)
    assert (first.new, grown.new) == (10, 4) and grown.rows[:10] == first.rows
    monkeypatch.setattr(scoring, "_load_model", lambda share: pytest.fail("the model was loaded to score nothing"))
    again = run(table(reversed(range(14)), correct=True, source="t"), tiny_folder, tmp_path / "3", cache)
    assert again.new == 0 and again.rows == grown.rows[::-1]  # order, labels and sources do not matter
    shutil.rmtree(tmp_path / "2")
    assert run(table(range(14)), tiny_folder, tmp_path / "2", cache).new == 0


def test_equal_rows_are_scored_once(tiny_folder, tmp_path):
    measured = run(table([1, 2, 1, 1]), tiny_folder, tmp_path / "1", tmp_path / "cache")
    assert measured.new == 2 and measured.rows[0] == measured.rows[2] == measured.rows[3] != measured.rows[1]


def test_a_score_belongs_to_model_tokenizer_template_and_settings(tiny_folder, tmp_path):
    def key(folder=tiny_folder, **changes):
        return Student(Scoring(**({"model": str(folder)} | SETTINGS | changes))).key

    def copy(name):
        return shutil.copytree(tiny_folder, tmp_path / name)

    weights, template, words = save_tiny(tmp_path / "weights", seed=3), copy("template"), copy("words")
    with open(template / "chat_template.jinja", "a") as file:
        file.write("{# changed #}")
    tokenizer = AutoTokenizer.from_pretrained(words)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(words)
    keys = [key(), key(weights), key(template), key(words)]
    changes = ({"dtype": "bfloat16"}, {"r_max": 50}, {"max_length": 64}, {"include_eos": True}, {"baselines": True})
    keys += [key(**change) for change in changes]
    assert len(set(keys)) == len(keys)
    # The same files elsewhere are the same student, and a limit above its context (1,024 tokens) is none.
    assert key(copy("moved")) == key(max_length=4096) == key()


def test_a_row_is_what_the_student_reads():
    row = {"id": "a", "prompt": [{"role": "user", "content": "?"}], "completion": [], "tools": None, "source": "t"}
    assert row_key(row) == row_key(row | {"id": "b", "source": "u", "correct": True})
    for name in ("prompt", "completion", "tools"):
        assert row_key(row) != row_key(row | {name: [{"role": "user", "content": "!"}]})


def test_writers_have_files_of_their_own(tmp_path):
    cache = ScoreCache(tmp_path, "student")
    with cache.writer() as one, cache.writer() as other:
        assert one.path != other.path
        one.append({"key": "a"})
        other.append({"key": "b"})
        assert cache.find({"a", "b", "c"}).keys() == {"a", "b"}
    with cache.writer() as again:
        assert again.path == one.path
    assert len(list(tmp_path.glob("student/*.jsonl"))) == 2


def test_a_line_cut_off_by_a_kill_is_no_score_and_the_next_writer_removes_it(tmp_path):
    cache = ScoreCache(tmp_path, "student")
    with cache.writer() as log:
        log.append({"key": "a"})
    with open(log.path, "a") as file:
        file.write('{"key": "b"')
    assert cache.find({"a", "b"}).keys() == {"a"}
    with cache.writer() as log:
        log.append({"key": "c"})
    assert cache.find({"a", "b", "c"}).keys() == {"a", "c"}


def test_a_file_that_was_edited_is_named(tmp_path):
    cache = ScoreCache(tmp_path, "student")
    with cache.writer() as log:
        log.append({"key": "a"})
    log.path.write_text("no json\n")
    with pytest.raises(DataError, match=r"0\.jsonl:1: not valid JSON .*Delete the file"):
        cache.find({"a"})


# ---------------------------------------------------------------------------------------------------------------------
# processes and blocks


def test_a_process_scores_its_blocks_and_all_together_score_everything(tiny_folder, tmp_path, monkeypatch):
    """Three processes in turn, with the very rows, blocks and bits of one."""
    whole = run(table(range(50)), tiny_folder, tmp_path / "one", tmp_path / "cache-one")
    cache, work = tmp_path / "cache", tmp_path / "three"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "_finish", killed)
        run(table(range(50)), tiny_folder, work, cache)
    (todo,) = work.glob("*-todo")
    student = Student(Scoring(model=str(tiny_folder), **SETTINGS))
    shared, lines = ScoreCache(cache, student.key), []
    for rank in (2, 0, 1):
        share = scoring._Share(todo, scoring._read_job(todo), shared, student, rank, 3)
        scoring._score_share(share, None)
        lines.append(len(list(shared.find(set(map(row_key, table(range(50))))))))
    assert lines == [16, 34, 50]  # of blocks of eight, seven in all: 2, 5 | 0, 3, 6 | 1, 4
    assert run(table(range(50)), tiny_folder, work, cache).rows == whole.rows
    assert not list(work.glob("*-todo"))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_real_processes_give_the_scores_of_one_and_go_on_after_a_kill(tiny_folder, tmp_path):
    rows = table(range(60))
    one = run(rows, tiny_folder, tmp_path / "one", tmp_path / "cache-one")
    cache = tmp_path / "cache-two"
    two = run(rows, tiny_folder, tmp_path / "two", cache, processes=2)
    assert two == one
    files = sorted(cache.glob("*/*.jsonl"))
    counts = [file.read_text().count("\n") for file in files]
    assert sorted(counts) == [28, 32]  # blocks of eight: 0, 2, 4, 6 | 1, 3, 5, 7 (four rows)
    # As after a kill: the plan is there, and one process had written five of its rows, the other two.
    shutil.copytree(tmp_path / "one", tmp_path / "cut")
    for file, left in zip(files, (5, 2), strict=True):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:left]))
    resumed = run(rows, tiny_folder, tmp_path / "cut", cache, processes=2)
    assert resumed.rows == one.rows and resumed.new == 53
    assert sum(file.read_text().count("\n") for file in cache.glob("*/*.jsonl")) == 60


@pytest.mark.slow
@pytest.mark.distributed
def test_a_process_that_fails_is_one_clear_message(tmp_path, capfd):
    model = save_tiny(tmp_path / "model")
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="2 processes scored and one ended with code 1"):
        run(table(range(20)), model, tmp_path / "work", tmp_path / "cache", processes=2)
    assert "NaN" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# vLLM


@pytest.mark.vllm
def test_vllm_gives_the_same_ranks(tmp_path):
    """In float32, where no two logits of a row are equal, every token has the same rank."""
    from afterglow.core.token_stats import score_tokens

    folder = save_tiny(tmp_path / "model", initializer_range=0.3)
    student = Student(Scoring(**(SETTINGS | {"model": str(folder), "backend": "vllm"})))
    share = scoring._Share(tmp_path, {}, ScoreCache(tmp_path, "s"), student)
    asked = []
    for row in table(range(20)):
        chat = student.encode(row)
        asked.append(ScoredSequence(row["id"], chat.input_ids, chat.assistant))
    asked.append(ScoredSequence("nothing", [5, 6, 7], [False] * 3))
    with_gap = ScoredSequence("gap", [5, 6, 7, 8, 9, 10], [False, True, False, True, False, False])
    asked.append(with_gap)
    expected = dict(score_tokens(scoring._load_model(share), asked))
    with scoring._vllm(share) as scorer:
        given = dict(scorer([*asked, ScoredSequence("done", [5, 6], [False, True])], {"done"}))
    assert given.keys() == expected.keys() and len(given["nothing"].nll) == 0 and len(given["gap"].nll) == 2
    for key, stats in expected.items():
        assert torch.equal(given[key].rank, stats.rank)
        torch.testing.assert_close(given[key].nll, stats.nll, atol=1e-4, rtol=1e-5)
