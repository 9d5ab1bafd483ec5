"""Small unlearning runs that several tests share."""

import transformers
from peft import LoraConfig
from tiny import tiny_model
from tiny_sft import TOKENIZER, chats, settings

from afterglow.trainers.stable_unlearning import StableUnlearnConfig, StableUnlearnTrainer
from afterglow.trainers.unlearning import UnlearnConfig, UnlearnTrainer

GENTLE = {"learning_rate": 1e-3, "max_grad_norm": 1e9}  # summed log-probabilities have gradients of a hundred


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def unlearn(folder, *, forget=None, retain=None, model=None, peft_config=None, callbacks=None, **changes):
    """An `UnlearnTrainer`, or a `StableUnlearnTrainer` where a key of it is given: 10 rows to forget, 13 to keep."""
    transformers.logging.set_verbosity_error()
    stable = "perturbation" in changes
    config, trainer = (StableUnlearnConfig, StableUnlearnTrainer) if stable else (UnlearnConfig, UnlearnTrainer)
    return trainer(
        model or tiny_model(),
        config(**settings(folder, **GENTLE | changes)),
        chats(10) if forget is None else forget,
        chats(13, start=100) if retain is None else retain,
        processing_class=TOKENIZER,
        peft_config=peft_config,
        callbacks=callbacks,
    )
