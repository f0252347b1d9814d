"""Launch scripts: what they would do, what they refuse, and a rehearsed pod job."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ("benchmark.sh", "local.sh", "slurm.sbatch", "tpu_pod.sh", "xpk.sh")
TRAIN = ("--", "--config", "configs/digits.py", "--workdir", "runs/a b")

DRY_RUNS = {
    command.strip(): lines
    for command, *lines in (
        part.splitlines()
        for part in (ROOT / "tests" / "launch_dry_runs.txt").read_text().split("$ launch/")[1:]
    )
}
"""By command line of a script: what it prints with `--dry-run` and its arguments."""

OVERRIDE = ("--", "--config.data.batch_size=2")

WRONG = {
    "benchmark.sh": "--out is needed",
    "benchmark.sh --out": "--out needs a value",
    "benchmark.sh --out here --model big": "--model is 'big', not llama3-8b or tiny",
    "benchmark.sh --out here --rounds many": "--rounds needs a number, not 'many'",
    "local.sh": "no arguments",
    "local.sh --processes many -- x": "--processes needs a number, not 'many'",
    "local.sh --typo -- x": "unknown option '--typo'",
    "slurm.sbatch": "no arguments",
    "slurm.sbatch --venv": "--venv needs a value",
    "tpu_pod.sh start --name pod -- x": "--name and --zone are needed",
    "tpu_pod.sh start --name pod --zone z": "no arguments",
    "tpu_pod.sh fly --name pod --zone z": "unknown command 'fly'",
    "xpk.sh start --cluster pods -- x": "--cluster and --workload are needed",
    "xpk.sh start --cluster pods --workload w": "no arguments",
}


def run(line: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script of launch/ to its end."""
    script, *options = line.split()
    kept = {name: value for name, value in os.environ.items() if name not in ("TMPDIR", "PYTHON")}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *options, *arguments],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("line", DRY_RUNS)
def test_a_dry_run_prints_what_would_run(line):
    arguments = OVERRIDE if line.startswith("benchmark.sh") else TRAIN
    done = run(f"{line} --dry-run", *arguments, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    assert [text.rstrip() for text in done.stdout.splitlines()] == DRY_RUNS[line]


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_argument_is_one_line_and_status_2(line):
    done = run(line)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert WRONG[line] in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_explains_itself_and_is_short(script):
    done = run(f"{script} --help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")
    assert len((LAUNCH / script).read_text().splitlines()) < 80


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(
        ["shellcheck", str(LAUNCH / script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


PATIENT = """#!/usr/bin/env bash
# Stands in for python -m videollm_mod_jax.train: runs until it is asked to stop, and saves.
trap 'sleep 0.3; echo saved "${@: -1}"; exit 0' TERM
echo started
while :; do sleep 0.05; done
"""

# Every worker is this machine, and its home a directory.
GCLOUD = """#!/usr/bin/env bash
echo "$4" >> "$HOME/asked"
for argument in "$@"; do
  case $argument in --command=*) cd "$HOME" && exec bash -c "${argument#--command=}" ;; esac
done
[[ $4 != describe ]] || echo "$STATE"
"""


@pytest.fixture
def pod(tmp_path):
    """Runs tpu_pod.sh against a pod of one worker that a script plays."""
    write_script(tmp_path / "bin" / "gcloud", GCLOUD)
    write_script(tmp_path / "venv" / "bin" / "python", PATIENT)
    (tmp_path / "source").mkdir()
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def ask(action: str, *arguments: str, state: str = "") -> subprocess.CompletedProcess:
        line = f"tpu_pod.sh {action} --name pod --zone here"
        return run(line, *arguments, PATH=path, HOME=str(tmp_path), STATE=state)

    return tmp_path, ask


def test_a_pod_job_starts_once_and_stop_waits_until_it_has_saved(pod):
    home, ask = pod
    assert ask("start", *TRAIN).returncode == 0
    again = ask("start", *TRAIN)
    assert again.returncode == 1
    assert "train already runs" in again.stderr
    assert ask("stop").returncode == 0
    assert (home / "train.log").read_text() == "started\nsaved runs/a b\n"
    assert ask("start", *TRAIN).returncode == 0
    assert ask("stop").returncode == 0


@pytest.mark.parametrize(
    ("state", "asked"),
    [
        ("READY", ["describe"]),
        ("PREEMPTED", ["describe", "delete", "create"]),
        ("", ["describe", "create"]),
    ],
)
def test_a_slice_is_reused_replaced_or_made(pod, state, asked):
    home, ask = pod
    assert ask("create", state=state).returncode == 0
    assert (home / "asked").read_text().split() == asked


def test_a_signal_reaches_all_processes_of_a_rehearsal_and_is_waited_for(tmp_path):
    python = write_script(tmp_path / "python", PATIENT)
    job = subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), "--port", "4000", *TRAIN],
        env={**os.environ, "PYTHON": str(python)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert {job.stdout.readline() for _ in range(2)} == {"0: started\n", "1: started\n"}
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=20)
    assert set(out.splitlines()) == {"0: saved 0", "1: saved 1"}
    assert job.returncode == 0


def test_the_status_of_a_rehearsal_is_that_of_a_process_that_failed(tmp_path):
    python = write_script(tmp_path / "python", "#!/usr/bin/env bash\nexit $((3 - 3 * ${@: -1}))\n")
    done = run("local.sh --port 4000", *TRAIN, PYTHON=str(python))
    assert done.returncode == 3


def test_a_rehearsal_really_trains_with_two_processes(tmp_path):
    workdir = tmp_path / "run"
    small = (
        "data.draw.train=8 data.draw.validation=2 data.draw.test=4 data.batch_size=4 data.frames=4 "
        "tower.steps=2 tower.batch_size=4 evaluation.batch_size=4 training.steps=2 "
        "model.decoder.num_layers=2 model.decoder.hidden_size=32 model.decoder.num_heads=2 "
        "model.decoder.head_dim=16 training.log_every=1 training.sharding=fsdp "
        "training.mesh=2,-1,1"
    )
    overrides = (f"--config.{change}" for change in small.split())
    config = str(ROOT / "configs" / "digits.py")
    arguments = ("--", "--config", config, "--workdir", str(workdir), *overrides)
    done = run("local.sh --processes 2 --devices 2", *arguments, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout[-3000:]
    said = [line for line in done.stdout.splitlines() if "step 2 of 2: loss" in line]
    assert [line[:3] for line in said] == ["0: "]
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert set(json.loads((workdir / "evaluation.json").read_text())) == {"before", "after"}
