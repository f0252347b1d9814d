"""The PyTorch peer does the work that ours does, and so may be timed beside it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests import tiny_training
from tests.peers import running, stream, train
from tests.peers.decoding import CACHES, Decoding
from tests.peers.model import Peer, as_tensors
from tests.peers.update import Update
from videollm_mod_jax.models import NO_LORA, Execution, LoraConfig, VideoLLM, full_computation
from videollm_mod_jax.models.config import LINEAR_NAMES
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.training.metrics import means
from videollm_mod_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    split_variables,
)
from videollm_mod_jax.training.state import create_state
from videollm_mod_jax.training.step import make_train_step

CONFIG = dataclasses.replace(
    tiny_training.model_config(),
    routing=full_computation(),
    lora=LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=(*LINEAR_NAMES, "lm_head")),
)
TRAINING = tiny_training.training_config(trainable="lora", scan=False, stream_weight=0.7)
SCHEDULE = learning_rate_schedule(TRAINING.optimizer, TRAINING.steps)
# What transformers 5 says of names that 4 has, too.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    # Idle threads of torch spin, and other tests run beside these.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def update(config=CONFIG):
    peer = Peer(config, CPU)
    peer.load(jax.tree.map(jnp.asarray, tiny_training.variables(config)))
    return Update(peer, TRAINING, compiled=False)


@functools.cache
def ours():
    """State and loss after each of three updates, which keep their gradient."""
    # Passes the gradient on as it is.
    keep = optax.trace(decay=0.0, nesterov=False)
    optimizer = optax.chain(keep, make_optimizer(TRAINING.optimizer, SCHEDULE))
    step = make_train_step(
        VideoLLM(CONFIG, Execution(remat=True)),
        optimizer,
        SCHEDULE,
        stream_weight=TRAINING.stream_weight,
        microbatches=TRAINING.microbatches,
    )
    step = jax.jit(step)
    trained, frozen = split_variables(tiny_training.variables(CONFIG), "lora")
    state, after = create_state(trained, optimizer, seed=0), []
    for index in range(3):
        state, metrics = step(state, frozen, tiny_training.batch(index))
        after.append((state, means(jax.device_get(metrics))["loss"]))
    return after


def test_the_loss_and_every_gradient_are_ours():
    state, loss = ours()[0]
    theirs = update()
    found_loss = theirs.gradients(as_tensors(tiny_training.batch(0), CPU))
    assert float(found_loss) == pytest.approx(loss, abs=1e-4)
    expected = theirs.peer.tensors(state.opt_state[0].trace)
    found = {n: p.grad for n, p in theirs.peer.parameters_by_name().items() if p.requires_grad}
    assert found.keys() == expected.keys()
    assert len(found) == 2 * (7 * CONFIG.decoder.num_layers + 1) + 4
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-5, name
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_three_updates_leave_our_weights():
    theirs, before = update(), update()
    for index, (_, loss) in enumerate(ours()):
        batch = as_tensors(tiny_training.batch(index), CPU)
        assert float(theirs(batch, float(SCHEDULE(index)))) == pytest.approx(loss, abs=1e-4)
    found = theirs.peer.parameters_by_name()
    start = before.peer.parameters_by_name()
    state, _ = ours()[-1]
    for name, weight in theirs.peer.tensors(state.trained).items():
        torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=0, msg=name)
        assert (found[name] - start[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("cache", CACHES)
def test_a_stream_gives_our_logits_after_every_frame(cache):
    config = dataclasses.replace(CONFIG, lora=NO_LORA)
    variables = jax.tree.map(jnp.asarray, tiny_training.variables(config))
    peer = Peer(config, CPU).eval()
    peer.load(variables)
    frames, N = 5, config.tokens_per_frame
    features_FNW = np.random.default_rng(0).normal(size=(frames, N, config.vision.width))
    prefixes = [[1, 2, 3]] + [[4]] * (frames - 1)
    room = sum(map(len, prefixes))
    model = VideoLLM(config)
    state = engine.start(model, 1, max_text=room, max_frames=frames, seed=0)
    theirs = Decoding(peer, cache, room + frames * N, compiled=False)
    for prefix, features_NW in zip(prefixes, features_FNW.astype(np.float32), strict=True):
        tokens_BT, features_BNW = np.array([prefix], np.int32), features_NW[None]
        state = engine.append_frame(model, variables, state, tokens_BT, features_BNW)
        found = theirs.append(torch.tensor(tokens_BT).long(), torch.tensor(features_BNW))
        np.testing.assert_allclose(found, state.logits_BV, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache", CACHES)
def test_a_filled_cache_is_as_long_as_asked_for(cache):
    config = dataclasses.replace(CONFIG, lora=NO_LORA)
    theirs = Decoding(Peer(config, CPU).eval(), cache, capacity=20, compiled=False)
    theirs.fill(13, seed=0)
    assert [int(layer.get_seq_length()) for layer in theirs.cache.layers] == [13] * 4
    assert all(layer.keys[:, :, :13].abs().min() > 0 for layer in theirs.cache.layers)


def test_ratios_are_to_the_fastest_peer():
    medians = {"ours_full": 3.0, "ours_mod": 2.0, "peer": 4.0, "peer_compiled": 5.0}
    assert running.ratios(medians, ["peer", "peer_compiled"]) == {
        "full_to_peer": 3 / 4,
        "mod_to_peer": 2 / 4,
        "mod_to_full": 2 / 3,
    }


def test_both_commands_leave_every_variant(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "prepare", lambda threads: 1)
    flags = ["--config", "configs/digits.py", "--out", str(tmp_path), "--rounds=1", "--warmup=1"]
    small = ["--config.model.decoder.num_layers=2", "--config.data.frames=2"]
    trained = [
        "--config.data.batch_size=1",
        "--config.training.trainable=lora",
        "--config.model.lora.rank=2",
        "--config.model.lora.targets=('q','lm_head')",
    ]
    assert train.main([*flags, *small, *trained]) == 0
    assert stream.main([*flags, *small, "--minutes", "1"]) == 0
    result = json.loads((tmp_path / "peer_train.json").read_text())
    assert list(result["seconds"]) == ["ours_full", "ours_mod", "peer"]
    losses = result["first_losses"]
    assert losses["ours_full"] == pytest.approx(losses["peer"], abs=1e-4)
    assert losses["ours_full"] != losses["ours_mod"]
    (row,) = json.loads((tmp_path / "peer_stream.json").read_text())["contexts"]
    assert list(row["seconds"]) == ["ours_full", "ours_mod", "peer_dynamic", "peer_static"]
    assert all(len(seconds["seconds"]) == 1 for seconds in row["seconds"].values())
