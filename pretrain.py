"""Pre-train MG-3D on chest CT volumes and their reports: one loop, six losses.

    python pretrain.py                                       the demo: synthetic chests, minutes on a laptop CPU
    python pretrain.py --data train.csv                      the paper's recipe on your own volumes and reports
    torchrun --nproc_per_node=4 pretrain.py --data train.csv the same on 4 GPUs
    python pretrain.py --out out --resume                    go on after an interruption, with the flags it was started with

Writes OUT/last.pt (everything), OUT/encoder.pt (the encoder, with MONAI's names), OUT/log.jsonl, OUT/*.png.
"""
import argparse

PAPER = dict(encoder="swin_b", size=[128, 96, 128], text_encoder="StanfordAIMI/RadBERT", steps=100_000, warmup=1000,
             lr_encoder=2e-5, lr=1e-4, embed_dim=768, save_every=1000, log_every=20)
DEMO = dict(encoder="swin_t", size=[32, 32, 64], text_encoder="demo", steps=80, warmup=5,
            lr_encoder=1e-4, lr=1e-3, embed_dim=192, save_every=20, log_every=1)


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def default(name):
        return f"(default: {PAPER[name]}; demo: {DEMO[name]})"
    g = parser.add_argument_group("data")
    g.add_argument("--data", default="demo", help="demo, a manifest .csv (volume,report[,split][,patient]), a CT-RATE folder, or a CTRG-Chest .json (default: demo)")
    g.add_argument("--fraction", type=float, default=1.0, help="use this part of the training volumes, as in Table V; 2.8K of 47.1K is 0.06 (default: 1.0)")
    g.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), help=f"input size in voxels (z, y, x), multiples of 32 {default('size')}")
    g.add_argument("--hu", default="auto", choices=["auto", "header", "csv"], help="where Hounsfield units come from: told from the values, as stored, or with the metadata CSV's rescale (default: auto)")
    g.add_argument("--cache", default="cache", help="folder of preprocessed volumes; `python data.py cache` fills it ahead of time (default: cache)")
    g.add_argument("--workers", type=int, default=2, help="loader processes for each GPU; 2 suffice once the cache is full (default: 2)")

    g = parser.add_argument_group("model")
    g.add_argument("--encoder", choices=["swin_b", "swin_l", "swin_t", "unet"], help=f"3D vision encoder {default('encoder')}")
    g.add_argument("--text_encoder", help=f"frozen text encoder: a Hugging Face name or folder, or demo {default('text_encoder')}")
    g.add_argument("--embed_dim", type=int, help=f"width E of the fusion, a multiple of 12 {default('embed_dim')}")
    g.add_argument("--guidance", default="sentence", choices=["sentence", "word"], help="what guides the reconstruction of volumes, Table III (default: sentence)")
    g.add_argument("--mim_attention", default="proposed", choices=["proposed", "classical"], help="cross-modal attention of the image-dominant fusion, Table III (default: proposed)")
    g.add_argument("--mlm_attention", default="proposed", choices=["proposed", "classical"], help="the same of the text-dominant fusion (default: proposed)")
    g.add_argument("--use_checkpoint", action=argparse.BooleanOptionalAction, default=False, help="recompute the encoder in the backward pass: less memory, more time (default: no)")

    g = parser.add_argument_group("losses")
    for name, what in dict(mim="masked image modelling", mlm="masked language modelling", sfr="sentence feature reconstruction", cml="cross-modal learning",
                           ssm="semantics similarity matching", dfa="disentangled feature aggregation", clip="the CT-CLIP baseline, no part of MG-3D").items():
        g.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=name != "clip", help=f"{what} (default: {'no' if name == 'clip' else 'yes'})")
    g.add_argument("--lambda_a", type=float, default=1.0, help="weight of mim and mlm (default: 1.0)")
    g.add_argument("--lambda_b", type=float, default=0.1, help="weight of sfr and cml (default: 0.1)")
    g.add_argument("--lambda_g", type=float, default=0.1, help="weight of ssm and dfa (default: 0.1)")
    g.add_argument("--temperature", type=float, default=0.1, help="of the contrastive losses (default: 0.1)")
    g.add_argument("--mask_size", type=int, default=16, help="side of a masked sub-volume in voxels (default: 16)")
    g.add_argument("--mask_ratio", type=float, default=0.5, help="part of the sub-volumes that is masked (default: 0.5)")
    g.add_argument("--mlm_prob", type=float, default=0.15, help="part of the words that is masked (default: 0.15)")

    g = parser.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, help=f"optimizer steps; the paper has 300000 for CTRG-Chest {default('steps')}")
    g.add_argument("--batch_size", type=int, help="volumes for each process and pass; contrast wants many (default: 4; demo: 4 over all processes)")
    g.add_argument("--accumulate", type=int, default=1, help="passes for one step; contrastive losses see one pass at a time (default: 1)")
    g.add_argument("--lr_encoder", type=float, help=f"learning rate of the vision encoder {default('lr_encoder')}")
    g.add_argument("--lr", type=float, help=f"learning rate of everything else {default('lr')}")
    g.add_argument("--warmup", type=int, help=f"steps of linear warm-up, before the linear decay {default('warmup')}")
    g.add_argument("--weight_decay", type=float, default=0.01, help="of AdamW, on matrices, not on biases and norms (default: 0.01)")
    g.add_argument("--clip_grad", type=float, default=1.0, help="largest norm of the gradient, 0 = no limit (default: 1.0)")

    g = parser.add_argument_group("run")
    g.add_argument("--out", default="out", help="folder for checkpoints, log and pictures (default: out)")
    g.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, bit for bit on a CPU")
    g.add_argument("--init", help="start the encoder from a file: encoder.pt, the authors' weights, MONAI's SwinUNETR or SSL weights")
    g.add_argument("--seed", type=int, default=0, help="of weights, order, masks (default: 0)")
    g.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="auto: bf16 where the GPU has it, else fp16; fp32 on a CPU (default: auto)")
    g.add_argument("--save_every", type=int, help=f"steps between checkpoints {default('save_every')}")
    g.add_argument("--log_every", type=int, help=f"steps between lines of log.jsonl {default('log_every')}")
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
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eval as evaluation
import losses
import model

log = logging.getLogger("mg3d")

FREE = {"resume", "init", "out", "steps", "cache", "workers", "save_every", "log_every", "data"}     # may change on --resume


# ------------------------------------------------------------------------------------------------ the run

def restore_flags(args, given, config):
    """Flags that were not given come back from the checkpoint; given ones that contradict it are an error."""
    for name, value in config.items():
        if name in given and name not in FREE and getattr(args, name) != value:
            raise ValueError(f"--resume: the checkpoint was written with --{name} {value}, now it is {getattr(args, name)}; "
                             "leave the flag out, or start anew with another --out")
        if name not in given and name not in ("resume", "out"):
            setattr(args, name, value)


def checksum(module):
    """One number of all trained parameters, to compare processes with."""
    return sum(p.detach().double().abs().sum() for p in module.parameters() if p.requires_grad)


# --------------------------------------------------------------------------------------------------- training

def main(args, given):
    # ------------------------------------------------------------------------- processes, device, precision
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=timedelta(hours=2))     # the first process may preprocess, and probe
    main_process = rank == 0
    logging.basicConfig(level=logging.INFO if main_process else logging.WARNING, format="%(message)s", stream=sys.stdout)

    # ------------------------------------------------------------------------------------- flags, checkpoint
    out = Path(args.out)
    checkpoint = None
    if args.resume:
        if args.init:
            raise ValueError("--resume goes on with the weights of OUT/last.pt, --init starts from others: give one of them")
        checkpoint = model.load_last(out)
        restore_flags(args, given, checkpoint["config"])
        if checkpoint["world"] != world:
            raise ValueError(f"--resume: the checkpoint was written by {checkpoint['world']} processes, now there are {world}")
    for name, value in (DEMO if args.data == "demo" else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.batch_size is None:
        args.batch_size = max(1, 4 // world) if args.data == "demo" else 4
    enabled = [name for name in model.LOSSES if getattr(args, name)]
    if not enabled:
        raise ValueError("every loss is switched off, expected at least one of " + ", ".join(model.LOSSES))
    if any(side <= 0 or side % 32 for side in args.size):
        raise ValueError(f"--size {' '.join(map(str, args.size))}: every side must be a multiple of 32")
    for name in ("steps", "batch_size", "accumulate", "save_every", "log_every", "mask_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    for name in ("fraction", "mask_ratio", "mlm_prob"):
        if not 0 < getattr(args, name) <= 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected a number above 0 and up to 1")
    if args.temperature <= 0:
        raise ValueError(f"--temperature {args.temperature}: expected a number above 0")
    if any(side % args.mask_size for side in args.size):
        raise ValueError(f"--mask_size {args.mask_size}: every side of --size {' '.join(map(str, args.size))} must be a multiple "
                         "of it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f".can_write_{rank}").touch()
        (out / f".can_write_{rank}").unlink()
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write there: {error}") from None
    precision, autocast, scaler = model.mixed_precision(args.precision, device)

    # -------------------------------------------------------------------------------------------------- data
    if not main_process:
        dist.barrier()                                  # the first process writes the demo's files
    items = data.load_items(args.data, args.cache)
    train_items = [item for item in items if item.split == "train"]
    held_out = [item for item in items if item.split != "train"]
    if not train_items:
        raise ValueError(f"{args.data}: found no volume of the split train among {len(items)}, expected at least one")
    order = torch.randperm(len(train_items), generator=torch.Generator().manual_seed(args.seed)).tolist()
    keep = sorted(order[:max(1, round(args.fraction * len(train_items)))])
    train_items = [train_items[i] for i in keep]
    ids = hashlib.sha1("\n".join(item.id for item in train_items).encode()).hexdigest()
    if checkpoint and checkpoint["ids"] != ids:
        raise ValueError(f"--resume: {args.data} now holds other training volumes than the checkpoint was trained on")
    if args.text_encoder == "demo":
        text_folder = out / "text_encoder"
        if main_process and not checkpoint:
            model.make_demo_text_encoder(text_folder, [item.report for item in train_items])
    else:
        text_folder = args.text_encoder
    if main_process and world > 1:
        dist.barrier()
    if main_process and checkpoint and checkpoint["broken"]:
        (out / "last.pt").unlink(missing_ok=True)       # every process has read; a broken file must not become previous.pt

    # ------------------------------------------------------------------------------------------------- model
    torch.manual_seed(args.seed)                        # the same weights on every process
    encoder = model.build_encoder(args.encoder, use_checkpoint=args.use_checkpoint)
    text_encoder = model.TextEncoder(str(text_folder))
    network = model.MG3D(encoder, text_encoder, enabled, args.embed_dim, guidance=args.guidance,
                         mim_attention=args.mim_attention, mlm_attention=args.mlm_attention)
    if args.init and not checkpoint:
        model.load_weights(encoder, args.init)
    network.to(device).train()
    parallel = DistributedDataParallel(network, device_ids=[device] if cuda else None) if world > 1 else network

    dataset = data.VolumeReports(train_items, text_encoder.tokenizer, args.cache, tuple(args.size), args.hu, args.mask_size,
                                 args.mask_ratio, args.mlm_prob, seed=args.seed)
    collate = functools.partial(data.collate, pad_id=text_encoder.tokenizer.pad_token_id)   # no closure: workers may be spawned

    # --------------------------------------------------------------------------------------------- optimizer
    optimizer = torch.optim.AdamW(model.parameter_groups(network, args.lr_encoder, args.lr, args.weight_decay))

    # ------------------------------------------------------------------------------------------------ resume
    step = 0
    if checkpoint:
        network.load_state_dict(checkpoint["model"], strict=False)
        encoder.merging = checkpoint["merging"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:                        # it is empty where the run was not in fp16
            scaler.load_state_dict(checkpoint["scaler"])
        step = checkpoint["step"]
        torch.set_rng_state(checkpoint["rng"][rank]["cpu"])
        if cuda and checkpoint["rng"][rank]["cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["rng"][rank]["cuda"], device)
    # NOTE(paper): no schedule is given; linear warm-up, then linear decay to 0. It follows from the step alone, so that
    # --resume with more --steps decays to their end.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / max(1, args.warmup), (args.steps - step) / max(1, args.steps - args.warmup)), last_epoch=step - 1)
    config = {name: value for name, value in vars(args).items() if name not in ("resume", "out")}
    batches = data.Batches(len(train_items), args.batch_size, rank, world, args.seed, start=step * args.accumulate)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=args.workers, pin_memory=cuda)

    def save():
        """Everything that is needed to go on, and the encoder alone for others."""
        sums = losses.gather(checksum(network).reshape(1))
        if not bool((sums == sums[0]).all()):
            raise SystemExit(f"error: the processes hold different parameters after step {step}: checksums {sums.tolist()}")
        rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if cuda else None}
        all_rng = [rng] * world
        if world > 1:
            dist.all_gather_object(all_rng, rng)
        if main_process:
            weights = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("text_encoder.")}
            model.save_file(dict(model=weights, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step, config=config,
                           world=world, ids=ids, rng=all_rng, checksum=float(sums[0]), merging=getattr(encoder, "merging", None)),
                      out / "last.pt", before=out / "previous.pt")
            model.save_file(model.export_encoder(encoder), out / "encoder.pt")

    # ---------------------------------------------------------------------------------- what is about to run
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    weight = dict(mim=args.lambda_a, mlm=args.lambda_a, sfr=args.lambda_b, cml=args.lambda_b, ssm=args.lambda_g, dfa=args.lambda_g,
                  clip=1.0)
    log.info("data       %s: %d volumes to train on, %d held out", args.data, len(train_items), len(held_out))
    log.info("volumes    centre crop to %s, HU %s to %s (%s), resized to %s; cache in %s", data.CROP, *map(int, data.WINDOW),
             args.hu, tuple(args.size), args.cache)
    log.info("model      %s and frozen %s: %.1f M parameters trained, %.1f M frozen", args.encoder, text_folder, trained / 1e6,
             frozen / 1e6)
    log.info("losses     %s", ", ".join(f"{weight[name]:g} {name}" for name in enabled))
    log.info("batch      %d volumes × %d processes × %d passes; %d negatives for each volume", args.batch_size, world,
             args.accumulate, args.batch_size * world - 1)
    log.info("run        steps %d to %d on %s in %s, seed %d, out in %s", step, args.steps,
             torch.cuda.get_device_name() if cuda else "CPU", precision, args.seed, out)
    if args.batch_size * world == 1 and {"cml", "ssm", "dfa", "clip"} & set(enabled):
        log.warning("warning: in a batch of one there is nobody to be told from: cml, ssm, dfa and clip are 0")

    # -------------------------------------------------------------------------------------------------- loop
    log_path, board = out / "log.jsonl", None
    if main_process:
        rows = [row for row in evaluation.read_log(log_path) if row["step"] < step] if step and log_path.exists() else []
        log_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(out)
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: stop.append(received))

    bad_steps, unreadable, stopping, stream = 0, set(), 0, iter(loader)
    bar = tqdm(total=args.steps, initial=step, desc="pretrain", disable=None if main_process else True)
    while step < args.steps:
        started, waited = time.perf_counter(), 0.0
        total, values, names = 0.0, dict.fromkeys(enabled, 0.0), []
        for micro in range(args.accumulate):
            before = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - before
            unreadable.update(batch.pop("skipped"))
            if len(unreadable) > 0.05 * len(train_items):
                raise ValueError(f"{len(unreadable)} of {len(train_items)} volumes cannot be read, more than 5 %: "
                                 f"{sorted(unreadable)[:5]}")
            names += batch.pop("ids")
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}

            last_pass = micro == args.accumulate - 1
            with parallel.no_sync() if world > 1 and not last_pass else contextlib.nullcontext():
                with autocast:
                    o = parallel(batch)
                terms = {}
                if args.mim:
                    terms["mim"] = losses.mim_loss(o["recon"], batch["volume"], batch["volume_mask"])
                if args.mlm:
                    terms["mlm"] = losses.mlm_loss(o["logits"], o["mlm_labels"])
                if args.sfr:
                    terms["sfr"] = losses.sfr_loss(o["rebuilt"], o["sentences"], batch["sentence_mask"])
                if args.cml:
                    terms["cml"] = losses.cml_loss(o["f_i"], o["h_i"], o["f_t"], o["h_t"], args.temperature)
                if args.ssm:
                    terms["ssm"] = losses.ssm_loss(o["text_sentences"], o["visual_sentences"], batch["sentence_mask"])
                if args.dfa:
                    terms["dfa"] = losses.dfa_loss(o["h_s"], o["f_i"], args.temperature)
                if args.clip:
                    terms["clip"] = losses.clip_loss(o["f_i"], o["f_t"], args.temperature)
                loss = sum(weight[name] * term for name, term in terms.items()) / args.accumulate       # Eq. (10, 14, 15)
                for name, term in terms.items():
                    values[name] += term.item() / args.accumulate
                total += loss.item()
                if not math.isfinite(total):
                    break
                scaler.scale(loss).backward()

        culprits = [name for name, value in values.items() if not math.isfinite(value)]
        norm = math.nan
        if not culprits:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), args.clip_grad or math.inf).item()
            if not math.isfinite(norm) and not scaler.is_enabled():     # a scaler meets and skips infinite gradients itself
                culprits = ["gradient"]
        if culprits:
            bad_steps += 1
            log.warning("step %d: %s not finite for the volumes %s; the step is skipped", step, " and ".join(culprits),
                        ", ".join(names))
            if bad_steps == 10:
                raise SystemExit("error: 10 steps in a row were not finite; none of them changed the parameters, so that the last "
                                 "checkpoint is good. A lower learning rate or --precision fp32 may help")
        else:
            bad_steps = 0
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        lr = schedule.get_last_lr()[-1]
        schedule.step()

        if main_process and (step % args.log_every == 0 or step == args.steps - 1):
            numbers = dict(step=step, loss=total, lr=lr, **values, grad_norm=norm)
            numbers = {name: value if math.isfinite(value) else None for name, value in numbers.items()}         # JSON has no NaN
            row = dict(numbers, seconds=round(time.perf_counter() - started, 4), data_wait=round(waited, 4))
            if cuda:
                row["gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            with open(log_path, "a") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in row.items() if board else ():
                if name != "step" and value is not None:
                    board.add_scalar(name, value, step)
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
        step += 1
        bar.update()

        stopping = torch.tensor(max(stop, default=0), device=device)
        if world > 1:
            dist.all_reduce(stopping, dist.ReduceOp.MAX)        # all processes stop after the same step
        stopping = int(stopping)
        if step % args.save_every == 0 or step == args.steps or stopping:
            save()
            if main_process:
                evaluation.plot_curves(log_path, out / "curves.png")
        if stopping:
            break
    bar.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # all is saved: from here on a signal ends the process at once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if unreadable:
        log.warning("%d of %d volumes could not be read, others stood in for them: %s", len(unreadable), len(train_items),
                    ", ".join(sorted(unreadable)))

    # --------------------------------------------------------------------------------- pictures and a number
    if stopping:
        log.info("%s: saved after step %d; go on with --resume --out %s", signal.Signals(stopping).name, step, out)
    elif main_process:
        network.eval()
        sample = data.VolumeReports((held_out or train_items)[:4], text_encoder.tokenizer, args.cache, tuple(args.size), args.hu,
                                    args.mask_size, args.mask_ratio, args.mlm_prob, seed=args.seed)
        batch = collate([sample[i, 0] for i in range(len(sample))])
        sentences = data.split_sentences(sample.items[0].report)
        batch = {key: value.to(device) for key, value in batch.items() if torch.is_tensor(value)}
        pictures = ["curves.png"]
        if args.mim:
            evaluation.plot_reconstruction(network, batch, out / "reconstruction.png")
            pictures.append("reconstruction.png")
        if args.ssm or args.dfa:
            evaluation.plot_attention(network, batch, out / "attention.png", sentences)
            pictures.append("attention.png")
        log.info("wrote %s", ", ".join(str(out / name) for name in ["last.pt", "encoder.pt", "log.jsonl", *pictures]))
        if args.data == "demo":
            torch.manual_seed(args.seed)
            untrained = model.build_encoder(args.encoder).to(device)        # random weights of the same seed
            scores = {}
            for name, one in (("untrained", untrained), ("pre-trained", encoder)):
                scores[name], truth = evaluation.probe(one, items, args.cache, tuple(args.size), args.hu)
            log.info("linear probe of the frozen encoder, 18 findings, %d phantoms that training never saw (chance 0.500):",
                     len(truth))
            for name, score in scores.items():
                low, high = evaluation.bootstrap(evaluation.macro_auroc, score, truth)
                log.info("  %-12s macro AUC %.3f  [%.3f, %.3f]", name, evaluation.macro_auroc(score, truth), low, high)
    if world > 1:
        # A process that left at once was once seen to hang here, after all was written: a thread of gloo's waited for the GIL to
        # free the tensors it had gathered last, most likely while the destruction held it. In the barrier it gets its turn.
        dist.barrier()
        dist.destroy_process_group()
    if stopping:
        sys.exit(128 + stopping)


if __name__ == "__main__":
    try:
        main(args, given)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
