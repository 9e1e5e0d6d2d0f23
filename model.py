"""Everything of MG-3D that has parameters. `MG3D.forward` is the method.

Above it stand its parts: 3D encoders, the frozen text encoder, fusion attention. Below it stand the
heads of the tasks and the files of weights. B patients, C channels, D H W voxels (z, y, x),
N visual tokens, L report tokens, S sentences, E embedding, V vocabulary.
"""
import functools
import itertools
import json
import logging
import math
import re
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

log = logging.getLogger("mg3d")

LOSSES = ("mim", "mlm", "sfr", "cml", "ssm", "dfa", "clip")
PAD, BEGIN, END = range(3)                      # special tokens of the report generator
# Scores of all heads in a call to attention: in float32 16 MB for a CPU's cache; a GPU wants more.
SCORES_IN_A_CALL = {"cpu": 2 ** 22, "cuda": 2 ** 31}
# How the 8 sub-lattices of a map are merged.
# NOTE(compat): MONAI before 1.5, its SSL file and the authors' checkpoints take two of them twice ("v0.9").
# From 1.5 on it has "monai", and "mergingv2" where SwinUNETR is given that as its `downsample`.
MERGING_ORDERS = {"monai": ("000", "100", "010", "001", "110", "101", "011", "111"),
                  "v0.9": ("000", "100", "010", "001", "101", "010", "001", "111"),
                  "mergingv2": ("000", "001", "010", "011", "100", "101", "110", "111")}


# ------------------------------------------------------------------ 3D Swin Transformer: windows
# Attention within windows of 7×7×7 tokens is exact and needs no mask, no roll and no padded copy:
#   - tokens are sorted window by window, with one permutation that is computed once for a shape;
#   - a shifted window that wraps around the volume is cut at the seam into smaller windows;
#   - windows over the edge hold padding tokens, which all share one key and one value (the bias of
#     `qkv`): a single extra key stands for them, with the log-sum-exp of their biases;
#   - a CPU computes a few windows at a time, so that their scores stay in its cache.

@functools.lru_cache(maxsize=64)
def window_plan(batch, size, window, shift, device):
    """Which tokens share a window, for maps of `size` tokens; size, window and shift are (d, h, w).

    Returns (order, inverse, groups, pairs). `order` (B·d·h·w,) sorts tokens by group and window,
    `inverse` undoes it. A group has windows of one shape: (how many, n real and p padding tokens).
    `pairs`, (P,) and (P,): its n × (n + p) queries and keys, group by group, in the uncut window's raster.
    """
    padded = [-(-side // w) * w for side, w in zip(size, window)]
    token = np.full(padded, -1)                                         # -1 = padding
    token[:size[0], :size[1], :size[2]] = np.arange(np.prod(size)).reshape(size)
    token = np.roll(token, [-s for s in shift], axis=(0, 1, 2))
    piece = np.zeros(padded, int)  # numbers the sides of the seams
    for axis, s in enumerate(shift):
        if s:
            behind = (np.arange(padded[axis]) >= padded[axis] - s).astype(int)
            piece = 2 * piece + behind.reshape([-1 if a == axis else 1 for a in range(3)])

    def cut_into_windows(grid):
        grid = grid.reshape([n for p, w in zip(padded, window) for n in (p // w, w)])
        return grid.transpose(0, 2, 4, 1, 3, 5).reshape(-1, np.prod(window))  # (windows, tokens)

    groups = defaultdict(list)
    for tokens, pieces in zip(cut_into_windows(token), cut_into_windows(piece)):
        for number in np.unique(pieces):
            places = np.flatnonzero(pieces == number)
            real, padding = places[tokens[places] >= 0], places[tokens[places] < 0]
            if len(real):
                groups[tuple(real), tuple(padding)].append(tokens[real])
    first = np.arange(batch)[:, None] * np.prod(size)  # the first token of each map
    order = np.concatenate([(first + np.concatenate(windows)).ravel() for windows in groups.values()])
    pairs = np.hstack([np.reshape(np.meshgrid(real, real + padding, indexing="ij"), (2, -1))
                       for real, padding in groups])
    groups = [(batch * len(windows), len(real), len(padding))
              for (real, padding), windows in groups.items()]
    with torch.inference_mode(False):  # callers may infer; the plan is kept for training, too
        order, inverse, *pairs = (torch.from_numpy(places).to(device)
                                  for places in (order, order.argsort(), *pairs))
        return order, inverse, groups, pairs


class _Permute(torch.autograd.Function):
    """x[order]. No row repeats, so backward is the inverse permutation, not a slow scatter-add."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return grad[inverse], None, None


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ / √d + bias) v for W windows. Backward recomputes the scores, none are kept.

    q (W, heads, n, d); k, v (W, heads, m, d); bias (heads, n, m).
    """

    @staticmethod
    def forward(ctx, q, k, v, bias):
        bias = bias.detach().to(q.dtype)  # a bias that needs a gradient takes SDPA's slow path
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        ctx.save_for_backward(q, k, v, bias, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        # Under autocast, where a caller may have it, sums and softmax would fall back to float32.
        with torch.autocast(grad.device.type, enabled=False):
            return _Attention.gradients(grad, *ctx.saved_tensors)

    @staticmethod
    def gradients(grad, q, k, v, bias, out):
        d = q.shape[-1]
        q, k = (q * d ** -0.5).contiguous(), k.contiguous()
        weights = (q @ k.mT).add_(bias).softmax(-1)                     # (W, heads, n, m)
        # The gradient of a score is weight · (gradient of the weight - Σ grad · out). A column
        # beside `grad`, against a column of ones beside v, subtracts that sum within the product.
        column = -(grad * out).sum(-1, keepdim=True)                    # (W, heads, n, 1)
        grad, v = torch.cat([grad, column], -1), F.pad(v, (0, 1), value=1)
        grad_scores = (grad @ v.mT).mul_(weights)
        # (aᵀ b)ᵀ is bᵀ a, and quicker: the large matrix is read row by row.
        grad_q, grad_k = grad_scores @ k * d ** -0.5, (q.mT @ grad_scores).mT
        return grad_q, grad_k, (grad[..., :d].mT @ weights).mT, grad_scores.sum(0)


class WindowAttention(nn.Module):
    def __init__(self, dim, num_heads, window_size):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        width = 2 * window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.empty(width ** 3, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        place = torch.cartesian_prod(*[torch.arange(window_size)] * 3)  # (tokens, 3)
        offset = place[:, None] - place[None] + window_size - 1         # (tokens, tokens, 3)
        base = torch.tensor([width ** 2, width, 1])
        self.register_buffer("relative_position_index", (offset * base).sum(-1))  # (tokens, tokens)

    def biases(self, groups, pairs):
        """Of each group (heads, n, n); with padding (heads, n, n + 1): the last key stands for all of it"""
        # NOTE(compat): a window shrunk to a small map keeps the first n places of the full window's
        # raster, as if cut by `relative_position_index[:n, :n]`: published weights were trained so.
        index = self.relative_position_index[tuple(pairs)]              # (pairs,)
        # unbind and stack: the gradient of a transposed view would not lie as DDP's buckets do
        table = torch.stack(self.relative_position_bias_table.unbind(1))  # (heads, offsets)
        columns = table.gather(1, index.expand(len(table), -1))         # (heads, pairs)
        biases = []
        for (_, n, p), bias in zip(groups, columns.split([n * (n + p) for _, n, p in groups], dim=1)):
            bias = bias.unflatten(1, (n, n + p))
            if p:
                bias = torch.cat([bias[..., :n], bias[..., n:].logsumexp(-1, keepdim=True)], dim=-1)
            biases.append(bias)
        return biases

    def forward(self, x, windows):
        """x (tokens, C), window by window -> the same shape; windows: pairs (how many, bias)"""
        tokens, C = x.shape
        qkv = self.qkv(x).view(tokens, 3, self.num_heads, -1)
        padding = self.qkv.bias.to(qkv.dtype).view(3, 1, self.num_heads, 1, -1)  # LN(0) W + b = b
        done = []
        sizes = [number * bias.shape[1] for number, bias in windows]
        for (number, bias), group in zip(windows, qkv.split(sizes)):
            q, k, v = (y.transpose(1, 2) for y in group.unflatten(0, (number, -1)).unbind(2))
            if bias.shape[-1] > bias.shape[1]:
                k = torch.cat([k, padding[1].expand(number, -1, -1, -1)], dim=2)
                v = torch.cat([v, padding[2].expand(number, -1, -1, -1)], dim=2)
            out = _Attention.apply(q, k, v, bias)                       # (number, heads, n, d)
            done.append(out.transpose(1, 2).reshape(-1, C))
        return self.proj(torch.cat(done))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.linear2(F.gelu(self.linear1(x)))


class SwinBlock(nn.Module):
    def __init__(self, dim, num_heads, window_size, shifted, use_checkpoint):
        super().__init__()
        self.window_size, self.shifted, self.use_checkpoint = window_size, shifted, use_checkpoint
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def run_windows(self, x, windows):
        x = x + self.attn(self.norm1(x), windows)                       # (tokens, C)
        return x + self.mlp(self.norm2(x))

    def forward(self, x):
        """x (B, d, h, w, C) -> the same shape"""
        B, *size, C = x.shape
        # NOTE(compat): along an axis that one window covers, the window shrinks to the map, unshifted.
        window = tuple(min(side, self.window_size) for side in size)
        half = self.window_size // 2
        shift = tuple(half if self.shifted and side > self.window_size else 0 for side in size)
        # Where torch.export traces, tensors are symbols, which must not stay in the cache.
        plan = window_plan.__wrapped__ if torch.compiler.is_compiling() else window_plan
        order, inverse, groups, pairs = plan(B, tuple(size), window, shift, x.device)
        x = _Permute.apply(x.reshape(-1, C), order, inverse)            # (B·d·h·w, C), sorted
        calls, room = [], 0
        for (number, _, _), bias in zip(groups, self.attn.biases(groups, pairs)):
            while number:
                if room < bias.numel():
                    calls.append([])
                    room = max(SCORES_IN_A_CALL[x.device.type], bias.numel())
                taken = min(number, room // bias.numel())
                calls[-1].append((taken, bias))
                number, room = number - taken, room - taken * bias.numel()
        done = []
        sizes = [sum(number * bias.shape[1] for number, bias in windows) for windows in calls]
        for windows, tokens in zip(calls, x.split(sizes)):
            if self.use_checkpoint and torch.is_grad_enabled():
                done.append(checkpoint(self.run_windows, tokens, windows, use_reentrant=False,
                                       preserve_rng_state=False))
            else:
                done.append(self.run_windows(tokens, windows))
        return _Permute.apply(torch.cat(done), inverse, order).view(B, *size, C)


class PatchMerging(nn.Module):
    """Halve a map: the 8 tokens of every 2×2×2 cube are concatenated, normed and reduced to 2C."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x, merging):
        """x (B, d, h, w, C) -> (B, d/2, h/2, w/2, 2C); odd sides are padded with zeros"""
        _, d, h, w, _ = x.shape
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
        lattices = [x]                          # of even and odd planes: 000, 001, 010, … 111
        for axis in (1, 2, 3):                  # unbind, as the gradient of a slice is mostly zeros
            lattices = [half for m in lattices for half in m.unflatten(axis, (-1, 2)).unbind(axis + 1)]
        x = torch.cat([lattices[int(bits, 2)] for bits in MERGING_ORDERS[merging]], dim=-1)
        return self.reduction(self.norm(x))


class PatchEmbed(nn.Module):
    def __init__(self, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=2, stride=2)
        # Volumes in [0, 1] have mean 0.4 and deviation 0.25, about. The first weights
        # standardise them: otherwise features of different patients start almost equal (cosine
        # 0.997) and the contrastive losses start slowly.
        with torch.no_grad():
            self.proj.weight *= 4
            self.proj.bias -= 0.4 * self.proj.weight.sum((1, 2, 3, 4))


def _optional_mask_token(module, state_dict, prefix, *_):
    """Foreign state dicts have no mask token; allow strict loading without it."""
    state_dict.setdefault(prefix + "mask_token", module.mask_token)


class SwinTransformer3D(nn.Module):
    """3D Swin Transformer with names and numbers of MONAI's `SwinTransformer` (Hatamizadeh 2022).

    feature_size: width after patch embedding, doubled by each stage; depths, num_heads: of each stage,
    any number of them; window_size: in tokens; merging: a key of MERGING_ORDERS;
    use_checkpoint: recompute blocks in the backward pass; use_v2: MONAI's second version, with a
    residual convolution block before each stage. ValueError for an unknown merging.
    """
    patch = 2

    def __init__(self, in_channels=1, feature_size=48, depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24),
                 window_size=7, merging="monai", use_checkpoint=False, use_v2=False):
        super().__init__()
        if merging not in MERGING_ORDERS:
            raise ValueError(f"found merging {merging!r}, expected one of {list(MERGING_ORDERS)}")
        self.merging, self.use_checkpoint = merging, use_checkpoint
        self.settings = {"in_channels": in_channels, "feature_size": feature_size, "depths": depths,
                         "num_heads": num_heads[:len(depths)], "window_size": window_size}
        self.channels = [feature_size * 2 ** i for i in range(len(depths) + 1)]
        self.stride = self.patch * 2 ** len(depths)                     # of the last map
        self.patch_embed = PatchEmbed(in_channels, feature_size)
        for i, (dim, depth, heads) in enumerate(zip(self.channels, depths, num_heads)):
            blocks = [SwinBlock(dim, heads, window_size, k % 2 == 1, use_checkpoint) for k in range(depth)]
            stage = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "downsample": PatchMerging(dim)})
            setattr(self, f"layers{i + 1}", nn.ModuleList([stage]))     # MONAI's names
        self.mask_token = nn.Parameter(torch.zeros(feature_size))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self._register_load_state_dict_pre_hook(_optional_mask_token, with_module=True)     # public in 2.5
        self.set_v2(use_v2)

    def set_v2(self, use_v2):
        """Put a new convolution block before each stage, or take them away."""
        self.use_v2 = use_v2
        for i, dim in enumerate(self.channels[:-1]):
            block = nn.ModuleList([_named("layer", ResBlock(dim, dim))]) if use_v2 else None
            setattr(self, f"layers{i + 1}c", block)                     # MONAI's names
        self.to(self.mask_token.device)

    def convolve(self, x, block):
        """The block of a stage on a map (B, d, h, w, C)"""
        x = x.permute(0, 4, 1, 2, 3)
        recompute = self.use_checkpoint and torch.is_grad_enabled()
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x.permute(0, 2, 3, 4, 1)

    def forward(self, x, mask=None):
        """x (B, C_in, D, H, W), mask (B, 1, D, H, W) with 1 = masked -> maps (B, C·2^i, D/2^(i+1), ...)

        A patch with any masked voxel becomes the mask token.
        """
        D, H, W = x.shape[2:]
        x = self.patch_embed.proj(F.pad(x, (0, W % 2, 0, H % 2, 0, D % 2))).permute(0, 2, 3, 4, 1)
        if mask is not None:
            mask = F.max_pool3d(mask.to(x.dtype), self.patch, ceil_mode=True)  # (B, 1, d, h, w)
            x = torch.where(mask.permute(0, 2, 3, 4, 1) > 0, self.mask_token.to(x.dtype), x)
        maps = [x]                                                      # (B, d, h, w, C)
        for i in range(len(self.channels) - 1):
            stage = getattr(self, f"layers{i + 1}")[0]
            if self.use_v2:
                x = self.convolve(x, getattr(self, f"layers{i + 1}c")[0])
            for block in stage["blocks"]:
                x = block(x)
            x = stage["downsample"](x, self.merging)
            maps.append(x)
        # NOTE(compat): every map that leaves the encoder passes a parameter-free LayerNorm.
        return [F.layer_norm(m, m.shape[-1:]).permute(0, 4, 1, 2, 3) for m in maps]


class UNetEncoder(nn.Module):
    """The contracting path of a plain 3D U-Net (Çiçek et al. 2016), the paper's second backbone."""
    stride, merging, use_v2 = 16, None, False

    def __init__(self, in_channels=1, feature_size=32, use_checkpoint=False):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.settings = {"in_channels": in_channels, "feature_size": feature_size}
        self.channels = [feature_size * 2 ** i for i in range(5)]
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv3d(c_in, c, 3, padding=1), nn.GroupNorm(8, c), nn.ReLU(),
                          nn.Conv3d(c, c, 3, padding=1), nn.GroupNorm(8, c), nn.ReLU())
            for c_in, c in zip([in_channels] + self.channels, self.channels))
        self.mask_token = nn.Parameter(torch.zeros(in_channels))
        self._register_load_state_dict_pre_hook(_optional_mask_token, with_module=True)     # public in 2.5

    def forward(self, x, mask=None):
        """x (B, C_in, D, H, W), mask (B, 1, D, H, W) with 1 = masked -> 5 maps (B, C·2^i, D/2^i, ...)"""
        if mask is not None:  # there are no patches: masked voxels become the token
            x = torch.where(mask > 0, self.mask_token.view(1, -1, 1, 1, 1).to(x.dtype), x)
        maps = []
        for i, level in enumerate(self.levels):
            x = F.max_pool3d(x, 2) if i else x
            recompute = self.use_checkpoint and torch.is_grad_enabled()
            x = checkpoint(level, x, use_reentrant=False) if recompute else level(x)
            maps.append(x)
        return maps


ENCODERS = {"swin_b": functools.partial(SwinTransformer3D, feature_size=48),
            "swin_l": functools.partial(SwinTransformer3D, feature_size=96),
            "swin_t": functools.partial(SwinTransformer3D, feature_size=24, depths=(1, 2),  # the demo's
                                        num_heads=(1, 2), window_size=4),
            "unet": UNetEncoder}


def build_encoder(name, in_channels=1, **kwargs):
    """One of ENCODERS by name; kwargs go to its constructor. ValueError for an unknown name."""
    if name not in ENCODERS:
        raise ValueError(f"found the encoder {name!r}, expected one of {', '.join(ENCODERS)}")
    return ENCODERS[name](in_channels=in_channels, **kwargs)


# ------------------------------------------------------------------------------------------ text

class TextEncoder(nn.Module):
    """A frozen BERT- or RoBERTa-like Hugging Face encoder with its fast tokenizer: hub name or folder.

    Frozen means no gradient and no dropout, whatever the mode of the model around it. ValueError,
    naming the folder and what is wrong, unless model and tokenizer are whole and fit each other.
    """
    max_tokens = 250                            # of a report, as in `data.tokenize_report`

    def __init__(self, name):
        super().__init__()
        from transformers import AutoModel, AutoTokenizer  # slow to import, and needed only here
        self.name = name
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
            self.bert, info = AutoModel.from_pretrained(name, trust_remote_code=False,
                                                        output_loading_info=True)
        except Exception as error:  # noqa: BLE001 - a torn file fails in many ways
            self.refuse(error, "hub name or folder of a Hugging Face encoder with tokenizer and weights")
        self.bert.float()  # files may be in half precision; autocast casts by itself
        self.requires_grad_(False)
        self.eval()
        self.check_tokenizer()
        self.check_model(info)
        self.width = self.bert.config.hidden_size
        special = {self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id}
        self.register_buffer("special_ids", torch.tensor(sorted(special - {None})))

    def refuse(self, found, expected):
        raise ValueError(f"text encoder {self.name}: found {found}; expected {expected}") from None

    def check_tokenizer(self):
        """ValueError unless it is fast, knows words, and has the tokens that training needs."""
        if not self.tokenizer.is_fast:
            self.refuse("a slow tokenizer", "tokenizer.json: a fast one knows where words begin and end")
        # Without its files, transformers makes a tokenizer of special tokens only.
        words = self.tokenizer.get_vocab().keys() - set(self.tokenizer.all_special_tokens)
        if not any(map(str.isalpha, "".join(words))):
            self.refuse("a tokenizer that knows no word", "its files, tokenizer.json or vocab.txt")
        for token in ("mask_token", "pad_token"):
            if getattr(self.tokenizer, token) is None:
                self.refuse(f"a tokenizer without {token}", "mask and padding, as BERT and RoBERTa have")

    def check_model(self, info):
        """ValueError unless it is an encoder, filled by its file, that reads every token of a report."""
        parts = {key.split(".")[0] for key in self.bert.state_dict()} - {"pooler"}      # which is not used
        for kind, pattern in (("missing", ""), ("unexpected", r"\.\d+\.")):  # layers have numbers
            keys = [key for key in sorted(info[f"{kind}_keys"])
                    if parts.intersection(key.split(".")[:2]) and re.search(pattern, key)]
            if keys:
                self.refuse(f"{len(keys)} {kind} weights, such as {keys[:3]}", "those of its config.json")
        check_finite(f"text encoder {self.name}", self.bert.state_dict())
        rows = self.bert.get_input_embeddings().num_embeddings
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values())  # some numbers may have no token
        if self.vocab_size > rows:
            self.refuse(f"a token {self.vocab_size - 1} and an embedding of {rows} rows",
                        "a row for every token")
        if self.bert.config.is_encoder_decoder:
            self.refuse(f"{type(self.bert).__name__}, which has a decoder", "an encoder alone")
        ids = torch.full((2, 1, self.max_tokens), self.tokenizer.mask_token_id)
        ids[1, 0, -1] = self.tokenizer.pad_token_id
        try:
            first, second = (self(report, torch.ones_like(report)) for report in ids)
        except Exception as error:  # noqa: BLE001 - each model has its own way to fail
            self.refuse(f"a model that cannot read {self.max_tokens} tokens ({error})",
                        "an encoder of text with as many positions")
        if torch.equal(first[:, 0], second[:, 0]):
            self.refuse("a model whose words do not see the words behind them", "an encoder")

    def check_words(self, texts, source):
        """ValueError if the tokenizer does not know most words of texts from `source`."""
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = list(itertools.chain(*encoded))
        unknown = tokens.count(self.tokenizer.unk_token_id)
        if 2 * unknown > len(tokens):
            self.refuse(f"{unknown} unknown words among {len(tokens)} of {source}", "one that knows most")

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, input_ids, attention_mask):
        """(B, L), (B, L) -> word features (B, L, E_t)"""
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def encode_sentences(self, input_ids, attention_mask):
        """T sentences encoded one by one: (T, L), (T, L) -> mean of their word features (T, E_t)"""
        sentence_ids = -torch.isin(input_ids, self.special_ids).long()  # 0 = word, -1 = none
        return sentence_mean(self(input_ids, attention_mask), sentence_ids, 1).squeeze(1)


def sentence_mean(words, sentence_ids, num_sentences):
    """Mean word feature of each sentence: words (B, L, E), sentence_ids (B, L), -1 = none -> (B, S, E)"""
    numbers = torch.arange(num_sentences, device=words.device)
    is_member = (sentence_ids[:, None] == numbers[:, None]).to(words.dtype)  # (B, S, L)
    return is_member @ words / is_member.sum(-1, keepdim=True).clamp(min=1)


# ---------------------------------------------------------------------------------------- fusion

def _split_heads(x, num_heads):
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)     # (B, L, E) -> (B, heads, L, d)


class FusionAttention(nn.Module):
    """The paper's cross-modal attention, Eq. (1, 3), Fig. 4b: guide tokens are queries, dominant tokens
    keys and values.

    NOTE(paper): one map a guide token. Here each of several heads has one, as usual.
    Every guide token makes its own map over the dominant tokens, the map weighs the values
    one by one, and the weighted copies are averaged over the guide. As the values do not depend on the
    guide token, that is the averaged map times the values: no (guide × dominant × E) tensor is made.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, dominant, guide, dominant_mask=None, guide_mask=None):
        """dominant (B, N, E), guide (B, G, E), masks (B, N) and (B, G), True = real -> (B, N, E)"""
        B, N, _ = dominant.shape
        q = _split_heads(self.query(guide), self.num_heads)             # (B, heads, G, d)
        k = _split_heads(self.key(dominant), self.num_heads)            # (B, heads, N, d)
        v = _split_heads(self.value(dominant), self.num_heads)
        scores = q @ k.mT * q.shape[-1] ** -0.5                         # (B, heads, G, N)
        if dominant_mask is not None:
            scores = scores.masked_fill(~dominant_mask[:, None, None], torch.finfo(scores.dtype).min)
        maps = scores.softmax(-1)                                       # one a guide token
        if guide_mask is None:
            attention = maps.mean(2)                                    # (B, heads, N)
        else:
            weight = guide_mask / guide_mask.sum(-1, keepdim=True).clamp(min=1)  # (B, G), sums to 1
            attention = torch.einsum("bhgn,bg->bhn", maps, weight.to(maps.dtype))
        # NOTE(paper): a map sums to 1 over N tokens and would shrink the values N-fold. Times N,
        # uniform attention leaves them as they are.
        count = N if dominant_mask is None else dominant_mask.sum(-1).view(B, 1, 1)
        fused = (attention * count).to(v.dtype)[..., None] * v          # Eq. (1, 3)
        return self.out(fused.transpose(1, 2).flatten(2))


class ClassicalAttention(nn.Module):
    """Ordinary cross attention, Fig. 4a: dominant tokens are queries, guide tokens keys and values.

    With the dominant tokens as their own guide it is self-attention. query_dim: their width if not `dim`.
    """

    def __init__(self, dim, num_heads, query_dim=None):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(query_dim or dim, dim)
        self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, dominant, guide, dominant_mask=None, guide_mask=None):
        """The arguments of FusionAttention -> (B, N, E); outputs at padded queries mean nothing"""
        q = _split_heads(self.query(dominant), self.num_heads)          # (B, heads, N, d)
        k = _split_heads(self.key(guide), self.num_heads)               # (B, heads, G, d)
        v = _split_heads(self.value(guide), self.num_heads)
        mask = None if guide_mask is None else guide_mask[:, None, None]
        fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, N, d)
        return self.out(fused.transpose(1, 2).flatten(2))

    def maps(self, dominant, guide):
        """The attention itself, for pictures: (B, N, E), (B, G, E) -> (B, heads, N, G)"""
        q = _split_heads(self.query(dominant), self.num_heads)
        k = _split_heads(self.key(guide), self.num_heads)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


class SentenceAttention(ClassicalAttention):
    """Eq. (11): every sentence collects the visual tokens that it speaks of."""
    # NOTE(paper): the one key of Eq. (11) is the pooled volume. A softmax over one key
    # is 1: H_S would not depend on the sentence. Here keys and values are the N tokens of the volume.
    # NOTE(paper): silent on norms. Without them, and with biases, all sentences of a volume see the
    # same mixture of tokens: the cosine of their H_S is 0.9999.

    def __init__(self, dim, num_heads, query_dim):
        super().__init__(dim, num_heads, query_dim)
        self.norm_query, self.norm_tokens = nn.LayerNorm(query_dim), nn.LayerNorm(dim)
        nn.init.zeros_(self.value.bias)
        nn.init.zeros_(self.out.bias)

    def normed(self, sentences, tokens):
        if tokens.shape[1] > 1:                 # a single token is its own mean
            tokens = tokens - tokens.mean(1, keepdim=True)
        return self.norm_query(sentences), self.norm_tokens(tokens)

    def forward(self, sentences, tokens):
        """sentences (B, S, E_t), tokens (B, N, E) -> H_S (B, S, E)"""
        return super().forward(*self.normed(sentences, tokens))

    def maps(self, sentences, tokens):
        return super().maps(*self.normed(sentences, tokens))


class SentenceGate(nn.Module):
    """Eq. (11) as in the authors' released code: the volume asks, the sentence has key and value.

    H_S[s] = σ(q(F_I_bar) · k(F_S*[s]) / √E) v(F_S*[s]): text, of which the volume sets only the
    length. A cosine does not see a length: SSM sees nothing of the volume here, and DFA contrasts
    volumes with texts.
    """

    def __init__(self, dim, query_dim):
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key, self.value = nn.Linear(query_dim, dim), nn.Linear(query_dim, dim)

    def forward(self, sentences, tokens):
        """sentences (B, S, E_t), tokens (B, N, E) -> H_S (B, S, E)"""
        q, k = self.query(tokens.mean(1, keepdim=True)), self.key(sentences)  # (B, 1, E), (B, S, E)
        return (k @ q.mT * q.shape[-1] ** -0.5).sigmoid() * self.value(sentences)


class FusionLayer(nn.Module):
    """Self-attention on the dominant tokens, cross-modal attention, feed-forward; pre-norm, residual."""

    def __init__(self, dim, num_heads, attention):
        super().__init__()
        self.norm1, self.norm2, self.norm_guide, self.norm3 = (nn.LayerNorm(dim) for _ in range(4))
        self.self_attention = ClassicalAttention(dim, num_heads)
        cross_attention = {"proposed": FusionAttention, "classical": ClassicalAttention}[attention]
        self.cross_attention = cross_attention(dim, num_heads)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x, guide, mask=None, guide_mask=None):
        y = self.norm1(x)
        x = x + self.self_attention(y, y, mask, mask)
        x = x + self.cross_attention(self.norm2(x), self.norm_guide(guide), mask, guide_mask)
        return x + self.mlp(self.norm3(x))                              # (B, N, E)


class Fusion(nn.Module):
    """A stack of fusion layers with a final norm."""
    # NOTE(paper): silent on dropout, on modality embeddings, and on a guide that changes from
    # layer to layer. There is none of them.

    def __init__(self, dim, num_layers, num_heads, attention):
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(dim, num_heads, attention) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, dominant, guide, dominant_mask=None, guide_mask=None):
        x = dominant
        for layer in self.layers:
            x = layer(x, guide, dominant_mask, guide_mask)
        return self.norm(x)


class AttentionPool(nn.Module):
    """Self-attention pooling: tokens weighted by a softmax of their own scores."""
    # NOTE(paper): it says no more than "a self-attention pooling layer"; this is the additive one of
    # Lin et al. 2017.

    def __init__(self, dim):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1))

    def forward(self, x, mask):
        """x (B, S, E), mask (B, S) -> (B, E)"""
        score = self.score(x).squeeze(-1).float()                       # (B, S)
        weight = score.masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1)
        return torch.einsum("bs,bse->be", weight.to(x.dtype), x)


class VolumeDecoder(nn.Module):
    """Fused tokens to a volume: 3×3×3 convolutions, each followed by ×2 trilinear up-sampling."""
    # NOTE(paper): no norm is named. One over all channels keeps their ratios; one for each channel would
    # leave only signs of a map of two voxels, and nothing of a map of one.

    def __init__(self, dim, stride):
        super().__init__()
        self.stride = stride
        widths = [max(dim // 2 ** i, 8) for i in range(stride.bit_length())]  # halved as the size doubles
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv3d(c_in, c, 3, padding=1), nn.GroupNorm(1, c), nn.LeakyReLU(0.1),
                          nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False))
            for c_in, c in itertools.pairwise(widths))
        self.out = nn.Conv3d(widths[-1], 1, 3, padding=1)

    def forward(self, tokens, size):
        """tokens (B, d·h·w, E), size (D, H, W) -> (B, 1, D, H, W)"""
        x = tokens.mT.unflatten(-1, [side // self.stride for side in size])     # (B, E, d, h, w)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


# ------------------------------------------------------------------------------------------ MG3D

def in_one_pass(module, *calls):
    """Several calls of a module, tuples of arguments (B, ...), as one call with one large batch.

    Returns the output of each call. A call that is False is not made; its output is None.
    """
    made = [call for call in calls if call]
    arguments = [None if column[0] is None else torch.cat(column) for column in zip(*made)]
    outputs = iter(module(*arguments).chunk(len(made)) if made else ())
    return [next(outputs) if call else None for call in calls]


class MG3D(nn.Module):
    """The pre-training model. Only what the enabled `losses` need is built and computed.

    losses: some of LOSSES; embed_dim: E, a multiple of num_heads or ValueError; guidance of the
    image-dominant stack: "sentence" or "word"; mim_attention, mlm_attention: "proposed" or "classical";
    sentence_values: where H_S comes from, "volume" or "text".
    NOTE(paper): by the letter of Eq. (1, 3) CML has H_I and H_T of masked inputs; here of whole.
    NOTE(paper): depth, heads and width of the fusion are not given; 2 layers, 12 heads, 768.
    """
    outputs = ("image_proj.", "text_proj.", "text_pool.")               # which fit one text encoder

    def __init__(self, encoder, text_encoder, losses=LOSSES[:6], embed_dim=768, num_layers=2,
                 num_heads=12, guidance="sentence", mim_attention="proposed", mlm_attention="proposed",
                 sentence_values="volume"):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"found embed_dim {embed_dim}, expected a multiple of num_heads {num_heads}")
        self.losses, self.guidance = frozenset(losses), guidance
        self.encoder, self.text_encoder = encoder, text_encoder

        def needed_by(names, module):
            # Build every part, then drop the unneeded: initial weights must not depend on which
            # losses are on.
            return module if self.losses.intersection(names.split()) else None

        E, E_t, V = embed_dim, text_encoder.width, text_encoder.vocab_size
        self.image_proj = nn.Linear(encoder.channels[-1], E)
        self.text_proj = needed_by("mim mlm sfr cml clip", nn.Linear(E_t, E))
        self.image_fusion = needed_by("mim cml", Fusion(E, num_layers, num_heads, mim_attention))
        self.text_fusion = needed_by("mlm sfr cml", Fusion(E, num_layers, num_heads, mlm_attention))
        self.text_pool = needed_by("cml clip", AttentionPool(E))
        self.mim_decoder = needed_by("mim", VolumeDecoder(E, encoder.stride))
        self.mlm_head = needed_by("mlm sfr", nn.Sequential(nn.Linear(E, E), nn.GELU(), nn.LayerNorm(E)))
        self.mlm_vocabulary = needed_by("mlm", nn.Linear(E, V))
        by_volume = sentence_values == "volume"
        self.sentence_attention = needed_by(
            "ssm dfa", SentenceAttention(E, num_heads, E_t) if by_volume else SentenceGate(E, E_t))
        self.visual_sentence_pool = needed_by("dfa", AttentionPool(E))
        encoder.mask_token.requires_grad_("mim" in self.losses)

    def encode_image(self, volume, mask=None):
        """(B, 1, D, H, W) -> visual tokens (B, N, E); their mean over N is the global feature"""
        return self.image_proj(self.encoder(volume, mask)[-1].flatten(2).mT)

    def encode_words(self, input_ids, attention_mask):
        """(B, L), (B, L) -> projected word features (B, L, E)"""
        return self.text_proj(self.text_encoder(input_ids, attention_mask))

    def encode_text(self, input_ids, attention_mask, sentence_ids, sentence_mask):
        """(B, L) each, sentence_mask (B, S) -> global report feature (B, E)"""
        words = self.encode_words(input_ids, attention_mask)
        return self.text_pool(sentence_mean(words, sentence_ids, sentence_mask.shape[1]), sentence_mask)

    def sentence_features(self, batch, F_I):
        """F_S* (B, S, E_t), frozen and unprojected, and H_S (B, S, E), the visual feature of each sentence"""
        features = self.text_encoder.encode_sentences(batch["single_ids"], batch["single_mask"])  # (ΣS, E_t)
        F_S_star = features.new_zeros(*batch["sentence_mask"].shape, features.shape[-1])
        F_S_star[batch["sentence_mask"]] = features
        # NOTE(paper): Eq. (11) has F_S as query. Here it is F_S*, which Eq. (12) compares.
        return F_S_star, self.sentence_attention(F_S_star, F_I)         # Eq. (11)

    def forward(self, batch):
        """A batch of `data.collate` -> what the losses compare, a dict by their names for it.

        The paper's letters: I image, T text, S sentences; F features, M masked, H fused with the other
        modality. Tokens are capitals, `_bar` marks pooled vectors (B, E)."""
        mim, mlm, sfr, cml, ssm, dfa, clip = (name in self.losses for name in LOSSES[:7])
        volume, word_mask = batch["volume"], batch["attention_mask"].bool()
        sentence_mask = batch["sentence_mask"]
        sentence_ids, S = batch["sentence_ids"], sentence_mask.shape[1]
        by_sentence = functools.partial(sentence_mean, sentence_ids=sentence_ids, num_sentences=S)
        out = {}

        # Visual tokens of the whole volume, F_I, and of the masked volume, I_M: (B, N, E).
        no_mask = torch.zeros_like(batch["volume_mask"]) if mim else None
        F_I, I_M = in_one_pass(self.encode_image, self.losses - {"mim"} and (volume, no_mask),
                               mim and (volume, batch["volume_mask"]))
        # Words of the report, F_T, and of the masked report, T_M: (B, L, E). Sentences F_S: (B, S, E).
        if self.text_proj is not None:
            F_T = self.encode_words(batch["input_ids"], batch["attention_mask"])
            F_S = by_sentence(F_T)
        if mlm or sfr:
            T_M = self.encode_words(batch["masked_ids"], batch["attention_mask"])

        # Image-dominant fusion, Eq. (1): sentences guide I_M for MIM and F_I for CML.
        if mim or cml:
            guide = (F_T, None, sentence_ids >= 0) if self.guidance == "word" else (F_S, None, sentence_mask)
            H_IM, H_I = in_one_pass(self.image_fusion, mim and (I_M, *guide), cml and (F_I, *guide))
        if mim:
            out["recon"] = self.mim_decoder(H_IM, volume.shape[2:])     # (B, 1, D, H, W)

        # Text-dominant fusion, Eq. (3): visual tokens guide T_M for MLM and SFR and F_T for CML.
        if mlm or sfr or cml:
            guide = (F_I, word_mask, None)
            H_TM, H_T = in_one_pass(self.text_fusion, (mlm or sfr) and (T_M, *guide), cml and (F_T, *guide))
        if mlm or sfr:
            rebuilt = self.mlm_head(H_TM)                               # (B, L, E)
        if mlm:
            masked = batch["mlm_labels"] != -100
            out["mlm_labels"] = batch["mlm_labels"][masked]             # (M,)
            out["logits"] = self.mlm_vocabulary(rebuilt[masked])        # (M, V)
        if sfr:
            # NOTE(paper): the target is F_S in the width of the fusion: projected, without a gradient.
            out["rebuilt"], out["sentences"] = by_sentence(rebuilt), F_S.detach()

        # Global features: averages of visual tokens, self-attention pooling of sentences.
        if cml:
            out["h_i"] = H_I.mean(1)                                    # H_I_bar
            out["h_t"] = self.text_pool(by_sentence(H_T), sentence_mask)  # H_T_bar
        if cml or dfa or clip:
            out["f_i"] = F_I.mean(1)                                    # F_I_bar
        if cml or clip:
            out["f_t"] = self.text_pool(F_S, sentence_mask)             # F_T_bar
        # Sentences encoded one by one, F_S* (B, S, E_t), and their visual features H_S (B, S, E).
        if ssm or dfa:
            F_S_star, H_S = self.sentence_features(batch, F_I)
        if ssm:
            out["text_sentences"], out["visual_sentences"] = F_S_star, H_S
        if dfa:
            out["h_s"] = self.visual_sentence_pool(H_S, sentence_mask)  # H_S_bar
        return out


# ------------------------------------------------------------------------------ heads of the tasks
# Each holds its `encoder`, which `load_weights` fills from a pre-trained file. Nothing is masked here:
# the mask token would never have a gradient, and must not ask for one.

class Classifier(nn.Module):
    """Average pooling of the last map, LayerNorm, one linear layer."""
    outputs = ("norm.", "head.")                # which fit other classes in nothing but shape

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder = encoder
        self.norm = nn.LayerNorm(encoder.channels[-1])
        self.head = nn.Linear(encoder.channels[-1], num_classes)
        encoder.mask_token.requires_grad_(False)

    def forward(self, volume):
        """(B, 1, D, H, W) -> logits (B, K)"""
        return self.head(self.norm(self.encoder(volume)[-1].mean((2, 3, 4))))


def _named(name, module):
    """A module under one more name, as MONAI's state dicts have it"""
    return nn.Sequential(OrderedDict({name: module}))


class ResBlock(nn.Module):
    """Two 3×3×3 convolutions with instance norm (no parameters, no running mean) and a shortcut."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = _named("conv", nn.Conv3d(c_in, c_out, 3, padding=1, bias=False))
        self.conv2 = _named("conv", nn.Conv3d(c_out, c_out, 3, padding=1, bias=False))
        self.conv3 = _named("conv", nn.Conv3d(c_in, c_out, 1, bias=False)) if c_in != c_out else None

    def forward(self, x):
        def norm(x):  # each channel over its voxels; a single voxel becomes 0
            return F.layer_norm(x, x.shape[2:])
        shortcut = x if self.conv3 is None else norm(self.conv3(x))
        x = norm(self.conv2(F.leaky_relu(norm(self.conv1(x)), 0.01)))
        return F.leaky_relu(x + shortcut, 0.01)


class UpBlock(nn.Module):
    """Twice the size by a transposed convolution, then a ResBlock on that and the skip."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.transp_conv = _named("conv", nn.ConvTranspose3d(c_in, c_out, 2, stride=2, bias=False))
        self.conv_block = ResBlock(2 * c_out, c_out)

    def forward(self, x, skip):
        return self.conv_block(torch.cat([self.transp_conv(x), skip], dim=1))


class SwinUNETR(nn.Module):
    """A Swin encoder of n stages and the decoder of Swin UNETR (Hatamizadeh et al. 2022)

    For four stages it has MONAI's names and numbers.
    """
    outputs = ("out.",)

    def __init__(self, encoder, out_channels):
        super().__init__()
        if not isinstance(encoder, SwinTransformer3D):
            raise ValueError(f"found the encoder {type(encoder).__name__}, expected a "  # noqa: TRY004
                             "SwinTransformer3D: this decoder needs its maps")
        self.encoder = encoder
        c = encoder.channels                                            # C, 2C, 4C, … of n + 1 maps
        self.encoder1 = _named("layer", ResBlock(encoder.patch_embed.proj.in_channels, c[0]))
        for i, width in enumerate(c[:-2]):
            setattr(self, f"encoder{i + 2}", _named("layer", ResBlock(width, width)))
        self.encoder10 = _named("layer", ResBlock(c[-1], c[-1]))
        for i in reversed(range(1, len(c))):
            setattr(self, f"decoder{i + 1}", UpBlock(c[i], c[i - 1]))
        self.decoder1 = UpBlock(c[0], c[0])
        self.out = _named("conv", _named("conv", nn.Conv3d(c[0], out_channels, 1)))
        encoder.mask_token.requires_grad_(False)

    def forward(self, volume):
        """(B, 1, D, H, W) -> logits (B, out_channels, D, H, W)"""
        if any(side % self.encoder.stride for side in volume.shape[2:]):
            raise ValueError(f"found a volume of {tuple(volume.shape[2:])} voxels, expected multiples "
                             f"of {self.encoder.stride}")
        *maps, x = self.encoder(volume)                                 # strides 2, 4, 8, …
        x = self.encoder10(x)
        for i in reversed(range(len(maps))):  # the last skip passes no block
            skip = maps[i] if i == len(maps) - 1 else getattr(self, f"encoder{i + 2}")(maps[i])
            x = getattr(self, f"decoder{i + 2}")(x, skip)
        return self.out(self.decoder1(x, self.encoder1(volume)))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to contexts, feed-forward; pre-norm, residual.

    A context is a pair of keys and values, and has its own softmax: in one softmax with the 60 slots
    of the memory, a single visual token would start with 1/61 of the weight and little influence.
    """

    def __init__(self, dim, num_heads, dropout):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.qkv, self.self_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.query, self.key, self.value, self.cross_out = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp, self.dropout = MLP(dim, 4 * dim), nn.Dropout(dropout)

    def context(self, x):
        """(B, M, E) -> keys and values (B, heads, M, d)"""
        return _split_heads(self.key(x), self.num_heads), _split_heads(self.value(x), self.num_heads)

    def forward(self, x, contexts, past=None):
        """x (B, L, E), or (B, 1, E) after `past` -> x, the keys and values of all tokens so far"""
        q, k, v = (_split_heads(y, self.num_heads) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)  # (B, heads, L, d)
        x = x + self.dropout(self.self_out(y.transpose(1, 2).flatten(2)))
        q = _split_heads(self.query(self.norm2(x)), self.num_heads)
        y = sum(F.scaled_dot_product_attention(q, *keys_values) for keys_values in contexts)
        x = x + self.dropout(self.cross_out(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm3(x))), (k, v)


class ReportGenerator(nn.Module):
    """Knowledge-enhanced report generation: a transformer decoder that attends to visual tokens and,
    beside them, to a learned memory of `memory_slots` vectors.

    NOTE(paper): it only says that the head follows M2KT. One encoder and one decoder layer, width 512,
    8 heads and 60 slots are the release's. Its memory is no parameter and never learns; here it does.
    """
    outputs = ("words.", "norm.", "head.")

    def __init__(self, encoder, vocab_size, dim=512, num_heads=8, memory_slots=60, max_length=150,
                 dropout=0.1):
        super().__init__()
        self.encoder, self.num_heads, self.max_length = encoder, num_heads, max_length
        self.project = nn.Linear(encoder.channels[-1], dim)
        self.visual_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.visual_attention, self.visual_mlp = ClassicalAttention(dim, num_heads), MLP(dim, 4 * dim)
        self.memory = nn.Parameter(torch.randn(memory_slots, dim) * 0.02)
        self.words, self.places = nn.Embedding(vocab_size, dim), nn.Embedding(max_length + 1, dim)
        self.decoder = DecoderLayer(dim, num_heads, dropout)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)
        self.dropout = nn.Dropout(dropout)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)
        encoder.mask_token.requires_grad_(False)

    def contexts(self, volume):
        """(B, 1, D, H, W) -> keys and values of the N visual tokens, and of the memory"""
        x = self.project(self.encoder(volume)[-1].flatten(2).mT)        # (B, N, E)
        y = self.visual_norms[0](x)
        x = x + self.visual_attention(y, y)
        x = self.visual_norms[2](x + self.visual_mlp(self.visual_norms[1](x)))
        return self.decoder.context(x), self.decoder.context(self.memory.expand(len(x), -1, -1))

    def decode(self, tokens, contexts, past=None):
        """tokens (B, L), which follow those in `past` -> logits (B, L, V), keys and values so far"""
        first = 0 if past is None else past[0].shape[2]
        place = first + torch.arange(tokens.shape[1], device=tokens.device)
        x, past = self.decoder(self.dropout(self.words(tokens) + self.places(place)), contexts, past)
        return self.head(self.norm(x)), past

    def forward(self, volume, tokens):
        """volume (B, 1, D, H, W), tokens (B, L <= max_length + 1) -> logits (B, L, V) of the next tokens"""
        return self.decode(tokens, self.contexts(volume))[0]

    @torch.no_grad()
    def generate(self, volume, beams=3):
        """Beam search for the highest mean log-probability of a report and its end -> B lists of ids

        If no beam has ended after max_length words, the best beam is taken as it is.
        """
        B, device = len(volume), volume.device
        contexts = [[x.repeat_interleave(beams, 0) for x in pair] for pair in self.contexts(volume)]
        tokens = torch.full((B * beams, 1), BEGIN, device=device)
        scores = torch.full((B, beams), -torch.inf, device=device)
        scores[:, 0] = 0                        # all beams start equal: only the first may grow
        best = [(-math.inf, [])] * B  # mean log-probability and tokens of the best ended report
        past = None
        for length in range(1, self.max_length + 2):
            logits, past = self.decode(tokens[:, -1:], contexts, past)
            log_probability = logits[:, -1].float().log_softmax(-1)     # (B·beams, V)
            log_probability[:, [PAD, BEGIN]] = -torch.inf
            total = (scores.view(-1, 1) + log_probability).view(B, beams, -1)
            end_score, end_beam = (total[:, :, END] / length).max(-1)   # (B,)
            for b, (score, beam) in enumerate(zip(end_score.tolist(), end_beam.tolist())):
                if score > best[b][0]:
                    best[b] = score, tokens[b * beams + beam, 1:].tolist()
            total[:, :, END] = -torch.inf
            # A report only loses probability as it grows: the upper bound of what a beam can still reach
            # is its total now, divided by the greatest length.
            upper_bound = (total.amax((1, 2)) / (self.max_length + 1)).tolist()
            if length > self.max_length or all(best[b][0] >= upper_bound[b] for b in range(B)):
                break
            V = total.shape[-1]
            scores, choice = total.flatten(1).topk(beams)               # (B, beams)
            beam = (choice // V + torch.arange(B, device=device)[:, None] * beams).flatten()
            tokens = torch.cat([tokens[beam], (choice % V).view(-1, 1)], dim=1)
            past = tuple(x[beam] for x in past)
        return [report if score > -math.inf else tokens[b * beams, 1:].tolist()
                for b, (score, report) in enumerate(best)]


def build_network(kind, num_classes, config, folder):
    """The network of a run with the flags `config`; kind: of `data.Task`, or "pretrain"; folder: its --out"""
    encoder = build_encoder(config["encoder"], use_checkpoint=config["use_checkpoint"])
    if kind == "classify":
        return Classifier(encoder, num_classes)
    if kind == "segment":
        return SwinUNETR(encoder, 1 + num_classes)
    if kind == "report":
        return ReportGenerator(encoder, len(config["vocabulary"]))
    text = Path(folder, "text_encoder") if config["text_encoder"] == "demo" else config["text_encoder"]
    names = "embed_dim", "guidance", "mim_attention", "mlm_attention", "sentence_values"
    settings = {name: config[name] for name in names if name in config}  # older files lack some
    losses = [name for name in LOSSES if config.get(name)] if kind == "pretrain" else ["clip"]
    return MG3D(encoder, TextEncoder(str(text)), losses, **settings)


# -------------------------------------------------------------------------------- files of weights

# Names in foreign files -> ours, applied in this order: pattern, replacement, and whether such files
# were trained with the old order of patch merging.
RENAMES = ((r"^((module|model|net|backbone|_orig_mod)\.)+", "", False),  # wrappers
           (r"^.*?vision_encoder\.(swinViT\.)?", "encoder.", True),     # the authors
           (r"\.mlp\.fc", ".mlp.linear", True),                         # MONAI's SSL
           (r"^swin(ViT|_vit)\.", "encoder.", False),                   # MONAI's SwinUNETR
           (r"^(?=patch_embed\.|layers|levels\.|mask_token)", "encoder.", False))   # encoder.pt
CONTAINERS = "state_dict", "model_state_dict", "model", "network_weights", "net"
# What may stand among the weights of an encoder without changing it: heads of the authors, of SSL; decoders
BESIDE = re.compile(r"mask_token$|.*relative_position_index$|\w+_(head|pre)\.|(en|de)coder\d+\.|out\.")


def export_encoder(encoder, **notes):
    """A flat state dict on the CPU with MONAI's names (no mask token).

    Notes lie where MONAI does not look: the order of merging, the architecture, and those given.
    """
    state = encoder.state_dict()
    del state["mask_token"]
    for key in state:
        state[key] = state[key].cpu()
    state._metadata[""] |= {"merging": encoder.merging, "architecture": monai_settings(encoder), **notes}
    return state


def write_safetensors(state, file):
    """Write a dict of `export_encoder` to an open file. Its notes become JSON in the metadata."""
    notes = {"format": "pt", "mg3d": json.dumps(state._metadata[""])}
    file.write(safetensors.torch.save(dict(state), notes))


def read_safetensors(path):
    """What `write_safetensors` has written; a file of others has no notes"""
    with safetensors.safe_open(path, "pt") as file:
        state = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118 - no dict
        state._metadata = {"": dict(json.loads((file.metadata() or {}).get("mg3d", "{}")))}
    return state


def monai_settings(encoder):
    """Arguments of `monai.networks.nets.SwinUNETR` for an encoder, and a note on what MONAI makes of it"""
    settings = encoder.settings | {"use_v2": encoder.use_v2}
    if len(settings.get("depths", ())) != 4:
        return settings | {"note": "MONAI has no such network: its Swin has four stages"}
    if encoder.merging == "v0.9":
        return settings | {
            "merging": MERGING_ORDERS["v0.9"],
            "note": "another network in MONAI from 1.5 on, unless `downsample` is a class of layers that "
                    "concatenates as `merging` says; MONAI before 1.5 has the same numbers"}
    downsample = "merging" if encoder.merging == "monai" else encoder.merging
    return settings | {"downsample": downsample, "note": "MONAI from 1.5 on has the same numbers"}


def _hub_files(repository):
    """Names of the files of a repository; without network those in the hub's cache"""
    from huggingface_hub import list_repo_files, snapshot_download
    try:
        return list_repo_files(repository)
    except Exception:  # noqa: BLE001 - the next line says which
        folder = Path(snapshot_download(repository, allow_patterns=[]))
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@functools.cache
def local_file(name):
    """The path of a file of weights: as it is given, or of `hf:owner/name[/file]` in the hub's cache.

    What is not there is fetched: the file, or encoder.safetensors, or else encoder.pt; beside a file
    with a text side text_encoder/, too. ValueError: no such file, or neither network nor a copy.
    """
    name = Path(name).as_posix()
    if not name.startswith("hf:"):
        return Path(name)
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:/(.+))?", name)
    if not match:
        raise ValueError(f"{name}: expected hf:owner/name or hf:owner/name/file")
    from huggingface_hub import snapshot_download  # slow to import
    repository, file = match.groups()
    wanted = [file] if file else ["encoder.safetensors", "encoder.pt"]
    try:
        files = _hub_files(repository)
        file = next((file for file in wanted if file in files), None)
        if file:
            beside = Path(file).with_name("text_encoder").as_posix()
            patterns = [file] if Path(file).stem == "encoder" else [file, f"{beside}/*"]
            path = Path(snapshot_download(repository, allow_patterns=patterns), file)
            log.info("%s: %s", name, path)
            return path
    except Exception as error:  # noqa: BLE001 - each version of the hub's client has its own
        raise ValueError(f"{name}: found no copy in the cache of the Hugging Face hub, and cannot fetch it: "
                         f"{' '.join(str(error).split())}") from None
    raise ValueError(f"{name}: found no {' or '.join(wanted)}, expected one of {', '.join(files)} (without "
                     "network, of what was fetched before)")


def read_checkpoint(path):
    """The dict in a file of weights: a path, or `hf:owner/name[/file]`. ValueError, naming it, if it
    cannot be read safely."""
    file = local_file(path)
    try:
        if file.suffix == ".safetensors":
            state = read_safetensors(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: found no such file, expected weights") from None
    except Exception as error:  # noqa: BLE001 - a torn file fails in many ways
        raise ValueError(f"{path}: cannot be read safely (weights_only), expected weights: {error}") from None
    if not hasattr(state, "items"):
        raise ValueError(f"{path}: found {type(state).__name__}, expected a dict of tensors")
    return state


def notes_of(checkpoint):
    """What stands beside the weights: in encoder.* out of the way, else among them"""
    return getattr(checkpoint, "_metadata", {}).get("", checkpoint)


def flags_of(checkpoint):
    """The flags of the run of ours that wrote a file, in encoder.* those of encoder and volumes alone; {}
    for files of others, whatever their `config`"""
    notes, weights = notes_of(checkpoint), checkpoint.get("model")
    config = notes.get("config")
    is_ours = isinstance(config, dict) and config.get("encoder") in tuple(ENCODERS) and (
        notes is not checkpoint or isinstance(weights, dict)
        and (not weights or any(key.startswith("encoder.") for key in weights)))
    return config if is_ours else {}


def check_finite(path, tensors):
    """ValueError, naming file and key, for weights that are NaN or infinite"""
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: found {key} with NaN or infinity, expected finite weights")


def read_foreign(path):
    """A file of weights of ours or of others -> {our name: tensor}, its order of merging or None"""
    state = read_checkpoint(path)
    merging = notes_of(state).get("merging")
    for key in CONTAINERS:
        if isinstance(state.get(key), dict):
            state = state[key]
    found = {key: tensor for key, tensor in state.items() if torch.is_tensor(tensor)}
    if not found:
        raise ValueError(f"{path}: found {type(state).__name__} without tensors, expected a dict of tensors")
    check_finite(path, {key: tensor for key, tensor in found.items() if not key.endswith("mask")})
    merging = merging or notes_of(state).get("merging")
    tensors, origin = {}, {}
    for key, tensor in found.items():
        name = key
        for pattern, replacement, is_old in RENAMES:
            name, count = re.subn(pattern, replacement, name, count=1)
            merging = "v0.9" if count and is_old else merging
        if name in tensors:
            raise ValueError(f"{path}: found two networks, {origin[name]} and {key}, expected one")
        tensors[name], origin[name] = tensor, key
    return tensors, merging if merging in tuple(MERGING_ORDERS) else None


def adapt(encoder, keys):
    """Make a Swin one of MONAI's second version if the keys are those of one -> was it changed?"""
    changes = encoder.merging and not encoder.use_v2 and any("layers1c." in key for key in keys)
    if changes:
        encoder.set_v2(True)
    return changes


def _differences(keys, expected, found):
    """Those keys whose tensors differ in shape or stand on one side only, as text"""
    def shape(tensors, key):
        return tuple(tensors[key].shape) if key in tensors else "nothing"
    return [f"{key}: expected {shape(expected, key)}, found {shape(found, key)}" for key in keys
            if shape(expected, key) != shape(found, key)]


def weights_of(network):
    """Its state dict without the text encoder, which no file of ours holds"""
    return {key: tensor for key, tensor in network.state_dict().items()
            if not key.startswith("text_encoder.")}


def restore(network, checkpoint, path):
    """Give a network weights, blocks and merging of a checkpoint of ours. ValueError if they do not fit."""
    weights = checkpoint["model"]
    adapt(network.encoder, weights)
    expected = weights_of(network)
    if wrong := _differences(expected | weights, expected, weights):
        raise ValueError("\n  ".join([f"{path}: other weights than its config asks for", *wrong[:5]]))
    check_finite(path, weights)
    network.load_state_dict(weights, strict=False)
    network.encoder.merging = checkpoint.get("merging") or network.encoder.merging


def load_weights(module, path, merging="auto", leave_out=()):
    """Fill a module (an encoder, or one with an `.encoder`) from a file of ours or of others.

    Knows `last.pt` and `encoder.*`; the authors' Lightning checkpoints and flat dicts (`vision_encoder.*`);
    MONAI's SwinUNETR (`swinViT.*`, `encoder1.*`), VoCo's files among them, and its self-supervised Swin
    (`module.*`, `mlp.fc1`). The encoder becomes of the second version if the file is.
    merging: what `encoder.merging` becomes; auto: the order of patch merging that the file was trained
    with. leave_out: beginnings of names that are not filled, whatever their shape.

    Returns {"matched": int, "missing": [...], "unexpected": [...]}. ValueError, before anything is
    loaded, if the file holds no dict of weights or another encoder.
    """
    tensors, told = read_foreign(path)
    encoder = getattr(module, "encoder", module)
    prefix = "" if encoder is module else "encoder."
    if encoder is module:
        tensors = {key.removeprefix("encoder."): tensor for key, tensor in tensors.items()
                   if key.startswith("encoder.")}
    was_changed, expected = adapt(encoder, tensors), weights_of(module)
    matched = {key: tensor for key, tensor in tensors.items() if not key.startswith(leave_out)
               and key in expected and expected[key].shape == tensor.shape}
    missing = [key for key in expected if key not in matched]
    unexpected = [key for key in tensors if key not in matched]
    inside = [key for key in expected | tensors
              if key.startswith(prefix) and not BESIDE.match(key.removeprefix(prefix))]
    if wrong := _differences(inside, expected, tensors):
        if was_changed:
            encoder.set_v2(False)
        raise ValueError("\n  ".join([
            f"{path} does not fill the encoder: {len(matched)} weights match, {len(wrong)} do not.",
            "Perhaps it is another --encoder:",
            *wrong[:5],
            f"keys in the file, as named here: {', '.join(list(tensors)[:5])} …"]))

    module.load_state_dict(matched, strict=False)
    log.info("%s: %d weights matched, %d missing, %d unexpected", path, len(matched), len(missing),
             len(unexpected))
    if any("proj_head" in key for key in unexpected):
        log.info("%s: vision_encoder.proj_head is left out; the method has no such layer", path)
    if encoder.merging:
        encoder.merging = _choose_merging(path, merging, told, encoder.use_v2)
    return {"matched": len(matched), "missing": missing, "unexpected": unexpected}


def _choose_merging(path, asked, told, is_v2):
    """The order of patch merging of a file: as asked, as the file tells, or the likelier one; says which."""
    # NOTE(compat): VoCo v2 and VoComni, the known files of the second version, are of MONAI 1.3.
    chosen = told or ("v0.9" if is_v2 else "monai")
    if asked != "auto":
        if told not in (None, asked):
            log.warning("%s: --merging %s, but these weights were trained with %s", path, asked, told)
        chosen = asked
    elif told:
        log.info("%s: patch merging %r, as these weights were trained with", path, chosen)
    else:
        versions, other = ("before 1.5", "monai") if chosen == "v0.9" else ("from 1.5 on", "v0.9")
        log.warning("%s does not tell its patch merging: %r is taken, as in MONAI %s; the other choice is "
                    "--merging %s", path, chosen, versions, other)
    return chosen
