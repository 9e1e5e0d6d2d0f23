"""The heads of the tasks: SwinUNETR against MONAI's, the report generator against exhaustive search."""
import itertools
import re

import pytest
import torch
from torch import nn

import model


class OneMap(nn.Module):
    """An encoder whose last map is the volume itself, pooled"""
    channels, stride = [4] * 5, 32

    def __init__(self):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(4))
        self.layer = nn.Conv3d(1, 4, 4, stride=4)

    def forward(self, x, mask=None):
        return [self.layer(x)] * 5


def generator(vocab_size=7, **kwargs):
    torch.manual_seed(0)
    net = model.ReportGenerator(OneMap(), vocab_size, dim=16, num_heads=2, memory_slots=3, **kwargs).eval()
    for p in net.parameters():                  # the first weights are so small that all words are alike
        nn.init.normal_(p, std=0.5)
    return net


# --------------------------------------------------------------------------------------- classifier

def test_classifier_is_its_formula():
    net = model.Classifier(OneMap(), 3)
    volume = torch.rand(2, 1, 8, 8, 12)
    logits = net(volume)
    for b, features in enumerate(net.encoder(volume)[-1]):      # (C, d, h, w)
        pooled = torch.stack([channel.mean() for channel in features])
        normed = (pooled - pooled.mean()) / (pooled.var(unbiased=False) + 1e-5).sqrt()
        assert torch.allclose(logits[b], net.head.weight @ normed + net.head.bias, atol=1e-6)


@pytest.mark.parametrize("head", [model.Classifier, model.SwinUNETR, model.ReportGenerator])
def test_every_parameter_has_a_gradient(head):
    net = head(model.build_encoder("swin_t"), 9)                # DDP would wait for one that has none
    volume = torch.rand(1, 1, 64, 64, 64)
    out = net(volume, torch.tensor([[1, 3, 4]])) if isinstance(net, model.ReportGenerator) else net(volume)
    out.square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


# ---------------------------------------------------------------------------------------- SwinUNETR

def test_swin_unetr_is_monais(tmp_path):
    monai = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    torch.manual_seed(0)
    theirs = monai.SwinUNETR(in_channels=1, out_channels=3, feature_size=12)
    ours = model.SwinUNETR(model.SwinTransformer3D(feature_size=12), 3)
    torch.save(theirs.state_dict(), tmp_path / "monai.pt")
    loaded = model.load_weights(ours, tmp_path / "monai.pt")
    assert loaded["missing"] == ["encoder.mask_token"] and loaded["unexpected"] == []
    a = torch.rand(2, 1, 64, 32, 96, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    x, y = ours(a), theirs(b)
    assert x.shape == (2, 3, 64, 32, 96) and torch.allclose(x, y, atol=1e-4)
    weight = torch.rand_like(x)
    (x * weight).mean().backward()
    (y * weight).mean().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-6)
    named = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            theirs_name = re.sub("^encoder[.]", "swinViT.", name)
            assert torch.allclose(p.grad, named[theirs_name].grad, atol=1e-6, rtol=1e-3), name


def test_swin_unetr_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="UNetEncoder.*SwinTransformer3D"):
        model.SwinUNETR(model.build_encoder("unet"), 2)
    with pytest.raises(ValueError, match=r"\(32, 44, 32\).*multiples of 8"):
        model.SwinUNETR(model.build_encoder("swin_t"), 2)(torch.zeros(1, 1, 32, 44, 32))


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_swin_unetr_of_any_number_of_stages(stages):
    torch.manual_seed(0)
    encoder = model.SwinTransformer3D(feature_size=4, depths=(1,) * stages, num_heads=(2,) * stages, window_size=2)
    net = model.SwinUNETR(encoder, 3)
    logits = net(torch.rand(1, 1, *[2 * encoder.stride] * 3))
    assert logits.shape == (1, 3, *[2 * encoder.stride] * 3)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


# --------------------------------------------------------------------------------- report generator

def test_a_word_sees_only_the_words_before_it():
    net, volume = generator(), torch.rand(1, 1, 8, 8, 8)
    tokens = torch.tensor([[1, 3, 4, 5, 6]])
    logits = net(volume, tokens)
    changed = tokens.clone()
    changed[0, 3] = 2
    other = net(volume, changed)
    assert torch.allclose(logits[:, :3], other[:, :3], atol=1e-5)
    assert not torch.allclose(logits[:, 3:], other[:, 3:], atol=1e-3)


def test_keys_that_are_kept_change_nothing():
    net, volume = generator(), torch.rand(2, 1, 8, 8, 8)
    tokens = torch.randint(1, 7, (2, 6))
    contexts, past, steps = net.contexts(volume), None, []
    for i in range(6):
        logits, past = net.decode(tokens[:, i:i + 1], contexts, past)
        steps.append(logits)
    assert torch.allclose(torch.cat(steps, 1), net(volume, tokens), atol=1e-4)


def test_the_memory_is_attended_and_learns():
    net, volume, tokens = generator(), torch.rand(1, 1, 8, 8, 8), torch.tensor([[1, 3]])
    logits = net(volume, tokens)
    logits.square().mean().backward()
    assert net.memory.grad.abs().sum() > 0
    with torch.no_grad():
        net.memory += 1
    assert not torch.allclose(net(volume, tokens), logits, atol=1e-3)


def best_of_all(net, volume, max_length):
    """Of all sequences of up to max_length words that with the highest mean log-probability, end counted"""
    best = (-float("inf"), None)
    words = [word for word in range(net.head.out_features) if word not in (0, 1, 2)]
    for length in range(max_length + 1):
        for sequence in itertools.product(words, repeat=length):
            logits = net(volume, torch.tensor([[1, *sequence]])).log_softmax(-1)[0]
            score = sum(logits[i, word] for i, word in enumerate([*sequence, 2])) / (length + 1)
            best = max(best, (float(score), list(sequence)))
    return best[1]


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_a_beam_as_wide_as_the_tree_finds_the_best_report(seed):
    net = generator(vocab_size=6, max_length=3)
    torch.manual_seed(seed)
    nn.init.normal_(net.head.weight)
    volumes = torch.rand(2, 1, 8, 8, 8)
    assert net.generate(volumes, beams=27) == [best_of_all(net, one[None], 3) for one in volumes]


@torch.no_grad()
def test_beam_of_one_is_greedy_and_a_batch_is_its_volumes():
    net, volumes = generator(vocab_size=30, max_length=12), torch.rand(3, 1, 8, 8, 8)
    nn.init.constant_(net.head.bias, 0.0)
    net.head.bias[2] = -100.0                           # it never ends
    together = net.generate(volumes, beams=1)
    for report, volume in zip(together, volumes):
        tokens = [1]
        for _ in range(13):
            logits = net(volume[None], torch.tensor([tokens]))[0, -1]
            logits[[0, 1, 2]] = -torch.inf
            tokens.append(int(logits.argmax()))
            if len(tokens) == 13:
                break
        assert report == tokens[1:] and len(report) == 12
    assert net.generate(volumes, beams=3) == [net.generate(one[None], beams=3)[0] for one in volumes]


def test_it_learns_a_report_by_heart():
    torch.manual_seed(0)
    net = model.ReportGenerator(OneMap(), 12, dim=32, num_heads=2, dropout=0.0)
    volumes = torch.stack([torch.zeros(1, 8, 8, 8), torch.ones(1, 8, 8, 8)])
    reports = torch.tensor([[1, 3, 4, 5, 2, 0], [1, 8, 3, 9, 7, 2]])
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(150):
        logits = net(volumes, reports[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), reports[:, 1:].flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert net.eval().generate(volumes) == [[3, 4, 5], [8, 3, 9, 7]]
