"""Errors a user can cause. Each says what is wrong, where (file, key, row), and how to mend it.

One root, so that the command line prints any of them as one clear message without a traceback; each child is
also the builtin it stands for, so that library users catch what they expect.
"""


class AfterglowError(Exception):
    """Root of every error that the user can mend."""


class RecipeError(AfterglowError, ValueError):
    """A recipe key or value is wrong."""


class DataError(AfterglowError, ValueError):
    """A data file, or one of its rows, is wrong."""


class RunFolderError(AfterglowError, FileExistsError):
    """An output folder holds something else than what this run would continue."""


class ModelError(AfterglowError, ValueError):
    """A model folder lacks something that the stage needs (weights, tokenizer, chat template)."""


class MissingDependencyError(AfterglowError, ImportError):
    """An optional package is not installed, or has an unsupported version."""


class GenerationError(AfterglowError, RuntimeError):
    """An engine could not generate: a server that does not answer, a prompt longer than the model's context."""


class SandboxError(AfterglowError, RuntimeError):
    """No isolated Python can run here, or the sandbox service does not answer."""


class CollapseError(AfterglowError, RuntimeError):
    """A training was stopped because its policy collapsed."""
