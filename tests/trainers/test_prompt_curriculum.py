import pytest

from afterglow.core.errors import DataError, RunFolderError
from afterglow.trainers.prompt_curriculum import FILE, PromptCurriculum

IDS = [f"prompt-{number}" for number in range(7)]


def curriculum(ids=IDS, batch=2, **changes):
    return PromptCurriculum(ids, batch, **({"seed": 3, "shuffle": True, "retire_at": 0.9} | changes))


def test_a_pass_shows_each_prompt_once_and_the_next_one_in_another_order():
    prompts = curriculum()
    first, second = ([row for _ in range(3) for row in prompts.next_batch()] for _ in range(2))
    assert len(set(first)) == len(set(second)) == 6  # the seventh fills no batch
    assert first != second


def test_without_shuffling_the_rows_come_in_order():
    prompts = curriculum(shuffle=False)
    assert [prompts.next_batch() for _ in range(4)] == [[0, 1], [2, 3], [4, 5], [0, 1]]


def test_mastered_prompts_never_come_again():
    prompts = curriculum()
    mastered = prompts.next_batch()
    prompts.record(mastered, [0.9, 1.0])
    seen = {row for _ in range(20) for row in prompts.next_batch()}
    assert seen == set(range(7)) - set(mastered)
    prompts.record([3], [0.89])
    assert prompts.retired.sum() == 2
    kept = curriculum(retire_at=None)
    kept.record([0], [1.0])
    assert not kept.retired.any()


def test_a_retired_prompt_stays_retired_when_it_is_forgotten():
    prompts = curriculum()
    prompts.record([1], [1.0])
    prompts.record([1], [0.0])
    assert prompts.retired[1]
    assert (prompts.visits[1], prompts.pass_rate[1]) == (2, 0.0)


def test_few_left_is_exhausted_and_still_fills_a_batch():
    prompts = curriculum()
    prompts.record([0, 1, 2, 3, 4, 5], [1.0] * 6)
    assert prompts.exhausted
    assert prompts.next_batch() == [6, 6]
    prompts.record([6], [1.0])
    assert len(prompts.next_batch()) == 2


@pytest.mark.parametrize("before", range(6))
def test_a_resumed_one_deals_the_same_prompts(tmp_path, before):
    rates = iter([0.5, 1.0, 0.2, 0.95] * 20)

    def step(prompts, rates):
        rows = prompts.next_batch()
        prompts.record(rows, [next(rates) for _ in rows])
        return rows

    whole = curriculum()
    for _ in range(before):
        step(whole, rates)
    whole.save(tmp_path)
    resumed = curriculum()
    resumed.load(tmp_path)
    assert (resumed.retired == whole.retired).all()
    values = list(rates)
    assert [step(whole, iter(values[2 * n :])) for n in range(5)] == [
        step(resumed, iter(values[2 * n :])) for n in range(5)
    ]


def test_what_cannot_be_followed_is_refused(tmp_path):
    with pytest.raises(DataError, match="'a' stands twice"):
        curriculum(["a", "b", "a"])
    with pytest.raises(DataError, match="7 prompts, and one generation batch takes 8"):
        curriculum(batch=8)
    with pytest.raises(RunFolderError, match=f"no {FILE}"):
        curriculum().load(tmp_path)
    prompts = curriculum()
    prompts.record([0], [0.5])
    prompts.save(tmp_path)
    with pytest.raises(RunFolderError, match="'prompt-0' is not in the training set"):
        curriculum(["a", "b"]).load(tmp_path)
