import pytest
from datasets import Dataset

from afterglow.core.errors import DataError
from afterglow.trainers.token_weights import has_token_weights, weigh_tokens

# Two turns of the assistant, three and two tokens, with two tokens of somebody else in between.
LABELS = [-100, 1, 2, 3, -100, -100, 4, 5]
APART = {"with_prompt": False, "apart": True, "keep_end": False}


def row(*weights, labels=LABELS, **more) -> dict:
    turns = [{"role": "assistant", "content": "x"} | ({} if w is None else {"weight": w}) for w in weights]
    return {"id": "r", "labels": labels, "prompt": [{"role": "user", "content": "q"}], "completion": turns, **more}


def test_each_turn_gets_the_weight_of_its_message():
    found = weigh_tokens(row(0.5, None), **APART)
    assert found == {"token_weights": [0, 0.5, 0.5, 0.5, 0, 0, 1, 1], "labels": LABELS}


def test_weight_0_is_a_mask():
    found = weigh_tokens(row(0, 2.0), **APART)
    assert found == {"token_weights": [0, 0, 0, 0, 0, 0, 2, 2], "labels": [-100] * 6 + [4, 5]}


def test_a_row_that_was_cut_keeps_the_weights_of_what_is_left():
    assert weigh_tokens(row(0.5, 2.0, labels=LABELS[:3]), **APART)["token_weights"] == [0, 0.5, 0.5]
    found = weigh_tokens(row(0.5, 2.0, labels=LABELS[5:]), **APART | {"keep_end": True})
    assert found["token_weights"] == [0, 2, 2]


def test_turns_of_the_prompt_count_where_they_are_trained():
    turns = row(2.0) | {"prompt": [{"role": "assistant", "content": "x", "weight": 3.0}]}
    assert weigh_tokens(turns, **APART | {"with_prompt": True})["token_weights"] == [0, 3, 3, 3, 0, 0, 2, 2]


def test_weights_of_tokens_are_cut_as_the_tokens_were():
    given = {"labels": [-100, 7, 8], "token_weights": [9.0, 1.0, 0.25, 4.0]}
    assert weigh_tokens(given, **APART)["token_weights"] == [0, 1, 0.25]
    assert weigh_tokens(given, **APART | {"keep_end": True})["token_weights"] == [0, 0.25, 4]


@pytest.mark.parametrize(
    ("bad", "how", "message"),
    [
        (row(0.5, 2.0, labels=[-100, 1, 2, 3]), APART | {"apart": False}, "cannot be told apart.*assistant_only_loss"),
        (row(0.5), APART, "1 assistant messages are 2 stretch"),
        (row(-1.0, None), APART, "`token_weights` is -1.0; a weight is a number from 0 on"),
        (row("high", None), APART, "is 'high'"),
        (row(True, None), APART, "is True"),
        (row(float("nan"), None), APART, "is nan"),
        (row(labels=[1, 2], token_weights=[1.0]), APART, "1 `token_weights` for 2 `input_ids`"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(bad, how, message):
    with pytest.raises(DataError, match=message):
        weigh_tokens(bad, **how)


def test_rows_without_weights_cost_nothing():
    plain = [{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}]
    weighed = [plain[0] | {"completion": [{"role": "assistant", "content": "a", "weight": 1.0}]}]
    assert not has_token_weights(Dataset.from_list(plain))
    assert has_token_weights(Dataset.from_list(plain + weighed))
    with pytest.raises(DataError, match="`token_weights` belong to `input_ids`, which are missing"):
        has_token_weights(Dataset.from_dict({"prompt": ["q"], "token_weights": [[1.0]]}))
