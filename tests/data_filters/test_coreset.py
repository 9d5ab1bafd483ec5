import numpy as np
import pandas as pd
import pytest
from filter_tables import dropped_ids, row, run_filter, table, write_jsonl
from tiny import save_tiny

from afterglow.core.errors import DataError, RecipeError
from afterglow.core.recipe import Section, build
from afterglow.data_filters import coreset
from afterglow.data_filters.checkpoint_losses import losses_at_checkpoints
from afterglow.data_filters.coreset import NO_LOSSES, CoresetConfig, cld_scores, null_scores, others_mean

REFERENCE = np.array([3.0, 2.0, 1.5, 1.4, 1.0])  # differences -1, -.5, -.1, -.4


def ledger(path, losses, **columns):
    """A file as GLOW writes it: id -> losses."""
    frame = pd.DataFrame(np.array(list(losses.values()), dtype=np.float32))
    frame.columns = [f"epoch_{n + 1}" for n in range(frame.shape[1])]
    frame.insert(0, "id", list(losses))
    for name, value in ({"weight": 1.0} | columns).items():
        frame[name] = value
    frame.to_parquet(path)
    return str(path)


def test_hand_computed_scores():
    with_it, against_it = 2 * REFERENCE + 7, -REFERENCE
    other = np.array([1.0, 0.0, 0.0, 0.0, 0.0])  # differences -1, 0, 0, 0
    flat, line = np.full(5, 2.0), np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    scores = cld_scores(np.stack([with_it, against_it, other, flat, line]), REFERENCE)
    # own differences -.75, .25, .25, .25 about their mean; the reference's -.5, 0, .4, .1
    expected = (0.375 + 0.25 * 0.5) / np.sqrt(0.75 * 0.42)
    assert scores == pytest.approx([1, -1, expected, 0, 0])


def test_scores_equal_numpy_and_do_not_depend_on_scale():
    losses = np.random.default_rng(0).normal(size=(20, 9))
    reference = losses.mean(axis=0)
    expected = [np.corrcoef(np.diff(own), np.diff(reference))[0, 1] for own in losses]
    assert cld_scores(losses, reference) == pytest.approx(expected)
    assert cld_scores(losses * 3 + 5, reference) == pytest.approx(expected)


def test_a_row_is_no_evidence_for_itself():
    losses = np.array([[4.0, 1.0], [2.0, 3.0], [0.0, 8.0]])
    assert others_mean(losses).tolist() == [[1.0, 5.5], [2.0, 4.5], [3.0, 2.0]]


@pytest.mark.parametrize("differences", [4, 12])
def test_the_null_is_that_of_unrelated_differences(differences):
    """With few checkpoints all orders but the true one; its deviation is 1 / sqrt(differences - 1)."""
    losses = np.cumsum(np.random.default_rng(1).normal(size=(400, differences + 1)), axis=1)
    null = null_scores(losses, losses[0], seed=0)
    assert len(null) == 400 * (23 if differences == 4 else 200)
    assert abs(null[np.isfinite(null)].std() - 1 / np.sqrt(differences - 1)) < 0.05
    again = null_scores(losses, losses[0], seed=0)
    assert np.array_equal(null, again)


def ten_losses():
    """Rows g0 ... g5 fall as the mean does, b0 ... b3 the other way round."""
    rng = np.random.default_rng(0)
    good = {f"g{i}": REFERENCE + 0.01 * rng.normal(size=5) for i in range(6)}
    return good | {f"b{i}": REFERENCE[::-1] + 0.01 * rng.normal(size=5) for i in range(4)}


def rows_of(ids, **columns):
    return [row(key, **columns) for key in ids]


def test_rows_that_learn_with_the_others_stay(tmp_path):
    file = ledger(tmp_path / "ledger.parquet", ten_losses())
    rows = rows_of([*ten_losses(), "unseen"])
    result = run_filter(coreset, rows, CoresetConfig(losses=file, keep_ratio=0.6), tmp_path)
    gone = dropped_ids(rows, result)
    assert gone == {"unseen": NO_LOSSES} | dict.fromkeys(
        ["b0", "b1", "b2", "b3"], "coreset: not among the highest 60% of its class"
    )
    assert sorted(result.scores["cld_rank"][:6]) == [1, 2, 3, 4, 5, 6] and result.scores["cld"][-1] is None
    report = result.report
    assert report["without_losses"] == 1 and report["checkpoints"] == 5 and report["by_class"]["all"]["kept"] == 6
    assert report["null_deviation_expected"] == pytest.approx(1 / np.sqrt(3))


def test_above_null_drops_what_any_order_would_reach(tmp_path):
    file = ledger(tmp_path / "ledger.parquet", ten_losses())
    config = CoresetConfig(losses=file, keep_ratio=1.0, select="above_null")
    rows = rows_of(ten_losses())
    result = run_filter(coreset, rows, config, tmp_path)
    bar = result.report["by_class"]["all"]["null_quantile"]
    assert all((score <= bar) == (i in result.dropped) for i, score in enumerate(result.scores["cld"]))
    assert set(dropped_ids(rows, result)) >= {"b0", "b1", "b2", "b3"}


def test_validation_losses_are_the_reference(tmp_path):
    file = ledger(tmp_path / "ledger.parquet", ten_losses())
    turned = ledger(tmp_path / "validation.parquet", {"v": REFERENCE[::-1], "w": REFERENCE[::-1]})
    config = CoresetConfig(losses=file, validation=turned, keep_ratio=0.4)
    rows = rows_of(ten_losses())
    assert set(dropped_ids(rows, run_filter(coreset, rows, config, tmp_path))) == {f"g{i}" for i in range(6)}


def test_every_class_keeps_its_share_and_is_compared_with_itself(tmp_path):
    file = ledger(tmp_path / "ledger.parquet", ten_losses())
    rows = [r | {"source": r["id"][0]} for r in rows_of(ten_losses())]
    result = run_filter(coreset, rows, CoresetConfig(losses=file, by="source", keep_ratio=0.5), tmp_path)
    kept = {r["id"] for i, r in enumerate(rows) if i not in result.dropped}
    assert {c: of["kept"] for c, of in result.report["by_class"].items()} == {"b": 2, "g": 3}
    assert sum(key[0] == "b" for key in kept) == 2 and min(result.scores["cld"]) > 0.9
    lone = [*rows, row("g9", source="lone")]
    more = ledger(tmp_path / "more.parquet", ten_losses() | {"g9": REFERENCE})
    result = run_filter(coreset, lone, CoresetConfig(losses=more, by="source"), tmp_path)
    assert result.dropped[10] == "coreset: its class has no rows to compare with"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_with_a_loss_that_is_no_number_is_dropped_by_name(tmp_path, value):
    losses = ten_losses()
    losses["g3"][2] = value
    rows = rows_of(losses)
    file = ledger(tmp_path / "ledger.parquet", losses)
    result = run_filter(coreset, rows, CoresetConfig(losses=file, keep_ratio=1.0), tmp_path)
    assert dropped_ids(rows, result) == {"g3": NO_LOSSES}


def test_files_that_cannot_serve_are_refused(tmp_path):
    rows = rows_of(ten_losses())

    def run(**config):
        run_filter(coreset, rows, CoresetConfig(**config), tmp_path)

    with pytest.raises(DataError, match=r"no such file\. GLOW writes loss_ledger\.parquet"):
        run(losses=str(tmp_path / "gone.parquet"))
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        run(losses=str(tmp_path / "text.parquet"))
    few = ledger(tmp_path / "few.parquet", {key: value[:3] for key, value in ten_losses().items()})
    with pytest.raises(DataError, match=r"3 checkpoint\(s\); `coreset` needs at least 5"):
        run(losses=few)
    pd.DataFrame({"id": ["a"], "loss": [1.0]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"needs the columns `id`, `epoch_1`.*it has id, loss"):
        run(losses=str(tmp_path / "other.parquet"))
    strangers = ledger(tmp_path / "strangers.parquet", {f"x{i}": REFERENCE for i in range(3)})
    with pytest.raises(DataError, match="for none of the 10 rows"):
        run(losses=strangers)
    twice = ledger(tmp_path / "twice.parquet", ten_losses(), id=["g0"] * 10)
    with pytest.raises(DataError, match="id 'g0' stands twice"):
        run(losses=twice)
    whole = ledger(tmp_path / "whole.parquet", ten_losses())
    with pytest.raises(DataError, match="validation losses of the same run"):
        run(losses=whole, validation=few)
    with pytest.raises(DataError, match="needs a column of that name"):
        run(losses=whole, by="domain")
    with pytest.raises(DataError, match=r"no such folder\. Name the `output_dir`"):
        run(checkpoints=str(tmp_path / "gone"))
    (tmp_path / "empty" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no `checkpoint-N` with weights"):
        run(checkpoints=str(tmp_path / "empty"))


def test_a_folder_of_checkpoints_is_scored(tmp_path, monkeypatch):
    """Losses are the mean NLL under each checkpoint, in the order of the steps and not of the names."""
    monkeypatch.setenv("AFTERGLOW_CACHE", str(tmp_path / "cache"))
    for n, step in enumerate((2, 4, 6, 8, 10)):
        save_tiny(tmp_path / "run" / f"checkpoint-{step}", seed=n)
    rows = [row(f"r{i}", "The sum is four." * (i + 1), prompt=f"What is {i}+{i}?") for i in range(4)]
    validation = write_jsonl(tmp_path / "validation.jsonl", rows[:2])
    config = CoresetConfig(
        checkpoints=str(tmp_path / "run"), validation=str(validation), keep_ratio=0.5, dtype="float32", max_length=256
    )
    assert [path.rpartition("-")[2] for path in config.checkpoint_folders] == ["2", "4", "6", "8", "10"]
    result = run_filter(coreset, rows, config, tmp_path / "work")
    assert len(result.dropped) == 2 and result.report["checkpoints"] == 5
    # Two rows of validation are two of the rows: their mean's score against themselves can be computed by hand.
    own, means = losses_at_checkpoints(
        table(rows), str(tmp_path / "run"), str(validation), by=None, dtype="float32", max_length=256,
        token_budget=16384, work=tmp_path / "again", progress=None,
    )  # fmt: skip
    assert means is not None and means[""] == pytest.approx(own[:2].mean(axis=0))
    assert result.scores["cld"] == pytest.approx(cld_scores(own, means[""]).tolist())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give `losses`"),
        ({"losses": "a.parquet", "checkpoints": "b"}, "one of them"),
        ({"losses": "a.parquet", "keep_ratio": 0.0}, "`keep_ratio` must be above 0"),
        ({"losses": "a.parquet", "select": "best"}, "top, above_null"),
    ],
)
def test_a_wrong_recipe_is_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        build(Section(values), CoresetConfig)
