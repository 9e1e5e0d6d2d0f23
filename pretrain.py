"""Pre-train MG-3D on chest CT volumes and their reports: one loop, six losses.

    python pretrain.py                                   the demo: synthetic chests, minutes on a laptop CPU
    python pretrain.py --data train.csv                  the paper's recipe on your own volumes and reports
    torchrun --nproc_per_node=4 pretrain.py --data …     the same on 4 GPUs
    python pretrain.py --out out --resume                go on after an interruption, with the same flags

Writes OUT/last.pt (everything), encoder.pt and encoder.safetensors (the encoder, with MONAI's
names), the model card README.md, log.jsonl and pictures.
"""
import argparse

DEMO = {"encoder": "swin_t", "size": [32, 32, 32], "mask_size": 8, "text_encoder": "demo",
        "embed_dim": 96, "clip": True, "steps": 130, "warmup": 20, "lr_encoder": 1e-3, "lr": 1e-3,
        "save_every": 65, "log_every": 1}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints every default and keeps the lines of the docstring"""


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, epilog=f"In the demo: {DEMO}")
    on_off, kinds = argparse.BooleanOptionalAction, ["proposed", "classical"]
    add = parser.add_argument_group("data").add_argument
    add("--data", default="demo", help="demo, a manifest .csv, a CT-RATE folder, a CTRG .json, a cache")
    add("--fraction", type=float, default=1.0, help="of the training volumes; 2.8K of Table V: 0.06")
    add("--size", type=int, nargs=3, default=[128, 96, 128], help="voxels (z, y, x), multiples of 32")
    add("--permute_reports", action="store_true", help="control: reports of other patients")
    add("--hu", default="auto", choices=["auto", "header", "csv"], help="source of Hounsfield units")
    add("--cache", default="cache", help="folder of preprocessed volumes")
    add("--workers", type=int, default=2, help="loader processes for each GPU")

    add = parser.add_argument_group("model").add_argument
    add("--encoder", default="swin_b", choices=["swin_b", "swin_l", "swin_t", "unet"], help="3D encoder")
    add("--text_encoder", default="StanfordAIMI/RadBERT", help="frozen: of Hugging Face, a folder or demo")
    add("--embed_dim", type=int, default=768, help="width E of the fusion, a multiple of 12")
    add("--guidance", default="sentence", choices=["sentence", "word"], help="of volumes, Table III")
    add("--mim_attention", default="proposed", choices=kinds, help="guiding the volume, Table III")
    add("--mlm_attention", default="proposed", choices=kinds, help="guiding the report, Table III")
    add("--sentence_values", default="volume", choices=["volume", "text"],
        help="what H_S of Eq. (11) is made of; text: as in the authors' code")
    add("--use_checkpoint", action=on_off, default=False, help="recompute blocks: less memory, slower")

    add = parser.add_argument_group("losses").add_argument
    add("--mim", action=on_off, default=True, help="masked image modelling")
    add("--mlm", action=on_off, default=True, help="masked language modelling")
    add("--sfr", action=on_off, default=True, help="sentence feature reconstruction")
    add("--cml", action=on_off, default=True, help="cross-modal learning")
    add("--ssm", action=on_off, default=True, help="semantics similarity matching")
    add("--dfa", action=on_off, default=True, help="disentangled feature aggregation")
    add("--clip", action=on_off, default=False, help="CT-CLIP's contrast of volumes and reports, at "
        "weight 1: no part of MG-3D, but the one that needs the right report")
    add("--lambda_a", type=float, default=1.0, help="weight of mim and mlm")
    add("--lambda_b", type=float, default=0.1, help="weight of sfr and cml")
    add("--lambda_g", type=float, default=0.1, help="weight of ssm and dfa")
    add("--temperature", type=float, default=0.1, help="of the contrastive losses")
    add("--mask_size", type=int, default=16, help="side of a masked sub-volume in voxels")
    add("--mask_ratio", type=float, default=0.5, help="part of the sub-volumes that is masked")
    add("--mlm_prob", type=float, default=0.15, help="part of the words that is masked")

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=int, default=100_000, help="optimizer steps; the paper: 300000 for CTRG-Chest")
    add("--batch_size", type=int, default=4, help="volumes a process and pass; the demo shares 24")
    add("--accumulate", type=int, default=1, help="passes a step; they add no negatives")
    add("--lr_encoder", type=float, default=2e-5, help="learning rate of the vision encoder")
    add("--lr", type=float, default=1e-4, help="learning rate of everything else")
    add("--warmup", type=int, default=1000, help="steps of linear warm-up, before the linear decay")
    add("--weight_decay", type=float, default=0.01, help="of AdamW, on matrices only")
    add("--clip_grad", type=float, default=1.0, help="largest norm of the gradient, 0 = no limit")

    add = parser.add_argument_group("run").add_argument
    add("--out", default="out", help="folder for checkpoints, log and pictures")
    add("--resume", action="store_true", help="go on from OUT/last.pt, bit for bit on a CPU")
    add("--init", help="encoder to start from, a file or hf:owner/name[/file]: ours, the authors', "
        "MONAI's, VoCo's")
    add("--merging", default="auto", choices=["auto", "monai", "v0.9", "mergingv2"],
        help="order of patch merging in the file of --init; v0.9: MONAI before 1.5")
    add("--seed", type=int, default=0, help="of weights, order, masks")
    add("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
        help="auto: bf16 where the GPU has it, else fp16; fp32 on a CPU")
    add("--save_every", type=int, default=1000, help="steps between checkpoints")
    add("--log_every", type=int, default=20, help="steps between lines of log.jsonl")
    return parser


def read_flags(argv=None):
    """All flags, and as a dict those that were given: they must agree with a checkpoint to resume."""
    parser = flags()
    if parser.parse_args(argv).data == "demo":
        parser.set_defaults(**DEMO, batch_size=None)
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # argparse sets no default over these
    given = vars(parser.parse_args(argv, unset))
    return args, {name: value for name, value in given.items() if value is not None}


if __name__ == "__main__":                      # before torch is imported: --help answers at once
    args, given = read_flags()

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eval as evaluation
import losses
import model
import phantoms

log = logging.getLogger("mg3d")

CARD = """\
---
license: apache-2.0  # of the code. The licence of the data decides that of the weights: put it here
pipeline_tag: image-feature-extraction
tags: [medical-imaging, computed-tomography, vision-language, pytorch]
---
# {encoder}, pre-trained with MG-3D

A 3D encoder of chest CT that was taught with scans and their radiology reports by
[MG-3D](https://arxiv.org/abs/2412.05876). It is for research and **not a medical device**.

```
{about}
run        {step} of {steps} steps, seed {seed}
```

```
{numbers}
```

In the folder of the code, with the name of this repository or the path of a file:

```python
import data, eval
encoder, config = eval.load_encoder("hf:OWNER/NAME")
array, spacing, _ = data.read_volume("scan.nii.gz")
array, _ = data.to_hounsfield(array, "scan.nii.gz", config["hu"])
maps = encoder(data.preprocess(array, spacing, config["size"])[None])
```

`python finetune.py --init hf:OWNER/NAME --task …` starts a task. `encoder.safetensors` and `encoder.pt` hold
the same weights with the names of MONAI's `SwinUNETR`: {architecture}.
The files hold hashes of the names of the patients, so that a test can warn of them: who knows a name can
find out whether it is among them.
"""
MAY_CHANGE = {"resume", "out", "steps", "cache", "workers", "save_every", "log_every", "data"}


# ------------------------------------------------- what keeps a run going, here and in finetune.py

def start():
    """Join the processes of torchrun, or form a group of one -> rank, world, device."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if dist.is_initialized():                   # by a run in this process that an error ended
        dist.destroy_process_group()
    if world == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:  # the others wait while the first prepares data or evaluates
        on_gpu = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(timeout=timedelta(hours=6), **on_gpu)
    return rank, world, device


def finish(stopping, step, out):
    """Leave the group; after a signal, say where the run stands and exit as it asks."""
    dist.barrier()  # without it a gloo process once hung in destroy_process_group
    dist.destroy_process_group()
    if stopping:
        name = signal.Signals(stopping).name
        log.info("%s: saved after step %d; go on with --resume --out %s", name, step, out)
        sys.exit(128 + stopping)


def check_flags(args):
    """ValueError, naming the flag, for a value that cannot be; for the flags of both scripts."""
    data.check_numbers(args)
    if any(side % 32 for side in args.size):
        raise ValueError(f"--size {' '.join(map(str, args.size))}: every side must be a multiple of 32")
    if args.merging != "auto" and args.init in (None, "scratch"):
        raise ValueError(f"--merging {args.merging}: found no --init, expected a file trained so")


def resume_flags(args, given, saved, may_change):
    """The flags of an interrupted run. ValueError if one that is given now contradicts them."""
    for name, value in given.items():
        if name in saved and name not in may_change and saved[name] != value:
            raise ValueError(f"--resume: the run was started with --{name} {saved[name]}, now it is {value}")
    return argparse.Namespace(**{**vars(args), **saved, **given})


class Interruption:
    """Keeps SIGTERM and Ctrl-C from ending the run before it has saved, until `end`."""

    def __init__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self.receive)
                       for number in (signal.SIGTERM, signal.SIGINT)}

    def receive(self, number, frame):
        self.received = number

    def number(self, device):
        """The signal, 0 = none: the same on all processes, so that they stop after the same step."""
        number = torch.tensor(self.received, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def end(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def mixed_precision(precision, device):
    """auto, bf16, fp16 or fp32 -> which is meant, autocast, GradScaler. ValueError for fp16 on a CPU."""
    on_gpu = device.type == "cuda"
    if precision == "auto":
        has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "fp32" if not on_gpu else "bf16" if has_bf16 else "fp16"
    if precision == "fp16" and not on_gpu:
        raise ValueError("--precision fp16: expected a GPU; a CPU computes in fp32 or bf16")
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, dtype, enabled=precision != "fp32")
    return precision, autocast, torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def parameter_groups(network, args):
    """For AdamW: the encoder has its own rate; biases, norms, tokens, memory and tables do not decay."""
    groups = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            decays = p.ndim > 1 and "bias_table" not in name and name != "memory"
            groups.setdefault((name.startswith("encoder."), decays), []).append(p)
    return [{"params": params, "lr": args.lr_encoder if is_encoder else args.lr,
             "weight_decay": args.weight_decay * decays} for (is_encoder, decays), params in groups.items()]


def update(network, optimizer, scaler, clip_grad, loss, bad_steps, step_name):
    """Clip the gradients and step, or skip the step if they or the loss (a float) are not finite.

    Returns their norm, and the number of steps skipped in a row: the tenth ends the run.
    """
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip_grad or math.inf)
    # GradScaler skips infinite gradients by itself. All processes skip a step, or none.
    is_good = math.isfinite(loss) and (scaler.is_enabled() or math.isfinite(norm))
    is_good = torch.tensor(float(is_good), device=norm.device)
    dist.all_reduce(is_good, dist.ReduceOp.MIN)
    if is_good:
        scaler.step(optimizer)
    else:
        log.warning("%s; loss %g, gradient %g: not finite, the step is skipped", step_name, loss, norm)
        if bad_steps == 9:
            raise SystemExit("error: 10 steps in a row were not finite. The last checkpoint is good; a "
                             "lower learning rate or --precision fp32 may help")
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm.item(), 0 if is_good else bad_steps + 1


def save_file(state, path, before=None, write=torch.save):
    """write(state, file) to `path`, whole or not at all; the file that was there stays as `before`."""
    try:
        with data.written_whole(path) as file:
            write(state, file)
            file.flush()
            os.fsync(file.fileno())
            if before and path.exists():
                os.replace(path, before)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"error: {path} cannot be written: {error}") from None


def network_state(network, config, step):
    """What rebuilds a network: weights less those of the text encoder, flags, order of merging"""
    return {"model": model.weights_of(network), "config": config, "merging": network.encoder.merging,
            "step": step}


def save_run(out, network, optimizer, scaler, config, step, **more):
    """OUT/last.pt, all that is needed to go on. SystemExit if the processes hold different parameters."""
    checksum = sum(p.detach().double().abs().sum() for p in network.parameters() if p.requires_grad)
    checksums = losses.gather(checksum.reshape(1))
    if (checksums != checksums[0]).any():
        raise SystemExit(f"error: the processes hold different parameters after step {step}")
    rng = [None] * dist.get_world_size()
    on_gpu = torch.cuda.is_available()
    dist.all_gather_object(rng, (torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None))
    if dist.get_rank() == 0:
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "world": len(rng),
                 "rng": rng, **network_state(network, config, step), **more}
        save_file(state, out / "last.pt", before=out / "previous.pt")


def load_last(out):
    """OUT/last.pt, or previous.pt if that is broken. ValueError: neither will do, or another world."""
    problems = []
    for path in (out / "last.pt", out / "previous.pt"):
        try:
            state = model.read_checkpoint(path)
            break
        except ValueError as error:
            problems.append(str(error))
    else:
        raise ValueError(f"--resume found no checkpoint to go on from: {'; '.join(problems)}")
    if state["world"] != dist.get_world_size():
        raise ValueError(f"--resume: {path} was written by {state['world']} processes, "
                         f"found {dist.get_world_size()}")
    if problems:
        log.info("%s; going on from %s instead", problems[0], path)
        (out / "last.pt").unlink(missing_ok=True)       # a broken file must not become previous.pt
    return state


def restore_run(checkpoint, optimizer, scaler):
    """What `save_run` has saved beside the network -> the step to go on with"""
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    cpu, cuda = checkpoint["rng"][dist.get_rank()]
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    return checkpoint["step"]


def read_log(path):
    """log.jsonl -> list of dicts, without a last line that was cut off"""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]


def write_log(path, rows, mode="a"):
    """Append rows to log.jsonl, or write it anew (mode "w")."""
    with open(path, mode) as file:
        file.writelines(json.dumps(row) + "\n" for row in evaluation.without_nan(rows))


# ------------------------------------------------------------------------------------------ the run

def loss_weights(args):
    """{enabled loss: λ of Eq. (10, 14, 15)}; 1 for a loss that the paper does not have.

    ValueError if none counts, or if the sub-volumes to mask do not fit or are none.
    """
    a, b, g = args.lambda_a, args.lambda_b, args.lambda_g
    weights = dict.fromkeys(model.LOSSES, 1.0)
    weights |= {"mim": a, "mlm": a, "sfr": b, "cml": b, "ssm": g, "dfa": g}
    weights = {name: weight for name, weight in weights.items() if getattr(args, name)}
    if not any(weights.values()):
        raise ValueError("every loss is switched off or has the weight 0")
    size = " ".join(map(str, args.size))
    if any(side % args.mask_size for side in args.size):
        raise ValueError(f"--mask_size {args.mask_size}: found --size {size}, expected multiples of it")
    places = math.prod(side // args.mask_size for side in args.size)
    if args.mim and round(args.mask_ratio * places) == 0:
        raise ValueError(f"--mask_ratio {args.mask_ratio}: that is none of the {places} sub-volumes of "
                         f"{args.mask_size}³ in --size {size}")
    return weights


def choose_items(args, items):
    """Those to train on, or --fraction of them, and those held out. ValueError if there are none."""
    train_items = [item for item in items if item.split == "train"]
    held_out = [item for item in items if item.split != "train"]
    if not train_items:
        raise data.wrong(args.data, f"no volume of the split train among {len(items)}", "one")
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(train_items), generator=generator).tolist()
    chosen = sorted(order[:max(1, round(args.fraction * len(train_items)))])
    return [train_items[i] for i in chosen], held_out


def describe(args, network, weight, trained_on, held_out, world):
    """The run in five lines, for its log and its model card. Warns of what it cannot teach."""
    if args.clip:
        log.info("clip       is no part of MG-3D; of all losses it alone needs the right report (README)")
    if args.batch_size * world == 1 and {"cml", "ssm", "dfa", "clip"} & weight.keys():
        log.warning("warning: in a batch of one there is no other patient: cml, ssm, dfa and clip are 0")
    control = ""
    if args.permute_reports:
        log.warning("warning: --permute_reports: every patient trains with another's report (a control)")
        control = ", with the reports of other patients (a control)"
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6
    return f"""\
data       {Path(args.data).name}: {trained_on} volumes to train on, {held_out} held out{control}
volumes    centre crop to {data.CROP}, HU {data.WINDOW} ({args.hu}), resized to {tuple(args.size)}
model      {args.encoder} from {args.init or "scratch"}, text encoder {args.text_encoder}: \
{trained:.1f} M parameters trained
losses     {', '.join(f'{weight[name]:g} {name}' for name in weight)}
batch      {args.batch_size} volumes × {world} processes × {args.accumulate} passes; \
{args.batch_size * world - 1} negatives for each volume"""


def save_encoder(args, encoder, patients, about, step, out, numbers="None yet: the run goes on."):
    """OUT/encoder.pt, encoder.safetensors and README.md, the model card.

    The files hold the weights with MONAI's names, all that they need to be used without a flag, and hashes
    of the patients.
    """
    config = {"encoder": args.encoder, "size": args.size, "hu": args.hu, "crop": data.CROP, "window": data.WINDOW}
    weights = model.export_encoder(encoder, config=config, patients=patients)
    save_file(weights, out / "encoder.pt")
    save_file(weights, out / "encoder.safetensors", write=model.write_safetensors)
    card = out / "README.md"
    if card.exists() and not card.read_bytes().startswith(CARD.partition("{")[0].encode()):
        log.warning("warning: %s is no model card of ours or was edited: it stays as it is", card)
        return
    architecture = model.monai_settings(encoder)
    text = CARD.format(about=about, step=step, numbers=numbers, architecture=architecture, **vars(args))
    card.write_text(text, encoding="utf-8")


def main(args, given):
    rank, world, device = start()
    out, checkpoint = Path(args.out), None
    if args.resume:
        if args.init:
            raise ValueError("--resume goes on with OUT/last.pt, --init starts from other weights: give one")
        checkpoint = load_last(out)
        args = resume_flags(args, given, checkpoint["config"], MAY_CHANGE)
    if args.batch_size is None:
        args.batch_size = max(1, 24 // world)
    check_flags(args)
    weight, size = loss_weights(args), tuple(args.size)
    enabled = list(weight)
    precision, autocast, scaler = mixed_precision(args.precision, device)
    out.mkdir(parents=True, exist_ok=True)

    # ----------------------------------------------------------------------------------------- data
    if rank > 0:
        dist.barrier()                                  # the first process writes the demo's files
    items = data.load_items(args.data, args.cache)
    data.check_prepared(items, size, args.hu)
    train_items, held_out = choose_items(args, items)
    ids = hashlib.sha1("\n".join(item.id for item in train_items).encode()).hexdigest()
    if checkpoint and checkpoint["ids"] != ids:
        raise ValueError(f"--resume: {args.data} holds other training volumes than those the run began with")
    if args.text_encoder == "demo" and rank == 0 and not checkpoint:
        phantoms.make_demo_text_encoder(out / "text_encoder", (item.report for item in train_items))
    if rank == 0:
        dist.barrier()
    if args.permute_reports:
        train_items = data.permute_reports(train_items, args.seed)

    # ---------------------------------------------------------------------------------------- model
    torch.manual_seed(args.seed)                        # the same weights on every process
    network = model.build_network("pretrain", 0, vars(args), out)
    encoder, tokenizer = network.encoder, network.text_encoder.tokenizer
    network.text_encoder.check_words([item.report for item in train_items[:100]], args.data)
    patients = data.patient_hashes(item.patient for item in train_items)    # of all that it has seen
    if checkpoint:
        model.restore(network, checkpoint, out / "last.pt")
        patients.update(checkpoint["patients"])
    elif args.init:
        model.load_weights(encoder, args.init, args.merging)
        patients |= evaluation.patients_of(args.init)
    patients = sorted(patients)
    network.to(device).train()
    parallel = DistributedDataParallel(network) if world > 1 else network
    optimizer = torch.optim.AdamW(parameter_groups(network, args))
    step = restore_run(checkpoint, optimizer, scaler) if checkpoint else 0

    def rate(step):
        # NOTE(paper): no schedule is given. Linear warm-up, then linear decay to 0. It follows from the
        # step alone: a run that is resumed with more --steps decays to their end.
        decay = (args.steps - step) / max(1, args.steps - args.warmup)
        return min((step + 1) / max(1, args.warmup), decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate, last_epoch=step - 1)

    # -------------------------------------------------------------------------------------- batches
    make_example = functools.partial(
        data.pretraining_example, tokenizer=tokenizer, cache=args.cache, size=size, hu=args.hu,
        mask_size=args.mask_size, mask_ratio=args.mask_ratio, mlm_prob=args.mlm_prob)
    collate = functools.partial(data.collate, pad_id=tokenizer.pad_token_id)
    batches = data.Batches(len(train_items), args.batch_size, rank, world, args.seed, step * args.accumulate,
                           [item.patient for item in train_items])
    examples = data.Examples(train_items, make_example, args.seed)
    loader = DataLoader(examples, batch_sampler=batches, collate_fn=collate,
                        num_workers=args.workers, pin_memory=device.type == "cuda")
    config = {name: value for name, value in vars(args).items() if name not in ("resume", "out")}
    about = describe(args, network, weight, len(train_items), len(held_out), world)
    log.info("%s\nrun        steps %d to %d on %s in %s, seed %d, out in %s, cache in %s", about, step,
             args.steps, device, precision, args.seed, out, args.cache)

    def know_nothing():
        first = first_batches(examples, collate, args.batch_size, 64)
        return evaluation.know_nothing(network, first, enabled, args.batch_size * world)

    # ----------------------------------------------------------------------------------------- loop
    log_path, board = out / "log.jsonl", None
    nothing = know_nothing() if step == rank == 0 else None
    if rank == 0:
        if not checkpoint and (out / "last.pt").exists():       # --resume must not take it for this run
            log.warning("warning: %s is of an older run; it is older.pt now", out / "last.pt")
            os.replace(out / "last.pt", out / "older.pt")
            (out / "previous.pt").unlink(missing_ok=True)
        write_log(log_path, [row for row in read_log(log_path) if row["step"] < step], mode="w")
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(out)
    interruption, stopping = Interruption(), 0
    bad_steps, unreadable, stream = 0, set(), iter(loader)
    bar = tqdm(total=args.steps, initial=step, desc="pretrain", disable=None if rank == 0 else True)
    while step < args.steps and not stopping:
        started = time.perf_counter()
        passes = [next(stream) for _ in range(args.accumulate)]
        waited = time.perf_counter() - started
        volumes = [name for batch in passes for name in batch.pop("ids")]
        unreadable.update(*(batch.pop("skipped") for batch in passes))
        if len(unreadable) > 0.05 * len(train_items):
            raise ValueError(f"{len(unreadable)} of {len(train_items)} volumes cannot be read, more than "
                             f"5 %: {sorted(unreadable)[:5]}")
        total, values = 0.0, dict.fromkeys(enabled, 0.0)
        for batch, share in zip(passes, losses.shares(passes, enabled, device)):
            parallel.require_backward_grad_sync = batch is passes[-1]   # only the last pass talks
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            with autocast:
                o = parallel(batch)
            terms = losses.compute(o, batch, enabled, args.temperature)
            # Eq. (10, 14, 15)
            loss = sum(weight[name] * share[name] * term for name, term in terms.items())
            scaler.scale(loss).backward()
            total += loss.item()
            for name, term in terms.items():
                values[name] += share[name] * term.item()

        culprits = " and ".join(name for name in enabled if not math.isfinite(values[name])) or "gradient"
        step_name = f"step {step}: {culprits} of the volumes {', '.join(volumes)}"
        norm, bad_steps = update(network, optimizer, scaler, args.clip_grad, total, bad_steps, step_name)
        row = {"step": step, "loss": total, "lr": schedule.get_last_lr()[-1], **values, "grad_norm": norm,
               "seconds": round(time.perf_counter() - started, 4), "data_wait": round(waited, 4)}
        if device.type == "cuda":
            row["gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if rank == 0 and (step % args.log_every == 0 or step == args.steps - 1):
            for name in row if board else ():
                board.add_scalar(name, row[name], step)
            write_log(log_path, [row | ({"nothing": nothing} if step == 0 else {})])
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
        schedule.step()
        step += 1
        bar.update()

        stopping = interruption.number(device)
        if step % args.save_every == 0 or step == args.steps or stopping:
            save_run(out, network, optimizer, scaler, config, step, ids=ids, patients=patients)
            if rank == 0:
                save_encoder(args, encoder, patients, about, step, out)
                evaluation.plot_curves(read_log(log_path), out / "curves.png")
    bar.close()
    interruption.end()

    # ------------------------------------------------------------------------ pictures and a number
    finish(stopping, step, out)                         # from here on the first process is alone
    if rank == 0:
        network.eval()
        unseen = data.Examples(held_out or train_items, make_example, args.seed)
        draw(network, unseen, collate, out)
        levels = evaluation.levels(read_log(log_path), know_nothing())      # SFR's target has moved
        result = measure(args, network, levels, items, unseen, collate, out)
        log.info(say_result(result))
        save_encoder(args, encoder, patients, about, step, out, say_result(result))


def first_batches(examples, collate, batch_size, volumes):
    """Batches of the first `volumes` examples; of fewer, where there are fewer, but of one at least"""
    starts = range(0, max(1, min(volumes, len(examples)) - batch_size + 1), batch_size)
    return [collate([examples[i % len(examples), 0] for i in range(k, k + batch_size)]) for k in starts]


def draw(network, examples, collate, out):
    """Pictures of what MIM rebuilds, and of where the sentences of the first patient look"""
    device = next(network.parameters()).device
    batch = first_batches(examples, collate, 4, 4)[0]
    batch = {key: value.to(device) for key, value in batch.items() if torch.is_tensor(value)}
    if network.mim_decoder is not None:
        evaluation.plot_reconstruction(network, batch, out / "reconstruction.png")
    if isinstance(network.sentence_attention, model.SentenceAttention):  # a gate looks at no place
        evaluation.plot_attention(network, examples.items[0], batch["volume"][0].cpu(), out / "attention.png")


def measure(args, network, levels, items, unseen, collate, out):
    """What was learned. In the demo OUT/result.json holds it, with what it is good for on unseen phantoms."""
    device, size = next(network.parameters()).device, tuple(args.size)
    result = {"levels": levels, "moved": None}
    untrained = evaluation.untrained_encoder(vars(args))
    if untrained is not None:
        before, after = (parameters_to_vector(encoder.parameters()).detach().cpu()
                         for encoder in (untrained, network.encoder))
        result["moved"] = float((after - before).norm() / before.norm())
    if args.data != "demo":
        return result
    if untrained is not None:
        features = [evaluation.probe_features(encoder, items, args.cache, size, args.hu, batch_size=24)
                    for encoder in (untrained.to(device), network.encoder)]
        result["probe"] = evaluation.compare_probes(*features, items, few=100)
    unseen_items = unseen.items, args.cache, size, args.hu
    if network.text_pool is not None:
        result["retrieval"] = evaluation.retrieve_reports(network, *unseen_items)
    if isinstance(network.sentence_attention, model.SentenceAttention):
        result["lesion_attention"] = evaluation.lesion_attention(network, *unseen_items)
    enabled = [name for name in model.LOSSES if name in network.losses]
    batches = first_batches(unseen, collate, 24, len(unseen))
    result["pairing"] = evaluation.pairing(network, batches, enabled, args.temperature, gradients=1)
    evaluation.plot_pairing(result["pairing"], out / "pairing.png")
    evaluation.write_result(result, out / "result.json")
    return result


def say_result(result):
    """All that was measured, as text"""
    lines = [f"{'loss':6s} {'knowing nothing':>16s} {'first':>8s} {'last':>8s}"]
    for name, row in result["levels"].items():
        verdict = {True: "learned", False: "not learned"}.get(row["learned"])
        verdict = verdict or f"cannot be told: {row['reason']}"
        lines.append(f"{name:6s} {row['nothing']:16.3f} {row['first']:8.3f} {row['last']:8.3f}  {verdict}")
    if result["moved"] is not None:
        lines.append(f"the encoder's weights moved by {result['moved']:.1%}")
    for name in ("probe", "retrieval", "lesion_attention", "pairing"):
        if name in result:
            lines.append(getattr(evaluation, f"say_{name}")(result[name]))
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main(args, given)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
