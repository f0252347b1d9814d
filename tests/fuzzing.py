"""Damages every file that the package reads, and sees that each reader ends well.

    python -m tests.fuzzing                          ten mutants of every reader's files
    python -m tests.fuzzing model --mutants 2000     of one reader's
    python -m tests.fuzzing model --mutants 1 --seed 1234    one of them again

To end well is to read the file, or to refuse it with a `UserError` of one line, within seconds
and with little memory. What is guarded by checksums gives what was stored, or is refused.
Annotations are damaged by test_prepare_malformed.py, which knows more of what must come out.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests import damage
from videollm_mod_jax.errors import UserError, printable

SECONDS = 20
"""That a reader may take for one damaged file; those of these sizes take a tenth of one."""

MEMORY = 2 << 30
"""Bytes that a reader may take on top of what the process has when it starts."""

_LONGEST_MESSAGE = 1000


@dataclasses.dataclass(frozen=True)
class Reader:
    """What reads files.

    Attributes:
      make: writes the files below an empty directory.
      read: reads them, and returns all that they say.
      damaged: patterns of the files to damage.
      guarded: a regular expression for names of files that cannot change what is read.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    damaged: Sequence[str] = ("**/*",)
    guarded: str = r"(?!)"


def _make_model(work: Path) -> None:
    import jax

    from tests import tiny
    from tests.tiny_conversion import LINES
    from videollm_mod_jax.data.tokenizer import train_bpe
    from videollm_mod_jax.models import VideoLLM, init_variables
    from videollm_mod_jax.training.checkpoint import save_model

    decoder = dataclasses.replace(tiny.CONFIG.decoder, vocab_size=300)
    config = dataclasses.replace(tiny.CONFIG, decoder=decoder)
    init = jax.jit(init_variables, static_argnums=0)
    variables = init(VideoLLM(config), jax.random.key(0))
    save_model(work, config, variables, train_bpe(LINES, 300), "Watch.")


def _read_model(work: Path, *, verify: bool = True) -> Any:
    import jax

    from videollm_mod_jax.training.checkpoint import load_model

    model = load_model(work, verify=verify)
    ids = model.tokenizer.encode("User: How many?\nAssistant: 12").ids
    return jax.tree.map(np.asarray, model.variables), model.config, ids, model.tokenizer.decode(ids)


def _make_tokenizer(work: Path) -> None:
    from tests.tiny_conversion import LINES
    from videollm_mod_jax.data.tokenizer import train_bpe

    train_bpe(LINES, 300).save(work)


def _read_tokenizer(work: Path) -> Any:
    from videollm_mod_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(work)
    ids = tokenizer.encode("User: How many?\nAssistant: 12").ids
    return ids, tokenizer.decode(ids), tokenizer.vocab_size


def _make_features(work: Path) -> None:
    from videollm_mod_jax.data.feature_index import FeatureMeta
    from videollm_mod_jax.data.features import FeatureWriter

    meta = FeatureMeta(features_per_frame=3, width=4, fps=2.0, resolution=48, tower="abc")
    rng = np.random.default_rng(0)
    with FeatureWriter(work / "store", meta) as writer:
        for i, frames in enumerate((1, 40, 33, 17)):
            writer.add(f"video {i}", rng.standard_normal((frames, 3, 4)).astype(np.float32))


def _read_features(work: Path) -> Any:
    from videollm_mod_jax.data.features import FeatureSource

    source = FeatureSource(work / "store", features_per_frame=3, width=4, fps=2.0)
    # Names that are asked for come from a dataset.
    for name in source.videos.frames:
        source.read(name, 0, source.videos.frames[name])
    return [source.read(f"video {i}", 0, source.videos.frames[f"video {i}"]) for i in range(4)]


def _make_dataset(work: Path) -> None:
    from videollm_mod_jax.data.annotations import (
        Dataset,
        Parsed,
        Record,
        Report,
        Source,
        Turn,
        Videos,
    )
    from videollm_mod_jax.data.builders.stored import write_dataset

    records = [
        Record(
            id=f"{i}",
            video="a",
            start=float(i),
            stop=i + 4.0,
            turns=(Turn("user", i + 1.0, "What?"), Turn("assistant", i + 1.5, "A cat.")),
            target={"labels": [i]},
        )
        for i in range(3)
    ]
    dataset = Dataset(
        name="toy",
        page="",
        read=lambda source: Parsed({"train": iter(records), "test": iter(records)}, ()),
        benchmark="stream",
    )
    write_dataset(dataset, Source(work, Videos(2.0, {"a": 20}), 100, Report()), work / "out")


def _read_dataset(work: Path) -> Any:
    from videollm_mod_jax.data.builders.stored import open_dataset

    dataset = open_dataset(work / "out" / "toy")
    return [
        (split, dataset.videos(split), list(dataset.records(split))) for split in dataset.splits
    ]


def _read_drawn(work: Path) -> Any:
    from videollm_mod_jax.data.builders.digits_stream import DigitsConfig, DigitsDataset

    config = DigitsConfig(train=2, validation=1, test=1, frames=3)
    dataset = DigitsDataset(work / "data", config)
    return [
        (stream["frames"], record)
        for split in dataset.splits
        for stream, record in zip(dataset.streams(split), dataset.records(split), strict=True)
    ]


def _make_run(work: Path) -> None:
    from tests import tiny_training

    tiny_training.train(work / "run", steps=2, checkpoint_every=1)


def _read_run(work: Path) -> Any:
    import jax

    from videollm_mod_jax.training import metrics
    from videollm_mod_jax.training.checkpoint import load_trained

    variables = load_trained(work / "run")
    metrics.Writer(work / "run", 2).close()
    return jax.tree.map(np.asarray, variables), metrics.read_metrics(work / "run")


def _source(family: str) -> Callable[[Path], None]:
    def make(work: Path) -> None:
        from tests.test_conversion_exporting import make_source

        make_source(work / "source", family)

    return make


def _read_source(work: Path) -> Any:
    import jax

    from videollm_mod_jax.conversion.families import plan_conversion
    from videollm_mod_jax.conversion.loading import load_hf
    from videollm_mod_jax.conversion.plan import Options

    model = load_hf(plan_conversion(work / "source", Options()))
    return jax.tree.map(np.asarray, model.variables), model.config


def _make_conversion(work: Path) -> None:
    from tests.test_conversion_exporting import bring_in, make_source

    bring_in(make_source(work / "source", "llava"), work / "model")


def _read_conversion(work: Path) -> Any:
    from tests.test_conversion_exporting import send_out

    (out,) = send_out(work / "model", work / "out" / "back")
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def _make_samples(work: Path) -> None:
    from videollm_mod_jax.evaluation.samples import Samples

    rows = Samples(work, "stream", {"model": "a", "frames": 3}, 0, 1)
    for i in range(3):
        rows.add({"index": i, "answer": "a cat"})


def _read_samples(work: Path) -> Any:
    from videollm_mod_jax.evaluation.samples import Samples

    return Samples(work, "stream", {"model": "a", "frames": 3}, 0, 1).rows


def _make_report(work: Path) -> None:
    scores = {"lm_ppl": 2.0, "time_diff": 0.5, "fluency": 0.7, "lm_correctness": 0.8}
    part = {"scores": scores, "settings": {"split": "test", "judge": "a"}}
    entry = {"benchmark": "stream", "split": "test", "records": 3, "trained_on": None}
    model = {"name": "Full-computation", "tokens_per_frame": 10, "macs": 10**12, "step": 3}
    benchmarks = {"digits_stream": entry | {"parts": {"teacher-forced": part}}}
    report = {"model": model, "benchmarks": benchmarks}
    (work / "report.json").write_text(json.dumps(report))


def _read_report(work: Path) -> Any:
    from videollm_mod_jax.console import make_console
    from videollm_mod_jax.evaluation import report

    found = report.read(work / "report.json")
    report.show([found], make_console(quiet=True))
    return found


def _make_benchmarks(work: Path) -> None:
    from tests import test_benchmark_summary as of

    for result in (of.TRAIN, of.MEMORY, of.STREAM, of.PEER_STREAM):
        (work / f"{result['benchmark']}.json").write_text(json.dumps(result))


def _read_benchmarks(work: Path) -> Any:
    from videollm_mod_jax.benchmarking import summary

    return summary.write(work).read_text()


def _make_study(work: Path) -> None:
    from videollm_mod_jax import study
    from videollm_mod_jax.studying.variants import FULL, MOD

    forced = {"lm_ppl": 2.0, "time_diff": 0.5, "fluency": 0.7, "lm_correctness": 0.8}
    kept = {"share": 0.4, "chance": 0.2, "ratio": 2.0, "last_ratio": 2.5, "summary": 0.9}
    run = {"teacher_forced": forced, "self_conditioned": {"f1": 0.5}, "kept": {"1": kept}}
    timing = {"median": 0.1, "spread": 0.01}
    count = {"macs": 9, "flops": 10, "cache_bytes": 100, "kept": [None, 6]}
    cost = {"count": count, "compiled_flops": 20, "peak_bytes": 30, "frame_bytes": 40}
    cost |= {"step": timing, "frame": timing}
    device = {"kind": "cpu", "host_cores": 2, "versions": {"jax": "0"}}
    written = {
        f"{study.RUNS}/{FULL}/seed-0/{study.RESULT}": run,
        f"{study.RUNS}/{MOD}/seed-0/{study.RESULT}": run,
        study.MEASURED: {"device": device, "variants": {FULL: cost, MOD: cost}},
        study.BASELINES: {"most frequent": forced},
        study.HERE: {"platform": "cpu", "ids": [0], "seconds": 1.5, "workers": 2},
    }
    for name, value in written.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(json.dumps(value))


def _read_study(work: Path) -> Any:
    from tests.test_study import table
    from videollm_mod_jax import study

    study.write_report(table(), work)
    return (work / study.REPORT).read_text()


def _make_plan(work: Path) -> None:
    from videollm_mod_jax.data.encoding_plan import EncodingPlan
    from videollm_mod_jax.data.feature_index import FeatureMeta

    meta = FeatureMeta(features_per_frame=3, width=4, fps=2.0, resolution=48, tower="abc")
    EncodingPlan(meta, {"a": ("a.mp4", 7), "b": ("b.mp4", 9)}, [range(2)]).write(work)


def _read_plan(work: Path) -> Any:
    from videollm_mod_jax.data.encoding_plan import EncodingPlan

    plan = EncodingPlan.read(work)
    return plan, [plan.names(shard) for shard in range(len(plan.shards))]


def _make_videos(work: Path) -> None:
    import PIL.Image

    from videollm_mod_jax.data.video import write_video

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 16, 24, 3), np.uint8)
    write_video(work / "clip.mp4", images, 2.0)
    for name in ("a.png", "a.jpg", "a.gif", "a.webp"):
        PIL.Image.fromarray(images[0]).save(work / name)


def _read_videos(work: Path) -> Any:
    from videollm_mod_jax.data.video import read_video

    return [[f.image for f in read_video(path, fps=2.0)] for path in sorted(work.iterdir())]


def _make_run_config(work: Path) -> None:
    from tests.test_config_dict import config_file

    (work / "config.json").write_text(json.dumps(config_file("digits"), indent=1))


def _read_run_config(work: Path) -> Any:
    from videollm_mod_jax.data.files import read_json
    from videollm_mod_jax.experiment import Experiment

    return Experiment.from_table(read_json(work / "config.json"))


READERS = {
    "model": Reader(_make_model, _read_model, guarded="weights/.*"),
    "tokenizer": Reader(_make_tokenizer, _read_tokenizer),
    "weights": Reader(_make_model, lambda w: _read_model(w, verify=False), ("weights/**/*",)),
    "run": Reader(_make_run, _read_run, guarded="run/(weights|checkpoints)/.*"),
    "config": Reader(_make_run_config, _read_run_config),
    "features": Reader(_make_features, _read_features, guarded=".*"),
    "dataset": Reader(_make_dataset, _read_dataset),
    "drawn": Reader(lambda work: _read_drawn(work) and None, _read_drawn),
    "llava": Reader(_source("llava"), _read_source),
    "clip": Reader(_source("clip"), _read_source),
    "conversion": Reader(_make_conversion, _read_conversion, ("model/**/*",)),
    "samples": Reader(_make_samples, _read_samples),
    "report": Reader(_make_report, _read_report),
    "benchmarks": Reader(_make_benchmarks, _read_benchmarks, ("*.json",)),
    "study": Reader(_make_study, _read_study, ("**/*.json",)),
    "plan": Reader(_make_plan, _read_plan),
    "videos": Reader(_make_videos, _read_videos),
}


def fuzz(reader: Reader, mutants: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Damages files of a reader, one at a time.

    Args:
      reader: to give them to.
      mutants: how many.
      seed: of the first; mutant i has `seed + i`.

    Yields:
      Of each: what was done, `read`, `refused`, or a kind of fault, and what there is to say.
    """
    with tempfile.TemporaryDirectory() as temporary:
        whole, work = Path(temporary, "whole"), Path(temporary, "work")
        whole.mkdir()
        reader.make(whole)
        files = sorted({p for pattern in reader.damaged for p in whole.glob(pattern)})
        files = [p.relative_to(whole) for p in files if p.is_file()]
        shutil.copytree(whole, work)
        expected = _digest(reader.read(work))
        limit = _memory() + MEMORY
        for each in range(seed, seed + mutants):
            shutil.rmtree(work)
            shutil.copytree(whole, work)
            rng = random.Random(each)
            # Small files say more than those of weights, and are as many mutants' as these.
            file = rng.choice(files)
            done = printable(f"{each}: {file}: {damage_file(work / file, rng)}")
            print(done, end="\r", flush=True)
            start = time.monotonic()
            ended, said = _read(reader, work, limit)
            took = time.monotonic() - start
            if ended not in ("read", "refused"):
                yield done, ended, said
            elif took > SECONDS:
                yield done, "slow", f"{took:.0f} s; {said}"
            elif ended == "read" and said != expected and re.fullmatch(reader.guarded, str(file)):
                yield done, "silent", "other contents were read"
            else:
                yield done, ended, said


def damage_file(path: Path, rng: random.Random) -> str:
    """Damages the bytes of a file, or one value of what it holds; says how."""
    if rng.random() < 0.6:
        try:
            tree, write = damage.read_tree(path)
            parent, key = rng.choice(list(damage.places(tree)))
            kind = rng.choice(sorted(damage.TO_VALUES))
            damage.TO_VALUES[kind](parent, key, rng)
            write(tree)
        except (ValueError, TypeError, IndexError, OverflowError):
            pass  # It holds no values that can be told, or cannot hold such.
        else:
            return f"{kind} at {key!s:.40}"
    kind = rng.choice(sorted(damage.TO_BYTES))
    content = path.read_bytes()
    try:
        path.write_bytes(damage.TO_BYTES[kind](content, rng))
    except (ValueError, IndexError):
        path.write_bytes(content + b"\0")
        return "nul at its end"
    return kind


class _Slow(BaseException):
    """A reader took too long; nothing that it catches."""


def _read(reader: Reader, work: Path, limit: int) -> tuple[str, str]:
    def ring(signum: int, frame: object) -> None:
        raise _Slow

    before = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    signal.alarm(2 * SECONDS)
    try:
        return "read", _digest(reader.read(work))
    except UserError as error:
        message = str(error)
        fine = "\n" not in message and len(message) <= _LONGEST_MESSAGE
        return "refused" if fine else "not one line", message
    except _Slow:
        return "hangs", traceback.format_exc()
    except MemoryError:
        return "memory", traceback.format_exc()
    except BaseException as error:
        return type(error).__name__, traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _memory() -> int:
    """Bytes of data that this process has, as its limit counts them."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmData:\s+(\d+) kB", status)[1]) << 10


def _digest(value: Any) -> str:
    return hashlib.sha256(pickle.dumps(value)).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Damages files of readers; prints faults, and how many mutants ended how."""
    parser = argparse.ArgumentParser(description="Damages files, and sees that readers end well.")
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}")
    parser.add_argument("--mutants", type=int, default=10, help="of each reader's files")
    parser.add_argument("--seed", type=int, default=0, help="of the first mutant")
    flags = parser.parse_args(arguments)
    faults = 0
    for name in flags.readers or READERS:
        counts = collections.Counter()
        for done, ended, said in fuzz(READERS[name], flags.mutants, flags.seed):
            counts[ended] += 1
            if ended not in ("read", "refused"):
                faults += 1
                print(f"{name} {done}: {ended}\n{said}", flush=True)
        table = ", ".join(f"{count:,} {ended}" for ended, count in counts.most_common())
        print(f"{name}: {flags.mutants:,} mutants: {table}", flush=True)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
