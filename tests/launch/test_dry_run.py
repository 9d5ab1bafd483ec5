import pytest
from launch_recipes import training_recipe, training_rows, write_rows

from afterglow.core.recipe import read_recipe
from afterglow.launch import training_recipe as recipes
from afterglow.launch.cli import main
from afterglow.launch.dry_run import batch_rows, masked_text, measure, prepare
from afterglow.launch.memory import Part, Shape, count_parameters, estimate, peak
from afterglow.launch.model_folder import check_model
from afterglow.launch.processes import Setup
from afterglow.launch.training_run import _make_trainer


def parsed(folder, model, **changes):
    return recipes.parse(read_recipe(training_recipe(folder, model, **changes)))


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_length": 40}, {"assistant_only_loss": True}, {"completion_only_loss": False, "method": "sft"}],
)
def test_masks_are_those_of_the_trainer(tmp_path, tiny_folder, changes):
    training = parsed(tmp_path, tiny_folder, **changes)
    table = recipes.load_table(training.data)
    shown = prepare(table, training.args, check_model(str(tiny_folder)))
    trained = _make_trainer(training, table, []).train_dataset
    assert shown["input_ids"] == trained["input_ids"]
    assert shown["labels"] == trained["labels"]


@pytest.mark.parametrize("rows, batch, accumulation", [(19, 4, 1), (19, 4, 2), (16, 8, 2), (3, 4, 1)])
def test_steps_are_those_of_the_trainer(tmp_path, tiny_folder, rows, batch, accumulation):
    write_rows(tmp_path / "data.jsonl", training_rows(rows))
    shape = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    training = parsed(tmp_path, tiny_folder, method="sft", save_strategy="no", **shape)
    facts = batch_rows(rows, training.args, Setup(), None)
    trainer = _make_trainer(training, recipes.load_table(training.data), [])
    trainer.train()
    assert facts["steps"].endswith(f"{trainer.state.max_steps} in all")
    assert facts["effective batch"].endswith(f"= {batch * accumulation}")


def test_lengths(tmp_path, tiny_folder):
    training = parsed(tmp_path, tiny_folder, max_length=42)
    table, tokenizer = recipes.load_table(training.data), check_model(str(tiny_folder))
    examples = prepare(table, training.args, tokenizer)
    training.args.max_length = None
    whole = [len(ids) for ids in prepare(table, training.args, tokenizer)["input_ids"]]
    training.args.max_length = 42
    lengths = measure(table, examples, training.args, tokenizer)
    assert lengths.cut == sum(length > 42 for length in whole) > 0
    assert lengths.longest == 42 and lengths.mean == sum(min(length, 42) for length in whole) / 19


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path, tiny_folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = training_recipe(tmp_path, tiny_folder, gradient_accumulation_steps=2)
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", str(recipe), "--dry_run", "--accelerate_config", "zero3", "--num_processes", "2"]) == 0
    out = capsys.readouterr().out
    assert "4 per device x 2 accumulation x 2 = 16" in out and "2 per epoch, 6 in all" in out
    assert "(zero3)" in out and "/ 2 processes" in out and "<|im_start|>assistant" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_downloads_nothing(tmp_path, capsys):
    recipe = training_recipe(tmp_path, "someone/some-model")
    assert main(["train", str(recipe), "--dry_run"]) == 0
    assert "someone/some-model is not on this machine" in capsys.readouterr().out


def test_green_is_what_the_loss_sees(tiny_folder):
    tokenizer = check_model(str(tiny_folder))
    ids = tokenizer("abcdef")["input_ids"]
    text = masked_text(ids, [-100, -100, ids[2], ids[3], -100, ids[5]], tokenizer)
    assert text.plain == "abcdef"
    assert [(span.start, span.end) for span in text.spans if "green" in str(span.style)] == [(2, 4), (5, 6)]


def test_memory_is_split_as_the_setup_says(tiny_folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    parameters, trained = count_parameters(AutoConfig.from_pretrained(tiny_folder))
    assert parameters == trained == AutoModelForCausalLM.from_pretrained(tiny_folder).num_parameters()

    def parts(setup: Setup, **changes) -> dict[str, float]:
        facts = {
            "parameters": 1000, "trained": 1000, "dtype": "float32", "optimizer": "adamw_torch", "half_precision": True,
            "checkpointing": True, "tokens": 10, "setup": setup,
            "shape": Shape(2, 8, queries=8, keys=4, intermediate=16, vocabulary=32, tied=True, head_norms=False),
        }  # fmt: skip
        return {part.name: part.bytes for part in estimate(**(facts | changes))}

    # A layer keeps of a token: 2 norms x 8 x (4 + 4 + 2) bytes, attention 2 x (8 + 4) x 2, feed-forward 4 x 16 x 2.
    one = parts(Setup())
    assert one == {
        "weights": 4000, "gradients": 4000, "optimizer": 8000, "casts": 2000, "activations": 10 * (2 * 8 * 4 + 336),
        "logits": 10 * 32768 * 2 + 32 * 8 * 4,
    }  # fmt: skip
    assert parts(Setup("ddp", "MULTI_GPU", 4)) == one | {"DDP's buckets": 4000}
    fsdp = parts(Setup("fsdp2", "FSDP", 4))
    assert (fsdp["weights"], fsdp["gradients"], fsdp["optimizer"]) == (1000, 1000, 2000)
    zero2 = parts(Setup("zero2", "DEEPSPEED", 4, 2))
    assert (zero2["weights"], zero2["gradients"], zero2["optimizer"]) == (2000, 500, 3000)
    zero3 = parts(Setup("zero3", "DEEPSPEED", 4, 3))
    assert (zero3["weights"], zero3["gradients"], zero3["optimizer"]) == (500, 500, 3000)
    assert parts(Setup(), trained=10)["optimizer"] == 80
    assert parts(Setup(), optimizer="adamw_8bit")["optimizer"] == 2000
    assert parts(Setup(), optimizer="sgd")["optimizer"] == 0
    assert parts(Setup(), checkpointing=False)["activations"] == 10 * 2 * 336


def test_gradients_and_activations_meet_only_with_accumulation():
    sizes = {"weights": 5.0, "optimizer": 10.0, "gradients": 4.0, "activations": 6.0, "logits": 1.0}
    parts = [Part(name, size, "") for name, size in sizes.items()]
    assert peak(parts, accumulates=True) == 26 and peak(parts, accumulates=False) == 22
    assert peak([Part("gradients", 9.0, ""), *parts[:2], *parts[3:]], accumulates=False) == 24
