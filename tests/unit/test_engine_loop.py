import asyncio
import threading

import pytest

from services.common.errors import InvalidRequest, NumericsError, QueueFull, Unavailable
from services.common.sampling import FinishReason, SamplingParams
from services.engine.engine import EngineRequest
from services.engine.loop import EngineLoop
from tests.unit.tiny_model import VOCABULARY, tiny_engine, v3_config, write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)
PROMPT = list(range(3, 17))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(path, v3_config(max_position_embeddings=100_000))
    return path


@pytest.fixture
async def engine(folder):
    return tiny_engine(folder, max_num_waiting=3, max_num_sequences=4, num_blocks=2000)


@pytest.fixture
async def loop(engine):
    loop = EngineLoop(engine)
    loop.start()
    yield loop
    await loop.stop()
    assert not loop.is_healthy


async def tokens_of(stream):
    return [token async for output in stream for token in output.token_ids]


async def nothing_left(loop):
    """Waits for aborts under way (they come before any later call), then looks at the pool."""

    def look(engine):
        engine.check_integrity()
        return engine.has_work, engine.pool.num_blocks - engine.pool.num_free_blocks

    return await loop.call(look) == (False, 0) and not loop._streams


async def test_streams_the_tokens_that_stepping_by_hand_gives(loop, folder):
    by_hand = tiny_engine(folder)
    by_hand.add(EngineRequest("r", PROMPT, GREEDY))
    wanted = []
    while by_hand.has_work:
        wanted += [token for output in by_hand.step() for token in output.token_ids]
    outputs = [output async for output in loop.generate(EngineRequest("r", PROMPT, GREEDY))]
    assert [token for output in outputs for token in output.token_ids] == wanted
    assert [output.finish_reason for output in outputs] == [None] * 11 + [FinishReason.LENGTH]
    assert await nothing_left(loop)


async def test_many_streams_at_once_do_not_mix(loop):
    prompts = [PROMPT[i:] for i in range(3)]
    alone = [await tokens_of(loop.generate(EngineRequest("r", prompt, GREEDY))) for prompt in prompts]
    streams = [loop.generate(EngineRequest(str(i), prompt, GREEDY)) for i, prompt in enumerate(prompts)]
    assert await asyncio.gather(*map(tokens_of, streams)) == alone
    assert await nothing_left(loop)


@pytest.mark.parametrize("num_outputs", [1, 2, 7])
async def test_closing_a_stream_aborts_its_request(loop, num_outputs):
    stream = loop.generate(EngineRequest("r", PROMPT, ENDLESS))
    for _ in range(num_outputs):
        await anext(stream)
    await stream.aclose()
    assert await nothing_left(loop)


@pytest.mark.parametrize("num_turns", [0, 1, 2, 3, 5, 50])
async def test_cancelling_the_reader_at_any_point_aborts_its_request(loop, num_turns):
    task = asyncio.create_task(tokens_of(loop.generate(EngineRequest("r", PROMPT, ENDLESS))))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await nothing_left(loop)
    assert len(await tokens_of(loop.generate(EngineRequest("r", PROMPT, GREEDY)))) == 12  # the id is free again


async def test_cancelling_one_stream_leaves_the_others(loop):
    wanted = await tokens_of(loop.generate(EngineRequest("r", PROMPT, GREEDY)))
    victim = asyncio.create_task(tokens_of(loop.generate(EngineRequest("victim", PROMPT[2:], ENDLESS))))
    other = asyncio.create_task(tokens_of(loop.generate(EngineRequest("other", PROMPT, GREEDY))))
    await asyncio.sleep(0)
    victim.cancel()
    assert await other == wanted
    assert await nothing_left(loop)


async def test_a_stream_that_was_never_begun_adds_nothing(loop):
    stream = loop.generate(EngineRequest("r", PROMPT, ENDLESS))
    await stream.aclose()
    assert await nothing_left(loop)


async def test_an_error_of_add_is_raised_at_the_first_output(loop):
    with pytest.raises(InvalidRequest):
        await anext(loop.generate(EngineRequest("r", [VOCABULARY], GREEDY)))
    assert await nothing_left(loop)
    assert len(await tokens_of(loop.generate(EngineRequest("r", PROMPT, GREEDY)))) == 12


async def test_a_full_queue_is_raised_and_those_in_it_go_on(loop, engine):
    gate = threading.Event()
    blocked = asyncio.create_task(loop.call(lambda _: gate.wait(60)))
    tasks = [asyncio.create_task(tokens_of(loop.generate(EngineRequest(str(i), PROMPT, GREEDY)))) for i in range(4)]
    await asyncio.sleep(0)
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await blocked
    assert [type(result) for result in results] == [list, list, list, QueueFull]
    assert await nothing_left(loop)


async def test_a_refused_second_request_of_the_same_id_leaves_the_first_alone(loop):
    wanted = await tokens_of(loop.generate(EngineRequest("r", PROMPT, GREEDY)))
    first = loop.generate(EngineRequest("r", PROMPT, ENDLESS))
    tokens = list((await anext(first)).token_ids)
    with pytest.raises(ValueError, match="scheduled already"):
        await tokens_of(loop.generate(EngineRequest("r", [9], GREEDY)))
    while len(tokens) < len(wanted):
        tokens += (await anext(first)).token_ids
    assert tokens == wanted
    await first.aclose()
    assert await nothing_left(loop)


async def test_a_numerics_error_ends_its_own_stream(loop, engine):
    wanted = await tokens_of(loop.generate(EngineRequest("r", PROMPT, GREEDY)))
    poison = next(token for token in range(40, VOCABULARY) if token not in wanted)

    def spoil(engine):
        engine._runner.model.model.embed_tokens.weight.data[poison] = float("nan")

    await loop.call(spoil)
    good = asyncio.create_task(tokens_of(loop.generate(EngineRequest("good", PROMPT, GREEDY))))
    outputs = [output async for output in loop.generate(EngineRequest("bad", [5, poison, 6], GREEDY))]
    assert [type(output.error) for output in outputs] == [NumericsError]
    assert await good == wanted
    assert await nothing_left(loop)


async def test_calls_run_on_the_engine_s_thread_and_return_or_raise(loop, engine):
    assert await loop.call(lambda each: (each is engine, threading.current_thread().name)) == (True, "engine")
    with pytest.raises(KeyError, match="nothing"):
        await loop.call(lambda _: {}["nothing"])
    assert loop.is_healthy


async def test_calls_come_between_steps_in_order(loop):
    stream = loop.generate(EngineRequest("r", PROMPT, ENDLESS))
    await anext(stream)
    order = []
    await asyncio.gather(*(loop.call(lambda _, i=i: order.append(i)) for i in range(20)))
    assert order == list(range(20))
    assert not await loop.call(lambda engine: engine.scheduler.has_open_step)
    await stream.aclose()


async def test_a_cancelled_call_still_runs(loop):
    gate, ran = threading.Event(), threading.Event()
    blocked = asyncio.create_task(loop.call(lambda _: gate.wait(60)))
    call = asyncio.create_task(loop.call(lambda _: ran.set()))
    await asyncio.sleep(0)
    call.cancel()
    gate.set()
    await blocked
    await loop.call(lambda _: None)
    assert ran.is_set()


async def test_goes_on_when_blocks_held_outside_come_back(folder):
    engine = tiny_engine(folder, num_blocks=6, prefix_caching=False)
    loop = EngineLoop(engine)
    loop.start()
    held = await loop.call(lambda engine: engine.pool.allocate(5))
    stream = asyncio.create_task(tokens_of(loop.generate(EngineRequest("r", PROMPT, SamplingParams(max_tokens=3)))))
    while not await loop.call(lambda engine: engine.is_stuck and engine.has_work):
        await asyncio.sleep(0)
    await loop.call(lambda engine: engine.release_blocks(held))
    assert len(await stream) >= 1
    assert await nothing_left(loop)
    await loop.stop()


async def test_stop_ends_open_streams_with_unavailable(engine):
    loop = EngineLoop(engine)
    loop.start()
    stream = loop.generate(EngineRequest("r", PROMPT, ENDLESS))
    await anext(stream)
    await loop.stop()
    with pytest.raises(Unavailable):
        await tokens_of(stream)
    await loop.stop()  # twice is once


async def test_nothing_is_taken_after_stop(engine):
    loop = EngineLoop(engine)
    loop.start()
    assert loop.is_healthy
    await loop.stop()
    assert not loop.is_healthy
    with pytest.raises(Unavailable):
        await loop.call(lambda engine: engine.stats())
    with pytest.raises(Unavailable):
        await anext(loop.generate(EngineRequest("r", PROMPT, GREEDY)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_failing_engine_ends_its_streams_and_says_why(engine):
    loop = EngineLoop(engine)
    loop.start()
    stream = loop.generate(EngineRequest("r", PROMPT, ENDLESS))
    await anext(stream)

    def unplug(engine):
        engine._runner.cache = engine._runner._attention = None

    await loop.call(unplug)
    with pytest.raises(Unavailable) as caught:
        await tokens_of(stream)
    assert isinstance(caught.value.__cause__, AttributeError)
    assert loop.failure is caught.value.__cause__
    assert not loop.is_healthy
    await loop.stop()
