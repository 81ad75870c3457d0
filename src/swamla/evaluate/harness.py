"""Tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), run on our models.

`HarnessModel` answers lm-eval's three kinds of request. A context that several requests share is read once: each
continuation goes on from a copy of its state. A state has no window, so texts are cut only for learned positions.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from swamla.data.tokenizer import StreamDecoder, Tokenizer
from swamla.errors import MissingBackendError, UsageError, require
from swamla.inference.decoding import ACCELERATOR_FACTOR, PREFILL_CHUNK, Decoder, prefill, prompt_chunks
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from swamla.model.state import ModelState

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingBackendError(f"tasks need lm-eval: pip install 'swamla[eval]' ({error})") from error

LOGITS = 1 << 24  # numbers of the largest matrix of logits
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}  # values at which settings that we lack change nothing
Progress = Callable[[str, float], None]
"""Called with what is being done, and the share that is done."""
Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The `generation_kwargs` of a task. until: texts that end a generation, and are not part of it."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], max_gen_toks: int) -> "Generation":
        """From a task's settings; max_gen_toks: for tasks without one. Raises `UsageError` for an unknown setting."""
        given = normalize_gen_kwargs(dict(kwargs), max_gen_toks)
        samples = given.pop("do_sample")
        found = cls(
            until=tuple(text for text in handle_stop_sequences(given.pop("until"), eos=None) if text),
            max_new_tokens=given.pop("max_gen_toks"),
            temperature=float(given.pop("temperature", 1.0)) if samples else 0.0,
            top_k=given.pop("top_k", None) or 0,
            top_p=given.pop("top_p", 1.0),
        )
        given.pop("temperature", None)
        for name, value in given.items():
            if NEUTRAL.get(name) != value:
                raise UsageError(
                    f"a task's generation_kwargs have {name} = {value!r}: known are until, max_gen_toks, do_sample, "
                    "temperature, top_k and top_p"
                )
        return found


class HarnessModel(TemplateLM):
    """A language model with its tokenizer, as lm-eval wants it: log-likelihoods in nats, and texts.

    Contexts begin with the document start, exactly once; text that looks like it is text. With learned positions a
    context that is too long loses its first tokens, as with lm-eval's `hf`, and a warning says how many requests did.
    batch_size: rows of a forward pass; results do not depend on it but for rounding.  seed: of sampled texts.
    progress: told the share of each kind of request that is done.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        require(batch_size > 0, "batch_size", batch_size, "must be > 0, e.g. 8")
        self.decoder = Decoder(model)
        self.model: LanguageModel = self.decoder.model  # type: ignore[assignment]
        self._tokenizer, self.batch_size, self.seed = tokenizer, batch_size, seed
        self.progress = progress or (lambda stage, share: None)
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """The document start, which is also its end."""
        return self._tokenizer.eos_id

    @property
    def max_length(self) -> int | None:
        """Tokens that the model can read; None if there is no limit."""
        return self.model.config.learned_positions or None

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate for a task that does not say; that of `hf`."""
        return 256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, after the document start unless `add_special_tokens` is False."""
        ids = self._tokenizer.encode(string)
        return ids if add_special_tokens is False else [self._tokenizer.eos_id, *ids]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context), and whether greedy decoding gives it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """log p of each text as a whole document, without its end.

        With learned positions in windows that do not overlap, the last of which has as much context as fits.
        """
        windows: list[tuple[None, Sequence[int], Sequence[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids, start = self._tokenizer.encode(request.args[0]), self.prefix_token_id
            size = self.max_length or max(1, len(ids))
            for window in get_rolling_token_windows(ids, prefix_token=start, max_seq_len=size, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += nats
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        if empty := next((texts for texts, _, continuation in requests if not continuation), None):
            raise UsageError(
                f"{empty[1]!r:.60} after {empty[0][-40:]!r} has no token of its own: the task's continuations have to "
                "begin with a space, or be longer"
            )
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        if cut := sum(len(pair[0]) < len(context) for pair, (_, context, _) in zip(pairs, requests, strict=True)):
            warn(f"{cut} of {len(pairs)} requests are cut to the last {self.max_length} tokens, which is all that the "
                 "model has positions for", stacklevel=2)  # fmt: skip
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (context, _) in enumerate(pairs):
            by_context[context].append(index)
        nats, greedy = torch.zeros(len(pairs), dtype=torch.float64), torch.ones(len(pairs), dtype=torch.bool)
        done, all_tokens = 0, sum(len(continuation) for _, continuation in pairs)
        contexts = sorted(by_context, key=len, reverse=True)  # what needs most memory fails first
        for begin in range(0, len(contexts), self.batch_size):
            part = contexts[begin : begin + self.batch_size]
            state = self.model.init_state(len(part), len(part[0]))
            logits_BV = prefill(self.model, part, state)
            asked = [(row, index) for row, context in enumerate(part) for index in by_context[context]]
            rows, indices = (list(column) for column in zip(*asked, strict=True))
            first = torch.tensor([pairs[index][1][0] for index in indices])
            nats[indices] = log_softmax(logits_BV).cpu()[rows, first].double()
            greedy[indices] = logits_BV.argmax(dim=-1).cpu()[rows] == first
            done += len(asked)
            for batch in self._batches(asked, pairs):
                rows, indices = (list(column) for column in zip(*batch, strict=True))
                further, same = self._continued(state, rows, [pairs[index][1] for index in indices])
                nats[indices] += further
                greedy[indices] &= same
                done += sum(len(pairs[index][1]) - 1 for index in indices)
                self.progress(f"scoring {len(pairs)} texts", done / all_tokens)
            self.progress(f"scoring {len(pairs)} texts", done / all_tokens)
        return list(zip(nats.tolist(), greedy.tolist(), strict=True))

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        """A request that fits the learned positions: its context without as many of its first tokens as necessary.

        Raises `UsageError` for a continuation that alone does not fit.
        """
        limit = self.max_length
        if limit is not None and len(continuation) > limit:
            raise UsageError(f"a continuation has {len(continuation)} tokens, and the model {limit} learned positions")
        kept = len(context) if limit is None else limit + 1 - len(continuation)  # the last token is not read
        return tuple(context[-kept:]), tuple(continuation)

    def _batches(self, asked: list[tuple[int, int]], pairs: Sequence[Pair]) -> Iterator[list[tuple[int, int]]]:
        """Batches of those (row, request) whose continuation has further tokens, of similar lengths.

        Padding counts as positions: a long context and a long continuation may fit only apart.
        """
        limit = self.max_length
        batch: list[tuple[int, int]] = []
        for each in sorted(asked, key=lambda each: len(pairs[each[1]][1]), reverse=True):
            if len(pairs[each[1]][1]) == 1:
                break
            longer = [pairs[index] for _, index in [*batch, each]]
            size = max(len(context) for context, _ in longer) + len(longer[0][1]) - 1
            if batch and (len(batch) == self.batch_size or (limit is not None and size > limit)):
                yield batch
                batch = []
            batch.append(each)
        if batch:
            yield batch

    def _continued(
        self, state: ModelState, rows: list[int], continuations: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Of each continuation of a row of `state`, without its first token: log p (fp64), and whether it is greedy.

        Reads long texts in chunks, as `prefill` does, and computes logits for real tokens only.
        """
        device, lengths = self.model.device, [len(tokens) - 1 for tokens in continuations]
        tokens_BT = torch.zeros(len(rows), max(lengths) + 1, dtype=torch.int64)
        for row, tokens in enumerate(continuations):
            tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
        valid_BT = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device)
        tokens_BT = tokens_BT.to(device)
        copies = state.select(torch.tensor(rows))
        self.model.grow(copies, copies.longest + max(lengths))
        nats_B = torch.zeros(len(rows), dtype=torch.float64, device=device)
        misses_B = torch.zeros(len(rows), dtype=torch.int64, device=device)
        at_once = PREFILL_CHUNK * (1 if device.type == "cpu" else ACCELERATOR_FACTOR)
        for begin, end in prompt_chunks(min(lengths), max(lengths), max(1, at_once // len(rows))):
            x_BTD = self.model.step_hidden(tokens_BT[:, begin:end], copies, valid_BT[:, begin:end])
            row_N, time_N = valid_BT[:, begin:end].nonzero(as_tuple=True)
            label_N = tokens_BT[row_N, begin + 1 + time_N]
            at_once = max(1, LOGITS // self.model.config.vocab_size)
            for row, label, x_ND in zip(
                *(each.split(at_once) for each in (row_N, label_N, x_BTD[row_N, time_N])), strict=True
            ):
                logits_NV = self.model.logits(x_ND)
                found_N = log_softmax(logits_NV).gather(1, label[:, None])[:, 0]
                nats_B.index_add_(0, row, found_N.double())
                misses_B.index_add_(0, row, (logits_NV.argmax(dim=-1) != label).long())
        return nats_B.cpu(), misses_B.cpu() == 0

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The continuation of each (context, generation_kwargs), up to a stop text of its or the document's end.

        Sampled texts depend on `seed` and on the request's place, not on `batch_size`. With learned positions a context
        is cut to leave room for all tokens that are asked for. Raises `UsageError` if they alone do not fit.
        """
        asked: dict[Generation, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            asked[Generation.of(request.args[1], self.max_gen_toks)].append(index)
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        texts: dict[int, str] = {}
        for settings, indices in asked.items():
            indices.sort(key=lambda index: len(contexts[index]), reverse=True)
            for begin in range(0, len(indices), self.batch_size):
                part = indices[begin : begin + self.batch_size]
                texts |= zip(
                    part, self._generated([contexts[index] for index in part], settings, len(texts)), strict=True
                )
                self.progress(f"generating {len(requests)} texts", len(texts) / len(requests))
        return [texts[index] for index in range(len(requests))]

    def _generated(self, prompts: list[list[int]], settings: Generation, first: int) -> list[str]:
        """One batch. first: the place of its first row among all requests, which have a seed each."""
        limit = self.max_length
        if limit is not None:
            room = limit - settings.max_new_tokens
            if room < 1:
                raise UsageError(
                    f"a task generates {settings.max_new_tokens} tokens, and the model has {limit} learned positions: "
                    "its generation_kwargs need a smaller max_gen_toks"
                )
            if cut := sum(len(prompt) > room for prompt in prompts):
                warn(f"{cut} prompts are cut to their last {room} tokens, so that the model has positions for "
                     f"{settings.max_new_tokens} more", stacklevel=2)  # fmt: skip
            prompts = [prompt[-room:] for prompt in prompts]
        streams, texts = [StreamDecoder(self._tokenizer) for _ in prompts], ["" for _ in prompts]

        def has_ended(row: int, token: int) -> bool:
            texts[row] += streams[row].push(token)
            return any(stop in texts[row] for stop in settings.until)

        produced = self.decoder.generate(
            prompts,
            settings.max_new_tokens,
            sampling=Sampling(
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                seed=self.seed + first,
            ),
            stop_id=self.eot_token_id,
            known_ids=self._tokenizer.vocab_size,
            on_token=has_ended,
        )
        return [postprocess_generated_text(self._tokenizer.decode(ids), list(settings.until), None) for ids in produced]


def log_softmax(logits: Tensor) -> Tensor:
    """log p in fp32 at least."""
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
