"""What a finished training ends with: a sample of the model's text, what its figures mean, the next commands."""

import shlex
from pathlib import Path

from swamla import distributed
from swamla.checkpoint import load
from swamla.cli.console import Console, harmless, program, say, say_wrapped
from swamla.cli.runs import summarize
from swamla.data.dataset import Dataset, TrainingData
from swamla.data.task_rows import TaskDataset
from swamla.data.tokenizer import Tokenizer
from swamla.evaluate.recall_grid import KNOWN, steps_to
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.text import generate_text
from swamla.train import RunConfig, TrainState
from swamla.train.changes import extension
from swamla.train.tracking.metrics import read_metrics

SAMPLE_TOKENS = 120
_OPENING = 24  # characters of held-out text that a sample continues
# A run bounded by time saw few tokens below both: 20 per parameter (arXiv 2203.15556), and 4 epochs, up to which
# repeated text is worth nearly as much as new text (arXiv 2305.16264).
_TOKENS_PER_PARAMETER, _EPOCHS = 20, 4


def opening(dataset: Dataset) -> str:
    """A prompt for samples: "def " for Python's library, else the first words of the held-out text."""
    if dataset.source == "stdlib":
        return "def "
    text = dataset.tokenizer.decode(dataset.held_out.document(0)[: 8 * _OPENING].tolist())
    lines = [line.strip("\N{REPLACEMENT CHARACTER}- \t") for line in text.splitlines()]
    lines = [line for line in lines if line and line.isprintable()]
    # The only document of a source is cut anywhere, so its first line may begin within a word.
    line = next(iter(lines[1:2] if dataset.held_out.n_documents == 1 else lines[:1]), lines[0] if lines else "")
    return line if len(line) <= _OPENING else line[:_OPENING].rpartition(" ")[0] or line[:_OPENING]


def sample(model: LanguageModel, tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt, and how the model continues it, beyond its learned positions too."""
    model.eval()
    crop = model.config.learned_positions > 0
    done = generate_text(model, tokenizer, [prompt], SAMPLE_TOKENS, crop=crop)
    return prompt + done.completions[0].text


def generate_command(run_dir: Path, prompt: str, model: LanguageModelConfig) -> str:
    """The command that continues the prompt, as `sample` does."""
    crop = " --crop" if model.learned_positions else ""
    return f"generate {shlex.quote(str(run_dir))} --prompt {shlex.quote(prompt)}{crop} --stats"


def say_next(console: Console, what: str, commands: list[str]) -> None:
    """Print what there is, then commands of this program to type next, each on a line of its own."""
    say(console, "")
    say_wrapped(console, f"{what} Next:")
    say(console, "")
    for command in commands:
        say(console, f"  {program()} {command}")


def say_results(console: Console, run_dir: Path, config: RunConfig, dataset: TrainingData, state: TrainState) -> None:
    """After `swamla train`: a sample (of a run on one process that has a best), its figures, the next commands."""
    if not distributed.is_main():
        return
    run = shlex.quote(str(run_dir))
    if isinstance(dataset, TaskDataset):
        say_accuracy(console, run_dir, config, dataset, state)
        return
    if not isinstance(dataset, Dataset):
        say_next(
            console, f"{run_dir} has config.json, metrics.jsonl, loss.png and the checkpoints.", [f"evaluate {run}"]
        )
        return
    prompt = opening(dataset)
    if state.best is not None and distributed.world_size() == 1:  # the weights of several may fill a whole machine
        model, tokenizer = load(run_dir)
        text = sample(model.to(state.device), tokenizer, prompt)
        say(console, f"\n=== a sample: {harmless(repr(prompt))} continued ===\n{harmless(text)}\n")
    longer = f"train --resume {run} {extension(config.train, step=state.step, seconds=state.seconds)}"
    for line in [_figures(run_dir, state), few_tokens(config, dataset, state, longer)]:
        if line:
            say_wrapped(console, line)
    commands = [generate_command(run_dir, prompt, config.model), f"evaluate {run}", longer]
    say_next(console, f"{run_dir} has config.json, metrics.jsonl, loss.png and the checkpoints.", commands)


def say_accuracy(console: Console, run_dir: Path, config: RunConfig, dataset: TaskDataset, state: TrainState) -> None:
    """After `swamla train` on a task: the accuracy, since when it was .99, a question of a held-out row, commands."""
    run, names = shlex.quote(str(run_dir)), dataset.task.names()
    evaluations = [record for record in read_metrics(run_dir / "metrics.jsonl") if "held_out_accuracy" in record]
    if evaluations:
        known = steps_to(evaluations)
        since = "not reached" if known is None else f"reached by step {known}"
        best = max(record["held_out_accuracy"] for record in evaluations)
        last = f"{evaluations[-1]['held_out_accuracy']:.4f} of the held-out answers are right after the last evaluation"
        say_wrapped(console, f"Accuracy: {last}, {best:.4f} at best; {KNOWN} was {since}.")
    row = dataset.task.row(0, 0, held_out=True)
    asked = int(row.query_Q[0])
    prompt, answer = " ".join(names[i] for i in row.tokens_T[: asked + 1]), names[row.labels_T[asked]]
    longer = f"train --resume {run} {extension(config.train, step=state.step, seconds=state.seconds)}"
    ask = f"generate {run} --greedy --max_new_tokens 1 --prompt {shlex.quote(prompt)}"
    what = f"{run_dir} has config.json, metrics.jsonl, loss.png and the checkpoints."
    say_next(console, f"{what} The first command asks for {answer}.", [ask, f"evaluate {run}", longer])


def _figures(run_dir: Path, state: TrainState) -> str:
    """What the held-out figures mean, in one line; "" for a run without any."""
    found = summarize(run_dir)
    if found.held_out_loss is None or found.bits_per_byte is None:
        return ""
    which = ""
    if state.best_step is not None and state.best_step != state.step:
        which = f" in step {state.best_step}, which generate and evaluate use"
    return (
        f"Held out: {found.bits_per_byte:.3f} bits per byte{which}: the cost of text that the model was not trained "
        "on. Less is better; guessing costs 8. It compares models of any tokenizer, which the loss "
        f"({found.held_out_loss:.3f} nats per token) does not."
    )


def few_tokens(config: RunConfig, dataset: TrainingData, state: TrainState, longer: str) -> str:
    """For a run that its minutes ended before it saw much text: how much that was, and how to go on; else ""."""
    train = config.train
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    by_time = train.max_minutes is not None and (train.steps is None or state.step < train.steps)
    epochs = max((state.tokens / length for length in dataset.epochs().values()), default=0.0)
    if not by_time or state.tokens >= _TOKENS_PER_PARAMETER * parameters or epochs >= _EPOCHS:
        return ""
    passes = f", {epochs:.2g} times its text" if epochs else ""
    return (
        f"In {train.max_minutes:g} minutes the model saw {state.tokens:,} tokens: {state.tokens / parameters:.2g} per "
        f"parameter, where about {_TOKENS_PER_PARAMETER} are usual{passes}. It would learn more: {program()} {longer}"
    )
