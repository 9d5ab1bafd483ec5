"""The plan of a training that writes its own completions: prompts and rollouts per step, and the first prompts."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from ..core.tool_protocol import ToolProtocol, open_protocol
from .console import print_table
from .processes import Setup

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

EXAMPLES, EXAMPLE_CHARACTERS = 2, 2400


def show_rollouts(
    console: Console, table: "Dataset", args: Any, setup: Setup, tokenizer: "PreTrainedTokenizerBase | None"
) -> None:
    """Print the batch arithmetic and the first prompts as the model will see them.

    Raises:
        ModelError: the chat template cannot render what the tool protocol needs.
    """
    streamed = hasattr(args, "max_staleness")
    print_table("batches", (streamed_rows if streamed else rollout_rows)(len(table), args, setup))
    if tokenizer is None:
        return
    protocols: dict[bool, ToolProtocol] = {False: open_protocol(None, tokenizer, None, args.chat_template_kwargs)}
    if args.tools == "python":
        protocols[True] = open_protocol(args.tool_protocol, tokenizer, None, args.chat_template_kwargs)
    for number in range(min(EXAMPLES, len(table))):
        row: dict[str, Any] = table[number]
        with_tools = args.tools == "python" and ("tools" not in row or bool(row["tools"]))
        ids = protocols[with_tools].encode(row["prompt"])
        text = str(tokenizer.decode(ids))
        if len(text) > EXAMPLE_CHARACTERS:
            half = EXAMPLE_CHARACTERS // 2
            text = f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
        title = (
            f"{row['id']}: {len(ids):,} tokens, {'with' if with_tools else 'without'} the tool, gold {row['answer']}"
        )
        console.print(Panel(Text(text), title=title, title_align="left"))


def rollout_rows(prompts: int, args: Any, setup: Setup) -> dict[str, Any]:
    """Work out batches and steps, as TRL will."""
    group, per_generation, processes = args.num_generations, args.steps_per_generation, setup.processes
    rollouts = args.per_device_train_batch_size * per_generation * processes
    per_batch = rollouts // group
    updates = per_generation * args.num_iterations / args.gradient_accumulation_steps  # steps of a generation batch
    steps = int(prompts // per_batch * updates)
    steps_in_all = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * steps)
    sampled = " (twice as many are sampled)" if args.resample_on_correct else ""
    return {
        "prompts": prompts,
        "processes": f"{processes} ({setup.name})",
        "generation batch": f"{args.per_device_train_batch_size} per device x {per_generation} x {processes} = "
        f"{rollouts} rollouts = {per_batch} prompts x {group}{sampled}",
        "steps": f"{steps:,} per pass over the prompts, {steps_in_all:,} in all; {updates:g} per generation batch",
        "tokens of a rollout": f"at most {args.max_completion_length:,}, results of the tool included",
        "engine": ("vLLM, " + args.vllm_mode) if args.use_vllm else "transformers (slow: for small models)",
    }


def streamed_rows(prompts: int, args: Any, setup: Setup) -> dict[str, Any]:
    """Work out the batch of a training whose rollouts stream from a server."""
    processes, accumulation = setup.processes, args.gradient_accumulation_steps
    batch = f"{args.per_device_train_batch_size} per device x {accumulation} x {processes}"
    rollouts = args.per_device_train_batch_size * accumulation * processes
    by_tokens = (
        "rows of `token_budget` tokens (default: the server's context) take the place of these counts"
        if args.token_budget is None or args.token_budget > 0
        else f"{batch} = {rollouts} rollouts that train, of groups of {args.num_generations}"
    )
    return {
        "prompts": prompts,
        "processes": f"{processes} ({setup.name})",
        "step": by_tokens,
        "steps": f"{args.max_steps:,}; a rollout trains at most {args.max_staleness} updates after it began",
        "tokens of a rollout": f"at most {args.max_completion_length:,}, results of the tool included",
        "engine": f"vLLM server {args.vllm_server_base_url}",
    }
