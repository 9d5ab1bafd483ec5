"""What one checkpoint does with given texts and prompts: each measured once, written at once, resumed after a kill."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..core.engine_transformers import TransformersEngine
from ..core.errors import DataError, RunFolderError
from ..core.generation import Engine, EngineConfig, Request, SamplingConfig, open_engine
from ..core.progress import progress
from ..core.run_folder import JsonlLog, RunFolder
from ..core.token_stats import ScoredSequence, TokenStats, body_and_head, plan_batches, score_tokens
from . import membership
from .sampling import put_in_order, sample_seed
from .unlearning_data import Ask, Text
from .unlearning_metrics import exact_memorisation, extraction_strength

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

THINK_END = "</think>"


class Checkpoint:
    """A checkpoint that is loaded when it is first needed: as a model for likelihoods, as an engine for text.

    The `transformers` engine serves both; another engine starts when the model is freed, so that memory holds one.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        self._engine: Engine | None = None

    @property
    def model(self) -> "PreTrainedModel":
        """The model, for forward passes."""
        if not isinstance(self._engine, TransformersEngine):
            self.close()
            self._engine = TransformersEngine(local(self._config))
        return self._engine.model

    @property
    def engine(self) -> Engine:
        """The engine that the recipe names."""
        if self._engine is None or (isinstance(self._engine, TransformersEngine) and self._other_engine):
            self.close()
            self._engine = open_engine(self._config)
        return self._engine

    @property
    def _other_engine(self) -> bool:
        return self._config.engine != "transformers"

    def close(self) -> None:
        """Free whatever is loaded."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def local(config: EngineConfig) -> EngineConfig:
    """Return the same checkpoint in this process under transformers; another engine's own options do not apply."""
    if config.engine == "transformers":
        return config
    return replace(config, engine="transformers", server_url=None, engine_kwargs={}, max_num_seqs=None)


@contextmanager
def opened(config: EngineConfig) -> Iterator[Checkpoint]:
    """Yield a checkpoint, and free it at the end."""
    checkpoint = Checkpoint(config)
    try:
        yield checkpoint
    finally:
        checkpoint.close()


# ---------------------------------------------------------------------------------------------------------------------
# one log per kind of measurement


def measured(
    folder: RunFolder, name: str, keys: Sequence[str], draw: Callable[[JsonlLog, set[str]], None]
) -> dict[str, dict[str, Any]]:
    """Fill a log with one row per key and return the rows by key.

    Args:
        folder: run folder.
        name: file name of the log.
        keys: of the rows, in the order of the finished file.
        draw: appends the rows that are not in the given set of keys.

    Raises:
        RunFolderError: the log has a row that this run does not measure.
    """
    log = folder.log(name)
    done = {row["key"] for row in log.rows()}
    if foreign := done - set(keys):
        raise RunFolderError(
            f"{folder.path / name}: holds {min(foreign)!r}, which this run does not measure: the data has changed "
            "since. Choose another `output_dir`, or pass --overwrite to start again."
        )
    if any(key not in done for key in keys):
        draw(log, done)
    log.close()
    put_in_order(log.path, {key: place for place, key in enumerate(keys)}, lambda row: row["key"])
    log = folder.log(name)
    rows = {row["key"]: row for row in log.rows()}
    log.close()
    return rows


def score_texts(
    folder: RunFolder, name: str, texts: Sequence[Text], checkpoint: Checkpoint, *, token_budget: int, compat: bool
) -> dict[str, dict[str, Any]]:
    """Write likelihood and memorisation of every text in one batched pass over the model (`text_row`)."""
    by_key = {text.key: text for text in texts}

    def draw(log: JsonlLog, done: set[str]) -> None:
        sequences = [ScoredSequence(text.key, text.input_ids, text.scored) for text in texts]
        with progress("score texts", len(texts)) as bar:
            bar.advance(len(done))
            for key, stats in score_tokens(
                checkpoint.model, sequences, token_budget=token_budget, entropy=True, done=done
            ):
                if key not in done:
                    log.append(text_row(by_key[str(key)], stats, compat))
                    bar.advance()

    return measured(folder, name, [text.key for text in texts], draw)


def text_row(text: Text, stats: TokenStats, compat: bool = False) -> dict[str, Any]:
    """Return what the likelihood metrics need of one text; nats per token.

    `nll` is over all scored tokens, the end-of-turn token included; the others look at the text's own tokens.
    """
    words = np.asarray(text.words)[np.asarray(text.scored)]
    nll, hits = stats.nll.numpy(), stats.top_k_hits(1).numpy()[words]
    if stats.entropy is None or stats.varentropy is None:
        raise ValueError("score the texts with entropy=True")
    mean = float(nll.astype(float).mean())
    return {
        "key": text.key,
        "nll": mean,
        "n_tokens": len(nll),
        "extraction_strength": extraction_strength(hits, compat=compat),
        "exact_memorisation": exact_memorisation(hits),
        "zlib": membership.zlib_score(mean, text.text),
        "min_k": membership.min_k_score(nll[words]),
        "min_k++": membership.min_k_plus_score(
            nll[words], stats.entropy.numpy()[words], stats.varentropy.numpy()[words]
        ),
    }


def gradient_norms(
    folder: RunFolder, name: str, texts: Sequence[Text], checkpoint: Checkpoint
) -> dict[str, dict[str, Any]]:
    """Write the gradient norm of every text: one backward pass each."""

    def draw(log: JsonlLog, done: set[str]) -> None:
        model = checkpoint.model
        device = model.device
        with progress("gradient norms", len(texts)) as bar, torch.enable_grad():
            bar.advance(len(done))
            for text in texts:
                if text.key in done:
                    continue
                ids = torch.as_tensor(text.input_ids.astype(np.int64), device=device)
                labels = torch.where(torch.as_tensor(text.scored, device=device), ids, -100)
                log.append({"key": text.key, "gradnorm": membership.gradient_norm(model, ids, labels)})
                bar.advance()

    return measured(folder, name, [text.key for text in texts], draw)


def generate(
    folder: RunFolder,
    name: str,
    asks: Sequence[Ask],
    checkpoint: Checkpoint,
    sampling: SamplingConfig,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Write what the model says to every prompt; `text` is what follows its thoughts."""

    def draw(log: JsonlLog, done: set[str]) -> None:
        todo = [ask for ask in asks if ask.key not in done]
        requests = [
            Request(
                ask.key,
                ask.prompt_ids,
                sample_seed(seed, name, ask.key, 0),
                replace(sampling, max_tokens=ask.max_tokens),
            )
            for ask in todo
        ]
        with progress("generate", len(asks)) as bar:
            bar.advance(len(done))
            for completion in checkpoint.engine.generate(requests):
                text = completion.text.rpartition(THINK_END)[2].strip()
                log.append({"key": completion.key, "text": text, "finish_reason": completion.finish_reason})
                bar.advance()

    return measured(folder, name, [ask.key for ask in asks], draw)


# ---------------------------------------------------------------------------------------------------------------------
# multiple choice


def letter_context(tokenizer: "PreTrainedTokenizerBase", prompt: str, letters: str) -> tuple[list[int], list[int]]:
    """Return the tokens after which the letters of a multiple-choice answer part, and the token of each letter.

    `prompt` + " A" is tokenized as one text per letter, since some vocabularies join the blank with the letter and
    others do not.

    Raises:
        DataError: this vocabulary does not tell the letters apart by one token.
    """
    rows = [list(tokenizer(f"{prompt} {letter}", verbose=False)["input_ids"]) for letter in letters]
    shared = next((i for i, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), 0)
    tokens = [row[shared] for row in rows if len(row) > shared]
    if shared == 0 or len(set(tokens)) < len(letters):
        raise DataError(f"the tokenizer {tokenizer.name_or_path} has no token of its own for each of {letters}")
    return rows[0][:shared], tokens


@torch.no_grad()
def letter_logits(
    model: "PreTrainedModel", contexts: Sequence[Sequence[int]], letters: Sequence[Sequence[int]], token_budget: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, logits of its letters) for every context: one forward pass, logits of the last position only.

    Args:
        model: a causal language model.
        contexts: token ids that precede the letter.
        letters: token ids of the letters of each context.
        token_budget: most tokens of one batch, padding included.
    """
    body, head = body_and_head(model)
    device = body.get_input_embeddings().weight.device  # pyright: ignore[reportCallIssue]
    for batch in plan_batches([len(context) for context in contexts], token_budget):
        width = max(len(contexts[i]) for i in batch)
        # Padding on the right changes nothing before it under causal attention.
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : len(contexts[i])] = torch.tensor(contexts[i])
        hidden = body(input_ids=ids.to(device), use_cache=False).last_hidden_state
        last = torch.tensor([len(contexts[i]) - 1 for i in batch], device=hidden.device)
        logits = head.logits(hidden[torch.arange(len(batch), device=hidden.device), last].to(head.weight.device)).cpu()
        for row, i in enumerate(batch):
            yield i, logits[row, torch.tensor(letters[i])].double().numpy()


def answer_choices(
    folder: RunFolder,
    name: str,
    prompts: Mapping[str, str],
    letters: str,
    checkpoint: Checkpoint,
    tokenizer: "PreTrainedTokenizerBase",
    token_budget: int,
) -> dict[str, dict[str, Any]]:
    """Write the probability of each letter, among the letters, after every prompt."""
    keys = list(prompts)

    def draw(log: JsonlLog, done: set[str]) -> None:
        encoded = [letter_context(tokenizer, prompts[key], letters) for key in keys]
        with progress("answer questions", len(keys)) as bar:
            bar.advance(len(done))
            contexts, tokens = [context for context, _ in encoded], [found for _, found in encoded]
            for i, logits in letter_logits(checkpoint.model, contexts, tokens, token_budget):
                if keys[i] not in done:
                    weights = np.exp(logits - logits.max())
                    log.append({"key": keys[i], "probabilities": (weights / weights.sum()).tolist()})
                    bar.advance()

    return measured(folder, name, keys, draw)
