"""Answers depend on the record and the seed, not on what else is in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests import tiny_benchmarks, tiny_stream
from tests.tiny_benchmarks import FPS, N, asked
from videollm_mod_jax.data.annotations import Record
from videollm_mod_jax.data.dialogue import Assistant, Stream, System, User
from videollm_mod_jax.data.video import Frame
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation import answers, prompts
from videollm_mod_jax.evaluation.answers import Decoding
from videollm_mod_jax.evaluation.placing import put_rows
from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.streaming.session import StreamingSession, letterbox
from videollm_mod_jax.training import sharding

T = 8
GREEDY = Decoding(max_new_tokens=T, temperature=0.0, samples=1, seed=0)
SAMPLED = Decoding(max_new_tokens=T, temperature=1.0, samples=3, seed=5)
FRAMES = {"a": 3, "b": 3, "c": 3, "d": 2, "e": 2, "f": 3, "g": 2}


@pytest.fixture(scope="module")
def model():
    return tiny_benchmarks.loaded_model()


@pytest.fixture(scope="module")
def examples():
    words = ("How many?", "What happens now?", "And?")
    records = [asked(v, f, words[i % 3]) for i, (v, f) in enumerate(FRAMES.items())]
    return tiny_benchmarks.examples(records, tiny_benchmarks.drawn(FRAMES))


def said(model, examples, decoding, batch_size, indices=None):
    indices = range(len(examples)) if indices is None else indices
    answered = answers.answer_records(model, examples, indices, decoding, batch_size=batch_size)
    return {index: texts for index, _, texts in answered}


def test_a_prompt_is_everything_before_the_last_answer():
    words = tiny_stream.tokenizer()
    conversation = (
        System("Watch."),
        Stream(1),
        Assistant("A cat sits."),
        Stream(2),
        User("How many?"),
        Assistant("Two."),
        Stream(3),
    )
    before, reference = prompts.split_reference(conversation)
    assert (before, reference) == (conversation[:5], "Two.")
    prompt = prompts.make_prompt(before, words, N)
    text = (
        "<|begin_of_text|>Watch.\n\n[{}]\nAssistant: A cat sits.<|eot_id|>\n[{}]"
        "\nUser: How many?\nAssistant:"
    )
    assert prompt.text == text.format("1 frame", "2 frames")
    ids = words.encode(text.format("<v>" * N, "<v>" * N + "," + "<v>" * N)).ids
    is_vision = ids == words.placeholder_id
    np.testing.assert_array_equal(prompt.tokens[~is_vision], ids[~is_vision])
    assert not prompt.tokens[is_vision].any()
    np.testing.assert_array_equal(prompt.frame_starts, np.flatnonzero(is_vision)[::N])


def test_a_prompt_is_made_as_drawn():
    words = tiny_stream.tokenizer()
    prompt = prompts.make_prompt((System("Hi"), Stream(2), User("How?")), words, 2)
    assert prompt.text == f"{words.bos}Hi\n\n[2 frames]\nUser: How?\nAssistant:"
    before, after = (
        words.encode(f"{words.bos}Hi\n\n[").ids,
        words.encode("]\nUser: How?\nAssistant:"),
    )
    vision = [0, 0, words.interval_id, 0, 0]
    assert prompt.tokens.tolist() == [*before, *vision, *after.ids]
    assert prompt.frame_starts.tolist() == [len(before), len(before) + 3]


def test_prompts_are_padded_as_drawn():
    bucket = prompts.frame_bucket
    assert [bucket(f) for f in range(11)] == [1, 1, 2, 3, 4, 5, 6, 7, 8, 10, 10]
    assert [bucket(f) for f in (11, 12, 13, 14, 15, 16, 17, 20, 21)] == [
        *(12, 12, 14, 14, 16, 16, 20, 20, 24)
    ]
    assert max(bucket(f) / f for f in range(1, 3000)) <= 1.25
    prompt = prompts.Prompt("", np.zeros(9 * N + 20, np.int32), np.zeros(9, np.int32))
    assert prompts.padded_shape(prompt, N) == (10, 32)


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED])
def test_answers_do_not_depend_on_the_batch(model, examples, decoding):
    alone = {}
    for index in range(len(examples)):
        alone |= said(model, examples, decoding, 1, [index])
    assert said(model, examples, decoding, 3) == alone
    # As of a run that continues, or of one of several processes.
    assert said(model, examples, decoding, 3, [6, 4, 1]) == {i: alone[i] for i in (1, 4, 6)}
    lengths = {len(text) for texts in alone.values() for text in texts}
    assert len(lengths) >= 3


def test_samples_differ_and_follow_from_the_seed(model, examples):
    drawn = said(model, examples, SAMPLED, 3)
    assert all(len(texts) == 3 for texts in drawn.values())
    assert sum(len(set(texts)) == 3 for texts in drawn.values()) > 3
    other = Decoding(max_new_tokens=T, temperature=1.0, samples=3, seed=6)
    assert said(model, examples, other, 3) != drawn
    # Nothing is left of a sample when the next is drawn: next to no chance is no chance.
    cold = Decoding(max_new_tokens=T, temperature=1e-5, samples=2, seed=5)
    greedy = said(model, examples, GREEDY, 3)
    assert said(model, examples, cold, 3) == {i: texts * 2 for i, texts in greedy.items()}
    # The first of one sample is the first of three: what is drawn later does not reach back.
    one = Decoding(max_new_tokens=T, temperature=1.0, samples=1, seed=5)
    assert said(model, examples, one, 3) == {i: texts[:1] for i, texts in drawn.items()}


def test_greedy_answers_equal_those_of_a_live_session():
    # So silent that the session says nothing unasked; nine frames are padded to ten.
    model = tiny_benchmarks.loaded_model(silence=5.0)
    video_llm, size = VideoLLM(model.config), model.config.vision.image_size
    rng = np.random.default_rng(0)
    videos, records, live = {}, [], []
    for name, frames, question in (("x", 9, "How many?"), ("y", 9, "And?"), ("z", 9, "Where?")):
        images = rng.integers(0, 256, (frames, size, size, 3), dtype=np.uint8)
        session = StreamingSession(
            model, max_frames=9, max_text_tokens=256, max_new_tokens=T, silence_threshold=None
        )
        encoded = []
        for i, image in enumerate(images):
            assert session.see(Frame(i / FPS, image)) is None
            square = letterbox(image, size)[None]
            encoded.append(np.asarray(engine.encode(video_llm, model.variables, square))[0])
        live.append((session.ask(question).text,))
        videos[name] = np.stack(encoded)
        records.append(asked(name, frames, question))
    examples = tiny_benchmarks.examples(records, tiny_benchmarks.Features(videos))
    assert said(model, examples, GREEDY, 3) == dict(enumerate(live))
    assert len({text for (text,) in live}) > 1


def test_rows_that_do_not_answer_are_left_as_they_were(model, examples):
    video_llm = VideoLLM(model.config)
    group = [(i, prompt) for i, prompt in answers._prompts(examples, (0, 1, 2))]
    batch = answers._stack(examples, group, (3, 64), N, 3)
    before = answers.prefill(video_llm, model.variables, batch, max_new_tokens=T)
    position, filled = np.asarray(before.position_B), np.asarray(before.entries_LB)
    logits = np.asarray(before.logits_BV)
    settings = {"eos_id": model.tokenizer.eos_id, "max_new_tokens": T, "temperature": 0.0}
    mask = np.array([True, False, True])
    keys = answers._key_data(0, 0, np.arange(3))
    after, tokens, length = engine.generate_rows(
        video_llm, model.variables, before, mask, keys, **settings
    )
    assert not np.asarray(tokens)[1].any()
    assert int(length[1]) == 0
    np.testing.assert_array_equal(np.asarray(after.position_B)[1], position[1])
    np.testing.assert_array_equal(np.asarray(after.entries_LB)[:, 1], filled[:, 1])
    np.testing.assert_array_equal(np.asarray(after.logits_BV)[1], logits[1])
    # The others hold their answers and one eos.
    said = [int(np.argmax(row == model.tokenizer.eos_id)) + 1 for row in np.asarray(tokens)]
    grown = np.asarray(after.position_B) - position
    assert grown.tolist() == length.tolist() == [said[0], 0, said[2]]


def test_a_record_without_an_answer_is_asked_at_its_end(model, examples):
    whole = examples.records[0]
    records = [whole, Record(id="x", video="a", start=0.0, stop=1.5, turns=whole.turns[:1])]
    both = tiny_benchmarks.examples(records, examples.features)
    found = list(answers.answer_records(model, both, [0, 1], GREEDY, batch_size=3))
    assert found[0][1].text == found[1][1].text
    assert found[0][2] == found[1][2]


def test_rows_are_split_over_the_mesh_of_the_model():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.MESH_AXES)
    variables = {"x": jax.device_put(np.zeros(3), NamedSharding(mesh, PartitionSpec()))}
    batch = {"tokens": np.zeros((4, 3)), "key": np.zeros(2)}
    placed = put_rows(batch, 4, variables)
    assert placed["tokens"].sharding.spec == PartitionSpec(sharding.BATCH_AXES)
    assert placed["key"].sharding.spec == PartitionSpec()
    assert put_rows(batch, 4, {"x": jnp.zeros(3)}) is batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 1}, "max_new_tokens is 1"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"samples": 5}, "all would be the same"),
    ],
)
def test_settings_that_answer_nothing_new_are_refused(changes, message):
    settings = {"max_new_tokens": 8, "temperature": 0.0, "samples": 1, "seed": 0}
    with pytest.raises(UserError, match=message):
        Decoding(**(settings | changes))
