"""The student of RSR: what its scores depend on, how it reads a trajectory, and a check of both before work starts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from ..core.chat_encoding import EncodedChat, encode_chat
from ..core.errors import DataError, ModelError
from ..core.fingerprint import MODEL_FILES, fingerprint
from ..core.token_stats import ScoredSequence
from ..core.trajectory import content_hash
from .quality_baselines import local_windows, sentence_starts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORING = 1
"""Raise it when the same trajectory gets another score: older ones in the cache then no longer count."""


@dataclass(frozen=True)
class Scoring:
    """What a score depends on, apart from the trajectory.

    Attributes:
        model: Model folder or hub id.
        backend: `transformers` or `vllm`.
        dtype: Of the forward pass.
        r_max: Ranks above it count as it.
        max_length: Tokens of a trajectory, or of the model's context if that is shorter.
        include_eos: Score the token that ends a turn.
        baselines: Also measure entropy and local surprisal.
    """

    model: str
    backend: Literal["transformers", "vllm"]
    dtype: Literal["bfloat16", "float16", "float32"]
    r_max: int
    max_length: int
    include_eos: bool
    baselines: bool


class Student:
    """A model's tokenizer and configuration: all that is needed to encode trajectories and to name their scores.

    Raises:
        ModelError: There is no such model, or it lacks a chat template, weights or a fast tokenizer.
    """

    def __init__(self, scoring: Scoring):
        from transformers import AutoConfig, AutoTokenizer

        name = scoring.model
        try:
            config = AutoConfig.from_pretrained(name)
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"cannot load `model: {name}`: {error}") from error
        if not self.tokenizer.chat_template:
            raise ModelError(f"`model: {name}` has no chat template; save it with the one it is trained with")
        if not self.tokenizer.is_fast:
            raise ModelError(f"`model: {name}`: its tokenizer gives no character offsets; a fast one is needed")
        if Path(name).is_dir() and not any(any(Path(name).glob(weights)) for weights in MODEL_FILES[:2]):
            raise ModelError(f"`model: {name}` holds no weights ({' or '.join(MODEL_FILES[:2])})")
        self.scoring = scoring
        context = getattr(config.get_text_config(), "max_position_embeddings", None) or scoring.max_length
        room = 1 if scoring.backend == "vllm" else 0  # vLLM always generates a token
        self.max_length = min(scoring.max_length, context - room)
        self._commit = getattr(config, "_commit_hash", None)

    @property
    def key(self) -> str:
        """Name of everything that a score depends on: model, tokenizer, chat template and settings."""
        settings = {name: value for name, value in vars(self.scoring).items() if name not in ("model", "max_length")}
        vocabulary = cast("Any", self.tokenizer).backend_tokenizer.to_str()
        model = fingerprint(self.scoring.model), self._commit
        return content_hash(SCORING, model, vocabulary, self.tokenizer.chat_template, settings, self.max_length)

    def encode(self, row: dict[str, Any]) -> EncodedChat:
        """Return a trajectory as the student reads it.

        Raises:
            DataError: The chat template does not render it.
        """
        tools = row.get("tools")
        return encode_chat(
            self.tokenizer,
            row["prompt"],
            row["completion"],
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            max_length=self.max_length,
            include_end_token=self.scoring.include_eos,
        )

    def check(self, rows: Any) -> None:
        """Encode the first trajectory.

        Raises:
            DataError: The chat template does not render it.
        """
        for row in rows:
            try:
                self.encode(row)
            except DataError as error:
                raise DataError(f"trajectory {row['id']}: {error}") from error
            return

    def local_sequences(self, key: str, chat: EncodedChat) -> list[ScoredSequence]:
        """Return the passes of a local surprisal: each sentence after the few before it, and nothing else.

        Sentences are those of the scored text. One that begins the sequence loses its first token, which has no
        context.
        """
        positions = np.flatnonzero(chat.assistant)
        ids = chat.input_ids[positions]
        sequences = []
        for n, (first, own, last) in enumerate(local_windows(len(ids), self._sentence_tokens(ids))):
            scored = np.arange(first, last) >= max(own, first + 1)
            sequences.append(ScoredSequence((key, n), ids[first:last], scored))
        return sequences

    def _sentence_tokens(self, ids: np.ndarray) -> list[int]:
        """Return the tokens at which sentences begin: a token belongs to the sentence of its last character."""
        pieces = cast("list[str]", [self.tokenizer.decode([int(i)]) for i in ids])
        ends = np.cumsum([len(piece) for piece in pieces])
        starts = sentence_starts("".join(pieces))
        return [int(np.searchsorted(ends, start, side="right")) for start in starts]
