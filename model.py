"""Everything of MG-3D that has parameters. `MG3D.forward` is the method.

B patients, C channels, D H W voxels (z, y, x), N visual tokens, L report tokens, S sentences,
E embedding, E_t that of the text encoder, V vocabulary, G tokens of a guide. Masks of voxels:
1 = masked; of all else: True = real.
"""
import functools
import hashlib
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

LOSSES = ("mim", "mlm", "sfr", "cml", "ssm", "dfa", "clip")     # new ones last: `forward` counts on it
PAD, BEGIN, END = range(3)                      # special tokens of the report generator
SCORES_IN_A_CALL = {"cpu": 2 ** 22, "cuda": 2 ** 31}    # to attention: a CPU's cache holds 16 MB
# How the 8 sub-lattices of a map are merged. NOTE(compat): MONAI before 1.5, its SSL file and the
# authors' checkpoints take two of them twice ("v0.9"); MONAI has the others from 1.5 on.
MERGING_ORDERS = {"monai": ("000", "100", "010", "001", "110", "101", "011", "111"),
                  "v0.9": ("000", "100", "010", "001", "101", "010", "001", "111"),
                  "mergingv2": ("000", "001", "010", "011", "100", "101", "110", "111")}


def named(name, module):
    """A module under one more name, as MONAI's state dicts have it"""
    return nn.Sequential(OrderedDict({name: module}))


def run(module, *inputs, recompute):
    """module(*inputs); recompute: keep no activations, run it again in backward. It must draw nothing."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
    return module(*inputs)


# ------------------------------------------------------------------ 3D Swin Transformer: windows
# Attention within windows of 7×7×7 tokens is exact and needs no mask, no roll and no padded copy:
#   - one permutation, computed once for a shape, sorts the tokens window by window;
#   - a shifted window that wraps around the volume is cut at the seam into smaller windows;
#   - padding tokens of a window share one key and one value (the bias of `qkv`): a single extra
#     key stands for them, with the log-sum-exp of their biases;
#   - a CPU computes a few windows at a time, so that their scores stay in its cache.

@functools.lru_cache(maxsize=64)
def window_plan(batch, size, window_size, shifted, device):
    """Which tokens share a window, in `batch` maps of `size` (d, h, w)

    Returns `order` (B·d·h·w,), which sorts tokens by group and window, its inverse, the groups of
    like windows: (how many, n real and p padding tokens), and `pairs` (P,), P = Σ n (n + p): the queries
    and keys of each group, as places in the flat `relative_position_index`.
    """
    # NOTE(compat): along an axis that one window covers, the window shrinks to the map, unshifted.
    window = [min(side, window_size) for side in size]
    shift = [window_size // 2 if shifted and side > window_size else 0 for side in size]
    padded = [-(-side // w) * w for side, w in zip(size, window)]
    token = np.full(padded, -1)                                         # -1 = padding
    token[:size[0], :size[1], :size[2]] = np.arange(np.prod(size)).reshape(size)
    token = np.roll(token, [-s for s in shift], axis=(0, 1, 2))
    d, h, w = (np.arange(p) >= p - s for p, s in zip(padded, shift))    # behind the seam
    piece = 4 * d[:, None, None] + 2 * h[:, None] + w

    def windows_of(grid):
        boxes = np.lib.stride_tricks.sliding_window_view(grid, window)
        boxes = boxes[::window[0], ::window[1], ::window[2]]
        return boxes.reshape(-1, np.prod(window))                       # (windows, tokens)

    alike = defaultdict(list)                   # {places of real and padding tokens: windows}
    for tokens, pieces in zip(windows_of(token), windows_of(piece)):
        for number in np.unique(pieces):
            places = np.flatnonzero(pieces == number)
            is_real = tokens[places] >= 0
            if is_real.any():
                real, padding = places[is_real], places[~is_real]
                alike[tuple(real), tuple(padding)].append(tokens[real])
    first = np.arange(batch)[:, None] * np.prod(size)                   # token of each map
    order = [(first + np.concatenate(windows)).ravel() for windows in alike.values()]
    # NOTE(compat): a window shrunk to a small map keeps the first n places of the full window's
    # raster, as if cut by `relative_position_index[:n, :n]`: published weights were trained so.
    pairs = [np.add.outer(np.multiply(real, window_size ** 3), real + padding).ravel()
             for real, padding in alike]
    order, pairs = np.concatenate(order), np.concatenate(pairs)
    groups = [(batch * len(windows), len(real), len(padding))
              for (real, padding), windows in alike.items()]
    with torch.inference_mode(False):           # callers may infer; the plan is kept for training
        order, inverse, pairs = (torch.from_numpy(indices).to(device)
                                 for indices in (order, order.argsort(), pairs))
        return order, inverse, groups, pairs


class _Permute(torch.autograd.Function):
    """x[order]. No row repeats: backward is the inverse permutation, not a scatter-add."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return grad[inverse], None, None


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ / √d + bias) v for W windows. No scores are kept: backward makes them anew, in bf16
    rounded before the softmax, where the forward pass has them in float32."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        """q (W, heads, n, d); k, v (W, heads, m, d); bias (heads, n, m) -> (W, heads, n, d)"""
        bias = bias.detach().to(q.dtype)        # one with a gradient takes SDPA's slow path
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        ctx.save_for_backward(q, k, v, bias, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, bias, out = ctx.saved_tensors
        d = q.shape[-1]
        with torch.autocast(grad.device.type, enabled=False):
            q, k = (q * d ** -0.5).contiguous(), k.contiguous()
            weights = (q @ k.mT).add_(bias).softmax(-1)                 # (W, heads, n, m)
            # A score has the gradient weight · (gradient of the weight - Σ grad · out). A column
            # beside `grad`, against ones beside v, subtracts that sum within the product.
            column = -(grad * out).sum(-1, keepdim=True)                # (W, heads, n, 1)
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

    def calls(self, groups, pairs):
        """What is computed together: lists of (how many windows, their bias (heads, n, n or n + 1))"""
        index = self.relative_position_index.flatten()[pairs]           # (P,)
        # unbind and stack: the gradient of a transposed view would not lie as DDP's buckets do
        table = torch.stack(self.relative_position_bias_table.unbind(1))  # (heads, offsets)
        biases = table.gather(1, index.expand(len(table), -1))          # (heads, P)
        biases = biases.split([n * (n + p) for _, n, p in groups], dim=1)
        calls, room = [], 0
        for (number, n, p), bias in zip(groups, biases):
            bias = bias.unflatten(1, (n, n + p))
            if p:
                padding = bias[..., n:].logsumexp(-1, keepdim=True)
                bias = torch.cat([bias[..., :n], padding], dim=-1)
            while number:
                if room < bias.numel():
                    calls.append([])
                    room = max(SCORES_IN_A_CALL[bias.device.type], bias.numel())
                taken = min(number, room // bias.numel())
                calls[-1].append((taken, bias))
                number, room = number - taken, room - taken * bias.numel()
        return calls

    def forward(self, x, windows):
        """x (tokens, C), window by window -> the same shape; windows: a list of `calls`"""
        tokens, C = x.shape
        qkv = self.qkv(x).view(tokens, 3, self.num_heads, -1)
        padding = self.qkv.bias.to(qkv.dtype).view(3, 1, self.num_heads, 1, -1)  # 0 W + b
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


def mlp(dim):
    return nn.Sequential(OrderedDict(linear1=nn.Linear(dim, 4 * dim), gelu=nn.GELU(),
                                     linear2=nn.Linear(4 * dim, dim)))


class SwinBlock(nn.Module):
    def __init__(self, dim, num_heads, window_size, shifted, use_checkpoint):
        super().__init__()
        self.window_size, self.shifted, self.use_checkpoint = window_size, shifted, use_checkpoint
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim)

    def run_windows(self, x, windows):
        x = x + self.attn(self.norm1(x), windows)                       # (tokens, C)
        return x + self.mlp(self.norm2(x))

    def forward(self, x):
        """x (B, d, h, w, C) -> the same shape"""
        B, *size, C = x.shape
        # Where torch.export traces, tensors are symbols, which must not stay in the cache.
        plan = window_plan.__wrapped__ if torch.compiler.is_compiling() else window_plan
        order, inverse, groups, pairs = plan(B, tuple(size), self.window_size, self.shifted, x.device)
        calls = self.attn.calls(groups, pairs)
        sizes = [sum(number * bias.shape[1] for number, bias in windows) for windows in calls]
        x = _Permute.apply(x.reshape(-1, C), order, inverse)            # (B·d·h·w, C), sorted
        done = [run(self.run_windows, tokens, windows, recompute=self.use_checkpoint)
                for tokens, windows in zip(x.split(sizes), calls)]
        return _Permute.apply(torch.cat(done), inverse, order).view(B, *size, C)


class PatchMerging(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x, merging):
        """x (B, d, h, w, C) -> (B, d/2, h/2, w/2, 2C); odd sides are padded with zeros"""
        _, d, h, w, _ = x.shape
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        lattices = x.permute(2, 4, 6, 0, 1, 3, 5, 7).flatten(0, 2).unbind()    # 000, 001, … 111
        x = torch.cat([lattices[int(bits, 2)] for bits in MERGING_ORDERS[merging]], dim=-1)
        return self.reduction(self.norm(x))


class ResBlock(nn.Module):
    """Two 3×3×3 convolutions with instance norm (no parameters) and a shortcut."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = named("conv", nn.Conv3d(c_in, c_out, 3, padding=1, bias=False))
        self.conv2 = named("conv", nn.Conv3d(c_out, c_out, 3, padding=1, bias=False))
        self.conv3 = named("conv", nn.Conv3d(c_in, c_out, 1, bias=False)) if c_in != c_out else None

    def forward(self, x):
        def norm(x):                            # each channel over its voxels
            return F.layer_norm(x, x.shape[2:])
        shortcut = x if self.conv3 is None else norm(self.conv3(x))
        x = norm(self.conv2(F.leaky_relu(norm(self.conv1(x)), 0.01)))
        return F.leaky_relu(x + shortcut, 0.01)


def _optional_mask_token(module, state_dict, prefix, *_):
    """Foreign state dicts have no mask token."""
    state_dict.setdefault(prefix + "mask_token", module.mask_token)


class SwinTransformer3D(nn.Module):
    """3D Swin Transformer with names and numbers of MONAI's `SwinTransformer` (Hatamizadeh 2022).

    feature_size: width after patch embedding, doubled by each stage; merging: a key of
    MERGING_ORDERS; use_checkpoint: recompute blocks in the backward pass; use_v2: MONAI's second
    version, with a residual convolution block before each stage.
    """
    patch = 2

    def __init__(self, in_channels=1, feature_size=48, depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24),
                 window_size=7, merging="monai", use_checkpoint=False, use_v2=False):
        super().__init__()
        if merging not in MERGING_ORDERS:
            raise ValueError(f"found merging {merging!r}, expected one of {', '.join(MERGING_ORDERS)}")
        self.merging, self.use_checkpoint, self.use_v2 = merging, use_checkpoint, False
        self.settings = {"in_channels": in_channels, "feature_size": feature_size, "depths": depths,
                         "num_heads": num_heads[:len(depths)], "window_size": window_size}
        self.channels = [feature_size * 2 ** i for i in range(len(depths) + 1)]
        self.stride = self.patch * 2 ** len(depths)                     # of the last map
        embedding = nn.Conv3d(in_channels, feature_size, kernel_size=self.patch, stride=self.patch)
        # Volumes in [0, 1] have mean 0.4 and deviation 0.25, about. The first weights standardise
        # them: otherwise features of different patients start almost equal (cosine 0.997).
        with torch.no_grad():
            embedding.weight *= 4
            embedding.bias -= 0.4 * embedding.weight.sum((1, 2, 3, 4))
        self.patch_embed = named("proj", embedding)
        for i, (dim, depth, heads) in enumerate(zip(self.channels, depths, num_heads)):
            blocks = [SwinBlock(dim, heads, window_size, k % 2 == 1, use_checkpoint)
                      for k in range(depth)]
            stage = {"blocks": nn.ModuleList(blocks), "downsample": PatchMerging(dim)}
            setattr(self, f"layers{i + 1}", nn.ModuleList([nn.ModuleDict(stage)]))  # MONAI's names
        self.mask_token = nn.Parameter(torch.zeros(feature_size))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self._register_load_state_dict_pre_hook(_optional_mask_token, with_module=True)
        if use_v2:
            self.become_v2()

    def become_v2(self):
        self.use_v2 = True
        for i, dim in enumerate(self.channels[:-1]):
            setattr(self, f"layers{i + 1}c", nn.ModuleList([named("layer", ResBlock(dim, dim))]))
        self.to(self.mask_token)

    def become_v1(self):
        self.use_v2 = False
        for i in range(len(self.channels) - 1):
            delattr(self, f"layers{i + 1}c")

    def forward(self, x, mask=None):
        """x (B, C_in, D, H, W), mask (B, 1, D, H, W), 1 = masked -> maps (B, C·2^i, D/2^(i+1), ...)"""
        D, H, W = x.shape[2:]
        x = self.patch_embed(F.pad(x, (0, W % 2, 0, H % 2, 0, D % 2))).permute(0, 2, 3, 4, 1)
        if mask is not None:                    # a patch with any masked voxel becomes the token
            mask = F.max_pool3d(mask.to(x.dtype), self.patch, ceil_mode=True)  # (B, 1, d, h, w)
            x = torch.where(mask.permute(0, 2, 3, 4, 1) > 0, self.mask_token.to(x.dtype), x)
        maps = [x]                                                      # (B, d, h, w, C)
        for i in range(len(self.channels) - 1):
            stage = getattr(self, f"layers{i + 1}")[0]
            if self.use_v2:
                block = getattr(self, f"layers{i + 1}c")[0]
                x = run(block, x.permute(0, 4, 1, 2, 3), recompute=self.use_checkpoint)
                x = x.permute(0, 2, 3, 4, 1)
            for block in stage["blocks"]:
                x = block(x)
            x = stage["downsample"](x, self.merging)
            maps.append(x)
        # NOTE(compat): every map that leaves the encoder passes a parameter-free LayerNorm.
        return [F.layer_norm(m, m.shape[-1:]).permute(0, 4, 1, 2, 3) for m in maps]


class UNetEncoder(nn.Module):
    """The contracting path of a plain 3D U-Net (Çiçek et al. 2016), the paper's second backbone.

    NOTE(paper): it names no sizes of its U-Net."""
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
        self._register_load_state_dict_pre_hook(_optional_mask_token, with_module=True)

    def forward(self, x, mask=None):
        """x (B, C_in, D, H, W), mask (B, 1, D, H, W), 1 = masked -> 5 maps (B, C·2^i, D/2^i, ...)"""
        if mask is not None:                    # there are no patches: voxels become the token
            x = torch.where(mask > 0, self.mask_token.view(1, -1, 1, 1, 1).to(x.dtype), x)
        maps = []
        for i, level in enumerate(self.levels):
            x = F.max_pool3d(x, 2) if i else x
            x = run(level, x, recompute=self.use_checkpoint)
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
    """A frozen BERT- or RoBERTa-like Hugging Face encoder and its fast tokenizer, without dropout.

    name: on the hub, or a folder. ValueError, with name and fault, unless both are whole and fit.
    """

    def __init__(self, name):
        super().__init__()
        from transformers import AutoModel, AutoTokenizer  # slow to import
        self.name = name
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.bert, info = AutoModel.from_pretrained(name, trust_remote_code=False,
                                                        output_loading_info=True)
        except Exception as error:  # noqa: BLE001 - a torn file fails in many ways
            self.refuse(error, "hub name or folder of an encoder with tokenizer and weights")
        self.bert.float()                       # files may be in half precision
        self.requires_grad_(False)
        self.eval()
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values())  # some may have no token
        self.check(info)
        self.width = self.bert.config.hidden_size
        special = {self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id}
        self.register_buffer("special_ids", torch.tensor(sorted(special - {None})))
        digest = hashlib.sha1(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        for key, parameter in self.bert.named_parameters():
            if not key.startswith("pooler."):   # it is not used, and may be random
                digest.update(parameter.contiguous().numpy())
        self.sha1 = digest.hexdigest()

    def refuse(self, found, expected):
        raise ValueError(f"text encoder {self.name}: found {found}; expected {expected}") from None

    def check(self, info):
        tokenizer = self.tokenizer
        # Without its files, transformers makes a tokenizer of special tokens only.
        words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
        if not (tokenizer.is_fast and any(map(str.isalpha, "".join(words)))):
            self.refuse("a tokenizer that knows no word or is slow", "tokenizer.json or vocab.txt")
        if tokenizer.mask_token is None or tokenizer.pad_token is None:
            self.refuse("a tokenizer without mask_token or pad_token", "both, as BERT has")
        wrong = [key for key in info["missing_keys"] if not key.startswith("pooler.")]  # it is not used
        wrong += [key for key in info["unexpected_keys"] if re.search(r"\blayers?\.\d+\.", key)]
        if wrong:
            self.refuse(f"{len(wrong)} missing or unexpected weights, such as {wrong[:3]}",
                        "those of config.json")
        if not all(p.isfinite().all() for p in self.bert.parameters()):
            self.refuse("weights with NaN or infinity", "finite weights")
        if self.bert.config.is_encoder_decoder:
            self.refuse(f"{type(self.bert).__name__}, which has a decoder", "an encoder alone")
        reports = torch.full((2, 1, 250), tokenizer.mask_token_id)      # the most that data.py makes
        reports[:, 0, 1] = self.vocab_size - 1
        reports[1, 0, -1] = tokenizer.pad_token_id
        try:
            first, second = (self(ids, torch.ones_like(ids)) for ids in reports)
        except Exception as error:  # noqa: BLE001 - each model has its own way to fail
            self.refuse(f"a model that cannot read 250 tokens of its tokenizer ({error})",
                        "as many positions, and a row of the embedding for every token")
        if torch.equal(first[:, 0], second[:, 0]):
            self.refuse("a model whose words do not see the words behind them", "an encoder")

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
    """Mean word feature of a sentence: words (B, L, E), sentence_ids (B, L), -1 = none -> (B, S, E)"""
    numbers = torch.arange(num_sentences, device=words.device)
    is_member = (sentence_ids[:, None] == numbers[:, None]).to(words.dtype)  # (B, S, L)
    return is_member @ words / is_member.sum(-1, keepdim=True).clamp(min=1)


# ---------------------------------------------------------------------------------------- fusion

def split_heads(x, num_heads):
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)     # (B, L, E) -> (B, heads, L, d)


class ClassicalAttention(nn.Module):
    """Ordinary cross attention, Fig. 4a: dominant tokens are queries, guide tokens keys and values.

    query_dim: the width of the dominant tokens if not `dim`.
    """

    def __init__(self, dim, num_heads, query_dim=None):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(query_dim or dim, dim)
        self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(3))

    def heads(self, queries, keys):
        """(B, Q, E), (B, K, E) -> q (B, heads, Q, d), k, v (B, heads, K, d)"""
        projected = self.query(queries), self.key(keys), self.value(keys)
        return [split_heads(x, self.num_heads) for x in projected]

    def forward(self, dominant, guide, dominant_mask=None, guide_mask=None):
        """dominant (B, N, E), guide (B, G, E), masks (B, N) and (B, G), True = real -> (B, N, E)"""
        q, k, v = self.heads(dominant, guide)
        mask = None if guide_mask is None else guide_mask[:, None, None]
        fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, N, d)
        return self.out(fused.transpose(1, 2).flatten(2))


class FusionAttention(ClassicalAttention):
    """The paper's cross-modal attention, Eq. (1, 3), Fig. 4b: guide tokens are queries.

    Each makes a map over the dominant tokens, which weighs their values; the weighted copies are
    averaged over the guide. That is the averaged map times the values: no (guide × dominant × E)
    tensor. NOTE(paper): one map a guide token; here one for each head.
    """

    def forward(self, dominant, guide, dominant_mask=None, guide_mask=None):
        """The arguments of ClassicalAttention -> (B, N, E)"""
        B, N, _ = dominant.shape
        q, k, v = self.heads(guide, dominant)                           # v (B, heads, N, d)
        scores = q @ k.mT * q.shape[-1] ** -0.5                         # (B, heads, G, N)
        if dominant_mask is not None:
            scores = scores.masked_fill(~dominant_mask[:, None, None], torch.finfo(scores.dtype).min)
        maps = scores.softmax(-1)
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


class SentenceAttention(ClassicalAttention):
    """Eq. (11): every sentence collects the visual tokens that it speaks of."""
    # NOTE(paper): the one key of Eq. (11) is the pooled volume. A softmax over one key is 1: H_S
    # would not depend on the sentence. Here keys and values are the N tokens of the volume.
    # NOTE(paper): silent on norms. Without them the sentences of a volume share one H_S.

    def __init__(self, dim, num_heads, query_dim):
        super().__init__(dim, num_heads, query_dim)
        self.norm_query, self.norm_tokens = nn.LayerNorm(query_dim), nn.LayerNorm(dim)
        nn.init.zeros_(self.value.bias)
        nn.init.zeros_(self.out.bias)

    def heads(self, sentences, tokens):
        """sentences (B, S, E_t), tokens (B, N, E); `forward` gives H_S (B, S, E)"""
        if tokens.shape[1] > 1:                 # a single token is its own mean
            tokens = tokens - tokens.mean(1, keepdim=True)
        return super().heads(self.norm_query(sentences), self.norm_tokens(tokens))

    def maps(self, sentences, tokens):
        """The attention itself, for pictures: (B, S, E_t), (B, N, E) -> (B, heads, S, N)"""
        q, k, _ = self.heads(sentences, tokens)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


class SentenceGate(nn.Module):
    """Eq. (11) as in the authors' released code: H_S[s] = σ(q(F_I_bar) · k(F_S*[s]) / √E) v(F_S*[s])

    The volume sets no more than the length: SSM, of cosines, sees nothing of it.
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
        kinds = {"proposed": FusionAttention, "classical": ClassicalAttention}
        self.cross_attention = kinds[attention](dim, num_heads)
        self.mlp = mlp(dim)

    def forward(self, x, guide, mask=None, guide_mask=None):
        """x (B, N, E), the dominant tokens, guide (B, G, E), masks (B, N) and (B, G) -> (B, N, E)"""
        y = self.norm1(x)
        x = x + self.self_attention(y, y, mask, mask)
        x = x + self.cross_attention(self.norm2(x), self.norm_guide(guide), mask, guide_mask)
        return x + self.mlp(self.norm3(x))


class Fusion(nn.Module):
    # NOTE(paper): silent on dropout, modality embeddings, a guide that changes; there is none.

    def __init__(self, dim, num_layers, num_heads, attention):
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(dim, num_heads, attention) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, guide, mask=None, guide_mask=None):
        for layer in self.layers:
            x = layer(x, guide, mask, guide_mask)
        return self.norm(x)


class AttentionPool(nn.Module):
    """Self-attention pooling: tokens weighted by a softmax of their own scores."""
    # NOTE(paper): it says no more than this; here it is the additive one of Lin et al. 2017.

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
    # NOTE(paper): no norm is named. Of a map of one voxel a norm of each channel leaves nothing.

    def __init__(self, dim, stride):
        super().__init__()
        self.stride = stride
        widths = [max(dim // 2 ** i, 8) for i in range(stride.bit_length())]
        self.layers = nn.Sequential(*(
            nn.Sequential(nn.Conv3d(c_in, c, 3, padding=1), nn.GroupNorm(1, c), nn.LeakyReLU(0.1),
                          nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False))
            for c_in, c in itertools.pairwise(widths)))
        self.out = nn.Conv3d(widths[-1], 1, 3, padding=1)

    def forward(self, tokens, size):
        """tokens (B, d·h·w, E), size (D, H, W) -> (B, 1, D, H, W)"""
        x = tokens.mT.unflatten(-1, [side // self.stride for side in size])     # (B, E, d, h, w)
        return self.out(self.layers(x))


# ------------------------------------------------------------------------------------------ MG3D

def in_one_pass(module, *calls):
    """Calls of a module, tuples (B, ...) or False, as one with a large batch -> outputs or None"""
    made = [call for call in calls if call]
    arguments = [None if column[0] is None else torch.cat(column) for column in zip(*made)]
    outputs = iter(module(*arguments).chunk(len(made)) if made else ())
    return [next(outputs) if call else None for call in calls]


class MG3D(nn.Module):
    """The pre-training model. Only what the enabled `losses` need is built and computed.

    embed_dim: E, a multiple of num_heads or ValueError; guidance: "sentence" or "word"; attentions:
    "proposed" or "classical"; sentence_values: where H_S comes from, "volume" or "text".
    NOTE(paper): by the letter of Eq. (1, 3) CML has H_I and H_T of masked inputs; here of whole.
    NOTE(paper): depth, heads and width of the fusion are not given.
    """
    own_heads = ("image_proj.", "text_proj.", "text_pool.")     # they fit one text encoder alone

    def __init__(self, encoder, text_encoder, losses=LOSSES[:6], embed_dim=768, num_layers=2,
                 num_heads=12, guidance="sentence", mim_attention="proposed",
                 mlm_attention="proposed", sentence_values="volume"):
        super().__init__()
        E, E_t, V = embed_dim, text_encoder.width, text_encoder.vocab_size
        if E % num_heads:
            raise ValueError(f"found embed_dim {E}, expected a multiple of num_heads {num_heads}")
        self.losses, self.guidance = frozenset(losses), guidance
        self.encoder, self.text_encoder = encoder, text_encoder

        # A module that no loss needs is built and dropped: the others start from the same draws.
        def needed_by(names, module):
            return module if self.losses.intersection(names.split()) else None

        self.image_proj = nn.Linear(encoder.channels[-1], E)
        self.text_proj = needed_by("mim mlm sfr cml clip", nn.Linear(E_t, E))
        self.image_fusion = needed_by("mim cml", Fusion(E, num_layers, num_heads, mim_attention))
        self.text_fusion = needed_by("mlm sfr cml", Fusion(E, num_layers, num_heads, mlm_attention))
        self.text_pool = needed_by("cml clip", AttentionPool(E))
        self.mim_decoder = needed_by("mim", VolumeDecoder(E, encoder.stride))
        head = nn.Sequential(nn.Linear(E, E), nn.GELU(), nn.LayerNorm(E))
        self.mlm_head = needed_by("mlm sfr", head)
        self.mlm_vocabulary = needed_by("mlm", nn.Linear(E, V))
        by_volume = sentence_values == "volume"
        attention = SentenceAttention(E, num_heads, E_t) if by_volume else SentenceGate(E, E_t)
        self.sentence_attention = needed_by("ssm dfa", attention)
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
        sentences = sentence_mean(words, sentence_ids, sentence_mask.shape[1])
        return self.text_pool(sentences, sentence_mask)

    def sentence_features(self, batch, F_I):
        """F_S* (B, S, E_t), frozen and unprojected, and H_S (B, S, E), the visual feature of each"""
        features = self.text_encoder.encode_sentences(batch["single_ids"], batch["single_mask"])
        F_S_star = features.new_zeros(*batch["sentence_mask"].shape, features.shape[-1])
        F_S_star[batch["sentence_mask"]] = features                     # (ΣS, E_t)
        # NOTE(paper): Eq. (11) has F_S as query. Here it is F_S*, which Eq. (12) compares.
        return F_S_star, self.sentence_attention(F_S_star, F_I)         # Eq. (11)

    def forward(self, batch):
        """A batch of `data.collate` -> what the losses compare, a dict by their names for it.

        I image, T text, S sentences; F features, M masked, H fused with the other modality.
        """
        mim, mlm, sfr, cml, ssm, dfa, clip = (name in self.losses for name in LOSSES[:7])
        volume, word_mask = batch["volume"], batch["attention_mask"].bool()
        sentence_ids, sentence_mask = batch["sentence_ids"], batch["sentence_mask"]
        by_sentence = functools.partial(sentence_mean, sentence_ids=sentence_ids,
                                        num_sentences=sentence_mask.shape[1])
        out = {}
        # Visual tokens (B, N, E) of the whole volume, F_I, for all but MIM, and of the masked one, I_M.
        no_mask = torch.zeros_like(batch["volume_mask"]) if mim else None
        F_I, I_M = in_one_pass(self.encode_image, self.losses - {"mim"} and (volume, no_mask),
                               mim and (volume, batch["volume_mask"]))
        # Words of the report, F_T, and of the masked report, T_M: (B, L, E). Sentences F_S: (B, S, E).
        if mim or sfr or cml or clip:
            F_T = self.encode_words(batch["input_ids"], batch["attention_mask"])
            F_S = by_sentence(F_T)
        if mlm or sfr:
            T_M = self.encode_words(batch["masked_ids"], batch["attention_mask"])
        # Image-dominant fusion, Eq. (1): sentences guide I_M for MIM and F_I for CML.
        if mim or cml:
            by_word = self.guidance == "word"
            # the guide, the mask of the visual tokens (none), that of the guide
            others = (F_T, None, sentence_ids >= 0) if by_word else (F_S, None, sentence_mask)
            H_IM, H_I = in_one_pass(self.image_fusion, mim and (I_M, *others), cml and (F_I, *others))
        if mim:
            out["recon"] = self.mim_decoder(H_IM, volume.shape[2:])     # (B, 1, D, H, W)
        # Text-dominant fusion, Eq. (3): visual tokens guide T_M for MLM and SFR and F_T for CML.
        if mlm or sfr or cml:
            others = (F_I, word_mask, None)                             # guide, masks of words, of guide
            H_TM, H_T = in_one_pass(self.text_fusion, (mlm or sfr) and (T_M, *others),
                                    cml and (F_T, *others))
        if mlm or sfr:
            rebuilt = self.mlm_head(H_TM)                               # (B, L, E)
        if mlm:
            masked = batch["mlm_labels"] != -100
            out["mlm_labels"] = batch["mlm_labels"][masked]             # (M,)
            out["logits"] = self.mlm_vocabulary(rebuilt[masked])        # (M, V)
        if sfr:
            # NOTE(paper): the target is F_S as projected, without a gradient.
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
# `load_weights` fills the `encoder` of each. Nothing is masked: the mask token gets no gradient.

class Classifier(nn.Module):
    """Average pooling of the last map, LayerNorm, one linear layer."""
    own_heads = ("norm.", "head.")              # of its classes: left out of a file of others

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder = encoder
        self.norm = nn.LayerNorm(encoder.channels[-1])
        self.head = nn.Linear(encoder.channels[-1], num_classes)
        encoder.mask_token.requires_grad_(False)

    def forward(self, volume):
        """(B, 1, D, H, W) -> logits (B, K)"""
        return self.head(self.norm(self.encoder(volume)[-1].mean((2, 3, 4))))


class UpBlock(nn.Module):
    """Twice the size by a transposed convolution, then a ResBlock on that and the skip."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.transp_conv = named("conv", nn.ConvTranspose3d(c_in, c_out, 2, stride=2, bias=False))
        self.conv_block = ResBlock(2 * c_out, c_out)

    def forward(self, x, skip):
        return self.conv_block(torch.cat([self.transp_conv(x), skip], dim=1))


class SwinUNETR(nn.Module):
    """A Swin encoder and the decoder of Swin UNETR (Hatamizadeh et al. 2022), with MONAI's names."""
    own_heads = ("out.",)

    def __init__(self, encoder, out_channels):
        super().__init__()
        if not isinstance(encoder, SwinTransformer3D):
            name = type(encoder).__name__
            raise ValueError(f"found {name}, expected a SwinTransformer3D")     # noqa: TRY004
        self.encoder = encoder
        c = encoder.channels                                            # C, 2C, 4C, … of n + 1 maps
        self.encoder1 = named("layer", ResBlock(encoder.patch_embed.proj.in_channels, c[0]))
        for i, width in enumerate(c[:-2]):
            setattr(self, f"encoder{i + 2}", named("layer", ResBlock(width, width)))
        self.encoder10 = named("layer", ResBlock(c[-1], c[-1]))
        for i in reversed(range(1, len(c))):
            setattr(self, f"decoder{i + 1}", UpBlock(c[i], c[i - 1]))
        self.decoder1 = UpBlock(c[0], c[0])
        self.out = named("conv", named("conv", nn.Conv3d(c[0], out_channels, 1)))
        encoder.mask_token.requires_grad_(False)

    def forward(self, volume):
        """(B, 1, D, H, W) -> logits (B, out_channels, D, H, W)"""
        size, stride = tuple(volume.shape[2:]), self.encoder.stride
        if any(side % stride for side in size):
            raise ValueError(f"found {size} voxels, expected multiples of {stride}")
        *maps, x = self.encoder(volume)                                 # strides 2, 4, 8, …
        x = self.encoder10(x)
        for i in reversed(range(len(maps))):    # the last skip passes no block
            skip = maps[i] if i == len(maps) - 1 else getattr(self, f"encoder{i + 2}")(maps[i])
            x = getattr(self, f"decoder{i + 2}")(x, skip)
        return self.out(self.decoder1(x, self.encoder1(volume)))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to contexts, feed-forward; pre-norm, residual."""

    def __init__(self, dim, num_heads, dropout):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.qkv, self.self_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.query, self.key, self.value, self.cross_out = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp, self.dropout = mlp(dim), nn.Dropout(dropout)

    def context(self, x):
        """(B, M, E) -> keys and values (B, heads, M, d)"""
        return split_heads(self.key(x), self.num_heads), split_heads(self.value(x), self.num_heads)

    def forward(self, x, contexts, past=None):
        """x (B, L, E), or (B, 1, E) after `past` -> x, the keys and values of all tokens so far"""
        q, k, v = (split_heads(y, self.num_heads) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)  # (B, heads, L, d)
        x = x + self.dropout(self.self_out(y.transpose(1, 2).flatten(2)))
        q = split_heads(self.query(self.norm2(x)), self.num_heads)
        # A softmax for each context: one visual token beside 60 of memory would count 1/61.
        y = sum(F.scaled_dot_product_attention(q, *keys_values) for keys_values in contexts)
        x = x + self.dropout(self.cross_out(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm3(x))), (k, v)


class ReportGenerator(nn.Module):
    """A transformer decoder that attends to visual tokens and, beside them, to a learned memory.

    NOTE(paper): it says M2KT's head with one transformer layer. Width, heads and slots are the
    release's. Its memory never learns; here it is a parameter.
    """
    own_heads = ("words.", "norm.", "head.")

    def __init__(self, encoder, vocab_size, dim=512, num_heads=8, memory_slots=60, max_length=150,
                 dropout=0.1):
        super().__init__()
        self.encoder, self.max_length = encoder, max_length
        self.project = nn.Linear(encoder.channels[-1], dim)
        self.visual_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.visual_attention, self.visual_mlp = ClassicalAttention(dim, num_heads), mlp(dim)
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
        x = self.dropout(self.words(tokens) + self.places(place))
        x, past = self.decoder(x, contexts, past)
        return self.head(self.norm(x)), past

    def forward(self, volume, tokens):
        """volume (B, 1, D, H, W), tokens (B, L <= max_length + 1) -> logits (B, L, V) of the next"""
        return self.decode(tokens, self.contexts(volume))[0]

    @torch.no_grad()
    def generate(self, volume, beams=3):
        """Beam search for the highest mean log-probability of a report and its end -> B lists of ids"""
        B, device = len(volume), volume.device
        contexts = [[x.repeat_interleave(beams, 0) for x in pair] for pair in self.contexts(volume)]
        tokens = torch.full((B * beams, 1), BEGIN, device=device)
        scores = torch.full((B, beams), -torch.inf, device=device)
        scores[:, 0] = 0                        # all beams start equal: only the first may grow
        best = [(-math.inf, [])] * B            # mean log-probability and tokens, of ended reports
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
            # A report only loses probability as it grows: no beam can reach more than this.
            upper_bound = (total.amax((1, 2)) / (self.max_length + 1)).tolist()
            if all(best[b][0] >= upper_bound[b] for b in range(B)):
                break
            V = total.shape[-1]
            scores, choice = total.flatten(1).topk(beams)               # (B, beams)
            beam = (choice // V + torch.arange(B, device=device)[:, None] * beams).flatten()
            tokens = torch.cat([tokens[beam], (choice % V).view(-1, 1)], dim=1)
            past = tuple(x[beam] for x in past)
        return [report for _, report in best]


def build_network(kind, num_classes, config, folder):
    """The network of a run; kind: of `data.Task`, or "pretrain"; config: its flags; folder: --out"""
    encoder = build_encoder(config["encoder"], use_checkpoint=config["use_checkpoint"])
    if kind == "classify":
        return Classifier(encoder, num_classes)
    if kind == "segment":
        return SwinUNETR(encoder, 1 + num_classes)
    if kind == "report":
        return ReportGenerator(encoder, len(config["vocabulary"]))
    text = config["text_encoder"]
    text_encoder = TextEncoder(str(Path(folder, "text_encoder")) if text == "demo" else text)
    names = "embed_dim", "guidance", "mim_attention", "mlm_attention", "sentence_values"
    settings = {name: config[name] for name in names if name in config}     # tasks have few
    losses = [name for name in LOSSES if config.get(name)] if kind == "pretrain" else ["clip"]
    return MG3D(encoder, text_encoder, losses, **settings)


# -------------------------------------------------------------------------------- files of weights

# Names in foreign files -> ours, in this order: pattern, replacement, and whether such files were
# trained with the old order of patch merging.
RENAMES = ((r"^((module|model|net|backbone|_orig_mod)\.)+", "", False),  # wrappers
           (r"^.*?vision_encoder\.(swinViT\.)?", "encoder.", True),     # the authors
           (r"\.mlp\.fc", ".mlp.linear", True),                         # MONAI's SSL
           (r"^swin(ViT|_vit)\.", "encoder.", False),                   # MONAI's SwinUNETR
           (r"^(?=patch_embed\.|layers|levels\.|mask_token)", "encoder.", False))   # encoder.pt
CONTAINERS = "state_dict", "model_state_dict", "model", "network_weights", "net"
# What may stand beside the weights of an encoder: heads of the authors and of SSL, decoders
BESIDE = re.compile(r"mask_token$|.*relative_position_index$|\w+_(head|pre)\.|(en|de)coder\d+\.|out\.")


def export_encoder(encoder, **notes):
    """A flat state dict with MONAI's names (no mask token); notes lie where MONAI does not look"""
    state = encoder.state_dict()
    del state["mask_token"]
    for key in state:
        state[key] = state[key].cpu()
    notes |= {"merging": encoder.merging, "architecture": monai_settings(encoder)}
    state._metadata[""] |= notes
    return state


def monai_settings(encoder):
    """Arguments of `monai.networks.nets.SwinUNETR` for an encoder, and what MONAI makes of it"""
    settings = encoder.settings | {"use_v2": encoder.use_v2}
    if len(settings.get("depths", ())) != 4:
        return settings | {"note": "MONAI has no such network"}
    if encoder.merging == "v0.9":
        note = "MONAI before 1.5 has the same numbers; another network in MONAI from 1.5 on"
        return settings | {"merging": MERGING_ORDERS["v0.9"], "note": note}
    downsample = "merging" if encoder.merging == "monai" else encoder.merging
    return settings | {"downsample": downsample, "note": "MONAI from 1.5 on has the same numbers"}


def write_safetensors(state, file):
    """Write a dict of `export_encoder` to an open file. Its notes become JSON in the metadata."""
    notes = {"format": "pt", "mg3d": json.dumps(state._metadata[""])}
    file.write(safetensors.torch.save(dict(state), notes))


@functools.cache
def local_file(name):
    """The path of a file of weights: as given, or of `hf:owner/name[/file]` in the hub's cache.

    What is not there is fetched: the file, or encoder.safetensors, or else encoder.pt, and
    text_encoder/ beside it. ValueError: no such file, or neither network nor a copy.
    """
    name = Path(name).as_posix()
    if not name.startswith("hf:"):
        return Path(name)
    from huggingface_hub import snapshot_download  # slow to import
    repository = "/".join(name[3:].split("/")[:2])
    file = name[3:].removeprefix(repository).strip("/")
    wanted = [file] if file else ["encoder.safetensors", "encoder.pt"]
    for file in wanted:
        patterns = [file, Path(file).with_name("text_encoder").as_posix() + "/*"]
        try:
            path = Path(snapshot_download(repository, allow_patterns=patterns), file)
        except Exception as error:  # noqa: BLE001 - each version of the hub's client has its own
            raise ValueError(f"{name}: found no copy in the cache of the hub and cannot fetch it: "
                             f"{' '.join(str(error).split())}") from None
        if path.is_file():
            log.info("%s: %s", name, path)
            return path
    raise ValueError(f"{name}: found no {' or '.join(wanted)} in that repository")


def read_checkpoint(path):
    """The dict in a file of weights. ValueError, naming it, if it cannot be read safely."""
    file = local_file(path)
    try:
        if file.suffix != ".safetensors":
            state = torch.load(file, map_location="cpu", weights_only=True)
        else:
            state = OrderedDict(safetensors.torch.load_file(file))
            with safetensors.safe_open(file, "pt") as opened:
                notes = (opened.metadata() or {}).get("mg3d", "{}")     # files of others have none
            state._metadata = {"": dict(json.loads(notes))}
        if not isinstance(state, dict):
            raise TypeError(f"found {type(state).__name__}")
    except FileNotFoundError:
        raise ValueError(f"{path}: found no such file, expected weights") from None
    except Exception as error:  # noqa: BLE001 - a torn file fails in many ways
        raise ValueError(f"{path}: cannot be read safely, expected a dict of weights: {error}") from None
    return state


def notes_of(checkpoint):
    """What stands beside the weights: in encoder.* out of the way, else among them"""
    return getattr(checkpoint, "_metadata", {}).get("", checkpoint)


def flags_of(checkpoint):
    """Flags of the run of ours that wrote a file; {} for files of others, whatever their `config`"""
    notes = notes_of(checkpoint)
    config = notes.get("config")
    is_ours = isinstance(config, dict) and config.get("encoder") in tuple(ENCODERS)
    if notes is checkpoint:
        weights = checkpoint.get("model")
        is_ours &= isinstance(weights, dict) and any(key.startswith("encoder.") for key in weights)
    return config if is_ours else {}


def weights_of(network):
    """Its state dict without the text encoder, which no file of ours holds"""
    return {key: tensor for key, tensor in network.state_dict().items()
            if not key.startswith("text_encoder.")}


def fill(module, tensors, path, inside=None):
    """Load the tensors that have the name and the shape of a weight of the module -> their names.

    A Swin becomes one of the second version if they are. ValueError, and nothing has changed: one
    side has a name or a shape that the other lacks. With `inside`, only names that begin so count.
    """
    encoder = getattr(module, "encoder", module)
    is_new = encoder.merging and not encoder.use_v2 and any("layers1c." in key for key in tensors)
    if is_new:
        encoder.become_v2()
    try:
        fits = check_fit(module, tensors, path, inside)
    except ValueError:
        if is_new:
            encoder.become_v1()
        raise
    module.load_state_dict(fits, strict=False)
    return fits.keys()


def check_fit(module, tensors, path, inside):
    """What `fill` loads. ValueError if it does not fit or is not finite"""
    shapes = {key: tuple(tensor.shape) for key, tensor in weights_of(module).items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    needed = shapes | found
    if inside is not None:
        needed = [key for key in needed
                  if key.startswith(inside) and not BESIDE.match(key.removeprefix(inside))]
    wrong = [f"{key}: expected {shapes.get(key, 'nothing')}, found {found.get(key, 'nothing')}"
             for key in needed if shapes.get(key) != found.get(key)]
    if wrong:
        head = f"{path} does not fill the encoder, or its heads; perhaps another --encoder:"
        raise ValueError("\n  ".join([head, *wrong[:5], f"names in the file: {list(found)[:5]}"]))
    fits = {key: tensor for key, tensor in tensors.items() if found[key] == shapes.get(key)}
    for key, tensor in fits.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: found {key} with NaN or infinity, expected finite weights")
    return fits


def restore(network, checkpoint, path):
    """Give a network weights, blocks and merging of a checkpoint of ours. ValueError: they do not fit,
    or the network's text encoder is not that of the training"""
    if checkpoint.get("text_encoder") and checkpoint["text_encoder"] != network.text_encoder.sha1:
        raise ValueError(f"{path}: found other words or weights in the text encoder "
                         f"{network.text_encoder.name}, expected those it was trained with")
    fill(network, checkpoint["model"], path)
    network.encoder.merging = checkpoint.get("merging", network.encoder.merging)


def read_foreign(path):
    """A file of weights of ours or of others -> {our name: tensor}, its order of merging or None"""
    state = read_checkpoint(path)
    merging = notes_of(state).get("merging")
    for key in CONTAINERS:
        if isinstance(state.get(key), dict):
            state = state[key]
    merging = merging or notes_of(state).get("merging")
    tensors = {}
    for key, tensor in state.items():
        if not torch.is_tensor(tensor):
            continue
        for pattern, replacement, is_old in RENAMES:
            key, count = re.subn(pattern, replacement, key, count=1)
            merging = "v0.9" if count and is_old else merging
        if key in tensors:
            raise ValueError(f"{path}: found two networks, each with {key}, expected one")
        tensors[key] = tensor
    if not tensors:
        raise ValueError(f"{path}: found no tensor, expected a dict of tensors")
    return tensors, merging if merging in tuple(MERGING_ORDERS) else None


def load_weights(module, path, merging="auto", leave_out=()):
    """Fill a module (an encoder, or one with an `.encoder`) from a file of ours or of others.

    Knows `last.pt` and `encoder.*`, the authors' checkpoints, MONAI's SwinUNETR (so VoCo's) and its
    self-supervised Swin. merging: what `encoder.merging` becomes; auto: that of the file's training.
    leave_out: beginnings of names that are not filled.

    Returns {"matched": int, "missing": [...], "unexpected": [...]}. ValueError, before anything is
    loaded, if the file holds no dict of weights or another encoder.
    """
    tensors, told = read_foreign(path)
    encoder = getattr(module, "encoder", module)
    inside = "" if encoder is module else "encoder."
    if encoder is module:
        tensors = {key.removeprefix("encoder."): tensor for key, tensor in tensors.items()
                   if key.startswith("encoder.")}
    used = {key: tensor for key, tensor in tensors.items() if not key.startswith(leave_out)}
    matched = fill(module, used, path, inside)
    missing = [key for key in weights_of(module) if key not in matched]
    unexpected = [key for key in tensors if key not in matched]
    log.info("%s: %d weights matched, %d missing, %d unexpected", path, len(matched), len(missing),
             len(unexpected))
    if any("proj_head" in key for key in unexpected):
        log.info("%s: vision_encoder.proj_head is left out; the method has no such layer", path)
    if encoder.merging:
        # NOTE(compat): VoCo v2 and VoComni, the known files of the second version, are of MONAI 1.3.
        likely, other = ("v0.9", "monai") if encoder.use_v2 else ("monai", "v0.9")
        if merging == "auto" and told is None:
            log.warning("%s does not tell its patch merging: %r is taken; the other choice is "
                        "--merging %s", path, likely, other)
        encoder.merging = (told or likely) if merging == "auto" else merging
        if told not in (None, encoder.merging):
            log.warning("%s was trained with the patch merging %r", path, told)
        log.info("%s: patch merging %r", path, encoder.merging)
    return {"matched": len(matched), "missing": missing, "unexpected": unexpected}
