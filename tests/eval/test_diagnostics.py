import json

import numpy as np
import pytest
import torch
import yaml
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from afterglow.core.errors import AfterglowError, DataError, RecipeError
from afterglow.core.recipe import read_recipe
from afterglow.core.routing import find_routers
from afterglow.eval import diagnostics
from afterglow.eval.diagnostics import DiagnosticsConfig, diagnose, encode
from afterglow.eval.evaluate import run
from afterglow.eval.geometry import RunningCovariance, describe_geometry
from afterglow.eval.pathways import consistency, mean_distance, pathway
from afterglow.eval.proxy_metrics import NAMES, ExpertTokens, proxy_metrics
from afterglow.eval.report import run_report

ROWS = [
    {"prompt": f"What is {i} + {i}?" + " Think." * (i % 4), "completion": f"Twice {i} is {2 * i}." + " So." * (i % 3)}
    for i in range(12)
]


def config(**keys):
    base = {"output_dir": "out", "suite": "diagnostics", "checkpoints": ["x"], "data": "x"}
    return DiagnosticsConfig(**base | keys)


def moe():
    torch.manual_seed(0)
    settings = Qwen3MoeConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=6, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=1024, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(settings).float().eval()


@torch.no_grad()
def plain(model, sequences, geometry_at=None, pairs=500):
    """The same row from whole logits, one sequence at a time."""
    experts, covariance, ways, smooth, seen = [], RunningCovariance(model.config.hidden_size), [], [], []
    routers = find_routers(model)
    hooks = [router.register_forward_hook(lambda m, a, o: seen.append(o[0].softmax(-1))) for router in routers]
    for sequence in sequences:
        places = np.flatnonzero(sequence.scored)
        seen.clear()
        out = model(input_ids=torch.tensor(sequence.input_ids[: places[-1]])[None].long(), output_hidden_states=True)
        ids = np.asarray(sequence.input_ids)[places]
        log_p = out.logits[0, torch.tensor(places - 1)].log_softmax(-1)
        own = log_p.gather(1, torch.tensor(ids)[:, None].long())
        experts.append(
            ExpertTokens(
                ids, -own[:, 0].numpy(), -(log_p.exp() * log_p).sum(-1).numpy(), 1 + (log_p > own).sum(1).numpy(),
                log_p.exp().amax(1).numpy(),
            )
        )  # fmt: skip
        at = geometry_at or places[-1]
        if at <= places[-1]:
            covariance.add(out.hidden_states[-1][0, at - 1][None])
        if routers:
            probabilities = np.stack([layer.mean(0).numpy() for layer in seen])
            ways.append(pathway(probabilities, 2))
            smooth.append(consistency(probabilities, [router.weight.detach().numpy() for router in routers], 2))
    for hook in hooks:
        hook.remove()
    found = describe_geometry(covariance) | proxy_metrics(experts, model.config.vocab_size)
    if routers:
        found |= {"pathway_distance": mean_distance(ways, pairs, 0), "pathway_consistency": np.mean(smooth)}
    return found


@pytest.mark.parametrize("make, budget", [(tiny_model, 4096), (tiny_model, 150), (moe, 4096), (moe, 150)])
def test_one_pass_equals_whole_logits_one_by_one(make, budget):
    model = make()
    sequences = encode(config(), tiny_tokenizer(), ROWS)
    found = diagnose(model, sequences, config(token_budget=budget))
    for key, value in plain(model, sequences).items():
        if value is None:
            assert found[key] is None, key
        else:
            assert found[key] == pytest.approx(float(value), rel=2e-3, abs=1e-5), key
    assert found["trajectories"] == found["sequences"] == 12 and set(NAMES) <= found.keys()
    assert ("pathway_distance" in found) == (make is moe)
    if make is moe:
        assert 0 < found["pathway_distance"] < 1
        hooks = [hook for router in find_routers(model) for hook in router._forward_hooks.values()]
        assert not any("afterglow" in str(getattr(hook, "__module__", "")) for hook in hooks)  # nothing stays behind


def test_only_the_last_expert_tokens_are_scored_and_the_feature_can_be_any_token():
    tokenizer = tiny_tokenizer()
    every, last = encode(config(), tokenizer, ROWS), encode(config(last_tokens=5), tokenizer, ROWS)
    for whole, part in zip(every, last, strict=True):
        assert np.flatnonzero(part.scored).tolist() == np.flatnonzero(whole.scored)[-5:].tolist()
        assert tokenizer.decode(whole.input_ids[whole.scored]).startswith("Twice")
    model = tiny_model()
    at = 30
    found = diagnose(model, every, config(geometry_at=at))
    assert found["rankme_cov"] == pytest.approx(plain(model, every, at)["rankme_cov"], rel=1e-3)
    cut = encode(config(max_length=70), tokenizer, ROWS)
    assert max(len(sequence.input_ids) for sequence in cut) == 70
    with pytest.raises(DataError, match="geometry_at is 9000"):
        diagnose(model, every, config(geometry_at=9000))
    with pytest.raises(DataError, match="row 1: no token of the assistant"):
        encode(config(max_length=10), tokenizer, ROWS)


@pytest.fixture
def world(tmp_path):
    for step in (2, 10):
        save_tiny(tmp_path / "train" / f"checkpoint-{step}", seed=step)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def recipe(**keys):
        base = {
            "suite": "diagnostics", "output_dir": str(tmp_path / "out"), "data": str(tmp_path / "data.jsonl"),
            "checkpoints": [str(tmp_path / "train" / "checkpoint-*")],
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(base | keys))
        return read_recipe(tmp_path / "recipe.yaml")

    return recipe


def test_a_killed_run_goes_on_and_ends_the_same(world, tmp_path, monkeypatch, capsys):
    out = run(world())
    text = (out / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["key"], row["step"]) for row in rows] == [("checkpoint-2", 2), ("checkpoint-10", 10)]
    assert rows[0]["nll/uniform"] != rows[1]["nll/uniform"] and not rows[0]["enough"]
    assert "Fewer than four sequences per dimension" in capsys.readouterr().out
    page = run_report(out).read_text()
    assert 'id="diagnostics"' in page and 'aria-label="RankMe"' in page and "rankme cov" in page

    real, calls = diagnostics.diagnose, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(diagnostics, "diagnose", dies)
    again = {"output_dir": str(tmp_path / "again")}
    with pytest.raises(KeyboardInterrupt):
        run(world(**again))
    run(world(**again))
    assert len(calls) == 3 and (tmp_path / "again" / "rows.jsonl").read_text() == text
    run(world(**again))  # finished
    assert len(calls) == 3


def test_refusals_and_dry_run(world, tmp_path, capsys):
    for keys, error, message in (
        ({"checkpoints": [str(tmp_path / "none-*")]}, RecipeError, "no folder matches"),
        ({"last_tokens": 0}, RecipeError, "last_tokens is 0"),
        ({"columns": {"completion": "x"}, "data": str(tmp_path / "other.jsonl")}, DataError, "completion"),
    ):
        (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n')
        with pytest.raises(error, match=message):
            run(world(**keys))
    run(world(), dry_run=True)
    assert "2 checkpoints, 12 trajectories" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    with pytest.raises(AfterglowError):
        run(world(checkpoints=[str(tmp_path / "nothing")]))
