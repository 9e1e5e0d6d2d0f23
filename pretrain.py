"""Pre-train MG-3D on chest CT volumes and their reports: one loop, six losses.

    python pretrain.py                                   the demo: synthetic chests
    python pretrain.py --data train.csv                  the paper's recipe on your own volumes
    torchrun --nproc_per_node=4 pretrain.py --data …     the same on 4 GPUs
    python pretrain.py --out out --resume                go on after an interruption

Writes OUT/last.pt (everything), encoder.pt and encoder.safetensors (the encoder, a Swin with
MONAI's names), the model card README.md, log.jsonl and pictures.
"""
import argparse

DEMO = {"encoder": "swin_t", "size": [32, 32, 32], "mask_size": 8, "text_encoder": "demo",
        "embed_dim": 96, "clip": True, "steps": 130, "warmup": 20, "lr_encoder": 1e-3, "lr": 1e-3,
        "save_every": 65, "log_every": 1}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints every default and keeps the lines of the docstring"""


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help,
                                     epilog=f"In the demo: {DEMO}")
    on_off, kinds = argparse.BooleanOptionalAction, ["proposed", "classical"]
    add = parser.add_argument_group("data").add_argument
    add("--data", default="demo", help="demo, a manifest .csv, CT-RATE, a CTRG .json or a cache")
    add("--fraction", type=float, default=1.0, help="of the training volumes (Table V)")
    add("--size", type=int, nargs=3, default=[128, 96, 128], help="voxels, multiples of 32")
    add("--permute_reports", action="store_true", help="control: reports of other patients")
    add("--hu", default="auto", choices=["auto", "header", "csv"],
        help="Hounsfield units: told from the values, as stored, or rescaled by the metadata CSV")
    add("--cache", default="cache", help="folder of preprocessed volumes")
    add("--workers", type=int, default=2, help="loader processes for each GPU")

    add = parser.add_argument_group("model").add_argument
    add("--encoder", default="swin_b", choices=["swin_b", "swin_l", "swin_t", "unet"], help="3D")
    add("--text_encoder", default="StanfordAIMI/RadBERT", help="frozen: a hub name, a folder, demo")
    add("--embed_dim", type=int, default=768, help="width E of the fusion, a multiple of 12")
    add("--guidance", default="sentence", choices=["sentence", "word"], help="of volumes")
    add("--mim_attention", default="proposed", choices=kinds, help="guiding the volume")
    add("--mlm_attention", default="proposed", choices=kinds, help="guiding the report")
    add("--sentence_values", default="volume", choices=["volume", "text"], help="of Eq. (11)")
    add("--use_checkpoint", action=on_off, default=False, help="less memory, slower")

    add = parser.add_argument_group("losses").add_argument
    add("--mim", action=on_off, default=True, help="masked image modelling")
    add("--mlm", action=on_off, default=True, help="masked language modelling")
    add("--sfr", action=on_off, default=True, help="sentence feature reconstruction")
    add("--cml", action=on_off, default=True, help="cross-modal learning")
    add("--ssm", action=on_off, default=True, help="semantics similarity matching")
    add("--dfa", action=on_off, default=True, help="disentangled feature aggregation")
    add("--clip", action=on_off, default=False, help="CT-CLIP's contrast of volumes and reports, "
        "weight 1: no part of MG-3D, but the one that most needs the right report")
    add("--lambda_a", type=float, default=1.0, help="weight of mim and mlm")
    add("--lambda_b", type=float, default=0.1, help="weight of sfr and cml")
    add("--lambda_g", type=float, default=0.1, help="weight of ssm and dfa")
    add("--temperature", type=float, default=0.1, help="of the contrastive losses")
    # NOTE(paper): sizes and shares of masks, warm-up and clipping are not given.
    add("--mask_size", type=int, default=16, help="side of a masked sub-volume in voxels")
    add("--mask_ratio", type=float, default=0.5, help="part of the sub-volumes that is masked")
    add("--mlm_prob", type=float, default=0.15, help="part of the words that is masked")

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=int, default=100_000, help="of the optimizer; CTRG-Chest: 300000")
    add("--batch_size", type=int, default=4, help="volumes a process; the demo shares 24")
    add("--accumulate", type=int, default=1, help="passes a step; they add no negatives")
    add("--lr_encoder", type=float, default=2e-5, help="learning rate of the vision encoder")
    add("--lr", type=float, default=1e-4, help="learning rate of everything else")
    add("--warmup", type=int, default=1000, help="steps, before the linear decay")
    add("--weight_decay", type=float, default=0.01, help="of AdamW, on matrices only")
    add("--clip_grad", type=float, default=1.0, help="largest norm of the gradient, 0 = no limit")

    add = parser.add_argument_group("run").add_argument
    add("--out", default="out", help="folder for checkpoints, log and pictures")
    add("--resume", action="store_true", help="go on from OUT/last.pt, bit for bit on a CPU")
    add("--init", help="weights of the encoder to start from: a file or hf:owner/name[/file]")
    add("--merging", default="auto", choices=["auto", "monai", "v0.9", "mergingv2"],
        help="of patches, whatever the file of --init tells; v0.9: as in MONAI before 1.5")
    add("--seed", type=int, default=0, help="of weights, order, masks")
    add("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
        help="auto: bf16 where the GPU has it, else fp16; fp32 on a CPU. On a GPU fp32 has TF32 products")
    add("--save_every", type=int, default=1000, help="steps between checkpoints")
    add("--log_every", type=int, default=20, help="steps between lines of log.jsonl")
    return parser


def read_flags(argv=None):
    """All flags, and as a dict those that were given: they must agree with a run to resume"""
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
from datetime import datetime, timedelta
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

A 3D encoder of chest CT, taught with scans and their radiology reports by
[MG-3D](https://arxiv.org/abs/2412.05876). For research, **not a medical device**.

```
{about}
run        {step} of {steps} steps, seed {seed}
```

```
{numbers}
```

`encoder, config = eval.load_encoder("hf:OWNER/NAME")` of the code loads it. As an encoder of
MONAI's `SwinUNETR`: {architecture}.
The files hold hashes of the names of the patients, so that a test can warn of them.
"""
MAY_CHANGE = {"resume", "out", "steps", "cache", "workers", "save_every", "log_every", "data"}
HANDLERS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


# ---------------------------------------- what keeps a run going, here and in finetune.py

def start():
    """Set up the log, TF32 and the group: torchrun's processes or one -> rank, world, device."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if dist.is_initialized():                   # by a run in this process that an error ended
        leave_group()
    group = {"backend": "gloo"}
    if world == 1:
        group["store"] = dist.HashStore()
    elif device.type == "cuda":
        group = {"backend": "nccl", "device_id": device}
    dist.init_process_group(rank=rank, world_size=world, timeout=timedelta(hours=6), **group)
    return rank, world, device


def leave_group():
    dist.barrier()  # else torch 2.6 may wait for ever in the next line
    dist.destroy_process_group()


def finish(stopping, step, out):
    """Leave the group; after a signal, say where the run stands and exit as it asks."""
    leave_group()
    if stopping:
        name = signal.Signals(stopping).name
        log.info("%s: saved after step %d; go on with --resume --out %s", name, step, out)
        sys.exit(128 + stopping)


def check_flags(args):
    """ValueError, naming the flag, for a value that cannot be; for the flags of both scripts."""
    data.check_numbers(args)
    task = data.TASKS.get(vars(args).get("task"))       # of finetune.py
    # A classifier has no decoder: Swin pads what it cannot halve, such as 48 for LUNA16's cubes.
    data.check_size(args.size, 16 if task and task.kind == "classify" else 32)
    if args.merging != "auto" and args.init in (None, "scratch"):
        raise ValueError(f"--merging {args.merging}: found no --init, expected a file trained so")
    if not task and args.warmup >= args.steps:          # finetune.py knows its steps later
        log.warning("warning: the run does not outlast --warmup %g", args.warmup)


def check_init(init, out):
    """ValueError if --init lies, or is a link to what lies, in a folder that the run writes to."""
    if init not in (None, "scratch"):
        file = model.local_file(init)
        for folder in (file.parent, file.resolve().parent):
            folder = folder.parent if folder.name.startswith("repeat_") else folder     # of finetune.py
            if folder.resolve() == out.resolve():
                raise ValueError(f"--init {init} lies in --out {out}, whose files the run replaces")


def check_unfinished(out):
    """ValueError if OUT holds an unfinished run of this script, as one that was requeued"""
    last = [file for file in (out / "last.pt", out / "previous.pt") if file.exists()]
    if last:
        old = model.read_checkpoint(last[0])
        steps = model.flags_of(old).get("steps")
        if steps and old["step"] < steps:
            raise ValueError(f"{out} holds a run, {old['step']} of {steps} steps: give --resume, "
                             "or another --out")


def of_all(value):
    """The values of all processes, in rank order"""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_agreement(ids, source):
    """ValueError unless all processes have the same items"""
    if len(set(of_all(ids))) > 1:
        raise ValueError(f"{source}: the processes list different items: is it being filled, or not the same "
                         "on all machines?")


def resume_flags(args, given, saved, may_change):
    """The flags of an interrupted run. ValueError if one that is given now contradicts them."""
    for name, value in given.items():
        if name in saved and name not in may_change and saved[name] != value:
            raise ValueError(f"--resume: the run was started with --{name} {saved[name]}, "
                             f"now it is {value}")
    return argparse.Namespace(**{**vars(args), **saved, **given})


class Interruption:
    """Keeps SIGTERM and Ctrl-C from ending the run before it has saved, until `end`."""

    def __init__(self):
        self.received = 0
        for number in HANDLERS:
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.received = number

    def number(self, device):
        """The signal, 0 = none, the same on all processes: they stop after the same step."""
        number = torch.tensor(self.received, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def end(self):
        for number, handler in HANDLERS.items():
            signal.signal(number, handler)


def total_of(number, device):
    """The sum of an int over all processes"""
    number = torch.tensor(number, device=device)
    dist.all_reduce(number)
    return int(number)


def mixed_precision(precision, device):
    """auto, bf16, fp16, fp32 -> which is meant, autocast, GradScaler. ValueError: fp16 on a CPU."""
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
    """For AdamW: the encoder has its own rate; biases, norms, tokens, tables do not decay."""
    groups = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            decays = p.ndim > 1 and "bias_table" not in name and name != "memory"
            groups.setdefault((name.startswith("encoder."), decays), []).append(p)
    return [{"params": params, "lr": args.lr_encoder if is_encoder else args.lr,
             "weight_decay": args.weight_decay * decays}
            for (is_encoder, decays), params in groups.items()]


def update(network, optimizer, scaler, clip_grad, loss, bad_steps, step_name):
    """Clip the gradients and step; skip the step if they or the loss (a float) are not finite.

    Returns their norm, and the number of steps skipped in a row. SystemExit at the tenth, in fp16 at the
    fortieth, as GradScaler looks for its scale from 2^16 down.
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
        log.warning("%s; loss %g, gradient %g: not finite, the step is skipped",
                    step_name, loss, norm)
    is_stepped = is_good and math.isfinite(norm)
    most = 40 if scaler.is_enabled() else 10
    if not is_stepped and bad_steps + 1 >= most:
        raise SystemExit(f"error: {most} steps in a row were not finite; what was saved is good")
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm.item(), 0 if is_stepped else bad_steps + 1


def save_file(state, path, before=None, write=torch.save):
    """write(state, file) to `path`, whole or not at all; the older file stays as `before`."""
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
    """What rebuilds a network: weights, of the text encoder but a hash, flags, order of merging"""
    weights, merging = model.weights_of(network), network.encoder.merging
    text = network.text_encoder.sha1 if hasattr(network, "text_encoder") else None
    return {"model": weights, "config": config, "merging": merging, "step": step, "text_encoder": text}


def begun_in(out):
    """When the newest run in OUT began: what tells runs apart"""
    return json.loads((out / "run.json").read_text(encoding="utf-8"))["begun"]


def save_run(out, network, optimizer, scaler, config, step, **more):
    """OUT/last.pt, all that is needed to go on. SystemExit if the processes have drifted apart, or if
    another run has begun in OUT since."""
    checksum = sum(p.detach().double().abs().sum() for p in network.parameters() if p.requires_grad)
    checksums = losses.gather(checksum.reshape(1))
    if (checksums != checksums[0]).any():
        raise SystemExit(f"error: the processes hold different parameters after step {step}")
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    rng = of_all((torch.get_rng_state(), cuda))
    if dist.get_rank() == 0:
        begun = begun_in(out)
        if begun != config["begun"]:
            raise SystemExit(f"error: {out} is of another run since {begun}, "
                             f"this one ends unsaved at step {step}")
        for part in out.glob(".*.part"):        # a kill left it
            part.unlink()
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                 "world": len(rng), "rng": rng, **network_state(network, config, step), **more}
        save_file(state, out / "last.pt", before=out / "previous.pt")


def load_last(out):
    """OUT/last.pt, or previous.pt if that is broken. ValueError: neither, another world, not the same for
    all processes, or of another run than run.json."""
    last, previous, world = out / "last.pt", out / "previous.pt", dist.get_world_size()
    is_broken = False
    try:
        state = model.read_checkpoint(last)
        if "optimizer" not in state:
            raise data.wrong(last, "weights alone", "a whole run")
    except ValueError as error:
        log.info("%s; going on from %s instead", error, previous)
        state, is_broken = model.read_checkpoint(previous), last.exists()
    if state["world"] != world:
        raise ValueError(f"--resume: {out} is of {state['world']} processes, found {world}")
    newest = begun_in(out)
    if newest != state["config"]["begun"]:
        raise ValueError(f"--resume: {last} is of another run than run.json: the one that began at {newest} "
                         "saved nothing, last.pt is of an older one")
    steps = of_all(state["step"])
    if len(set(steps)) > 1:
        raise ValueError(f"--resume: the processes read the steps {steps} in {out}, expected one")
    if is_broken and dist.get_rank() == 0:              # it must not become previous.pt
        last.rename(out / "last.pt.broken")
    return state


def restore_run(checkpoint, optimizer, scaler):
    """What `save_run` has saved beside the network -> the step to go on with"""
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:
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


def write_log(path, rows, mode="a", board=None):
    """Append rows to log.jsonl, or write it anew (mode "w"), and to a TensorBoard."""
    with open(path, "ab") if mode == "a" else data.written_whole(path) as file:
        file.writelines(f"{json.dumps(row)}\n".encode() for row in evaluation.without_nan(rows))
    for row in rows if board else ():
        for name, value in row.items():
            if isinstance(value, float):
                board.add_scalar(name, value, row["step"])


def open_board(out):
    """A TensorBoard, where one is installed"""
    with contextlib.suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(out)


# ---------------------------------------- the run

def loss_weights(args):
    """{enabled loss: λ of Eq. (10, 14, 15)}; 1 for a loss that the paper does not have.

    ValueError if none counts, or if the sub-volumes to mask do not fit or are none.
    """
    a, b, g = args.lambda_a, args.lambda_b, args.lambda_g
    weights = {"mim": a, "mlm": a, "sfr": b, "cml": b, "ssm": g, "dfa": g}
    weights = {name: weights.get(name, 1.0) for name in model.LOSSES if getattr(args, name)}
    if not any(weights.values()):
        raise ValueError("every loss is switched off or has the weight 0")
    size, side = " ".join(map(str, args.size)), args.mask_size
    if any(n % side for n in args.size):
        raise ValueError(f"--mask_size {side}: found --size {size}, expected multiples of it")
    places = math.prod(n // side for n in args.size)
    if args.mim and round(args.mask_ratio * places) == 0:
        raise ValueError(f"--mask_ratio {args.mask_ratio}: that is none of the {places} "
                         f"sub-volumes of {side}³ in --size {size}")
    return weights


def shuffled(n, seed):
    """The numbers below n in an order drawn with `seed`"""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def choose_items(args, items):
    """--fraction of those to train on, and those held out. ValueError without one to train on."""
    train_items = [item for item in items if item.split == "train"]
    held_out = [item for item in items if item.split != "train"]
    if not train_items:
        raise data.wrong(args.data, f"no volume of the split train among {len(items)}", "one")
    n = max(1, round(args.fraction * len(train_items)))
    chosen = sorted(shuffled(len(train_items), args.seed)[:n])
    return [train_items[i] for i in chosen], held_out


def describe(args, network, weight, trained_on, held_out, world):
    """The run in five lines, for its log and its model card. Warns of what it cannot teach."""
    if args.clip:
        log.info("clip       is no part of MG-3D; it most needs the right report (README)")
    if args.batch_size * world == 1 and {"cml", "ssm", "dfa", "clip"} & weight.keys():
        log.warning("warning: in a batch of one there is no other patient: contrasts and ssm are 0")
    control = ""
    if args.permute_reports:
        log.warning("warning: --permute_reports: every patient trains with another's report")
        control = ", with the reports of other patients (a control)"
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6
    terms = ", ".join(f"{weight[name]:g} {name}" for name in weight)
    return f"""\
data       {Path(args.data).name}: {trained_on} volumes to train on, {held_out} held out{control}
volumes    centre crop to {data.CROP}, HU {data.WINDOW} ({args.hu}), resized to {tuple(args.size)}
model      {args.encoder} from {args.init or "scratch"} and frozen {args.text_encoder}: \
{trained:.1f} M parameters trained
losses     {terms}
batch      {args.batch_size} volumes × {world} processes × {args.accumulate} passes; \
{args.batch_size * world - 1} negatives for each volume"""


def save_encoder(args, encoder, patients, about, step, out, numbers="None yet: the run goes on."):
    """OUT/encoder.pt and encoder.safetensors, which know what they need to be used without a flag,
    and README.md, the model card"""
    config = {"encoder": args.encoder, "size": args.size, "hu": args.hu, "crop": data.CROP,
              "window": data.WINDOW}
    weights = model.export_encoder(encoder, config=config, patients=patients)
    save_file(weights, out / "encoder.pt")
    save_file(weights, out / "encoder.safetensors", write=model.write_safetensors)
    card, architecture = out / "README.md", model.monai_settings(encoder)
    if card.exists() and not card.read_bytes().startswith(CARD.partition("{")[0].encode()):
        log.warning("warning: %s is no model card of ours or was edited: it stays", card)
        return
    text = CARD.format(about=about, step=step, numbers=numbers, architecture=architecture,
                       **vars(args))
    with data.written_whole(card) as file:
        file.write(text.encode())


def begin(args, given, out):
    """Flags of a new run, None; with --resume those of the run in OUT, its checkpoint. ValueError: neither"""
    if not args.resume:
        check_init(args.init, out)
        check_unfinished(out)
        args.begun = str(datetime.now())
        return args, None
    if args.init:
        raise ValueError("--resume goes on, --init starts from other weights: give one")
    checkpoint = load_last(out)
    args = resume_flags(args, given, checkpoint["config"], MAY_CHANGE)
    if args.steps < checkpoint["step"]:
        raise ValueError(f"--resume: found --steps {args.steps}, expected {checkpoint['step']} or more, "
                         "as many are done")
    return args, checkpoint


def main(args, given):
    rank, world, device = start()
    out = Path(args.out)
    args, checkpoint = begin(args, given, out)
    if args.batch_size is None:
        args.batch_size = max(1, 24 // world)
    check_flags(args)
    weight, size = loss_weights(args), tuple(args.size)
    enabled = list(weight)
    precision, autocast, scaler = mixed_precision(args.precision, device)
    out.mkdir(parents=True, exist_ok=True)

    # ---------------------------------------- data
    if rank > 0:
        dist.barrier()                                  # the first process writes the demo's files
    items = data.load_items(args.data, args.cache)
    data.check_prepared(items, size, args.hu)
    train_items, held_out = choose_items(args, items)
    told = [f"{item.id}\t{item.patient}" for item in train_items] + data.some_reports(train_items)
    ids = hashlib.sha1("\n".join(told).encode()).hexdigest()
    if checkpoint and checkpoint["ids"] != ids:
        raise ValueError(f"--resume: {args.data} holds other training volumes, patients or reports "
                         "than the run had")
    if args.text_encoder == "demo" and rank == 0 and not checkpoint:
        phantoms.make_demo_text_encoder(out / "text_encoder", [item.report for item in train_items])
    if rank == 0:
        dist.barrier()
    check_agreement(ids, args.data)
    if args.permute_reports:
        train_items = data.permute_reports(train_items, args.seed)

    # ---------------------------------------- model
    torch.manual_seed(args.seed)                        # the same weights on every process
    network = model.build_network("pretrain", 0, vars(args), out)
    encoder, tokenizer = network.encoder, network.text_encoder.tokenizer
    data.check_reports(network.text_encoder, data.some_reports(train_items), args.data)
    patients = data.patient_hashes(item.patient for item in train_items)
    if checkpoint:
        model.restore(network, checkpoint, out / "last.pt")
        evaluation.check_preprocessing(checkpoint["config"], out)
        patients.update(checkpoint["patients"])
    elif args.init:
        model.load_weights(encoder, args.init, args.merging)
        patients |= evaluation.patients_of(args.init) or set()
    patients = sorted(patients)
    network.to(device).train()
    parallel = DistributedDataParallel(network) if world > 1 else network
    optimizer = torch.optim.AdamW(parameter_groups(network, args))
    step = restore_run(checkpoint, optimizer, scaler) if checkpoint else 0

    def rate(step):
        # NOTE(paper): no schedule is given. Linear warm-up, then linear decay to 0. It follows
        # from the step alone: a run that is resumed with more --steps decays to their end.
        decay = (args.steps - step) / max(1, args.steps - args.warmup)
        return min((step + 1) / max(1, args.warmup), decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate, last_epoch=step - 1)

    # ---------------------------------------- batches
    make_example = functools.partial(
        data.pretraining_example, tokenizer=tokenizer, cache=args.cache, size=size, hu=args.hu,
        mask_size=args.mask_size, mask_ratio=args.mask_ratio, mlm_prob=args.mlm_prob)
    collate = functools.partial(data.collate, pad_id=tokenizer.pad_token_id)
    batches = data.Batches(len(train_items), args.batch_size, rank, world, args.seed,
                           step * args.accumulate, [item.patient for item in train_items])
    examples = data.Examples(train_items, make_example, args.seed)
    loader = DataLoader(examples, batch_sampler=batches, collate_fn=collate,
                        num_workers=args.workers, pin_memory=device.type == "cuda",
                        worker_init_fn=data.outlive_signals)
    config = {name: value for name, value in vars(args).items() if name not in ("resume", "out")}
    config |= {"crop": data.CROP, "window": data.WINDOW}
    about = describe(args, network, weight, len(train_items), len(held_out), world)
    log.info(f"{about}\nrun        steps {step} to {args.steps} on {device} in {precision}, "
             f"seed {args.seed}, out in {out}, cache in {args.cache}")

    def know_nothing():
        first = first_batches(examples, collate, args.batch_size, 64)
        return evaluation.know_nothing(network, first, enabled, args.batch_size * world)

    # ---------------------------------------- loop
    log_path, board = out / "log.jsonl", None
    nothing = know_nothing() if step == 0 and rank == 0 else None
    if rank == 0:
        if not checkpoint:
            if (out / "last.pt").exists():
                log.warning("warning: %s holds an older run, which the first checkpoint replaces", out)
            evaluation.write_result(config, out / "run.json")
        write_log(log_path, [row for row in read_log(log_path) if row["step"] < step], mode="w")
        board = open_board(out)
    interruption, stopping = Interruption(), 0
    bad_steps, unreadable, stream = 0, set(), iter(loader)
    epoch_passes = len(train_items) // batches.size
    bar = tqdm(total=args.steps, initial=step, desc="pretrain", disable=rank > 0,
               mininterval=data.BAR_SECONDS)
    while step < args.steps and not stopping:
        started = time.perf_counter()
        passes = [next(stream) for _ in range(args.accumulate)]
        waited = time.perf_counter() - started
        volumes = [name for batch in passes for name in batch.pop("ids")]
        if step * args.accumulate % epoch_passes < args.accumulate:
            unreadable = set()                          # a new epoch; processes share nothing in one
        unreadable.update(*(batch.pop("skipped") for batch in passes))
        count = total_of(len(unreadable), device)
        if count > 0.05 * len(train_items):
            raise ValueError(f"{count} of {len(train_items)} volumes cannot be read, "
                             f"more than 5 %: {sorted(unreadable)[:5]}")
        total, values = 0.0, dict.fromkeys(enabled, 0.0)
        for batch, share in zip(passes, losses.shares(passes, enabled, device)):
            parallel.require_backward_grad_sync = batch is passes[-1]   # DDP reduces once
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

        culprits = [name for name in enabled if not math.isfinite(values[name])] or ["gradient"]
        step_name = f"step {step}: {' and '.join(culprits)} of the volumes {', '.join(volumes)}"
        norm, bad_steps = update(network, optimizer, scaler, args.clip_grad, total, bad_steps,
                                 step_name)
        row = {"step": step, "loss": total, "lr": schedule.get_last_lr()[-1], **values,
               "grad_norm": norm, "seconds": round(time.perf_counter() - started, 4),
               "data_wait": round(waited, 4)}
        if device.type == "cuda":
            row["gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if rank == 0 and (step % args.log_every == 0 or step == args.steps - 1):
            if step == 0:
                row["nothing"] = nothing
            write_log(log_path, [row], board=board)
            bar.set_postfix({name: f"{values[name]:.3f}" for name in enabled}, refresh=False)
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

    # ---------------------------------------- pictures and numbers
    finish(stopping, step, out)                         # from here on the first process is alone
    if rank == 0:
        network.eval()
        unseen = data.Examples(held_out or train_items, make_example, args.seed)
        levels = evaluation.levels(read_log(log_path), know_nothing())      # SFR's target has moved
        text = say_result(measure(args, network, levels, items, unseen, collate, out))
        log.info("%s\nwrote all of it, pictures and encoder.* to %s", text, out)
        if encoder.merging == "v0.9":
            log.warning("warning: encoder.pt: %s", model.monai_settings(encoder)["note"])
        save_encoder(args, encoder, patients, about, step, out, text)


def first_batches(examples, collate, batch_size, volumes):
    """Batches of the first `volumes` examples, or of all; one at least"""
    starts = range(0, max(1, min(volumes, len(examples)) - batch_size + 1), batch_size)
    return [collate([examples[i % len(examples), 0] for i in range(k, k + batch_size)])
            for k in starts]


def measure(args, network, levels, items, unseen, collate, out):
    """Pictures, and what was learned; of the demo OUT/result.json, with what it is good for"""
    device, size = next(network.parameters()).device, tuple(args.size)
    has_maps = isinstance(network.sentence_attention, model.SentenceAttention)  # a gate has none
    batch = first_batches(unseen, collate, 4, 4)[0]
    shown = next(item for item in unseen.items if item.id == batch["ids"][0])
    batch = {key: value.to(device) for key, value in batch.items() if torch.is_tensor(value)}
    if network.mim_decoder is not None:
        evaluation.plot_reconstruction(network, batch, out / "reconstruction.png")
    if has_maps:
        volume = batch["volume"][0].cpu()
        evaluation.plot_attention(network, shown, volume, out / "attention.png")

    result = {"levels": levels}
    untrained = evaluation.untrained_encoder(vars(args))
    if untrained is not None:
        before, after = (parameters_to_vector(encoder.parameters()).detach().cpu()
                         for encoder in (untrained, network.encoder))
        result["moved"] = float((after - before).norm() / before.norm())
    if args.data != "demo":
        return result
    volumes = args.cache, size, args.hu
    if untrained is not None:
        features = [evaluation.probe_features(encoder, items, *volumes, batch_size=24)
                    for encoder in (untrained.to(device), network.encoder)]
        result["probe"] = evaluation.compare_probes(*features, items, few=100)
    if network.text_pool is not None:
        result["retrieval"] = evaluation.retrieve_reports(network, unseen.items, *volumes)
    if has_maps:
        result["lesion_attention"] = evaluation.lesion_attention(network, unseen.items, *volumes)
    enabled = [name for name in model.LOSSES if name in network.losses]
    batches = first_batches(unseen, collate, 24, len(unseen))
    result["pairing"] = evaluation.pairing(network, batches, enabled, args.temperature, gradients=1)
    evaluation.write_result(result, out / "result.json")
    evaluation.plot_pairing(result["pairing"], out / "pairing.png")
    return result


def say_result(result):
    """All that was measured, as text"""
    lines = [f"{'loss':6s} {'knowing nothing':>16s} {'first':>8s} {'last':>8s}"]
    for name, row in result["levels"].items():
        verdict = "learned" if row["learned"] else "not learned"
        if row["learned"] is None:
            verdict = f"cannot be told: {row['reason']}"
        numbers = f"{row['nothing']:16.3f} {row['first']:8.3f} {row['last']:8.3f}"
        lines.append(f"{name:6s} {numbers}  {verdict}")
    if "moved" in result:
        lines.append(f"the encoder's weights moved by {result['moved']:.1%}")
    say = {"probe": evaluation.say_probe, "retrieval": evaluation.say_retrieval,
           "lesion_attention": evaluation.say_lesion_attention, "pairing": evaluation.say_pairing}
    lines += [say[name](result[name]) for name in say if name in result]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main(args, given)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
