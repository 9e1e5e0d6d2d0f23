"""Fine-tune an encoder on one of the clinical tasks: one loop, a loss for each kind of task.

    python finetune.py --task luna16 --data demo                       a drawn set, on a laptop CPU
    python finetune.py --task msd-lung --data Task06_Lung --init out/encoder.pt --repeats 3
    torchrun --nproc_per_node=4 finetune.py …                          the same on 4 GPUs
    python finetune.py --out runs/msd-lung --resume                    go on after an interruption

The settings of a task are its row of TASKS in data.py; flags overrule them. Writes OUT/best.pt (the
epoch with the best score on a validation part of the training split), last.pt, log.jsonl,
curves.png, split.json, result.json (on the test part, which chooses nothing) and predictions/; with
--repeats those of each in OUT/repeat_K.
"""
import argparse


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints every default and keeps the lines of the docstring"""


def flags():
    on_off, unset = argparse.BooleanOptionalAction, argparse.SUPPRESS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help,
                                     argument_default=unset)
    add = parser.add_argument_group("data").add_argument
    add("--task", help="a row of TASKS in data.py")
    add("--data", help="demo, or the set as it comes: see `data.py check --task T`")
    add("--fold", type=int, default=0, help="tested on; without folds, a fifth of the patients")
    add("--fraction", type=float, default=1.0, help="use this part of the training patients")
    add("--min_count", type=int, default=3, help="rarer words of the reports are unknown words")
    add("--size", type=int, nargs=3, help="voxels (z, y, x); by default the task's")
    add("--spacing", type=float, nargs=3, help="mm (z, y, x), of a segmentation task")
    add("--cache", default="cache", help="folder of prepared scans")
    add("--workers", type=int, default=2, help="loader processes for each GPU")

    add = parser.add_argument_group("model").add_argument
    add("--init", default="scratch", help="scratch, or weights: a file or hf:owner/name[/file]; "
        "those of pretrain.py know --encoder, last.pt --text_encoder and --embed_dim, too")
    add("--merging", default="auto", choices=["auto", "monai", "v0.9", "mergingv2"],
        help="of --init, as in pretrain.py")
    add("--encoder", default="swin_b", choices=["swin_b", "swin_l", "swin_t", "unet"], help="3D")
    add("--text_encoder", default="StanfordAIMI/RadBERT", help="as in pretrain.py")
    add("--embed_dim", type=int, default=768, help="width E of prompts and retrieval")
    add("--temperature", type=float, default=0.1, help="of prompts and retrieval")
    add("--freeze", action=on_off, default=False, help="train only the head")
    add("--use_checkpoint", action=on_off, default=False, help="less memory, slower")

    add = parser.add_argument_group("optimisation; by default the recipe of the task").add_argument
    add("--epochs", type=int, help="passes over the training part")
    add("--steps", type=int, help="stop after so many steps, if --epochs has more")
    add("--batch_size", type=int, help="scans for each process and step")
    add("--lr", type=float, help="learning rate of the head")
    add("--lr_encoder", type=float, help="learning rate of the encoder")
    add("--weight_decay", type=float, help="of AdamW, on matrices only")
    add("--warmup", type=float, help="epochs of linear warm-up")
    add("--decay", choices=["cosine", "step"], help="to 0 as a cosine, or by 0.8 an epoch")
    add("--clip_grad", type=float, help="largest norm of the gradient, 0 = no limit")

    add = parser.add_argument_group("run").add_argument
    add("--repeats", type=int, default=1, help="runs with seeds seed, seed + 1, …: mean ± std")
    add("--out", help="folder for everything that is written; by default runs/TASK")
    add("--resume", action="store_true", default=False, help="go on from OUT, with the same flags")
    add("--seed", type=int, default=0, help="of weights, order, augmentation and drawn splits")
    add("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
        help="as in pretrain.py")
    add("--eval_every", type=int, help="epochs between validations; by default a twentieth")
    return parser


def read_flags(argv=None):
    """All flags, and as a dict those that were given: they overrule the task"""
    args = flags().parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # argparse sets no default over these
    given = vars(flags().parse_args(argv, unset))
    return args, {name: value for name, value in given.items() if value is not None}


if __name__ == "__main__":                      # before torch is imported: --help answers at once
    args, given = read_flags()

import functools
import hashlib
import json
import logging
import math
import shutil
import sys
import time
from datetime import datetime
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
import phantoms
import pretrain

log = logging.getLogger("mg3d")

MAY_CHANGE = pretrain.MAY_CHANGE - {"steps"}
WITH_TEXTS = "prompt", "retrieve"               # kinds of tasks that need a text encoder


# ---------------------------------------- settings

def settings_of_init(path, kind):
    """What a file to start from says of its encoder and its text side"""
    saved = model.flags_of(model.read_checkpoint(path))
    beside = model.local_file(path).parent / "text_encoder"
    if saved.get("text_encoder") == "demo" and kind in WITH_TEXTS and not beside.exists():
        raise data.wrong(path, f"no folder {beside}", "the text encoder that it fits")
    names = ["encoder", "embed_dim", "text_encoder"]
    if "task" in saved and data.TASKS[saved["task"]].kind not in WITH_TEXTS:
        names = ["encoder"]                     # such a run has no projections
    return {name: saved[name] for name in names if saved.get(name)}


def complete(args, given):
    """Fill in what no flag says, from the task and the file of --init. ValueError: bad flags."""
    if "task" not in args or "data" not in args:
        raise ValueError("--task and --data are needed, or --resume with the --out of a run")
    if args.task not in data.TASKS:
        raise ValueError(f"--task {args.task}: expected one of {', '.join(data.TASKS)}")
    task = data.TASKS[args.task]
    settings = {"steps": None, "eval_every": None, "size": task.size, "spacing": task.spacing,
                **task.recipe}
    if args.data == "demo":
        settings.update(task.demo)
    if args.init != "scratch":
        settings.update(settings_of_init(args.init, task.kind))
    if "epochs" in given:                               # the warm-up keeps its share of the epochs
        settings["warmup"] *= given["epochs"] / settings["epochs"]
    args = argparse.Namespace(**{**vars(args), **settings, **given})
    args.size, args.spacing = list(args.size), args.spacing and list(args.spacing)
    if args.eval_every is None:
        args.eval_every = max(1, args.epochs // 20)
    pretrain.check_flags(args)
    if "spacing" in given and task.kind != "segment":
        raise ValueError("--spacing: only scans of segmentation tasks are resampled")
    return args


def by_label(items):
    """Candidates that are a nodule, and those that are none"""
    return ([item for item in items if item.labels[0] == label] for label in (1, 0))


def split_items(args, task, seed):
    """Items to train on, to validate and to test. ValueError if there are none of the first two."""
    items = data.load_task(args.task, args.data, args.fold, seed, args.cache)
    train, valid, test = ([item for item in items if item.split == split] for split in data.SPLITS)
    if not (train and valid and test):
        raise data.wrong(args.data, f"{len(train)} items to train on, {len(valid)} to validate, "
                         f"{len(test)} to test", "some of each")
    if task.view == "cube":  # 10 negatives for a positive suffice to pick the epoch
        positive, negative = by_label(valid)
        order = pretrain.shuffled(len(negative), seed)
        valid = positive + [negative[i] for i in order[:10 * len(positive)]]
    patients = sorted({item.patient for item in train})
    order = pretrain.shuffled(len(patients), seed)
    chosen = {patients[i] for i in order[:max(1, round(args.fraction * len(patients)))]}
    train = [item for item in train if item.patient in chosen]
    if args.fraction < 1:
        data.check_classes(train, task, f"--fraction {args.fraction}")
    return train, valid, test


def demo_text_encoder(args, task, out, train_items):
    """OUT/text_encoder: that beside the file of --init, whose projections fit it, or a new one"""
    before = model.local_file(args.init).parent / "text_encoder"
    if args.init == "scratch" or not before.exists():
        texts = [item.report for item in train_items] + data.prompts(task.classes)
        phantoms.make_demo_text_encoder(out / "text_encoder", texts)
    elif before.resolve() != (out / "text_encoder").resolve():
        shutil.copytree(before, out / "text_encoder", dirs_exist_ok=True)


def load_init(args, task, config, network):
    """Fill a network from --init, less outputs that meant other classes, words or texts there."""
    checkpoint = model.read_checkpoint(args.init)
    saved = model.flags_of(checkpoint)
    if task.view == "whole":
        evaluation.check_preprocessing(saved, args.init)
    if task.kind in WITH_TEXTS:
        # NOTE(paper): its projections are kept if --clip taught them; the six losses do not compare them.
        fits = saved.get("clip", "task" in saved)       # a run of a task always teaches them
        fits = fits and checkpoint.get("text_encoder") == network.text_encoder.sha1
    else:
        fits = all(saved.get(name) == config[name] for name in ("task", "vocabulary"))
        fits = fits and checkpoint["task"]["classes"] == task.classes
    leave_out = () if fits else network.own_heads
    unexpected = model.load_weights(network, args.init, args.merging, leave_out)["unexpected"]
    left_out = [key for key in unexpected if key.startswith(network.own_heads)]
    if left_out:
        log.info("%s: left out %s: of another task, vocabulary or text encoder, or without --clip",
                 args.init, ", ".join(left_out))


def forget_older_run(out):
    """Delete what an older run in this folder, or a repeat of it, could be resumed from."""
    if (out / "result.json").exists():
        log.warning("warning: %s holds an older run, which this one replaces", out)
    for name in ("last.pt", "previous.pt", "best.pt", "result.json"):
        for file in (out / name, *out.glob(f"repeat_*/{name}")):
            file.unlink(missing_ok=True)


# ---------------------------------------- one training

def loss_of(task, network, batch, prompts, temperature):
    """The loss of a batch by the kind of the task. network: perhaps on several processes"""
    if task.kind == "report":
        logits = network(batch["volume"], batch["tokens"][:, :-1])      # (B, L - 1, V)
        next_words = batch["tokens"][:, 1:]
        return losses.mlm_loss(logits, next_words.masked_fill(next_words == model.PAD, -100))
    # NOTE(paper): vocabulary and retrieval train all but the text encoder; for retrieval no loss is named.
    if task.kind == "prompt":
        o = network(batch | prompts)                                    # f_i (B, E), f_t (2K, E)
        return losses.prompt_loss(o["f_i"], o["f_t"], batch["label"], temperature)
    if task.kind == "retrieve":
        o = network(batch)
        return losses.clip_loss(o["f_i"], o["f_t"], temperature)
    logits = network(batch["volume"])                                   # (B, K) or (B, K, D, H, W)
    if task.kind == "segment":
        return losses.dice_ce_loss(logits, batch["mask"])
    if task.exclusive:
        return F.cross_entropy(logits.float(), batch["label"].argmax(1))
    return losses.bce_loss(logits, batch["label"])


def run_hash(task, config, items):
    """Of what must be the same when a run goes on: settings of the task, words, items with their labels"""
    labels = [(item.id, item.labels is not None and item.labels.tobytes()) for item in items]
    told = repr((task.settings(), config["crop"], config["vocabulary"], labels))
    return hashlib.sha1(told.encode()).hexdigest()


def train(args, task, out, seed, rank, world, device):
    """One run: train, validate, test the best epoch."""
    precision, autocast, scaler = pretrain.mixed_precision(args.precision, device)
    checkpoint = None
    if args.resume and any((out / name).exists() for name in ("last.pt", "previous.pt")):
        checkpoint = pretrain.load_last(out)

    # ---------------------------------------- data
    if rank > 0:
        dist.barrier()                                  # the first process writes the demo's files
    train_items, valid_items, test_items = parts = split_items(args, task, seed)
    task, with_texts = data.with_classes(task, train_items), task.kind in WITH_TEXTS
    patients = {split: sorted({item.patient for item in part})
                for split, part in zip(data.SPLITS, parts)}
    config = {name: value for name, value in vars(args).items() if name not in ("resume", "out")}
    config |= {"seed": seed, "vocabulary": None, "window": task.window, "pretrained_on": [],
               "crop": data.CROP if task.view == "whole" else None,
               "patients": sorted(data.patient_hashes(patients["train"] + patients["valid"]))}
    if task.kind == "report":
        config["vocabulary"] = data.build_vocabulary([item.report for item in train_items], args.min_count)
    if rank == 0:
        if with_texts and args.text_encoder == "demo" and not checkpoint:
            demo_text_encoder(args, task, out, train_items)
        dist.barrier()

    # ---------------------------------------- model
    torch.manual_seed(seed)                             # the same weights on every process
    network = model.build_network(task.kind, len(task.classes), config, out)
    if checkpoint:
        model.restore(network, checkpoint, out / "last.pt")
        config["pretrained_on"] = checkpoint["config"]["pretrained_on"]
    elif args.init != "scratch":
        load_init(args, task, config, network)
        known = evaluation.patients_of(args.init)
        config["pretrained_on"] = None if known is None else sorted(known)
    if args.freeze:
        network.encoder.requires_grad_(False)
    network.to(device).train()
    parallel = DistributedDataParallel(network) if world > 1 else network
    torch.manual_seed(seed + rank)                      # dropout differs from process to process
    log.info(f"""\
data       {args.data}: {len(train_items)} items to train on, {len(valid_items)} to validate, \
{len(test_items)} to test
input      {task.view} of {task.size} voxels (z, y, x), window {task.window}, spacing {task.spacing}
model      {args.encoder} from {args.init}{", frozen" if args.freeze else ""}""")

    # ---------------------------------------- scans, batches
    good = [None]
    if rank == 0:
        seen = evaluation.count_seen(test_items, config["pretrained_on"], args.init)
        items = [item for part in parts for item in part]
        items = data.prepare_all(items, args.cache, args.workers * world, task)
        good = [{item.id for item in items}]
    dist.broadcast_object_list(good)
    train_items, valid_items, test_items = ([item for item in part if item.id in good[0]]
                                            for part in parts)
    if not (train_items and valid_items and test_items):
        raise data.wrong(args.data, "a part of which no scan can be read", "some of each")
    ids = run_hash(task, config, train_items + valid_items)
    if checkpoint and checkpoint["ids"] != ids:
        raise ValueError(f"--resume: items, labels, words or settings in data.py are not those of {out}")
    pretrain.check_agreement(ids, args.data)
    tokenizer, prompts = None, {}
    if with_texts:
        tokenizer = network.text_encoder.tokenizer
        texts = data.some_reports(train_items)
        if task.kind == "prompt":
            texts = data.prompts(task.classes)
            prompts = {key: value.to(device) for key, value in data.text_batch(tokenizer, texts).items()}
        data.check_reports(network.text_encoder, texts, args.data)
    make_example = functools.partial(
        data.task_example, task=task._replace(records=None), cache=args.cache, tokenizer=tokenizer,
        vocabulary={word: number for number, word in enumerate(config["vocabulary"] or ())})
    positives, negatives = by_label(train_items) if task.view == "cube" else (train_items, [])
    dataset = data.Examples(positives, make_example, seed, negatives)
    collate = functools.partial(data.collate, pad_id=tokenizer.pad_token_id if tokenizer else 0)

    # ---------------------------------------- optimizer
    batch_size = min(args.batch_size, max(1, len(dataset) // world))
    epoch_steps = max(1, len(dataset) // (batch_size * world))
    steps = min(args.epochs * epoch_steps, args.steps or math.inf)
    if steps <= args.warmup * epoch_steps:
        log.warning("warning: all %d steps lie in the warm-up: give a smaller --warmup", steps)
    optimizer = torch.optim.AdamW(pretrain.parameter_groups(network, args))
    step, best = 0, {"value": math.nan, "epoch": 0, "metric": task.metric}
    if checkpoint:
        step, best = pretrain.restore_run(checkpoint, optimizer, scaler), checkpoint["best"]

    def rate(step):
        warmup_steps = args.warmup * epoch_steps
        if step < warmup_steps:
            return min(1, (step + 1) / warmup_steps)
        if args.decay == "step":
            return 0.8 ** (step // epoch_steps)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate, last_epoch=step - 1)
    batches = data.Batches(len(dataset), batch_size, rank, world, seed, step,
                           [item.patient for item in positives if task.kind == "retrieve"])
    # The loader has its own generator: it must not advance the global one, of which dropout draws.
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate,
                        num_workers=args.workers, pin_memory=device.type == "cuda",
                        worker_init_fn=data.outlive_signals, generator=torch.Generator())
    log.info(f"run        steps {step} to {steps} ({epoch_steps} an epoch) of {batch_size} × {world} "
             f"on {device} in {precision}, seed {seed}, out in {out}")
    if task.kind == "retrieve" and batch_size * world == 1:
        log.warning("warning: in a batch of one there is no other patient: nothing is learned")

    # ---------------------------------------- loop
    log_path, board = out / "log.jsonl", None
    if rank == 0:
        if not checkpoint and seed == args.seed:        # all is checked
            forget_older_run(Path(args.out))
        for folder in {Path(args.out), out}:
            evaluation.write_result(vars(args) | {"resume": False}, folder / "run.json")
        evaluation.write_result(patients, out / "split.json")
        rows = [row for row in pretrain.read_log(log_path) if row["step"] < step]
        pretrain.write_log(log_path, rows, "w")
        board = pretrain.open_board(out)
    run = evaluation.Run(network, task, config, args.cache, device)
    interruption, stopping, bad_steps, stream = pretrain.Interruption(), 0, 0, iter(loader)
    bar = tqdm(total=steps, initial=step, desc=args.task, disable=rank > 0, mininterval=data.BAR_SECONDS)
    while step < steps and not stopping:
        started = time.perf_counter()
        batch = next(stream)
        waited = time.perf_counter() - started
        names, unreadable = batch.pop("ids"), batch.pop("skipped")
        if unreadable:
            raise ValueError(f"{', '.join(unreadable)}: could be read when the run began, not now")
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        with autocast:
            loss = loss_of(task, parallel, batch, prompts, args.temperature)
        scaler.scale(loss).backward()
        loss = loss.item()
        _, bad_steps = pretrain.update(network, optimizer, scaler, args.clip_grad, loss, bad_steps,
                                       f"step {step} with {', '.join(names)}")
        row = {"step": step, "epoch": step // epoch_steps, "loss": loss,
               "lr": schedule.get_last_lr()[-1], "seconds": round(time.perf_counter() - started, 4),
               "data_wait": round(waited, 4)}
        schedule.step()
        step += 1
        bar.set_postfix(loss=f"{loss:.3f}", best=f"{best['value']:.3f}", refresh=False)
        bar.update()

        epoch = step // epoch_steps
        if step == steps or step % epoch_steps == 0 and epoch % args.eval_every == 0:
            if rank == 0:
                result = evaluation.evaluate(run, valid_items, progress=False)
                network.train()
                row["valid"] = result["value"]
                if math.isnan(best["value"]) or result["value"] > best["value"]:
                    best = {name: result[name] for name in ("value", "metric", "reason")
                            if name in result} | {"epoch": epoch}
                    state = pretrain.network_state(network, config, step)
                    pretrain.save_file(state | {"task": task.settings()}, out / "best.pt")
            dist.barrier()
        if rank == 0:
            pretrain.write_log(log_path, [row], board=board)
        stopping = interruption.number(device)
        if step % epoch_steps == 0 or step == steps or stopping:
            pretrain.save_run(out, network, optimizer, scaler, config, step, best=best, ids=ids,
                              task=task.settings())
    bar.close()
    interruption.end()
    if stopping:
        pretrain.finish(stopping, step, args.out)

    if rank == 0:
        evaluation.plot_curves(pretrain.read_log(log_path), out / "curves.png")
        test_best(args, out, best, seed, seen, train_items, test_items, device)
    dist.barrier()


def test_best(args, out, best, seed, seen, train_items, test_items, device):
    """OUT/result.json: the best epoch on the test part. seen: its patients seen in pre-training"""
    run = evaluation.load_checkpoint(out / "best.pt", args.cache, device)
    if run.config["begun"] != args.begun:
        raise SystemExit(f"error: {out}/best.pt is of another run since {run.config['begun']}")
    result = evaluation.evaluate(run, test_items, out=out / "predictions", train_items=train_items)
    result |= {"valid": best["value"], "epoch": best["epoch"], "seed": seed, "init": args.init}
    result["more"]["patients_seen_in_pretraining"] = seen
    if "reason" in best:
        result["valid_reason"] = best["reason"]
        log.warning("warning: no epoch has a validation %s, for %s: the last one is taken",
                    best["metric"], best["reason"])
    log.info("best epoch %d (validation %s %.4f); on %d test items: %s", best["epoch"],
             best["metric"], best["value"], result["n"], evaluation.summary(result))
    evaluation.write_result(result, out / "result.json")


def summarise(args, task, out, results):
    """result.json of several repeats, and best.pt of the one with the best validation"""
    value, valid, chance = (
        torch.tensor([math.nan if result[key] is None else result[key] for result in results],
                     dtype=torch.float64) for key in ("value", "valid", "chance"))
    std, mean = torch.std_mean(value)
    chosen = out / f"repeat_{valid.nan_to_num(-math.inf).argmax()}"     # of equals the first
    shutil.copy(chosen / "best.pt", out / "best.pt")
    if (chosen / "text_encoder").exists():
        shutil.copytree(chosen / "text_encoder", out / "text_encoder", dirs_exist_ok=True)
    keys = ("task", "metric", "chance", "n", "protocol", "split", "ids_sha1")
    summary = {key: results[0][key] for key in keys}
    tests = [result["ids_sha1"] for result in results]
    if len(set(tests)) > 1:                             # the seed draws the split, too
        log.warning("warning: the repeats have test parts of their own, ± is not that of training")
        summary |= {"n": [result["n"] for result in results], "ids_sha1": tests,
                    "chance": chance.mean().item(),
                    "protocol": f"{summary['protocol']}; every repeat has a test part of its own"}
    summary |= {"value": mean.item(), "std": std.item(), "init": args.init, "repeats": results}
    reasons = [result["reason"] for result in results if "reason" in result]
    if reasons:
        summary["reason"] = f"{len(reasons)} repeats have no value: {reasons[0]}"
    evaluation.write_result(summary, out / "result.json")
    percent = 1 if task.kind == "report" else 100       # BLEU is in percent
    log.info("%s %s of %d repeats: %.2f ± %.2f (%s)", args.task, summary["metric"], args.repeats,
             mean * percent, std * percent, ", ".join(f"{one * percent:.2f}" for one in value))


def main(args, given):
    rank, world, device = pretrain.start()
    out = Path(given.get("out") or f"runs/{given.get('task')}")
    if args.resume:
        saved = json.loads((out / "run.json").read_text(encoding="utf-8"))
        args = pretrain.resume_flags(args, given, saved, MAY_CHANGE)
        pretrain.check_flags(args)
        if args.world != world:
            raise ValueError(f"--resume: {out} is of {args.world} processes, found {world}")
        if args.data != saved["data"] and (out / "result.json").exists():
            raise ValueError(f"--resume: {out} holds a finished run on {saved['data']}, not on {args.data}")
    else:
        args = complete(args, given)
        pretrain.check_init(args.init, out)
        if not (out / "result.json").exists() and [*out.glob("last.pt"), *out.glob("repeat_*/last.pt")]:
            raise ValueError(f"{out} holds a run without result.json: give --resume, or another --out")
        args.begun, args.world = str(datetime.now()), world
    args.out = str(out)
    spacing = args.spacing and tuple(args.spacing)
    task = data.TASKS[args.task]._replace(size=tuple(args.size), spacing=spacing)
    folders = [out / f"repeat_{k}" for k in range(args.repeats)] if args.repeats > 1 else [out]
    for repeat, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        if args.resume and (folder / "result.json").exists():
            log.info("%s holds a finished run on %s from %s", folder, args.data, args.init)
        else:
            train(args, task, folder, args.seed + repeat, rank, world, device)
    if rank == 0 and args.repeats > 1:
        files = [folder / "result.json" for folder in folders]
        results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        summarise(args, task, out, results)
    pretrain.finish(0, 0, out)


if __name__ == "__main__":
    try:
        main(args, given)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
