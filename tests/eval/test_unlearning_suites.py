import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from unlearning_world import PEOPLE, fact, write_recipe, write_rows, write_sets

from afterglow.core.engine_transformers import TransformersEngine
from afterglow.core.errors import DataError, ModelError, RecipeError, RunFolderError
from afterglow.core.generation import EngineConfig
from afterglow.core.recipe import read_recipe
from afterglow.eval import unlearning_measure
from afterglow.eval.evaluate import run
from afterglow.eval.unlearning_data import encode_answer, encode_text, read_set
from afterglow.eval.unlearning_measure import letter_context


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tofu")
    return folder, write_sets(folder)


@pytest.fixture
def recipe(tmp_path, tiny_folder, world):
    """Write a tofu recipe; keyword arguments change it."""

    def write(name="run", **changes):
        keys = {
            "suite": "tofu", "model": str(tiny_folder), "engine": "transformers", "max_tokens": 6, "retrained": "none",
            "output_dir": str(tmp_path / name), **world[1],
        }  # fmt: skip
        return write_recipe(tmp_path / f"{name}.yaml", **(keys | changes))

    return write


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder, world):
    """A retrained model's run with all six attacks, and a run that is compared with it (the same weights)."""
    folder = tmp_path_factory.mktemp("runs")
    keys = {"suite": "tofu", "model": str(tiny_folder), "engine": "transformers", "max_tokens": 6, **world[1]}
    keys |= {
        "attacks": ["loss", "zlib", "min_k", "min_k++", "reference", "gradnorm"], "reference_model": str(tiny_folder)
    }  # fmt: skip
    control = run(
        read_recipe(write_recipe(folder / "c.yaml", **keys, retrained="none", output_dir=str(folder / "control")))
    )
    other = run(
        read_recipe(write_recipe(folder / "o.yaml", **keys, retrained=str(control), output_dir=str(folder / "other")))
    )
    return control, other


def test_tofu_end_to_end(finished, tiny_folder, world):
    control, other = finished
    scores = json.loads((other / "scores.json").read_text())["tofu"]
    assert scores["forget_quality"]["value"] == 1 and scores["forget_ks_distance"]["value"] == 0, "the same model"
    assert scores["privleak"]["value"] == 0 and scores["privleak"]["low"] < 0 < scores["privleak"]["high"]
    assert "forget_quality" not in json.loads((control / "scores.json").read_text())["tofu"]
    assert scores["n"] == {"forget": 6, "retain": 6, "real_authors": 4, "world_facts": 3, "holdout": 6}
    assert scores["mia_reference_auc"]["value"] == 0.5, "its own reference: every score is 0, every pair a tie"
    for name, found in scores.items():
        if isinstance(found, dict) and "value" in found:
            assert found["low"] <= found["value"] <= found["high"], name
    parts = [
        scores[f"{s}_{part}"]["value"]
        for s in ("retain", "real_authors", "world_facts")
        for part in ("probability", "rouge_l", "truth_ratio")
    ]
    expected = 0 if 0 in parts else 9 / sum(1 / part for part in parts)
    assert scores["model_utility"]["value"] == pytest.approx(expected)
    assert scores["model_utility"]["method"] == "bootstrap over questions"

    # Likelihoods, hits and gradient norms against a plain forward pass of one row.
    row = next(row for row in read(other / "rows.jsonl") if row["set"] == "forget" and row["row"] == 2)
    engine = TransformersEngine(EngineConfig(model=str(tiny_folder), engine="transformers", dtype="float32"))
    text = encode_answer(engine.tokenizer, "x", fact("Cy", 2)["question"], fact("Cy", 2)["answer"])
    assert engine.tokenizer.decode(text.input_ids[text.scored]) == "Cy was born in town 2.<|im_end|>"
    assert engine.tokenizer.decode(text.input_ids[text.words]) == "Cy was born in town 2."
    ids = torch.tensor(text.input_ids.astype(np.int64))
    labels = torch.where(torch.tensor(text.scored), ids, -100)
    out = engine.model(input_ids=ids[None], labels=labels[None])
    assert row["nll"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert row["probability"] == pytest.approx(math.exp(-out.loss.item()), rel=1e-5)
    hits = (out.logits[0, :-1].argmax(-1) == ids[1:])[torch.tensor(text.words)[1:]]
    assert row["exact_memorisation"] == pytest.approx(hits.float().mean().item())
    out.loss.backward()
    norms = [p.grad.norm().item() for p in engine.model.parameters() if p.grad is not None]
    assert row["membership"]["gradnorm"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert set(row["membership"]) == {"loss", "zlib", "min_k", "min_k++", "reference", "gradnorm"}
    mine = [
        read(other / "token_scores.jsonl")[i] for i, r in enumerate(read(other / "token_scores.jsonl"))
        if r["key"].startswith("forget/2/")
    ]  # fmt: skip
    nll = {r["key"].removeprefix("forget/2/"): r["nll"] for r in mine}
    assert row["truth_ratio"] == pytest.approx(math.exp(nll["paraphrase"] - (nll["wrong/0"] + nll["wrong/1"]) / 2))


def test_killed_at_any_place_ends_the_same(recipe, tmp_path, monkeypatch):
    """Logs cut anywhere, rows in any order, half a line: the same bytes, and only what is missing is measured."""
    path = recipe("killed", attacks=["loss", "min_k", "gradnorm"])
    folder = run(read_recipe(path))
    logs = ("token_scores.jsonl", "gradient_norms.jsonl", "generations.jsonl")
    files = (*logs, "rows.jsonl", "scores.json")
    whole = {name: (folder / name).read_bytes() for name in files}
    rng = random.Random(1)
    for name in logs:
        lines = whole[name].splitlines(keepends=True)
        rng.shuffle(lines)
        (folder / name).write_bytes(b"".join(lines[: len(lines) // 2]) + b'{"key": "fo')
    for name in ("rows.jsonl", "scores.json"):
        (folder / name).unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    run(read_recipe(path))
    assert {name: (folder / name).read_bytes() for name in files} == whole

    monkeypatch.setattr(unlearning_measure, "TransformersEngine", None)  # a finished folder loads nothing
    run(read_recipe(path))
    with pytest.raises(RunFolderError, match=r"`max_tokens` was 6, is 7"):
        run(read_recipe(path, ["--max_tokens", "7"]))


def test_missing_retrained_run_is_an_error_that_says_how_to_make_it(recipe, finished, tmp_path):
    with pytest.raises(RecipeError, match="`retrained` is missing"):
        run(read_recipe(recipe(retrained=None)))
    with pytest.raises(RecipeError, match=r"nowhere/rows.jsonl is not there. Make it first: .*--retrained none"):
        run(read_recipe(recipe(retrained=str(tmp_path / "nowhere"))))
    control, _ = finished
    shorter = recipe(retrained=str(control), forget=str(write_rows(tmp_path / "f.jsonl", [fact("Zoe", 1)] * 2)))
    with pytest.raises(DataError, match="was asked other questions: 2 of 2 rows"):
        run(read_recipe(shorter))


def test_hostile_rows_and_recipes_are_refused_before_a_model_is_loaded(recipe, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(unlearning_measure, "TransformersEngine", None)
    rows = [fact(name, i) for i, name in enumerate(PEOPLE)]
    rows[1]["answer"], rows[2]["perturbed_answer"], rows[3]["paraphrased_answer"] = " ", [], None
    del rows[4]["question"]
    bad = str(write_rows(tmp_path / "bad.jsonl", rows))
    with pytest.raises(DataError) as caught:
        run(read_recipe(recipe(forget=bad)))
    for part in (
        "`forget`: 4 of 6", "bad.jsonl:2: `answer` is empty", "bad.jsonl:3: `perturbed_answer` is empty",
        "bad.jsonl:4: `paraphrased_answer` is empty", "bad.jsonl:5: `question` is not there", "columns:",
    ):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(RecipeError, match=r"'tofuu' is none of tofu, muse, wmdp, .*; did you mean tofu\?"):
        run(read_recipe(recipe(suite="tofuu")))
    with pytest.raises(RecipeError, match=r"unknown key `forgot`. Did you mean `forget`\?"):
        run(read_recipe(recipe(forgot="x")))
    with pytest.raises(RecipeError, match="attacks names 'lose', which is none of loss"):
        run(read_recipe(recipe(attacks=["lose"])))
    with pytest.raises(RecipeError, match="`reference` and the key reference_model need each other"):
        run(read_recipe(recipe(attacks=["reference"])))
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        run(read_recipe(recipe(model=str(bare))))
    with pytest.raises(DataError, match=r"empty.jsonl has no row"):
        read_set(str(write_rows(tmp_path / "empty.jsonl", [])), "forget", ("question",), {})
    assert not (tmp_path / "run").exists()


def test_columns_trajectories_and_fewer_utility_sets(recipe, tmp_path):
    """Foreign column names, rows that are trajectories, and a utility that says over how much it is."""
    rows = [
        {"q": row["question"], **{k: v for k, v in row.items() if k != "question"}} for row in map(fact, "AB", (1, 2))
    ]
    rows[0]["q"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": rows[0]["q"]}]
    rows[0]["answer"] = [{"role": "assistant", "content": rows[0]["answer"]}]
    path = recipe(
        forget=str(write_rows(tmp_path / "q.jsonl", rows)), columns={"question": "q"},
        real_authors="null", world_facts="null", holdout=None,
    )  # fmt: skip
    folder = run(read_recipe(path))
    scores = json.loads((folder / "scores.json").read_text())["tofu"]
    assert scores["model_utility"]["method"].endswith("harmonic mean of 3 parts, not TOFU's 9")
    assert not any(name.startswith("mia_") for name in scores)
    assert json.loads((folder / "rows.jsonl").read_text().splitlines()[0])["gold"] == "A was born in town 1."


def test_quantised_weights_are_another_model(recipe, finished, tiny_folder):
    folder = run(read_recipe(recipe("q", quantise="int4", attacks=["loss"])))
    stored = read(folder / "token_scores.jsonl")
    plain = {row["key"]: row["nll"] for row in read(finished[0] / "token_scores.jsonl")}
    assert max(abs(row["nll"] - plain[row["key"]]) for row in stored) > 1e-4
    assert (folder / "quantised" / "tokenizer.json").is_file()


def test_memorisation_suite(recipe, tiny_folder, world, tmp_path):
    texts = write_rows(tmp_path / "t.jsonl", [{"text": f"The {name} of the sea." * 3} for name in PEOPLE])
    keys = {"suite": "memorisation", "forget": str(texts), "retain": world[1]["retain"], "holdout": world[1]["holdout"]}
    keys |= {"real_authors": None, "world_facts": None, "max_tokens": None, "max_length": 20}
    folder = run(read_recipe(recipe(**keys)))
    scores = json.loads((folder / "scores.json").read_text())["memorisation"]
    assert list(scores)[:6] == [
        f"{name}_{metric}" for name in ("retain", "forget")
        for metric in ("probability", "extraction_strength", "exact_memorisation")
    ]  # fmt: skip
    assert {row["n_tokens"] for row in read(folder / "rows.jsonl") if row["set"] == "forget"} == {19}
    assert 0 <= scores["mia_loss_auc"]["value"] <= 1


def test_muse_suite(recipe, tiny_folder, tmp_path):
    qa = [{"question": f"Who is {name}?", "answer": name} for name in PEOPLE]
    sets = {
        "verbmem": [{"prompt": f"{name} went to", "gt": "the sea, and the sea was wide. " * 9} for name in PEOPLE],
        "knowmem_forget": qa, "knowmem_forget_icl": qa[:2], "knowmem_retain": qa, "knowmem_retain_icl": qa[2:4],
        "members": [{"text": f"{name} of the hills"} for name in PEOPLE],
        "holdout": [{"text": f"{name} of the valley"} for name in PEOPLE],
    }  # fmt: skip
    keys = {name: str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in sets.items()}
    unused = dict.fromkeys(("forget", "retain", "real_authors", "world_facts", "max_tokens"))
    folder = run(read_recipe(recipe(suite="muse", **unused, **keys)))
    scores = json.loads((folder / "scores.json").read_text())["muse"]
    assert list(scores)[:3] == ["knowmem_retain", "knowmem_forget", "verbmem_forget"] and "privleak" not in scores
    row = read(folder / "rows.jsonl")[0]
    assert len(row["gold"]) == 128, "one byte is one token here"
    compared = run(
        read_recipe(
            recipe(
                "two",
                suite="muse",
                **unused,
                **keys,
            ),
            ["--retrained", str(folder)],
        )
    )
    assert json.loads((compared / "scores.json").read_text())["muse"]["privleak"]["value"] == 0


def test_wmdp_suite_reads_the_letter_that_follows(recipe, tiny_folder, tmp_path):
    rows = [
        {
            "question": f"Which is {i}?",
            "choices": ["a", "b", "c", "d"],
            "answer": i % 4,
            "domain": "bio" if i < 5 else "x",
        }
        for i in range(8)
    ]
    unused = dict.fromkeys(("forget", "retain", "real_authors", "world_facts", "holdout", "retrained", "max_tokens"))
    keys = {"suite": "wmdp", "questions": [str(write_rows(tmp_path / "mcq.jsonl", rows))], **unused}
    folder = run(read_recipe(recipe(**keys, token_budget=300)))
    found = read(folder / "rows.jsonl")
    assert "Which is" not in (folder / "rows.jsonl").read_text() + (folder / "choices.jsonl").read_text()
    scores = json.loads((folder / "scores.json").read_text())["wmdp"]
    assert scores["n"] == {"bio": 5, "x": 3}
    assert scores["bio_accuracy"]["value"] == sum(row["correct"] for row in found[:5]) / 5

    engine = TransformersEngine(EngineConfig(model=str(tiny_folder), engine="transformers", dtype="float32"))
    prompt = (
        "The following are multiple choice questions (with answers) about biology.\n\nWhich is 3?\n"
        "A. a\nB. b\nC. c\nD. d\nAnswer:"
    )
    ids = engine.tokenizer(prompt + " ")["input_ids"]  # this vocabulary writes the blank apart
    logits = engine.model(input_ids=torch.tensor([ids])).logits[0, -1]
    letters = [engine.tokenizer(letter)["input_ids"][0] for letter in "ABCD"]
    expected = logits[letters].softmax(0).tolist()
    assert read(folder / "choices.jsonl")[3]["probabilities"] == pytest.approx(expected, rel=1e-4)
    assert letter_context(engine.tokenizer, prompt, "ABCD") == (ids, letters)

    rows[2]["answer"] = "C"
    write_rows(tmp_path / "mcq.jsonl", rows)
    with pytest.raises(DataError, match=r"row 3: `answer` is 'C': use a whole number from 0 to 3"):
        run(read_recipe(recipe("bad", **keys)))


def test_dry_run_writes_nothing(recipe, tmp_path, capsys):
    run(read_recipe(recipe()), dry_run=True)
    out = capsys.readouterr().out
    assert "answers to generate" in out.replace("\n", " ") and "Nothing was written." in out
    assert not (tmp_path / "run").exists()


def test_texts_too_short_to_score(tiny_folder):
    engine = TransformersEngine(EngineConfig(model=str(tiny_folder), engine="transformers", dtype="float32"))
    with pytest.raises(DataError, match="has 1 token"):
        encode_text(engine.tokenizer, "forget/0", "x", 100)
