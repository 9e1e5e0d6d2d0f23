"""finetune.py on small sets in their native layouts: every kind of task, resuming, repeats, several processes, bad input."""
import csv
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import finetune
import losses
import model

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"luna16": 8, "msd-lung": 10, "acdc": 6, "ctrg": 8, "ct-rate-vocab": 8, "ct-rate-retrieval": 8, "stoic": 24, "cc-ccii": 12,
         "covid-19-20": 6}


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """sets(task) -> the folder of a small set of the task, written once"""
    folder = tmp_path_factory.mktemp("sets")

    def write(task):
        if not (folder / task).exists():
            data.write_task_demo(task, folder / task, SIZES[task], seed=1, workers=1)
        return folder / task
    return write


@pytest.fixture
def run(sets, tmp_path, monkeypatch, caplog):
    """run(task, flags …) -> what finetune.py logged; in this process, so that nothing is imported anew"""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)

    def finetune_py(task, *flags, out="out"):
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        begin = []
        if task:
            begin = ["--task", task, "--data", sets(task), "--size", 32, 32, 32, "--workers", 0, "--cache", sets(task).parent / "cache"]
        if task and data.TASKS[task].kind == "segment":
            begin += ["--spacing", 10, 10, 10]                  # so that one window is nearly all
        try:
            finetune.main(*finetune.read_flags(["--out", out, *map(str, [*begin, *flags])]))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return caplog.text
    return finetune_py


def weights(path):
    return torch.load(path, weights_only=True)["model"]


# ----------------------------------------------------------------------------------------------------- losses

def test_dice_ce_is_the_loop():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randint(0, 3, (2, 2, 3, 4))
    p, dices = logits.softmax(1), []
    places = list(np.ndindex(2, 2, 3, 4))
    for k in (1, 2):
        both = sum(p[b, k][tuple(at)] for b, *at in places if mask[b][tuple(at)] == k)
        total = sum(p[b, k][tuple(at)] + (mask[b][tuple(at)] == k) for b, *at in places)
        dices.append((2 * both + 1e-5) / (total + 1e-5))
    cross = [-p[b, mask[b][tuple(at)]][tuple(at)].log() for b, *at in places]
    expected = 1 - sum(dices) / 2 + sum(cross) / len(cross)
    loss = losses.dice_ce_loss(logits, mask)
    assert torch.allclose(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)):
        assert torch.allclose(a, b)


def test_prompt_loss_is_the_loop():
    torch.manual_seed(0)
    f_i, f_t = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    labels, terms = torch.tensor([[1., 0.], [0., 0.], [1., 1.]]), []
    for i in range(3):
        for k in range(2):
            yes, no = (torch.cosine_similarity(f_i[i], f_t[2 * k + j], dim=0) / 0.2 for j in (0, 1))
            right, wrong = (yes, no) if labels[i, k] else (no, yes)
            terms.append(-(right.exp() / (right.exp() + wrong.exp())).log())
    loss = losses.prompt_loss(f_i, f_t, labels, 0.2)
    expected = sum(terms) / 6
    assert torch.allclose(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, [f_i, f_t]), torch.autograd.grad(expected, [f_i, f_t])):
        assert torch.allclose(a, b)


# ------------------------------------------------------------------------------------------------ every kind

@pytest.mark.parametrize("task", SIZES)
def test_every_task_trains_tests_and_predicts(run, sets, task):
    output = run(task, "--epochs", 1, "--steps", 2, "--batch_size", 2)
    assert {"best.pt", "last.pt", "result.json", "log.jsonl", "curves.png", "split.json", "predictions"} <= set(os.listdir("out"))
    result = json.loads(Path("out/result.json").read_text())
    split = json.loads(Path("out/split.json").read_text())
    items = data.load_task(task, sets(task))
    tested = sum(item.split == "test" for item in items)
    assert result["task"] == task and 0 < result["n"] <= tested and f"on {result['n']} unseen items: {task}" in output
    assert not set(split["train"]) & set(split["test"]) and not set(split["valid"]) & set(split["test"])
    # The file alone rebuilds the network, which gives the same number again.
    network, row, config = evaluation.load_checkpoint("out/best.pt")
    test_items = [item for item in items if item.split == "test"]
    again = evaluation.evaluate(network, test_items, row, config, sets(task).parent / "cache", "cpu", progress=False)
    assert again["value"] == pytest.approx(result["value"], nan_ok=True) and row.size == (32, 32, 32)


def test_a_tenth_task_is_two_edits(run, sets, monkeypatch):
    def records(folder, fold):
        return [item._replace(labels=item.labels[:1], split=None) for item in data.load_task("stoic", sets("stoic"))]
    row = data.Task("classify", "whole", records, "as STOIC", ("COVID-19",), "AUC", data.SIZE, data.WINDOW, None,
                    data._recipe(2, 0, 4, 1e-3))
    monkeypatch.setitem(data.TASKS, "tenth", row)
    monkeypatch.setattr(finetune, "TASK_NAMES", (*finetune.TASK_NAMES, "tenth"))
    output = run(None, "--task", "tenth", "--data", sets("stoic"), "--size", 32, 32, 32, "--workers", 0, "--steps", 2)
    assert "unseen items: tenth: AUC" in output
    network, task, _ = evaluation.load_checkpoint("out/best.pt")
    assert task.classes == ("COVID-19",) and network(torch.rand(1, 1, 32, 32, 32)).shape == (1, 1)


def test_defaults_come_from_the_data_then_the_task(sets):
    folder = sets("msd-lung")
    args = finetune.flags().parse_args(["--task", "msd-lung", "--data", str(folder), "--lr", "0.5"])
    task = finetune.complete(args)
    own = json.loads((folder / "recipe.json").read_text())
    assert args.encoder == own["encoder"] == "swin_t" and list(task.size) == list(own["size"]) and args.lr == 0.5
    assert args.weight_decay == data.TASKS["msd-lung"].recipe["weight_decay"]
    assert data.TASKS.keys() == set(finetune.TASK_NAMES)


def test_frozen_encoder_and_fraction(run, sets):
    torch.manual_seed(3)
    encoder = model.build_encoder("swin_t")
    torch.save(model.export_encoder(encoder), "encoder.pt")
    output = run("stoic", "--epochs", 1, "--init", "encoder.pt", "--freeze", "--fraction", 0.5, "--batch_size", 4)
    trained, start = weights("out/last.pt"), encoder.state_dict()
    assert all(torch.equal(tensor, trained[f"encoder.{name}"]) for name, tensor in start.items() if name != "mask_token")
    n = sum(item.split == "train" for item in data.load_task("stoic", sets("stoic")))
    assert f"{round(n / 2)} items of {round(n / 2)} scans to train on" in output and "frozen" in output


def test_negatives_are_drawn_anew(sets):
    items = [item for item in data.load_task("luna16", sets("luna16")) if item.split == "train"]
    dataset = data.TaskDataset(items, data.TASKS["luna16"]._replace(size=(32, 32, 32), augment={}), sets("luna16").parent / "cache")
    positives = sum(item.labels[0] == 1 for item in items)
    assert len(dataset) == 2 * positives < len(items)
    first, second = ({dataset[i, step]["id"] for i in range(positives, len(dataset))} for step in (0, 1))
    assert first != second and all(dataset[i, 0]["label"].item() == 0 for i in range(positives, len(dataset)))
    assert all(dataset[i, 0]["label"].item() == 1 for i in range(positives))


# ---------------------------------------------------------------------------------- cutting and augmenting scans

@pytest.mark.parametrize("settings", [{"flip": 1}, {"rot90": 1}, {"affine": 1}, {"zoom": 1},
                                      {"flip": .5, "rot90": .5, "affine": 1, "zoom": 1}])
@pytest.mark.parametrize("seed", range(4))
def test_a_mask_moves_with_its_volume(settings, seed):
    z, y, x = torch.meshgrid(*(torch.arange(n) for n in (12, 16, 16)), indexing="ij")
    mask = ((z < 7) & (y > 5) & (x < 12)).long()                # touches three borders
    volume, moved = data.augment(mask[None].float(), mask, np.random.default_rng(seed), settings)
    assert volume.shape == (1, 12, 16, 16) and moved.dtype == torch.long and not torch.equal(volume[0], mask.float())
    sure = (volume[0] < 0.12) | (volume[0] > 0.88)              # the nearest of 8 voxels weighs an eighth at least
    assert torch.equal(volume[0][sure] > 0.5, moved[sure] == 1) and sure.float().mean() > 0.75


def test_augmentation_keeps_lengths_and_angles():
    # A ball stays a ball of its size when turned in a box of unequal sides.
    z, y, x = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in (24, 32, 40)), indexing="ij")
    ball = ((z ** 2 + (y - 4) ** 2 + (x + 6) ** 2) < 36).long()
    _, moved = data.augment(ball[None].float(), ball, np.random.default_rng(0), {"affine": 1})
    assert abs(int(moved.sum()) / int(ball.sum()) - 1) < 0.05
    at = moved.nonzero().float()
    assert (at.amax(0) - at.amin(0) - 10.5).abs().max() <= 1.5
    offset = at.mean(0) - torch.tensor([11.5, 15.5, 19.5])
    assert offset.norm() == pytest.approx(52 ** 0.5, abs=0.5)   # as far from the middle as before


def test_values_change_as_told():
    volume, generator = torch.rand(1, 4, 4, 4), np.random.default_rng(0)
    scaled, _ = data.augment(volume, None, generator, {"scale": 1, "shift": 1})
    a, b = np.polyfit(volume.flatten(), scaled.flatten(), 1)
    assert 0.9 <= a <= 1.1 and abs(b) <= 0.1 and (a, b) != (1, 0)
    brighter, _ = data.augment(volume, None, generator, {"brightness": 0.07})
    change = brighter - volume
    assert change.std() < 1e-6 and 0 < abs(change.mean()) <= 0.07
    harder, _ = data.augment(volume, None, generator, {"contrast": 0.05})
    a, _ = np.polyfit(volume.flatten(), harder.flatten(), 1)
    assert 0 < abs(a - 1) <= 0.05 and harder.mean() == pytest.approx(volume.mean().item(), abs=1e-6)
    noisy, _ = data.augment(torch.zeros(1, 32, 32, 32), None, generator, {"noise": 0.01})
    assert noisy.std() == pytest.approx(0.01, rel=0.05)


def test_small_scans_are_filled_up():
    array, mask = np.float16([[[0.5, 0.7], [0.2, 0.9]]]), np.ones((1, 2, 2), np.uint8)
    assert np.array_equal(data._cut(array, (0, 0, 0), (3, 2, 2))[:, 0, 0], np.float16([0, 0.5, 0]))
    assert data._cut(mask, (0, 0, 0), (3, 4, 2)).sum() == mask.sum()


def test_slices_are_cropped_by_chance_to_train_and_in_the_middle_to_test(sets, tmp_path):
    item = data.load_task("cc-ccii", sets("cc-ccii"))[0]
    task = data.TASKS["cc-ccii"]._replace(size=(32, 96, 96))
    whole = torch.from_numpy(np.array(data.prepare(item, task, tmp_path)[0])).float()
    assert whole.shape == (32, 128, 128)
    assert torch.equal(data.network_input(item, task, tmp_path)[0], whole[:, 16:112, 16:112])
    crops = [data.cut_views(item, task, tmp_path, np.random.default_rng(seed))[0][0, 0] for seed in range(4)]
    at = {next((y, x) for y in range(33) for x in range(33) if torch.equal(whole[:, y:y + 96, x:x + 96], crop)) for crop in crops}
    assert len(at) > 1


def test_cubes_come_from_a_file_that_is_not_loaded_whole(sets, tmp_path):
    item = data.load_task("luna16", sets("luna16"))[0]
    volume, _, affine = data.prepare(item, data.TASKS["luna16"], tmp_path)
    assert isinstance(volume, np.memmap)
    at = data.candidate_voxel(item, volume.shape, affine)
    cube = data.network_input(item, data.TASKS["luna16"]._replace(size=(8, 8, 8)), tmp_path)
    corner = np.clip(at - 4, 0, np.array(volume.shape) - 8)
    assert np.array_equal(cube[0], volume[tuple(slice(c, c + 8) for c in corner)])


def test_patches_hold_foreground_and_background_in_turns(sets):
    items, cache = data.load_task("msd-lung", sets("msd-lung")), sets("msd-lung").parent / "cache"
    task = data.TASKS["msd-lung"]._replace(size=(8, 8, 8), spacing=(6., 6., 6.), patches=3)
    masks = [data.cut_views(items[0], task, cache, np.random.default_rng(seed))[1] for seed in range(20)]
    held = [[bool(mask[4, 4, 4]) for mask in patches] for patches in masks]
    assert {sum(some) for some in held} == {1, 2} and all(some[0] == some[2] != some[1] for some in held)


# ------------------------------------------------------------------------------------- interrupted, repeated

@pytest.mark.parametrize("task, where, loss, batch_size", [
    ("ctrg", losses, "mlm_loss", 2), ("luna16", F, "binary_cross_entropy_with_logits", 12)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(run, monkeypatch, task, where, loss, batch_size):
    flags = ["--epochs", 2, "--batch_size", batch_size]
    run(task, *flags, out="whole")
    original, calls = getattr(where, loss), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:                                     # in the middle of an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)
    monkeypatch.setattr(where, loss, interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(task, *flags, out="broken")
    assert stopped.value.code == 128 + signal.SIGTERM and not Path("broken/result.json").exists()
    assert torch.load("broken/last.pt", weights_only=True)["step"] == 3
    run(None, "--resume", out="broken")
    for name, tensor in weights("whole/last.pt").items():
        assert torch.equal(tensor, weights("broken/last.pt")[name]), name
    whole, broken = (json.loads(Path(out, "result.json").read_text()) for out in ("whole", "broken"))
    assert whole == broken
    losses_of = [[row["loss"] for row in evaluation.read_log(f"{out}/log.jsonl")] for out in ("whole", "broken")]
    assert losses_of[0] == losses_of[1] and len(losses_of[0]) > 3


def test_a_new_run_forgets_the_old_one_and_a_broken_file_is_no_end(run):
    run("ctrg", "--epochs", 2, "--steps", 4, "--lr", 0.01)
    last, previous = (torch.load(f"out/{name}.pt", weights_only=True)["step"] for name in ("last", "previous"))
    assert previous < last
    Path("out/last.pt").write_bytes(b"torn")
    Path("out/result.json").unlink()
    run(None, "--resume")
    assert torch.load("out/last.pt", weights_only=True)["step"] == last and Path("out/result.json").exists()
    assert torch.load("out/previous.pt", weights_only=True)["step"] == previous         # the torn file did not take its place
    first = weights("out/last.pt")
    run("ctrg", "--epochs", 1, "--steps", 1)
    assert torch.load("out/last.pt", weights_only=True)["step"] == 1 and not Path("out/previous.pt").exists()
    assert not torch.equal(first["head.weight"], weights("out/last.pt")["head.weight"])


def test_a_run_that_cannot_begin_leaves_the_old_one_alone(run, sets):
    run("ctrg", "--epochs", 1, "--steps", 1)
    before = {name: Path("out", name).read_bytes() for name in ("best.pt", "last.pt", "result.json", "run.json")}
    for flags in (["--data", "nowhere"], ["--init", "nowhere.pt"], ["--min_count", 1000]):
        with pytest.raises(ValueError):
            run("ctrg", "--epochs", 1, *flags)
    assert before == {name: Path("out", name).read_bytes() for name in before}


def test_the_validation_part_picks_the_epoch(run, monkeypatch):
    values = iter([0.2, 0.7, 0.4, 0.7, math.nan])
    original = evaluation.evaluate

    def evaluate(*args, out=None, **more):                      # `out`: the test at the end
        return original(*args, out=out, **more) if out else {"value": next(values), "metric": "AUC"}
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    output = run("stoic", "--epochs", 5, "--eval_every", 1, "--batch_size", 16, "--lr", 0.01)
    best, last = (torch.load(f"out/{name}.pt", weights_only=True) for name in ("best", "last"))
    assert "best epoch 2 (validation AUC 0.7000)" in output and last["best"] == {"value": 0.7, "epoch": 2, "metric": "AUC"}
    assert best["step"] == 2 * last["step"] / 5 and not torch.equal(best["model"]["head.weight"], last["model"]["head.weight"])
    rows = [json.loads(line, parse_constant=pytest.fail) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [row["valid"] for row in rows if "valid" in row] == [0.2, 0.7, 0.4, 0.7, None]
    assert json.loads(Path("out/result.json").read_text())["epoch"] == 2


@pytest.mark.parametrize("decay", ["cosine", "step"])
def test_rates_follow_the_recipe(run, decay):
    run("stoic", "--epochs", 4, "--warmup", 1, "--decay", decay, "--batch_size", 8, "--lr", 0.01, "--lr_encoder", 0.001)
    rows = evaluation.read_log("out/log.jsonl")
    n = len(rows) // 4                                          # steps an epoch
    warm = [(i + 1) / n for i in range(n)]
    later = [0.5 * (1 + math.cos(math.pi * i / (3 * n))) if decay == "cosine" else 0.8 ** (1 + i // n) for i in range(3 * n)]
    assert [row["lr"] / 0.01 for row in rows] == pytest.approx(warm + later)
    groups = torch.load("out/last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.01, 0.001}


def test_repeats_go_on_where_they_were_stopped(run, monkeypatch):
    flags = ["--epochs", 1, "--batch_size", 2, "--repeats", 3]
    run("ctrg", *flags, out="whole")
    original, calls = losses.mlm_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:                                     # in the second of the three
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)
    monkeypatch.setattr(losses, "mlm_loss", interrupted)
    with pytest.raises(SystemExit):
        run("ctrg", *flags, out="broken")
    first = Path("broken/repeat_0/best.pt").stat().st_mtime_ns
    run(None, "--resume", out="broken")
    assert len(calls) == 6 and Path("broken/repeat_0/best.pt").stat().st_mtime_ns == first
    assert Path("whole/result.json").read_text() == Path("broken/result.json").read_text()


def test_half_precision(run):
    output = run("stoic", "--epochs", 1, "--steps", 2, "--batch_size", 4, "--precision", "bf16")
    assert "in bf16" in output and all(math.isfinite(row["loss"]) for row in evaluation.read_log("out/log.jsonl"))
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights("out/last.pt").values())


def test_repeats_give_mean_and_deviation(run):
    output = run("ctrg", "--epochs", 1, "--steps", 1, "--repeats", 3)
    summary = json.loads(Path("out/result.json").read_text())
    values = [json.loads(Path(f"out/repeat_{i}/result.json").read_text())["value"] for i in range(3)]
    assert summary["value"] == pytest.approx(statistics.mean(values)) and summary["std"] == pytest.approx(statistics.stdev(values))
    assert f"BLEU-4 of 3 repeats: {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" in output
    seeds = [torch.load(f"out/repeat_{i}/best.pt", weights_only=True)["config"]["seed"] for i in range(3)]
    assert seeds == [0, 1, 2] and Path("out/best.pt").exists()


def test_two_processes_are_one_with_twice_the_batch(sets, tmp_path):
    command = ["finetune.py", "--task", "stoic", "--data", sets("stoic"), "--size", 32, 32, 32, "--workers", 0, "--cache",
               sets("stoic").parent / "cache", "--epochs", 1, "--steps", 2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617"]
    for start, batch, out in (([sys.executable], 4, "one"), (torchrun, 2, "two")):
        done = subprocess.run([*start, *map(str, [*command, "--batch_size", batch, "--out", tmp_path / out])], cwd=ROOT, text=True,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("one", "two"))
    # AdamW turns a gradient near 0 into a whole step of 1e-3, whose sign is rounding: compare what moved surely.
    far = [name for name in one["model"] if (one["model"][name] - two["model"][name]).abs().float().mean() > 1e-5]
    assert far == []
    for number, state in one["optimizer"]["state"].items():     # a step hides the length of a gradient, its running mean does not
        assert torch.allclose(state["exp_avg"], two["optimizer"]["state"][number]["exp_avg"], rtol=1e-2, atol=1e-5), number


# -------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, message", [
    (["--size", 30, 32, 32], "--size 30 32 32: every side must be a multiple of 32"),
    (["--fraction", 0], "--fraction 0.0: expected a number above 0"),
    (["--epochs", 0], "--epochs 0: expected at least 1"),
    (["--steps", 0], "--steps 0: expected at least 1"),
    (["--eval_every", 0], "--eval_every 0: expected at least 1"),
    (["--init", "nowhere.pt"], "nowhere.pt: no such file"),
    (["--spacing", 1, 1, 1], "--spacing 1.0 1.0 1.0: only scans of segmentation tasks are resampled, ctrg is none"),
    (["--min_count", 1000], "ctrg: found no word that stands 1000 times or more in"),
])
def test_bad_flags(run, flags, message):
    with pytest.raises(ValueError, match=message):
        run("ctrg", *flags)


def test_wrong_weights_are_refused(run):
    torch.save({"layer.weight": torch.zeros(3)}, "wrong.pt")
    with pytest.raises(ValueError, match="wrong.pt does not fill the encoder"):
        run("ctrg", "--init", "wrong.pt")


def test_a_recipe_with_an_unknown_name(tmp_path):
    (tmp_path / "recipe.json").write_text('{"epoch": 3}')
    with pytest.raises(ValueError, match="recipe.json: found epoch, expected some of encoder"):
        finetune.complete(finetune.flags().parse_args(["--task", "ctrg", "--data", str(tmp_path)]))


def test_resume_needs_a_run_and_the_same_flags(run):
    with pytest.raises(ValueError, match="run.json: cannot be read"):
        run(None, "--resume", out="nowhere")
    run("ctrg", "--epochs", 1, "--steps", 1)
    with pytest.raises(ValueError, match="was started with --steps 1, now it is 7"):
        run(None, "--resume", "--steps", 7)
    torch.save(torch.load("out/last.pt", weights_only=True) | {"world": 2}, "out/last.pt")
    Path("out/result.json").unlink()
    with pytest.raises(ValueError, match="--resume: out was written by 2 processes, now there are 1"):
        run(None, "--resume")


def test_masks_that_do_not_fit_stop_before_training(sets, tmp_path):
    import nibabel as nib
    items = data.load_task("msd-lung", sets("msd-lung"))
    image = nib.load(items[0].mask)
    for name, array, affine, message in (
            ("values", np.full(image.shape, 5, np.uint8), image.affine,
             r"values.nii.gz: found the label values \[5.0\], expected 0 to 1"),
            ("grid", np.zeros(image.shape, np.uint8)[1:], image.affine, "grid.nii.gz: found a mask of .* expected the grid of"),
            ("moved", np.zeros(image.shape, np.uint8), image.affine + np.eye(4, k=3) * 3,
             "moved.nii.gz: found a mask of .* expected the grid of")):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
        with pytest.raises(ValueError, match=message):
            data.prepare(items[0]._replace(mask=tmp_path / f"{name}.nii.gz"), data.TASKS["msd-lung"], tmp_path)
    bad = [items[0]._replace(mask=tmp_path / "values.nii.gz"), *items[1:4]]
    with pytest.raises(ValueError, match="1 of 4 scans are wrong, more than 5 %.*\n.*values.nii.gz"):
        data.prepare_all(bad, data.TASKS["msd-lung"], tmp_path, workers=1)


def _killed(job):
    if job == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def _wrong(job):
    folder, number = job
    if number == 3:
        raise OSError(28, "No space left on device")
    (folder / str(number)).touch()
    time.sleep(0.05)


def test_after_an_error_the_jobs_that_wait_are_not_begun(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        list(data._in_processes(_wrong, [(tmp_path, i) for i in range(100)], 1))
    assert 3 <= len(list(tmp_path.iterdir())) < 20


def test_a_worker_that_is_killed_is_named():
    with pytest.raises(ValueError, match="2 workers: one was killed, probably for want of memory"):
        list(data._in_processes(_killed, range(4), 2))
    assert sorted(data._in_processes(_killed, [1, 3], 2)) == [1, 3]


def test_a_full_disk_leaves_nothing_behind(sets, tmp_path, monkeypatch):
    def full(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        data.prepare(data.load_task("luna16", sets("luna16"))[0], data.TASKS["luna16"], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_projections_need_their_text_encoder(run, tmp_path):
    torch.save({"model": {}, "config": {"encoder": "swin_t", "text_encoder": "demo"}}, "alone.pt")
    with pytest.raises(ValueError, match="alone.pt: found no folder text_encoder, expected the text encoder that its projections fit"):
        run("ct-rate-retrieval", "--init", "alone.pt")


def test_zeros_of_a_volume_without_window_stay(sets, tmp_path):
    item = data.load_task("acdc", sets("acdc"))[0]
    volume, _, _ = data.prepare(item, data.TASKS["acdc"], tmp_path)
    stored, _, _ = data.read_volume(item.volume)
    inside = stored != 0
    assert inside.any() and np.array_equal(volume != 0, inside)
    assert np.allclose(volume[inside], (stored[inside] - stored[inside].mean()) / stored[inside].std(), atol=5e-3)


def test_a_box_lies_where_it_was_cut(sets, tmp_path):
    item = data.load_task("stoic", sets("stoic"))[0]
    task = data.TASKS["stoic"]._replace(size=(32, 32, 32))
    box, _, affine = data.prepare(item, task, tmp_path)
    array, _, whole = data.read_volume(item.volume)
    middle = whole @ [*((np.array(array.shape[::-1]) - 1) / 2), 1]
    assert np.allclose(affine @ [15.5, 15.5, 15.5, 1], middle, atol=4)          # of whole voxels on either side
    assert np.allclose(np.diag(affine)[:3], data.BOX / 32, rtol=0.02)


def test_a_candidate_outside_its_scan(sets, tmp_path):
    item = data.load_task("luna16", sets("luna16"))[0]
    far = item._replace(centre=(9000., 0., 0.))
    with pytest.raises(ValueError, match=f"{item.volume}: found the candidate .* at \\[9000.0, 0.0, 0.0\\].*expected it inside"):
        data.prepare_all([item, far], data.TASKS["luna16"], tmp_path, workers=1)
    with open(sets("luna16") / "candidates_V2.csv") as file:
        assert {"seriesuid", "coordX", "class"} <= set(csv.DictReader(file).fieldnames)
