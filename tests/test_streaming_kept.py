"""Pictures of what routing keeps show what was kept, where it lies, and nothing that was not."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import tiny, tiny_stream
from videollm_mod_jax import stream
from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.video import Frame, read_video, write_video
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM, config_plan, full_computation, init_caches
from videollm_mod_jax.streaming import engine, kept
from videollm_mod_jax.streaming.session import StreamingSession
from videollm_mod_jax.training.checkpoint import save_model

N = tiny.CONFIG.tokens_per_frame
ROUTED = [i for i, spec in enumerate(config_plan(tiny.CONFIG)) if spec.keep is not None]
FRAMES = [
    Frame(i / 2, np.random.default_rng(i).integers(0, 256, (16, 24, 3), np.uint8)) for i in range(5)
]


def model(**routing):
    loaded = tiny_stream.loaded_model(silence=9.0)
    config = dataclasses.replace(
        loaded.config, routing=dataclasses.replace(loaded.config.routing, **routing)
    )
    return dataclasses.replace(loaded, config=config)


@pytest.mark.parametrize("selection", ["learned", "uniform", "random"])
def test_a_stream_keeps_what_one_pass_over_the_clip_keeps(selection):
    loaded = model(selection=selection)
    session = StreamingSession(loaded, max_frames=8, max_text_tokens=64, max_new_tokens=4)
    for frame in FRAMES:
        assert session.see(frame) is None, "this model is silent"
    opening = dialogue.opening(loaded.system, loaded.tokenizer.bos) + dialogue.STREAM_OPEN
    ids = loaded.tokenizer.encode(opening).ids.tolist()
    starts = []
    for i in range(len(FRAMES)):
        ids += [loaded.tokenizer.interval_id] if i else []
        starts.append(len(ids))
        ids += [0] * N
    out = VideoLLM(loaded.config).apply(
        loaded.variables,
        jnp.array([ids]),
        jnp.stack([session.encode(frame).features_BNW for frame in FRAMES], 1),
        jnp.array([starts]),
        jnp.zeros((1, 1), jnp.int32),
    )
    found = session.kept_tokens()
    assert found.shape == (len(out.kept), len(FRAMES), N)
    for layer, offsets in enumerate(out.kept):
        expected = np.ones((len(FRAMES), N), bool)
        if offsets is not None:
            expected = (np.arange(N) == np.asarray(offsets[0])[..., None]).any(1)
        np.testing.assert_array_equal(found[layer], expected)
    np.testing.assert_array_equal(session.kept_tokens(first=-2), found[:, -2:])


def test_kept_tokens_are_read_off_the_caches_as_drawn():
    (cache,) = init_caches(
        dataclasses.replace(
            tiny.CONFIG,
            routing=full_computation(),
            decoder=dataclasses.replace(tiny.DECODER, num_layers=1),
        ),
        1,
        7,
        0,
        jnp.float32,
    )
    cache = cache.replace(
        position_BC=cache.position_BC.at[0, :6].set(jnp.array([0, 1, 2, 3, 7, 9]))
    )
    found = engine.kept_tokens((cache,), jnp.array([1, 8]), 4)
    assert found.astype(int).tolist() == [[[1, 1, 1, 0], [0, 1, 0, 0]]]


def vision(pool, **changes):
    return dataclasses.replace(tiny.VISION, pool=pool, **changes)


def test_patches_lie_where_the_letterbox_puts_them():
    boxes = kept.patch_boxes(vision((2, 2)), height=10, width=20)
    assert boxes.tolist() == [[0, 0, 10, 5], [10, 0, 20, 5], [0, 5, 10, 10], [10, 5, 20, 10]]
    tall = kept.patch_boxes(vision((4, 1)), height=40, width=10)
    assert tall.tolist() == [[0, 10 * i, 10, 10 * i + 10] for i in range(4)]
    # The first and last row lie in the bars.
    wide = kept.patch_boxes(vision((4, 1)), height=10, width=20)
    assert wide.tolist() == [[0, 0, 20, 0], [0, 0, 20, 5], [0, 5, 20, 10], [0, 10, 20, 10]]
    # Bins of a grid of 4 that 3 does not divide share a row.
    shared = kept.patch_boxes(vision((1, 3)), height=8, width=8)
    assert shared[:, [0, 2]].tolist() == [[0, 4], [2, 6], [4, 8]]


def test_a_picture_is_bright_where_layers_keep_and_dark_where_none_does():
    config = tiny.CONFIG
    image_HWC = np.full((400, 400, 3), 200, np.uint8)
    kept_LN = np.zeros((config.decoder.num_layers, N), bool)
    kept_LN[ROUTED[0], 1] = True  # the patch at the top left
    kept_LN[0] = True  # of a dense layer, which is not asked
    shown = kept.draw_kept(image_HWC, kept_LN, config)
    assert shown.shape[0] == 400
    assert shown.shape[1] > 400
    top_left, bottom_right = shown[100, 100].mean(), shown[300, 300].mean()
    assert bottom_right < 0.5 * 200 < top_left
    kept_LN[ROUTED, 1] = True
    assert kept.draw_kept(image_HWC, kept_LN, config)[100, 100].mean() > top_left
    none = kept.draw_kept(image_HWC, np.zeros_like(kept_LN), config)
    assert none.shape == shown.shape
    assert np.abs(none.astype(int) - shown)[:, 400:].max() > 100, "the panel shows it, too"


def test_a_heat_map_is_a_picture(tmp_path):
    kept_LFN = np.random.default_rng(0).random((4, 9, N)) < 0.4
    kept.draw_heat_map(kept_LFN, tiny.CONFIG, tmp_path / "heat.png")
    image = np.asarray(Image.open(tmp_path / "heat.png").convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["heat.png"]


def test_layers_are_described_by_what_they_keep_most():
    kept_LFN = np.zeros((4, 4, N), bool)
    kept_LFN[1, :, 0] = True
    kept_LFN[1, :3, 4] = kept_LFN[1, 3:, 2] = True
    kept_LFN[3, :, 1:3] = True
    assert kept.describe_kept(kept_LFN, tiny.CONFIG).splitlines() == [
        "layer 1 keeps 2 of 5 tokens: "
        "CLS in 100% of the frames, patch 1,1 in 75%, patch 0,1 in 25%",
        "layer 3 keeps 2 of 5 tokens: "
        "patch 0,0 in 100% of the frames, patch 0,1 in 100%, CLS in 0%",
    ]


def test_kept_patches_are_held_against_chance():
    objects_FP = np.array([[True, True, False, False]])
    kept_LFP = np.array([[[True, False, False, True]], [[True, True, False, False]], [[False] * 4]])
    found = kept.on_objects(kept_LFP, objects_FP)
    assert found.chance == 0.5
    assert found.share_L[:2].tolist() == [0.5, 1.0]
    assert found.ratio_L[:2].tolist() == [1.0, 2.0]
    assert np.isnan(found.share_L[2])
    with pytest.raises(UserError, match="expected a patch with an object"):
        kept.on_objects(kept_LFP, np.zeros_like(objects_FP))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, [frame.image for frame in FRAMES], 2)
    return path


def saved(loaded, path):
    save_model(path, loaded.config, loaded.variables, loaded.tokenizer, loaded.system)
    return path


def test_the_verb_writes_both_videos_and_says_what_is_kept(clip, tmp_path, capsys):
    run = saved(model(), tmp_path / "run")
    routing, out = tmp_path / "routing.mp4", tmp_path / "out.mp4"
    command = ["--checkpoint", str(run), "--video", str(clip), "--max-text-tokens", "128"]
    command += ["--out", str(out), "--show-routing", str(routing)]
    assert stream.main(command) == 0
    printed = capsys.readouterr().out
    assert "layer 1 keeps 2 of 5 tokens: " in printed
    assert f"wrote {routing}" in printed
    sizes = {}
    for path in (out, routing):
        frames = list(read_video(path, fps=2))
        assert len(frames) == len(FRAMES)
        sizes[path] = frames[0].image.shape
    assert sizes[routing][1] > sizes[out][1]


def test_a_model_that_chooses_nothing_is_refused_before_it_streams(clip, tmp_path, capsys):
    run = saved(model(keep_ratio=0.0), tmp_path / "run")
    out = tmp_path / "routing.mp4"
    command = ["--checkpoint", str(run), "--video", str(clip), "--show-routing", str(out)]
    assert stream.main(command) == 2
    assert "no layer of this model chooses" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_the_last_patch_of_an_object_is_the_one_that_can_have_seen_all_of_it():
    objects_FP = np.array([[1, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1]], bool)
    last = np.array([[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]], bool)
    assert (kept.last_patches(objects_FP, 3) == last).all()
