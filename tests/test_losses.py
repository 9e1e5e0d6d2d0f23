"""Every loss against a loop written from its equation, in value and gradient; two processes against one."""
import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import losses

B, S, E, E_T, V, L = 4, 5, 6, 7, 11, 9


def example(seed=0, dtype=torch.float64):
    """Random arguments of every loss, reports of several lengths; all that is no mask wants a gradient."""
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
        "bce_loss": (leaf(B, 3), torch.tensor([[1, 0, 0], [1, math.nan, 1], [math.nan, 1, 0], [math.nan] * 3], dtype=dtype)),
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
    return sum(terms) / len(mask)                       # the sum of each patient, the mean of patients


def naive_ssm(text, visual, mask):
    text, pairs = text.detach(), []
    for i in range(len(mask)):
        for j in range(i + 1, len(mask)):
            differences = [abs(cosine(text[i, s], text[j, t]) - cosine(visual[i, s], visual[j, t]))
                           for s in range(int(mask[i].sum())) for t in range(int(mask[j].sum()))]
            pairs.append(sum(differences) / len(differences))
    return sum(pairs) / len(pairs)


def naive_bce(logits, labels):
    terms = [-torch.log(1 / (1 + torch.exp(-x if y == 1 else x)))
             for x, y in zip(logits.flatten(), labels.flatten()) if not y.isnan()]
    return sum(terms) / len(terms)


NAIVE = {"mim_loss": naive_mim, "mlm_loss": naive_mlm, "sfr_loss": naive_sfr, "ssm_loss": naive_ssm,
         "dfa_loss": naive_info_nce,
         "cml_loss": lambda f_i, h_i, f_t, h_t: naive_info_nce(f_i, h_i) + naive_info_nce(f_t, h_t),
         "bce_loss": naive_bce,
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
        with_junk = [torch.where(mask[..., None], x, 100 * torch.randn_like(x)) for x in (a, b)]
        longer = [torch.cat([x, torch.randn_like(x[:, :2])], 1) for x in with_junk]
        other = getattr(losses, name)(*longer, torch.cat([mask, torch.zeros(B, 2, dtype=torch.bool)], 1))
        used = gradients[1] if name == "ssm_loss" else gradients[0]
        assert used[~mask].abs().max() == 0
    torch.testing.assert_close(other, value)


def test_temperature():
    f, h = example()["dfa_loss"]
    torch.testing.assert_close(losses.dfa_loss(f, h, temperature=0.5), naive_info_nce(f, h, 0.5))
    labels = torch.tensor([[1, 0]] * B)
    hotter = losses.prompt_loss(f, h, labels, temperature=0.5)
    cosines = torch.stack([torch.stack([cosine(a, b) for b in h]) for a in f])
    pairs = (cosines / 0.5).view(B, 2, 2).log_softmax(-1)
    torch.testing.assert_close(hotter, -(pairs[:, 0, 0] + pairs[:, 1, 1]).mean() / 2)


def test_batch_of_one_is_zero_and_never_nan():
    arguments = example()
    for name in ("cml_loss", "ssm_loss", "dfa_loss", "clip_loss"):
        first = [a[:1].detach().requires_grad_(a.is_floating_point()) for a in arguments[name]]
        value = getattr(losses, name)(*first)
        value.backward()
        assert value == 0
        assert all(torch.isfinite(a.grad).all() for a in first if a.grad is not None)


def test_nothing_masked_is_zero():
    logits, labels = example()["mlm_loss"]
    assert losses.mlm_loss(logits, torch.full_like(labels, -100)) == 0
    recon, volume, mask = example()["mim_loss"]
    assert losses.mim_loss(recon, volume, torch.zeros_like(mask)) == 0
    logits, labels = example()["bce_loss"]
    assert losses.bce_loss(logits, labels * math.nan) == 0


@pytest.mark.parametrize("name", NAIVE)
def test_float32_under_autocast(name):
    arguments = [a.detach().bfloat16() if a.is_floating_point() else a for a in example()[name]]
    expected = getattr(losses, name)(*[a.float() if a.is_floating_point() else a for a in arguments])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = getattr(losses, name)(*arguments)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


def value_and_scaled_gradient(name, arguments):
    """A loss whose first trained input passes through a parameter, `scale`, that all processes share."""
    trained = 1 if name == "ssm_loss" else 0
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    leaf = arguments[trained].requires_grad_()
    inputs = [*arguments[:trained], leaf * scale ** 2 + scale - 1, *arguments[trained + 1:]]
    value = getattr(losses, name)(*inputs)
    value.backward()
    return value.item(), scale.grad, leaf.grad


def _as_process(rank, world, folder):
    """One of two processes: its part of the batch, with sentences cut to its own longest report."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    result = {}
    for name, arguments in example().items():
        arguments = [a.detach().chunk(world)[rank].clone() for a in arguments]
        if name in ("sfr_loss", "ssm_loss"):
            longest = int(arguments[2].sum(1).max())
            arguments = [a[:, :longest] for a in arguments]
        value, scale_grad, leaf_grad = value_and_scaled_gradient(name, arguments)
        dist.all_reduce(scale_grad)             # DistributedDataParallel takes the mean over processes
        result[name] = value, (scale_grad / world).item(), leaf_grad / world
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    mp.spawn(_as_process, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, arguments in example().items():
        value, scale_grad, leaf_grad = value_and_scaled_gradient(name, [a.detach() for a in arguments])
        for rank, result in enumerate(ranks):
            its_value, its_scale_grad, its_leaf_grad = result[name]
            assert math.isclose(its_value, value, rel_tol=1e-12), name
            assert math.isclose(its_scale_grad, scale_grad.item(), rel_tol=1e-9), name
            wanted = leaf_grad.chunk(2)[rank][:, :its_leaf_grad.shape[1]]
            torch.testing.assert_close(its_leaf_grad, wanted, msg=lambda m: f"{name}: {m}")


# ------------------------------------------------------------------------- a step of several passes

COUNTED = ("mim", "mlm", "sfr")


def one_after_the_other(arguments, patients):
    """{loss: (value, gradient of its first argument)} of passes of so many patients, weighed by their shares"""
    leaves = {name: arguments[f"{name}_loss"][0].detach().requires_grad_() for name in COUNTED}
    inputs = {name: (leaves[name], *arguments[f"{name}_loss"][1:]) for name in COUNTED}
    passes = [{name: part for name, part in zip(COUNTED, parts)} for parts in zip(
        *(list(zip(*(a.split(patients) for a in inputs[name]))) for name in COUNTED))]
    batches = [{"volume": one["mim"][0], "volume_mask": one["mim"][2], "mlm_labels": one["mlm"][1]}
               for one in passes]
    values = dict.fromkeys(COUNTED, 0.0)
    for one, share in zip(passes, losses.shares(batches, (*COUNTED, "dfa"))):
        assert share["dfa"] == 1 / len(passes)
        for name in COUNTED:
            term = share[name] * getattr(losses, f"{name}_loss")(*one[name])
            term.backward()
            values[name] += term.item()
    return {name: (values[name], leaves[name].grad) for name in COUNTED}


@pytest.mark.parametrize("patients", [[2, 2], [1, 3], [1, 1, 1, 1]])
def test_passes_by_their_shares_are_one_batch(patients):
    arguments = example()
    found = one_after_the_other(arguments, patients)
    for name in COUNTED:
        value, gradients = value_and_gradients(getattr(losses, f"{name}_loss"), arguments[f"{name}_loss"])
        assert math.isclose(found[name][0], value.item(), rel_tol=1e-12), name
        torch.testing.assert_close(found[name][1], gradients[0])


def test_passes_without_anything_masked_count_nothing():
    empty = {"volume": torch.zeros(2, 1), "volume_mask": torch.zeros(2, 1), "mlm_labels": torch.full((2, 3), -100)}
    masked = empty | {"volume_mask": torch.eye(2)[:1]}      # one voxel alone
    assert losses.shares([empty, masked], COUNTED) == [{"mim": 0, "mlm": 0, "sfr": 0.5},
                                                       {"mim": 1, "mlm": 0, "sfr": 0.5}]


def _passes_of_a_process(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    mine = {name: [a.detach().chunk(world)[rank].clone() for a in arguments]
            for name, arguments in example().items()}
    torch.save(one_after_the_other(mine, [1, 1]), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_of_two_passes_are_one_batch(tmp_path):
    mp.spawn(_passes_of_a_process, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    arguments = example()
    for name in COUNTED:
        value, gradients = value_and_gradients(getattr(losses, f"{name}_loss"), arguments[f"{name}_loss"])
        for rank, found in enumerate(ranks):
            assert math.isclose(found[name][0], value.item(), rel_tol=1e-12), name
            wanted = gradients[0].chunk(2)[rank] * 2        # DistributedDataParallel takes the mean
            torch.testing.assert_close(found[name][1], wanted)


# ------------------------------------------------------------------------ losses of fine-tuning

def naive_dice_ce(logits, mask):
    probability, dices = logits.softmax(1), []
    voxels = list(itertools.product(*map(range, mask.shape)))
    for k in (1, 2):
        overlap = sum(probability[b, k, z, y, x] for b, z, y, x in voxels if mask[b, z, y, x] == k)
        total = sum(probability[b, k, z, y, x] + (mask[b, z, y, x] == k) for b, z, y, x in voxels)
        dices.append((2 * overlap + 1e-5) / (total + 1e-5))
    cross_entropies = [-torch.log(probability[b, mask[b, z, y, x], z, y, x]) for b, z, y, x in voxels]
    return 1 - sum(dices) / 2 + sum(cross_entropies) / len(cross_entropies)


def naive_prompt(f_i, f_t, labels):
    terms = []
    for i, k in itertools.product(range(len(f_i)), range(labels.shape[1])):
        yes, no = (torch.exp(cosine(f_i[i], f_t[2 * k + j]) / 0.1) for j in (0, 1))
        terms.append(-torch.log((yes if labels[i, k] else no) / (yes + no)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("name, naive", [("dice_ce_loss", naive_dice_ce), ("prompt_loss", naive_prompt)])
def test_fine_tuning(name, naive):
    torch.manual_seed(0)
    labels = torch.tensor([[1, 0], [0, 0], [1, 1]])
    arguments = {"dice_ce_loss": (torch.randn(2, 3, 2, 3, 4), torch.randint(0, 3, (2, 2, 3, 4))),
                 "prompt_loss": (torch.randn(3, 5), torch.randn(4, 5), labels)}[name]
    arguments = [a.double().requires_grad_() if a.is_floating_point() else a for a in arguments]
    torch.testing.assert_close(value_and_gradients(getattr(losses, name), arguments),
                               value_and_gradients(naive, arguments))
