"""pretrain.py as a user runs it: what it writes, what it survives and what it refuses."""
import argparse
import csv
import faulthandler
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, drawn, load, python, save_nifti, write_csv

import data
import eval as evaluation
import finetune
import model
import phantoms
import pretrain

SCRIPT = str(ROOT / "pretrain.py")
TRAINED_ON = 10
HELD_OUT = 2
SMALL = ("--data m.csv --encoder swin_t --size 32 32 64 --embed_dim 24 --text_encoder demo --batch_size 2 "
         "--workers 0 --warmup 2 --save_every 2 --log_every 1")
ONLY_MIM = "--no-mlm --no-sfr --no-cml --no-ssm --no-dfa"
ONLY_SSM_DFA = "--no-mim --no-mlm --no-sfr --no-cml"
STEPS = {1: 6, 2: 4}                            # of the uninterrupted run, by number of processes
LAMBDA = {"mim": 1.0, "mlm": 1.0, "sfr": 0.1, "cml": 0.1, "ssm": 0.1, "dfa": 0.1, "clip": 1.0}


# ------------------------------------------------------------------------------------ running it
# Importing torch and transformers takes longer than a tiny run. Most runs therefore fork from a server
# that has imported them, and execute the script from there; others start a new Python, as users do.

def no_pictures():
    import eval as evaluation
    for name in ("plot_curves", "plot_reconstruction", "plot_attention"):
        setattr(evaluation, name, lambda *args: None)


def third_mim_is_nan():
    import losses
    no_pictures()
    honest = losses.mim_loss
    calls = []

    def mim_loss(*args):
        calls.append(1)
        return honest(*args) * (math.nan if len(calls) == 3 else 1)
    losses.mim_loss = mim_loss


def all_words_are_masked():
    """And half of every volume: no chance"""
    no_pictures()

    def mask_words(ids, words, tokenizer, generator, prob):
        return np.where(words >= 0, tokenizer.mask_token_id, ids), np.where(words >= 0, ids, -100)
    data.mask_words = mask_words
    data.mask_volume = lambda size, *_: (torch.arange(size[0]) < 16)[None, :, None, None].expand(1, *size)


def mim_is_always_nan():
    import losses
    no_pictures()
    losses.mim_loss = lambda recon, *_: recon.mean() * math.nan


def another_step_on_the_second_process():
    no_pictures()
    honest = torch.nn.utils.clip_grad_norm_
    sign = (-1) ** int(os.environ["RANK"])

    def clip_grad_norm_(parameters, norm):
        trained = [p for p in parameters if p.grad is not None]
        for p in trained:
            p.grad *= sign
        return honest(trained, norm)
    torch.nn.utils.clip_grad_norm_ = clip_grad_norm_


def files_up_to_1_mb():
    no_pictures()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def execute(flags, folder, name, environment, prepare):
    """In a forked process: `python pretrain.py FLAGS`, with its output in files."""
    os.chdir(folder)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)    # of the loader's workers: the usual one
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    faulthandler.dump_traceback_later(280)      # says where it hangs, if it does
    prepare()
    sys.argv = [SCRIPT, *flags.split()]
    runpy.run_path(SCRIPT, run_name="__main__")


@pytest.fixture(scope="session")
def server():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with pytest.MonkeyPatch.context() as patch:     # the first process starts the server, in this environment
        for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        modules = ["pretrain", "test_pretrain", "transformers.models.bert.modeling_bert"]
        context.set_forkserver_preload(modules)
        process = context.Process(target=os.getpid)
        process.start()
        process.join()
    return context


class Run:
    """A run of pretrain.py that may go on in the background: `flags` on `world` processes."""

    def __init__(self, server, folder, flags, world=1, prepare=no_pictures):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.outputs = [folder / f"output_{port}_{rank}" for rank in range(world)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = flags, folder, output.name, environment, prepare
            process = server.Process(target=execute, args=arguments)
            process.start()
            self.processes.append(process)

    def wait(self):
        """The exit code; `text` and `errors` hold what the first process printed."""
        for process in self.processes:
            process.join(300)
            if process.exitcode is None:
                for hanging in self.processes:      # or pytest itself would wait for them, for ever
                    hanging.kill()
                errors = [self.read("err", rank) for rank in range(len(self.outputs))]
                pytest.fail("it hangs: " + "".join(errors))
        self.text = self.read("out")
        self.errors = self.read("err")
        codes = {process.exitcode for process in self.processes}
        assert len(codes) == 1, (codes, self.errors)
        return codes.pop()

    def read(self, ending, rank=0):
        return self.outputs[rank].with_suffix(f".{ending}").read_text()

    def succeeded(self):
        assert self.wait() == 0, self.errors
        return self

    def until_step(self, step, out):
        """Wait until the step stands in the log."""
        log = out / "log.jsonl"
        end = time.time() + 120
        while not log.exists() or f'"step": {step},' not in log.read_text():
            assert time.time() < end and self.processes[0].is_alive(), self.read("err")
            time.sleep(0.005)

    def refused(self, *words):
        """It ended with one `error: …` that holds these words, and no traceback."""
        assert self.wait() == 1, (self.text, self.errors)
        assert "error: " in self.errors and "Traceback" not in self.errors, self.errors
        message = self.errors[self.errors.index("error: "):]
        for word in words:
            assert str(word) in message, message


def read_log(out):
    """The rows of log.jsonl without their times and the first one's `nothing`."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    left_out = ("seconds", "data_wait", "nothing")
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


def equal_runs(a, b):
    """Bit for bit: every number of every step, no step twice, the weights."""
    if read_log(a) != read_log(b):
        return False
    a, b = load(a / "last.pt")["model"], load(b / "last.pt")["model"]
    return a.keys() == b.keys() and all(torch.equal(weight, b[name]) for name, weight in a.items())


def checksum(checkpoint):
    weights = [tensor for tensor in checkpoint["model"].values() if tensor.is_floating_point()]
    return sum(weight.double().abs().sum().item() for weight in weights)


def write_manifest(path, rows):
    write_csv(path, "volume,report,split", rows)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """24 small chests of a kind: m.csv names the first dozen, all.csv all as training volumes."""
    folder = tmp_path_factory.mktemp("pretrain")
    rng = np.random.default_rng(0)
    centre = np.reshape((12, 14, 12), (3, 1, 1, 1))
    distance = np.linalg.norm(np.indices((24, 28, 24)) - centre, axis=0)
    rows = []
    for i in range(24):
        volume = np.where(distance < 9, 40, -1000) + rng.normal(0, 20, distance.shape)
        volume[10:13, 12:12 + i % 9] = -850
        volume = volume.clip(-1024, 2000).astype(np.int16)
        save_nifti(folder / f"{i}.nii.gz", volume, np.diag([8, 8, 8, 1]))
        report = f"A nodule of {i} mm is seen. The heart is normal." + " There is no effusion." * (i % 3)
        rows.append([f"{i}.nii.gz", report, "train" if i < TRAINED_ON else "test"])
    write_manifest(folder / "m.csv", rows[:TRAINED_ON + HELD_OUT])
    write_manifest(folder / "all.csv", [[volume, report, "train"] for volume, report, _ in rows])
    return folder


@pytest.fixture(scope="session")
def run(server, folder):
    return lambda flags, **more: Run(server, folder, flags, **more)


@pytest.fixture(scope="session")
def uninterrupted(folder):
    """World -> (folder of an uninterrupted run on so many processes, what it printed, its errors)."""
    done = {}
    for world, steps in STEPS.items():
        launch = []
        if world > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        flags = [*SMALL.split(), "--out", f"whole{world}", "--steps", steps]
        result = python(*launch, SCRIPT, *flags, cwd=folder)
        assert result.returncode == 0, result.stderr
        done[world] = folder / f"whole{world}", result.stdout, result.stderr
    return done


@pytest.fixture
def copied(folder, uninterrupted, tmp_path):
    """A copy of the uninterrupted run on one process, to resume from and to spoil."""
    return Path(shutil.copytree(uninterrupted[1][0], tmp_path / "out"))


# ------------------------------------------------------------------------------- what it writes

def weighted(row, enabled):
    return sum(LAMBDA[name] * row[name] for name in enabled)


def test_a_run_writes_what_it_promises(uninterrupted):
    out, text, errors = uninterrupted[1]
    for name in ("last.pt", "previous.pt", "encoder.pt", "encoder.safetensors", "README.md", "log.jsonl",
                 "curves.png", "reconstruction.png", "attention.png"):
        assert (out / name).stat().st_size > 0
        if name.endswith("png"):
            drawn(out / name)
    assert not list(out.glob("*.part"))
    assert "Warning" not in errors and "Traceback" not in errors
    for words in (f"{TRAINED_ON} volumes to train on, {HELD_OUT} held out", "(32, 32, 64)", "swin_t",
                  "0.1 cml", "1 negatives", "steps 0 to 6", "on cpu in fp32"):
        assert words in text

    rows = read_log(out)
    assert [row["step"] for row in rows] == list(range(STEPS[1]))
    # A warm-up of 2 steps, then down to 0 at step 6.
    for row, lr in zip(rows, (1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4)):
        assert row["loss"] == pytest.approx(weighted(row, model.LOSSES[:6]), rel=1e-5)
        assert row["lr"] == pytest.approx(1e-4 * lr) and "clip" not in row

    encoder = model.build_encoder("swin_t")
    assert model.load_weights(encoder, out / "encoder.pt")["missing"] == ["mask_token"]
    last, previous = load(out / "last.pt"), load(out / "previous.pt")
    assert (last["step"], previous["step"]) == (6, 4)
    for name, weight in encoder.state_dict().items():
        assert name == "mask_token" or torch.equal(weight, last["model"][f"encoder.{name}"])
    assert not any(name.startswith("text_encoder") for name in last["model"])


def test_the_model_card_tells_what_is_known_and_how_to_load_it(uninterrupted):
    out, text, _ = uninterrupted[1]
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0" and "computed-tomography" in card.data.tags
    facts, numbers = re.findall(r"```\n(.*?)\n```", card.text, re.DOTALL)
    assert facts.startswith("data       m.csv: 10 volumes") and facts.endswith("6 of 6 steps, seed 0")
    *lines, _ = facts.splitlines()              # the rest of the last one differs
    assert len(lines) == 5 and all(line in text for line in lines) and numbers in text
    assert numbers.count("cannot be told: fewer than 20 rows") == 6 and "weights moved by" in numbers
    for words in ("not a medical device", "hashes of the names", "'feature_size': 24"):
        assert words in card.text
    code, = re.findall(r"`(encoder, config = .*?)`", card.text)
    found = {"eval": evaluation}
    exec(code.replace("hf:OWNER/NAME", str(out / "encoder.safetensors")), found)  # noqa: S102 - it is ours
    weights = load(out / "encoder.pt")
    assert all(torch.equal(p, weights[name]) for name, p in found["encoder"].state_dict().items() if name in weights)
    assert found["config"]["size"] == [32, 32, 64] and found["config"]["hu"] == "auto"


def test_a_readme_of_somebody_else_stays(run, copied):
    (copied / "README.md").write_text("mine")
    assert "README.md is no model card of ours" in run(f"--out {copied} --resume --steps 7").succeeded().text
    assert (copied / "README.md").read_text() == "mine"


def test_learning_rates_and_weight_decay(uninterrupted):
    checkpoint = load(uninterrupted[1][0] / "last.pt")
    state = checkpoint["optimizer"]["state"]
    groups = checkpoint["optimizer"]["param_groups"]
    trained = {name: weight for name, weight in checkpoint["model"].items()
               if not name.endswith("position_index")}
    assert sum(len(group["params"]) for group in groups) == len(trained)
    for group in groups:
        shapes = sorted(tuple(state[i]["exp_avg"].shape) for i in group["params"])
        expected = sorted(
            tuple(weight.shape) for name, weight in trained.items()
            if name.startswith("encoder.") == (group["initial_lr"] == 2e-5)
            and (weight.ndim > 1 and not name.endswith("bias_table")) == (group["weight_decay"] > 0))
        assert shapes == expected and shapes
    kinds = {(group["initial_lr"], group["weight_decay"]) for group in groups}
    assert kinds == {(2e-5, 0), (2e-5, 0.01), (1e-4, 0), (1e-4, 0.01)}


ROWS = {                                        # of Tables III and IV
    "--guidance word --mim_attention classical --mlm_attention classical --no-sfr --no-cml --no-ssm --no-dfa":
        "mim mlm",
    "--mim_attention classical --mlm_attention classical --no-sfr --no-cml --no-ssm --no-dfa": "mim mlm",
    "--mlm_attention classical --no-sfr --no-cml --no-ssm --no-dfa": "mim mlm",
    "--no-sfr --no-cml --no-ssm --no-dfa": "mim mlm",
    "--no-sfr --no-ssm --no-dfa": "mim mlm cml",
    "--no-sfr": "mim mlm cml ssm dfa",
    "--no-ssm": "mim mlm sfr cml dfa",
    "--no-dfa": "mim mlm sfr cml ssm",
    "--no-mim --no-mlm --no-sfr --no-cml --no-ssm --no-dfa --clip": "clip",
}


def test_rows_of_the_ablation_tables(run, folder):
    rows = list(enumerate(ROWS.items()))
    for first in range(0, len(rows), 3):        # three at a time
        three = rows[first:first + 3]
        runs = [run(f"{SMALL} --steps 1 --out row{i} {flags}") for i, (flags, _) in three]
        for (i, (_, enabled)), started in zip(three, runs):
            started.succeeded()
            row, = read_log(folder / f"row{i}")
            enabled = enabled.split()
            assert set(row) == {"step", "loss", "lr", "grad_norm", *enabled}
            assert row["loss"] == pytest.approx(weighted(row, enabled), rel=1e-5)


# ---------------------------------------------------------------------------- several processes

def test_two_processes_equal_one_with_twice_the_batch(uninterrupted, run, folder):
    out, text, errors = uninterrupted[2]
    assert "Warning" not in errors and "Traceback" not in errors, errors
    assert text.count("steps 0 to 4") == 1, "one process prints"
    run(f"{SMALL} --steps 4 --batch_size 4 --out one_of_four").succeeded()
    two_rows = read_log(out)
    one_rows = read_log(folder / "one_of_four")
    assert len(two_rows) == len(one_rows) == 4
    # AdamW makes much of a rounding error, step by step.
    for a, b, close in zip(two_rows, one_rows, (1e-5, 1e-3, 5e-3, 2e-2)):
        assert a == pytest.approx(b, rel=close, abs=close)
    two, one = (load(where / "last.pt") for where in (out, folder / "one_of_four"))
    assert checksum(two) == pytest.approx(checksum(one), rel=1e-5)
    assert (two["world"], one["world"]) == (2, 1)


def test_accumulation(run, folder):
    common = f"{SMALL} {ONLY_SSM_DFA} --steps 2"
    run(f"{common} --lr 0 --lr_encoder 0 --out still").succeeded()      # the passes one by one
    runs = [run(f"{common} --accumulate 2 --out sum1"),
            run(f"{common} --accumulate 2 --batch_size 1 --out sum2", world=2)]
    for started in runs:
        started.succeeded()
    (first, second), sum1, sum2 = (read_log(folder / name) for name in ("still", "sum1", "sum2"))
    for name in ("loss", "ssm", "dfa"):
        assert sum1[0][name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-6)
    for a, b, close in zip(sum1, sum2, (1e-5, 1e-3)):
        assert a == pytest.approx(b, rel=close)
    start, a, b = (load(folder / name / "last.pt")["model"] for name in ("still", "sum1", "sum2"))

    def distance(other):
        return sum((b[name] - other[name]).double().abs().sum() for name in b)
    # A first step of AdamW is about the sign of the gradient: rounding errors flip some, most of the key
    # biases', whose gradient is 0.
    assert distance(a) <= 0.02 * distance(start)


def test_accumulated_mim_mlm_and_sfr_are_those_of_one_large_batch(run, folder):
    """Reports of 3 to 60 words, on one process and on two; a mean of means is 4 % off in the gradient."""
    rows = [[f"{i}.nii.gz", "Normal heart." + " There is no effusion." * (i * i), "train"] for i in range(4)]
    write_manifest(folder / "lengths.csv", rows)
    flags = f"{SMALL} --data lengths.csv --no-cml --no-ssm --no-dfa --steps 1 --out"
    runs = [run(f"{flags} large --batch_size 4", prepare=all_words_are_masked),
            run(f"{flags} passes --batch_size 2 --accumulate 2", prepare=all_words_are_masked),
            run(f"{flags} both --batch_size 1 --accumulate 2", world=2, prepare=all_words_are_masked)]
    for started in runs:
        started.succeeded()
    large, *others = (read_log(folder / name)[0] for name in ("large", "passes", "both"))
    for row in others:
        assert row == pytest.approx(large, rel=1e-5)


def test_different_parameters_on_two_processes_stop_the_run(run, folder):
    flags = f"{SMALL} {ONLY_SSM_DFA} --steps 1 --out apart"
    started = run(flags, world=2, prepare=another_step_on_the_second_process)
    started.refused("the processes hold different parameters after step 1")
    assert not (folder / "apart" / "last.pt").exists()


# -------------------------------------------------------------------------------- interruptions

@pytest.mark.parametrize("world", STEPS)
def test_stopped_killed_and_resumed_it_equals_the_uninterrupted_run(run, folder, uninterrupted, world):
    """Bit for bit."""
    out = folder / f"broken{world}"
    stopped = run(f"{SMALL} --workers 1 --out {out.name} --steps {STEPS[world]}", world=world)
    stopped.until_step(0, out)
    told = stopped.processes[-1].pid                        # one process is told, all of them stop
    children = Path(f"/proc/{told}/task/{told}/children")
    workers = children.read_text().split() if children.exists() else []         # macOS has no /proc
    for pid in (*workers, told):                            # as to a group: the loader's worker, too
        os.kill(int(pid), signal.SIGTERM)
    assert stopped.wait() == 128 + signal.SIGTERM, stopped.errors
    assert "SIGTERM: saved after step" in stopped.text and (out / "encoder.pt").exists()
    assert load(out / "last.pt")["step"] == len(read_log(out)) < STEPS[world]
    card = (out / "README.md").read_text()
    assert "None yet: the run goes on." in card
    assert f"{len(read_log(out))} of {STEPS[world]} steps" in card

    killed = run(f"--out {out.name} --resume", world=world)     # the checkpoint knows the other flags
    killed.until_step(2, out)
    for process in killed.processes:
        os.kill(process.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL

    run(f"--out {out.name} --resume --workers 2", world=world).succeeded()
    assert equal_runs(out, uninterrupted[world][0])
    assert len(load(out / "last.pt")["rng"]) == world


def test_more_steps_go_on_where_the_run_ended(run, copied):
    run(f"--out {copied} --resume --steps 8").succeeded()
    rows = read_log(copied)
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["lr"] for row in rows[6:]] == pytest.approx([1e-4 * 2 / 6, 1e-4 * 1 / 6])


def test_a_broken_checkpoint_falls_back_to_the_one_before(run, copied, uninterrupted):
    last = copied / "last.pt"
    last.write_bytes(last.read_bytes()[:last.stat().st_size // 2])
    with (copied / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')           # the disk was full
    fallen = run(f"--out {copied} --resume").succeeded()
    assert f"going on from {copied / 'previous.pt'} instead" in fallen.text
    assert equal_runs(copied, uninterrupted[1][0])
    assert load(last)["step"] == STEPS[1]
    assert load(copied / "previous.pt")["step"] < STEPS[1]      # the torn file is gone

    last.write_bytes((copied / "encoder.pt").read_bytes())       # weights alone
    assert "found weights alone" in run(f"--out {copied} --resume").succeeded().text
    for name in ("last.pt", "previous.pt"):
        (copied / name).write_bytes(b"no checkpoint")
    again = run(f"--out {copied} --resume")
    again.refused(copied / "previous.pt", "cannot be read")
    assert f"{last}: cannot be read" in again.text


def test_processes_that_read_different_checkpoints_stop(copied, group, monkeypatch):
    """One could not read last.pt for a moment, and the others could."""
    state = load(copied / "last.pt")
    torch.save(state | {"step": 5}, copied / "previous.pt")
    monkeypatch.setattr(dist, "all_gather_object", lambda steps, step: steps.__setitem__(slice(None), [6, step]))
    (copied / "last.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"the processes read the steps \[6, 5\] in .*, expected one"):
        pretrain.load_last(copied)
    assert (copied / "last.pt").read_bytes() == b"torn"


def test_the_log_is_rewritten_whole_or_not_at_all(tmp_path, monkeypatch):
    path, rows = tmp_path / "log.jsonl", [{"step": step, "loss": 1.0} for step in range(4)]
    pretrain.write_log(path, rows[:2], "w")
    pretrain.write_log(path, rows[2:])
    assert pretrain.read_log(path) == rows

    def full(file):
        raise OSError("no space left")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(os, "fsync", full)
        pretrain.write_log(path, rows[:1], "w")
    assert pretrain.read_log(path) == rows and [*tmp_path.iterdir()] == [path]
    pretrain.write_log(path, rows[:1], "w")
    assert pretrain.read_log(path) == rows[:1]


@pytest.mark.parametrize("steps, told", [(500, True), (1000, True), (1001, False)])
def test_a_warm_up_longer_than_the_run_is_told(caplog, steps, told):
    pretrain.check_flags(pretrain.read_flags(["--data", "m.csv", "--steps", str(steps)])[0])
    assert ("warning: the run does not outlast --warmup 1000" in caplog.text) == told


def _worker_of_a_terminal(queue):
    data.outlive_signals(0)
    os.kill(os.getpid(), signal.SIGINT)
    queue.put("alive")


def test_a_spawned_worker_outlives_ctrl_c():
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.SimpleQueue()
    worker = spawn.Process(target=_worker_of_a_terminal, args=(queue,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0 and queue.get() == "alive"


def test_an_older_run_in_the_folder_is_not_taken_for_the_new_one(run, copied):
    """The new one is killed before its first checkpoint."""
    (copied / "log.jsonl").unlink()
    new = run(f"{SMALL} --out {copied} --steps 500 --seed 7 --save_every 500 --warmup 4")
    new.until_step(0, copied)
    new.processes[0].kill()
    new.processes[0].join()
    newest = json.loads((copied / "run.json").read_text())
    assert (newest["seed"], load(copied / "last.pt")["config"]["seed"]) == (7, 0)
    run(f"--out {copied} --resume").refused(newest["begun"], "last.pt is of an older one")


def test_an_unfinished_run_is_not_replaced(run, copied):
    """A job that is requeued starts the same command again."""
    state = load(copied / "last.pt")
    torch.save(state | {"config": state["config"] | {"steps": 9}}, copied / "last.pt")
    (copied / "last.pt").rename(copied / "previous.pt")                 # killed while saving
    run(f"{SMALL} --out {copied} --steps 9").refused(copied, "holds a run, 6 of 9 steps", "give --resume, or another --out")
    assert load(copied / "previous.pt")["step"] == 6


def test_a_run_ends_when_another_begins_in_its_folder(tmp_path, group):
    (tmp_path / "run.json").write_text('{"begun": "later"}')
    with pytest.raises(SystemExit, match="is of another run since later, this one ends unsaved at step 3"):
        pretrain.save_run(tmp_path, torch.nn.Linear(1, 1), None, None, {"begun": "before"}, 3)
    assert not (tmp_path / "last.pt").exists()


def test_processes_that_list_other_items_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda told, ids: told.__setitem__(slice(None), [ids, "a"]))
    pretrain.check_agreement("a", "cached")
    with pytest.raises(ValueError, match="cached: the processes list different items"):
        pretrain.check_agreement("b", "cached")


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_clipped_in_their_own_scale(group, scaled):
    layer, scaler = torch.nn.Linear(1, 1, bias=False), torch.amp.GradScaler("cpu", enabled=scaled)
    optimizer, before = torch.optim.SGD(layer.parameters(), 1.0), layer.weight.item()
    scaler.scale(layer(torch.full((1, 1), 5.)).sum()).backward()
    norm, _ = pretrain.update(layer, optimizer, scaler, 0.5, 1.0, 0, "step 7")
    assert norm == pytest.approx(5) and before - layer.weight.item() == pytest.approx(0.5)


def only_the_training_is_permuted():
    no_pictures()
    original = data.permute_reports

    def permute_reports(items, seed):
        assert {item.split for item in items} == {"train"}
        return original(items, seed)
    data.permute_reports = permute_reports


def test_reports_of_those_held_out_are_not_permuted(run):
    flags = f"{SMALL} {ONLY_MIM} --steps 1 --out control2 --permute_reports"
    run(flags, prepare=only_the_training_is_permuted).succeeded()


def unusual_flags_arrive():
    import losses
    no_pictures()

    def compute(o, batch, enabled, temperature=0.1):
        assert batch["volume_mask"].float().mean() == 0.25 and temperature == 0.7
        return {name: o["f_i"].mean() for name in enabled}
    losses.compute = compute


def test_flags_reach_what_they_are_for(run):
    flags = "--mask_ratio 0.25 --temperature 0.7 --fraction 0.5"
    done = run(f"{SMALL} --steps 1 --out unusual {flags}", prepare=unusual_flags_arrive).succeeded()
    assert "5 volumes to train on, 2 held out" in done.text


def test_weights_of_the_losses():
    def weights(*flags):
        return pretrain.loss_weights(pretrain.read_flags(["--data", "m.csv", *flags])[0])
    assert weights("--lambda_b", "0.2", "--lambda_g", "0") == {"mim": 1, "mlm": 1, "sfr": 0.2, "cml": 0.2, "ssm": 0, "dfa": 0}
    assert weights("--clip", *ONLY_MIM.split()) == {"mim": 1, "clip": 1}
    assert weights("--clip", "--lambda_a", "0", "--lambda_b", "0", "--lambda_g", "0")["clip"] == 1
    none = "every loss is switched off or has the weight 0"
    for flags in (["--no-mim", *ONLY_MIM.split()], ["--lambda_a", "0", *ONLY_MIM.split()]):
        with pytest.raises(ValueError, match=none):
            weights(*flags)
    size = ["--size", "32", "32", "64"]                     # 16 sub-volumes of 16³
    with pytest.raises(ValueError, match="--mask_ratio 0.03: that is none of the 16 sub-volumes of 16³"):
        weights("--mask_ratio", "0.03", *size)
    assert weights("--mask_ratio", "0.04", *size) and weights("--mask_ratio", "0.03", "--no-mim", *size)
    with pytest.raises(ValueError, match="--mask_size 24: found --size 32 32 64, expected multiples"):
        weights("--mask_size", "24", *size)


def test_weights_know_the_patients_that_they_were_trained_on(run, copied, folder):
    """As hashes, also of a run that starts from them."""
    trained = {f"{i}.nii.gz" for i in range(TRAINED_ON)}
    hashes = {hashlib.sha1(name.encode()).hexdigest()[:12] for name in trained}
    assert len(hashes) == TRAINED_ON
    for name in ("last.pt", "encoder.pt", "encoder.safetensors"):
        assert evaluation.patients_of(copied / name) == hashes
        assert b"0.nii.gz" not in (copied / name).read_bytes()
    rows = [[f"{i}.nii.gz", "Normal.", "train"] for i in range(20, 22)]
    write_manifest(folder / "two.csv", rows)
    run(f"{SMALL} {ONLY_MIM} --data two.csv --steps 1 --out chain --init {copied / 'encoder.pt'}").succeeded()
    both = hashes | data.patient_hashes(["20.nii.gz", "21.nii.gz"])
    assert evaluation.patients_of(folder / "chain" / "last.pt") == both
    run("--steps 2 --out chain --resume").succeeded()
    assert evaluation.patients_of(folder / "chain" / "encoder.pt") == both


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture
def group():
    """A group of one process"""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    pretrain.leave_group()


def test_a_checkpoint_of_code_is_not_executed(tmp_path, monkeypatch, uninterrupted, group):
    monkeypatch.chdir(tmp_path)
    Path("last.pt").write_bytes(pickle.dumps({"optimizer": Code()}, protocol=2))
    torch.save({"optimizer": Code()}, "previous.pt")
    with pytest.raises(ValueError, match="previous.pt: cannot be read safely"):
        pretrain.load_last(tmp_path)
    shutil.copy(uninterrupted[1][0] / "last.pt", "previous.pt")
    shutil.copy(uninterrupted[1][0] / "run.json", "run.json")
    assert pretrain.load_last(tmp_path)["step"] == 6
    assert not Path("executed").exists()


def test_resume_refuses_what_contradicts_the_checkpoint(run, copied, folder):
    before = read_log(copied)
    rows = list(csv.reader((folder / "m.csv").open()))[1:]
    write_manifest(folder / "reports.csv", [[volume, "Another report.", split] for volume, _, split in rows])
    write_csv(folder / "patients.csv", "volume,report,split,patient",
              [[*row, "train" if i < 2 else f"{i}"] for i, row in enumerate(rows)])
    cases = {
        "--mask_ratio 0.3": ("--mask_ratio 0.5", "0.3"),
        "--no-mim": ("--mim True", "False"),
        "--size 64 32 64": ("[32, 32, 64]", "[64, 32, 64]"),
        "--init encoder.pt": ("--resume", "--init"),
        "--data all.csv": ("all.csv", "other training volumes"),
        "--data reports.csv": ("reports.csv", "other training volumes, patients or reports"),
        "--data patients.csv": ("patients.csv", "other training volumes, patients or reports"),
        "--steps 3": ("found --steps 3, expected 6 or more",),
    }
    for flags, words in cases.items():
        run(f"--out {copied} --resume {flags}").refused(*words)
    run(f"--out {copied} --resume", world=2).refused("is of 1 processes, found 2")
    run(f"--out {copied.parent / 'nothing'} --resume").refused("previous.pt: found no such file")
    assert read_log(copied) == before


def test_a_text_encoder_that_is_not_that_of_the_training_is_refused(run, copied, folder):
    words = "other words or weights in the text encoder"
    own = [item.report for item in data.load_items(folder / "m.csv") if item.split == "train"]
    phantoms.make_demo_text_encoder(copied / "text_encoder", own)                   # the same once more
    evaluation.load_pretrained(copied / "last.pt")
    for reports, seed in ((["Of another run."], 0), (own, 1)):
        phantoms.make_demo_text_encoder(copied / "text_encoder", reports, seed)
        with pytest.raises(ValueError, match=f"last.pt: found {words} .*text_encoder, expected those it was trained"):
            evaluation.load_pretrained(copied / "last.pt")
    run(f"--out {copied} --resume --steps 8").refused(copied / "last.pt", words)


def test_a_full_disk_leaves_the_checkpoint_before(run, copied):
    full = run(f"--out {copied} --resume --steps 8", prepare=files_up_to_1_mb)
    full.refused(copied / "last.pt", "cannot be written")
    assert load(copied / "last.pt")["step"] == 6 and not list(copied.glob("*.part"))


# -------------------------------------------------------------------------- where it starts from

def test_init_starts_from_a_file(run, folder, copied):
    flags = f"{SMALL} {ONLY_SSM_DFA} --steps 1 --lr_encoder 0 --seed 1 --out init"
    fresh = run(f"{flags} --init {copied / 'encoder.pt'}").succeeded()
    assert "0 unexpected" in fresh.text
    ours = load(folder / "init" / "encoder.pt")
    theirs = load(copied / "encoder.pt")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    (copied / "encoder.pt").unlink()            # a start needs it, going on does not
    run("--resume --steps 2 --out init").succeeded()


def test_the_file_to_start_from_is_not_replaced(run, copied):
    """The encoder before training, which the end compares with, would be the one after it."""
    before = (copied / "encoder.pt").read_bytes()
    for name in ("encoder.pt", "last.pt"):
        run(f"{SMALL} --steps 1 --init {copied / name} --out {copied}").refused(f"--init {copied / name} lies in --out")
    link, inner = copied.parent / "latest.pt", copied / "repeat_0" / "encoder.pt"
    link.symlink_to(copied / "encoder.pt")
    inner.parent.mkdir()
    shutil.copy(link, inner)
    for name in (link, inner):
        with pytest.raises(ValueError, match=f"--init {name} lies in --out {copied}"):
            pretrain.check_init(str(name), copied)
    pretrain.check_init(str(copied / "encoder.pt"), copied.parent)      # a folder above is another one
    assert (copied / "encoder.pt").read_bytes() == before


def test_init_of_the_second_version(run, folder, tmp_path):
    """The encoder becomes what the file holds; the checkpoint alone tells, to --resume and to eval.py."""
    torch.manual_seed(0)
    voco = model.build_encoder("swin_t", use_v2=True)
    torch.save({f"swinViT.{name}": p for name, p in voco.state_dict().items()}, tmp_path / "voco.pt")
    flags = f"{SMALL} {ONLY_MIM} --lr_encoder 0 --init {tmp_path / 'voco.pt'}"
    run(f"{flags} --merging monai --steps 2 --out v2").succeeded()
    first = run(f"{flags} --merging monai --steps 1 --out v2_1").succeeded()
    assert "does not tell" not in first.text
    assert "encoder.pt: MONAI" not in first.text
    old = run(f"{flags} --merging v0.9 --steps 1 --out v2_old").succeeded()
    assert "warning: encoder.pt: MONAI" in old.text
    run("--out v2_1 --resume --steps 2").succeeded()
    assert load(folder / "v2_1" / "last.pt")["merging"] == "monai"
    x = torch.rand(1, 1, 32, 32, 32)
    (tmp_path / "voco.pt").unlink()
    network, _, config, *_ = evaluation.load_pretrained(folder / "v2_1" / "last.pt")
    encoder = evaluation.load_encoder(folder / "v2" / "encoder.pt")[0]
    for found in (network.encoder, encoder):
        assert all(torch.equal(a, b) for a, b in zip(found(x), voco(x), strict=True))
    settings = model.notes_of(model.read_checkpoint(folder / "v2" / "encoder.safetensors"))["architecture"]
    assert settings["use_v2"] and settings["depths"] == [1, 2]
    assert settings["note"] in (folder / "v2" / "README.md").read_text()
    assert evaluation.untrained_encoder(config) is None
    torch.save({f"swinViT.{name}": p for name, p in voco.state_dict().items()}, tmp_path / "voco.pt")
    untrained = evaluation.untrained_encoder(config)
    assert untrained.use_v2 and untrained.merging == "monai"
    run(f"{SMALL} --merging v0.9 --out none").refused("--merging v0.9: found no --init")


def test_reports_in_an_unknown_language_are_refused(run, folder, text_folder):
    write_manifest(folder / "german.csv", [["0.nii.gz", "Herzschatten vergrößert.", "train"]])
    run(f"{SMALL} --data german.csv --text_encoder {text_folder} --out german").refused(
        text_folder, "2 unknown words among 3 of german.csv")


def test_a_poor_init_is_refused(run, folder, tmp_path):
    poor = tmp_path / "poor.pt"
    torch.save({"layers1.0.blocks.0.norm1.weight": torch.ones(12)}, poor)
    run(f"{SMALL} --out poor --init {poor}").refused(poor, "does not fill the encoder")
    run(f"{SMALL} --out poor --init {tmp_path / 'absent.pt'}").refused("absent.pt", "no such file")
    assert not (folder / "poor" / "log.jsonl").exists()


def test_a_fresh_run_makes_its_own_vocabulary(run, folder):
    """A folder that other data left behind must not lend its words to the demo's text encoder."""
    write_manifest(folder / "other.csv", [[f"{i}.nii.gz", "Pneumothorax.", "train"] for i in range(2)])
    for manifest in ("other.csv", "m.csv"):
        run(f"{SMALL} {ONLY_MIM} --data {manifest} --steps 1 --out vocabulary").succeeded()
    words = (folder / "vocabulary" / "text_encoder" / "tokenizer.json").read_text()
    assert "nodule" in words and "pneumothorax" not in words


# ---------------------------------------------------------------------------- non-finite losses

def test_a_step_that_is_not_finite_is_named_and_skipped(run, folder):
    """In the first of the two passes of step 1; the run goes on behind it, resumed or not."""
    common = f"{SMALL} {ONLY_MIM} --accumulate 2 --save_every 1"
    runs = [run(f"{common} --steps {steps} --out nan{steps}", prepare=third_mim_is_nan) for steps in (2, 3)]
    for started in runs:
        started.succeeded()
    batches = [batch for batch, _ in zip(data.Batches(TRAINED_ON, 2), range(4))]
    names = ", ".join(f"{index}.nii.gz" for batch in batches[2:] for index, _ in batch)
    assert f"step 1: mim of the volumes {names}; loss nan" in runs[0].text
    assert "not finite, the step is skipped" in runs[0].text
    out = folder / "nan2"
    before, after = (load(out / name) for name in ("previous.pt", "last.pt"))
    assert (before["step"], after["step"]) == (1, 2)
    for name, weight in before["model"].items():
        assert torch.equal(weight, after["model"][name]), name
    for i, moments in before["optimizer"]["state"].items():
        assert torch.equal(moments["exp_avg"], after["optimizer"]["state"][i]["exp_avg"])
    first, second = read_log(out)
    assert math.isfinite(first["mim"]) and second["mim"] is second["loss"] is None      # JSON has no NaN

    run("--out nan2 --resume --steps 3").succeeded()
    assert equal_runs(out, folder / "nan3")
    assert math.isfinite(read_log(out)[2]["mim"])


def test_ten_such_steps_in_a_row_stop_the_run(run, folder):
    flags = f"{SMALL} {ONLY_MIM} --steps 12 --save_every 100 --out nans"
    run(flags, prepare=mim_is_always_nan).refused("10 steps in a row were not finite")
    assert len(read_log(folder / "nans")) == 9  # the tenth ends it


def test_gradients_that_no_scale_makes_finite_stop_the_run(group):
    """In fp16 GradScaler skips a step with an infinite gradient and halves its scale: a few times only."""
    layer = torch.nn.Linear(1, 1)
    optimizer, scaler = torch.optim.SGD(layer.parameters(), 0.1), torch.amp.GradScaler("cpu")

    def step(gradient, bad_steps):
        loss = scaler.scale(layer(torch.ones(1, 1)).sum())
        loss.backward()
        layer.weight.grad *= gradient
        return pretrain.update(layer, optimizer, scaler, 0, 1.0, bad_steps, "step 7")[1]
    bad = 0
    for count in range(39):     # a search that finds its scale at last
        bad = step(math.inf if count % 2 else math.nan, bad)
        assert bad == count + 1
    assert step(1.0, bad) == 0 and scaler.get_scale() == 2.0 ** (16 - 39)
    with pytest.raises(SystemExit, match="40 steps in a row were not finite"):
        step(math.inf, 39)


# ------------------------------------------------------------------------------------- bad input

def test_bad_flags_and_files_are_refused_before_training(run, folder):
    rows = [row[:3] for row in csv.reader((folder / "all.csv").open())][1:]
    write_manifest(folder / "silent.csv", [[volume, " . ", split] for volume, _, split in rows])
    write_manifest(folder / "absent.csv", [*rows[:5], ["absent.nii.gz", "Normal.", "train"]])
    write_manifest(folder / "held_out.csv", [[volume, report, "test"] for volume, report, _ in rows])
    write_csv(folder / "column.csv", "volume,findings", [["0.nii.gz", "Normal."]])
    masks = ["mask.nii.gz", "mask2.nii.gz"]
    write_csv(folder / "mask.csv", "volume,report", [[name, "Normal."] for name in masks])
    mask = np.random.default_rng(0).integers(0, 2, (9, 9, 9)).astype(np.uint8)
    for name in masks:
        save_nifti(folder / name, mask, np.eye(4))
    cases = {
        "--size 32 40 64": ("--size 32 40 64", "multiple of 32"),
        "--no-mim " + ONLY_MIM: ("every loss is switched off",),
        "--embed_dim 25": ("embed_dim 25",),
        "--mask_size 24": ("--mask_size 24", "32 32 64"),
        "--mask_size 0": ("--mask_size 0",),
        "--lambda_b nan": ("--lambda_b nan: expected at least 0",),
        "--mask_ratio 1.5": ("--mask_ratio 1.5",),
        "--mlm_prob 2": ("--mlm_prob 2.0",),
        "--temperature 0": ("--temperature 0.0",),
        "--fraction 0": ("--fraction 0",),
        "--precision fp16": ("--precision fp16",),
        "--out m.csv/below": ("Not a directory", "m.csv/below"),
        "--batch_size 11": ("10 volumes", "11"),
        "--batch_size 0": ("--batch_size 0",),
        "--accumulate 0": ("--accumulate 0",),
        "--steps 0": ("--steps 0",),
        "--data nowhere.csv": ("nowhere.csv",),
        "--data silent.csv": ("silent.csv",),
        "--data absent.csv": ("absent.nii.gz", "1 of 6"),
        "--data held_out.csv": ("held_out.csv",),
        "--data column.csv": ("column.csv", "report"),
        "--data mask.csv": ("volumes",),
        "--text_encoder empty": ("text encoder empty",),
    }
    (folder / "empty").mkdir()
    for flags, words in cases.items():
        run(f"{SMALL} --steps 2 --out refused {flags}").refused(*words)
    for flags in ("--encoder resnet", "--size 32 32", "--no-such-flag"):
        started = run(f"{SMALL} --out refused {flags}")
        assert started.wait() == 2 and "usage:" in started.errors
    assert not list(folder.glob("refused/*.pt")) and not (folder / "refused" / "log.jsonl").exists()


NUMBERS = {                                     # of the flags: the least or most that is good, and bad ones
    "clip_grad": ([0.0], [-1.0, math.nan, math.inf]), "lambda_a": ([0.0], [-0.1, math.nan, math.inf]),
    "lr": ([0.0], [-1e-4, math.nan, math.inf]), "weight_decay": ([0.0], [-0.01, math.nan]),
    "temperature": ([1e-3, 10.0], [0.0, -0.1, math.nan, math.inf]), "warmup": ([0, 0.5], [-1, math.nan]),
    "mask_ratio": ([1e-3, 1.0], [0.0, 1.01, math.nan]), "mlm_prob": ([1.0], [0.0, 1.5, math.nan]),
    "fraction": ([1.0], [0.0, 1.1]), "steps": ([1, None], [0, -3]), "embed_dim": ([1], [0, -12]),
    "workers": ([0], [-1]), "fold": ([0, None], [-1]), "seed": ([0, 2 ** 63 - 1], [-1]),
    "size": ([[32, 1, 32]], [[32, 0, 32], [-32, 32, 32]]), "limit": ([1, None], [0, -1]), "n": ([1], [0]),
    "spacing": ([(1.5, 1.5, 0.1), None], [(1.5, 0.0, 1.5), (math.nan, 1.0, 1.0)]), "few": ([0], [-1]),
    "repeats": ([1], [0]), "min_count": ([1], [0]),
    "text_encoder": (["demo", ""], [])}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_ranges(name):
    good, bad = NUMBERS[name]
    for value in good:
        data.check_numbers(argparse.Namespace(**{name: value}))
    for value in bad:
        text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        with pytest.raises(ValueError, match=f"--{name} {text}: expected "):
            data.check_numbers(argparse.Namespace(**{name: value}))


def test_every_number_has_a_range():
    ranged = set().union(*(names for _, _, names in data.RANGES))
    for parser in (pretrain.flags(), finetune.flags()):
        numbers = {action.dest for action in parser._actions if action.type in (int, float)}
        assert numbers <= ranged


def test_a_text_encoder_without_weights_is_refused(run, uninterrupted, tmp_path):
    text = shutil.copytree(uninterrupted[1][0] / "text_encoder", tmp_path / "text")
    (text / "model.safetensors").unlink()
    run(f"{SMALL} --steps 2 --out refused --text_encoder {text}").refused(text, "weights")


def test_a_volume_that_cannot_be_read_is_skipped_and_many_stop_the_run(run, folder):
    rows = list(csv.reader((folder / "all.csv").open()))[1:]
    batch = next(iter(data.Batches(len(rows), 2)))
    for count, (index, _) in enumerate(batch, 1):
        rows[index][0] = f"torn{index}.nii.gz"
        (folder / rows[index][0]).write_bytes((folder / f"{index}.nii.gz").read_bytes()[:5000])
        write_manifest(folder / f"torn{count}.csv", rows)
    few = run(f"{SMALL} {ONLY_MIM} --steps 1 --out torn --data torn1.csv").succeeded()      # 1 of 24
    assert f"skipped torn{batch[0][0]}.nii.gz" in few.text
    assert math.isfinite(read_log(folder / "torn")[0]["loss"])
    many = run(f"{SMALL} {ONLY_MIM} --steps 1 --out torn_too --data torn2.csv")             # 2 of 24
    many.refused("2 of 24 volumes cannot be read", *(f"torn{index}.nii.gz" for index, _ in batch))
    shared = run(f"{SMALL} {ONLY_MIM} --batch_size 1 --steps 1 --out torn_apart --data torn2.csv", world=2)
    shared.refused("2 of 24 volumes cannot be read")            # each process met one


def test_another_crop_is_told(command, copied, folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(data, "CROP", (0.5, 0.5, 0.5))
    for name in ("last.pt", "encoder.pt"):
        caplog.clear()
        flags = ["--input", folder / "0.nii.gz", "--out", tmp_path / "features.npz"]
        assert command("eval.py", "embed", "--checkpoint", copied / name, *flags)[0] == 0
        assert f"{name} was trained with the crop (0.88, 0.66, 0.88), here it is (0.5, 0.5, 0.5)" in caplog.text


def test_a_batch_of_one_warns_and_stays_finite(run, folder):
    alone = run(f"{SMALL} --batch_size 1 --clip --steps 2 --out alone").succeeded()
    assert "warning: in a batch of one" in alone.text
    for row in read_log(folder / "alone"):
        assert row["cml"] == row["ssm"] == row["dfa"] == row["clip"] == 0
        assert all(math.isfinite(value) for value in row.values())
        assert row["mim"] > 0 and row["mlm"] > 0


def test_help_answers_without_torch():
    result = python("-X", "importtime", SCRIPT, "--help")
    assert result.returncode == 0 and "--mask_ratio" in result.stdout and "torch" not in result.stderr


# ------------------------------------------------------------------------------------ instruments

def test_permuted_reports_and_levels(run, folder):
    """The control says so, trains on other pairs and cannot be resumed as anything else."""
    flags = f"{SMALL} {ONLY_MIM} --clip --steps 3 --out"
    true, control = run(f"{flags} true").succeeded(), run(f"{flags} control --permute_reports").succeeded()
    assert "--permute_reports: every patient trains with another's report" in control.text
    assert "permute_reports" not in true.text
    a, b = (read_log(folder / name) for name in ("true", "control"))
    assert a[0]["clip"] != b[0]["clip"]
    assert load(folder / "control" / "last.pt")["config"]["permute_reports"] is True
    run(f"{flags} true --resume --steps 4 --permute_reports").refused("--permute_reports False")
    first = json.loads((folder / "true" / "log.jsonl").read_text().splitlines()[0])
    assert first["nothing"].keys() == {"mim", "clip"}
    assert first["nothing"]["clip"] == pytest.approx(math.log(2))
    for words in ("knowing nothing", "the encoder's weights moved by"):
        assert words in true.text
    assert not (folder / "true" / "result.json").exists()       # of the demo alone


def test_a_cache_folder_is_enough_to_train_on(run, folder, tmp_path, command):
    shutil.copytree(folder, tmp_path / "raw", ignore=shutil.ignore_patterns("[!0-9m]*"))
    made, out = tmp_path / "made", tmp_path / "out"
    code, text = command("data.py", "cache", "--data", tmp_path / "raw" / "m.csv", "--out", made, "--size", 32, 32, 64)
    assert code == 0, text
    shutil.rmtree(tmp_path / "raw")
    flags = SMALL.replace("m.csv", str(made))
    done = run(f"{flags} --steps 3 --out {out} --cache {tmp_path / 'unused'}").succeeded()
    assert f"data       {made.name}: 10 volumes to train on, 2 held out" in done.text and not (tmp_path / "unused").exists()
    vocabulary = (out / "text_encoder" / "vocab.txt").read_text().split()
    assert {"nodule", "effusion", "heart"} <= set(vocabulary)
    moved = made.rename(tmp_path / "moved")
    run(f"--resume --out {out} --data {moved} --steps 5").succeeded()
    assert [row["step"] for row in read_log(out)] == [0, 1, 2, 3, 4]
    flags = flags.replace(str(made), str(moved))
    run(f"{flags} --size 32 32 32 --out {tmp_path / 'new'}").refused(f"{moved}: ", "--size 32 32 64", "--size 32 32 32")
    settings = json.loads((moved / "cache.json").read_text())
    (moved / "cache.json").write_text(json.dumps(settings | {"hu": "header"}))
    code, text = command("eval.py", "pairing", "--data", moved, "--checkpoint", out / "last.pt", "--batch_size", 2)
    assert code == 1 and "found a cache made with --hu header, expected --hu auto" in text


def test_pairing_command(command, uninterrupted, folder, tmp_path):
    run_folder = uninterrupted[1][0]
    flags = ["pairing", "--data", folder / "m.csv", "--cache", tmp_path, "--batch_size", 2, "--out", tmp_path]
    code, text = command("eval.py", *flags, "--checkpoint", run_folder / "last.pt")
    assert code == 0 and "gradients' cosine" in text
    found = json.loads((tmp_path / "pairing.json").read_text())
    assert set(found) == {"mim", "mlm", "sfr", "cml", "ssm", "dfa"}
    assert ("too few batches to say" in text) == (found["mlm"]["uses_report"] is None)
    assert (tmp_path / "pairing.png").stat().st_size > 5000
    assert (tmp_path / "pairing_attention.png").stat().st_size > 5000 and "pairing_attention.png: where" in text
    code, text = command("eval.py", *flags, "--checkpoint", run_folder / "encoder.pt")
    assert code == 1 and "encoder.pt: found no text side, expected last.pt of pretrain.py" in text
    rows = [["0.nii.gz", "A nodule. The heart is normal.", "train"], ["1.nii.gz", "A nodule. No effusion.", "test"]]
    write_manifest(folder / "one.csv", rows)
    code, text = command("eval.py", *flags, "--checkpoint", run_folder / "last.pt", "--data", folder / "one.csv")
    assert code == 1 and "one.csv: found 1 held-out patients" in text and "expected at least two" in text
    write_manifest(folder / "six.csv", [[f"{i}.nii.gz", f"A nodule in lobe {i}. No effusion.", "test"] for i in range(6)])
    assert command("eval.py", *flags, "--checkpoint", run_folder / "last.pt", "--data", folder / "six.csv")[0] == 0
    found = json.loads((tmp_path / "pairing.json").read_text())     # three rounds of the same three groups
    assert found["mlm"]["reason"] == "3 batches of other patients, fewer than 8"


@pytest.mark.parametrize("world, values", [(1, "volume"), (2, "text")])
def test_the_demo_writes_what_it_found(run, tmp_path, world, values):
    """The demo in small: fewer phantoms, steps and volumes a batch."""
    done = run(f"--steps 2 --batch_size 4 --workers 0 --embed_dim 24 --out {tmp_path / 'out'} "
               f"--sentence_values {values} --cache {tmp_path / 'cache'}", world=world,
               prepare=few_phantoms).succeeded()
    assert (tmp_path / "out" / "attention.png").exists() == (values == "volume")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    of_sentences = {"lesion_attention"} if values == "volume" else set()
    assert result.keys() == {"probe", "retrieval", "pairing", "levels", "moved"} | of_sentences
    if of_sentences:
        assert 0 < result["lesion_attention"]["inside"] < 1 and result["lesion_attention"]["n"] <= 18
    assert set(result["levels"]) == set(result["pairing"]) == {"mim", "mlm", "sfr", "cml", "ssm", "dfa", "clip"}
    low, value, high = result["probe"]["difference"]
    assert low <= value <= high and value == pytest.approx(
        result["probe"]["pretrained"] - result["probe"]["untrained"])
    items = data.load_items(tmp_path / "cache" / "demo" / "manifest.csv")
    untrained = evaluation.untrained_encoder(load(tmp_path / "out" / "last.pt")["config"])
    features = evaluation.probe_features(untrained, items, tmp_path / "cache", (32, 32, 32), batch_size=24)
    assert result["probe"]["untrained"] == pytest.approx(evaluation.macro_auroc(*evaluation.probe(features, items)))
    assert result["retrieval"]["k"] == 1 and result["retrieval"]["chance"] == pytest.approx(1 / 18)
    assert 0 < result["moved"] < 0.1
    assert (tmp_path / "out" / "pairing.png").stat().st_size > 5000
    assert "no part of MG-3D" in done.text and "too few batches to say" in done.text
    card = (tmp_path / "out" / "README.md").read_text()
    for say, name in ((evaluation.say_probe, "probe"), (evaluation.say_retrieval, "retrieval")):
        assert say(result[name]) in card and say(result[name]) in done.text
    assert "too few batches to say" in card


def few_phantoms():
    data.DEMO_SIZE = 60
