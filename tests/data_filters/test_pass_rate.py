import pytest
from filter_tables import dropped_ids, row, run_filter, write_jsonl

from afterglow.core.errors import DataError, RecipeError
from afterglow.core.recipe import Section, build, read_recipe
from afterglow.core.trajectory import DataConfig, load_trajectories
from afterglow.data_filters import chain, pass_rate
from afterglow.data_filters.pass_rate import NOT_SAMPLED, PassRateConfig, curriculum_order

NAMES = ["never", "hard", "half", "easy", "always", "few", "unknown"]


def samples():
    """Eight samples of a problem, of which so many are right; `few` has three graded ones among its eight."""
    right = {"never": 0, "hard": 1, "half": 4, "easy": 7, "always": 8}
    rows = [{"problem_id": name, "correct": i < count} for name, count in right.items() for i in range(8)]
    return rows + [{"problem_id": "few", "correct": (True, False, True, *[None] * 5)[i]} for i in range(8)]


def rows_of(names):
    return [row(f"{name}-{i}", problem_id=name) for name in names for i in range(2)]


def run(tmp_path, found=None, names=NAMES, seed=0, **config):
    file = write_jsonl(tmp_path / "samples.jsonl", samples() if found is None else found)
    rows = rows_of(names)
    result = run_filter(pass_rate, rows, PassRateConfig(str(file), **config), tmp_path, seed)
    return {key.partition("-")[0]: reason for key, reason in dropped_ids(rows, result).items()}, result


def test_problems_without_variance_go(tmp_path):
    gone, result = run(tmp_path)
    assert gone == {
        "never": "never solved",
        "always": "always solved",
        "few": "fewer than 4 graded samples",
        "unknown": NOT_SAMPLED,
    }
    assert len(result.dropped) == 8, "both rows of a problem go"
    assert result.scores["pass_rate"][::2] == [0, 1 / 8, 1 / 2, 7 / 8, 1, 2 / 3, None]
    assert result.scores["n_graded"][::2] == [8, 8, 8, 8, 8, 3, 0]
    report = result.report
    assert report["problems"]["kept"] == 3 and report["problems_not_sampled"] == 1
    error = (2 * (7 / 64 / 8) ** 0.5 + (1 / 4 / 8) ** 0.5 + (2 / 9 / 3) ** 0.5) / 6
    assert report["mean_standard_error"] == pytest.approx(error)


def test_a_band_holds_its_bounds(tmp_path):
    gone, _ = run(tmp_path, min_rate=0.2, max_rate=0.5)
    assert gone["hard"] == "pass rate below 0.2" and gone["easy"] == "pass rate above 0.5" and "half" not in gone
    gone, _ = run(tmp_path, keep_zero_variance=True, max_rate=0.5)
    assert "never" not in gone and gone["always"] == "pass rate above 0.5"


def test_the_order_of_a_curriculum(tmp_path):
    for order, ranks in (("easy_first", [2, 1, 0]), ("hard_first", [0, 1, 2])):
        _, result = run(tmp_path, curriculum=order)
        assert result.scores["curriculum_rank"][2:8:2] == ranks and result.scores["curriculum_rank"][0] is None
    rate = dict.fromkeys("abcdefgh", 0.5)
    orders = {tuple(curriculum_order(rate, rate, order, seed)) for order in ("easy_first", "random") for seed in (0, 0)}
    assert len(orders) == 1, "equal rates: the draw by seed, whatever the order of the file"
    assert curriculum_order(rate, rate, "random", 1) != curriculum_order(rate, rate, "random", 0)


def test_a_chain_writes_its_rows_in_the_order_of_the_curriculum(tmp_path):
    file = write_jsonl(tmp_path / "samples.jsonl", samples())
    data = write_jsonl(tmp_path / "data.jsonl", rows_of(["half", "hard", "easy", "never"]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {data}\noutput_dir: {tmp_path / 'run'}\nsteps:\n"
        f"  - pass_rate: {{samples: {file}, curriculum: easy_first}}\n  - random: {{keep_ratio: 1.0}}\n"
    )
    chain.run(read_recipe(str(recipe)))
    kept = load_trajectories(DataConfig(data=str(tmp_path / "run" / "kept.jsonl")))
    assert list(kept["id"]) == [f"{name}-{i}" for name in ("easy", "half", "hard") for i in range(2)]


def test_the_data_are_their_own_evaluation(tmp_path):
    labels = {"p": [True, False, None, True, False], "q": [True] * 4}
    rows = [row(f"{name}{i}", problem_id=name, correct=c) for name, own in labels.items() for i, c in enumerate(own)]
    result = run_filter(pass_rate, rows, PassRateConfig(), tmp_path)
    assert result.scores["pass_rate"] == [1 / 2] * 5 + [1.0] * 4
    assert set(dropped_ids(rows, result).values()) == {"always solved"} and len(result.dropped) == 4
    with pytest.raises(DataError, match=r"null in every row\. Put `- grade` before"):
        run_filter(pass_rate, rows_of(["p"]), PassRateConfig(), tmp_path)


def test_two_files_are_read_as_one(tmp_path):
    halves = [str(write_jsonl(tmp_path / f"{i}.jsonl", samples()[i::2])) for i in range(2)]
    result = run_filter(pass_rate, rows_of(["hard", "half"]), PassRateConfig(halves), tmp_path)
    assert result.scores["pass_rate"][::2] == [1 / 8, 1 / 2]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([{"problem_id": "half"}], r"no `correct`. Name the samples\.jsonl"),
        ([{"problem_id": "half", "correct": "yes"}], "`correct` must be true, false or null, got 'yes'"),
        ([{"problem_id": "q", "correct": True}], r"no problem of .* is in the data \(such as 'q' there and 'never'"),
        ([], r"no problem of .* is in the data"),
    ],
)
def test_what_is_no_evaluation_of_these_problems_is_refused(tmp_path, found, message):
    with pytest.raises(DataError, match=message):
        run(tmp_path, found)


def test_a_missing_file_is_missed_before_the_first_step(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        pass_rate.check(None, PassRateConfig(str(tmp_path / "gone.jsonl")))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_rate": 0.8, "max_rate": 0.2}, "min_rate <= max_rate"),
        ({"max_rate": 20.0}, "shares of samples"),
        ({"min_samples": 0}, "at least 1"),
        ({"curriculum": "easy"}, "easy_first"),
    ],
)
def test_a_wrong_recipe_is_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        build(Section({"samples": "x.jsonl"} | values), PassRateConfig)
