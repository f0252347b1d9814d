"""The manuals of `ego4d_narration` and `ego4d_refined_narration`."""

from videollm_mod_jax.data.builders import ego4d_splits

_CONVERSATION = """\
**Records.** One for what one annotator said about one stretch of a video (its annotation uid):
narrations in order of time, each after the first frame at or after its time. The stretch begins
with the frame of the first narration and ends with that of the last. After the first frame the user
asks for narration; the first narration is the answer. At 2 fps (`|` a frame, U the user, A B C
narrations at 1.2, 2.0 and 3.4 s):

    |1.5 U A |2.0 B |2.5 |3.0 |3.5 C

Dropped and counted, as upstream does: a narration that repeats the one before it; the earlier of
two in one frame; what follows a narration of the last frame; what lies more than `max_frames`
frames into the record. Not as upstream: what lies more than a frame after the end of the
video (upstream says the first of them at the last frame, whatever its time), and narrations whose
fields are missing, mistyped, empty, too long, or hold `<v>` or half of a surrogate pair."""

PAGE = f"""\
Narrations of Ego4D in the words of its annotators, in which C is the camera wearer.

**Get it.** Sign the licence at ego4d-data.org, then download the annotations and the videos:
`ego4d -o DIR --version v2_1 --datasets annotations full_scale`. `--source` is
`DIR/v2/annotations`; features are of the videos in `DIR/v2/full_scale`, named by their uid.

**Files.** One of two; the first if both are there, as upstream has it:

- `all_narrations_redacted.json` (8,922 videos):
  `{{"videos": {{VIDEO: {{"narrations": [{{"time", "text", "_annotation_uid"}}]}}}}}}`
- `narration.json` (9,611 videos): `{{VIDEO: {{"narration_pass_1": {{"narrations":
  [{{"timestamp_sec", "narration_text", "annotation_uid"}}]}}, "narration_pass_2": ...}}}}`;
  EgoVLP cuts 3,847,723 clips by them.

Other fields are not read.

{ego4d_splits.PAGE}
{_CONVERSATION}

Cleaned: `#C`, `#O`, `#unsure` and other `#` go, so do full stops, commas and spaces at both ends;
then a full stop comes last, and the first word begins with a capital. Dropped is what has fewer
than two words then.

`"#C C picks a bag #unsure"` becomes `"C picks a bag."`.
"""

REFINED_PAGE = f"""\
The same narrations, rewritten by Llama 3 for the second person: "You pick a bag."

**Get it.** huggingface.co/datasets/chenjoya/videollm-online-chat-ego4d-134k (accept its terms), or
make them with data/preprocess/ego4d_narration_refinement.py of showlab/videollm-online. Features
are of the videos of Ego4D, named by their uid.

**Files.** `refined_narration_stream_train.json` and `refined_narration_stream_val.json`, or one of
them: `{{VIDEO: {{ANNOTATION_UID: [{{"time": seconds, "text": ...}}]}}}}`. Cleaning has been done
there: upstream counts 113 thousand streams in both.

Splits: `train`, `validation`.

They are the files. A video of the validation file is dropped from the other. (The script of
upstream's released model trains on both.)

{_CONVERSATION}

Upstream draws one of ten requests for narration each time it visits a record; here the name of the
record decides.
"""
