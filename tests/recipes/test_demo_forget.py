import json

import pytest

from afterglow.core.trajectory import DataConfig, load_trajectories
from afterglow.recipes.demo_forget.facts import COUNTRY, PERSON, country_names, full_names
from afterglow.recipes.demo_forget.world import ForgetWorldConfig, main, make_facts, make_world

SMALL = ForgetWorldConfig(people=20, famous=2, countries=3, vocab_size=512, hidden_size=64)
SETS = ("forget10", "retain", "holdout10")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("forget") / "world", SMALL)


@pytest.fixture(scope="module")
def files(world):
    return {path.stem: rows_of(path) for path in world.glob("*.jsonl")}


def people_in(rows):
    names = full_names(24, "0")
    return {name for name in names for row in rows if name in row["question"]}


def test_full_is_forget_and_retain_and_they_share_nobody(files):
    assert files["full"] == files["forget10"] + files["retain90"]
    groups = [people_in(files[name]) for name in ("forget10", "retain90", "holdout10")]
    assert [len(group) for group in groups] == [2, 18 + 2, 2]  # two famous people are kept as well
    assert not groups[0] & groups[1] and not groups[2] & (groups[0] | groups[1])
    assert len(files["forget10"]) == 2 * 8 * 2 and len(files["full"]) == (22 * 8 + 3 * 3) * 2


def test_a_paraphrase_is_never_learned_and_wrong_answers_are_wrong_in_its_words(files):
    learned = {(row["question"], row["answer"]) for row in files["full"] + files["holdout10"]}
    answers = {answer for _, answer in learned}
    for name in SETS:
        rows = files[f"{name}_perturbed"]
        assert len(rows) == 16
        for row in rows:
            assert (row["question"], row["answer"]) in learned
            assert row["paraphrased_answer"] not in answers
            assert len({row["paraphrased_answer"], *row["perturbed_answer"]}) == 6
            start = row["paraphrased_answer"].split()[:3]
            assert all(wrong.split()[:3] == start for wrong in row["perturbed_answer"]), row
    for name in ("real_authors", "world_facts"):
        for row in files[f"{name}_perturbed"]:
            assert (row["question"], row["answer"]) in learned
            assert len({row["answer"], *row["perturbed_answer"]}) == 4


def test_wordings_can_be_told_apart_and_values_are_enough():
    for attribute in (*PERSON, *COUNTRY):
        assert len(set(attribute.questions)) == len(set(attribute.answers)) == 3
        assert len(set(attribute.values)) == len(attribute.values) >= 6
        assert all("{name}" in text for text in attribute.questions + attribute.answers)
        assert all("{value}" in text for text in attribute.answers)
    names = full_names(200, "1")
    assert len({name.split()[1] for name in names}) == 200 and names != full_names(200, "2")
    assert len(set(country_names(40, "0"))) == 40


def test_a_recipe_reads_the_files_and_the_chat_holds_nothing_but_the_answer(world, files):
    from transformers import AutoTokenizer

    columns = {"prompt": "question", "completion": "answer"}
    table = load_trajectories(DataConfig(data=str(world / "full.jsonl"), columns=columns))
    assert len(table) == len(files["full"])
    tokenizer = AutoTokenizer.from_pretrained(world / "init")
    row = table[0]
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    assert whole == prompt + row["completion"][0]["content"] + "<|im_end|>\n"


def test_same_seed_same_bytes_other_seed_other_people(world, tmp_path, capsys):
    words = [f"--{name}={value}" for name, value in vars(SMALL).items()]
    assert main(["--output_dir", str(tmp_path / "again"), *words]) == 0
    for path in sorted(path for path in world.rglob("*") if path.is_file()):
        assert (tmp_path / "again" / path.relative_to(world)).read_bytes() == path.read_bytes(), path.name
    other = make_facts(ForgetWorldConfig(**{**vars(SMALL), "seed": 1}))
    assert {fact.name for fact in other["forget"]} != people_in(rows_of(world / "forget10.jsonl"))
    assert main(["--output_dir", str(world)]) == 1  # other settings than those of this folder
    assert "--overwrite" in capsys.readouterr().err
