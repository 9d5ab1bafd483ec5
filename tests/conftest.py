import os
import tempfile

# Before any library reads them: no network, no telemetry, no fight over two cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes on two cores
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported

import pytest
from tiny import save_tiny

# Scores that filters share between runs: none of the user's, none of an earlier session.
_cache = tempfile.TemporaryDirectory(prefix="afterglow-tests-")
os.environ.setdefault("AFTERGLOW_CACHE", _cache.name)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny model with tokenizer and chat template, shared by the whole session (read-only)."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")
