"""Fine-tune an encoder on one of the nine clinical tasks: a dispatcher by kind of task, one loop.

    python data.py demo --task msd-lung --out demo/msd-lung            a small synthetic set, to see it work
    python finetune.py --task msd-lung --data demo/msd-lung            from scratch, minutes on a laptop CPU
    python finetune.py --task msd-lung --data Task06_Lung --init out/encoder.pt --repeats 3
    torchrun --nproc_per_node=4 finetune.py …                          the same on 4 GPUs
    python finetune.py --out runs/msd-lung --resume                    go on after an interruption

The settings of a task are its row of TASKS in data.py; a recipe.json in the data's folder overrules them, flags overrule both.
Writes OUT/best.pt (the epoch that a validation part of the training split likes best), last.pt, log.jsonl, curves.png,
split.json, result.json (the test part, which nothing was chosen on) and predictions/.
"""
import argparse

TASK_NAMES = ("cc-ccii", "luna16", "msd-lung", "covid-19-20", "acdc", "stoic", "ctrg", "ct-rate-vocab", "ct-rate-retrieval")


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = parser.add_argument_group("data")
    g.add_argument("--task", choices=TASK_NAMES, help="one of the nine")
    g.add_argument("--data", help="the set in its native layout; `python data.py check --task T --data DIR` says what that is")
    g.add_argument("--fold", type=int, default=0, help="which fold is tested on, where the set has folds; elsewhere which fifth of the patients (default: 0)")
    g.add_argument("--fraction", type=float, default=1.0, help="use this part of the training patients (default: 1.0)")
    g.add_argument("--min_count", type=int, default=3, help="words that stand less often in the training reports are unknown words (default: 3)")
    g.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), help="voxels that the network sees, multiples of 32 (default: the task's)")
    g.add_argument("--spacing", type=float, nargs=3, metavar=("Z", "Y", "X"), help="mm to which scans of a segmentation task are resampled (default: the task's)")
    g.add_argument("--cache", default="cache", help="folder of prepared scans (default: cache)")
    g.add_argument("--workers", type=int, default=2, help="loader processes for each GPU (default: 2)")

    g = parser.add_argument_group("model")
    g.add_argument("--init", default="scratch", help="scratch, or a file to start the encoder from: last.pt or encoder.pt of pretrain.py, the authors' weights, MONAI's SwinUNETR or SSL weights (default: scratch)")
    g.add_argument("--encoder", choices=["swin_b", "swin_l", "swin_t", "unet"], help="3D vision encoder; last.pt knows it by itself (default: swin_b)")
    g.add_argument("--freeze", action=argparse.BooleanOptionalAction, default=False, help="train the head alone (default: no)")
    g.add_argument("--text_encoder", help="of prompts and retrieval: a Hugging Face name or folder, or demo; last.pt knows it by itself (default: StanfordAIMI/RadBERT)")
    g.add_argument("--embed_dim", type=int, help="width E of prompts and retrieval; last.pt knows it by itself (default: 768)")
    g.add_argument("--temperature", type=float, default=0.1, help="of prompts and retrieval (default: 0.1)")
    g.add_argument("--use_checkpoint", action=argparse.BooleanOptionalAction, default=False, help="recompute the encoder in the backward pass: less memory, more time (default: no)")

    g = parser.add_argument_group("optimisation (defaults: the task's recipe)")
    g.add_argument("--epochs", type=int, help="passes over the training part")
    g.add_argument("--steps", type=int, help="stop after so many steps, whatever --epochs says")
    g.add_argument("--batch_size", type=int, help="scans for each process and step; the segmentation tasks cut several patches from each")
    g.add_argument("--lr", type=float, help="learning rate of the head")
    g.add_argument("--lr_encoder", type=float, help="learning rate of the encoder")
    g.add_argument("--weight_decay", type=float, help="of AdamW, on matrices, not on biases and norms")
    g.add_argument("--warmup", type=float, help="epochs of linear warm-up")
    g.add_argument("--decay", choices=["cosine", "step"], help="of the learning rates: to 0 as a cosine, or by 0.8 an epoch")
    g.add_argument("--clip_grad", type=float, help="largest norm of the gradient, 0 = no limit")

    g = parser.add_argument_group("run")
    g.add_argument("--repeats", type=int, default=1, help="runs with seeds seed, seed + 1, …, which draw other splits where the set has none; reports mean ± std (default: 1)")
    g.add_argument("--out", help="folder for everything that is written (default: runs/TASK)")
    g.add_argument("--resume", action="store_true", help="go on from OUT, with the flags it was started with")
    g.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and drawn splits (default: 0)")
    g.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="auto: bf16 where the GPU has it, else fp16; fp32 on a CPU (default: auto)")
    g.add_argument("--eval_every", type=int, help="epochs between looks at the validation part (default: a twentieth of all)")
    return parser


def read_flags(argv=None):
    """The flags, and the names of those that were given and not left at their default."""
    args = flags().parse_args(argv)
    bare = flags()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    return args, set(vars(bare.parse_args(argv)))


if __name__ == "__main__":                              # before torch is imported: --help answers at once
    args, given = read_flags()

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eval as evaluation
import losses
import model

log = logging.getLogger("mg3d")

FREE = {"resume", "out", "cache", "workers", "data"}    # may change on --resume


# ------------------------------------------------------------------------------------------ settings of a run

def read_json(path):
    """A JSON file -> dict. ValueError naming it."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}; expected JSON") from None


def complete(args):
    """Fill in what no flag says: from the data's recipe.json, the file of --init, the task. Returns the Task of this run."""
    if not args.task or not args.data:
        raise ValueError("--task and --data are needed, or --resume with the --out of a run that has begun")
    task = data.TASKS[args.task]
    folder = Path(args.data) if Path(args.data).is_dir() else Path(args.data).parent
    settings = {"encoder": "swin_b", "embed_dim": 768, "text_encoder": "StanfordAIMI/RadBERT", **task.recipe, "size": task.size,
                "spacing": task.spacing, "eval_every": None}
    if (folder / "recipe.json").exists():
        own = read_json(folder / "recipe.json")
        if unknown := sorted(own.keys() - settings.keys()):
            raise ValueError(f"{folder / 'recipe.json'}: found {', '.join(unknown)}, expected some of {', '.join(settings)}")
        settings.update(own)
        log.info("recipe     %s: %s", folder / "recipe.json", ", ".join(f"{name} {value}" for name, value in own.items()))
    if args.init != "scratch":
        start = {}
        with contextlib.suppress(Exception):            # load_weights says better what is wrong with the file
            start = torch.load(args.init, map_location="cpu", weights_only=True).get("config", {})
        with_texts = "task" not in start or data.TASKS[start["task"]].kind in ("prompt", "retrieve")
        names = ("encoder", "embed_dim", "text_encoder") if with_texts else ("encoder",)
        settings.update({name: start[name] for name in names if start.get(name)})
        beside = Path(args.init).parent / "text_encoder"
        if with_texts and start.get("text_encoder") == "demo" and task.kind in ("prompt", "retrieve") and not beside.exists():
            raise ValueError(f"{args.init}: found no folder {beside}, expected the text encoder that its projections fit")
    if args.epochs:                                     # the warm-up keeps its share of the epochs
        settings["warmup"] *= args.epochs / settings["epochs"]
    if args.spacing and task.kind != "segment":
        raise ValueError(f"--spacing {' '.join(map(str, args.spacing))}: only scans of segmentation tasks are resampled, "
                         f"{args.task} is none")
    for name, value in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.eval_every is None:
        args.eval_every = max(1, args.epochs // 20)
    for name in ("epochs", "steps", "batch_size", "repeats", "eval_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.encoder == "unet" and task.kind == "segment":
        raise ValueError("--encoder unet: the decoder of the segmentation tasks needs a Swin encoder")
    if not 0 < args.fraction <= 1:
        raise ValueError(f"--fraction {args.fraction}: expected a number above 0 and up to 1")
    if any(side <= 0 or side % 32 for side in args.size):
        raise ValueError(f"--size {' '.join(map(str, args.size))}: every side must be a multiple of 32")
    args.size, args.spacing = list(args.size), args.spacing and list(args.spacing)
    return task._replace(size=tuple(args.size), spacing=args.spacing and tuple(args.spacing))


def part_of(items, fraction, seed):
    """The items of a seeded part of the patients, at least one"""
    patients = sorted({item.patient for item in items})
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(seed)).tolist()
    keep = {patients[i] for i in order[:max(1, round(fraction * len(patients)))]}
    return [item for item in items if item.patient in keep]


# ------------------------------------------------------------------------------------------------ one training

def train(args, task, out, seed, device, world, rank):
    """One run: train, look at the validation part, test the best epoch. Returns the result of the test on rank 0, else None."""
    main_process, cuda = rank == 0, device.type == "cuda"
    precision, autocast, scaler = model.mixed_precision(args.precision, device)
    checkpoint = None
    if args.resume and any((out / name).exists() for name in ("last.pt", "previous.pt")):
        checkpoint = model.load_last(out)
    if checkpoint and checkpoint["world"] != world:
        raise ValueError(f"--resume: {out} was written by {checkpoint['world']} processes, now there are {world}")

    # -------------------------------------------------------------------------------------------------- data
    items = data.load_task(args.task, args.data, args.fold, seed)
    parts = {split: [item for item in items if item.split == split] for split in data.SPLITS}
    if not parts["train"] or not parts["valid"]:
        raise ValueError(f"{args.data}: found {len(parts['train'])} items to train on and {len(parts['valid'])} to validate, "
                         "expected some of both")
    train_items, valid_items = part_of(parts["train"], args.fraction, seed), parts["valid"]
    if task.view == "cube":                             # 10 negatives for a positive suffice to pick the epoch
        positive, negative = ([item for item in valid_items if item.labels[0] == label] for label in (1, 0))
        order = torch.randperm(len(negative), generator=torch.Generator().manual_seed(seed)).tolist()
        valid_items = positive + [negative[i] for i in order[:10 * len(positive)]]

    # ------------------------------------------------------------------------------------------------- model
    config = {name: value for name, value in vars(args).items() if name not in ("resume", "out")}
    config |= {"seed": seed, "vocabulary": None, "patients": sorted({item.patient for item in train_items + valid_items})}
    if task.kind == "report":
        try:
            config["vocabulary"] = data.build_vocabulary([item.report for item in train_items], args.min_count)
        except ValueError as error:
            raise ValueError(f"{args.data}: {error}") from None
    if task.kind in ("prompt", "retrieve") and args.text_encoder == "demo" and main_process and not checkpoint:
        before = Path(args.init).parent / "text_encoder"
        if args.init != "scratch" and before.exists():  # its projections were trained on these features
            if before.resolve() != (out / "text_encoder").resolve():
                shutil.copytree(before, out / "text_encoder", dirs_exist_ok=True)
        else:
            texts = [item.report for item in train_items] + evaluation.prompts(task.classes)
            model.make_demo_text_encoder(out / "text_encoder", texts)
    if world > 1:
        dist.barrier()
    if main_process and checkpoint and checkpoint["broken"]:
        (out / "last.pt").unlink(missing_ok=True)       # every process has read; a broken file must not become previous.pt
    torch.manual_seed(seed)                             # the same weights on every process
    network = evaluation.build_network(config, out)
    if args.init != "scratch" and not checkpoint:
        model.load_weights(network, args.init)
    if args.freeze:
        network.encoder.requires_grad_(False)
    network.to(device).train()
    parallel = DistributedDataParallel(network, device_ids=[device] if cuda else None) if world > 1 else network
    torch.manual_seed(seed + rank)                      # dropout differs from process to process

    # ---------------------------------------------------------------------------------- what is about to run
    counts = [n for some in (train_items, valid_items, parts["test"]) for n in (len(some), len({item.volume for item in some}))]
    log.info("data       %s: %d items of %d scans to train on, %d of %d to validate, %d of %d to test", args.data, *counts)
    log.info("input      %s of %s voxels (z, y, x), window %s, spacing %s", task.view, "×".join(map(str, task.size)),
             task.window or "none: z-score", task.spacing or "as it is")
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    log.info("model      %s from %s%s, %s: %.1f M parameters trained", args.encoder, args.init, ", frozen" if args.freeze else "",
             type(network).__name__, trained / 1e6)

    # --------------------------------------------------------------------------------------- scans, examples
    good = [{item.id for item in data.prepare_all([*train_items, *valid_items, *parts["test"]], task, args.cache,
                                                  max(1, args.workers) * world)} if main_process else None]
    if world > 1:
        dist.broadcast_object_list(good)
    train_items, valid_items, test_items = ([item for item in part if item.id in good[0]]
                                            for part in (train_items, valid_items, parts["test"]))
    ids = hashlib.sha1("\n".join(item.id for item in train_items + valid_items).encode()).hexdigest()
    if checkpoint and checkpoint["ids"] != ids:
        raise ValueError(f"--resume: {args.data} now holds other items than the run in {out} was trained on")
    if task.kind == "retrieve":
        tokenizer = network.text_encoder.tokenizer
        dataset = data.VolumeReports(train_items, tokenizer, args.cache, task.size, seed=seed)
        collate = functools.partial(data.collate, pad_id=tokenizer.pad_token_id)
    else:
        dataset, collate = data.TaskDataset(train_items, task, args.cache, seed, config["vocabulary"]), data.collate_task
    texts = {}
    if task.kind == "prompt":
        prompts = evaluation.text_batch(network.text_encoder.tokenizer, evaluation.prompts(task.classes))
        texts = {name: x.to(device) for name, x in prompts.items()}

    # --------------------------------------------------------------------------------------------- optimizer
    batch_size = min(args.batch_size, max(1, len(dataset) // world))
    epoch_steps = max(1, len(dataset) // (batch_size * world))
    steps = min(args.epochs * epoch_steps, args.steps or math.inf)
    optimizer = torch.optim.AdamW(model.parameter_groups(network, args.lr_encoder, args.lr, args.weight_decay))

    def rate(step):
        warm = args.warmup * epoch_steps
        if step < warm:
            return min(1, (step + 1) / warm)
        if args.decay == "step":
            return 0.8 ** (step // epoch_steps)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    step, best = 0, {"value": math.nan, "epoch": 0, "metric": task.metric}
    if checkpoint:
        missing = network.load_state_dict(checkpoint["model"], strict=False).missing_keys
        assert all(name.startswith("text_encoder.") for name in missing)
        network.encoder.merging = checkpoint["merging"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        step, best = checkpoint["step"], checkpoint["best"]
        torch.set_rng_state(checkpoint["rng"][rank]["cpu"])
        if cuda and checkpoint["rng"][rank]["cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["rng"][rank]["cuda"], device)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate, last_epoch=step - 1)
    batches = data.Batches(len(dataset), batch_size, rank, world, seed, start=step)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=args.workers, pin_memory=cuda,
                        generator=torch.Generator())    # of its own: the loader leaves the random state of dropout alone

    def state(**more):
        weights = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("text_encoder.")}
        return dict(model=weights, config=config, merging=getattr(network.encoder, "merging", None), step=step, **more)

    def save():
        own = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if cuda else None}
        rng = [own] * world
        if world > 1:
            dist.all_gather_object(rng, own)
        if main_process:
            everything = state(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), best=best, rng=rng, world=world,
                               ids=ids)
            model.save_file(everything, out / "last.pt", before=out / "previous.pt")

    # ------------------------------------------------------------- nothing was wrong: the files of an older run go
    log.info("run        steps %d to %d (%d an epoch) of %d × %d on %s in %s, seed %d, out in %s", step, steps, epoch_steps,
             batch_size, world, torch.cuda.get_device_name() if cuda else "CPU", precision, seed, out)
    if batch_size < args.batch_size:
        log.warning("--batch_size %d is more than there are: %d", args.batch_size, batch_size)
    if main_process:
        if not checkpoint and seed == args.seed:        # what is left of other repeats, too, or --resume would take it up
            for folder in (out, *Path(args.out).glob("repeat_*")):
                for name in ("last.pt", "previous.pt", "best.pt", "result.json"):
                    (folder / name).unlink(missing_ok=True)
        (Path(args.out) / "run.json").write_text(json.dumps(vars(args) | {"resume": False}, indent=1))
        log_path = out / "log.jsonl"
        rows = [row for row in evaluation.read_log(log_path) if row["step"] < step] if step and log_path.exists() else []
        log_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        split = {name: sorted({item.patient for item in part}) for name, part in parts.items()}
        (out / "split.json").write_text(json.dumps(split, indent=1))

    # -------------------------------------------------------------------------------------------------- loop
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: stop.append(received))
    bad_steps, stopping, stream = 0, 0, iter(loader)
    bar = tqdm(total=steps, initial=step, desc=args.task, disable=None if main_process else True)
    while step < steps:
        started = time.perf_counter()
        batch = next(stream)
        waited = time.perf_counter() - started
        names = batch.pop("ids")
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items() if torch.is_tensor(value)}
        with autocast:
            if task.kind == "report":
                logits = parallel(batch["volume"], batch["tokens"][:, :-1])         # (B, L - 1, V)
            elif task.kind in ("prompt", "retrieve"):
                features = parallel(batch | texts)                                  # f_i (B, E), f_t (B or 2K, E)
            else:
                logits = parallel(batch["volume"])                                  # (B, K) or (B, K, D, H, W)
        if task.kind == "classify" and task.exclusive:
            loss = F.cross_entropy(logits.float(), batch["label"].argmax(1))
        elif task.kind == "classify":
            loss = F.binary_cross_entropy_with_logits(logits.float(), batch["label"])
        elif task.kind == "segment":
            loss = losses.dice_ce_loss(logits, batch["mask"])
        elif task.kind == "report":
            next_words = batch["tokens"][:, 1:]
            loss = losses.mlm_loss(logits, next_words.masked_fill(next_words == 0, -100))
        elif task.kind == "prompt":
            loss = losses.prompt_loss(features["f_i"], features["f_t"], batch["label"], args.temperature)
        else:
            loss = losses.clip_loss(features["f_i"], features["f_t"], args.temperature)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), args.clip_grad or math.inf).item()
        finite = torch.tensor(float(math.isfinite(loss.item()) and (math.isfinite(norm) or scaler.is_enabled())), device=device)
        if world > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)  # a step is skipped by all or by none
        if finite:
            bad_steps = 0
            scaler.step(optimizer)
            scaler.update()
        else:
            bad_steps += 1
            if scaler.is_enabled():
                scaler.update()                         # or it would refuse to unscale the next gradients
            log.warning("step %d: loss %g, gradient %g for %s; the step is skipped", step, loss.item(), norm, ", ".join(names))
            if bad_steps == 10:
                raise SystemExit("error: 10 steps in a row were not finite. A lower learning rate or --precision fp32 may help")
        optimizer.zero_grad(set_to_none=True)
        row = dict(step=step, epoch=step // epoch_steps, loss=loss.item() if math.isfinite(loss.item()) else None,
                   lr=schedule.get_last_lr()[-1], seconds=round(time.perf_counter() - started, 4), data_wait=round(waited, 4))
        schedule.step()
        step += 1
        bar.set_postfix(loss=f"{loss.item():.3f}", best=f"{best['value']:.3f}", refresh=False)
        bar.update()

        # ---------------------------------------------------------- a look at the validation part, a checkpoint
        epoch = step // epoch_steps
        if step == steps or step % epoch_steps == 0 and epoch % args.eval_every == 0:
            if main_process:
                found = evaluation.evaluate(network, valid_items, task, config, args.cache, device, progress=False)
                network.train()
                value = found["value"]
                row["valid"] = value if math.isfinite(value) else None              # JSON has no NaN
                if math.isnan(best["value"]) or value > best["value"]:              # of equal ones the first
                    best = {"value": value, "epoch": epoch, "metric": found["metric"]}
                    model.save_file(state(), out / "best.pt")
            if world > 1:
                dist.barrier()
        if main_process:
            with open(log_path, "a") as file:
                file.write(json.dumps(row) + "\n")
        received = torch.tensor(max(stop, default=0), device=device)
        if world > 1:
            dist.all_reduce(received, dist.ReduceOp.MAX)    # all processes stop after the same step
        stopping = int(received)
        if step % epoch_steps == 0 or step == steps or stopping:
            save()
        if stopping:
            break
    bar.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if stopping:
        log.info("%s: saved after step %d; go on with --resume --out %s", signal.Signals(stopping).name, step, args.out)
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
        sys.exit(128 + stopping)

    # --------------------------------------------------------------------------------------------- the number
    result = None
    if main_process:
        evaluation.plot_curves(log_path, out / "curves.png")
        network, task, config = evaluation.load_checkpoint(out / "best.pt")
        result = evaluation.evaluate(network.to(device), test_items, task, config, args.cache, device, out=out / "predictions",
                                     train_items=train_items)
        result |= {"valid": best["value"], "epoch": best["epoch"], "seed": seed, "init": args.init}
        evaluation.write_result(result, out / "result.json")
        log.info("best epoch %d (validation %s %.4f); on %d unseen items: %s", best["epoch"], best["metric"], best["value"],
                 result["n"], evaluation.summary(result))
    if world > 1:
        dist.barrier()
    return result


def main(args, given):
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stdout)
    out = Path(args.out or f"runs/{args.task}")
    if args.resume:
        for name, value in read_json(out / "run.json").items():
            if name in given and name not in FREE and getattr(args, name) != value:
                raise ValueError(f"--resume: the run was started with --{name} {value}, now it is {getattr(args, name)}; leave the "
                                 "flag out, or start anew with another --out")
            if name not in given and name not in ("resume", "out"):
                setattr(args, name, value)
    args.out = str(out)
    task = complete(args)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, timeout=timedelta(hours=6))
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    if world > 1:
        dist.barrier()

    results = []
    for repeat in range(args.repeats):
        folder = out / f"repeat_{repeat}" if args.repeats > 1 else out
        folder.mkdir(parents=True, exist_ok=True)
        if args.resume and (folder / "result.json").exists():
            results.append(read_json(folder / "result.json"))
            continue
        results.append(train(args, task, folder, args.seed + repeat, device, world, rank))
    if rank == 0 and args.repeats > 1:
        values = [math.nan if result["value"] is None else result["value"] for result in results]        # JSON has no NaN
        std, mean = (x.item() for x in torch.std_mean(torch.tensor(values, dtype=torch.float64)))
        chosen = max(range(args.repeats), key=lambda i: -math.inf if results[i]["valid"] is None else results[i]["valid"])
        shutil.copy(out / f"repeat_{chosen}" / "best.pt", out / "best.pt")
        if (out / f"repeat_{chosen}" / "text_encoder").exists():
            shutil.copytree(out / f"repeat_{chosen}" / "text_encoder", out / "text_encoder", dirs_exist_ok=True)
        summary = {key: results[0][key] for key in ("task", "metric", "chance", "n", "protocol")}
        summary |= {"value": mean, "std": std, "init": args.init, "repeats": results}
        evaluation.write_result(summary, out / "result.json")
        scale = 1 if task.kind == "report" else 100     # BLEU comes in percent
        log.info("%s %s of %d repeats: %.2f ± %.2f (%s)", args.task, results[0]["metric"], args.repeats, mean * scale, std * scale,
                 ", ".join(f"{value * scale:.2f}" for value in values))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(args, given)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
