"""What engines have done and do now, in Prometheus's text format."""

from collections.abc import Callable, Iterable

from swamla.serve.answers import Served
from swamla.serve.engine import Engine

_COUNTERS: dict[str, tuple[str, Callable[[Engine], float]]] = {
    "requests_total": ("Prompts that were accepted.", lambda engine: engine.counters.requests),
    "requests_ended_total": ("Prompts whose answers all ended.", lambda engine: engine.counters.ended),
    "requests_failed_total": ("Prompts that failed.", lambda engine: engine.counters.failed),
    "requests_cancelled_total": ("Prompts whose client left.", lambda engine: engine.counters.cancelled),
    "requests_refused_total": ("Prompts refused because the queue was full.", lambda engine: engine.counters.refused),
    "prompt_tokens_total": ("Tokens of prompts.", lambda engine: engine.counters.prompt_tokens),
    "cached_tokens_total": (
        "Those that came from the cache of prefixes.",
        lambda engine: engine.counters.cached_tokens,
    ),
    "generated_tokens_total": ("Tokens generated.", lambda engine: engine.counters.generated_tokens),
    "decoding_steps_total": ("Steps of all sequences in slots.", lambda engine: engine.counters.steps),
    "first_token_seconds_sum": (
        "Seconds from a prompt's arrival to its first token.",
        lambda e: e.counters.first_seconds,
    ),
    "first_token_seconds_count": ("Prompts that got a first token.", lambda engine: engine.counters.firsts),
}
_GAUGES: dict[str, tuple[str, Callable[[Engine], float]]] = {
    "slots": ("Sequences that can be decoded together.", lambda engine: engine.n_slots),
    "active": ("Sequences in slots.", lambda engine: engine.n_active),
    "waiting": ("Requests without a slot.", lambda engine: engine.n_waiting),
    "state_bytes": ("Bytes of the state of all slots.", lambda engine: engine.slots.nbytes),
    "prefix_cache_bytes": ("Bytes of states in the cache of prefixes.", lambda engine: engine.prefixes.nbytes),
    "prefix_cache_entries": ("States in the cache of prefixes.", lambda engine: len(engine.prefixes)),
}


def metrics(served: Iterable[Served]) -> str:
    """The text, a line for each model."""
    models, lines = list(served), []
    for kind, table in (("counter", _COUNTERS), ("gauge", _GAUGES)):
        for name, (about, value) in table.items():
            lines += [f"# HELP swamla_{name} {about}", f"# TYPE swamla_{name} {kind}"]
            lines += [f'swamla_{name}{{model="{_escaped(each.name)}"}} {value(each.engine):.10g}' for each in models]
    return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
