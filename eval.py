"""Metrics, probes and pictures of MG-3D.

    python eval.py probe --data demo --checkpoint out/last.pt        linear probe of a frozen encoder on the 18 findings

Nothing here knows a file format: volumes come from data.py, networks from model.py.
"""
import argparse
import json
import logging
import sys
from pathlib import Path


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("probe", help="linear probe of a frozen encoder on the 18 findings of CT-RATE",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", required=True, help="demo, a manifest with label columns, or a CT-RATE folder: fitted on train, reported on the rest")
    p.add_argument("--checkpoint", required=True, help="last.pt or encoder.pt of pretrain.py, or any file that load_weights knows")
    p.add_argument("--encoder", help="swin_b, swin_l, swin_t or unet; last.pt knows it by itself")
    p.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), help="input size; last.pt knows it by itself")
    p.add_argument("--hu", choices=["auto", "header", "csv"], help="how to come by Hounsfield units; last.pt knows it by itself, else auto")
    p.add_argument("--cache", default="cache", help="folder of preprocessed volumes")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--out", default="out/probe", help="folder for probe.json")
    return parser


if __name__ == "__main__":                              # before torch is imported: --help answers at once
    args = flags().parse_args()

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from tqdm import tqdm

import data
import model

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

log = logging.getLogger("mg3d")


# ---------------------------------------------------------------------------------------------------- metrics

def auroc(score, label):
    """Area under the ROC curve: the chance that a positive scores higher than a negative, ties counted half.

    score (n,), label (n,) of 0 and 1 -> float; nan where one class is absent (Mann-Whitney U).
    """
    score, positive = np.asarray(score), np.asarray(label).astype(bool)
    n_pos, n_neg = positive.sum(), (~positive).sum()
    if n_pos == 0 or n_neg == 0:
        return float("nan")
    return float((rankdata(score)[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def macro_auroc(scores, labels):
    """Mean AUROC over the columns of (n, k) that hold both classes; a label of NaN leaves that item out of its column."""
    known = ~np.isnan(labels)
    return float(np.nanmean([auroc(scores[k, j], labels[k, j]) for j, k in enumerate(known.T)]))


def bootstrap(metric, *arrays, times=1000, seed=0):
    """95 % percentile interval of metric(*arrays), items (dim 0) drawn anew `times` times -> (low, high)"""
    rng = np.random.default_rng(seed)
    n = len(arrays[0])
    draws = [metric(*(a[i] for a in arrays)) for i in rng.integers(0, n, (times, n))]
    return tuple(float(q) for q in np.nanpercentile(draws, [2.5, 97.5]))


# ----------------------------------------------------------------------------------------------- linear probe

@torch.no_grad()
def global_features(encoder, items, cache, size, hu="auto", batch_size=8):
    """The average of the encoder's last map for every volume: (n, C) float64 numpy"""
    encoder.eval()
    device = next(encoder.parameters()).device
    rows = []
    for i in tqdm(range(0, len(items), batch_size), desc="features", leave=False, disable=None):
        volumes = torch.stack([data.load_volume(item, cache, size, hu) for item in items[i:i + batch_size]])
        rows.append(encoder(volumes.to(device))[-1].float().mean((2, 3, 4)).cpu())
    return torch.cat(rows).double().numpy()


def ridge(x, y, x_new, penalties=np.logspace(-1, 5, 25)):
    """Ridge regression in closed form, the penalty with the least leave-one-out error: x (n, C), y (n, k) -> (m, k)"""
    mean, std = x.mean(0), x.std(0) + 1e-8
    x, x_new = (x - mean) / std, (x_new - mean) / std
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    y_mean = y.mean(0)
    uty, best = u.T @ (y - y_mean), (np.inf, None)
    for penalty in penalties:
        shrink = s ** 2 / (s ** 2 + penalty)
        leverage = np.einsum("ij,j,ij->i", u, shrink, u) + 1 / len(x)
        residual = (y - y_mean - u @ (shrink[:, None] * uty)) / (1 - leverage)[:, None]      # of the item left out
        best = min(best, (float((residual ** 2).mean()), float(penalty)))
    return x_new @ (vt.T @ ((s / (s ** 2 + best[1]))[:, None] * uty)) + y_mean


def split_labelled(items):
    """Items with all 18 labels -> (those to fit on: split train, those to report on: the others)."""
    labelled = [item for item in items if item.labels is not None and not np.isnan(item.labels).any()]
    fit, held_out = ([i for i in labelled if (i.split == "train") == train] for train in (True, False))
    if not fit or not held_out:
        raise ValueError(f"a probe needs labelled volumes of the split train and of another: found {len(fit)} and {len(held_out)}; "
                         f"a manifest has a column `split` and the columns {', '.join(data.LABELS[:2])}, …")
    return fit, held_out


def probe(encoder, items, cache, size, hu="auto", batch_size=8):
    """Scores of a linear probe: (scores (n, 18), labels (n, 18)) of the held-out items"""
    fit, held_out = split_labelled(items)
    x, x_new = (global_features(encoder, part, cache, size, hu, batch_size) for part in (fit, held_out))
    labels, truth = (np.stack([item.labels for item in part]).astype(float) for part in (fit, held_out))
    return ridge(x, labels, x_new), truth


# --------------------------------------------------------------------------------------------------- pictures

def read_log(path):
    """log.jsonl -> list of dicts; a last line that was cut off is left out"""
    text = Path(path).read_text()
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]


def plot_curves(log_path, out):
    """One panel a loss, and one for their weighted sum, over steps; the line is a running mean."""
    rows = read_log(log_path)
    names = [name for name in ("loss", *model.LOSSES) if name in rows[0]]
    fig, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names), 2.4), squeeze=False)
    for ax, name in zip(axes[0], names):
        steps, values = np.array([(row["step"], row[name]) for row in rows], float).T       # None becomes NaN: a gap
        width = max(1, len(values) // 10)
        kernel = np.ones(width) / width
        ax.plot(steps, values, color="0.8", lw=0.8)
        ax.plot(steps[width - 1:], np.convolve(values, kernel, "valid"), lw=1.5)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("step", fontsize=8)
        ax.tick_params(labelsize=7)
    fig.tight_layout()
    fig.savefig(out, dpi=120)
    plt.close(fig)


def _coronal(volume):
    """(1, D, H, W) -> the middle coronal slice (D, W), head up, the patient's right on the left, as radiologists look"""
    return volume[0, :, volume.shape[2] // 2].flip(0, 1).float().cpu().numpy()


@torch.no_grad()
def plot_reconstruction(network, batch, out):
    """The middle coronal slice of a few volumes: as it is, masked, and as MIM rebuilds the masked part."""
    recon = network(batch)["recon"].float()
    volume, mask = batch["volume"], batch["volume_mask"]
    rows = min(3, len(volume))
    fig, axes = plt.subplots(rows, 3, figsize=(7.5, 2.5 * rows), squeeze=False)
    for i in range(rows):
        pictures = volume[i], volume[i].masked_fill(mask[i], 0), torch.where(mask[i], recon[i].clamp(0, 1), volume[i])
        for ax, picture, title in zip(axes[i], pictures, ("volume", "masked", "reconstructed")):
            ax.imshow(_coronal(picture), cmap="gray", vmin=0, vmax=1)
            ax.set_title(title if i == 0 else "", fontsize=10)
            ax.axis("off")
    fig.tight_layout()
    fig.savefig(out, dpi=120)
    plt.close(fig)


@torch.no_grad()
def plot_attention(network, batch, out, sentences):
    """Where the first sentences of the first report look: the attention of Eq. (11) over the volume, mean of heads."""
    attention = network.sentence_attention
    count = min(4, len(sentences), int(batch["sentence_mask"][0].sum()))
    alone = network.text_encoder.encode_sentences(batch["single_ids"][:count], batch["single_mask"][:count])[None]     # (1, S, E_t)
    tokens = network.encode_image(batch["volume"][:1])                              # (1, N, E)
    q, k = (model._heads(x, attention.num_heads) for x in (attention.query(alone), attention.key(tokens)))
    maps = (q @ k.mT * q.shape[-1] ** -0.5).float().softmax(-1).mean(1)             # (1, S, N)
    size = batch["volume"].shape[2:]
    maps = maps.unflatten(-1, [side // network.encoder.stride for side in size])    # (1, S, d, h, w)
    maps = F.interpolate(maps, size=size, mode="trilinear")[0]                      # (S, D, H, W)
    fig, axes = plt.subplots(1, count, figsize=(3.2 * count, 3.4), squeeze=False)
    for ax, heat, sentence in zip(axes[0], maps, sentences):
        ax.imshow(_coronal(batch["volume"][0]), cmap="gray", vmin=0, vmax=1)
        ax.imshow(_coronal(heat[None]), cmap="inferno", alpha=0.45)
        ax.set_title(sentence if len(sentence) < 45 else sentence[:42] + "…", fontsize=7)
        ax.axis("off")
    fig.tight_layout()
    fig.savefig(out, dpi=120)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------- commands

def load_encoder(checkpoint, name=None):
    """An encoder with the weights of a file -> (encoder, config of the run or {}). `name` where the file does not know."""
    try:
        config = torch.load(checkpoint, map_location="cpu", weights_only=True).get("config", {})
    except Exception:                                   # load_weights says better what is wrong with the file
        config = {}
    name = name or config.get("encoder")
    if name is None:
        raise ValueError(f"{checkpoint} does not say which encoder it holds: give --encoder {'|'.join(model.ENCODERS)}")
    encoder = model.build_encoder(name)
    model.load_weights(encoder, checkpoint)
    return encoder, config


def probe_command(args):
    encoder, config = load_encoder(args.checkpoint, args.encoder)
    size = tuple(args.size or config.get("size") or data.SIZE)
    hu = args.hu or config.get("hu", "auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores, truth = probe(encoder.to(device), data.load_items(args.data, args.cache), args.cache, size, hu, args.batch_size)
    low, high = bootstrap(macro_auroc, scores, truth)
    result = {"macro_auc": macro_auroc(scores, truth), "interval": [low, high], "n": len(truth), "chance": 0.5,
              "auc": {name: auroc(s, t) for name, s, t in zip(data.LABELS, scores.T, truth.T)}}
    print(f"{'finding':40s} positives   AUC")
    for name, t in zip(data.LABELS, truth.T):
        print(f"{name:40s} {int(t.sum()):9d}  {result['auc'][name]:.3f}")
    print(f"macro AUC of 18 findings {result['macro_auc']:.3f} [{low:.3f}, {high:.3f}], n = {len(truth)}, chance 0.500")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "probe.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        {"probe": probe_command}[args.command](args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
