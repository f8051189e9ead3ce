"""Requests belong to their caller: threads, tasks, nested blocks."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import hand_logits, make_model, make_tokenizer, random_vectors, set_vectors
from peft import get_peft_model
from transformers import TextIteratorStreamer

from steer_adapter import SteerConfig, steering


LAYERS = [1, 2]


@pytest.fixture
def model():
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=LAYERS, task_type="CAUSAL_LM"))
    set_vectors(model, random_vectors(LAYERS))
    return model.eval()


def by_hand(input_ids, multiplier):
    return hand_logits(make_model(), input_ids, {k: multiplier * v for k, v in random_vectors(LAYERS).items()})


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def test_threads_with_strengths_of_their_own_do_not_disturb_each_other(model, input_ids):
    strengths = [-2.0, 0.5, 3.0, None]
    wanted = {strength: by_hand(input_ids, 1.0 if strength is None else strength) for strength in strengths}
    barrier = threading.Barrier(len(strengths))
    wrong = []

    def serve(strength):
        for _ in range(10):
            barrier.wait()
            if strength is None:
                received = logits(model, input_ids)
            else:
                with steering(model, strength):
                    received = logits(model, input_ids)
            if (received - wanted[strength]).abs().max() > 1e-5:
                wrong.append(strength)

    threads = [threading.Thread(target=serve, args=(strength,)) for strength in strengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("join_inside", [True, False])
def test_a_streamer_s_thread_gets_what_its_caller_set(model, input_ids, join_inside):
    tokenizer, texts = make_tokenizer(), {}
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)

    def stream(strength, results):
        streamer = TextIteratorStreamer(tokenizer, timeout=60)
        with steering(model, strength):
            thread = threading.Thread(
                target=model.generate, kwargs=dict(input_ids=input_ids[:1], streamer=streamer, **options)
            )
            thread.start()
            if join_inside:
                results[strength] = "".join(streamer)
        if not join_inside:
            results[strength] = "".join(streamer)
        thread.join()

    callers = [threading.Thread(target=stream, args=(strength, texts)) for strength in (-3.0, 0.0, 3.0)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for strength, text in texts.items():
        model.set_multiplier(strength)
        alone = model.generate(input_ids=input_ids[:1], **options)
        assert text == tokenizer.decode(alone[0])
    assert len(set(texts.values())) == 3


def test_a_pool_s_worker_keeps_nothing_of_the_one_who_started_it(model, input_ids):
    with ThreadPoolExecutor(1) as pool:
        with steering(model, -2.0):
            plain = pool.submit(logits, model, input_ids).result()
            context = contextvars.copy_context()
            asked = pool.submit(context.run, logits, model, input_ids).result()
        after = pool.submit(logits, model, input_ids).result()
    assert torch.equal(plain, after) and (plain - by_hand(input_ids, 1.0)).abs().max() <= 1e-5
    assert (asked - by_hand(input_ids, -2.0)).abs().max() <= 1e-5


def test_tasks(model, input_ids):
    async def serve(strength):
        with steering(model, strength):
            await asyncio.sleep(0.01)
            return await asyncio.to_thread(logits, model, input_ids)

    async def all_of_them():
        return await asyncio.gather(*map(serve, (1.0, -1.0, 2.0)))

    for received, strength in zip(asyncio.run(all_of_them()), (1.0, -1.0, 2.0), strict=True):
        assert (received - by_hand(input_ids, strength)).abs().max() <= 1e-5


def test_nested_blocks_take_what_they_leave_open_from_the_outer_one(model, input_ids):
    with steering(model, 2.0):
        with steering(model, adapter_names=["__base__", "default"]):
            received = logits(model, input_ids)
        assert (logits(model, input_ids) - by_hand(input_ids, 2.0)).abs().max() <= 1e-5
    wanted = torch.cat([by_hand(input_ids, 0.0)[:1], by_hand(input_ids, 2.0)[1:]])
    assert (received - wanted).abs().max() <= 1e-5


def test_values_by_name_leave_those_of_the_outer_block_to_the_other_vectors(model, input_ids):
    model.add_adapter("other", SteerConfig(layers_to_transform=LAYERS))
    set_vectors(model, random_vectors(LAYERS, seed=2), "other")
    first, second = random_vectors(LAYERS), random_vectors(LAYERS, seed=2)
    wanted = [
        hand_logits(make_model(), row[None], {k: factor * first[k] + 0.5 * second[k] for k in first})
        for row, factor in zip(input_ids, (2.0, -1.0), strict=True)
    ]
    for outer in ([2.0, -1.0], {"default": [2.0, -1.0], "other": 7.0}):
        with steering(model, outer), steering(model, {"other": 0.5}):
            assert (logits(model, input_ids) - torch.cat(wanted)).abs().max() <= 1e-5


def test_a_block_is_over_after_an_error(model, input_ids):
    with pytest.raises(RuntimeError, match="stop"), steering(model, 5.0):
        raise RuntimeError("stop")
    assert (logits(model, input_ids) - by_hand(input_ids, 1.0)).abs().max() <= 1e-5


def test_another_model_is_left_alone(model, input_ids):
    other = get_peft_model(make_model(), SteerConfig(layers_to_transform=LAYERS))
    set_vectors(other, random_vectors(LAYERS))
    with steering(model, 5.0), steering(other, -1.0):
        assert (logits(model, input_ids) - by_hand(input_ids, 5.0)).abs().max() <= 1e-5
        assert (logits(other, input_ids) - by_hand(input_ids, -1.0)).abs().max() <= 1e-5
