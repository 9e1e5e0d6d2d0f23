"""finetune.py on small sets in their native layouts: every kind of task, resuming, repeats, bad input.

And what data.py cuts and augments for it.
"""
import csv
import functools
import json
import logging
import math
import os
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, load, python

import data
import eval as evaluation
import finetune
import losses
import model
import phantoms
import pretrain

PATIENTS = {"luna16": 8, "msd-lung": 10, "acdc": 6, "ctrg": 8, "ct-rate-vocab": 8, "ct-rate-retrieval": 8,
            "stoic": 24, "cc-ccii": 12, "covid-19-20": 6, "labels": 30, "segment": 6}
CUBE = (32, 32, 32)


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """sets(task) -> the folder of a small set of the task, written once"""
    folder = tmp_path_factory.mktemp("sets")

    def write(task):
        if not (folder / task).exists():
            phantoms.write_task_demo(task, folder / task, PATIENTS[task], seed=1, workers=1)
        return folder / task
    return write


@pytest.fixture
def cache(sets):
    return sets("stoic").parent / "cache"


def demo_flags(task):
    """The settings of the task's demo but for its length and its voxels"""
    names = "encoder", "text_encoder", "embed_dim", "batch_size", "lr", "lr_encoder", "decay"
    demo = data.TASKS[task].demo
    return [word for name in names if name in demo for word in (f"--{name}", demo[name])]


@pytest.fixture
def run(sets, cache, tmp_path, monkeypatch, caplog):
    """run(task, flags …) -> what finetune.py logged; in this process, so that nothing is imported anew"""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)

    def finetune_py(task, *flags, out="out"):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        begin = ["--out", out]
        if task:
            begin += ["--task", task, "--data", sets(task), "--size", *CUBE, "--workers", 0, "--cache", cache,
                      *demo_flags(task)]
        if task and data.TASKS[task].kind == "segment":
            begin += ["--spacing", 10, 10, 10]      # so that one window is nearly all
        try:
            finetune.main(*finetune.read_flags([str(word) for word in (*begin, *flags)]))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if dist.is_initialized():               # after an error
                pretrain.leave_group()
        return caplog.text
    return finetune_py


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(module, loss, n): SIGTERM during the n-th call of a loss -> the list that grows by calls"""
    def at(module, loss, n):
        original = getattr(module, loss)
        calls = []

        def interrupted(*args):
            calls.append(loss)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)
        monkeypatch.setattr(module, loss, interrupted)
        return calls
    return at


def weights(path):
    return load(path)["model"]


def read_json(path):
    """JSON has no NaN."""
    return json.loads(Path(path).read_text(), parse_constant=pytest.fail)


def read_log(out):
    return pretrain.read_log(Path(out, "log.jsonl"))


# ----------------------------------------------------------------------------------- every kind

@pytest.mark.parametrize("task", PATIENTS)
def test_every_task_trains_tests_and_predicts(run, sets, cache, task):
    output = run(task, "--epochs", 1, "--steps", 2, "--batch_size", 2)
    assert {"best.pt", "last.pt", "result.json", "log.jsonl", "curves.png", "split.json",
            "predictions"} <= set(os.listdir("out"))
    result = read_json("out/result.json")
    split = read_json("out/split.json")
    items = data.load_task(task, sets(task))
    test_items = [item for item in items if item.split == "test"]
    assert result["task"] == task and 0 < result["n"] <= len(test_items)
    assert f"on {result['n']} test items: {task}" in output
    assert not set(split["train"]) & set(split["test"]) and not set(split["valid"]) & set(split["test"])
    # The file alone rebuilds the network, which gives the same number again.
    trained = evaluation.load_checkpoint("out/best.pt", cache)
    again = evaluation.evaluate(trained, test_items, progress=False)
    assert again["value"] == pytest.approx(result["value"], nan_ok=True) and trained.task.size == CUBE


def test_labels_of_ones_own_need_no_data_any_more(run, sets, tmp_path, cache):
    """best.pt knows their names: one scan is predicted, another set of labels is refused."""
    run("labels", "--epochs", 1, "--steps", 2)
    best = evaluation.load_checkpoint("out/best.pt", cache)
    names = ("Cardiomegaly", "Lung opacity", "Pleural effusion", "Consolidation")
    assert best.task.classes == names
    result = read_json("out/result.json")
    assert tuple(result["per_class"]) == names and result["protocol"].startswith("all items, mean of ")

    def eval_py(*flags):
        args = evaluation.flags().parse_args(["--task", "labels", "--checkpoint", "out/best.pt", *map(str, flags)])
        evaluation.task_command(args)
    scan = sets("labels") / "volumes" / "1.nii.gz"
    eval_py("--input", scan, "--out", "one")
    with open("one/probabilities.csv", encoding="utf-8") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(names)
    eval_py("--data", sets("labels"), "--out", "again", "--cache", cache)
    assert read_json("again/result.json")["value"] == result["value"]
    other = tmp_path / "other.csv"
    lines = [f"{sets('labels')}/volumes/{i}.nii.gz,{i % 2}" for i in range(1, 21)]
    other.write_text("\n".join(["volume,asthma", *lines]))
    with pytest.raises(ValueError, match="other.csv: found the labels .'asthma',., expected .'Cardiomegaly', 'Lung"):
        eval_py("--data", other)


def test_renamed_labels_and_an_edited_row_or_crop_are_no_resumed_run(run, sets, cache, tmp_path, monkeypatch):
    folder = tmp_path / "set"
    shutil.copytree(sets("labels"), folder)
    run(None, "--task", "labels", "--data", folder, "--size", *CUBE, "--workers", 0, "--cache", cache, "--encoder", "swin_t",
        "--steps", 2, "--epochs", 1)
    for name in ("result.json", "best.pt"):
        Path("out", name).unlink()
    refused = functools.partial(pytest.raises, ValueError, match="--resume: items, labels, words or settings .* not those of out")
    with monkeypatch.context() as patch, refused():
        patch.setattr(data, "CROP", (0.8, 0.8, 0.8))
        run(None, "--resume")
    with monkeypatch.context() as patch, refused():
        patch.setitem(data.TASKS, "labels", data.TASKS["labels"]._replace(augment={"flips": (2,)}))
        run(None, "--resume")
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(text.replace("Consolidation", "Fibrosis"))
    with refused():
        run(None, "--resume")
    (folder / "manifest.csv").write_text(text.replace(",0\n", ",1\n"))
    with refused():
        run(None, "--resume")


def test_a_fraction_without_a_class_is_refused(run):
    with pytest.raises(ValueError, match="--fraction 0.05: found none or all with COVID-19, expected some of both"):
        run("stoic", "--fraction", 0.05)


def test_other_words_are_no_resumed_run(run, monkeypatch):
    run("ctrg", "--epochs", 1, "--steps", 1)
    Path("out/result.json").unlink()
    build = data.build_vocabulary
    monkeypatch.setattr(data, "build_vocabulary", lambda reports, min_count: [*reversed(build(reports, min_count))])
    with pytest.raises(ValueError, match="labels, words or settings .* not those of out"):
        run(None, "--resume")


def test_unknown_labels_are_left_out_of_the_loss():
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.zeros(5, 3)
    labels[1, 2] = labels[4, 0] = 1
    labels[0, 1] = labels[2, 2] = math.nan
    task = data.TASKS["labels"]._replace(classes=("a", "b", "c"))
    loss = finetune.loss_of(task, lambda volume: logits, {"volume": None, "label": labels}, {}, 0.1)
    terms = [-math.log(1 / (1 + math.exp(-logits[i, k].item() * (1 if labels[i, k] == 1 else -1))))
             for i in range(5) for k in range(3) if not labels[i, k].isnan()]
    assert len(terms) == 13 and loss.item() == pytest.approx(np.mean(terms), rel=1e-5)
    [gradient] = torch.autograd.grad(loss, logits)
    assert (gradient != 0).sum() == 13 and gradient[0, 1] == gradient[2, 2] == 0


def test_a_tenth_task_is_one_row(run, sets, monkeypatch):
    def records(folder, fold):
        items = data.load_task("stoic", sets("stoic"))
        return [item._replace(labels=item.labels[:1], split=None) for item in items]
    row = data.Task("classify", "whole", records, "as STOIC", ("COVID-19",), "AUC", data.SIZE, data.WINDOW,
                    None, data._recipe(2, 0, 4, 1e-3), {})
    monkeypatch.setitem(data.TASKS, "tenth", row)
    output = run(None, "--task", "tenth", "--data", sets("stoic"), "--size", *CUBE, "--workers", 0,
                 "--steps", 2, "--encoder", "swin_t")
    assert "test items: tenth: AUC" in output
    trained = evaluation.load_checkpoint("out/best.pt")
    assert trained.task.classes == ("COVID-19",) and trained.network(torch.rand(1, 1, *CUBE)).shape == (1, 1)


def completed(*flags):
    return finetune.complete(*finetune.read_flags([str(flag) for flag in flags]))


def test_defaults_come_from_the_task_and_of_a_demo_from_its_column():
    row = data.TASKS["msd-lung"]
    args = completed("--task", "msd-lung", "--data", "folder", "--lr", 0.5)
    assert (args.encoder, args.size, args.spacing) == ("swin_b", [96, 96, 96], [1.5, 1.5, 1.5])
    assert args.lr == 0.5 and args.lr_encoder == row.recipe["lr_encoder"]
    assert (args.epochs, args.warmup, args.eval_every, args.steps) == (1000, 50, 50, None)
    demo = completed("--task", "msd-lung", "--data", "demo", "--lr", 0.5)
    assert demo.encoder == row.demo["encoder"] == "swin_t" and tuple(demo.size) == row.demo["size"]
    assert demo.lr == 0.5 and demo.lr_encoder == row.demo["lr_encoder"]
    assert demo.spacing == [6, 6, 6] and demo.weight_decay == row.recipe["weight_decay"]
    shorter = completed("--task", "cc-ccii", "--data", "folder", "--epochs", 13)
    assert shorter.warmup == pytest.approx(3)       # of 30 in 130 epochs


def test_the_file_of_init_knows_its_encoder_and_flags_overrule_it(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    config = {"encoder": "swin_l", "embed_dim": 48, "text_encoder": "demo", "lr": 7}
    torch.save({"model": {"encoder.w": torch.zeros(1)}, "config": config}, tmp_path / "last.pt")
    flags = ["--task", "ct-rate-vocab", "--data", "demo", "--init", tmp_path / "last.pt"]
    args = completed(*flags)
    assert (args.encoder, args.embed_dim, args.text_encoder, args.lr) == ("swin_l", 48, "demo", 3e-4)
    assert completed(*flags, "--encoder", "unet").encoder == "unet"


def test_the_demo_of_a_task(run, monkeypatch):
    """It is drawn into the cache, with the settings of its column."""
    _, write = phantoms.TASK_DEMOS["stoic"]
    monkeypatch.setitem(phantoms.TASK_DEMOS, "stoic", (PATIENTS["stoic"], write))
    output = run(None, "--task", "stoic", "--data", "demo", "--workers", 0, "--steps", 1)
    assert Path(f"cache/demo-stoic-{phantoms.VERSION}/metadata/reference.csv").exists()
    assert "box of (32, 32, 32) voxels" in output and "swin_t from scratch" in output
    config = load("out/best.pt")["config"]
    assert (config["lr"], config["batch_size"], config["epochs"]) == (1e-3, 4, 6)
    assert read_json("out/result.json")["task"] == "stoic"
    run(None, "--resume")                           # its data are there
    assert read_json("out/run.json")["data"] == "demo"


def test_frozen_encoder_and_fraction(run, sets):
    torch.manual_seed(3)
    encoder = model.build_encoder("swin_t")
    torch.save(model.export_encoder(encoder), "encoder.pt")
    output = run("stoic", "--epochs", 1, "--init", "encoder.pt", "--freeze", "--fraction", 0.5,
                 "--batch_size", 4)
    trained = weights("out/last.pt")
    assert all(torch.equal(tensor, trained[f"encoder.{name}"])
               for name, tensor in encoder.state_dict().items() if name != "mask_token")
    n = sum(item.split == "train" for item in data.load_task("stoic", sets("stoic")))
    assert f"{round(n / 2)} items to train on" in output and "frozen" in output


def test_a_file_of_the_second_version_makes_a_run_of_it(run):
    voco = model.build_encoder("swin_t", use_v2=True)
    torch.save({f"swinViT.{name}": p for name, p in voco.state_dict().items()}, "voco.pt")
    run("stoic", "--epochs", 1, "--steps", 1, "--init", "voco.pt", "--freeze")
    Path("voco.pt").unlink()
    Path("out/result.json").unlink()
    run(None, "--resume")
    trained = evaluation.load_checkpoint("out/best.pt").network.encoder
    assert trained.use_v2 and trained.merging == "v0.9"
    assert all(torch.equal(p, trained.state_dict()[name]) for name, p in voco.state_dict().items())


@pytest.fixture
def load_init(tmp_path, text_folder):
    """load_init(task, saved, …) -> (network after --init from a file with these flags, its network, settings)"""
    def load(task, saved, config=(), row=None, more=()):
        base = {"encoder": "swin_t", "use_checkpoint": False, "text_encoder": str(text_folder), "embed_dim": 24,
                "vocabulary": ["a", "b", "c"] if task == "ctrg" else None, "task": task}
        config = base | dict(config)
        row = row or data.TASKS[task]
        torch.manual_seed(1)
        source, target = (model.build_network(row.kind, len(row.classes), config, None) for _ in range(2))
        checkpoint = pretrain.network_state(source, base | saved, 1) | dict(more)
        torch.save(checkpoint | ({"task": row.settings()} if saved.get("task", task) else {}), tmp_path / "last.pt")
        args = finetune.flags().parse_args(["--task", task, "--init", str(tmp_path / "last.pt")])
        finetune.load_init(args, data.TASKS[task], config, target)
        return [name for name, p in source.named_parameters()
                if not torch.equal(p, target.state_dict()[name]) and not name.startswith("text_encoder.")]
    return load


def test_outputs_are_filled_only_where_they_mean_the_same(load_init, caplog):
    caplog.set_level(logging.INFO)
    assert load_init("ctrg", {}) == load_init("stoic", {}) == load_init("acdc", {}) == []
    assert "left out" not in caplog.text
    words = ["words.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert set(load_init("ctrg", {"vocabulary": ["a", "c", "b"]})) == set(words) - {"norm.weight", "norm.bias"}
    assert "last.pt: left out words.weight, norm.weight, norm.bias, head.weight, head.bias" in caplog.text
    assert load_init("acdc", {"task": "msd-lung"}) == ["out.conv.conv.weight", "out.conv.conv.bias"]
    other = data.TASKS["stoic"]._replace(classes=("b", "a"))
    assert load_init("stoic", {"task": "stoic"}, row=other) == ["head.weight", "head.bias"]


def test_projections_are_filled_only_if_clip_trained_them(load_init, text_folder):
    """last.pt of a run without --clip, or with another text encoder, has none that fit."""
    names = {"image_proj.weight", "image_proj.bias", "text_proj.weight", "text_proj.bias"}
    pretrained = {"task": None, "mlm_prob": 0.15}
    for task in ("ct-rate-vocab", "ct-rate-retrieval"):
        assert load_init(task, {}) == load_init(task, pretrained | {"clip": True}) == []
        moved = {"text_encoder": f"elsewhere/{text_folder.name}"}
        assert load_init(task, pretrained | {"clip": True} | moved) == []
        assert names < set(load_init(task, pretrained | {"clip": False}))
        assert names < set(load_init(task, pretrained | {"clip": True}, more={"text_encoder": "of another"}))


# ---------------------------------------------------------------------------- weights of the hub

def test_init_and_checkpoint_of_the_hub(run, command, hub, sets, cache, tmp_path):
    """They know their encoder, and nothing is written into the hub's cache."""
    torch.manual_seed(3)
    encoder = model.build_encoder("swin_t")
    tested = [item.patient for item in data.load_task("stoic", sets("stoic")) if item.split == "test"]
    flags = {"encoder": "swin_t", "size": (32, 32, 64), "hu": "auto", "crop": (1, 1, 1), "window": data.WINDOW}
    state = model.export_encoder(encoder, config=flags, patients=sorted(data.patient_hashes(tested[:2])))
    with open("encoder.safetensors", "wb") as file:
        model.write_safetensors(state, file)
    hub("someone/mg3d", {"encoder.safetensors": tmp_path / "encoder.safetensors"})
    assert completed("--task", "stoic", "--data", "x", "--init", "hf:someone/mg3d").encoder == "swin_t"
    output = run("stoic", "--steps", 1, "--init", "hf:someone/mg3d", "--freeze")
    trained = weights("out/best.pt")
    assert all(torch.equal(p, trained[f"encoder.{name}"]) for name, p in state.items())
    assert "model      swin_t from hf:someone/mg3d, frozen" in output
    assert read_json("out/result.json")["init"] == "hf:someone/mg3d"
    assert read_json("out/result.json")["more"]["patients_seen_in_pretraining"] == 2

    snapshot = hub("someone/stoic", {"runs/best.pt": tmp_path / "out/best.pt"})
    name = "hf:someone/stoic/runs/best.pt"
    code, text = command("eval.py", "--task", "stoic", "--data", sets("stoic"), "--cache", cache, "--checkpoint", name)
    assert code == 0 and "wrote eval/result.json" in text
    assert read_json("eval/result.json")["value"] == read_json("out/result.json")["value"]
    assert [path.name for path in snapshot.rglob("*")] == ["runs", "best.pt"]
    code, text = command("eval.py", "embed", "--checkpoint", "hf:someone/mg3d", "--input",
                         next(sets("stoic").rglob("*.mha")), "--cache", cache)
    assert code == 0 and "wrote embeddings.npz: features (1, 96)" in text
    assert "trained with the crop [1, 1, 1], here it is (0.88, 0.66, 0.88)" in text and "the window" not in text
    code, text = command("eval.py", "embed", "--checkpoint", "hf:someone/else", "--input", "x")
    assert code == 1 and text.count("\n") == 0 and "hf:someone/else: found no copy in the cache" in text


def test_a_checkpoint_of_the_hub_brings_its_text_encoder(run, hub, sets, tmp_path):
    before, task = tmp_path / "before", "ct-rate-retrieval"
    reports = [item.report for item in data.load_task(task, sets(task))]
    phantoms.make_demo_text_encoder(before / "text_encoder", reports)
    config = {"encoder": "swin_t", "embed_dim": 24, "text_encoder": "demo", "use_checkpoint": False, "clip": True,
              "size": [32, 32, 32], "hu": "auto"}
    source = model.build_network("retrieve", 0, config, before)
    torch.save(pretrain.network_state(source, config | {"mlm_prob": 0.15}, 1), before / "last.pt")
    hub("someone/mg3d", {"last.pt": before / "last.pt", "text_encoder": before / "text_encoder"})
    assert evaluation.load_pretrained("hf:someone/mg3d/last.pt").network.text_pool is not None
    run(task, "--init", "hf:someone/mg3d/last.pt", "--embed_dim", 24, "--steps", 1, "--lr", 0, "--batch_size", 2)
    assert torch.equal(weights("out/last.pt")["text_proj.weight"], source.text_proj.weight)
    first, second = (folder / "text_encoder" / "tokenizer.json" for folder in (before, tmp_path / "out"))
    assert first.read_bytes() == second.read_bytes() and not second.is_symlink()
    hub("someone/halves", {"last.pt": before / "last.pt"})
    with pytest.raises(ValueError, match="found no folder .*text_encoder, expected the text encoder that it fits"):
        completed("--task", "ct-rate-vocab", "--data", "demo", "--init", "hf:someone/halves/last.pt")


def test_the_untrained_encoder_of_a_run_that_began_from_the_hub(hub, tmp_path):
    """None without network and copy: a probe of its checkpoint does without the comparison."""
    encoder = model.build_encoder("swin_t")
    torch.save(model.export_encoder(encoder), tmp_path / "encoder.pt")
    config = {"encoder": "swin_t", "seed": 0, "init": "hf:someone/mg3d"}
    assert evaluation.untrained_encoder(config) is None
    hub("someone/mg3d", {"encoder.pt": tmp_path / "encoder.pt"})
    found = evaluation.untrained_encoder(config)
    assert torch.equal(found.layers1[0].downsample.reduction.weight, encoder.layers1[0].downsample.reduction.weight)


# ---------------------------------------------------------------- cutting and augmenting scans

def test_negatives_are_drawn_anew(sets, cache):
    items = [item for item in data.load_task("luna16", sets("luna16")) if item.split == "train"]
    positives, negatives = ([item for item in items if item.labels[0] == label] for label in (1, 0))
    task = data.TASKS["luna16"]._replace(size=CUBE, augment={})

    def make(item, generator):
        return data.task_example(item, generator, task, cache)
    dataset = data.Examples(positives, make, negatives=negatives)
    n = len(positives)
    assert len(dataset) == 2 * n < len(items)
    first, second = ({dataset[i, step]["id"] for i in range(n, 2 * n)} for step in (0, 1))
    assert first != second and all(dataset[i, 0]["label"].item() == 0 for i in range(n, 2 * n))
    assert all(dataset[i, 0]["label"].item() == 1 for i in range(n))


@pytest.mark.parametrize("settings", [{"flip": 1}, {"rot90": 1}, {"affine": 1}, {"zoom": 1},
                                      {"flip": .5, "rot90": .5, "affine": 1, "zoom": 1}])
@pytest.mark.parametrize("seed", range(4))
def test_a_mask_moves_with_its_volume(settings, seed):
    z, y, x = torch.meshgrid(*(torch.arange(n) for n in (12, 16, 16)), indexing="ij")
    mask = ((z < 7) & (y > 5) & (x < 12)).long()    # touches three borders
    volume, moved = data.augment(mask[None].float(), mask, np.random.default_rng(seed), settings)
    assert volume.shape == (1, 12, 16, 16) and moved.dtype == torch.long
    assert not torch.equal(volume[0], mask.float())
    sure = (volume[0] < 0.12) | (volume[0] > 0.88)  # the nearest of 8 voxels weighs an eighth at least
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
    assert offset.norm() == pytest.approx(52 ** 0.5, abs=0.5)       # as far from the middle as before


def test_a_ball_of_thick_slices_stays_a_ball():
    spacing = np.array([5, 1.25, 1.25])
    z, y, x = torch.meshgrid(*(spacing[i] * (torch.arange(n) - (n - 1) / 2)
                               for i, n in enumerate((16, 64, 64))), indexing="ij")      # mm
    ball = ((z ** 2 + (y - 10) ** 2 + (x + 8) ** 2) < 18 ** 2).long()
    for seed in range(3):
        _, moved = data.augment(ball[None].float(), ball, np.random.default_rng(seed), {"affine": 1}, spacing)
        at = moved.nonzero() * torch.from_numpy(spacing)
        assert (at.amax(0) - at.amin(0) - 36).abs().max() <= 6
        offset = at.mean(0) - torch.from_numpy(spacing * [7.5, 31.5, 31.5])
        assert offset.norm() == pytest.approx(164 ** 0.5, abs=1)
        assert not torch.equal(moved, ball)


def test_patches_are_turned_in_millimetres(sets, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(data, "augment", lambda volume, mask, generator, settings, spacing: (
        seen.append(spacing), (volume, mask))[1])
    item = data.load_task("msd-lung", sets("msd-lung"))[0]
    for spacing, expected in (((6., 3., 3.), (6., 3., 3.)), (None, (1, 1, 1))):
        task = data.TASKS["msd-lung"]._replace(size=CUBE, spacing=spacing, patches=1)
        data.task_example(item, np.random.default_rng(0), task, tmp_path)
        assert seen.pop() == expected


def test_retrieval_keeps_scans_of_a_patient_apart(run, monkeypatch):
    seen = []

    class Batches(data.Batches):
        def __init__(self, *settings):
            super().__init__(*settings)
            seen.append((self.n, len(self.patients)))
    monkeypatch.setattr(data, "Batches", Batches)
    for task in ("ct-rate-retrieval", "ct-rate-vocab"):
        run(task, "--epochs", 1, "--steps", 1, out=task)
    (n, patients), (_, none) = seen
    assert n == patients > 0 == none


def test_cc_ccii_turns_the_order_of_slices_alone():
    volume = torch.arange(24.).view(1, 2, 3, 4)
    settings = {"flip": data.TASKS["cc-ccii"].augment["flip"]}
    seen = [data.augment(volume, None, np.random.default_rng(seed), settings)[0] for seed in range(20)]
    turned = sum(torch.equal(one, volume.flip(1)) for one in seen)
    assert 0 < turned < 20 and turned + sum(torch.equal(one, volume) for one in seen) == 20


def test_values_change_as_told():
    volume = torch.rand(1, 4, 4, 4)
    generator = np.random.default_rng(0)
    scaled, _ = data.augment(volume, None, generator, {"scale": 1, "shift": 1})
    a, b = np.polyfit(volume.flatten(), scaled.flatten(), 1)
    assert 0.9 <= a <= 1.1 and abs(b) <= 0.1 and (a, b) != (1, 0)
    brighter, _ = data.augment(volume, None, generator, {"brightness": 0.07})
    change = brighter - volume
    assert change.std() < 1e-6 and 0 < abs(change.mean()) <= 0.07
    harder, _ = data.augment(volume, None, generator, {"contrast": 0.05})
    a, _ = np.polyfit(volume.flatten(), harder.flatten(), 1)
    assert 0 < abs(a - 1) <= 0.05 and harder.mean() == pytest.approx(volume.mean().item(), abs=1e-6)
    noisy, _ = data.augment(torch.zeros(1, 32, 32, 32), None, generator, {"noise": 1})
    assert noisy.std() == pytest.approx(0.01, rel=0.05)
    changed = [data.augment(volume, None, np.random.default_rng(seed), {"noise": 0.15})[0].ne(volume).any()
               for seed in range(200)]
    assert 10 <= sum(changed) <= 50


def test_small_scans_are_filled_up():
    array = np.float16([[[0.5, 0.7], [0.2, 0.9]]])
    mask = np.ones((1, 2, 2), np.uint8)
    assert np.array_equal(data.cut(array, (0, 0, 0), (3, 2, 2))[:, 0, 0], np.float16([0, 0.5, 0]))
    assert data.cut(mask, (0, 0, 0), (3, 4, 2)).sum() == mask.sum()


def test_slices_are_cropped_by_chance_to_train_and_in_the_middle_to_test(sets, tmp_path):
    item = data.load_task("cc-ccii", sets("cc-ccii"))[0]
    task = data.TASKS["cc-ccii"]._replace(size=(32, 96, 96))
    whole = torch.from_numpy(np.array(data.prepare(item, task, tmp_path)[0])).float()
    assert whole.shape == (32, 128, 128)
    assert torch.equal(data.network_input(item, task, tmp_path)[0], whole[:, 16:112, 16:112])
    corners = set()
    for seed in range(4):
        crop = data.cut_views(item, task, tmp_path, np.random.default_rng(seed))[0][0, 0]
        corners.add(next((y, x) for y in range(33) for x in range(33)
                         if torch.equal(whole[:, y:y + 96, x:x + 96], crop)))
    assert len(corners) > 1


def test_cubes_come_from_a_file_that_is_not_loaded_whole(sets, tmp_path):
    item = data.load_task("luna16", sets("luna16"))[0]
    volume, _, affine = data.prepare(item, data.TASKS["luna16"], tmp_path)
    assert isinstance(volume, np.memmap)
    at = data.candidate_voxel(item, volume.shape, affine)
    cube = data.network_input(item, data.TASKS["luna16"]._replace(size=(8, 8, 8)), tmp_path)
    corner = np.clip(at - 4, 0, np.array(volume.shape) - 8)
    assert np.array_equal(cube[0], volume[tuple(slice(c, c + 8) for c in corner)])


def test_patches_hold_foreground_and_background_in_turns(sets, cache):
    item = data.load_task("msd-lung", sets("msd-lung"))[0]
    task = data.TASKS["msd-lung"]._replace(size=(8, 8, 8), spacing=(6., 6., 6.), patches=3)
    counts = set()
    for seed in range(20):
        masks = data.cut_views(item, task, cache, np.random.default_rng(seed))[1]
        first, second, third = (bool(mask[4, 4, 4]) for mask in masks)
        assert first == third != second
        counts.add(first + second + third)
    assert counts == {1, 2}


def test_zeros_of_a_volume_without_window_stay(sets, tmp_path):
    item = data.load_task("acdc", sets("acdc"))[0]
    volume, _, _ = data.prepare(item, data.TASKS["acdc"], tmp_path)
    stored, _, _ = data.read_volume(item.volume)
    inside = stored != 0
    assert inside.any() and np.array_equal(volume != 0, inside)
    values = stored[inside]
    assert np.allclose(volume[inside], (values - values.mean()) / values.std(), atol=5e-3)


def test_a_box_is_the_middle_of_its_scan(tmp_path):
    array = np.full((60, 100, 90), -1000, np.int16)             # 600 x 400 x 360 mm: too long, too narrow
    array[30:, 50:, 45:] = 0                                    # an octant
    image = nib.Nifti1Image(array.T, np.diag([4, 4, 10, 1]))
    nib.save(image, tmp_path / "scan.nii.gz")
    item = data.Item("scan", tmp_path / "scan.nii.gz", "", None, "scan")
    volume, _, _ = data.prepare(item, data.TASKS["stoic"]._replace(size=(32, 32, 32)), tmp_path)
    inside = np.argwhere(volume > 0.35)                         # half of what 0 HU is
    assert inside.min(0).tolist() == [16] * 3 and inside.max(0).tolist() == [31, 31, 30]


def test_a_candidate_outside_its_scan(sets, tmp_path):
    item = data.load_task("luna16", sets("luna16"))[0]
    far = item._replace(centre=(9000., 0., 0.))
    message = f"{item.volume}: found the candidate .* at \\[9000.0, 0.0, 0.0\\].*expected it inside"
    with pytest.raises(ValueError, match=message):
        data.prepare_all([item, far], tmp_path, 1, data.TASKS["luna16"])
    with open(sets("luna16") / "candidates_V2.csv") as file:
        assert {"seriesuid", "coordX", "class"} <= set(csv.DictReader(file).fieldnames)


def test_masks_that_do_not_fit_stop_before_training(sets, tmp_path):
    items = data.load_task("msd-lung", sets("msd-lung"))
    task = data.TASKS["msd-lung"]
    image = nib.load(items[0].mask)
    background = np.zeros(image.shape, np.uint8)
    grid = "found a mask of .* expected the grid of"
    for name, array, affine, message in (
            ("values", background + 5, image.affine, r"found the label values \[5.0\], expected 0 to 1"),
            ("grid", background[1:], image.affine, grid),
            ("moved", background, image.affine + np.eye(4, k=3) * 3, grid)):
        path = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(array, affine), path)
        with pytest.raises(ValueError, match=f"{name}.nii.gz: {message}"):
            data.prepare(items[0]._replace(mask=path), task, tmp_path)
    bad = [items[0]._replace(mask=tmp_path / "values.nii.gz"), *items[1:4]]
    with pytest.raises(ValueError, match="1 of 4 scans are wrong, more than 5 %.*\n.*values.nii.gz"):
        data.prepare_all(bad, tmp_path, 1, task)


def test_a_full_disk_leaves_nothing_behind(sets, tmp_path, monkeypatch):
    def full(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        data.prepare(data.load_task("luna16", sets("luna16"))[0], data.TASKS["luna16"], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def _killed(items, task, cache):
    if items[0].id == "2":
        os.kill(os.getpid(), signal.SIGKILL)
    return items[0].volume


def _full(items, task, cache):
    item, = items
    if item.id == "3":
        raise OSError(28, "No space left on device")
    item.volume.touch()
    time.sleep(0.05)


def test_after_an_error_the_jobs_that_wait_are_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_prepare_scan", _full)
    items = [data.Item(str(i), tmp_path / str(i), "", "train", str(i), None, None) for i in range(100)]
    with pytest.raises(OSError, match="No space left"):
        data.prepare_all(items, tmp_path, 1, data.TASKS["stoic"])
    assert 3 <= len(list(tmp_path.iterdir())) < 20


def test_a_worker_that_is_killed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_prepare_scan", _killed)
    items = [data.Item(str(i), tmp_path / str(i), "", "train", str(i), None, None) for i in range(4)]
    with pytest.raises(ValueError, match="--workers 2: found that one was killed, probably for want of memory"):
        data.prepare_all(items, tmp_path, 2, data.TASKS["stoic"])
    others = [items[1], items[3]]
    assert data.prepare_all(others, tmp_path, 2, data.TASKS["stoic"]) == others


# ------------------------------------------------------------------------ interrupted, repeated

@pytest.mark.parametrize("task, module, loss, batch_size", [
    ("ctrg", losses, "mlm_loss", 2), ("luna16", losses, "bce_loss", 2)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(run, interrupt, task, module, loss, batch_size):
    flags = ["--epochs", 2, "--batch_size", batch_size]
    run(task, *flags, out="whole")
    interrupt(module, loss, 3)                      # in the middle of an epoch
    with pytest.raises(SystemExit) as stopped:
        run(task, *flags, out="broken")
    assert stopped.value.code == 128 + signal.SIGTERM and not Path("broken/result.json").exists()
    assert load("broken/last.pt")["step"] == 3
    output = run(None, "--resume", out="broken")
    assert "SIGTERM: saved after step 3; go on with --resume --out broken" in output
    whole, broken = weights("whole/last.pt"), weights("broken/last.pt")
    for name, tensor in whole.items():
        assert torch.equal(tensor, broken[name]), name
    assert read_json("whole/result.json") == read_json("broken/result.json")
    whole, broken = ([row["loss"] for row in read_log(out)] for out in ("whole", "broken"))
    assert whole == broken and len(whole) > 3


def test_a_new_run_forgets_the_old_one_and_a_broken_file_is_no_end(run):
    run("ctrg", "--epochs", 2, "--steps", 4, "--lr", 0.01)
    last, previous = (load(f"out/{name}.pt")["step"] for name in ("last", "previous"))
    assert previous < last
    Path("out/last.pt").write_bytes(b"torn")
    Path("out/result.json").unlink()
    run(None, "--resume")
    assert load("out/last.pt")["step"] == last and Path("out/result.json").exists()
    assert load("out/previous.pt")["step"] == previous      # the torn file did not take its place
    first = weights("out/last.pt")
    run("ctrg", "--epochs", 1, "--steps", 1)
    assert load("out/last.pt")["step"] == 1 and not Path("out/previous.pt").exists()
    assert not torch.equal(first["head.weight"], weights("out/last.pt")["head.weight"])


def test_an_unfinished_run_and_the_file_to_start_from_are_not_replaced(run):
    run("stoic", "--epochs", 1, "--steps", 1)
    before = Path("out/last.pt").read_bytes()
    with pytest.raises(ValueError, match="--init out/best.pt lies in --out out, whose files the run replaces"):
        run("stoic", "--epochs", 1, "--steps", 1, "--init", "out/best.pt")
    run("stoic", "--epochs", 1, "--steps", 1, "--init", "out/best.pt", out="other")
    Path("out/result.json").rename("result.json")
    for folder in (".", "repeat_0"):
        Path("out", folder).mkdir(exist_ok=True)
        Path("out/last.pt").rename(Path("out", folder, "last.pt"))
        with pytest.raises(ValueError, match="out holds a run without result.json: give --resume, or another --out"):
            run("stoic", "--epochs", 1, "--steps", 1)
    assert Path("out/repeat_0/last.pt").read_bytes() == before


def test_a_finished_run_and_an_endless_warm_up_are_told(run):
    assert "lie in the warm-up" not in run("stoic", "--epochs", 1, "--steps", 2, "--warmup", 0)
    output = run("stoic", "--epochs", 10, "--warmup", 4, "--steps", 2)
    assert "warning: all 2 steps lie in the warm-up: give a smaller --warmup" in output
    assert "out holds a finished run on" not in output
    assert "out holds a finished run on" in run(None, "--resume")
    with pytest.raises(ValueError, match="out holds a finished run on .*stoic, not on elsewhere"):
        run(None, "--resume", "--data", "elsewhere")
    begun = read_json("out/run.json")
    Path("out/run.json").write_text(json.dumps(begun | {"world": 4}))
    with pytest.raises(ValueError, match="--resume: out is of 4 processes, found 1"):
        run(None, "--resume")


def test_runs_at_once_in_one_folder_are_told_apart(run):
    run("stoic", "--epochs", 1, "--steps", 2)
    Path("out/result.json").unlink()
    best = load("out/best.pt")
    torch.save(best | {"config": best["config"] | {"begun": "since"}}, "out/best.pt")
    with pytest.raises(SystemExit, match="out/best.pt is of another run since since"):
        run(None, "--resume")
    Path("out/run.json").write_text(json.dumps(read_json("out/run.json") | {"begun": "since"}))
    with pytest.raises(ValueError, match="out/last.pt is of another run than run.json"):
        run(None, "--resume")


def test_a_run_that_cannot_begin_leaves_the_old_one_alone(run, sets):
    run("ctrg", "--epochs", 1, "--steps", 1)
    names = "best.pt", "last.pt", "result.json", "run.json"
    before = {name: Path("out", name).read_bytes() for name in names}
    for flags in (["--data", "nowhere"], ["--init", "nowhere.pt"], ["--min_count", 1000]):
        with pytest.raises((ValueError, OSError)):
            run("ctrg", "--epochs", 1, *flags)
    assert before == {name: Path("out", name).read_bytes() for name in before}


def test_the_validation_part_picks_the_epoch(run, monkeypatch):
    values = iter([0.2, 0.7, 0.4, 0.7, math.nan])
    original = evaluation.evaluate

    def evaluate(*args, out=None, **more):
        if out:                                     # the test at the end
            return original(*args, out=out, **more)
        return {"value": next(values), "metric": "AUC"}
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    output = run("stoic", "--epochs", 5, "--eval_every", 1, "--batch_size", 16, "--lr", 0.01)
    best, last = (load(f"out/{name}.pt") for name in ("best", "last"))
    assert "best epoch 2 (validation AUC 0.7000)" in output
    assert last["best"] == {"value": 0.7, "epoch": 2, "metric": "AUC"}
    assert best["step"] == 2 * last["step"] / 5
    assert not torch.equal(best["model"]["head.weight"], last["model"]["head.weight"])
    lines = Path("out/log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["valid"] for row in rows if "valid" in row] == [0.2, 0.7, 0.4, 0.7, None]
    assert read_json("out/result.json")["epoch"] == 2


def test_the_test_part_chooses_nothing_and_the_best_epoch_is_tested(run, monkeypatch):
    seen, values, original = [], iter([0.7, 0.2]), evaluation.evaluate

    def evaluate(run, items, out=None, **more):
        seen.append(({item.split for item in items}, run.network.head.weight.detach().clone()))
        return original(run, items, out=out, **more) if out else {"value": next(values), "metric": "AUC"}
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    run("stoic", "--epochs", 2, "--eval_every", 1, "--batch_size", 8, "--lr", 0.01)
    (first, best), (second, last), (third, tested) = seen
    assert first == second == {"valid"} and third == {"test"}
    assert torch.equal(tested, best) and not torch.equal(tested, last)


def test_the_fold_and_the_seed_are_those_asked_for(run, sets):
    run("stoic", "--steps", 1, "--fold", 2, "--seed", 3)
    items = data.load_task("stoic", sets("stoic"), fold=2, seed=3)
    for split, patients in read_json("out/split.json").items():
        assert set(patients) == {item.patient for item in items if item.split == split}


def test_a_vocabulary_is_of_the_training_part(run, sets):
    run("ctrg", "--steps", 1, "--min_count", 1)
    items = data.load_task("ctrg", sets("ctrg"))
    trained, every = (data.build_vocabulary([item.report for item in some], 1)
                      for some in ([item for item in items if item.split == "train"], items))
    assert load("out/best.pt")["config"]["vocabulary"] == trained != every


def test_as_many_candidates_of_either_kind_are_trained_on(run, sets, monkeypatch):
    seen, original = [], losses.bce_loss
    monkeypatch.setattr(losses, "bce_loss",
                        lambda logits, labels: seen.extend(labels[:, 0].tolist()) or original(logits, labels))
    run("luna16", "--epochs", 1, "--batch_size", 2)
    items = [item for item in data.load_task("luna16", sets("luna16")) if item.split == "train"]
    assert sum(seen) == sum(item.labels[0] for item in items) == len(seen) / 2


def test_masks_of_an_example_move_with_its_volumes(sets, cache):
    item = data.load_task("msd-lung", sets("msd-lung"))[0]
    task = data.TASKS["msd-lung"]._replace(size=CUBE, spacing=(6., 6., 6.), patches=2, augment={"flip": 1})
    plain, turned = (data.task_example(item, np.random.default_rng(0), row, cache)
                     for row in (task._replace(augment=None), task))
    for key in ("volume", "mask"):
        assert torch.allclose(turned[key], plain[key].flip(-3, -2, -1)), key
    assert not torch.equal(turned["mask"], plain["mask"])


def test_the_next_word_and_the_exclusive_class_are_learned():
    torch.manual_seed(0)
    tokens, logits = torch.tensor([[1, 4, 3, 2], [1, 3, 2, 0]]), torch.randn(2, 3, 5)   # 1 begins, 2 ends, 0 pads

    def words(volume, shown):
        assert torch.equal(shown, tokens[:, :-1])
        return logits
    loss = finetune.loss_of(data.TASKS["ctrg"], words, {"volume": None, "tokens": tokens}, {}, 0.1)
    p = logits.log_softmax(-1)
    torch.testing.assert_close(loss, -(p[0, 0, 4] + p[0, 1, 3] + p[0, 2, 2] + p[1, 0, 3] + p[1, 1, 2]) / 5)
    scores, label = logits[0, :, :3], torch.eye(3)[[2, 0, 1]]
    loss = finetune.loss_of(data.TASKS["cc-ccii"], lambda volume: scores, {"volume": None, "label": label}, {}, 0.1)
    torch.testing.assert_close(loss, -scores.log_softmax(1)[label.bool()].mean())


def test_a_validation_part_without_a_number_picks_no_epoch(run, monkeypatch):
    """The last one is taken, and the run says so; an epoch with a number is better than any without."""
    original = evaluation.evaluate

    def evaluate(*args, out=None, **more):
        if out:
            return original(*args, out=out, **more)
        return {"value": next(values), "metric": "AUC", "reason": "one class alone"}
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    for numbers, epoch in (([math.nan] * 3, 3), ([math.nan, 0.1, math.nan], 2)):
        values = iter(numbers)
        output = run("stoic", "--epochs", 3, "--eval_every", 1, "--batch_size", 16, "--lr", 0.01)
        best, last = (load(f"out/{name}.pt") for name in ("best", "last"))
        result = read_json("out/result.json")
        assert result["epoch"] == epoch and best["step"] == epoch * last["step"] / 3
        if epoch == 3:
            assert result["valid"] is None and result["valid_reason"] == "one class alone"
            assert "no epoch has a validation AUC, for one class alone: the last one is taken" in output


def test_a_batch_of_one_pair_warns(run):
    output = run("ct-rate-retrieval", "--epochs", 1, "--steps", 2, "--batch_size", 1)
    assert "warning: in a batch of one there is no other patient" in output
    assert [row["loss"] for row in read_log("out")] == [0, 0]


@pytest.mark.parametrize("config", [None, "swin.yaml", ["swin_t"], {"patients": 3}])
def test_a_file_of_others_may_hold_any_config_and_task(tmp_path, config):
    encoder = model.build_encoder("swin_t")
    weights = {f"swinViT.{key}": p for key, p in encoder.state_dict().items() if key != "mask_token"}
    torch.save({"state_dict": weights, "config": config, "task": "segmentation", "patients": 7}, tmp_path / "x.pt")
    network = model.Classifier(model.build_encoder("swin_t"), 2)
    args = finetune.argparse.Namespace(task="stoic", init=tmp_path / "x.pt", merging="monai")
    finetune.load_init(args, data.TASKS["stoic"], {"task": "stoic", "vocabulary": None}, network)
    assert all(torch.equal(p, network.encoder.state_dict()[key.removeprefix("swinViT.")]) for key, p in weights.items())
    assert evaluation.patients_of(tmp_path / "x.pt") is None


def test_patients_of_the_pretraining_in_the_test_part(run, sets):
    tested = [item.patient for item in data.load_task("stoic", sets("stoic")) if item.split == "test"]
    weights_alone = model.export_encoder(model.build_encoder("swin_t"), config={"encoder": "swin_t"},
                                         patients=sorted(data.patient_hashes(tested[:2])))
    torch.save(weights_alone, "encoder.pt")
    output = run("stoic", "--steps", 1, "--init", "encoder.pt")
    assert f"2 of {len(tested)} patients of the test part bear names of patients that encoder.pt" in output
    assert read_json("out/result.json")["more"]["patients_seen_in_pretraining"] == 2
    trained = {item.patient for item in data.load_task("stoic", sets("stoic")) if item.split != "test"}
    # A run that starts from this one knows those that it was trained on, too.
    assert evaluation.patients_of("out/best.pt") == data.patient_hashes([*trained, *tested[:2]])
    Path("encoder.pt").unlink()
    Path("out/result.json").unlink()
    run(None, "--resume")
    assert read_json("out/result.json")["more"]["patients_seen_in_pretraining"] == 2


@pytest.mark.parametrize("decay", ["cosine", "step"])
def test_rates_follow_the_recipe(run, decay):
    run("stoic", "--epochs", 4, "--warmup", 1, "--decay", decay, "--batch_size", 8, "--lr", 0.01,
        "--lr_encoder", 0.001)
    rows = read_log("out")
    n = len(rows) // 4                              # steps an epoch
    warm = [(i + 1) / n for i in range(n)]
    cosine = [0.5 * (1 + math.cos(math.pi * i / (3 * n))) for i in range(3 * n)]
    step = [0.8 ** (1 + i // n) for i in range(3 * n)]
    later = cosine if decay == "cosine" else step
    assert [row["lr"] / 0.01 for row in rows] == pytest.approx(warm + later)
    groups = load("out/last.pt")["optimizer"]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.01, 0.001}


def test_repeats_go_on_where_they_were_stopped(run, interrupt):
    """They have other seeds; their result is the mean and the deviation."""
    flags = ["--epochs", 1, "--batch_size", 2, "--repeats", 3]
    output = run("ctrg", *flags, out="whole")
    summary = read_json("whole/result.json")
    values = [read_json(f"whole/repeat_{i}/result.json")["value"] for i in range(3)]
    mean, std = statistics.mean(values), statistics.stdev(values)
    assert summary["value"] == pytest.approx(mean) and summary["std"] == pytest.approx(std)
    assert f"BLEU-4 of 3 repeats: {mean:.2f} ± {std:.2f}" in output
    seeds = [load(f"whole/repeat_{i}/best.pt")["config"]["seed"] for i in range(3)]
    assert seeds == [0, 1, 2] and Path("whole/best.pt").exists()

    calls = interrupt(losses, "mlm_loss", 3)        # in the second of the three
    with pytest.raises(SystemExit):
        run("ctrg", *flags, out="broken")
    first = Path("broken/repeat_0/best.pt").stat().st_mtime_ns
    run(None, "--resume", out="broken")
    assert len(calls) == 6 and Path("broken/repeat_0/best.pt").stat().st_mtime_ns == first
    assert Path("whole/result.json").read_text() == Path("broken/result.json").read_text()


def results_of(values, valid, tests="aaa", n=(7, 7, 7)):
    """Three repeats, as `train` gives them or as they were read"""
    return [{"task": "stoic", "metric": "AUC", "value": value, "valid": number, "chance": 0.5, "n": count,
             "protocol": "all", "split": "test", "ids_sha1": ids} | ({} if value and value > 0 else {"reason": "one class"})
            for value, number, ids, count in zip(values, valid, tests, n)]


@pytest.mark.parametrize("missing", [None, math.nan])
def test_the_summary_of_repeats(tmp_path, caplog, missing):
    for i in range(3):
        (tmp_path / f"repeat_{i}").mkdir()
        (tmp_path / f"repeat_{i}" / "best.pt").write_text(f"{i}")
    args = finetune.argparse.Namespace(task="stoic", init="scratch", repeats=3)
    caplog.set_level(logging.INFO)

    def summary(*results):
        finetune.summarise(args, data.TASKS["stoic"], tmp_path, results_of(*results))
        return read_json(tmp_path / "result.json")
    found = summary([0.5, 0.6, 0.7], [missing, 0.3, 0.3])
    assert found["value"] == pytest.approx(0.6) and found["std"] == pytest.approx(0.1) and "reason" not in found
    assert (found["n"], found["ids_sha1"], found["protocol"]) == (7, "a", "all")
    assert (tmp_path / "best.pt").read_text() == "1"            # of equals the first
    assert "stoic AUC of 3 repeats: 60.00 ± 10.00 (50.00, 60.00, 70.00)" in caplog.text
    assert "warning" not in caplog.text
    found = summary([0.5, 0.6, 0.7], [0.2, 0.3, 0.4], "aba", (7, 9, 7))
    assert (found["n"], found["ids_sha1"]) == ([7, 9, 7], ["a", "b", "a"]) and found["chance"] == 0.5
    assert "every repeat has a test part of its own" in found["protocol"]
    assert "test parts of their own" in caplog.text
    found = summary([0.5, missing, 0.7], [0.2, 0.3, 0.1])
    assert found["value"] is found["std"] is None and found["reason"] == "1 repeats have no value: one class"


def test_a_new_run_of_repeats_forgets_an_older_one_without(run, tmp_path):
    names = ("last.pt", "previous.pt", "best.pt", "result.json")
    for folder in (tmp_path / "out", tmp_path / "out" / "repeat_1"):
        folder.mkdir()
        for name in (*names, "notes.txt"):
            (folder / name).write_text("old")
    finetune.forget_older_run(tmp_path / "out")
    assert [path.name for path in sorted(tmp_path.rglob("*.*"))] == ["notes.txt"] * 2


def test_half_precision(run):
    output = run("stoic", "--epochs", 1, "--steps", 2, "--batch_size", 4, "--precision", "bf16")
    assert "in bf16" in output and all(math.isfinite(row["loss"]) for row in read_log("out"))
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights("out/last.pt").values())


def test_two_processes_are_one_with_twice_the_batch(sets, cache, tmp_path):
    command = [ROOT / "finetune.py", "--task", "stoic", "--data", sets("stoic"), "--size", *CUBE,
               "--workers", 0, "--cache", cache, "--epochs", 1, "--steps", 2, *demo_flags("stoic")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for launch, batch_size, out in (([], 4, "one"), (torchrun, 2, "two")):
        done = python(*launch, *command, "--batch_size", batch_size, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
    one, two = (load(tmp_path / out / "last.pt") for out in ("one", "two"))
    # AdamW turns a gradient near 0 into a whole step of 1e-3, whose sign is rounding: compare what moved
    # surely.
    far = [name for name in one["model"]
           if (one["model"][name] - two["model"][name]).abs().float().mean() > 1e-5]
    assert far == []
    # A step hides the length of a gradient, its running mean does not.
    for number, state in one["optimizer"]["state"].items():
        other = two["optimizer"]["state"][number]["exp_avg"]
        assert torch.allclose(state["exp_avg"], other, rtol=1e-2, atol=1e-5), number


# ------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, message", [
    (["--size", 30, 32, 32], "--size 30 32 32: every side must be a multiple of 32"),
    (["--fraction", 0], "--fraction 0.0: expected a number above 0"),
    (["--epochs", 0], "--epochs 0: expected at least 1"),
    (["--clip_grad", -1], "--clip_grad -1.0: expected at least 0"),
    (["--temperature", "nan"], "--temperature nan: expected a number above 0"),
    (["--steps", 0], "--steps 0: expected at least 1"),
    (["--eval_every", 0], "--eval_every 0: expected at least 1"),
    (["--init", "nowhere.pt"], "nowhere.pt: found no such file, expected weights"),
    (["--merging", "v0.9"], "--merging v0.9: found no --init"),
    (["--spacing", 1, 1, 1], "--spacing: only scans of segmentation tasks are resampled"),
    (["--min_count", 1000], "found no word 1000 times in the reports"),
    (["--task", "lung"], "--task lung: expected one of cc-ccii, luna16"),
])
def test_bad_flags(run, flags, message):
    with pytest.raises(ValueError, match=message):
        run("ctrg", *flags)


def test_a_tensorboard_shows_what_the_log_holds(run, monkeypatch):
    scalars = {}

    class Board:
        """In the place of TensorBoard's SummaryWriter"""

        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            scalars[self.folder, name, step] = value
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    run("ctrg", "--epochs", 2, "--steps", 2)
    rows = pretrain.read_log(Path("out/log.jsonl"))
    assert len(rows) == 2
    for (folder, name, step), value in scalars.items():
        assert folder == Path("out") and rows[step][name] == value
    assert {("loss", 0), ("loss", 1), ("lr", 1), ("valid", 1)} <= {key[1:] for key in scalars}


def test_flags_of_a_resumed_run_are_checked(run):
    run("ctrg", "--epochs", 1, "--steps", 1, "--clip_grad", 0)
    assert read_json("out/run.json")["clip_grad"] == 0          # no limit
    with pytest.raises(ValueError, match="--workers -1: expected at least 0"):
        run(None, "--resume", "--workers", -1)
    Path("out/result.json").unlink()
    run(None, "--resume")


def test_wrong_weights_are_refused(run):
    torch.save({"layer.weight": torch.zeros(3)}, "wrong.pt")
    with pytest.raises(ValueError, match="wrong.pt does not fill the encoder"):
        run("ctrg", "--init", "wrong.pt")


def test_a_task_and_its_data_are_needed():
    for flags in (["--task", "ctrg"], ["--data", "demo"]):
        with pytest.raises(ValueError, match="--task and --data are needed, or --resume"):
            completed(*flags)


def test_resume_needs_a_run_and_the_same_flags(run):
    with pytest.raises(FileNotFoundError, match="nowhere.run.json"):
        run(None, "--resume", out="nowhere")
    run("ctrg", "--epochs", 1, "--steps", 1)
    with pytest.raises(ValueError, match="was started with --steps 1, now it is 7"):
        run(None, "--resume", "--steps", 7)
    torch.save(load("out/last.pt") | {"world": 2}, "out/last.pt")
    Path("out/result.json").unlink()
    with pytest.raises(ValueError, match="--resume: out is of 2 processes, found 1"):
        run(None, "--resume")


def test_projections_need_their_text_encoder(run, tmp_path):
    weights = {"encoder.w": torch.zeros(1)}
    torch.save({"model": weights, "config": {"encoder": "swin_t", "text_encoder": "demo"}}, "alone.pt")
    message = "alone.pt: found no folder .*text_encoder, expected the text encoder that it fits"
    with pytest.raises(ValueError, match=message):
        run("ct-rate-retrieval", "--init", "alone.pt")


