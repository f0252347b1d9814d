"""From records to batches of fixed shape, by Grain.

The order of the examples is a function of the seed alone: not of the number of processes that share
a batch, nor of the workers that load it. So the state of the iterator is one integer, the number of
the next batch.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np
from absl import flags

from videollm_mod_jax.data import augment, dialogue, example
from videollm_mod_jax.data.features import FeatureSource
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.errors import UserError

# Grain's default keeps 500 elements in flight per worker: gigabytes, when an element is a video.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True)
class Examples:
    """A dataset as a sequence of examples; picklable, so that workers can load it.

    Attributes:
      records: record i has `id`, `fps` and `turns` (a list of dicts role, time, text, or, as TFDS
        reads it, a dict of lists), such as `builder.as_data_source(split)`.
      features: the features of the same videos in the same order.
      tokenizer: encodes the dialogue.
      tokens_per_frame: N of the model, how many positions of the sequence a frame takes.
      system: the instruction that opens every conversation.
      budget: the sizes of an example.
      disturb: how to disturb the answers of a training example, None for never.
    """

    records: Sequence[Mapping[str, object]]
    features: FeatureSource
    tokenizer: Tokenizer
    tokens_per_frame: int
    system: str
    budget: example.Budget
    disturb: augment.Disturbance | None = None

    def __post_init__(self):
        if len(self.records) != len(self.features):
            raise UserError(
                f"{self.features.path}: expected features of {len(self.records)} videos, found "
                f"{len(self.features)}; encode the videos again"
            )

    def __len__(self) -> int:
        return len(self.records)

    def conversation(self, index: int) -> dialogue.Conversation:
        """The undisturbed conversation of record `index`."""
        return self._read(index)[0]

    def turns(self, index: int) -> tuple[example.Turn, ...]:
        """The turns of record `index`, whose slots point into the example of `load(index)`."""
        return example.turns_of(self.conversation(index), self.tokenizer, self.tokens_per_frame)

    def load(self, index: int, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """The arrays of record `index` (see `build_example`), disturbed when `rng` is given."""
        conversation, features_FNW, name = self._read(index)
        if rng is not None and self.disturb is not None:
            conversation = augment.disturb(conversation, self.disturb, rng)
        return example.build_example(
            conversation, features_FNW, self.tokenizer, self.tokens_per_frame, self.budget, name
        )

    def _read(self, index: int) -> tuple[dialogue.Conversation, np.ndarray, str]:
        record = self.records[index]
        video_id, features_FNW = self.features.read(index)
        name = record["id"].decode() if isinstance(record["id"], bytes) else record["id"]
        if video_id != name:
            raise UserError(
                f"{self.features.path}: record {index}: expected features of {name!r}, found "
                f"{video_id!r}; encode the videos again"
            )
        conversation = dialogue.conversation_from_turns(
            turns_of_record(record), len(features_FNW), float(record["fps"]), self.system, name
        )
        return conversation, features_FNW, name


def turns_of_record(record: Mapping[str, object]) -> list[dict[str, object]]:
    """The turns of a record as a list of dicts, also when TFDS gives them as a dict of lists."""
    turns = record["turns"]
    if not isinstance(turns, Mapping):
        return list(turns)
    return [dict(zip(turns, row, strict=True)) for row in zip(*turns.values(), strict=True)]


def training_batches(
    examples: Examples,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    start_batch: int = 0,
    num_workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Shuffled batches without end; every epoch has another order, a batch may span two epochs.

    Global batch b holds the elements b * B .. (b + 1) * B of the shuffled repetition of the
    dataset; process p of P takes rows p * B/P .. (p + 1) * B/P of it.

    Args:
      examples: what to load.
      batch_size: B, over all processes.
      seed: of the order and of the disturbance.
      process_index: p.
      process_count: P, which divides B.
      start_batch: the first global batch to give: the next one after a checkpoint.
      num_workers: processes that load ahead; 0 loads in threads. A script that uses workers needs
        `if __name__ == "__main__":`.

    Returns:
      A generator of batches, `build_example` with a leading axis B/P; close it to stop workers.

    Raises:
      UserError: B does not divide, or the dataset is empty.
    """
    rows = _rows(batch_size, process_index, process_count)
    if not len(examples):
        raise UserError("the training split: expected 1 record or more, found none")

    def load(batch: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        rngs = (np.random.default_rng((seed, batch, row)) for row in range(batch_size)[rows])
        return _stack([examples.load(int(i), r) for i, r in zip(indices[rows], rngs, strict=True)])

    dataset = grain.MapDataset.range(len(examples)).seed(seed).shuffle().repeat(None)
    # Batches of indices first, and whole batches as elements, so that neither the split over
    # processes nor the one over workers moves an example to another batch.
    dataset = dataset.batch(batch_size, drop_remainder=True)
    dataset = dataset.map_with_index(load)[start_batch:]
    dataset = dataset.to_iter_dataset(_READ)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags when it starts workers
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers, 2))
    return _copies(iter(dataset))


def evaluation_batches(
    examples: Examples, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """All examples once, in order; rows are split over processes as in `training_batches`.

    Yields:
      Batches with, beside the arrays of `build_example`, `example_index` (B/P,) int32 and
      `example_valid` (B/P,) bool. The last batch is filled up with rows that are not valid and
      whose labels are all padding.
    """
    rows = _rows(batch_size, process_index, process_count)
    for start in range(0, len(examples), batch_size):
        indices = np.arange(start, start + batch_size)[rows]
        valid = indices < len(examples)
        indices = np.minimum(indices, len(examples) - 1)
        batch = _stack([examples.load(int(i)) for i in indices])
        batch["label_kinds"] *= valid[:, None]
        yield batch | {"example_index": indices.astype(np.int32), "example_valid": valid}


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    local, rest = divmod(batch_size, process_count)
    if rest or not local:
        raise UserError(
            f"batch size: expected a multiple of the {process_count} processes, found {batch_size}"
        )
    return slice(process_index * local, (process_index + 1) * local)


def _copies(iterator: grain.DatasetIterator) -> Iterator[dict[str, np.ndarray]]:
    """Batches that outlive the workers, whose memory they come in; closing it stops the workers."""
    try:
        for batch in iterator:
            yield {key: np.array(array) for key, array in batch.items()}
    finally:
        iterator.close()


def _stack(loaded: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.stack([one[key] for one in loaded]) for key in loaded[0]}
