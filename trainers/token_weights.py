"""Weights below the sample: `weight` on a message, or one number per token.

Both become a column with one weight per token, which packing carries along. Tokens without a label have weight 0, and a
token of weight 0 has no label: it counts in no loss, no ledger and no denominator.
"""

import math
from itertools import groupby
from typing import Any

from datasets import Dataset

from ..core.errors import DataError

TOKEN_WEIGHTS = "token_weights"  # column: a weight for each of `input_ids`


def has_token_weights(dataset: Dataset) -> bool:
    """Whether any row says how its tokens are weighed.

    Raises:
        DataError: there are weights for tokens that are not there yet.
    """
    if TOKEN_WEIGHTS in dataset.column_names:
        if "input_ids" not in dataset.column_names:
            raise DataError(
                "train_dataset: `token_weights` belong to `input_ids`, which are missing. Tokenise the rows yourself "
                "(`input_ids`, `labels`, `token_weights`), or give messages a `weight`."
            )
        return True
    columns = [name for name in ("prompt", "completion") if name in dataset.column_names]
    if not columns or not isinstance(dataset[0][columns[0]], list):
        return False
    rows: Any = dataset.select_columns(columns)
    return any(message.get("weight") is not None for row in rows for name in columns for message in row[name])


def weigh_tokens(row: dict[str, Any], with_prompt: bool, apart: bool, keep_end: bool) -> dict[str, Any]:
    """Return the `token_weights` and `labels` of a tokenised row, for `Dataset.map`.

    Args:
        row: `input_ids` and `labels`, perhaps cut; and `token_weights` as given, uncut, or `prompt` and `completion`.
        with_prompt: the assistant's messages of the prompt are trained too.
        apart: only what the assistant writes is trained, so that each message is a stretch of trained tokens.
        keep_end: rows were cut at their beginning.

    Raises:
        DataError: a weight is no number from 0 on, or the weights cannot be told apart in the tokens.
    """
    labels, name = row["labels"], row.get("id", "a row")
    if row.get(TOKEN_WEIGHTS) is not None:
        given = row[TOKEN_WEIGHTS]
        if len(given) < len(labels):
            raise DataError(
                f"train_dataset, {name}: {len(given)} `token_weights` for {len(labels)} `input_ids`. Give one for each."
            )
        weights = given[-len(labels) :] if keep_end else given[: len(labels)]
    else:
        messages = (row["prompt"] if with_prompt else []) + row["completion"]
        weights = [message.get("weight") for message in messages if message["role"] == "assistant"]
        weights = _spread([1.0 if weight is None else weight for weight in weights], labels, apart, keep_end, name)
    for weight in weights:
        check_weight(weight, name, TOKEN_WEIGHTS)
    weights = [float(weight) if label != -100 else 0.0 for weight, label in zip(weights, labels, strict=True)]
    return {
        TOKEN_WEIGHTS: weights,
        "labels": [label if weight else -100 for weight, label in zip(weights, labels, strict=True)],
    }


def check_weight(weight: Any, name: str, column: str) -> None:
    """Check one weight.

    Raises:
        DataError: it is no finite number from 0 on.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise DataError(
            f"train_dataset, {name}: `{column}` is {weight!r}; a weight is a number from 0 on (0: not trained on)."
        )


def _spread(weights: list[Any], labels: list[int], apart: bool, keep_end: bool, name: str) -> list[Any]:
    """Give each run of trained tokens the weight of the message that it is, in order."""
    runs = [(trained, len(list(run))) for trained, run in groupby(label != -100 for label in labels)]
    count = sum(trained for trained, _ in runs)
    if count > len(weights) or not (apart or len(set(weights)) == 1):
        raise DataError(
            f"train_dataset, {name}: its {len(weights)} assistant messages are {count} stretch(es) of trained tokens, "
            "so their weights cannot be told apart. Set `assistant_only_loss: true`, with a chat template that marks "
            "what the assistant writes."
        )
    # A row that was cut has lost whole messages at one end.
    left = iter(weights[len(weights) - count :] if keep_end else weights[:count])
    return [weight for trained, length in runs for weight in [next(left) if trained else 0.0] * length]
