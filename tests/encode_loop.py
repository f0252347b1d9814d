"""Encodes a folder again and again, and says how far it is; a script to be killed.

    python -m tests.encode_loop MODEL VIDEOS OUT

Every line of its input starts a child that runs `encode`; the child is killed by whoever reads its
output, or ends with a status.
"""

import os
import sys
import time

from tests.killed import say
from videollm_mod_jax import encode, encoding
from videollm_mod_jax.data import video_folder


def write_shards(encode_frames, *arguments):
    """As in `encoding`, with a tower that takes its time, and says when that is compiled."""

    def slowly(images_BAAC):
        if not said:
            encode_frames(images_BAAC)
            said.append(True)
            say(f"encoding {os.getpid()}")
        time.sleep(0.03)
        return encode_frames(images_BAAC)

    said = []
    encoding.write_shards(slowly, *arguments)


if __name__ == "__main__":
    # Many shards and many batches of few frames.
    video_folder.LEAST_FRAMES, encode.BATCH_SIZE = 24, 8
    encode.write_shards = write_shards
    model, videos, out = sys.argv[1:]
    # Forked before JAX starts: importing takes longer than all that is tested.
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            say(f"begun {os.getpid()}")
            flags = ["--checkpoint", model, "--videos", videos, "--out", out, "--workers", "2"]
            sys.exit(encode.main(flags))
        say(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
