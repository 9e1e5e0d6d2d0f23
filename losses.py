"""The losses of MG-3D, one function for each equation of the paper: tensors in, a scalar out.

B patients, S sentences, L report tokens, E embedding, V vocabulary, D H W voxels. Masks: 1 = real,
in mim_loss 1 = masked.

Under torch.distributed every loss of pre-training is that of the *global* batch, on every process:
features are gathered with gradients, sums and counts are added up. DistributedDataParallel takes
the mean of gradients over processes: exactly the gradient of one process with the whole batch.
"""
import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F

# ------------------------------------------------------------------------------ the global batch

class _Gather(torch.autograd.Function):
    """Concatenate a tensor of all processes along dim 0; backward sums the gradients of all."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """(B, ...) of this process -> (W·B, ...) of all W processes, in rank order, with gradients."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return _Gather.apply(x)
    return x


def _global_sum(x):
    return gather(x.sum().reshape(1)).sum()


def _gather_padded(*tensors):
    """Gather tensors (B, S, ...), padded with zeros to the longest S of all processes."""
    if not dist.is_initialized():
        return tensors
    S = tensors[0].shape[1]
    longest = torch.tensor(S, device=tensors[0].device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    padding = [x.new_zeros(len(x), int(longest) - S, *x.shape[2:]) for x in tensors]
    return [gather(torch.cat(pair, dim=1)) for pair in zip(tensors, padding)]


def _in_float32(loss):
    """Decorator: a loss that casts its half-precision tensors to float32 and runs without autocast"""
    def cast(x):
        return x.float() if torch.is_tensor(x) and x.dtype in (torch.float16, torch.bfloat16) else x

    @functools.wraps(loss)
    def wrapped(*args, **kwargs):
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return loss(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})
    return wrapped


# -------------------------------------------------------------- inside a patient: reconstruction
# NOTE(paper): some equations sum over the batch, others average over patients. Here every loss is
# a mean over its unit (voxels, words, patients, pairs): λ does not depend on the batch size.
# NOTE(paper): the norm of Eq. (6) is a sum over sentences, that of Eq. (12) a mean over pairs of them.

@_in_float32
def mim_loss(recon, volume, mask):
    """Masked image modelling: squared error over masked voxels. (B, 1, D, H, W) each, 1 = masked."""
    mask = mask.to(recon.dtype)
    squared_error = (recon - volume.detach()).square() * mask  # (B, 1, D, H, W)
    return _global_sum(squared_error) / _global_sum(mask).clamp(min=1)              # Eq. (2)


@_in_float32
def mlm_loss(logits, labels):
    """Masked language modelling: cross entropy over masked tokens.

    logits (B, L, V), labels (B, L), -100 = not masked; or masked tokens alone, (M, V) and (M,).
    """
    log_loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
    masked_tokens = (labels != -100).sum().to(logits.dtype)
    return _global_sum(log_loss) / _global_sum(masked_tokens).clamp(min=1)          # Eq. (4)


@_in_float32
def sfr_loss(rebuilt, sentences, sentence_mask):
    """Sentence feature reconstruction: 1 - cos, summed over a report's sentences, mean over patients.

    rebuilt, sentences (B, S, E), sentence_mask (B, S). The target `sentences` gets no gradient.
    """
    similarity = F.cosine_similarity(rebuilt, sentences.detach(), dim=-1)  # (B, S)  Eq. (5)
    distance = (1 - similarity).masked_fill(~sentence_mask.bool(), 0)
    patients = distance.new_ones(len(distance))
    return _global_sum(distance) / _global_sum(patients)                            # Eq. (6)


# -------------------------------------------------------------------------- contrast of patients
# NOTE(paper): no temperature is given; 0.1. Features are normalised, similarities are cosines.

def _info_nce(rows, columns, temperature):
    """Row i must find column i among all columns: mean of -log softmax. (B, E) of this process."""
    rows, columns = F.normalize(gather(rows), dim=-1), F.normalize(gather(columns), dim=-1)
    logits = rows @ columns.T / temperature                                         # (B, B)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


@_in_float32
def cml_loss(f_i, h_i, f_t, h_t, temperature=0.1):
    """Cross-modal learning: a global feature finds its version informed by the other modality.

    f_i, f_t (B, E): features of volumes and reports; h_i, h_t: informed. 0 for a batch of one.
    """
    report_to_volume = _info_nce(f_i, h_i, temperature)                             # Eq. (7)
    volume_to_report = _info_nce(f_t, h_t, temperature)                             # Eq. (8)
    return report_to_volume + volume_to_report                                      # Eq. (9)


@_in_float32
def dfa_loss(h_s, f_i, temperature=0.1):
    """Disentangled feature aggregation: the pooled H_S (B, E) finds its volume's feature (B, E)."""
    return _info_nce(h_s, f_i, temperature)                                         # Eq. (13)


@_in_float32
def clip_loss(f_i, f_t, temperature=0.1):
    """The CT-CLIP baseline, no part of MG-3D: symmetric InfoNCE of volumes and reports, (B, E)."""
    return (_info_nce(f_i, f_t, temperature) + _info_nce(f_t, f_i, temperature)) / 2


# --------------------------------------------------------------------- sentences across patients

@_in_float32
def ssm_loss(text_sentences, visual_sentences, sentence_mask):
    """Semantics similarity matching: sentences that read alike across patients should look alike.

    Mean absolute difference of the cosines between sentences of patients i and j, from text and
    from vision, averaged over pairs i < j. text_sentences (B, S, E_t), no gradient;
    visual_sentences (B, S, E): H_S of Eq. (11); sentence_mask (B, S). 0 for a batch of one.
    """
    mask = sentence_mask.to(visual_sentences.dtype)
    mask, text, visual = _gather_padded(mask, text_sentences.detach(), visual_sentences)
    text, visual = F.normalize(text, dim=-1), F.normalize(visual, dim=-1)
    text_cosines = torch.einsum("ise,jte->ijst", text, text)                        # (B, B, S, S)
    visual_cosines = torch.einsum("ise,jte->ijst", visual, visual)
    both_real = mask[:, None, :, None] * mask[None, :, None, :]
    difference = (text_cosines - visual_cosines).abs() * both_real
    per_pair = difference.sum((2, 3)) / both_real.sum((2, 3)).clamp(min=1)          # (B, B)
    pairs = torch.ones_like(per_pair).triu(diagonal=1)                              # 1 where i < j
    return (per_pair * pairs).sum() / pairs.sum().clamp(min=1)                      # Eq. (12)


def shares(batches, enabled, device="cpu"):
    """How much each of the passes of a step counts in every loss: a dict a pass, sums of 1

    mim, mlm and sfr count by masked voxels, masked words and patients: their sums are the losses of one
    large batch. The others compare the patients of a pass: their means.
    """
    counts = [[1, batch["volume_mask"].sum(), (batch["mlm_labels"] != -100).sum(), len(batch["volume"])]
              for batch in batches]
    counts = torch.tensor(counts, dtype=torch.float64, device=device)               # (passes, 4)
    if dist.is_initialized():
        dist.all_reduce(counts)
    column = {"mim": 1, "mlm": 2, "sfr": 3}
    parts = (counts / counts.sum(0).clamp(min=1)).tolist()
    return [{name: part[column.get(name, 0)] for name in enabled} for part in parts]


def compute(outputs, batch, enabled, temperature=0.1):
    """The enabled losses of a pre-training step, {name: scalar}, from what `MG3D.forward` returns."""
    o, mask = outputs, batch["sentence_mask"]
    terms = {"mim": lambda: mim_loss(o["recon"], batch["volume"], batch["volume_mask"]),
             "mlm": lambda: mlm_loss(o["logits"], o["mlm_labels"]),
             "sfr": lambda: sfr_loss(o["rebuilt"], o["sentences"], mask),
             "cml": lambda: cml_loss(o["f_i"], o["h_i"], o["f_t"], o["h_t"], temperature),
             "ssm": lambda: ssm_loss(o["text_sentences"], o["visual_sentences"], mask),
             "dfa": lambda: dfa_loss(o["h_s"], o["f_i"], temperature),
             "clip": lambda: clip_loss(o["f_i"], o["f_t"], temperature)}
    return {name: terms[name]() for name in enabled}


# ------------------------------------------------------------------------ losses of fine-tuning
# bce_loss counts over all processes. The others see their own; the mean that DDP takes of their
# gradients is exact but for Dice, which is a ratio.

@_in_float32
def bce_loss(logits, labels):
    """Binary cross entropy over known labels. (B, K) each, NaN = unknown."""
    known = ~labels.isnan()
    log_loss = F.binary_cross_entropy_with_logits(logits[known], labels[known], reduction="sum")
    return _global_sum(log_loss) / _global_sum(known.to(logits.dtype)).clamp(min=1)


@_in_float32
def dice_ce_loss(logits, mask):
    """Soft Dice of the foreground classes plus cross entropy.

    logits (B, K, D, H, W), mask (B, D, H, W) of 0 … K - 1. All patches count as one for Dice: half
    of them contain no foreground.
    """
    truth = F.one_hot(mask, logits.shape[1]).movedim(-1, 1).to(logits.dtype)  # (B, K, D, H, W)
    probability = logits.softmax(1)
    overlap = (probability * truth).sum((0, 2, 3, 4))                               # (K,)
    total = (probability + truth).sum((0, 2, 3, 4))                                 # (K,)
    dice = (2 * overlap + 1e-5) / (total + 1e-5)  # 1 where both are empty
    return 1 - dice[1:].mean() + F.cross_entropy(logits, mask)


@_in_float32
def prompt_loss(f_i, f_t, labels, temperature=0.1):
    """Cross entropy of the pair "name." against "not name." for every volume and class.

    f_i (B, E) of volumes; f_t (2K, E) of prompts, two in a row a class; labels (B, K) of 0 and 1.
    """
    cosines = F.normalize(f_i, dim=-1) @ F.normalize(f_t, dim=-1).T                 # (B, 2K)
    pairs = (cosines / temperature).unflatten(1, (-1, 2)).flatten(0, 1)             # (B·K, 2)
    return F.cross_entropy(pairs, (1 - labels).long().flatten())                    # 0 is "name."
