"""Requests that are answered together get what each gets alone, whenever they come and go."""

import math
import time
from collections.abc import Callable

import pytest
import torch

from swamla.errors import ConfigError, UsageError
from swamla.inference.decoding import INT8_MAX_ROWS
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from swamla.serve.engine import Engine
from swamla.serve.prefixes import PrefixCache, cut, names
from swamla.serve.requests import Ended, Event, QueueFull, Read, Request, TooLong
from swamla.serve.slots import BLOCK, Slots, room_for
from swamla.serve.worker import Worker
from tests.model.helpers import MIXERS, assert_close
from tests.waiting import until

from .helpers import GREEDY, TOKENIZER, Heard, alone, ask, engine_of, model_of, prompt_of, run

LENGTHS = [1, 40, 7, 90, 16, 33, 2, 64]
COUNTS = [12, 5, 20, 9, 1, 14, 17, 8]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return model_of()


@pytest.mark.parametrize("kind", MIXERS)
def test_requests_that_come_and_go_get_the_greedy_text_of_each_alone(kind: str) -> None:
    model = model_of(kind, "swa") if kind != "swa" else model_of("swa")
    engine = engine_of(model, slots=3)
    prompts = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]
    heard: list[Heard] = []

    def arrive(number: int) -> None:
        if number % 3 == 0 and len(heard) < len(prompts):
            heard.append(ask(engine, prompts[len(heard)], COUNTS[len(heard)])[1])

    for number in range(3 * len(prompts)):
        arrive(number)
        engine.step()
    run(engine)
    for prompt, count, each in zip(prompts, COUNTS, heard, strict=True):
        assert each.error is None
        assert each.text() == alone(model, prompt, count)[0]
        assert len(each.of(Ended)) == 1
    assert engine.n_active == engine.n_waiting == 0


@pytest.mark.parametrize("cache", [0, 1 << 20], ids=["no cache", "cache"])
def test_weights_of_8_bits_give_the_greedy_text_of_each_alone(model: LanguageModel, cache: int) -> None:
    engine = engine_of(model, slots=INT8_MAX_ROWS, decoding="int8", cache_bytes=cache)
    prompts = [prompt_of(length, seed % 3) for seed, length in enumerate(LENGTHS * 3)]
    heard = [ask(engine, prompt, 20)[1] for prompt in prompts]
    run(engine)
    assert [each.text() for each in heard] == [alone(model, prompt, 20, decoding="int8")[0] for prompt in prompts]
    assert engine.counters.steps < engine.counters.generated_tokens / 4


def test_weights_of_8_bits_are_for_the_tokens_after_the_first(model: LanguageModel) -> None:
    told = []
    for decoding in ("eager", "int8"):
        engine = engine_of(model, decoding=decoding)
        _, heard = ask(engine, prompt_of(40), 8, top=0, echo=True)
        run(engine)
        told.append([token.logprob for token in [*heard.read.prompt[1:], *heard.tokens()]])
    exact, rounded = (torch.tensor(each) for each in told)
    assert torch.equal(exact[:40], rounded[:40])
    assert ((exact - rounded)[40:].abs() > 0).all()
    assert_close(rounded, exact, 0.1)


def test_weights_of_8_bits_are_for_few_slots_and_graphs_for_none(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="slots = 17: must be 16 at most with decoding = 'int8'"):
        engine_of(model, slots=17, decoding="int8")
    with pytest.raises(UsageError, match="decoding = 'graph': must be 'eager' or 'int8' here"):
        engine_of(model, decoding="graph")


def test_answers_are_sampled_as_rows_of_a_batch_are_whoever_else_is_there(model: LanguageModel) -> None:
    engine, sampling = engine_of(model), Sampling(temperature=1.3, top_k=50, top_p=0.9, seed=5)
    _, other = ask(engine, prompt_of(30), 40, sampling=Sampling(temperature=1.0, seed=8))
    engine.step()
    _, heard = ask(engine, prompt_of(20), 15, sampling=sampling, n=3)
    run(engine)
    texts = [heard.text(answer) for answer in range(3)]
    assert texts == alone(model, prompt_of(20), 15, sampling, n=3)
    assert len(set(texts)) == 3
    assert other.text() == alone(model, prompt_of(30), 40, Sampling(temperature=1.0, seed=8))[0]


def test_a_state_grows_with_the_longest_sequence_and_falls_back(model: LanguageModel) -> None:
    engine = engine_of(model, limit=4 * BLOCK, piece=64)
    _, short = ask(engine, prompt_of(5), 20)
    _, long = ask(engine, prompt_of(BLOCK - 10), 30)
    run(engine)
    assert short.text() == alone(model, prompt_of(5), 20)[0]
    assert long.text() == alone(model, prompt_of(BLOCK - 10), 30)[0]
    assert engine.slots.nbytes == 0
    assert [room_for(length, 1000) for length in (1, BLOCK, BLOCK + 1, 900)] == [BLOCK, BLOCK, 2 * BLOCK, 1000]


def test_log_p_of_answers_and_echoed_prompts_are_those_of_the_whole_text(model: LanguageModel) -> None:
    prompt = prompt_of(40)
    engine = engine_of(model)
    _, heard = ask(engine, prompt, 6, top=3, echo=True)
    run(engine)
    answer = [token.id for token in heard.tokens()]
    with torch.no_grad():
        expected = model(torch.tensor([prompt + answer]))[0, :, : TOKENIZER.vocab_size].log_softmax(dim=-1)
    told = [*heard.read.prompt, *heard.tokens()]
    assert [token.id for token in told] == prompt + answer
    assert told[0].logprob is None
    ids = torch.tensor((prompt + answer)[1:])[:, None]
    found = torch.tensor([token.logprob for token in told[1:]])
    assert_close(found, expected[:-1].gather(1, ids)[:, 0], 1e-5)
    top = torch.tensor([[value for _, value in token.top] for token in told[1:]])
    assert_close(top, expected[:-1].topk(3, dim=-1).values, 1e-5)


def test_no_token_at_all_reads_the_prompt_only(model: LanguageModel) -> None:
    engine = engine_of(model)
    _, heard = ask(engine, prompt_of(20), 0, top=0, echo=True)
    run(engine)
    assert (len(heard.read.prompt), heard.text(), heard.reasons) == (20, "", ["length"])


def test_a_stop_string_ends_an_answer_before_it(model: LanguageModel) -> None:
    whole = alone(model, prompt_of(9), 30)[0]
    stop = whole[7:9]
    engine = engine_of(model)
    _, heard = ask(engine, prompt_of(9), 30, stops=("nowhere to be found", stop))
    run(engine)
    assert heard.text() == whole[: whole.index(stop)]
    assert heard.reasons == ["stop"]


def test_the_documents_end_ends_an_answer(model: LanguageModel) -> None:
    ended = model_of(logit_cap=0.0)
    with torch.no_grad():
        ended.head.weight[TOKENIZER.eos_id] = ended.head.weight[alone_id(ended)] * 1.01
    engine = engine_of(ended)
    _, heard = ask(engine, prompt_of(9), 30)
    run(engine)
    assert (heard.text(), heard.reasons) == ("", ["stop"])
    assert heard.of(Ended)[0].tokens == 1


def alone_id(model: LanguageModel) -> int:
    """The likeliest byte after the prompt; the head is untied, so that another row can win."""
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    with torch.no_grad():
        return int(model(torch.tensor([prompt_of(9)]))[0, -1, : TOKENIZER.vocab_size].argmax())


def test_a_cancelled_request_frees_its_slots_and_disturbs_nobody(model: LanguageModel) -> None:
    engine = engine_of(model, slots=2)
    gone, left = ask(engine, prompt_of(10), 100)
    _, stays = ask(engine, prompt_of(12, 1), 30)
    _, waits = ask(engine, prompt_of(14, 2), 10)
    for _ in range(5):
        engine.step()
    assert (engine.n_active, engine.n_waiting) == (2, 1)
    gone.cancel()
    engine.step()
    assert (engine.n_active, engine.n_waiting) == (2, 0)
    count = len(left.events)
    run(engine)
    assert len(left.events) == count
    assert engine.counters.cancelled == 1
    assert stays.text() == alone(model, prompt_of(12, 1), 30)[0]
    assert waits.text() == alone(model, prompt_of(14, 2), 10)[0]


def test_a_request_that_is_late_fails_wherever_it_is(model: LanguageModel) -> None:
    engine = engine_of(model, slots=1)
    asked = [ask(engine, prompt_of(10), 50, seconds=0.0) for _ in range(3)]
    time.sleep(0.01)
    run(engine)
    assert [heard.error is not None and heard.error.late for _, heard in asked] == [True] * 3
    _, heard = ask(engine, prompt_of(10), 50, seconds=60.0)
    run(engine)
    assert heard.reasons == ["length"]


def test_a_full_queue_refuses_all_of_a_submission_or_none(model: LanguageModel) -> None:
    engine = engine_of(model, slots=1, queue=2)
    asked = [ask(engine, prompt_of(4), 3) for _ in range(3)]
    request = Request(tokens=prompt_of(4), max_new_tokens=3, sampling=GREEDY)
    with pytest.raises(QueueFull, match="3 requests are waiting, and 2 may"):
        engine.submit(request, Heard())
    run(engine)
    assert all(heard.reasons == ["length"] for _, heard in asked)
    with pytest.raises(UsageError, match="4 prompts at once: must be 3 at most"):
        engine.submit_all([(request, Heard())] * 4)
    engine.submit_all([(request, Heard())] * 2)
    with pytest.raises(QueueFull):
        engine.submit_all([(request, Heard())] * 2)
    assert engine.n_waiting == 2
    assert engine.counters.refused == 3


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"tokens": []}, "the prompt has no token"),
        ({"tokens": [3, 900]}, "token 900 is outside the vocabulary of 257"),
        ({"tokens": [-1]}, "token -1 is outside"),
        ({"n": 5}, "n = 5: must be 1 … 4"),
        ({"stops": ("a", "")}, "no stop string empty"),
        ({"max_new_tokens": 200}, "the prompt has 2 tokens and 200 are asked for: together at most 201"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(model: LanguageModel, settings: dict, error: str) -> None:
    engine = engine_of(model)
    with pytest.raises(UsageError, match=error):
        engine.submit(Request(**({"tokens": [256, 1], "max_new_tokens": 4} | settings)), Heard())
    assert not engine.step()


def test_a_prompt_and_its_answer_may_fill_a_slot_to_the_last_token(model: LanguageModel) -> None:
    engine = engine_of(model, limit=40)
    _, heard = ask(engine, prompt_of(30), 11)
    run(engine)
    assert heard.text() == alone(model, prompt_of(30), 11)[0]
    with pytest.raises(TooLong):
        ask(engine, prompt_of(30), 12)
    positioned = model_of(learned_positions=32)
    few = engine_of(positioned, limit=1000)
    assert few.limit == 32
    for _ in range(2):  # the second time from the cache
        _, heard = ask(few, prompt_of(20), 13)
        run(few)
        assert heard.text() == alone(positioned, prompt_of(20), 13)[0]


def test_logits_that_are_not_finite_end_their_own_request_only(model: LanguageModel) -> None:
    broken = model_of()
    with torch.no_grad():
        broken.embedding.weight[7] = math.nan
    broken.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    engine = engine_of(broken, slots=2)
    _, first = ask(engine, [256, 7, 8], 5)
    _, second = ask(engine, [256, 8, 9], 1)
    run(engine)
    assert first.error is not None
    assert "not finite" in first.error.message
    assert second.error is None
    assert engine.n_active == 0


def test_an_error_in_decoding_fails_who_is_decoded_and_the_next_are_answered(model: LanguageModel) -> None:
    engine = engine_of(model, slots=2)
    _, heard = ask(engine, prompt_of(5), 8)
    for _ in range(3):
        engine.step()
    step = engine.slots.step
    engine.slots.step = lambda tokens: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    run(engine)
    assert heard.error is not None
    assert heard.error.message == "ZeroDivisionError: division by zero"
    engine.slots.step = step  # type: ignore[method-assign]
    _, heard = ask(engine, prompt_of(5), 8)
    run(engine)
    assert heard.text() == alone(model, prompt_of(5), 8)[0]


def test_a_long_prompt_lets_others_decode_between_its_pieces(model: LanguageModel) -> None:
    engine = engine_of(model, piece=8)
    _, short = ask(engine, prompt_of(4), 6)
    engine.step()
    _, long = ask(engine, prompt_of(100), 2)
    for _ in range(6):
        engine.step()
    assert short.reasons == ["length"]
    assert long.events == []
    run(engine)
    assert long.text() == alone(model, prompt_of(100), 2)[0]


@pytest.mark.parametrize("idle", [0, 1, 2])
def test_a_short_prompt_waits_for_one_piece_of_a_long_one_whenever_it_comes(model: LanguageModel, idle: int) -> None:
    engine = engine_of(model, slots=4, limit=4000, piece=16, cache_bytes=0)
    ask(engine, prompt_of(16 * 100), 1)
    for _ in range(idle):
        engine.step()
    _, short = ask(engine, prompt_of(10), 1)
    engine.step()
    engine.step()
    assert short.reasons == ["length"]


@pytest.mark.parametrize("idle", [0, 1, 2])
def test_a_long_prompt_comes_through_though_a_short_one_arrives_in_every_round(model: LanguageModel, idle: int) -> None:
    engine = engine_of(model, slots=4, limit=4000, piece=16, cache_bytes=0)
    for _ in range(idle):
        engine.step()
    _, long = ask(engine, prompt_of(16 * 5), 1)
    for number in range(2 * 5):
        ask(engine, prompt_of(10, number), 1)
        engine.step()
    assert long.reasons == ["length"]


def test_a_worker_answers_requests_of_several_engines_and_closes(model: LanguageModel) -> None:
    engines = [engine_of(model), engine_of(model_of("gdn"))]
    worker = Worker(engines)
    worker.start()
    heard = [ask(engine, prompt_of(9), 7)[1] for engine in engines]
    until(lambda: all(each.reasons for each in heard))
    assert [each.reasons for each in heard] == [["length"]] * 2
    _, late = ask(engines[0], prompt_of(9), 190)
    worker.close()
    assert not worker.alive
    assert late.error is not None or late.reasons


def test_a_worker_answers_one_engine_while_another_still_writes(model: LanguageModel) -> None:
    busy, other = engine_of(model), engine_of(model_of("gdn"))
    worker, order = Worker([busy, other]), list[str]()

    def note(name: str) -> Callable[[Event], None]:
        return lambda event: order.append(name) if isinstance(event, Ended) else None

    for engine, name, count in ((busy, "long", 190), (other, "short", 3)):
        engine.submit(Request(tokens=prompt_of(4), max_new_tokens=count, sampling=GREEDY), note(name))
    worker.start()
    until(lambda: len(order) == 2)
    worker.close()
    assert order == ["short", "long"]


def test_settings_out_of_range_are_refused(model: LanguageModel) -> None:
    for name in ("slots", "limit", "piece"):
        with pytest.raises(ConfigError, match=f"{name} = 0"):
            Engine(model, TOKENIZER, **{name: 0})


# -- the cache of prefixes


@pytest.mark.parametrize("kind", MIXERS)
def test_a_state_from_the_cache_is_the_recomputed_one_to_the_bit(kind: str) -> None:
    model = model_of(kind, "gdn") if kind != "gdn" else model_of("gdn")
    shared = prompt_of(37)
    prompts = [[*shared, 1, 2, 3], shared + [4] * 20, [*shared[:33], 9], [*shared, 1, 2, 3]]
    found: dict[int, list[tuple[list[float], str]]] = {}
    for size in (0, 1 << 30):
        engine = engine_of(model, cache_bytes=size)
        found[size] = []
        for prompt in prompts:
            _, heard = ask(engine, prompt, 12, top=4)
            run(engine)
            found[size].append(([value for token in heard.tokens() for _, value in token.top], heard.text()))
        assert (engine.counters.cached_tokens > 0) == (size > 0)
    assert found[0] == found[1 << 30]
    assert found[0][1][1] == alone(model, prompts[1], 12)[0]


def test_prompts_share_the_pieces_that_they_have_in_common(model: LanguageModel) -> None:
    engine = engine_of(model)
    for tokens, marks, cached in (
        (prompt_of(50), (), 0),
        (prompt_of(50), (), 48),
        (prompt_of(48), (), 32),  # the last piece is read, for its logits
        ([*prompt_of(40), 1], (), 32),
        ([*prompt_of(40), 2], (20,), 16),  # the system prompt ends at 20
        ([*prompt_of(20), 3], (20,), 20),
        ([*prompt_of(20), 3], (), 16),
    ):
        _, heard = ask(engine, tokens, 1, marks=marks)
        run(engine)
        assert heard.read.cached == cached


def test_prompts_are_cut_at_multiples_and_marks() -> None:
    assert cut(20, 8) == [(0, 8), (8, 16), (16, 20)]
    assert cut(16, 8, (5, 16, 99, 0)) == [(0, 5), (5, 8), (8, 16)]
    same = list(range(20))
    assert names(same, cut(20, 8))[:2] == names([*range(16), 7], cut(17, 8))[:2]
    assert names(same, cut(20, 8, (5,)))[1] != names(same, cut(20, 8))[0]


def test_the_cache_keeps_the_last_used_states_within_its_capacity(model: LanguageModel) -> None:
    with torch.inference_mode():
        states = [model.init_state(1, 16) for _ in range(4)]
    cache = PrefixCache(2 * states[0].nbytes)
    for name, state in zip((b"a", b"b"), states, strict=False):
        cache.put(name, state)
    assert cache.longest([b"a", b"x"]) == (1, states[0])
    cache.put(b"c", states[2])
    assert [name in cache for name in (b"a", b"b", b"c")] == [True, False, True]
    assert cache.nbytes == cache.capacity
    small = PrefixCache(states[0].nbytes - 1)
    small.put(b"a", states[0])
    assert len(small) == 0


def test_memory_of_the_cache_is_bounded_while_prompts_go_on_coming(model: LanguageModel) -> None:
    engine = engine_of(model, cache_bytes=200_000)
    for seed in range(12):
        ask(engine, prompt_of(100, seed), 1)
    run(engine)
    assert 0 < engine.prefixes.nbytes <= 200_000
    assert engine.prefixes.nbytes == sum(state.nbytes for state in engine.prefixes._states.values())


@torch.inference_mode()
def test_slots_in_use_are_the_first_whoever_leaves(model: LanguageModel) -> None:
    slots = Slots(model, 3, 100)
    prompts = [prompt_of(length, length) for length in (5, 9, 3)]
    for prompt in prompts:
        state = model.init_state(1, 50)
        model.step(torch.tensor([prompt]), state)
        slots.join(state)
    with pytest.raises(IndexError, match="all 3 slots"):
        slots.join(state)
    slots.leave(0)
    logits = slots.step([11, 22])
    for row, prompt in enumerate(([*prompts[2], 11], [*prompts[1], 22])):
        assert_close(logits[row], model(torch.tensor([prompt]))[0, -1], 1e-5)


def test_what_a_request_read_is_told_before_its_answers(model: LanguageModel) -> None:
    engine = engine_of(model)
    _, heard = ask(engine, prompt_of(5), 3)
    run(engine)
    assert isinstance(heard.events[0], Read)
    assert isinstance(heard.events[-1], Ended)
    ended = heard.of(Ended)[0]
    assert ended.tokens == 3
    assert ended.seconds_to_first > 0
    assert ended.seconds > 0
