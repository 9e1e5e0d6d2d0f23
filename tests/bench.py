"""Benchmarks: time and memory of the encoder, of a pre-training step and of the loader. They print; nothing passes or fails.

    python tests/bench.py encoder                 Swin beside MONAI's, where MONAI is installed, and the machine's limit
    python tests/bench.py small                   the demo's small Swin, the step around it, and the drawing of phantoms
    python tests/bench.py step                    what a pre-training step with all six losses spends its time on
    python tests/bench.py loader                  reading, preprocessing, waiting for data, the start of a script
    python tests/bench.py growth --plot g.png     time and memory as volumes, batches and reports grow
    python tests/bench.py memory                  the largest batch for cards of 8 to 80 GB, computed from small batches
    python tests/bench.py scale                   a cache folder of 50,000 and of 1,000,000 volumes, for one of 64 processes
    python tests/bench.py all

Figures of encoder and growth are medians of --rounds measurements, each in a process of its own so that its peak memory is its
own, and those that are compared take turns (A B A B), since machines are noisy. A step is measured once, in its own process; the
loader in this one. Memory is the peak above what the process held before.
"""
import argparse
import contextlib
import csv
import functools
import gzip
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["encoder", "small", "step", "loader", "growth", "memory", "scale", "all",
                                               "one"],
                        help="one: for this script itself")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda runs in bf16 autocast (default: cpu)")
    parser.add_argument("--encoder", default="swin_b", choices=["swin_b", "swin_l", "swin_t"])
    parser.add_argument("--size", type=int, nargs=3, default=[128, 96, 128], metavar=("D", "H", "W"))
    parser.add_argument("--batch_size", type=int, help="default: 1 for the encoder and 2 for the step, 4 on cuda")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each figure (default: 3)")
    parser.add_argument("--plot", metavar="FILE", help="growth: draw the curves")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    args = flags().parse_args()

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import losses
import model
import phantoms

# ------------------------------------------------------------------------------------------- one measurement

def peak():
    """High-water mark of this process's memory in GB: of the GPU where there is one in use."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def clock(work, device, times=1):
    """Seconds of one call, the median of `times`, after a call to warm up"""
    seconds = []
    for _ in range(times + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


SMALL = {"feature_size": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}     # stride 8


class MonaiSmall(torch.nn.Module):
    """The blocks of SMALL from MONAI, whose SwinTransformer always has four stages"""

    def __init__(self):
        super().__init__()
        from monai.networks.nets.swin_unetr import BasicLayer, PatchMerging
        self.embed = torch.nn.Conv3d(1, 24, 2, 2)
        self.stages = torch.nn.ModuleList(
            BasicLayer(dim, 2, heads, (4, 4, 4), [0.0, 0.0], qkv_bias=True, downsample=PatchMerging)
            for dim, heads in ((24, 2), (48, 4)))

    def forward(self, x):
        maps = [self.embed(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return [F.layer_norm(m.movedim(1, -1), m.shape[1:2]) for m in maps]


def build(library, encoder, use_checkpoint):
    if encoder == "small":
        return model.SwinTransformer3D(**SMALL) if library == "ours" else MonaiSmall()
    if library == "ours":
        return model.build_encoder(encoder, use_checkpoint=use_checkpoint)
    from monai.networks.nets.swin_unetr import SwinTransformer
    width = model.build_encoder(encoder).channels[0]
    return SwinTransformer(1, width, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24), use_checkpoint=use_checkpoint,
                           spatial_dims=3, use_flash_attention=library == "monai flash")


def measure_encoder(job):
    device, mode = job["device"], job["mode"]
    if job["encoder"] == "small":
        torch.set_num_threads(1)
    net = build(job["library"], job["encoder"], mode == "checkpoint").to(device)
    x = torch.rand(job["batch_size"], 1, *job["size"], device=device)
    net.train(mode != "forward")
    before = peak()

    def work():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"), torch.set_grad_enabled(mode != "forward"):
            out = net(x)
        if mode != "forward":
            sum(one.float().square().mean() for one in out).backward()
            net.zero_grad()
    return {"seconds": clock(work, device, 5 if device == "cuda" else 1), "gb": peak() - before}


def matrix_rate(job):
    """GFLOP/s of a large matrix product: the limit of this machine"""
    a, b = (torch.rand(2048, 2048, device=job["device"], dtype=torch.bfloat16 if job["device"] == "cuda" else torch.float32)
            for _ in range(2))
    return {"seconds": clock(lambda: a @ b, job["device"], 9), "gb": 0.0}


def pretraining(job):
    """An MG-3D with a text encoder of BERT's usual size (random weights), and a batch with `sentences` a report."""
    from transformers import BertConfig, BertModel
    from transformers.utils import logging
    logging.disable_progress_bar()
    words = ["nodule", "effusion", "lung", "heart", "normal", "size", "left", "right", "opacity", "is", "seen", "no"]
    rng = np.random.default_rng(0)
    reports = [" ".join(" ".join(rng.choice(words, 9)).capitalize() + "." for _ in range(job["sentences"]))
               for _ in range(job["batch_size"])]
    with tempfile.TemporaryDirectory() as folder:
        phantoms.make_demo_text_encoder(folder, reports)
        if job["encoder"] != "small":
            BertModel(BertConfig()).save_pretrained(folder)
        text_encoder = model.TextEncoder(folder)
        scan = Path(folder, "scan.nii.gz")
        nibabel.save(nibabel.Nifti1Image(rng.integers(-1000, 1000, (64, 64, 64)).astype(np.int16), np.diag([4, 4, 4, 1])), scan)
        items = [data.Item(str(i), scan, report, "train", str(i), None, None) for i, report in enumerate(reports)]
        make = functools.partial(data.pretraining_example, tokenizer=text_encoder.tokenizer,
                                 size=tuple(job["size"]), hu="header",
                                 mask_size=8 if job["encoder"] == "small" else 16)
        dataset = data.Examples(items, make)
        batch = data.collate([dataset[i, 0] for i in range(len(items))], text_encoder.tokenizer.pad_token_id)
    encoder = build("ours", job["encoder"], job["use_checkpoint"])
    network = model.MG3D(encoder, text_encoder, embed_dim=192 if job["encoder"] == "small" else 768)
    network.to(job["device"]).train()
    return network, {key: value.to(job["device"]) for key, value in batch.items() if torch.is_tensor(value)}


def measure_step(job):
    """A whole step, and its large parts by themselves; the rest is fusion, pooling, losses and bookkeeping."""
    device = job["device"]
    if job["encoder"] == "small":
        torch.set_num_threads(1)
    network, batch = pretraining(job)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-5)
    tokens = [side // network.encoder.stride for side in job["size"]]
    tokens = torch.rand(job["batch_size"], np.prod(tokens), network.image_proj.out_features, device=device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    before = peak()

    def step():
        with autocast:
            o = network(batch)
        loss = losses.mim_loss(o["recon"], batch["volume"], batch["volume_mask"]) + losses.mlm_loss(o["logits"], o["mlm_labels"])
        loss = loss + losses.sfr_loss(o["rebuilt"], o["sentences"], batch["sentence_mask"])
        loss = loss + losses.cml_loss(o["f_i"], o["h_i"], o["f_t"], o["h_t"]) + losses.dfa_loss(o["h_s"], o["f_i"])
        loss = loss + losses.ssm_loss(o["text_sentences"], o["visual_sentences"], batch["sentence_mask"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def encoder():
        with autocast:
            masks = torch.cat([batch["volume_mask"] * 0, batch["volume_mask"]])
            out = network.encoder(torch.cat([batch["volume"]] * 2), masks)[-1]
        out.float().square().mean().backward()

    def decoder():
        with autocast:
            out = network.mim_decoder(tokens.requires_grad_(), job["size"])
        out.float().square().mean().backward()

    def words():
        with autocast:
            network.text_encoder(batch["input_ids"], batch["attention_mask"])
            network.text_encoder(batch["masked_ids"], batch["attention_mask"])

    def sentences():
        with autocast:
            network.text_encoder.encode_sentences(batch["single_ids"], batch["single_mask"])
    out = {"seconds": clock(step, device), "gb": peak() - before}
    out["weights_gb"] = sum(p.numel() * p.element_size() for p in network.parameters()) / 1e9
    if job["parts"]:
        out["parts"] = {one.__name__: clock(one, device) for one in (encoder, decoder, words, sentences)}
    return out


def one(job):
    """Run a measurement in a process of its own -> its dict"""
    command = [sys.executable, __file__, "one", "--job", json.dumps(job)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def in_turns(jobs, rounds):
    """Medians of several measurements that take turns: [dict of seconds and gb]"""
    results = [[] for _ in jobs]
    for i in tqdm(range(rounds * len(jobs)), leave=False, disable=None):
        results[i % len(jobs)].append(one(jobs[i % len(jobs)]))
    return [{key: statistics.median(f[key] for f in found) for key in ("seconds", "gb")} for found in results]


def table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print(flush=True)


# ---------------------------------------------------------------------------------------------- the benchmarks

def encoder_flop(encoder, size):
    """Floating-point operations of a forward pass on one volume: matrix products alone, a multiply-add counted as two"""
    net = build("ours", encoder, False)
    full = SMALL["window_size"] if encoder == "small" else 7
    size = [-(-side // 2) for side in size]
    flop = 2 * np.prod(size) * 8 * net.channels[0]                                  # patch embedding
    for C in net.channels[:-1]:
        tokens = np.prod(size)
        for shifted in (False, True):
            _, _, groups, _ = model.window_plan(1, tuple(size), full, shifted, torch.device("cpu"))
            flop += 24 * tokens * C ** 2                                            # qkv 3, proj 1, mlp 8 matrices of C × C
            flop += sum(4 * number * n * (n + (p > 0)) * C for number, n, p in groups)
        size = [-(-side // 2) for side in size]
        flop += 2 * np.prod(size) * 8 * C * 2 * C                                   # merging
    return float(flop)


def libraries():
    """ours, and MONAI twice where it is installed"""
    try:
        import monai
        return ["ours", "monai", "monai flash"], f"MONAI {monai.__version__}"
    except ImportError:
        return ["ours"], "MONAI is not installed"


def against(value, goal, at_least):
    """The value beside its goal; marked where it falls short"""
    if goal is None or math.isnan(value):
        return f"{value:.3g}"
    met = value >= goal if at_least else value <= goal
    return f"{value:.3g} ({'≥' if at_least else '≤'} {goal:g}{'' if met else ', SHORT'})"


# What is aimed at: time of MONAI and of its flash option ÷ ours, our memory ÷ MONAI's, time ÷ the limit of matrix products.
GOALS = {"forward": (7.5, None, None, 2.5), "train": (4.5, None, 0.45, None), "checkpoint": (3.5, None, 0.35, None)}
GOALS_CUDA = {"train": (2, None, None, None)}


def encoder_bench(args):
    compared, version = libraries()
    batch = args.batch_size or (4 if args.device == "cuda" else 1)
    gflop = encoder_flop(args.encoder, args.size) * batch / 1e9
    rate = 2 * 2048 ** 3 / 1e9 / in_turns([{"kind": "matrix_rate", "device": args.device}], args.rounds)[0]["seconds"]
    print(f"encoder {args.encoder}, {batch} × {' × '.join(map(str, args.size))}, {args.device}, {version}, "
          f"{args.rounds} rounds; {gflop:.0f} GFLOP forward; the machine multiplies matrices at {rate:.0f} GFLOP/s")
    rows = []
    for mode, passes in (("forward", 1), ("train", 3), ("checkpoint", 4)):
        jobs = [{"kind": "measure_encoder", "library": one, "mode": mode, "device": args.device, "encoder": args.encoder,
                 "size": args.size, "batch_size": batch} for one in compared]
        ours, *others = in_turns(jobs, args.rounds)
        monai, flash = others or [{"seconds": float("nan"), "gb": float("nan")}] * 2
        limit = gflop * passes / rate
        goals = (GOALS_CUDA if args.device == "cuda" else GOALS).get(mode, (None,) * 4)
        rows.append([mode, ours["seconds"], monai["seconds"], flash["seconds"], limit,
                     against(monai["seconds"] / ours["seconds"], goals[0], True),
                     against(flash["seconds"] / ours["seconds"], goals[1], True), ours["gb"], monai["gb"],
                     against(ours["gb"] / monai["gb"] if monai["gb"] else float("nan"), goals[2], False),
                     against(ours["seconds"] / limit, goals[3], False)])
    table(["pass", "ours, s", "MONAI, s", "its flash, s", "limit, s", "MONAI ÷ ours", "flash ÷ ours", "ours, GB", "MONAI, GB",
           "our memory ÷ MONAI's", "ours ÷ limit"], rows)


def small_bench(args):
    """The small Swin of the demo on one thread, the pre-training step around it, and how fast phantoms are drawn"""
    compared, version = libraries()
    size, batch = [32, 32, 32], 24
    print(f"a Swin of 24 channels and 2 stages, {batch} × {' × '.join(map(str, size))}, one thread, {version}, {args.rounds} rounds")
    rows = []
    for mode, goal in (("forward", None), ("train", 5)):
        jobs = [{"kind": "measure_encoder", "library": one, "mode": mode, "device": "cpu", "encoder": "small", "size": size,
                 "batch_size": batch} for one in compared[:2]]
        ours, *monai = [found["seconds"] for found in in_turns(jobs, args.rounds)]
        ratio = monai[0] / ours if monai else float("nan")
        rows.append([mode, against(ours, 0.33 if mode == "train" else None, False), against(ratio, goal, True)])
    table(["pass", "ours, s", "MONAI ÷ ours"], rows)
    this = one({"kind": "measure_step", "device": "cpu", "encoder": "small", "size": size, "batch_size": batch, "sentences": 12,
                "use_checkpoint": False, "parts": True})
    parts = this["parts"] | {"rest": this["seconds"] - sum(this["parts"].values())}
    table(["part of a step with six losses, one thread", "seconds"],
          [[PARTS[key], value] for key, value in parts.items()] + [["whole step", against(this["seconds"], 1.3, False)]])
    with tempfile.TemporaryDirectory() as folder:
        phantoms.write_demo(folder, n=20)
        start = time.perf_counter()
        phantoms.write_demo(folder, n=200)
        print(f"phantoms drawn and written a second: {against(200 / (time.perf_counter() - start), 40, True)}\n")


PARTS = {"encoder": "encoder, whole and masked volume", "decoder": "MIM decoder",
         "words": "frozen text encoder: report, whole and masked", "sentences": "frozen text encoder: sentences one by one",
         "rest": "fusion, pooling, losses, clipping, AdamW"}


def step_bench(args):
    batch = args.batch_size or (4 if args.device == "cuda" else 2)
    job = {"kind": "measure_step", "device": args.device, "encoder": args.encoder, "size": args.size, "batch_size": batch, "sentences": 15,
               "use_checkpoint": False, "parts": True}
    print(f"a step with six losses, {args.encoder}, {batch} × {' × '.join(map(str, args.size))}, 15 sentences a report, "
          f"{args.device}")
    this = one(job)
    parts = this["parts"] | {"rest": this["seconds"] - sum(this["parts"].values())}
    rows = [[PARTS[key], value, 100 * value / this["seconds"]] for key, value in parts.items()]
    table(["part", "seconds", "% of the step"], rows + [["whole step", this["seconds"], 100.0]])
    print(f"peak {this['gb']:.2f} GB above parameters; {batch / this['seconds']:.3g} volumes a second\n")


def loader_bench(args):
    with tempfile.TemporaryDirectory() as folder:
        folder, size = Path(folder), tuple(args.size)
        # A scan of the usual size, with the noise that makes a gzip stream as long as that of a real one.
        rng = np.random.default_rng(0)
        scan = np.clip(rng.normal(-300, 60, (512, 512, 300)), -1024, 3000).astype(np.int16)
        scan[:100] = -1000
        image = nibabel.Nifti1Image(scan, np.diag([0.7, 0.7, 1.0, 1]))
        path = folder / "scan.nii.gz"
        path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1))
        item = data.Item(id="scan", volume=path, report="", split="train", labels=None, patient=None, rescale=None)

        def plain():
            array = torch.from_numpy(np.asarray(nibabel.load(path).dataobj).astype(np.float32))[None, None]
            F.interpolate(array, size=size, mode="trilinear")
        ours, reference = [], []
        for _ in range(args.rounds):
            ours.append(clock(lambda: data.load_volume(item, None, size), "cpu"))
            reference.append(clock(plain, "cpu"))
        ours, reference = statistics.median(ours), statistics.median(reference)
        table(["a 512 × 512 × 300 .nii.gz", "seconds"], [["preprocessing", ours], ["nibabel and one trilinear resize", reference],
                                                         ["ratio", ours / reference]])

        manifest = folder / "manifest.csv"
        for i in range(8):
            shutil.copy(path, folder / f"{i}.nii.gz")
        rows = [f"{i}.nii.gz,Heart size is normal. There is a nodule of {i} mm.\n" for i in range(8)]
        manifest.write_text("volume,report\n" + "".join(rows))
        rows = []
        for workers in (1, 2):
            start = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "data.py", "cache", "--data", manifest, "--out", folder / f"cache{workers}",
                            "--workers", str(workers), "--size", *map(str, size)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            rows.append([f"data.py cache --workers {workers}, 8 such scans", time.perf_counter() - start])
        items = data.load_items(folder / "cache2")
        phantoms.make_demo_text_encoder(folder / "text", [item.report for item in items])
        tokenizer = model.TextEncoder(str(folder / "text")).tokenizer
        make = functools.partial(data.pretraining_example, tokenizer=tokenizer, size=size)
        dataset = data.Examples(items, make)
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=data.Batches(len(items), 4), num_workers=2,
                                             collate_fn=functools.partial(data.collate, pad_id=tokenizer.pad_token_id))
        stream = iter(loader)
        for _ in range(4):
            next(stream)
        start = time.perf_counter()
        for _ in range(40):
            next(stream)
        rows.append(["a batch of 4 from the cache, 2 workers, nothing else to do", (time.perf_counter() - start) / 40])
        for script in ("pretrain.py", "eval.py"):
            def helped(script=script):
                subprocess.run([sys.executable, ROOT / script, "--help"], check=True, stdout=subprocess.DEVNULL)
            rows.append([f"{script} --help", clock(helped, "cpu", args.rounds)])
        table([f"at {' × '.join(map(str, size))}", "seconds"], rows)


def growth_bench(args):
    """Time and memory against size, each with the exponent of the power law that fits best"""
    base = {"kind": "measure_step", "device": args.device, "encoder": "swin_t", "size": [64, 64, 64], "batch_size": 2, "sentences": 8,
                "use_checkpoint": False, "parts": False}
    volumes = [[32, 32, 64], [64, 64, 64], [64, 64, 128], [64, 128, 128]]
    curves = {
        f"{args.encoder} forward and backward, voxels": [(float(np.prod(size)), {
            "kind": "measure_encoder", "library": "ours", "mode": "train", "device": args.device, "encoder": args.encoder, "size": size,
            "batch_size": 1}) for size in volumes],
        "step with swin_t at 64³, volumes a batch": [(n, base | {"batch_size": n}) for n in (2, 4, 8)],
        "step with swin_t at 64³, sentences a report": [(n, base | {"sentences": n}) for n in (2, 8, 32)]}
    results = {}
    for name, points in curves.items():
        x = np.array([at for at, _ in points], float)
        found = in_turns([job for _, job in points], args.rounds)
        seconds, gb = (np.array([one[key] for one in found]) for key in ("seconds", "gb"))
        results[name] = x, seconds, gb
        slopes = [float(np.polyfit(np.log(x), np.log(y), 1)[0]) for y in (seconds, gb)]
        rows = list(zip(map("{:g}".format, x), map(float, seconds), map(float, gb)))
        table([name, "seconds", "peak GB"], rows + [["exponent", *slopes]])
    if args.plot:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        fig, axes = plt.subplots(1, 3, figsize=(11, 3.2))
        for ax, (name, (x, seconds, gb)) in zip(axes, results.items()):
            ax.loglog(x, seconds, "o-", label="seconds")
            ax.loglog(x, gb, "s--", label="peak GB")
            ax.set_xticks(x, [f"{v:g}" if v < 1000 else f"{v / 1e6:.2g} M" for v in x])
            ax.minorticks_off()
            ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.set_xlabel(name.split(", ")[1])
            ax.set_title(name.split(",")[0], fontsize=9)
            ax.legend(fontsize=8)
        fig.tight_layout()
        fig.savefig(args.plot, dpi=120)


def memory_bench(args):
    """Peak of a whole step at two batch sizes; a straight line through them tells what would fit"""
    rows = []
    for use_checkpoint in (False, True):
        gb = []
        for batch in (1, 2):
            this = one({"kind": "measure_step", "device": args.device, "encoder": args.encoder, "size": args.size, "batch_size": batch,
                            "sentences": 15, "use_checkpoint": use_checkpoint, "parts": False})
            gb.append(this["gb"] + this["weights_gb"])
        fits = [max(0, int((0.9 * card - gb[0]) / (gb[1] - gb[0]) + 1)) for card in (8, 12, 24, 80)]
        rows.append([args.encoder, "yes" if use_checkpoint else "no", *gb, *fits])
    table(["encoder", "--use_checkpoint", "GB, batch 1", "GB, batch 2", "batch in 8 GB", "in 12 GB", "in 24 GB", "in 80 GB"], rows)


FILES = 128                                     # real .npy of a cache folder; its other names are links to them


def write_cache(folder, volumes, size):
    """A cache folder with the names of CT-RATE: real reports where there are some, else those of phantoms; links to few files"""
    folder.mkdir()
    with tempfile.TemporaryDirectory() as drawn:
        table, column, names = Path(os.environ.get("MG3D_REAL_DATA", drawn), "reports", "ct_rate_800.csv"), "report_text", data.LABELS
        if not table.exists():
            phantoms.write_demo(drawn, 64)
            table, column = Path(drawn, "manifest.csv"), "report"
        with open(table, newline="", encoding="utf-8") as file:
            said = [json.dumps({"split": "train", "labels": [float(row.get(name) or 0) for name in names], "report": row[column]})[1:]
                    for row in csv.DictReader(file)]
    data.begin_cache(folder, size, "auto", volumes)
    rng = np.random.default_rng(0)
    for k in range(FILES):
        with open(folder / f"{k}.real", "wb") as file:
            np.save(file, rng.random((1, *size), np.float32).astype(np.float16))
    patients = 1 + np.cumsum(rng.random(volumes) < 0.43)       # CT-RATE trains on 47,149 volumes of 20,000 patients
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"manifest-{k}-of-16.jsonl", "w")) for k in range(1, 17)]
        for i, patient in enumerate(tqdm(patients.tolist(), desc="write", disable=None)):
            name = f"train_{patient}_a_{i}"
            os.link(folder / f"{i % FILES}.real", folder / data.cache_name(name))
            files[data.shard_of(name, 16) - 1].write(
                f'{{"id": "{name}", "patient": "train_{patient}", "source": {{"path": "/gone/train/train_{patient}/{name}.nii.gz", '
                f'"size": 250000000, "mtime_ns": 1700000000000000000, "sha256": "{i:064x}"}}, {said[patient % len(said)]}\n')


class Cold(data.Examples):
    """Examples whose volume is not in the page cache"""

    def __getitem__(self, index_and_step):
        file = os.open(self.items[index_and_step[0]].volume, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
        return super().__getitem__(index_and_step)


def measure_scale(job):
    """What one of 64 processes with 4 volumes a step needs, from the start of `pretrain.main` to its batches"""
    import pretrain
    folder, size, begun, worked = Path(job["folder"]), tuple(job["size"]), time.perf_counter(), time.process_time()
    items, _ = pretrain.choose_items(argparse.Namespace(data=folder, seed=0, fraction=1.0), data.load_items(folder))
    data.check_prepared(items, size, "auto")
    data.patient_hashes(item.patient for item in items)
    out = {"open": time.perf_counter() - begun, "cpu": time.process_time() - worked}
    patients, per_epoch = [item.patient for item in items], len(items) // 256
    for name, step in (("shuffle", 0), ("resume", 5 * per_epoch // 2)):
        begun = time.perf_counter()
        next(iter(data.Batches(len(items), 4, 5, 64, 0, step, patients)))
        out[name] = time.perf_counter() - begun
    out["gb"] = peak()
    phantoms.make_demo_text_encoder(job["text"], [item.report for item in items[:1000]])
    tokenizer = model.TextEncoder(job["text"]).tokenizer
    make = functools.partial(data.pretraining_example, tokenizer=tokenizer, size=size)
    for name, kind in (("cold", Cold), ("warm", data.Examples)):
        loader = torch.utils.data.DataLoader(kind(items, make), batch_sampler=data.Batches(len(items), 4, patients=patients),
                                             num_workers=2, collate_fn=functools.partial(data.collate, pad_id=0))
        stream = iter(loader)
        for _ in range(40):                     # with those that were loaded ahead; all files are read once
            next(stream)
        begun = time.perf_counter()
        for _ in range(60):
            next(stream)
        out[name] = 60 / (time.perf_counter() - begun)
    if len(items) <= 100_000:
        order = np.zeros((per_epoch, 256), int)
        for rank in range(64):
            stream = iter(data.Batches(len(items), 4, rank, 64, 0, 0, patients))
            order[:, 4 * rank:4 * rank + 4] = [[index for index, _ in next(stream)] for _ in range(per_epoch)]
        numbers = np.unique(patients, return_inverse=True)[1]
        shuffled = np.random.default_rng((0, 0)).permutation(len(items))[:order.size].reshape(order.shape)
        out["once"] = len(np.unique(order)) == order.size
        out["steps"] = [sum(len(set(row)) < 256 for row in numbers[one]) for one in (shuffled, order)]
    return out


def scale_bench(args):
    rows, simulated = [], None
    for volumes in (50_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder, "cache")
            write_cache(cache, volumes, args.size)
            gb = sum(path.stat().st_size for path in cache.glob("manifest-*")) / 1e9
            this = one({"kind": "measure_scale", "folder": str(cache), "size": args.size, "text": str(Path(folder, "text"))})
        simulated = simulated or this
        rows.append([volumes, gb, against(this["open"], 60, False), this["cpu"],
                     against(this["gb"], 1.5, False), this["shuffle"],
                     against(this["resume"], 5, False), this["cold"], this["warm"]])
    table(["volumes", "manifests, GB", "open, s", "of the processor", "GB a process", "shuffle an epoch, s", "resume in the middle of one, s",
           "batches a second, cold", "warm"], rows)
    print(f"64 processes with 4 volumes each, 50,000 volumes: each once an epoch: {simulated['once']}; steps with a patient twice, "
          f"as shuffled and as kept apart: {simulated['steps'][0]} and {simulated['steps'][1]}\n")


if __name__ == "__main__":
    if args.what == "one":
        job = json.loads(args.job)
        torch.manual_seed(0)
        print(json.dumps(globals()[job["kind"]](job)))
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads"
              + (f", {torch.cuda.get_device_name()}" if args.device == "cuda" else ""))
        for name, bench in {"encoder": encoder_bench, "small": small_bench, "step": step_bench, "loader": loader_bench, "growth": growth_bench, "memory": memory_bench, "scale": scale_bench}.items():
            if args.what in (name, "all"):
                bench(args)
