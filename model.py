"""Everything of MG-3D that has parameters: 3D encoders, the frozen text encoder, fusion attention, MG3D, foreign weights.

B patients, C channels, D H W voxels (z, y, x), N visual tokens, L report tokens, S sentences, E embedding, V vocabulary.
`MG3D.forward` is the method: above it stands what it is made of, below it heads for other tasks and files of weights.
"""
import contextlib
import functools
import logging
import math
import os
import pickle
from collections import OrderedDict, defaultdict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

log = logging.getLogger("mg3d")

LOSSES = ("mim", "mlm", "sfr", "cml", "ssm", "dfa", "clip")


# ------------------------------------------------------------------------------- 3D Swin Transformer: windows
# Attention within windows of 7×7×7 tokens is exact and never needs a mask, a roll or a padded copy of the volume:
#   - tokens are sorted window by window, with one permutation that is computed once for a shape;
#   - a shifted window that wraps around the volume is cut at the seam into smaller windows;
#   - windows over the edge hold padding tokens, which others may attend to. These all share one key and one value
#     (the bias of `qkv`), so a single extra key stands for all of them, with the log-sum-exp of their biases;
#   - windows of one shape are worked on a few at a time, so that their scores stay in cache.

@functools.lru_cache(maxsize=64)
def window_plan(batch, size, window, shift, device):
    """Which tokens share a window, for B maps of (d, h, w) tokens and windows of (wd, wh, ww) tokens shifted by (sd, sh, sw).

    Returns (order, inverse, groups). `order` (B·d·h·w,) sorts the tokens window by window, group by group, `inverse` undoes
    it; a group is (number of windows, real, padding): windows of one shape, the places of their real and of their padding
    tokens in the raster of the uncut window.
    """
    padded = [-(-s // w) * w for s, w in zip(size, window)]
    token = np.full(padded, -1)                                                     # -1 = padding
    token[:size[0], :size[1], :size[2]] = np.arange(np.prod(size)).reshape(size)
    token = np.roll(token, [-s for s in shift], axis=(0, 1, 2))
    piece = np.zeros(padded, int)                                                   # on which side of a seam
    for axis, s in enumerate(shift):
        if s:
            behind = (np.arange(padded[axis]) >= padded[axis] - s).astype(int)
            piece = 2 * piece + behind.reshape([-1 if a == axis else 1 for a in range(3)])

    def cut(grid):
        grid = grid.reshape([n for p, w in zip(padded, window) for n in (p // w, w)])
        return grid.transpose(0, 2, 4, 1, 3, 5).reshape(-1, np.prod(window))        # (windows, tokens)

    groups = defaultdict(list)
    for tokens, pieces in zip(cut(token), cut(piece)):
        for p in np.unique(pieces):
            places = np.flatnonzero(pieces == p)
            real, padding = places[tokens[places] >= 0], places[tokens[places] < 0]
            if len(real):
                groups[tuple(real), tuple(padding)].append(tokens[real])
    with torch.inference_mode(False):                   # the plan is kept, and later calls may want gradients
        first = np.arange(batch)[:, None] * np.prod(size)                           # token of each map
        order = np.concatenate([(first + np.concatenate(windows)).ravel() for windows in groups.values()])
        order = torch.from_numpy(order).to(device)
        return order, order.argsort(), [
            (batch * len(windows), torch.tensor(real, device=device), torch.tensor(padding, device=device).long())
            for (real, padding), windows in groups.items()]


class _Permute(torch.autograd.Function):
    """x[order]; as no row repeats, the backward pass is the inverse permutation and not a slow scatter-add."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return grad[inverse], None, None


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ / √d + bias) v for W windows; scores are made again in the backward pass instead of being kept.

    q (W, heads, n, d); k, v (W, heads, m, d); bias (heads, n, m).
    """

    @staticmethod
    def forward(ctx, q, k, v, bias):
        bias = bias.detach().to(q.dtype)                # a bias that asks for a gradient would take SDPA's slow path
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        ctx.save_for_backward(q, k, v, bias)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, bias = ctx.saved_tensors
        d = q.shape[-1]
        q_scaled, k_scaled = q * d ** -0.5, k * d ** -0.5
        wide = [q_scaled, k_scaled, grad]
        if d < 16:                                      # matrix libraries are slow at making 4 or 8 columns: 16 take half the time
            wide = [F.pad(x, (0, 16 - d)) for x in wide]
        grads = []
        for head, (q_h, k_h, grad_h) in enumerate(zip(*(x.unbind(1) for x in wide))):       # one head's scores stay in cache
            weights = torch.baddbmm(bias[head], q_scaled[:, head], k[:, head].mT).softmax(-1)           # (W, n, m)
            grad_scores = torch._softmax_backward_data(grad[:, head] @ v[:, head].mT, weights, -1, weights.dtype)
            grads.append(((grad_scores @ k_h)[..., :d], (grad_scores.mT @ q_h)[..., :d], (weights.mT @ grad_h)[..., :d],
                          grad_scores.sum(0)))
        grad_q, grad_k, grad_v, grad_bias = zip(*grads)
        return torch.stack(grad_q, 1), torch.stack(grad_k, 1), torch.stack(grad_v, 1), torch.stack(grad_bias)


class WindowAttention(nn.Module):
    def __init__(self, dim, num_heads, window_size):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 3, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        place = torch.cartesian_prod(*[torch.arange(window_size)] * 3)              # (tokens, 3)
        offset = place[:, None] - place[None] + window_size - 1                     # (tokens, tokens, 3), from 0
        base = torch.tensor([(2 * window_size - 1) ** 2, 2 * window_size - 1, 1])
        self.register_buffer("relative_position_index", (offset * base).sum(-1))    # (tokens, tokens)

    def bias(self, real, padding):
        """(heads, n, n), or (heads, n, n + 1) where the window has padding: its biases add up in one extra key."""
        # NOTE(compat): a window shrunk to a small map keeps the first n places of the full window's raster, as if cut by
        # `relative_position_index[:n, :n]`, whatever its shape. Published weights were trained so.
        index = self.relative_position_index[real][:, torch.cat([real, padding])]   # (n, n + padding)
        bias = self.relative_position_bias_table[index].permute(2, 0, 1)            # (heads, n, n + padding)
        n = len(real)
        if len(padding):
            bias = torch.cat([bias[:, :, :n], bias[:, :, n:].logsumexp(-1, keepdim=True)], dim=-1)
        return bias

    def forward(self, x, bias):
        """x (W, n, C) -> (W, n, C)"""
        W, n, C = x.shape
        q, k, v = self.qkv(x).view(W, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)      # each (W, heads, n, d)
        if bias.shape[-1] > n:                                                      # the key and value of padding: LN(0) W + b = b
            _, k_pad, v_pad = self.qkv.bias.to(k.dtype).view(3, 1, self.num_heads, 1, -1).expand(3, W, -1, -1, -1)
            k, v = torch.cat([k, k_pad], dim=2), torch.cat([v, v_pad], dim=2)
        x = _Attention.apply(q, k, v, bias)                                         # (W, heads, n, d)
        return self.proj(x.transpose(1, 2).reshape(W, n, C))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.linear2(F.gelu(self.linear1(x)))


class SwinBlock(nn.Module):
    # Scores of one head in one call to attention: 4 MB in float32 stay in a CPU's cache, a GPU wants larger pieces.
    scores_at_a_time = {"cpu": 2 ** 20, "cuda": 2 ** 25}

    def __init__(self, dim, num_heads, window_size, shifted, use_checkpoint):
        super().__init__()
        self.window_size, self.shifted, self.use_checkpoint = window_size, shifted, use_checkpoint
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def run_windows(self, x, bias):
        x = x + self.attn(self.norm1(x), bias)                                      # (W, n, C)
        return x + self.mlp(self.norm2(x))

    def forward(self, x):
        """x (B, d, h, w, C) -> the same shape"""
        B, *size, C = x.shape
        # NOTE(compat): along an axis that a window covers whole, the window shrinks to the map and is not shifted.
        window = tuple(min(s, self.window_size) for s in size)
        shift = tuple(self.window_size // 2 if self.shifted and s > self.window_size else 0 for s in size)
        order, inverse, groups = window_plan(B, tuple(size), window, shift, x.device)
        x = _Permute.apply(x.reshape(-1, C), order, inverse)                        # (tokens of all maps, C), sorted
        parts = x.split([number * len(real) for number, real, _ in groups])
        done = []
        for part, (number, real, padding) in zip(parts, groups):
            bias = self.attn.bias(real, padding)
            few = max(1, self.scores_at_a_time[x.device.type] // bias[0].numel())
            for windows in part.view(number, len(real), C).split(few):
                if self.use_checkpoint and torch.is_grad_enabled():
                    windows = checkpoint(self.run_windows, windows, bias, use_reentrant=False, preserve_rng_state=False)
                else:
                    windows = self.run_windows(windows, bias)
                done.append(windows.flatten(0, 1))
        return _Permute.apply(torch.cat(done), inverse, order).view(B, *size, C)


class PatchMerging(nn.Module):
    """Halve a map: the 8 tokens of every 2×2×2 cube, one behind the other, normed and reduced to 2C."""
    # NOTE(compat): MONAI before 1.5, its SSL file and the authors' checkpoints take two sub-lattices twice ("v0.9").
    orders = {"monai": ("000", "100", "010", "001", "110", "101", "011", "111"),
              "v0.9": ("000", "100", "010", "001", "101", "010", "001", "111")}

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x, merging):
        """x (B, d, h, w, C) -> (B, d/2, h/2, w/2, 2C), odd sides padded with zeros"""
        _, d, h, w, _ = x.shape
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
        x = torch.cat([x[:, int(i)::2, int(j)::2, int(k)::2] for i, j, k in self.orders[merging]], dim=-1)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """Blocks and the merging that follows them, held together for MONAI's names."""

    def __init__(self, dim, depth, num_heads, window_size, use_checkpoint):
        super().__init__()
        self.blocks = nn.ModuleList(SwinBlock(dim, num_heads, window_size, i % 2 == 1, use_checkpoint) for i in range(depth))
        self.downsample = PatchMerging(dim)


class PatchEmbed(nn.Module):
    def __init__(self, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=2, stride=2)
        # Volumes in [0, 1] have a mean of about 0.4 and a deviation of about 0.25. The first weights standardise them:
        # without that, patients start out all but alike (cosine 0.997) and contrast takes long to find a hold.
        with torch.no_grad():
            self.proj.weight *= 4
            self.proj.bias -= 0.4 * self.proj.weight.sum((1, 2, 3, 4))


def _optional_mask_token(module, state_dict, prefix, *_):
    """Encoders from elsewhere have no mask token; they keep loading strictly."""
    state_dict.setdefault(prefix + "mask_token", module.mask_token)


class SwinTransformer3D(nn.Module):
    """3D Swin Transformer with the names and numbers of MONAI's `SwinTransformer` (Hatamizadeh et al. 2022).

    Args: feature_size is the width after patch embedding, window_size the side of a window in tokens, merging "monai" or
    "v0.9" (see `PatchMerging`); use_checkpoint recomputes a block's insides in the backward pass to save memory.
    """
    patch = 2
    stride = 32                                                                     # of the last map

    def __init__(self, in_channels=1, feature_size=48, depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24), window_size=7,
                 merging="monai", use_checkpoint=False):
        super().__init__()
        if merging not in PatchMerging.orders:
            raise ValueError(f"merging is {merging!r}, expected one of {list(PatchMerging.orders)}")
        self.merging = merging
        self.channels = [feature_size * 2 ** i for i in range(5)]
        self.patch_embed = PatchEmbed(in_channels, feature_size)
        for i, (depth, heads) in enumerate(zip(depths, num_heads)):
            stage = SwinStage(self.channels[i], depth, heads, window_size, use_checkpoint)
            setattr(self, f"layers{i + 1}", nn.ModuleList([stage]))
        self.mask_token = nn.Parameter(torch.zeros(feature_size))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.register_load_state_dict_pre_hook(_optional_mask_token)

    def forward(self, x, mask=None):
        """x (B, C_in, D, H, W), mask (B, 1, D, H, W) with 1 = masked voxel
        -> 5 maps (B, C·2^i, D/2^(i+1), ...), i = 0..4. A patch with any masked voxel becomes the mask token."""
        B, _, D, H, W = x.shape
        x = self.patch_embed.proj(F.pad(x, (0, W % 2, 0, H % 2, 0, D % 2))).permute(0, 2, 3, 4, 1)   # (B, d, h, w, C)
        if mask is not None:
            masked = F.max_pool3d(mask.to(x.dtype), self.patch, ceil_mode=True)     # (B, 1, d, h, w)
            x = torch.where(masked.permute(0, 2, 3, 4, 1) > 0, self.mask_token.to(x.dtype), x)
        maps = [x]
        for stages in (self.layers1, self.layers2, self.layers3, self.layers4):
            stage = stages[0]
            for block in stage.blocks:
                x = block(x)
            x = stage.downsample(x, self.merging)
            maps.append(x)
        # NOTE(compat): a LayerNorm over channels without parameters on every map that leaves the encoder.
        return [F.layer_norm(m, m.shape[-1:]).permute(0, 4, 1, 2, 3) for m in maps]


class UNetEncoder(nn.Module):
    """The contracting path of a plain 3D U-Net (Çiçek et al. 2016), the paper's second backbone: 5 levels, strides 1 to 16."""
    stride = 16

    def __init__(self, in_channels=1, feature_size=32, use_checkpoint=False):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.channels = [feature_size * 2 ** i for i in range(5)]
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv3d(c_in, c, 3, padding=1), nn.GroupNorm(8, c), nn.ReLU(),
                          nn.Conv3d(c, c, 3, padding=1), nn.GroupNorm(8, c), nn.ReLU())
            for c_in, c in zip([in_channels] + self.channels, self.channels))
        self.mask_token = nn.Parameter(torch.zeros(in_channels))
        self.register_load_state_dict_pre_hook(_optional_mask_token)

    def forward(self, x, mask=None):
        """x (B, C_in, D, H, W), mask (B, 1, D, H, W) with 1 = masked -> 5 maps (B, C·2^i, D/2^i, ...), i = 0..4"""
        if mask is not None:                            # no patches here: the token stands in for masked voxels
            x = torch.where(mask > 0, self.mask_token.view(1, -1, 1, 1, 1).to(x.dtype), x)
        maps = []
        for i, level in enumerate(self.levels):
            x = F.max_pool3d(x, 2) if i else x
            x = checkpoint(level, x, use_reentrant=False) if self.use_checkpoint and torch.is_grad_enabled() else level(x)
            maps.append(x)
        return maps


ENCODERS = {"swin_b": functools.partial(SwinTransformer3D, feature_size=48),
            "swin_l": functools.partial(SwinTransformer3D, feature_size=96),
            "swin_t": functools.partial(SwinTransformer3D, feature_size=12),        # for tests and the demo
            "unet": UNetEncoder}


def build_encoder(name, in_channels=1, **kwargs):
    """One of ENCODERS by name; kwargs go to its constructor. ValueError for an unknown name."""
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}, expected one of {', '.join(ENCODERS)}")
    return ENCODERS[name](in_channels=in_channels, **kwargs)


# ------------------------------------------------------------------------------------------------------- text

class TextEncoder(nn.Module):
    """A frozen Hugging Face encoder with its fast tokenizer: a hub name or a local folder, BERT- or RoBERTa-like.

    Frozen means: no gradient, no dropout, whatever mode the model around it is in. ValueError, naming the folder, where
    there is no such model, no weights, or no fast tokenizer.
    """

    def __init__(self, name):
        super().__init__()
        from transformers import AutoModel, AutoTokenizer    # slow to import, and needed here alone
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
            self.bert, loading = AutoModel.from_pretrained(name, trust_remote_code=False, output_loading_info=True)
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"text encoder {name}: expected a Hugging Face encoder with its tokenizer and weights, "
                             f"a hub name or a local folder; found: {error}") from None
        self.bert.float()                               # files in half precision come as they are; autocast lowers what it likes
        if not self.tokenizer.is_fast:
            raise ValueError(f"text encoder {name}: expected a fast tokenizer (tokenizer.json), which tells words apart")
        missing = [key for key in loading["missing_keys"] if "pooler" not in key]     # the pooler is not used
        if missing:
            raise ValueError(f"text encoder {name}: {len(missing)} weights are missing from the file, among them "
                             f"{sorted(missing)[:3]}")
        self.name = name
        self.width = self.bert.config.hidden_size
        self.vocab_size = len(self.tokenizer)
        around = {self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id} - {None}
        self.register_buffer("no_word_ids", torch.tensor(sorted(around)))            # what stands around words
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, input_ids, attention_mask):
        """(B, L), (B, L) -> word features (B, L, E_t)"""
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def encode_sentences(self, input_ids, attention_mask):
        """T sentences encoded one by one: (T, L), (T, L) -> mean of the word features of each (T, E_t)"""
        belongs = torch.isin(input_ids, self.no_word_ids).long().neg()              # 0 = word, -1 = none
        return sentence_mean(self(input_ids, attention_mask), belongs, 1).squeeze(1)


def make_demo_text_encoder(folder, reports, seed=0):
    """Write a small BERT for the demo to a folder: a vocabulary of the reports' words, random frozen weights, no network.

    Random features keep what matters here: equal words have equal features, so similar sentences stay similar.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {word for report in reports for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(report))}
    vocabulary = {word: i for i, word in enumerate(special + sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert = BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                                    intermediate_size=256, max_position_embeddings=512))
        with torch.no_grad():                           # words weigh more than places, so that order does not drown them
            bert.embeddings.word_embeddings.weight *= 5
    bert.save_pretrained(folder)


def sentence_mean(words, sentence_ids, num_sentences):
    """Mean of the word features of each sentence: words (B, L, E), sentence_ids (B, L), -1 = none -> (B, S, E)"""
    belongs = sentence_ids[:, None] == torch.arange(num_sentences, device=words.device)[:, None]      # (B, S, L)
    belongs = belongs.to(words.dtype)
    return belongs @ words / belongs.sum(-1, keepdim=True).clamp(min=1)


# ----------------------------------------------------------------------------------------------------- fusion

def _heads(x, num_heads):
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)                         # (B, L, E) -> (B, heads, L, d)


class FusionAttention(nn.Module):
    """The paper's cross-modal attention, Eq. (1, 3), Fig. 4b: the dominant modality gives keys and values, the guide queries.

    Every guide token makes its own attention map over the dominant tokens, the map weighs the values one by one, and the
    weighted copies are averaged over the guide. As the values do not depend on the guide token, that is the averaged map
    times the values, so no (guide × dominant × E) tensor is made.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, dominant, guide, dominant_mask=None, guide_mask=None):
        """dominant (B, N, E), guide (B, G, E), masks (B, N) and (B, G) with True = real token -> (B, N, E)"""
        B, N, _ = dominant.shape
        q, k, v = (_heads(x, self.num_heads) for x in (self.query(guide), self.key(dominant), self.value(dominant)))
        scores = q @ k.mT * q.shape[-1] ** -0.5                                     # (B, heads, G, N)
        if dominant_mask is not None:
            scores = scores.masked_fill(~dominant_mask[:, None, None], torch.finfo(scores.dtype).min)
        maps = scores.softmax(-1)                                                   # one map for each guide token
        if guide_mask is None:
            attention = maps.mean(2)                                                # (B, heads, N)
        else:
            weight = guide_mask / guide_mask.sum(-1, keepdim=True).clamp(min=1)     # (B, G), adds up to 1
            attention = torch.einsum("bhgn,bg->bhn", maps, weight.to(maps.dtype))
        # NOTE(paper): a map adds up to 1 over N tokens and would shrink the values N-fold; times N, uniform attention
        # leaves them as they are.
        real = N if dominant_mask is None else dominant_mask.sum(-1).view(B, 1, 1)
        fused = (attention * real).to(v.dtype)[..., None] * v                       # (B, heads, N, d)  Eq. (1, 3)
        return self.out(fused.transpose(1, 2).flatten(2))


class ClassicalAttention(nn.Module):
    """Ordinary cross attention, Fig. 4a: dominant tokens are queries, guide tokens keys and values. With itself as the
    guide it is self-attention. `query_dim` is the width of the dominant tokens, where it is not `dim`."""

    def __init__(self, dim, num_heads, query_dim=None):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(query_dim or dim, dim)
        self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, dominant, guide, dominant_mask=None, guide_mask=None):
        """dominant (B, N, E), guide (B, G, E), masks True = real token -> (B, N, E). Padded queries go their way unused."""
        q, k, v = (_heads(x, self.num_heads) for x in (self.query(dominant), self.key(guide), self.value(guide)))
        mask = None if guide_mask is None else guide_mask[:, None, None]
        fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)             # (B, heads, N, d)
        return self.out(fused.transpose(1, 2).flatten(2))


class FusionLayer(nn.Module):
    """Self-attention on the dominant tokens, cross-modal attention, feed-forward; pre-norm, residual."""

    def __init__(self, dim, num_heads, attention):
        super().__init__()
        self.norm1, self.norm2, self.norm_guide, self.norm3 = (nn.LayerNorm(dim) for _ in range(4))
        self.self_attention = ClassicalAttention(dim, num_heads)
        self.cross_attention = {"proposed": FusionAttention, "classical": ClassicalAttention}[attention](dim, num_heads)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x, guide, mask=None, guide_mask=None):
        y = self.norm1(x)
        x = x + self.self_attention(y, y, mask, mask)
        x = x + self.cross_attention(self.norm2(x), self.norm_guide(guide), mask, guide_mask)
        return x + self.mlp(self.norm3(x))                                          # (B, N, E)


class Fusion(nn.Module):
    """A stack of fusion layers with a final norm. NOTE(paper): no dropout, of which the paper says nothing."""

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
    """Self-attention pooling: tokens weighted by a softmax of their own scores. (B, S, E), (B, S) -> (B, E)"""
    # NOTE(paper): "a self-attention pooling layer" is all it says; this is the additive form of Lin et al. 2017.

    def __init__(self, dim):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1))

    def forward(self, x, mask):
        score = self.score(x).squeeze(-1).float().masked_fill(~mask, torch.finfo(torch.float32).min)   # (B, S)
        return torch.einsum("bs,bse->be", score.softmax(-1).to(x.dtype), x)


class VolumeDecoder(nn.Module):
    """Fused tokens to a volume: 3×3×3 convolutions, each followed by ×2 trilinear up-sampling, to full size."""
    # NOTE(paper): no norm is named. One over all channels keeps their ratios; a norm of each channel by itself would leave
    # no more than signs of a map of two voxels, and nothing of one.

    def __init__(self, dim, stride):
        super().__init__()
        widths = [max(dim // 2 ** i, 8) for i in range(stride.bit_length())]        # halved with every doubling in size
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv3d(c_in, c, 3, padding=1), nn.GroupNorm(1, c), nn.LeakyReLU(0.1),
                          nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False))
            for c_in, c in zip(widths, widths[1:]))
        self.out = nn.Conv3d(widths[-1], 1, 3, padding=1)

    def forward(self, tokens, size):
        """tokens (B, d·h·w, E), size (d, h, w) -> (B, 1, D, H, W)"""
        x = tokens.mT.unflatten(-1, size)                                           # (B, E, d, h, w)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


# ------------------------------------------------------------------------------------------------------- MG3D

class MG3D(nn.Module):
    """The pre-training model. `losses` names the enabled ones of LOSSES: only what they need is built and computed.

    encoder: from `build_encoder`; text_encoder: a frozen `TextEncoder`; embed_dim E; guidance of the image-dominant stack
    by "sentence" or "word"; mim_attention and mlm_attention "proposed" or "classical".
    NOTE(paper): depth, heads and width of the fusion are not given; 2 layers, 12 heads, 768.
    """

    def __init__(self, encoder, text_encoder, losses=LOSSES[:6], embed_dim=768, num_layers=2, num_heads=12,
                 guidance="sentence", mim_attention="proposed", mlm_attention="proposed"):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.losses, self.guidance = frozenset(losses), guidance
        self.encoder, self.text_encoder = encoder, text_encoder

        def keep(module, *needed_by):
            # Every part is made and then kept or dropped: one loss more or less leaves the others' first weights alone.
            return module if self.losses & set(needed_by) else None

        self.image_proj = nn.Linear(encoder.channels[-1], embed_dim)
        self.text_proj = keep(nn.Linear(text_encoder.width, embed_dim), "mim", "mlm", "sfr", "cml", "clip")
        self.image_fusion = keep(Fusion(embed_dim, num_layers, num_heads, mim_attention), "mim", "cml")
        self.text_fusion = keep(Fusion(embed_dim, num_layers, num_heads, mlm_attention), "mlm", "sfr", "cml")
        self.text_pool = keep(AttentionPool(embed_dim), "cml", "clip")
        self.mim_decoder = keep(VolumeDecoder(embed_dim, encoder.stride), "mim")
        self.mlm_head = keep(nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.GELU(), nn.LayerNorm(embed_dim)), "mlm", "sfr")
        self.mlm_vocabulary = keep(nn.Linear(embed_dim, text_encoder.vocab_size), "mlm")
        self.sentence_attention = keep(ClassicalAttention(embed_dim, num_heads, query_dim=text_encoder.width), "ssm", "dfa")
        self.visual_sentence_pool = keep(AttentionPool(embed_dim), "dfa")
        encoder.mask_token.requires_grad_("mim" in self.losses)

    def encode_image(self, volume, mask=None):
        """(B, 1, D, H, W) -> visual tokens (B, N, E); their mean over N is the global feature"""
        return self.image_proj(self.encoder(volume, mask)[-1].flatten(2).mT)

    def encode_text(self, input_ids, attention_mask, sentence_ids, sentence_mask):
        """(B, L) each, sentence_mask (B, S) -> global report feature (B, E)"""
        words = self.text_proj(self.text_encoder(input_ids, attention_mask))
        return self.text_pool(sentence_mean(words, sentence_ids, sentence_mask.shape[1]), sentence_mask)

    def forward(self, batch):
        """A batch of `data.collate` -> a dict with what the enabled losses compare, named as their arguments are."""
        on = self.losses.__contains__
        volume, word_mask = batch["volume"], batch["attention_mask"].bool()
        sentence_ids, sentence_mask = batch["sentence_ids"], batch["sentence_mask"]
        B, S = len(volume), sentence_mask.shape[1]
        by_sentence = functools.partial(sentence_mean, sentence_ids=sentence_ids, num_sentences=S)
        out = {}

        # Visual tokens F_I of the whole volume and I_M of the masked one; the two passes share a batch.
        whole, masked = bool(self.losses - {"mim"}), on("mim")
        volumes, masks = torch.cat([volume] * (whole + masked)), None
        if masked:
            masks = torch.cat([torch.zeros_like(batch["volume_mask"])] * whole + [batch["volume_mask"]])
        tokens = self.encode_image(volumes, masks)
        f_i, i_m = (tokens[:B] if whole else None), (tokens[-B:] if masked else None)           # (B, N, E)

        # Word features F_T, their sentence means F_S, and T_M of the masked report.
        if self.text_proj is not None:
            f_t = self.text_proj(self.text_encoder(batch["input_ids"], batch["attention_mask"]))           # (B, L, E)
            f_s = by_sentence(f_t)                                                                          # (B, S, E)
        if self.mlm_head is not None:
            t_m = self.text_proj(self.text_encoder(batch["masked_ids"], batch["attention_mask"]))          # (B, L, E)

        # Image-dominant fusion of I_M (for MIM) and of F_I (for CML), again in one batch: Eq. (1).
        if self.image_fusion is not None:
            guide, guide_mask = (f_s, sentence_mask) if self.guidance == "sentence" else (f_t, sentence_ids >= 0)
            dominant = ([i_m] if on("mim") else []) + ([f_i] if on("cml") else [])
            fused = self.image_fusion(torch.cat(dominant), torch.cat([guide] * len(dominant)), None,
                                      torch.cat([guide_mask] * len(dominant)))
            if on("mim"):
                size = [side // self.encoder.stride for side in volume.shape[2:]]
                out["recon"] = self.mim_decoder(fused[:B], size)                                # (B, 1, D, H, W)
            if on("cml"):
                out["h_i"] = fused[-B:].mean(1)                                                 # (B, E)

        # Text-dominant fusion of T_M (for MLM and SFR) and of F_T (for CML): Eq. (3).
        if self.text_fusion is not None:
            dominant = ([t_m] if self.mlm_head is not None else []) + ([f_t] if on("cml") else [])
            fused = self.text_fusion(torch.cat(dominant), torch.cat([f_i] * len(dominant)),
                                     torch.cat([word_mask] * len(dominant)), None)
            if self.mlm_head is not None:
                rebuilt = self.mlm_head(fused[:B])                                              # (B, L, E)
            if on("mlm"):
                chosen = batch["mlm_labels"] != -100
                out["logits"], out["mlm_labels"] = self.mlm_vocabulary(rebuilt[chosen]), batch["mlm_labels"][chosen]  # (M, V), (M,)
            if on("sfr"):
                # NOTE(paper): the target is F_S in the width of the fusion, so after the projection, without a gradient.
                out["rebuilt"], out["sentences"] = by_sentence(rebuilt), f_s.detach()           # (B, S, E)
            if on("cml"):
                out["h_t"] = self.text_pool(by_sentence(fused[-B:]), sentence_mask)             # (B, E)

        # Global features: volumes by average, reports by self-attention pooling.
        if on("cml") or on("dfa") or on("clip"):
            out["f_i"] = f_i.mean(1)                                                            # (B, E)
        if on("cml") or on("clip"):
            out["f_t"] = self.text_pool(f_s, sentence_mask)                                     # (B, E)

        # Sentence-specific visual features H_S.
        # NOTE(paper): Eq. (11) has the one pooled vector of the volume as its only key: a softmax over one key is 1 and
        # H_S would not depend on the sentence. Keys and values are therefore the N tokens of the whole volume.
        if self.sentence_attention is not None:
            alone = self.text_encoder.encode_sentences(batch["single_ids"], batch["single_mask"])   # (ΣS, E_t)
            f_s_alone = alone.new_zeros(B, S, alone.shape[-1])
            f_s_alone[sentence_mask] = alone                                                    # (B, S, E_t)
            h_s = self.sentence_attention(f_s_alone, f_i)                                       # (B, S, E)  Eq. (11)
            if on("ssm"):
                out["text_sentences"], out["visual_sentences"] = f_s_alone, h_s
            if on("dfa"):
                out["h_s"] = self.visual_sentence_pool(h_s, sentence_mask)                      # (B, E)
        return out


# -------------------------------------------------------------------------------------- heads of the nine tasks
# Each holds its `encoder`, which `load_weights` fills from a pre-trained file. Nothing is masked here, so the mask token,
# which would never have a gradient, does not ask for one.

class Classifier(nn.Module):
    """Average pooling of the last map, LayerNorm, one linear layer: volume (B, 1, D, H, W) -> logits (B, K)"""

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder = encoder
        self.norm = nn.LayerNorm(encoder.channels[-1])
        self.head = nn.Linear(encoder.channels[-1], num_classes)
        encoder.mask_token.requires_grad_(False)

    def forward(self, volume):
        return self.head(self.norm(self.encoder(volume)[-1].mean((2, 3, 4))))


def _under(name, module):
    """A module under one more name, as MONAI's weights have it"""
    return nn.Sequential(OrderedDict({name: module}))


class ResBlock(nn.Module):
    """Two 3×3×3 convolutions with instance norm (no parameters, no running mean) and a shortcut."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = _under("conv", nn.Conv3d(c_in, c_out, 3, padding=1, bias=False))
        self.conv2 = _under("conv", nn.Conv3d(c_out, c_out, 3, padding=1, bias=False))
        self.conv3 = _under("conv", nn.Conv3d(c_in, c_out, 1, bias=False)) if c_in != c_out else None

    def forward(self, x):
        def norm(x):                                    # of each channel over the volume; a map of one voxel becomes 0
            return F.layer_norm(x, x.shape[2:])
        shortcut = x if self.conv3 is None else norm(self.conv3(x))
        x = norm(self.conv2(F.leaky_relu(norm(self.conv1(x)), 0.01)))
        return F.leaky_relu(x + shortcut, 0.01)


class UpBlock(nn.Module):
    """Twice the size by a transposed convolution, then a ResBlock on that and the skip connection."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.transp_conv = _under("conv", nn.ConvTranspose3d(c_in, c_out, 2, stride=2, bias=False))
        self.conv_block = ResBlock(2 * c_out, c_out)

    def forward(self, x, skip):
        return self.conv_block(torch.cat([self.transp_conv(x), skip], dim=1))


class SwinUNETR(nn.Module):
    """A Swin encoder with the decoder of Swin UNETR (Hatamizadeh et al. 2022): MONAI's names, numbers and order.

    volume (B, 1, D, H, W) with sides that are multiples of 32 -> logits (B, out_channels, D, H, W). ValueError for an encoder
    that is no Swin and for other sides.
    """

    def __init__(self, encoder, out_channels):
        super().__init__()
        if not isinstance(encoder, SwinTransformer3D):
            raise ValueError(f"found the encoder {type(encoder).__name__}, expected a SwinTransformer3D: this decoder needs its "
                             "maps")
        self.encoder = encoder
        c = encoder.channels                                                        # widths of the maps: C, 2C, 4C, 8C, 16C
        self.encoder1 = _under("layer", ResBlock(encoder.patch_embed.proj.in_channels, c[0]))
        self.encoder2, self.encoder3, self.encoder4 = (_under("layer", ResBlock(n, n)) for n in c[:3])
        self.encoder10 = _under("layer", ResBlock(c[4], c[4]))
        self.decoder5, self.decoder4, self.decoder3, self.decoder2 = (UpBlock(c[i], c[i - 1]) for i in (4, 3, 2, 1))
        self.decoder1 = UpBlock(c[0], c[0])
        self.out = _under("conv", _under("conv", nn.Conv3d(c[0], out_channels, 1)))
        encoder.mask_token.requires_grad_(False)

    def forward(self, volume):
        if any(side % 32 for side in volume.shape[2:]):
            raise ValueError(f"found a volume of {tuple(volume.shape[2:])} voxels, expected sides that are multiples of 32")
        maps = self.encoder(volume)                                                 # strides 2, 4, 8, 16, 32
        x = self.decoder5(self.encoder10(maps[4]), maps[3])
        x = self.decoder4(x, self.encoder4(maps[2]))
        x = self.decoder3(x, self.encoder3(maps[1]))
        x = self.decoder2(x, self.encoder2(maps[0]))
        return self.out(self.decoder1(x, self.encoder1(volume)))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to contexts whose keys and values are given, feed-forward; pre-norm, residual.

    Each context has a softmax of its own: beside 60 slots of memory in the same softmax, one visual token would have a 61st of
    the weight at first, and the image would hardly be heard.
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
        return _heads(self.key(x), self.num_heads), _heads(self.value(x), self.num_heads)

    def forward(self, x, contexts, past=None):
        """x (B, L, E), or (B, 1, E) where `past` holds keys and values of the tokens before; contexts: pairs of keys and values
        -> x, all keys and values"""
        q, k, v = (_heads(y, self.num_heads) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))     # (B, heads, L, d)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.dropout(self.self_out(y.transpose(1, 2).flatten(2)))
        q = _heads(self.query(self.norm2(x)), self.num_heads)
        y = sum(F.scaled_dot_product_attention(q, k, v) for k, v in contexts)
        x = x + self.dropout(self.cross_out(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm3(x))), (k, v)


class ReportGenerator(nn.Module):
    """Knowledge-enhanced report generation: a transformer decoder that attends to visual tokens and, beside them, to a
    learned memory of `memory_slots` vectors. Token 0 is padding, 1 begins and 2 ends a report.

    NOTE(paper): it only says that the head follows M2KT; one encoder and one decoder layer, width 512, 8 heads, 60 slots are
    the release's. Their memory is no parameter there and never learns; here it does.
    """

    def __init__(self, encoder, vocab_size, dim=512, num_heads=8, memory_slots=60, max_length=150, dropout=0.1):
        super().__init__()
        self.encoder, self.num_heads, self.max_length = encoder, num_heads, max_length
        self.project = nn.Linear(encoder.channels[-1], dim)
        self.visual_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.visual_attention, self.visual_mlp = ClassicalAttention(dim, num_heads), MLP(dim, 4 * dim)
        self.memory = nn.Parameter(torch.randn(memory_slots, dim) * 0.02)
        self.words, self.places = nn.Embedding(vocab_size, dim), nn.Embedding(max_length + 1, dim)
        self.decoder = DecoderLayer(dim, num_heads, dropout)
        self.norm, self.head, self.dropout = nn.LayerNorm(dim), nn.Linear(dim, vocab_size), nn.Dropout(dropout)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)
        encoder.mask_token.requires_grad_(False)

    def contexts(self, volume):
        """(B, 1, D, H, W) -> keys and values (B, heads, N, d) of the visual tokens, and (B, heads, slots, d) of the memory"""
        x = self.project(self.encoder(volume)[-1].flatten(2).mT)                    # (B, N, E)
        y = self.visual_norms[0](x)
        x = x + self.visual_attention(y, y)
        x = self.visual_norms[2](x + self.visual_mlp(self.visual_norms[1](x)))
        return self.decoder.context(x), self.decoder.context(self.memory.expand(len(x), -1, -1))

    def decode(self, tokens, contexts, past=None):
        """tokens (B, L), the first of them after those in `past` -> logits (B, L, V), keys and values so far"""
        place = torch.arange(tokens.shape[1], device=tokens.device) + (0 if past is None else past[0].shape[2])
        x, past = self.decoder(self.dropout(self.words(tokens) + self.places(place)), contexts, past)
        return self.head(self.norm(x)), past

    def forward(self, volume, tokens):
        """volume (B, 1, D, H, W), tokens (B, L <= max_length + 1) -> logits (B, L, V) of the token after each"""
        return self.decode(tokens, self.contexts(volume))[0]

    @torch.no_grad()
    def generate(self, volume, beams=3):
        """Beam search, the mean log-probability of a report's tokens (its end, too) decides -> B lists of token ids.

        A report that reaches max_length words without an end is taken as it is, if none has ended.
        """
        B, max_length, bos, eos = len(volume), self.max_length, 1, 2
        contexts = [[x.repeat_interleave(beams, 0) for x in pair] for pair in self.contexts(volume)]     # (B·beams, heads, …, d)
        tokens = torch.full((B * beams, 1), bos, device=volume.device)
        scores = torch.full((B, beams), -torch.inf, device=volume.device)
        scores[:, 0] = 0                                                            # all beams begin alike: one counts
        past, ended = None, [(-math.inf, [])] * B                                   # the best report that has its end
        for length in range(1, max_length + 2):
            logits, past = self.decode(tokens[:, -1:], contexts, past)
            step = logits[:, -1].float().log_softmax(-1)                            # (B·beams, V)
            step[:, [0, bos]] = -torch.inf
            total = (scores.view(-1, 1) + step).view(B, beams, -1)
            done = total[:, :, eos] / length                                        # (B, beams)
            for b, (score, beam) in enumerate(zip(*(x.tolist() for x in done.max(-1)))):
                if score > ended[b][0]:
                    ended[b] = score, tokens[b * beams + beam, 1:].tolist()
            total[:, :, eos] = -torch.inf
            # A report only gets less probable as it grows: what is left at its best would be divided by the full length.
            hope = (total.amax((1, 2)) / (max_length + 1)).tolist()
            if length > max_length or all(best[0] >= bound for best, bound in zip(ended, hope)):
                break
            scores, choice = total.flatten(1).topk(beams)                           # (B, beams)
            beam = (choice // total.shape[-1] + torch.arange(B, device=volume.device)[:, None] * beams).flatten()
            tokens = torch.cat([tokens[beam], (choice % total.shape[-1]).view(-1, 1)], dim=1)
            past = tuple(x[beam] for x in past)
        return [best[1] if best[0] > -math.inf else tokens[b * beams, 1:].tolist() for b, best in enumerate(ended)]


# ------------------------------------------------------------------------- what both training scripts agree on

def parameter_groups(network, lr_encoder, lr, weight_decay):
    """Parameters for AdamW: the encoder with its own rate; biases, norms, tokens, memory and bias tables do not decay"""
    groups = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            key = name.startswith("encoder."), p.ndim > 1 and "bias_table" not in name and name != "memory"
            groups.setdefault(key, []).append(p)
    return [dict(params=params, lr=lr_encoder if of_encoder else lr, weight_decay=weight_decay * decays)
            for (of_encoder, decays), params in groups.items()]


def mixed_precision(precision, device):
    """"auto", "bf16", "fp16" or "fp32" -> the one that is meant, autocast, GradScaler. ValueError for fp16 on a CPU."""
    cuda = device.type == "cuda"
    if precision == "auto":
        precision = "fp32" if not cuda else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and not cuda:
        raise ValueError("--precision fp16 needs a GPU; a CPU computes in fp32 or bf16")
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    autocast = torch.autocast(device.type, dtype=half) if half else contextlib.nullcontext()
    return precision, autocast, torch.amp.GradScaler(device.type, enabled=precision == "fp16")


# ---------------------------------------------------------------------------------------------- files of weights

def save_file(state, path, before=None):
    """torch.save to `path`, whole or not at all; the file that was there stays as `before`."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise SystemExit(f"error: {part} cannot be written ({error}); is the disk full? {path} is as it was before") from None
    if before and path.exists():
        os.replace(path, before)
    os.replace(part, path)


def load_last(out):
    """OUT/last.pt, or OUT/previous.pt where that is broken. ValueError where neither can be read."""
    found = []
    for path in (out / "last.pt", out / "previous.pt"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if "optimizer" not in state:
                raise ValueError("it is no checkpoint to go on from")
            state["broken"] = bool(found)
            for problem in found:
                log.warning("%s; going on from %s instead", problem, path)
            return state
        except Exception as error:                      # a torn file fails in many ways, from zip to pickle
            found.append(f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    raise ValueError("--resume found no checkpoint to go on from: " + "; ".join(found))


def export_encoder(encoder):
    """A flat state dict of the encoder with MONAI's names (no mask token), which notes the order of its patch merging."""
    state = encoder.state_dict()
    del state["mask_token"]
    for key in state:                                   # a machine without a GPU must be able to load it
        state[key] = state[key].cpu()
    state._metadata[""]["merging"] = getattr(encoder, "merging", None)
    return state


def load_weights(module, path):
    """Fill a module (an encoder, or one with an `.encoder`) from a file of ours or of others.

    Knows `last.pt` and `encoder.pt`; the authors' Lightning checkpoints and flat dicts (`vision_encoder.*`); MONAI's
    SwinUNETR (`swinViT.*`, `encoder1.*`); MONAI's self-supervised Swin (`module.*`, `mlp.fc1`). Where the file was trained
    with the old patch merging, `encoder.merging` is set to "v0.9".

    Returns {"matched": int, "missing": [...], "unexpected": [...]}. ValueError where the file is not a dict of weights, or
    does not fill the encoder; nothing has been loaded then.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of weights that can be read safely (weights_only): {error}") from None
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, expected weights to start from") from None
    merging = state.get("merging") if isinstance(state, dict) else None             # last.pt notes it
    for nest in ("state_dict", "model"):
        state = state.get(nest, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not any(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(state).__name__}")

    merging = merging or getattr(state, "_metadata", {}).get("", {}).get("merging")         # so does encoder.pt
    found = {}
    for key, tensor in state.items():
        if not torch.is_tensor(tensor):
            continue
        key = key.removeprefix("module.")
        if "vision_encoder." in key:
            key, merging = "encoder." + key.split("vision_encoder.", 1)[1].removeprefix("swinViT."), "v0.9"
        if ".mlp.fc" in key:
            key, merging = key.replace(".mlp.fc", ".mlp.linear"), "v0.9"
        key = key.replace("swinViT.", "encoder.", 1)
        if key.startswith(("patch_embed.", "layers", "levels.", "mask_token")):
            key = "encoder." + key
        found[key] = tensor

    encoder = getattr(module, "encoder", module)
    prefix = "" if encoder is module else "encoder."
    if encoder is module:
        found = {key.removeprefix("encoder."): tensor for key, tensor in found.items() if key.startswith("encoder.")}
    own = {key: tensor for key, tensor in module.state_dict().items() if not key.startswith("text_encoder.")}
    matched = {key: tensor for key, tensor in found.items() if key in own and own[key].shape == tensor.shape}
    optional = {"mask_token"} | {key for key, _ in encoder.named_buffers()}
    missing = [key for key in own if key not in matched]
    unexpected = [key for key in found if key not in matched]
    unfilled = [key for key in missing if key.startswith(prefix) and key.removeprefix(prefix) in encoder.state_dict()
                and key.removeprefix(prefix) not in optional]
    if unfilled:
        shapes = [f"{key}: expected {tuple(own[key].shape)}, found {tuple(found[key].shape) if key in found else 'nothing'}"
                  for key in unfilled[:5]]
        raise ValueError(f"{path} does not fill the encoder: {len(matched)} weights match, {len(unfilled)} of the encoder do "
                         "not.\n  " + "\n  ".join(shapes) + f"\n  keys in the file: {', '.join(list(state)[:5])} …")

    module.load_state_dict(matched, strict=False)
    log.info("%s: %d weights matched, %d missing, %d unexpected", path, len(matched), len(missing), len(unexpected))
    if any("proj_head" in key for key in unexpected):
        log.info("%s: vision_encoder.proj_head is left out; the method has no such layer", path)
    if hasattr(encoder, "merging") and merging:
        encoder.merging = merging
        log.info("%s: patch merging %r, as these weights were trained with", path, merging)
    return {"matched": len(matched), "missing": missing, "unexpected": unexpected}
