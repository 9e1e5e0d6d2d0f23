"""Every loss against a loop written from its equation, in value and gradient; and two processes against one."""
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import losses

B, S, E, E_T, V, L = 4, 5, 6, 7, 11, 9


def example(seed=0, dtype=torch.float64):
    """Random arguments of every loss for a batch of four with ragged sentence counts; leaves that want gradients."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()
    mask = torch.arange(S) < torch.tensor([5, 2, 3, 1])[:, None]                    # (B, S)
    labels = torch.randint(0, V, (B, L), generator=g)
    labels[torch.rand(B, L, generator=g) < 0.7] = -100
    voxels = (torch.rand(B, 1, 4, 4, 4, generator=g) < 0.5)
    return {
        "mim_loss": (leaf(B, 1, 4, 4, 4), leaf(B, 1, 4, 4, 4), voxels),
        "mlm_loss": (leaf(B, L, V), labels),
        "sfr_loss": (leaf(B, S, E), leaf(B, S, E), mask),
        "cml_loss": tuple(leaf(B, E) for _ in range(4)),
        "ssm_loss": (leaf(B, S, E_T), leaf(B, S, E), mask),
        "dfa_loss": (leaf(B, E), leaf(B, E)),
        "clip_loss": (leaf(B, E), leaf(B, E)),
    }


def cosine(a, b):
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def naive_info_nce(rows, columns, temperature=0.1):
    total = 0
    for i in range(len(rows)):
        exponentials = [torch.exp(cosine(rows[i], c) / temperature) for c in columns]
        total = total - torch.log(exponentials[i] / sum(exponentials))
    return total / len(rows)


def naive_mim(recon, volume, mask):
    total, count = 0, 0
    for r, v, m in zip(recon.flatten(), volume.detach().flatten(), mask.flatten()):
        if m:
            total, count = total + (r - v) ** 2, count + 1
    return total / count


def naive_mlm(logits, labels):
    terms = [-torch.log(torch.exp(logits[b, t, labels[b, t]]) / torch.exp(logits[b, t]).sum())
             for b in range(len(labels)) for t in range(labels.shape[1]) if labels[b, t] >= 0]
    return sum(terms) / len(terms)


def naive_sfr(rebuilt, sentences, mask):
    terms = [1 - cosine(rebuilt[b, s], sentences[b, s].detach())
             for b in range(len(mask)) for s in range(mask.shape[1]) if mask[b, s]]
    return sum(terms) / len(terms)


def naive_ssm(text, visual, mask):
    text, pairs = text.detach(), []
    for i in range(len(mask)):
        for j in range(i + 1, len(mask)):
            differences = [abs(cosine(text[i, s], text[j, t]) - cosine(visual[i, s], visual[j, t]))
                           for s in range(int(mask[i].sum())) for t in range(int(mask[j].sum()))]
            pairs.append(sum(differences) / len(differences))
    return sum(pairs) / len(pairs)


NAIVE = {"mim_loss": naive_mim, "mlm_loss": naive_mlm, "sfr_loss": naive_sfr, "ssm_loss": naive_ssm, "dfa_loss": naive_info_nce,
         "cml_loss": lambda f_i, h_i, f_t, h_t: naive_info_nce(f_i, h_i) + naive_info_nce(f_t, h_t),
         "clip_loss": lambda f_i, f_t: (naive_info_nce(f_i, f_t) + naive_info_nce(f_t, f_i)) / 2}


def value_and_gradients(function, arguments):
    value = function(*arguments)
    leaves = [a for a in arguments if a.requires_grad]
    return value, torch.autograd.grad(value, leaves, allow_unused=True)


@pytest.mark.parametrize("name", NAIVE)
def test_value_and_gradient_of_the_equation(name):
    arguments = example()[name]
    value, gradients = value_and_gradients(getattr(losses, name), arguments)
    expected, expected_gradients = value_and_gradients(NAIVE[name], arguments)
    assert value.shape == ()
    torch.testing.assert_close(value, expected)
    for gradient, wanted in zip(gradients, expected_gradients):
        assert (gradient is None) == (wanted is None)            # targets are detached in both
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("name, target", [("mim_loss", 1), ("sfr_loss", 1), ("ssm_loss", 0)])
def test_targets_get_no_gradient(name, target):
    arguments = example()[name]
    getattr(losses, name)(*arguments).backward()
    assert arguments[target].grad is None
    assert arguments[1 - target].grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["sfr_loss", "ssm_loss", "mlm_loss"])
def test_padding_does_not_matter(name):
    arguments = example()[name]
    value, gradients = value_and_gradients(getattr(losses, name), arguments)
    if name == "mlm_loss":
        logits, labels = arguments
        junk = torch.where((labels == -100)[..., None], 100 * torch.randn_like(logits), logits)
        longer = torch.cat([labels, torch.full((B, 3), -100)], 1)
        other = losses.mlm_loss(torch.cat([junk, torch.randn(B, 3, V, dtype=junk.dtype)], 1), longer)
    else:
        a, b, mask = arguments
        a, b = (torch.cat([torch.where(mask[..., None], x, 100 * torch.randn_like(x)), torch.randn_like(x[:, :2])], 1) for x in (a, b))
        other = getattr(losses, name)(a, b, torch.cat([mask, torch.zeros(B, 2, dtype=torch.bool)], 1))
        used = gradients[1] if name == "ssm_loss" else gradients[0]
        assert used[~mask].abs().max() == 0
    torch.testing.assert_close(other, value)


def test_temperature():
    f, h = example()["dfa_loss"]
    torch.testing.assert_close(losses.dfa_loss(f, h, temperature=0.5), naive_info_nce(f, h, 0.5))


def test_batch_of_one_is_zero_and_never_nan():
    arguments = example()
    for name in ("cml_loss", "ssm_loss", "dfa_loss", "clip_loss"):
        one = [a[:1].detach().requires_grad_(a.is_floating_point()) for a in arguments[name]]
        value = getattr(losses, name)(*one)
        value.backward()
        assert value == 0
        assert all(torch.isfinite(a.grad).all() for a in one if a.grad is not None)


def test_nothing_masked_is_zero():
    logits, labels = example()["mlm_loss"]
    assert losses.mlm_loss(logits, torch.full_like(labels, -100)) == 0
    recon, volume, mask = example()["mim_loss"]
    assert losses.mim_loss(recon, volume, torch.zeros_like(mask)) == 0


@pytest.mark.parametrize("name", NAIVE)
def test_float32_under_autocast(name):
    arguments = [a.detach().bfloat16() if a.is_floating_point() else a for a in example()[name]]
    expected = getattr(losses, name)(*[a.float() if a.is_floating_point() else a for a in arguments])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = getattr(losses, name)(*arguments)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


def _as_process(rank, world, folder):
    """One of two processes: its part of the batch (sentences cut to its own longest report), all losses, all gradients."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    result = {}
    for name, arguments in example().items():
        part = [a.detach().chunk(world)[rank].clone() for a in arguments]
        if name in ("sfr_loss", "ssm_loss"):
            longest = int(part[2].sum(1).max())
            part = [a[:, :longest] for a in part]
        # a parameter shared by both processes scales the first trainable input, as a layer's weights do
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        trained = 1 if name == "ssm_loss" else 0
        part[trained] = part[trained].requires_grad_()
        inputs = list(part)
        inputs[trained] = part[trained] * scale ** 2 + scale - 1
        value = getattr(losses, name)(*inputs)
        value.backward()
        dist.all_reduce(scale.grad)                     # what DistributedDataParallel does: the mean over processes
        result[name] = value.item(), (scale.grad / world).item(), part[trained].grad / world
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    mp.spawn(_as_process, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, arguments in example().items():
        arguments = [a.detach() for a in arguments]
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        trained = 1 if name == "ssm_loss" else 0
        arguments[trained].requires_grad_()
        inputs = list(arguments)
        inputs[trained] = arguments[trained] * scale ** 2 + scale - 1
        value = getattr(losses, name)(*inputs)
        value.backward()
        for rank, (its_value, its_scale_grad, its_grad) in enumerate(r[name] for r in ranks):
            assert math.isclose(its_value, value.item(), rel_tol=1e-12), name
            assert math.isclose(its_scale_grad, scale.grad.item(), rel_tol=1e-9), name
            wanted = arguments[trained].grad.chunk(2)[rank]
            torch.testing.assert_close(its_grad, wanted[:, :its_grad.shape[1]], msg=lambda m: f"{name}: {m}")
