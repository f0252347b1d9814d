"""What every record of a dataset must be, and how many there are."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Annotated

from videollm_mod_jax.config_dict import COUNT_OR_NONE, Checked, Interval
from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.annotations import (
    FieldError,
    Record,
    Videos,
    check_text,
    check_unicode,
    frame_range,
)
from videollm_mod_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split(Checked):
    """What a split of a prepared dataset amounts to.

    Attributes:
      records: number of records.
      videos: number of videos that they are about.
      frames: frames of all records.
      turns: turns of all records.
    """

    records: COUNT_OR_NONE
    videos: COUNT_OR_NONE
    frames: Annotated[int, Interval("[0, 2**63)")]
    turns: Annotated[int, Interval("[0, 2**63)")]


class CountedSplit:
    """The records of a split, checked and counted as they pass.

    Attributes:
      empty: whether there are none.
      videos: the videos that they are about, each once, in order; a dict whose values mean nothing.
    """

    def __init__(self, records: Iterable[Record], videos: Videos):
        """Args: records: of the split, in order; videos: whose features are stored."""
        records = iter(records)
        first = tuple(itertools.islice(records, 1))
        self.empty = not first
        self.videos: dict[str, None] = {}
        self._records, self._stored = itertools.chain(first, records), videos
        self._count = self._frames = self._turns = 0
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Record]:
        ids = set()
        for record in self._records:
            check_record(record, self._stored)
            if record.id in ids:
                raise UserError(f"{record.id}: expected one record of this name, found two")
            ids.add(record.id)
            self.videos[record.video] = None
            self._count += 1
            self._frames += len(frame_range(record, self._stored.fps))
            self._turns += len(record.turns)
            self._digest.update(repr(record).encode())
            yield record

    @property
    def sha256(self) -> str:
        """Of what has passed so far; the same for the same records in the same order."""
        return self._digest.hexdigest()

    @property
    def counts(self) -> Split:
        """What has passed so far."""
        return Split(
            records=self._count,
            videos=len(self.videos),
            frames=self._frames,
            turns=self._turns,
        )


def check_record(record: Record, videos: Videos) -> None:
    """Refuses, before it is stored, a record that training or evaluation would trip over.

    Raises:
      UserError: its frames are not all stored, its turns do not make a conversation, or no
        dialogue can hold a text.
    """
    stored, frames = videos.frames.get(record.video, 0), frame_range(record, videos.fps)
    if not (frames and 0 <= frames[0] <= frames[-1] < stored):
        raise UserError(
            f"{record.id}: expected frames among the {stored} of {record.video!r}, found "
            f"{frames.start} to {frames.stop - 1}"
        )
    dialogue.conversation_of(record, videos.fps, system="")
    try:
        check_unicode(record.id, f"{record.id!r}")
        for number, turn in enumerate(record.turns):
            check_text(turn.text, f"{record.id}: turn {number}")
    except FieldError as error:
        raise UserError(str(error)) from error
