import json
import os
import shutil
import subprocess
import sys

import pytest
from launch_recipes import training_recipe, training_rows, write_recipe, write_rows

from afterglow.launch import cli

HEAVY = ("torch", "datasets", "transformers", "trl", "vllm", "pandas", "matplotlib", "numpy", "yaml", "rich")


def error_of(capsys, *words) -> str:
    """Run a command that must fail with one message, and return the message."""
    code = cli.main([str(word) for word in words])
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: ") and "Traceback" not in err
    return err.replace("\n", " ")


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\nfrom afterglow.launch import cli\n"
        f"try: cli.main({words})\nexcept SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    if words == ["--help"]:
        assert all(verb in done.stdout for verb in cli.VERBS)


@pytest.mark.parametrize(
    "verb, keys",
    [
        ("train", ["method", "model_name_or_path", "prompt_template", "glow_beta", "learning_rate", "--num_processes"]),
        ("filter", ["steps", "prompt_template", "step: rsr", "r_max", "keep_ratio", "--dry_run"]),
        ("eval", ["tasks", "temperature", "grader", "gpu_memory_utilization", "checkpoints"]),
        ("sample", ["tasks", "temperature"]),
        ("run", ["stages", "--overwrite"]),
        ("report", ["FOLDER"]),
        ("compare", ["FOLDER ...", "--k", "compare.html"]),
    ],
)
def test_help_of_a_verb_lists_its_keys(capsys, verb, keys):
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    for key in keys:
        assert key in out


def test_a_learning_rate_with_a_minus_and_other_overrides_arrive_in_order():
    options, rest = cli.build_parser().parse_known_args(
        ["train", "r.yaml", "--a", "-1e-5", "--dry-run", "--b=x y", "--c", "--num_processes", "2", "--d.e", "[1, 2]"]
    )
    assert (options.target, options.dry_run, options.num_processes) == ("r.yaml", True, 2)
    assert rest == ["--a", "-1e-5", "--b=x y", "--c", "--d.e", "[1, 2]"]


def test_every_wrong_key_is_named_with_its_line(tmp_path, tiny_folder, capsys):
    recipe = training_recipe(tmp_path, tiny_folder, learning_rat=1e-5, packing="maybe", torch_dtype="float32")
    text = error_of(capsys, "train", recipe, "--zzzz", "1")
    line = recipe.read_text().splitlines().index("learning_rat: 1.0e-05") + 1
    assert f"{recipe}:{line}: unknown key `learning_rat`. Did you mean `learning_rate`?" in text
    assert "`packing`: expected bool, got 'maybe'" in text
    assert "`torch_dtype`: it is called `dtype` now" in text
    assert "--zzzz: unknown key `zzzz`." in text


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"method": "glou"},
            "`method`: 'glou' is none of glow, sft, tool_rlvr, async_tool_rlvr, unlearn, stable_unlearn; did you mean "
            "glow?",
        ),
        ({"method": None}, "`method`"),
        ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
        ({"lora_r": 64}, "`lora_r` does nothing without `use_peft: true`"),
        ({"resume_from_checkpoint": "x"}, "goes on by itself from its last checkpoint"),
        ({"eval_strategy": "steps", "eval_steps": 5}, "evaluate the checkpoints with `afterglow eval`"),
        ({"glow_warmup_epochs": 0}, "`glow_warmup_epochs` must be at least 1"),
        ({"num_train_epochs": 1}, "ends within `glow_warmup_epochs: 1`"),
    ],
)
def test_recipes_that_would_not_do_what_they_say(tmp_path, tiny_folder, capsys, changes, says):
    assert says in error_of(capsys, "train", training_recipe(tmp_path, tiny_folder, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            lambda rows: rows[3].pop("prompt"),
            "data.jsonl:4: no `prompt`; map it with `columns: {prompt: <your",
        ),
        (lambda rows: rows[5].update(id="sample-1"), "data.jsonl:6: id 'sample-1' stands at"),
        (
            lambda rows: rows[7].update(completion=[{"role": "assistant", "content": " "}]),
            "data.jsonl:8: empty completion",
        ),
    ],
)
def test_bad_rows_stop_before_the_model_is_touched(tmp_path, capsys, spoil, says):
    rows = training_rows()
    spoil(rows)
    write_rows(tmp_path / "data.jsonl", rows)
    recipe = training_recipe(tmp_path, tmp_path / "no-such" / "model" / "here")
    assert says in error_of(capsys, "train", recipe)
    assert not (tmp_path / "run").exists()


def test_a_malformed_line_and_a_missing_file(tmp_path, tiny_folder, capsys):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    recipe = training_recipe(tmp_path, tiny_folder)
    assert "data.jsonl:2: not valid JSON" in error_of(capsys, "train", recipe)
    assert "no such file" in error_of(capsys, "train", recipe, "--data", tmp_path / "none.jsonl")


def without(tiny_folder, folder, *names):
    shutil.copytree(tiny_folder, folder)
    for name in names:
        (folder / name).unlink()
    return folder


def test_model_folders_that_lack_something(tmp_path, tiny_folder, capsys):
    def says(folder) -> str:
        return error_of(capsys, "train", training_recipe(tmp_path, folder))

    folder = without(tiny_folder, tmp_path / "no-template", "chat_template.jinja")
    assert f"{folder}: the tokenizer has no chat template" in says(folder)
    assert "no weights" in says(without(tiny_folder, tmp_path / "no-weights", "model.safetensors"))
    assert "no tokenizer" in says(without(tiny_folder, tmp_path / "no-tokenizer", "tokenizer.json"))
    folder = without(tiny_folder, tmp_path / "cut-off")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 of 2 weight files are missing, such as model-2.safetensors" in says(folder)
    folder = without(tiny_folder, tmp_path / "adapter", "config.json")
    (folder / "adapter_config.json").write_text("{}")
    assert "LoRA adapter" in says(folder)
    assert "neither a folder here nor a model of the hub" in says("someone/some-model")
    assert "no such folder" in says(tmp_path / "nothing")
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_and_no_recipe(tmp_path, capsys):
    assert "no such recipe" in error_of(capsys, "filter", tmp_path / "none.yaml")
    assert "which RECIPE?" in error_of(capsys, "eval")
    with pytest.raises(SystemExit):
        cli.main(["tran"])


def test_a_step_that_does_not_exist(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "f.yaml", data="d.jsonl", output_dir="o", steps=[{"branchin": {}}])
    assert "unknown step `branchin`. Did you mean `branching`?" in error_of(capsys, "filter", recipe)


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(options, overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_work", interrupted)
    assert cli.main(["filter", "x.yaml"]) == 130
    assert "Run the same command again to continue" in capsys.readouterr().err


def test_other_processes_say_one_line(capsys, monkeypatch):
    from afterglow.launch.console import print_error

    monkeypatch.setitem(os.environ, "RANK", "3")
    print_error("first\nsecond")
    assert capsys.readouterr().err == "error (process 3): first\n"
