"""What does each loss teach? Pre-trains several arms with several seeds and measures their encoders.

    python tests/reference.py --out reference                      the first pass: 4 arms, 3 seeds
    python tests/reference.py --out reference --arms six "clip alone" --seeds 1 2 3
    python tests/reference.py --out reference --arms "six + clip, real text" --text_encoder FOLDER

Every seed has phantoms of its own, drawn anew, 1001 to train on and 429 held out. Settings are those of the
demo but for three times its steps, in float32, on a GPU if there is one. What is done is not done again: an
interrupted pass goes on when it is started anew, and later passes add rows. Writes OUT/reference.csv, a row
a run, and reference.png, and prints the table: means and standard deviations over seeds, and paired 95 %
intervals (Student's t over seeds).
"""
import argparse
import csv
import functools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LEFT_OUT = {name: f"--no-{name}" for name in ("mim", "mlm", "sfr", "cml", "ssm", "dfa")}
CONTRASTS = "--no-cml --no-ssm --no-dfa"
PERMUTED = ", permuted"                         # the control of an arm
ARMS = {                                        # flags; None: the encoder as a run begins with it
    "scratch": None,
    "six": "",
    "six + clip": "--clip",
    "six + text": "--sentence_values text",
    "text without CML": "--sentence_values text --no-cml",
    "reconstructions + clip": f"{CONTRASTS} --clip",
    "clip alone": " ".join([*LEFT_OUT.values(), "--clip"]),
    "MIM alone": " ".join(flag for name, flag in LEFT_OUT.items() if name != "mim"),
    "six, real text": "",
    "six + clip, real text": "--clip",
    **{f"six + clip without {name}": f"{flag} --clip" for name, flag in LEFT_OUT.items()}}
ARMS |= {name + PERMUTED: f"{flags} --permute_reports" for name, flags in ARMS.items() if flags is not None}
FIRST_PASS = ["scratch", "six", "six + clip", "six + clip" + PERMUTED]
COLUMNS = {"probe": "probe, 1001 labels", "few": "probe, 100 labels", "finetuned": "fine-tuned, 100 labels",
           "retrieval": "Recall@42", "lesion": "attention on lesions above random"}


def train(flags, folder, manifest, seed, steps, text_encoder):
    """Run pretrain.py with the demo's settings, or go on with an interrupted run."""
    import pretrain
    settings = {name: value for name, value in pretrain.DEMO.items() if name != "clip"}
    settings |= {"data": manifest, "cache": folder.parent / "cache", "out": folder, "batch_size": 24,
                 "seed": seed, "steps": steps, "workers": 1, "precision": "fp32",
                 "text_encoder": text_encoder}
    command = [sys.executable, str(ROOT / "pretrain.py"), *flags.split()]
    for name, value in settings.items():
        command += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    if (folder / "last.pt").exists():
        command = [sys.executable, str(ROOT / "pretrain.py"), "--resume", "--out", str(folder)]
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True)


def fine_tune(encoder, items, cache, size, seed, labels=100, epochs=40):
    """Macro AUC on the held-out items after training all weights on a few labelled items"""
    import numpy as np
    import torch

    import data
    import eval as evaluation
    import model
    fit, held_out = evaluation.split_labelled(items)
    rng = np.random.default_rng(seed)
    chosen = [fit[i] for i in rng.choice(len(fit), labels, replace=False)]

    def load(items):
        return torch.stack([data.load_volume(item, cache, size) for item in items]).to(evaluation.DEVICE)
    volumes = load(chosen)
    truth = torch.tensor(np.stack([item.labels for item in chosen]), device=evaluation.DEVICE)
    torch.manual_seed(seed)
    network = model.Classifier(encoder, len(data.LABELS)).to(evaluation.DEVICE).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(labels), labels // 20):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(network(volumes[rows]), truth[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        scores = [network(load(held_out[i:i + 24])).cpu() for i in range(0, len(held_out), 24)]
    return evaluation.macro_auroc(torch.cat(scores).numpy(), np.stack([item.labels for item in held_out]))


def measure(folder, manifest, seed):
    """The columns of a run, {column: value}; of scratch those that need no text side"""
    import data
    import eval as evaluation
    import model
    import pretrain
    size, cache = tuple(pretrain.DEMO["size"]), folder.parent / "cache"
    items = data.load_items(manifest)
    held_out = [item for item in items if item.split != "train"]
    untrained = evaluation.untrained_encoder({"encoder": pretrain.DEMO["encoder"], "seed": seed, "init": None})
    network, encoder, row = None, untrained, {}
    if (folder / "last.pt").exists():
        network = evaluation.load_pretrained(folder / "last.pt", device=evaluation.DEVICE).network
        encoder = network.encoder
    before, after = (evaluation.probe_features(net.to(evaluation.DEVICE), items, cache, size, batch_size=24)
                     for net in (untrained, encoder))
    probe = evaluation.compare_probes(before, after, items, few=100)
    row |= {"probe": probe["pretrained"], "few": probe["few"]["pretrained"], "difference": probe["difference"]}
    if network is not None and network.text_pool is not None:
        row["retrieval"] = evaluation.retrieve_reports(network, held_out, cache, size)["value"]
    if network is not None and isinstance(network.sentence_attention, model.SentenceAttention):
        lesion = evaluation.lesion_attention(network, held_out, cache, size)
        row |= {"lesion": lesion["inside"] - lesion["random"], "lesion_attention": lesion}
    if network is not None:
        tokenizer = network.text_encoder.tokenizer
        examples = data.Examples(held_out, lambda item, generator: data.pretraining_example(
            item, generator, tokenizer, cache, size, mask_size=pretrain.DEMO["mask_size"]), seed)
        batches = pretrain.first_batches(
            examples, lambda rows: data.collate(rows, tokenizer.pad_token_id), 24, len(held_out))
        enabled = [name for name in model.LOSSES if name in network.losses]
        row["pairing"] = evaluation.pairing(network, batches, enabled, gradients=1)
    row["finetuned"] = fine_tune(encoder, items, cache, size, seed)         # last: it changes the encoder
    return row


def run(out, arm, seed, steps, text_encoder):
    """Train and measure one arm with one seed, unless that is done -> its row."""
    name = re.sub(r"\W+", "_", arm)
    folder = out / f"{name}_{seed}"
    result = folder / "measured.json"
    if not result.exists():
        import torch

        import eval as evaluation
        torch.set_num_threads(1)
        manifest = out / f"phantoms_{seed}" / "manifest.csv"
        folder.mkdir(parents=True, exist_ok=True)
        if ARMS[arm] is not None:
            train(ARMS[arm], folder, manifest, seed, steps, text_encoder if "real text" in arm else "demo")
        evaluation.write_result({"arm": arm, "seed": seed} | measure(folder, manifest, seed), result)
    return json.loads(result.read_text(encoding="utf-8"))


def t_interval(values):
    """Mean and 95 % interval over seeds (low, mean, high); nan with fewer than two"""
    import numpy as np
    from scipy.stats import t
    mean = float(np.mean(values))
    if len(values) < 2:
        return math.nan, mean, math.nan
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean - half, mean, mean + half


def paired(rows, arm, other, column):
    """t_interval of arm - other over the seeds that both have; None without one"""
    by_arm = [{row["seed"]: row[column] for row in rows if row["arm"] == name and column in row}
              for name in (arm, other)]
    seeds = sorted(by_arm[0].keys() & by_arm[1].keys())
    return t_interval([by_arm[0][seed] - by_arm[1][seed] for seed in seeds]) if seeds else None


def table(rows):
    """Markdown: a row an arm; means ± standard deviations, then paired differences of three columns"""
    import numpy as np
    lines = ["| arm | seeds | " + " | ".join(COLUMNS.values()) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for arm in arms:
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in rows if row["arm"] == arm and column in row]
            std = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{std}" if values else "")
        lines.append(f"| {arm} | {sum(row['arm'] == arm for row in rows)} | " + " | ".join(cells) + " |")
    for column in ("probe", "few", "finetuned"):
        lines.append(f"\n{COLUMNS[column]}, paired difference over seeds [95 %]")
        for arm in arms:
            for other in ("scratch", arm + PERMUTED):
                found = None if arm == other else paired(rows, arm, other, column)
                if found:
                    low, value, high = found
                    lines.append(f"  {arm} - {other}: {value:+.3f} [{low:+.3f}, {high:+.3f}]")
    return "\n".join(lines)


def picture(rows, path):
    """A panel a column: every run a point, every arm a line with its mean"""
    import numpy as np

    import eval as evaluation
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    with evaluation.figure(path, 1, len(COLUMNS), 2.6, 0.9 + 0.3 * len(arms)) as axes:
        for number, (ax, (column, title)) in enumerate(zip(axes[0], COLUMNS.items())):
            for place, arm in enumerate(arms):
                values = [row[column] for row in rows if row["arm"] == arm and column in row]
                if values:
                    ax.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5)
                    ax.plot([np.mean(values)], [place], "|", color="black", ms=14)
            ax.set(title=title, ylim=(len(arms) - 0.5, -0.5))
            ax.set_yticks(range(len(arms)), arms if number == 0 else [""] * len(arms))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reference"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=FIRST_PASS, metavar="ARM",
                        help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=390)
    parser.add_argument("--text_encoder", help="a Hugging Face folder, for the arms with a real text")
    parser.add_argument("--n", type=int, default=1430, help="phantoms a seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if any("real text" in arm for arm in args.arms) and not args.text_encoder:
        parser.error("the arms with a real text need --text_encoder FOLDER")
    import data
    import phantoms
    import pretrain
    for seed in args.seeds:
        manifest = phantoms.write_demo(args.out / f"phantoms_{seed}", args.n, seed)
        load = functools.partial(data.load_volume, cache=args.out / "cache", size=pretrain.DEMO["size"])
        for _ in data.in_processes(load, data.load_items(manifest), args.jobs, "prepare"):
            pass
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(run, args.out, arm, seed, args.steps, args.text_encoder)
                for arm in args.arms for seed in args.seeds]
        for job in as_completed(jobs):
            row = job.result()
            print(row["arm"], row["seed"], {name: round(row[name], 3) for name in COLUMNS if name in row}, flush=True)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in args.out.glob("*/measured.json")]
    order = list(ARMS)
    found.sort(key=lambda row: (order.index(row["arm"]), row["seed"]))
    with open(args.out / "reference.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["arm", "seed", *COLUMNS], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(found)
    picture(found, args.out / "reference.png")
    print(table(found))


if __name__ == "__main__":
    main()
