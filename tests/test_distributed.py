"""Several processes on one machine: the same run whoever dies, and one end for all of them."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests import tiny_training
from tests.distributed_worker import BATCH_SIZE, SILENCE, STEPS, VALIDATION
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.training import coordinator, distributed, metrics
from videollm_mod_jax.training.checkpoint import load_model, save_model
from videollm_mod_jax.training.step import BATCH_KEYS, make_validation_step

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Job:
    """Processes of tests/distributed_worker.py, each with a share of eight simulated devices."""

    def __init__(self, task, workdir, cache, processes=2, address=None, started=None, timeout=120):
        """`started` are the numbers of those that come, of all by default."""
        address = address or f"127.0.0.1:{free_port()}"
        flags = f" --xla_force_host_platform_device_count={8 // processes}"
        self.processes = []
        for index in range(processes) if started is None else started:
            several = (address, str(processes), str(index)) if processes > 1 else ()
            env = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "TIMEOUT": str(timeout),
                "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + flags,
                **dict(zip(distributed.ENVIRONMENT, several, strict=False)),
            }
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.distributed_worker", task, str(workdir)],
                    cwd=ROOT,
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def signal_when_ready(self, index, number):
        """Waits for the process's `ready` and sends it a signal."""
        for line in self.processes[index].stdout:
            if line == "ready\n":
                break
        self.processes[index].send_signal(number)

    def end(self):
        """(status, stdout, stderr) of every process."""
        try:
            outputs = [process.communicate(timeout=200) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(p.returncode, *output) for p, output in zip(self.processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def said(ended):
    """The last line on the stderr of a process."""
    error = ended[2]
    assert "stack trace" not in error, error
    return error.splitlines()[-1]


def digests(ended):
    return re.findall("digest [0-9a-f]{64}", "".join(out for _, out, _ in ended))


def validation_loss(run):
    """Of the newest weights, in this process, over all rows."""
    model = load_model(run)
    batches = [tiny_training.batch(index, BATCH_SIZE) for index in VALIDATION]
    batch = {name: np.concatenate([each[name] for each in batches]) for name in BATCH_KEYS}
    step = make_validation_step(VideoLLM(model.config), stream_weight=1.0)
    total, weight = step(model.variables, {}, batch)["loss"]
    return float(total / weight)


def test_a_run_of_two_processes_survives_kills_and_restores_anywhere(tmp_path, cache):
    whole = Job("train", tmp_path / "whole", cache).end()
    assert [status for status, _, _ in whole] == [0, 0], whole

    run = tmp_path / "run"
    killed = Job("interrupted", run, cache)
    killed.signal_when_ready(1, signal.SIGKILL)
    ended = killed.end()
    assert ended[0][0] == 1, "one process went on without the other"
    assert said(ended[0]) == (
        f"error: process 1 of 2 has given no sign of life for {SILENCE:.0f} s, and the "
        "others end; the same command goes on from the last checkpoint"
    )
    assert ended[1][0] == -signal.SIGKILL
    assert len(metrics.read_metrics(run)) < STEPS

    stopped = Job("interrupted", run, cache)
    stopped.signal_when_ready(1, signal.SIGTERM)
    ended = stopped.end()
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert re.search(rf"stopped after update 5 of {STEPS}, which is saved in .*", ended[0][2])
    assert "stopped after" not in ended[1][2]

    again = Job("train", run, cache).end()
    assert [status for status, _, _ in again] == [0, 0], again
    assert metrics.read_metrics(run) == metrics.read_metrics(tmp_path / "whole")
    validated = metrics.read_validation(run)
    assert validated == metrics.read_validation(tmp_path / "whole")
    assert [line["step"] for line in validated] == [2, 4, 6]
    assert validated[-1]["validation_loss"] == pytest.approx(validation_loss(run), rel=1e-5)
    assert digests(again) == digests(whole)

    # One process, on one, two and eight devices.
    ((status, out, error),) = Job("restore", run, cache, processes=1).end()
    assert status == 0, error
    assert digests([(0, out, "")]) == [digests(whole)[0]] * 3


def test_a_kill_of_the_first_process_is_one_line_in_each_other(tmp_path, cache):
    address = f"localhost:{free_port()}"
    job = Job("wait", tmp_path, cache, processes=4, address=address)
    job.signal_when_ready(0, signal.SIGKILL)
    first, *others = job.end()
    assert first[0] == -signal.SIGKILL
    for index, (status, _, error) in enumerate(others, 1):
        assert status == 1
        assert [line for line in error.splitlines() if "Gloo" not in line] == [
            f"error: process 0 of 4, at {address}, is gone, and process {index} ends; the same "
            "command goes on from the last checkpoint"
        ]


def test_processes_share_the_hashing_and_all_refuse_what_one_finds_damaged(tmp_path, cache):
    config = tiny_training.model_config(rank=2)
    save_model(tmp_path, config, tiny_training.variables(config), tiny_training.TOKENIZER, "watch")
    whole = Job("load", tmp_path, cache).end()
    assert [status for status, _, _ in whole] == [0, 0], whole
    assert len(set(digests(whole))) == 1
    for path in sorted((tmp_path / "weights").glob("d/*"))[:1]:
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        ended = Job("load", tmp_path, cache).end()
        assert [status for status, _, _ in ended] == [2, 2]
        lines = [line for _, _, error in ended for line in error.splitlines() if "Gloo" not in line]
        assert len(lines) == 1
        assert lines[0].startswith(f"error: {path} is damaged: its content is not what was written")


def test_a_mistake_in_one_process_ends_all_of_them_with_one_line(tmp_path, cache):
    ended = Job("fail", tmp_path, cache).end()
    assert [status for status, _, _ in ended] == [2, 2]
    lines = [line for _, _, error in ended for line in error.splitlines() if "Gloo" not in line]
    assert lines == [f"error: {tmp_path} is not good"]


def test_processes_wait_for_the_first_and_hear_each_other_in_order(tmp_path, cache):
    ended = Job("gather", tmp_path, cache).end()
    assert [status for status, _, _ in ended] == [0, 0], ended
    said = "[{'said': [0], 'nothing': nan}, {'said': [1, 1, 1], 'nothing': nan}]"
    assert all(said in out for _, out, _ in ended)


def test_a_port_that_is_in_use_is_one_line(tmp_path, cache):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (ended,) = Job("gather", tmp_path, cache, address=address, started=[0]).end()
    assert ended[0] == 2
    assert said(ended).startswith(f"error: --coordinator {address}: port ")
    assert "of this machine is in use; end what listens there, or" in said(ended)


@pytest.mark.parametrize("host", ["127.0.0.1", "nobody.invalid"])
def test_a_coordinator_that_is_not_reached_is_one_line(tmp_path, cache, host):
    address = f"{host}:{free_port()}"
    (ended,) = Job("gather", tmp_path, cache, address=address, started=[1], timeout=1).end()
    assert ended[0] == 2
    assert said(ended).startswith(f"error: --coordinator {address} was not reached for 1 s (")


def test_a_process_that_never_comes_is_one_line_in_the_others(tmp_path, cache):
    job = Job("gather", tmp_path, cache, processes=4, started=[0, 1], timeout=4)
    for ended in job.end():
        assert ended[0] == 2
        assert "error: not all 4 processes of this job have met at 127.0.0.1:" in said(ended)
        assert "after 4 s; start all" in said(ended)


def test_the_drawn_addresses():
    assert coordinator.parse_address("node-0:8476") == ("node-0", 8476)
    assert coordinator.parse_address("[::1]:8476") == ("::1", 8476)
    for text in ("node-0", "node-0:x", "node-0:70000", "::1:8476"):
        with pytest.raises(UserError, match="expected host:port"):
            coordinator.parse_address(text)


def test_one_process_is_alone_with_itself():
    assert distributed.is_lead()
    assert distributed.gather({"a": [1]}) == [{"a": [1]}]
    distributed.barrier("nobody")
    with distributed.lead_first("nobody") as lead:
        assert lead


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("here", 2, 0), {}, "--coordinator is 'here'; expected host:port"),
        (("here:x", 2, 0), {}, "--coordinator is 'here:x'; expected host:port"),
        (("here:70000", 2, 0), {}, "--coordinator is 'here:70000'; expected host:port"),
        (("::1:80", 2, 0), {}, "--coordinator is '::1:80'; expected host:port"),
        (("here:80", 2, 2), {}, "--process-id is 2 and --num-processes 2; expected"),
        (("here:80", 0, 0), {}, "--process-id is 0 and --num-processes 0; expected"),
        ((None, None, None), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
    ],
)
def test_flags_that_join_nothing_are_refused(arguments, variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.initialize(*arguments)


def test_a_relay_carries_bytes_and_tells_the_end_of_a_connection_from_that_of_the_coordinator():
    gone = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = coordinator.Relay(server.getsockname())
        relay.watch(gone.set)
        near = socket.create_connection(coordinator.parse_address(relay.address))
        far, _ = server.accept()
        near.sendall(b"ask")
        assert far.recv(3) == b"ask"
        far.sendall(b"answer")
        assert near.recv(6) == b"answer"
        # It refuses this connection, and listens.
        far.close()
        assert near.recv(1) == b""
        assert not gone.is_set()
        # The relay looked whether it does.
        server.accept()[0].close()
        again = socket.create_connection(coordinator.parse_address(relay.address))
        last, _ = server.accept()
    last.close()
    assert gone.wait(10)
    again.close()
