"""`swamla generate RUN --prompt TEXT`: continue prompts, streaming the text."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from swamla.checkpoint import load
from swamla.cli.console import harmless, program
from swamla.cli.flags import argument, parse
from swamla.cli.running import run_folder
from swamla.data.chat import END, START
from swamla.errors import UsageError
from swamla.inference.decoding import INT8_MAX_ROWS, decodings_on
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from swamla.text import Generation, encode_prompt, generate_text, room


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continue prompts with a trained model; one that was tuned on conversations is asked by `swamla chat RUN`. One
    prompt is streamed; several are printed when all are done.

    run: the run's folder.
    prompt: the text to continue, once per prompt; without one, a new document begins.
    max_new_tokens: stop after this many tokens, or where the model ends the document; by default also at its last
        position.
    crop: continue beyond a model's learned positions: read only as many of the last tokens as there are positions, anew
        for every token, as nanoGPT does.
    temperature: below 1 more certain, above 1 more varied, 0 the same as --greedy.
    top_k: sample from the k likeliest tokens only; 0 for all.
    top_p: sample from the likeliest tokens that together have this probability.
    seed: the same seed gives the same text.
    greedy: always take the likeliest token.
    checkpoint: best, latest, or a step.
    decoding: graph: CUDA graphs, of compiled kernels if Triton is installed; int8: weights rounded to 8 bits, on a CPU,
        which is faster and changes the results; auto: int8 for a run whose weights are rounded, else eager.
    stats: print tokens per second and the size of the state, on stderr.
    """

    run: str = argument(positional=True)
    prompt: tuple[str, ...] = argument((), annotation=str, repeated=True)
    max_new_tokens: int = 200
    crop: bool = argument(False, switch=True)
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    greedy: bool = False
    checkpoint: str = "best"
    decoding: Literal["auto", "eager", "graph", "int8"] = "auto"
    stats: bool = False


def sampling_of(arguments: Any, given: Mapping[str, Any]) -> Sampling:
    """What a command's flags temperature, top_k, top_p, seed and greedy say; given: those that were typed."""
    if arguments.greedy and "temperature" in given:
        raise UsageError("--greedy and --temperature exclude each other: greedy is temperature 0")
    return Sampling(
        temperature=0.0 if arguments.greedy else arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )


def rounded_decoding(model: LanguageModel, rows: int) -> str:
    """What "auto" stands for: "int8" for rounded weights, where it is: on a CPU, for few rows; else "eager"."""
    fits = model.quantized and rows <= INT8_MAX_ROWS and "int8" in decodings_on(model.device.type)
    return "int8" if fits else "eager"


def main(argv: list[str]) -> int:
    """Generate and print."""
    arguments, given = parse(Arguments, argv, command="swamla generate")
    if arguments.max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens {arguments.max_new_tokens}: must be > 0, e.g. 200")
    sampling = sampling_of(arguments, given)
    prompts = [_typed(prompt) for prompt in arguments.prompt] or [""]
    model, tokenizer = load(run_folder(arguments.run), arguments.checkpoint)
    if arguments.crop and not model.config.learned_positions:
        raise UsageError("--crop is for learned positions; this model reads texts of any length: leave it out")
    if {START, END} <= tokenizer.specials.keys():
        where = f"{program()} chat {shlex.quote(arguments.run)}"
        print(
            f"swamla: this model knows conversations: {where} asks it; generate continues plain text", file=sys.stderr
        )
    fitting = None if arguments.crop else room(model, [encode_prompt(tokenizer, prompt) for prompt in prompts])
    max_new_tokens = _limit(arguments.max_new_tokens, fitting, asked="max_new_tokens" in given)
    alone = len(prompts) == 1
    if alone:
        _emit(prompts[0])
    try:
        done = generate_text(
            model,
            tokenizer,
            prompts,
            max_new_tokens,
            sampling=sampling,
            on_text=(lambda _, piece: _emit(piece)) if alone else None,
            decoding=rounded_decoding(model, len(prompts)) if arguments.decoding == "auto" else arguments.decoding,
            crop=arguments.crop,
        )
    except KeyboardInterrupt:
        _emit("\n")  # so that the statistics start on a new line
        raise
    _emit("\n" if alone else "".join(f"--- {index}\n{c.prompt}{c.text}\n" for index, c in enumerate(done.completions)))
    if arguments.stats:
        print(_statistics(done), file=sys.stderr)
    return 0


def _typed(prompt: str) -> str:
    """A prompt as the text that was typed: in the locale C Python gives every byte beyond ASCII as a surrogate."""
    try:
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return prompt  # no text, which is reported later


def _limit(wanted: int, fitting: int | None, *, asked: bool) -> int:
    """How many tokens to generate when `fitting` are possible. Raises `UsageError` if more were asked for."""
    if fitting is None or wanted <= fitting:
        return wanted
    if asked:
        raise UsageError(
            f"--max_new_tokens {wanted}: with this prompt the model's learned positions leave room for {fitting}: "
            f"--max_new_tokens {fitting}, or a shorter prompt, or --crop, which reads the last tokens only"
        )
    print(f"swamla: at most {fitting} tokens: the model has no more positions (--crop goes on)", file=sys.stderr)
    return fitting


def _statistics(done: Generation) -> str:
    tokens = sum(len(completion.tokens) for completion in done.completions)
    return (
        f"{tokens} tokens, the first after {done.seconds_to_first:.3f} s, then {done.tokens_per_second:,.0f} tokens/s; "
        f"fp32, {done.decoding}, state {done.state_bytes:,} bytes"
    )


def _emit(text: str) -> None:
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
