"""Encoders against MONAI, fusion attention against loops, MG3D's switches, foreign weights."""
import contextlib
import itertools
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import REPORTS, chest, python, save_nifti, small_mg3d
from torch import nn

import data
import eval as evaluation
import losses
import model
import phantoms
from model import ClassicalAttention, FusionAttention, SwinTransformer3D, build_encoder, load_weights

# --------------------------------------------------------------------------------- Swin: the oracle
# The plain way, on one volume: pad, roll, cut, and for every window ask token by token who may see whom.

def plain_block(block, x):
    d, h, w, C = x.shape
    size, attn = (d, h, w), block.attn
    window = [min(s, block.window_size) for s in size]
    shift = [block.window_size // 2 if block.shifted and s > block.window_size else 0 for s in size]
    padded = [-(-s // v) * v for s, v in zip(size, window)]
    y = nn.functional.pad(block.norm1(x), (0, 0, 0, padded[2] - w, 0, padded[1] - h, 0, padded[0] - d))
    y = torch.roll(y, [-s for s in shift], (0, 1, 2))
    out = torch.zeros_like(y)
    for corner in itertools.product(*(range(0, p, v) for p, v in zip(padded, window))):
        box = tuple(slice(c, c + v) for c, v in zip(corner, window))
        tokens = y[box].reshape(-1, C)
        at = torch.cartesian_prod(*[torch.arange(c, c + v) for c, v in zip(corner, window)])
        seam = torch.tensor([p - s if s else p for p, s in zip(padded, shift)])
        behind = at >= seam                                             # wrapped around the end
        together = (behind[:, None] == behind[None]).all(-1)
        n = len(tokens)
        q, k, v = attn.qkv(tokens).view(n, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        bias = attn.relative_position_bias_table[attn.relative_position_index[:n, :n]].permute(2, 0, 1)
        scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
        result = scores.masked_fill(~together, -torch.inf).softmax(-1) @ v
        out[box] = attn.proj(result.transpose(0, 1).reshape(n, C)).view(*window, C)
    out = torch.roll(out, shift, (0, 1, 2))[:d, :h, :w]
    x = x + out
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("size, shifted", [((7, 7, 7), False), ((14, 7, 9), True), ((10, 8, 12), True),
                                           ((10, 8, 12), False), ((5, 4, 9), True)])
def test_block_is_plain_window_attention(size, shifted):
    torch.manual_seed(0)
    block = model.SwinBlock(12, 3, 7, shifted, use_checkpoint=False).double()
    block.attn.relative_position_bias_table.data.normal_()
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, *size, 12, dtype=torch.float64)
    results = []
    for forward in (lambda: block(x), lambda: torch.stack([plain_block(block, one) for one in x])):
        out = forward()
        gradients = torch.autograd.grad((out * weight).sum(), [x, *block.parameters()])
        results.append((out, *gradients))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("size", [(32, 32, 64), (44, 28, 52), (33, 34, 38)])
def test_encoder_has_monais_numbers_and_gradients(size):
    swin = pytest.importorskip("monai.networks.nets.swin_unetr", reason="MONAI is not installed")
    torch.manual_seed(0)
    theirs = swin.SwinTransformer(1, 12, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24))
    ours = SwinTransformer3D(feature_size=12)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 1, *size)
    maps, expected = ours(x), theirs(x)
    weights = [torch.randn_like(m) for m in maps]
    for out in (maps, expected):
        sum((m * w).sum() for m, w in zip(out, weights)).backward()
    for m, e in zip(maps, expected):
        assert m.shape == e.shape
        torch.testing.assert_close(m, e, atol=1e-4, rtol=0)
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if name != "mask_token":
            grad = wanted[name].grad
            torch.testing.assert_close(p.grad, grad, atol=1e-4 * grad.abs().max().item(), rtol=0,
                                       msg=lambda m: f"{name}: {m}")


def monai_swin(feature_size=12, merging="monai", **settings):
    """MONAI's Swin and its network with random weights; v0.9 by the order that it had before 1.5"""
    swin = pytest.importorskip("monai.networks.nets.swin_unetr", reason="MONAI is not installed")

    class OldMerging(swin.PatchMergingV2):
        def forward(self, x):
            x = nn.functional.pad(x, (0, 0, *(side % 2 * k for side in x.shape[3:0:-1] for k in (0, 1))))
            starts = (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)
            return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in starts], -1)))
    torch.manual_seed(0)
    downsample = {"monai": "merging", "mergingv2": "mergingv2", "v0.9": OldMerging}[merging]
    return swin.SwinUNETR(1, 2, feature_size=feature_size, downsample=downsample, **settings)


@pytest.mark.parametrize("merging", ["monai", "v0.9", "mergingv2"])
def test_the_second_version_has_monais_numbers_and_gradients(tmp_path, merging):
    unetr = monai_swin(merging=merging, use_v2=True)
    theirs = unetr.swinViT
    torch.save(unetr.state_dict(), tmp_path / "v2.pt")
    ours = SwinTransformer3D(feature_size=12, use_checkpoint=True)
    report = load_weights(ours, tmp_path / "v2.pt", merging)
    assert ours.use_v2 and ours.merging == merging and report["missing"] == ["mask_token"]
    x = torch.randn(2, 1, 46, 32, 40)
    maps, expected = ours(x), theirs(x)
    weights = [torch.randn_like(m) for m in maps]
    for out in (maps, expected):
        sum((m * w).sum() for m, w in zip(out, weights)).backward()
    assert len(maps) == len(expected) == 5
    for m, e in zip(maps, expected):
        torch.testing.assert_close(m, e, atol=1e-4, rtol=0)
    found = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(found[name].grad, p.grad, atol=1e-3 * scale, rtol=0,
                                   msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("merging, use_v2", [("monai", True), ("mergingv2", False)])
def test_the_noted_architecture_rebuilds_the_encoder_in_monai(merging, use_v2):
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    torch.manual_seed(0)
    ours = SwinTransformer3D(feature_size=12, depths=(1, 2, 1, 1), num_heads=(2, 3, 6, 4), window_size=3,
                             merging=merging, use_v2=use_v2)
    settings = model.notes_of(model.export_encoder(ours))["architecture"]
    assert settings.pop("note") == "MONAI from 1.5 on has the same numbers"
    unetr = nets.SwinUNETR(out_channels=2, **settings)
    unetr.swinViT.load_state_dict(model.export_encoder(ours))
    x = torch.randn(1, 1, 32, 32, 64)
    for m, e in zip(ours(x)[:4], unetr.swinViT(x)):
        torch.testing.assert_close(m, e, atol=1e-4, rtol=0)


def test_the_noted_architecture_says_where_monai_differs():
    old = model.monai_settings(SwinTransformer3D(feature_size=12, merging="v0.9"))
    assert "another network in MONAI from 1.5 on" in old["note"] and "downsample" not in old
    assert old["merging"] == ("000", "100", "010", "001", "101", "010", "001", "111")
    small = model.monai_settings(build_encoder("swin_t"))
    assert small["note"] == "MONAI has no such network"
    assert (small["feature_size"], small["depths"], small["window_size"]) == (24, (1, 2), 4)


def test_a_first_version_is_as_it_was():
    """The blocks of the second draw no random numbers where they are not."""
    torch.manual_seed(0)
    encoder = build_encoder("swin_t")
    after = torch.rand(1)
    torch.manual_seed(0)
    second = build_encoder("swin_t", use_v2=True)
    assert not torch.equal(after, torch.rand(1))
    common = encoder.state_dict()
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in common.items())
    assert {name.split(".")[0] for name in second.state_dict().keys() - common} == {"layers1c", "layers2c"}


@pytest.mark.parametrize("depths", [(1,), (2, 1), (1, 1, 2), (2, 2, 2, 2), (1, 1, 1, 1, 1)], ids=str)
def test_any_number_of_stages(depths):
    encoder = SwinTransformer3D(feature_size=6, depths=depths, num_heads=(1, 2, 3, 6, 6), window_size=3)
    D, H, W = 64, 33, 40
    maps = encoder(torch.rand(2, 1, D, H, W))
    assert len(maps) == len(encoder.channels) == len(depths) + 1
    for i, m in enumerate(maps):                # half the size of the one before, rounded up
        stride = 2 ** (i + 1)
        assert m.shape == (2, 6 * 2 ** i, -(-D // stride), -(-H // stride), -(-W // stride))
        assert encoder.channels[i] == m.shape[1]
    assert encoder.stride == 2 ** (len(depths) + 1)
    for i, depth in enumerate(depths):
        stage = getattr(encoder, f"layers{i + 1}")[0]
        assert [block.shifted for block in stage["blocks"]] == [k % 2 == 1 for k in range(depth)]
    sum(m.square().sum() for m in maps).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == ["mask_token"]


@pytest.mark.parametrize("merging, order", [("monai", "000 100 010 001 110 101 011 111"),
                                            ("v0.9", "000 100 010 001 101 010 001 111")])
def test_merging_orders(merging, order):
    with pytest.raises(ValueError, match="merging"):
        SwinTransformer3D(merging="v2")
    merge = model.PatchMerging(1)
    merge.norm = merge.reduction = nn.Identity()
    x = torch.arange(8.).view(1, 2, 2, 2, 1)                                        # value = 4 i + 2 j + k
    assert merge(x, merging).flatten().tolist() == [int(bits, 2) for bits in order.split()]


@pytest.mark.parametrize("scores", [1, 30_000, 2 ** 40])
def test_how_windows_are_divided_among_calls_changes_nothing(scores, monkeypatch):
    """One window a call; a few, also of several groups; all in one call"""
    torch.manual_seed(0)
    encoder = build_encoder("swin_t", window_size=3, depths=(2, 2), num_heads=(2, 4))
    x = torch.randn(2, 1, 32, 28, 20)
    calls = []
    run = model.SwinBlock.run_windows

    def count(block, tokens, windows):
        calls.append((sum(number * bias.numel() for number, bias in windows),
                      sum(number for number, _ in windows), len(windows)))
        return run(block, tokens, windows)

    def outputs_and_gradients():
        encoder.zero_grad()
        maps = encoder(x)
        sum(m.square().sum() for m in maps).backward()
        return [*maps, *(p.grad for p in encoder.parameters() if p.grad is not None)]
    expected = outputs_and_gradients()
    monkeypatch.setitem(model.SCORES_IN_A_CALL, "cpu", scores)
    monkeypatch.setattr(model.SwinBlock, "run_windows", count)
    for found, wanted in zip(outputs_and_gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert all(total <= scores or windows == 1 for total, windows, _ in calls)
    if scores == 30_000:
        assert max(windows for _, windows, _ in calls) > 1 < max(groups for _, _, groups in calls)
    if scores == 2 ** 40:
        assert len(calls) == 4                          # one of each block


def test_backward_may_run_under_autocast():
    """Attention's gradients have the dtype of its forward pass."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3)]
    tensors.append(torch.randn(3, 5, 5, requires_grad=True))
    out = model._Attention.apply(*tensors)
    grad = torch.randn_like(out)
    outside = torch.autograd.grad(out, tensors, grad, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(out, tensors, grad)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    plain = build_encoder("swin_t", window_size=3)
    lean = build_encoder("swin_t", window_size=3, use_checkpoint=True)
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(1, 1, 32, 32, 64)
    for encoder in (plain, lean):
        encoder(x)[-1].square().sum().backward()
    for p, q in zip(plain.parameters(), lean.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_training_follows_inference():
    """The plan of the windows is kept from a first call; one in inference mode must not spoil it."""
    model.window_plan.cache_clear()
    encoder = build_encoder("swin_t", window_size=3)
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.inference_mode():
        encoder(x)
    encoder(x)[-1].sum().backward()
    assert encoder.patch_embed.proj.weight.grad is not None


def test_the_compiler_is_not_loaded_at_the_start():
    """It takes as long as torch itself, and most commands compile nothing."""
    done = python("-c", "import sys, model; print('torch._dynamo' in sys.modules)")
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize("name, small", [
    ("swin_t", {"depths": (1,), "window_size": 3}), ("unet", {"feature_size": 8}),
    ("swin_b", {"feature_size": 12, "depths": (2, 1), "use_v2": True})])
def test_an_exported_encoder_gives_the_same_numbers(tmp_path, name, small):
    """Also where tracing is the first to need a plan of the windows; training goes on afterwards."""
    torch.manual_seed(0)
    encoder = build_encoder(name, **small)
    model.window_plan.cache_clear()
    size = (12, 12, 16) if name == "swin_t" else (16, 16, 32)
    with torch.no_grad():
        program = torch.export.export(encoder, (torch.zeros(2, 1, *size),), strict=False)
    assert model.window_plan.cache_info().currsize == 0
    torch.export.save(program, tmp_path / "encoder.pt2")
    x = torch.rand(2, 1, *size)
    maps = encoder(x)
    for found, expected in zip(torch.export.load(tmp_path / "encoder.pt2").module()(x), maps, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    sum(m.square().sum() for m in maps).backward()
    assert [key for key, p in encoder.named_parameters() if p.grad is None] == ["mask_token"]


@pytest.mark.parametrize("name", ["swin_t", "unet"])
def test_masked_voxels_are_not_seen(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, feature_size=8 if name == "unet" else 12)
    nn.init.normal_(encoder.mask_token)
    x, mask = torch.randn(1, 1, 32, 32, 32), torch.zeros(1, 1, 32, 32, 32, dtype=torch.bool)
    mask[..., :16] = True
    maps = encoder(x, mask)
    other = encoder(torch.where(mask, torch.randn_like(x), x), mask)
    assert all(torch.equal(a, b) for a, b in zip(maps, other))
    assert not torch.allclose(maps[0], encoder(x)[0])
    assert [m.shape[1] for m in maps] == encoder.channels
    assert maps[-1].shape[2] == 32 // encoder.stride
    (maps[-1] * torch.randn_like(maps[-1])).sum().backward()
    assert encoder.mask_token.grad.abs().sum() > 0


def test_sizes_of_the_encoders():
    assert build_encoder("swin_b").channels == [48, 96, 192, 384, 768]
    with torch.device("meta"):
        assert build_encoder("swin_l").channels[-1] == 1536
    with pytest.raises(ValueError, match="vit.*swin_b"):
        build_encoder("vit")


# ------------------------------------------------------------------------------------------- fusion

def loop_over_guides(attention, dominant, guide, dominant_mask, guide_mask):
    """Eq. (1) as it is written: a (guide × dominant × E) tensor, a guide token of a patient after another."""
    h, outputs = attention.num_heads, []
    for b in range(len(dominant)):
        tokens = [n for n in range(dominant.shape[1]) if dominant_mask[b, n]]
        guides = [g for g in range(guide.shape[1]) if guide_mask[b, g]]
        k, v = attention.key(dominant[b]), attention.value(dominant[b])
        d = k.shape[-1] // h
        out = torch.zeros_like(v)
        for g in guides:
            q = attention.query(guide[b, g])
            for i in range(h):
                part = slice(i * d, (i + 1) * d)
                scores = torch.stack([(q[part] * k[n, part]).sum() / d ** 0.5 for n in tokens]).softmax(0)
                for weight, n in zip(scores, tokens):
                    row = torch.zeros_like(out)
                    row[n, part] = len(tokens) * weight * v[n, part] / len(guides)
                    out = out + row
        outputs.append(attention.out(out))
    return torch.stack(outputs)


@pytest.mark.parametrize("padded", [False, True])
def test_proposed_attention_is_the_loop(padded):
    torch.manual_seed(0)
    attention = FusionAttention(8, 2).double()
    dominant, guide = (torch.randn(2, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 3))
    dominant_mask, guide_mask = torch.ones(2, 5).bool(), torch.ones(2, 3).bool()
    if padded:
        dominant_mask[1, 3:] = False
        guide_mask[0, 1:] = False
    masks = (dominant_mask, guide_mask) if padded else (None, None)
    real = dominant_mask[..., None]
    results = []
    for out in (attention(dominant, guide, *masks),
                loop_over_guides(attention, dominant, guide, dominant_mask, guide_mask)):
        out = out * real
        leaves = [dominant, guide, *attention.parameters()]
        results.append((out, *torch.autograd.grad((out * torch.arange(8.)).sum(), leaves)))
    for ours, loop in zip(*results):
        torch.testing.assert_close(ours, loop)


def test_uniform_attention_leaves_values_unchanged():
    attention = FusionAttention(8, 2)
    for layer in (attention.value, attention.out, attention.query):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(attention.query.weight)
    dominant = torch.randn(2, 5, 8)
    torch.testing.assert_close(attention(dominant, torch.randn(2, 3, 8)), dominant)


@pytest.mark.parametrize("kind", [FusionAttention, ClassicalAttention])
def test_padding_of_both_sides_does_not_matter(kind):
    torch.manual_seed(0)
    attention = kind(8, 2)
    dominant, guide = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    longer = torch.cat([dominant, 50 * torch.randn(2, 4, 8)], 1)
    longer_guide = torch.cat([guide, 50 * torch.randn(2, 2, 8)], 1)
    out = attention(longer, longer_guide, torch.arange(9).expand(2, 9) < 5, torch.arange(5).expand(2, 5) < 3)
    torch.testing.assert_close(out[:, :5], attention(dominant, guide))


def test_classical_attention_is_pytorchs():
    torch.manual_seed(0)
    ours, theirs = ClassicalAttention(8, 2), nn.MultiheadAttention(8, 2, batch_first=True)
    layers = ours.query, ours.key, ours.value
    theirs.in_proj_weight.data = torch.cat([layer.weight for layer in layers])
    theirs.in_proj_bias.data = torch.cat([layer.bias for layer in layers])
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    dominant, guide = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    expected, _ = theirs(dominant, guide, guide, key_padding_mask=~mask)
    torch.testing.assert_close(ours(dominant, guide, None, mask), expected)


def test_maps_are_the_softmax_inside_sentence_attention():
    torch.manual_seed(0)
    attention = model.SentenceAttention(8, 2, 6).double()
    dominant, guide = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    maps = attention.maps(dominant, guide)
    assert maps.shape == (2, 2, 5, 3)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))
    values = attention.heads(dominant, guide)[2]                        # (B, heads, G, d)
    fused = (maps @ values).transpose(1, 2).reshape(2, 5, 8)
    torch.testing.assert_close(attention.out(fused), attention(dominant, guide))


def test_sentence_mean_is_a_loop():
    words, ids = torch.randn(2, 6, 4), torch.tensor([[-1, 0, 0, 1, 1, -1], [-1, 0, 1, 2, 2, 2]])
    means = model.sentence_mean(words, ids, 3)
    for b, s in itertools.product(range(2), range(3)):
        members = [words[b, t] for t in range(6) if ids[b, t] == s]
        torch.testing.assert_close(means[b, s], sum(members) / len(members) if members else torch.zeros(4))


# --------------------------------------------------------------------------------------------- MG3D

@pytest.fixture(scope="module")
def batch(text_folder, tmp_path_factory):
    scan = save_nifti(tmp_path_factory.mktemp("scan") / "scan.nii.gz", chest())
    tokenizer = model.TextEncoder(str(text_folder)).tokenizer
    generator = np.random.default_rng(0)
    items = [data.Item(report, scan, report, "train", report, None, None) for report in REPORTS]
    examples = [data.pretraining_example(item, generator, tokenizer, size=(32, 32, 64)) for item in items]
    batch = data.collate(examples, tokenizer.pad_token_id)
    torch.manual_seed(0)
    batch["volume"] = torch.rand_like(batch["volume"])
    return batch


def test_calls_in_one_pass_are_the_calls():
    torch.manual_seed(0)
    attention = FusionAttention(8, 2).double()

    def arguments(B):
        mask = torch.rand(B, 5) < 0.5
        mask[:, 0] = True
        return torch.randn(B, 5, 8).double(), torch.randn(B, 3, 8).double(), mask, None
    first, second = arguments(2), arguments(3)
    outputs = model.in_one_pass(attention, first, first, False)
    assert len(outputs) == 3 and outputs[2] is None
    for out in outputs[:2]:
        torch.testing.assert_close(out, attention(*first))
    nothing, alone = model.in_one_pass(attention, False, second)
    assert nothing is None
    torch.testing.assert_close(alone, attention(*second))
    assert model.in_one_pass(attention, False, None) == [None, None]


def terms(network, batch):
    """One raw value for each enabled loss."""
    o, mask = network(batch), batch["sentence_mask"]
    compute = {"mim": lambda: losses.mim_loss(o["recon"], batch["volume"], batch["volume_mask"]),
               "mlm": lambda: losses.mlm_loss(o["logits"], o["mlm_labels"]),
               "sfr": lambda: losses.sfr_loss(o["rebuilt"], o["sentences"], mask),
               "cml": lambda: losses.cml_loss(o["f_i"], o["h_i"], o["f_t"], o["h_t"]),
               "ssm": lambda: losses.ssm_loss(o["text_sentences"], o["visual_sentences"], mask),
               "dfa": lambda: losses.dfa_loss(o["h_s"], o["f_i"]),
               "clip": lambda: losses.clip_loss(o["f_i"], o["f_t"])}
    return {name: compute[name]() for name in model.LOSSES if name in network.losses}


def test_compute_gives_every_loss_its_own_tensors(text_folder, batch):
    network = small_mg3d(text_folder)
    o = {key: value.detach().requires_grad_(value.is_floating_point()) for key, value in network(batch).items()}
    network.forward = lambda _: o
    leaves = [value for value in o.values() if value.requires_grad]
    found, expected = losses.compute(o, batch, model.LOSSES), terms(network, batch)
    for name in model.LOSSES:
        torch.testing.assert_close(*(torch.autograd.grad(loss[name], leaves, allow_unused=True)
                                     for loss in (found, expected)))
    hot = losses.compute(o, batch, model.LOSSES, temperature=0.5)
    assert {name for name in hot if hot[name] != found[name]} == {"cml", "dfa", "clip"}


def test_shapes(text_folder, batch):
    network = small_mg3d(text_folder)
    o = network(batch)
    B, S = batch["sentence_mask"].shape
    chosen = int((batch["mlm_labels"] != -100).sum())
    assert o["recon"].shape == batch["volume"].shape
    assert o["logits"].shape == (chosen, network.text_encoder.vocab_size)
    assert o["rebuilt"].shape == o["sentences"].shape == o["visual_sentences"].shape == (B, S, 24)
    assert o["text_sentences"].shape == (B, S, 128)
    assert all(o[name].shape == (B, 24) for name in ("f_i", "h_i", "f_t", "h_t", "h_s"))


# What every input and every option of the method reaches, and nothing else. `mlm_labels` are passed through.
REACHES = {"volume": "f_i h_i h_s h_t logits rebuilt recon visual_sentences",
           "volume_mask": "recon",
           "input_ids": "f_t h_i h_t recon sentences",
           "masked_ids": "logits rebuilt",
           "single_ids": "h_s text_sentences visual_sentences"}
OPTIONS = {("mim_attention", "classical"): "h_i recon",
           ("mlm_attention", "classical"): "h_t logits rebuilt",
           ("guidance", "word"): "h_i recon",
           ("sentence_values", "text"): "h_s visual_sentences"}


def differing(one, other):
    return {name for name in one.keys() - {"mlm_labels"} if not torch.allclose(one[name], other[name], atol=1e-6)}


@torch.no_grad()
def test_what_every_input_and_every_option_reaches(text_folder, batch):
    network = small_mg3d(text_folder).eval()
    torch.manual_seed(1)
    others = {"volume": torch.rand_like(batch["volume"]), "volume_mask": ~batch["volume_mask"],
              "input_ids": batch["masked_ids"], "masked_ids": batch["input_ids"],
              "single_ids": batch["single_ids"].flip(0)}
    for name, reached in REACHES.items():
        assert differing(network(batch), network(batch | {name: others[name]})) == set(reached.split()), name
    for (name, value), reached in OPTIONS.items():
        other = small_mg3d(text_folder, **{name: value}).eval()
        shapes = {key: tensor.shape for key, tensor in other.state_dict().items()}
        other.load_state_dict({key: tensor for key, tensor in network.state_dict().items()
                               if shapes.get(key) == tensor.shape}, strict=False)
        assert differing(network(batch), other(batch)) == set(reached.split()), name


def test_the_report_is_not_encoded_for_nothing(text_folder, batch):
    for enabled, number in ((["mlm"], 1), (["mim"], 1), (["clip"], 1), (["mim", "mlm"], 2), (["sfr"], 2)):
        network, calls = small_mg3d(text_folder, enabled), []
        network.text_encoder.register_forward_hook(lambda *call, calls=calls: calls.append(call))
        network(batch)
        assert len(calls) == number, enabled


def test_a_loss_less_leaves_the_others_alone(text_folder, batch):
    full = terms(small_mg3d(text_folder), batch)
    for left_out in model.LOSSES:
        enabled = [name for name in model.LOSSES if name != left_out]
        rest = terms(small_mg3d(text_folder, enabled), batch)
        assert list(rest) == enabled
        for name in enabled:
            torch.testing.assert_close(rest[name], full[name],
                                       msg=lambda m: f"{name} without {left_out}: {m}")


HEADS = {"mim": "mim_decoder", "mlm": "mlm_vocabulary", "dfa": "visual_sentence_pool"}


@pytest.mark.parametrize("enabled", [*([name] for name in model.LOSSES), ["mim", "mlm"], ["sfr", "dfa"],
                                     ["ssm", "dfa"], list(model.LOSSES)], ids="+".join)
def test_every_trained_parameter_gets_a_gradient(text_folder, batch, enabled):
    """DistributedDataParallel need not look for unused parameters; heads of disabled losses are not built."""
    network = small_mg3d(text_folder, enabled)
    sum(terms(network, batch).values()).backward()
    for name, p in network.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    for loss, head in HEADS.items():
        assert (getattr(network, head) is not None) == (loss in enabled)


@pytest.mark.parametrize("options", [{"guidance": "word"}, {"encoder": "unet"},
                                     {"mim_attention": "classical", "mlm_attention": "classical"}], ids=str)
def test_variants_run(text_folder, batch, options):
    values = terms(small_mg3d(text_folder, **options), batch)
    sum(values.values()).backward()
    assert all(torch.isfinite(v) for v in values.values())


def test_words_guide_and_what_stands_around_them_does_not(text_folder, batch):
    network = small_mg3d(text_folder, ["mim"], guidance="word")
    recon = network(batch)["recon"]
    features = network.text_encoder(batch["input_ids"], batch["attention_mask"])
    around = (batch["sentence_ids"] < 0)[..., None]                     # [CLS], [SEP], padding
    for where, same in ((around, True), (~around, False)):
        network.text_encoder.forward = lambda *_: torch.where(where, torch.randn_like(features), features)
        assert torch.equal(network(batch)["recon"], recon) == same


def test_one_visual_token_is_enough(text_folder, batch):
    small = dict(batch, **{name: batch[name][..., :32, :32, :32] for name in ("volume", "volume_mask")})
    o = small_mg3d(text_folder).train()(small)
    assert o["recon"].shape == small["volume"].shape and torch.isfinite(o["recon"]).all()
    difference = o["recon"][0] - o["recon"][1]
    assert difference.abs().max() > 1e-4                # a norm of each channel would make them equal


def test_text_encoder_is_frozen(text_folder, batch):
    network = small_mg3d(text_folder).train()
    assert not network.text_encoder.bert.training                        # no dropout
    assert not any(p.requires_grad for p in network.text_encoder.parameters())
    first, second = (network.text_encoder(batch["input_ids"], batch["attention_mask"]) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad


def test_padding_in_the_batch_does_not_matter(text_folder, batch):
    network = small_mg3d(text_folder)
    longer = batch | {"sentence_mask": nn.functional.pad(batch["sentence_mask"], (0, 2))}
    padding = {"input_ids": 0, "masked_ids": 0, "attention_mask": 0, "single_ids": 0, "single_mask": 0,
               "sentence_ids": -1, "mlm_labels": -100}
    for name, value in padding.items():
        longer[name] = nn.functional.pad(batch[name], (0, 3), value=value)
    values, others = terms(network, batch), terms(network, longer)
    for name in values:
        torch.testing.assert_close(values[name], others[name], atol=1e-5, rtol=1e-4,
                                   msg=lambda m: f"{name}: {m}")


def test_encode_image_and_text(text_folder, batch):
    network = small_mg3d(text_folder)
    o = network(batch)
    torch.testing.assert_close(network.encode_image(batch["volume"]).mean(1), o["f_i"], atol=1e-5, rtol=1e-4)
    report = [batch[key] for key in ("input_ids", "attention_mask", "sentence_ids", "sentence_mask")]
    torch.testing.assert_close(network.encode_text(*report), o["f_t"])


def test_h_s_depends_on_the_sentence(text_folder, batch):
    """Eq. (11) as printed, with one pooled key, would give every sentence the same feature."""
    for values in ("volume", "text"):
        h_s = small_mg3d(text_folder, sentence_values=values)(batch)["visual_sentences"]
        assert (h_s[1, 0] - h_s[1, 1]).abs().max() > 1e-6


def test_sentences_of_a_patient_see_different_things_and_the_volume(tmp_path):
    """At the paper's size and width, untrained, on two drawn chests; the sentences' own cosine is 0.5."""
    chests = [phantoms.phantom(0, index) for index in range(2)]
    phantoms.make_demo_text_encoder(tmp_path, [chest["report"] for chest in chests])
    text_encoder = model.TextEncoder(str(tmp_path))
    torch.manual_seed(0)
    network = model.MG3D(model.build_encoder("swin_b"), text_encoder, ["ssm"]).eval()
    volumes = torch.stack([data.preprocess(chest["volume"], chest["spacing"]) for chest in chests])
    sentences = text_encoder.tokenizer(data.split_sentences(chests[0]["report"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        features = text_encoder.encode_sentences(sentences["input_ids"], sentences["attention_mask"])
        tokens = network.encode_image(volumes)                                      # (2, 48, 768)
        own, of_the_other = network.sentence_attention(features.expand(2, -1, -1), tokens)
    pairs = np.triu_indices(len(own), 1)
    assert tokens.shape == (2, 48, 768) and len(own) == 10
    assert nn.functional.cosine_similarity(own[:, None], own, dim=-1)[pairs].mean() <= 0.6
    assert nn.functional.cosine_similarity(own, of_the_other, dim=-1).max() < 0.95


def test_a_loss_of_ones_own_needs_a_name_a_function_and_a_line(text_folder, batch, monkeypatch):
    """As the README says: the model itself is not touched."""
    expected = small_mg3d(text_folder)(batch)
    monkeypatch.setattr(model, "LOSSES", (*model.LOSSES, "own"))
    found = small_mg3d(text_folder)(batch)
    assert found.keys() == expected.keys() and torch.equal(found["f_i"], expected["f_i"])


def test_sentence_attention_is_the_loop():
    """Eq. (11) with norms, one head and one sentence at a time; a shift of all tokens changes nothing"""
    torch.manual_seed(0)
    attention = model.SentenceAttention(8, 2, 6).double()
    for p in attention.parameters():
        nn.init.normal_(p)
    sentences, tokens = torch.randn(2, 3, 6).double(), torch.randn(2, 5, 8).double()
    found = attention(sentences, tokens)
    for b, s in itertools.product(range(2), range(3)):
        q = attention.query(attention.norm_query(sentences[b, s]))
        centred = attention.norm_tokens(tokens[b] - tokens[b].mean(0))
        k, v = attention.key(centred), attention.value(centred)
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            weight = torch.stack([q[h] @ k[n, h] / 2 for n in range(5)]).softmax(0)
            heads.append(sum(weight[n] * v[n, h] for n in range(5)))
        torch.testing.assert_close(found[b, s], attention.out(torch.cat(heads)))
        maps = attention.maps(sentences, tokens)[b, :, s]                           # (heads, N)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2).double())
        torch.testing.assert_close(maps[1], weight)
    torch.testing.assert_close(attention(sentences, tokens + torch.randn(8).double()), found)


def test_sentence_gate_is_the_equation_of_the_release():
    torch.manual_seed(0)
    gate = model.SentenceGate(8, 6).double()
    sentences, tokens = torch.randn(2, 3, 6).double(), torch.randn(2, 5, 8).double()
    for b, s in itertools.product(range(2), range(3)):
        score = gate.query(tokens[b].mean(0)) @ gate.key(sentences[b, s]) / 8 ** 0.5
        expected = gate.value(sentences[b, s]) / (1 + torch.exp(-score))
        torch.testing.assert_close(gate(sentences, tokens)[b, s], expected)


def test_text_values_hide_the_volume_from_ssm_and_show_it_to_dfa(text_folder, batch):
    network = small_mg3d(text_folder, sentence_values="text")
    grads = {}
    for name in ("ssm", "dfa"):
        network.zero_grad()
        o = network(batch)
        mask = batch["sentence_mask"]
        loss = (losses.ssm_loss(o["text_sentences"], o["visual_sentences"], mask) if name == "ssm"
                else losses.dfa_loss(o["h_s"], o["f_i"]))
        loss.backward()
        grads[name] = network.encoder.patch_embed.proj.weight.grad.abs().max()
    assert grads["ssm"] < 1e-5 < grads["dfa"]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_any_hugging_face_encoder(tmp_path, kind):
    """A folder as users have it: BERT with word pieces, RoBERTa with byte pairs, saved by transformers."""
    from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer
    from transformers import (
        BertConfig,
        BertModel,
        BertTokenizerFast,
        RobertaConfig,
        RobertaModel,
        RobertaTokenizerFast,
    )
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    if kind == "bert":
        trained = BertWordPieceTokenizer()
        trained.train_from_iterator(REPORTS, vocab_size=60, min_frequency=1)
        trained.save_model(str(tmp_path))
        BertTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path)
        network = BertModel(BertConfig(vocab_size=trained.get_vocab_size(), **small))
    else:
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(REPORTS, vocab_size=300, min_frequency=1,
                                    special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        trained.save_model(str(tmp_path))
        RobertaTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path)
        config = RobertaConfig(vocab_size=trained.get_vocab_size(), pad_token_id=1, bos_token_id=0,
                               eos_token_id=2, max_position_embeddings=300, **small)
        network = RobertaModel(config)
    network.half().save_pretrained(tmp_path)             # as some published files are
    text = model.TextEncoder(str(tmp_path))
    assert {p.dtype for p in text.parameters()} == {torch.float32}
    tokens = data.tokenize_report(text.tokenizer, data.split_sentences(REPORTS[1]))
    pad = text.tokenizer.pad_token_id
    single = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(i) for i in tokens["single_ids"]], True, pad)
    mask = (single != pad).long()
    together = text.encode_sentences(single, mask)
    for i, ids in enumerate(tokens["single_ids"]):      # one by one, without padding, without the ends
        alone = text(torch.from_numpy(ids)[None], torch.ones(1, len(ids), dtype=torch.long))[0, 1:-1].mean(0)
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-4)


def text_folder_with(folder, tokens=None, drop=(), extra_rows=0, network=None, **config):
    """A folder of BERT with word pieces of REPORTS, spoilt -> its path"""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(REPORTS, vocab_size=60, min_frequency=1)
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]",
             "mask_token": "[MASK]"}
    names = {name: token for name, token in names.items() if name not in drop}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    if tokens is None:
        PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **names).save_pretrained(folder)
    rows = trained.get_vocab_size() + extra_rows
    network = network or (lambda **settings: BertModel(BertConfig(**settings)))
    network(**{"vocab_size": rows, **small, **config}).save_pretrained(folder)
    return str(folder)


def gpt2(vocab_size, **_):
    from transformers import GPT2Config, GPT2Model
    return GPT2Model(GPT2Config(vocab_size=vocab_size, n_embd=16, n_layer=1, n_head=2, n_positions=300,
                                bos_token_id=0, eos_token_id=0))


def bart(vocab_size, **_):
    from transformers import BartConfig, BartModel
    layers = {f"{part}_{name}": n for part in ("encoder", "decoder")
              for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 8))}
    special = dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"], 0)
    return BartModel(BartConfig(vocab_size=vocab_size, d_model=16, **layers, **special))


@pytest.mark.parametrize("faults, found", [
    ({"tokens": "none"}, "(knows no word|load tokenizer).*tokenizer"),     # transformers 5, 4
    ({"drop": ["mask_token"]}, "without mask_token"),
    ({"drop": ["pad_token"]}, "without mask_token or pad_token"),
    ({"extra_rows": -1}, "cannot read 250 tokens.*out of range.*a row of the embedding for every token"),
    ({"max_position_embeddings": 249}, "cannot read 250 tokens"),
    ({"is_decoder": True}, "do not see the words behind them"),
    ({"network": gpt2}, "do not see the words behind them"),
    ({"network": bart}, "BartModel, which has a decoder"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "")
def test_text_encoders_that_do_not_fit(tmp_path, faults, found):
    folder = text_folder_with(tmp_path, **faults)
    with pytest.raises(ValueError, match=f"text encoder {folder}: found .*{found}"):
        model.TextEncoder(folder)


def test_a_text_encoder_at_the_limit_fits(tmp_path):
    text = model.TextEncoder(text_folder_with(tmp_path, max_position_embeddings=250))
    rows = text.bert.get_input_embeddings().num_embeddings
    assert max(text.tokenizer.get_vocab().values()) == rows - 1
    assert (text.width, text.vocab_size) == (16, rows)


def test_numbers_of_words_may_have_gaps(tmp_path):
    """As where vocab.txt has a line twice: fewer words than the largest number says"""
    folder = text_folder_with(tmp_path, extra_rows=3)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] += 2
    file.write_text(json.dumps(content))
    text = model.TextEncoder(folder)
    assert text.vocab_size == len(text.tokenizer) + 2 == text.bert.config.vocab_size - 1


@pytest.mark.parametrize("change, found", [
    (lambda weights, file: file.write_bytes(file.read_bytes()[:-999]), "deserializing"),
    (lambda weights, file: weights.pop("encoder.layer.1.output.dense.weight"),
     "1 missing or unexpected weights, such as .'encoder.layer.1.output.dense.weight'"),
    (lambda weights, file: weights.update({"encoder.layer.2.output.dense.weight": torch.ones(16, 8)}),
     "1 missing or unexpected weights, such as .'encoder.layer.2.output.dense.weight'"),
    (lambda weights, file: weights["encoder.layer.1.output.dense.weight"][0].fill_(torch.nan),
     "weights with NaN"),
    (lambda weights, file: weights.update({"cls.predictions.bias": torch.ones(3),
                                           "embeddings.position_ids": torch.arange(3)}), None),
    (lambda weights, file: weights.update({"embeddings.word_embeddings._weight": torch.ones(3)}), None),
    (lambda weights, file: weights.pop("pooler.dense.weight"), None),
], ids=["torn", "missing", "more layers", "NaN", "a head", "as DeBERTa has it", "no pooler"])
def test_weights_of_text_encoders(tmp_path, change, found):
    from safetensors.torch import load_file, save_file
    folder, file = text_folder_with(tmp_path), tmp_path / "model.safetensors"
    weights = load_file(file)
    change(weights, file)
    if found != "deserializing":
        save_file(weights, file, metadata={"format": "pt"})
    refused = pytest.raises(ValueError, match=f"text encoder {folder}: .*{found}")
    with refused if found else contextlib.nullcontext():
        model.TextEncoder(folder)


def test_reports_in_words_that_the_tokenizer_does_not_know(text_folder, caplog):
    text = model.TextEncoder(str(text_folder))
    data.check_reports(text, REPORTS, "m.csv")
    assert not caplog.records
    data.check_reports(text, [*REPORTS, "Das Herz ist normal."], "m.csv")
    [record] = caplog.records
    found = f"m.csv: in 1 of {len(REPORTS) + 1} texts there are words that the text encoder does not know: Das, Herz, ist"
    assert found in record.getMessage()
    with pytest.raises(ValueError, match=f"{text_folder}: found 3 unknown words among 5 of m.csv"):
        data.check_reports(text, ["The Herz ist gross."], "m.csv")


@pytest.mark.parametrize("report, read", [
    ("No effusion. " * 40, 32 * len("Noeffusion.")),            # 32 sentences
    ((("effusion " * 50).strip() + ". ") * 10, 4 * (50 * len("effusion") + 1)),     # 51 tokens each, 248 of the words
    ("heart,effusion;" * 200, 32 * len("heart,effusion;")),     # forgotten blanks
    ("effusion" + " effusion" * 299, 248 * len("effusion"))])   # a single sentence
def test_reports_that_are_too_long(text_folder, caplog, report, read):
    text = model.TextEncoder(str(text_folder))
    data.check_reports(text, ["No effusion.", report], "m.csv")
    whole = len("".join(report.split()))
    share = 100 * (whole - read) / (whole + len("Noeffusion."))
    assert f"m.csv: of 2 reports looked at the ends, {share:.1f} % of their text, are not read" in caplog.text


def test_reports_to_look_at_are_spread_over_all():
    items = [data.Item(str(i), None, f"report {i}", "train", str(i)) for i in range(1200)]
    assert data.some_reports(items) == [f"report {i}" for i in range(0, 1200, 3)]
    assert data.some_reports(items[:499]) == [f"report {i}" for i in range(499)]


def test_text_folder_without_weights(tmp_path, text_folder):
    for file in text_folder.iterdir():
        if "safetensors" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=str(tmp_path)):
        model.TextEncoder(str(tmp_path))
    with pytest.raises(ValueError, match="no/such"):
        model.TextEncoder("no/such")


# ---------------------------------------------------------------------------------- foreign weights

def as_file(state, kind):
    bare = {k: v for k, v in state.items() if k != "mask_token"}
    old = {k.replace("mlp.linear", "mlp.fc"): v for k, v in bare.items()}

    def named(state, prefix, other):
        return {prefix + key: tensor for key, tensor in state.items()} | {other: torch.zeros(2)}
    return {"ours, encoder.pt": bare,
            "ours, last.pt": {"model": named(state, "encoder.", "image_proj.weight"), "config": {}},
            "the authors', flat": named(bare, "vision_encoder.", "vision_encoder.proj_head.weight"),
            "the authors', Lightning": {"state_dict": named(bare, "vision_encoder.", "text_encoder.x"),
                                        "epoch": 1},
            "MONAI, SwinUNETR": named(bare, "swinViT.", "encoder1.layer.conv1.conv.weight"),
            "MONAI, SSL": {"state_dict": named(old, "module.", "module.rotation_head.weight")}}[kind]


@pytest.mark.parametrize("kind, merging", [
    ("ours, encoder.pt", "monai"), ("ours, last.pt", "monai"), ("the authors', flat", "v0.9"),
    ("the authors', Lightning", "v0.9"), ("MONAI, SwinUNETR", "monai"), ("MONAI, SSL", "v0.9")])
def test_every_known_file_fills_the_encoder(tmp_path, kind, merging):
    source, target = build_encoder("swin_t"), build_encoder("swin_t")
    torch.save(as_file(source.state_dict(), kind), tmp_path / "weights.pt")
    report = load_weights(target, tmp_path / "weights.pt")
    for name, p in source.state_dict().items():
        if name != "mask_token":
            assert torch.equal(target.state_dict()[name], p), name
    assert target.merging == merging
    assert report["matched"] >= len(source.state_dict()) - 1
    assert set(report["missing"]) <= {"mask_token"}


def test_an_encoder_inside_a_model_takes_weights(tmp_path, text_folder):
    source = build_encoder("swin_t", window_size=3).state_dict()
    torch.save(as_file(source, "the authors', flat"), tmp_path / "weights.pt")
    classifier = model.Classifier(build_encoder("swin_t", window_size=3), 2)
    torch.save(as_file(source, "MONAI, SwinUNETR"), tmp_path / "monai.pt")
    unexpected = load_weights(classifier, tmp_path / "monai.pt")["unexpected"]
    assert unexpected == ["encoder1.layer.conv1.conv.weight"]
    for network, name in ((small_mg3d(text_folder), "image_proj.weight"), (classifier, "norm.weight")):
        report = load_weights(network, tmp_path / "weights.pt")
        assert name in report["missing"] and report["unexpected"] == ["encoder.proj_head.weight"]
        assert network.encoder.merging == "v0.9"
        for name, tensor in source.items():
            assert name == "mask_token" or torch.equal(network.encoder.state_dict()[name], tensor), name


def test_encoder_pt_keeps_the_order_of_merging_and_the_version(tmp_path):
    source = build_encoder("swin_t", merging="v0.9", use_v2=True)
    torch.save(model.export_encoder(source), tmp_path / "encoder.pt")
    target = build_encoder("swin_t")
    load_weights(target, tmp_path / "encoder.pt")
    assert target.merging == "v0.9" and target.use_v2
    x = torch.rand(1, 1, 16, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(source(x), target(x), strict=True))


@pytest.mark.parametrize("prefix", ["swinViT.", "module.swin_vit.", "module.backbone.swinViT.",
                                    "model._orig_mod.swinViT.", "net.swinViT."])
@pytest.mark.parametrize("container", [None, "state_dict", "network_weights", "model_state_dict"])
def test_files_of_voco(tmp_path, caplog, prefix, container):
    """Of the second version, in MONAI's old order of merging; their keys do not tell the latter."""
    source = build_encoder("swin_t", use_v2=True)
    state = {prefix + key: p for key, p in source.state_dict().items() if key != "mask_token"}
    state[prefix.partition("swin")[0] + "encoder1.layer.conv1.conv.weight"] = torch.ones(2)
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / "voco.pt")
    target = build_encoder("swin_t")
    load_weights(target, tmp_path / "voco.pt")
    assert target.use_v2 and target.merging == "v0.9"
    assert all(torch.equal(p, target.state_dict()[key]) for key, p in source.state_dict().items()
               if key != "mask_token")
    assert "voco.pt does not tell its patch merging: 'v0.9' is taken" in caplog.text
    assert "--merging monai" in caplog.text


def test_merging_as_asked_or_told(tmp_path, caplog):
    encoder = build_encoder("swin_t")
    files = {"v1": as_file(encoder.state_dict(), "MONAI, SwinUNETR"),
             "authors": as_file(encoder.state_dict(), "the authors', flat"),
             "ours": {"model": as_file(encoder.state_dict(), "ours, last.pt")["model"], "merging": "mergingv2"},
             "other": as_file(encoder.state_dict(), "MONAI, SwinUNETR") | {"merging": ["mean"]}}
    for name, state in files.items():
        torch.save(state, tmp_path / name)
    for name, asked, expected, said in (
            ("v1", "auto", "monai", "the other choice is --merging v0.9"), ("v1", "v0.9", "v0.9", ""),
            ("authors", "auto", "v0.9", ""), ("ours", "auto", "mergingv2", ""),
            ("authors", "v0.9", "v0.9", ""), ("other", "auto", "monai", "does not tell"),
            ("ours", "monai", "monai", "ours was trained with the patch merging 'mergingv2'")):
        caplog.clear()
        load_weights(encoder, tmp_path / name, asked)
        assert encoder.merging == expected
        assert said in caplog.text and bool(said) == bool(caplog.records), (name, asked)


def test_weights_of_another_architecture_are_refused(tmp_path):
    """Whatever the file's network has inside its encoder and ours has not would change the features."""
    settings = {"feature_size": 8, "num_heads": (1, 2, 2), "window_size": 3}
    ours = SwinTransformer3D(depths=(2, 2), **settings)
    before = {name: p.clone() for name, p in ours.state_dict().items()}
    plain = as_file(before, "MONAI, SwinUNETR")
    files = {"deeper": SwinTransformer3D(depths=(2, 4), **settings).state_dict(),
             "more_stages": SwinTransformer3D(depths=(2, 2, 1), **settings).state_dict(),
             "a_norm": plain | {"swinViT.patch_embed.norm.weight": torch.ones(8)},
             "an_end": plain | {"swinViT.norm.weight": torch.ones(8)},
             "half_v2": plain | {"swinViT.layers1c.0.layer.conv1.conv.weight": torch.ones(8, 8, 3, 3, 3)}}
    wanted = {"deeper": r"layers2.0.blocks.2.norm1.weight: expected nothing, found \(16,\)",
              "more_stages": r"layers3.0.blocks.0.norm1.weight: expected nothing, found \(32,\)",
              "a_norm": "patch_embed.norm.weight: expected nothing", "an_end": "norm.weight: expected nothing",
              "half_v2": r"layers1c.0.layer.conv2.conv.weight: expected \(8, 8, 3, 3, 3\), found nothing"}
    for name, state in files.items():
        torch.save(state, tmp_path / f"{name}.pt")
        for module in (ours, model.Classifier(ours, 2)):
            with pytest.raises(ValueError, match=rf"{name}.pt does not fill[\s\S]*{wanted[name]}"):
                load_weights(module, tmp_path / f"{name}.pt")
        after = ours.state_dict()
        assert not ours.use_v2 and after.keys() == before.keys()
        assert all(torch.equal(p, before[key]) for key, p in after.items())
    torch.save(before, tmp_path / "first.pt")
    with pytest.raises(ValueError, match=r"first.pt does not fill[\s\S]*layers1c.*found nothing"):
        load_weights(SwinTransformer3D(depths=(2, 2), use_v2=True, **settings), tmp_path / "first.pt")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    encoder = build_encoder("swin_t")
    state = as_file(encoder.state_dict(), "MONAI, SSL")["state_dict"]
    torch.save(state | {"module.text.mask": torch.full((2,), -torch.inf)}, tmp_path / "good.pt")
    load_weights(encoder, tmp_path / "good.pt")
    spoilt = state["module.layers1.0.blocks.0.mlp.fc1.weight"].clone()
    spoilt[3, 2] = value
    torch.save(state | {"module.layers1.0.blocks.0.mlp.fc1.weight": spoilt}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt: found layers1.0.blocks.0.mlp.linear1.weight with NaN or inf"):
        load_weights(encoder, tmp_path / "bad.pt")
    checkpoint = {"model": {f"encoder.{name}": p for name, p in encoder.state_dict().items()}}
    checkpoint["model"]["encoder.mask_token"] = torch.full((24,), value)
    with pytest.raises(ValueError, match="last.pt: found encoder.mask_token with NaN"):
        model.restore(nn.ModuleDict({"encoder": encoder}), checkpoint, "last.pt")


def test_heads_behind_an_encoder_are_left_out(tmp_path):
    source, target = build_encoder("swin_t"), build_encoder("swin_t")
    state = {f"vision_encoder.swinViT.{key}": p for key, p in source.state_dict().items()}
    heads = ["rotation_pre.weight", "rotation_head.weight", "contrastive_head.bias"]
    torch.save(state | {f"vision_encoder.{name}": torch.ones(2) for name in heads}, tmp_path / "authors.pt")
    assert load_weights(target, tmp_path / "authors.pt")["unexpected"] == heads
    assert all(torch.equal(p, target.state_dict()[key]) for key, p in source.state_dict().items())


def test_two_networks_in_a_file_are_refused(tmp_path):
    state = build_encoder("swin_t").state_dict()
    torch.save({f"{name}.vision_encoder.{key}": p for name in ("student", "teacher") for key, p in state.items()},
               tmp_path / "two.pt")
    with pytest.raises(ValueError, match="two.pt: found two networks, each with encoder.mask_token"):
        load_weights(build_encoder("swin_t"), tmp_path / "two.pt")


def test_a_file_of_nothing_but_settings_is_refused(tmp_path):
    for name, state in {"none": {"state_dict": None, "epoch": 3}, "text": {"model": "swin_b"}, "list": [1]}.items():
        torch.save(state, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: .*expected a dict of (tensors|weights)"):
            load_weights(build_encoder("swin_t"), tmp_path / name)


def test_only_our_own_flags_are_flags():
    ours = {"encoder": "swin_t", "size": [32, 32, 32]}
    weights = {"encoder.mask_token": torch.zeros(2)}
    assert model.flags_of({"model": weights, "config": ours}) == ours
    for foreign in ({"config": None}, {"config": "swin.yaml"}, {"config": {"encoder": ["swin_t"]}},
                    {"config": {"encoder": "resnet"}}, {"config": {"task": "segmentation", "size": 96}}, {}):
        assert model.flags_of({"model": weights} | foreign) == {}
    for model_of_others in ({"swinViT.mask_token": torch.zeros(2)}, "swin_b", None):
        assert model.flags_of({"model": model_of_others, "config": ours}) == {}
    assert model.flags_of({"state_dict": weights, "config": ours}) == {}


@pytest.mark.parametrize("kind", ["classify", "segment", "report"])
def test_a_checkpoint_alone_rebuilds_the_second_version(kind):
    config = {"encoder": "swin_t", "use_checkpoint": False, "vocabulary": ["a"] * 9}
    source = model.build_network(kind, 2, config, None)
    source.encoder.become_v2()
    source.encoder.merging = "v0.9"
    checkpoint = {"model": model.weights_of(source), "merging": "v0.9", "config": config}
    target = model.build_network(kind, 2, config, None)
    model.restore(target, checkpoint, "best.pt")
    volume = torch.rand(1, 1, 32, 32, 32)
    inputs = (volume, torch.tensor([[1, 3]])) if kind == "report" else (volume,)
    assert target.encoder.use_v2 and target.encoder.merging == "v0.9"
    assert torch.equal(target.eval()(*inputs), source.eval()(*inputs))
    del checkpoint["model"]["encoder.layers2c.0.layer.conv2.conv.weight"]
    with pytest.raises(ValueError, match="best.pt does not fill.*\n.*layers2c.*expected .48, 48.*found nothing"):
        model.restore(model.build_network(kind, 2, config, None), checkpoint, "best.pt")


def test_a_unet_has_no_merging(tmp_path):
    source, target = build_encoder("unet", feature_size=8), build_encoder("unet", feature_size=8)
    torch.save(model.export_encoder(source), tmp_path / "encoder.pt")
    load_weights(target, tmp_path / "encoder.pt")
    assert target.merging is None and torch.equal(target.levels[0][0].weight, source.levels[0][0].weight)


def test_what_is_left_out_keeps_its_weights(tmp_path):
    source, target = (model.Classifier(build_encoder("swin_t"), 2) for _ in range(2))
    torch.save({"model": source.state_dict()}, tmp_path / "last.pt")
    first = target.head.weight.clone()
    report = load_weights(target, tmp_path / "last.pt", leave_out=target.own_heads)
    left_out = ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert torch.equal(target.head.weight, first) and report["missing"] == report["unexpected"] == left_out
    load_weights(target, tmp_path / "last.pt")
    assert torch.equal(target.head.weight, source.head.weight)


def test_exported_encoders_load_strictly_into_monai(tmp_path):
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    state = model.export_encoder(SwinTransformer3D(feature_size=12))
    torch.save(state, tmp_path / "encoder.pt")
    save_safetensors(state, tmp_path / "encoder.safetensors")
    unetr = nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12)
    unetr.swinViT.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    unetr.swinViT.load_state_dict(safetensors.torch.load_file(tmp_path / "encoder.safetensors"))


def save_safetensors(state, path):
    with open(path, "wb") as file:
        model.write_safetensors(state, file)
    return path


@pytest.mark.parametrize("name, settings", [("swin_t", {"merging": "v0.9", "use_v2": True}), ("unet", {})])
def test_safetensors_hold_what_encoder_pt_holds(tmp_path, caplog, name, settings):
    source = build_encoder(name, **settings)
    config = {"encoder": name, "size": (32, 32, 64), "hu": "csv"}
    state = model.export_encoder(source, config=config, patients=["ab", "cd"])
    torch.save(state, tmp_path / "encoder.pt")
    path = save_safetensors(state, tmp_path / "encoder.safetensors")
    first, second = (model.read_checkpoint(tmp_path / f"encoder.{ending}") for ending in ("pt", "safetensors"))
    assert first.keys() == second.keys() == source.state_dict().keys() - {"mask_token"}
    assert all(torch.equal(first[key], second[key]) for key in first)
    notes = json.loads(json.dumps(model.notes_of(first)))               # tuples become lists
    assert notes == model.notes_of(second) and notes["merging"] == settings.get("merging")
    assert set(source.settings) < set(notes["architecture"])
    for file in (path, tmp_path / "encoder.pt"):                        # no flag is needed
        target, found = evaluation.load_encoder(file)
        assert found == model.flags_of(model.read_checkpoint(file)) and tuple(found["size"]) == (32, 32, 64)
        x = torch.rand(1, 1, 16, 16, 16)
        assert all(torch.equal(a, b) for a, b in zip(source(x), target(x), strict=True))
        assert evaluation.patients_of(file) == {"ab", "cd"}
    assert "does not tell" not in caplog.text


def test_safetensors_of_others(tmp_path, caplog):
    """They do not say which encoder they hold, nor its order of merging: flags do."""
    source = build_encoder("swin_t", merging="v0.9")
    weights = {f"swinViT.{key}": p for key, p in source.state_dict().items() if key != "mask_token"}
    for name, metadata in (("none", None), ("pt", {"format": "pt"})):
        path = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file(weights, path, metadata)
        with pytest.raises(ValueError, match=f"{name}.safetensors does not say which encoder.*--encoder swin_b"):
            evaluation.load_encoder(path)
        with pytest.raises(ValueError, match=f"{name}.safetensors does not fill.*another --encoder"):
            evaluation.load_encoder(path, "unet")
        found, config = evaluation.load_encoder(path, "swin_t")
        assert "does not tell its patch merging" in caplog.text and found.merging == "monai" and config == {}
        found, _ = evaluation.load_encoder(path, "swin_t", "v0.9")
        x = torch.rand(1, 1, 16, 16, 16)
        assert all(torch.equal(a, b) for a, b in zip(source(x), found(x), strict=True))
        assert evaluation.patients_of(path) is None
        caplog.clear()


def test_safetensors_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = model.export_encoder(build_encoder("swin_t"))
    whole = save_safetensors(state, tmp_path / "whole.safetensors").read_bytes()
    weights = {key: p.clone() for key, p in state.items()}
    files = {"torn": whole[:-9], "empty": b"", "pickle": pickle.dumps(Bomb())}
    for name, notes in {"cut": '{"config":', "list": "[1]", "word": '"swin_t"'}.items():
        files[name] = safetensors.torch.save(weights, {"mg3d": notes})
    for name, content in files.items():
        Path(f"{name}.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.safetensors: cannot be read safely"):
            load_weights(build_encoder("swin_t"), f"{name}.safetensors")
    assert not Path("exploded").exists()
    with pytest.raises(ValueError, match="absent.safetensors: found no such file"):
        load_weights(build_encoder("swin_t"), "absent.safetensors")


# ------------------------------------------------------------------------------- names of the hub

def test_names_of_the_hub_are_files_of_its_cache(hub, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "text_encoder").mkdir()
    for name in ("a.pt", "b.pt", "text_encoder/config.json"):
        (tmp_path / name).write_text(name)
    a, b, text = tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "text_encoder"
    both = hub("some-one/both", {"encoder.safetensors": a, "encoder.pt": b, "runs/x/best.pt": a,
                                 "runs/x/text_encoder": text})
    one = hub("some-one/v1.2_old", {"encoder.pt": b})
    for name, expected in (("hf:some-one/both", both / "encoder.safetensors"),
                           (Path("hf:some-one/both/encoder.pt"), both / "encoder.pt"),
                           ("hf:some-one/both/runs/x/best.pt", both / "runs/x/best.pt"),
                           ("hf:some-one/v1.2_old/", one / "encoder.pt")):
        found = model.local_file(name)
        assert found == expected and found.is_file()
        assert f"{str(name).rstrip('/')}: {expected}" in caplog.text
    assert (found.parent, model.local_file("some-one/both"), model.local_file(a)) == (one, Path("some-one/both"), a)
    assert (both / "runs/x/text_encoder/config.json").read_text() == "text_encoder/config.json"


def test_names_of_the_hub_that_lead_nowhere(hub, tmp_path):
    (tmp_path / "weights.bin").write_text("x")
    hub("some-one/other", {"weights.bin": tmp_path / "weights.bin", "sub/x.pt": tmp_path / "weights.bin"})
    absent, unknown = "found no {} in that repository", "found no copy in the cache"
    for name, words in (("hf:some-one/other", absent.format("encoder.safetensors or encoder.pt")),
                        ("hf:some-one/other/last.pt", absent.format("last.pt")),
                        ("hf:some-one/other/sub", absent.format("sub")), ("hf:some-one", unknown), ("hf:", unknown),
                        ("hf:some one/x", unknown), ("hf:MONAI/example", unknown + ".*HF_HUB_OFFLINE")):
        with pytest.raises(ValueError, match=f"^{name}: {words}") as error:
            load_weights(build_encoder("swin_t"), name)
        assert "\n" not in str(error.value)


def test_from_the_hub_comes_what_is_needed(hub, tmp_path, monkeypatch):
    """With network: gigabytes of last.pt stay there when the encoder is asked for."""
    import huggingface_hub
    there = ["README.md", "encoder.pt", "encoder.safetensors", "last.pt", "text_encoder/vocab.txt", "a/last.pt"]
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append(list(huggingface_hub.utils.filter_repo_objects(there, allow_patterns=allow_patterns)))
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name, expected in (("", ["encoder.safetensors", "text_encoder/vocab.txt"]),
                           ("/encoder.pt", ["encoder.pt", "text_encoder/vocab.txt"]),
                           ("/last.pt", ["last.pt", "text_encoder/vocab.txt"]), ("/a/last.pt", ["a/last.pt"])):
        for _ in range(2):                      # it is asked once
            model.local_file(f"hf:a/b{name}")
        assert asked.pop() == expected and not asked


def test_poor_matches_are_refused(tmp_path):
    target = build_encoder("swin_t")
    before = {name: p.clone() for name, p in target.state_dict().items()}
    torch.save(build_encoder("swin_t", window_size=5).state_dict(), tmp_path / "window.pt")
    torch.save(build_encoder("unet", feature_size=8).state_dict(), tmp_path / "unet.pt")
    torch.save({"step": 3}, tmp_path / "empty.pt")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match=r"window.pt.*does not fill[\s\S]*relative_position_bias_table: "
                                         r"expected \(343, 2\), found \(729, 2\)"):
        load_weights(target, tmp_path / "window.pt")
    for name in ("unet.pt", "empty.pt", "torn.pt", "absent.pt"):
        with pytest.raises(ValueError, match=name):
            load_weights(target, tmp_path / name)
    assert all(torch.equal(p, before[name]) for name, p in target.state_dict().items())


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_of_code_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, "bomb.pt")
    with pytest.raises(ValueError, match="bomb.pt"):
        load_weights(build_encoder("swin_t"), "bomb.pt")
    assert not (tmp_path / "exploded").exists()
