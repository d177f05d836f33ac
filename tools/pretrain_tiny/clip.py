"""The tiny CLIP: trained by open_clip's own model and loss on the toy world; its text tower conditions the U-Net."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.pretrain_tiny import stages

log = logging.getLogger("pretrain_tiny")

CONTEXT = 77
TRAIN_CONTEXT = (
    32  # causal attention: what stands behind the end-of-text token cannot change the result
)
BATCH = 128
STEPS = 1_000
PEAK_LR = 1.5e-3
TOKEN_STD = 0.5  # open_clip starts at 0.02: words then differ in few directions only
POSITION_STD = 0.1

EMBED_DIM = 96
VISION = {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8}
TEXT = {"vocab_size": 49408, "width": 96, "heads": 3, "layers": 3}


def build(context: int) -> open_clip.CLIP:
    """An untrained tiny CLIP with the given context length."""
    return open_clip.CLIP(
        embed_dim=EMBED_DIM, vision_cfg=dict(VISION), text_cfg={**TEXT, "context_length": context}
    )


def tokenize(captions: list[str], context: int) -> Tensor:
    """Token ids (n, context); a caption that does not fit is an error, not a cut."""
    tokens = open_clip.SimpleTokenizer(context_length=CONTEXT)(captions)
    if int((tokens != 0).sum(1).max()) > context:
        raise ValueError(f"a caption needs more than {context} tokens")
    return tokens[:, :context]


def train(work: Path, raw: Path, steps: int = STEPS) -> None:
    """Train and write `clip.pt` (resumable)."""
    torch.manual_seed(0)
    pixels, captions = stages.rendered(work, raw, "steady")
    tokens = tokenize(captions, TRAIN_CONTEXT)
    model = build(TRAIN_CONTEXT).train()
    torch.nn.init.normal_(model.token_embedding.weight, std=TOKEN_STD)
    torch.nn.init.normal_(model.positional_embedding, std=POSITION_STD)
    loss_function = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05
    )
    progress = stages.Progress(work / "clip.pt", model=model, optimizer=optimizer)
    started = time.time()
    for step in range(progress.step, steps):
        for group in optimizer.param_groups:
            group["lr"] = stages.cosine(step, steps, PEAK_LR, 50)
        rows = torch.randint(len(captions), (BATCH,), generator=torch.Generator().manual_seed(step))
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            image, text, scale = model(stages.to_tensor(pixels[rows.numpy()]), tokens[rows])
        loss = loss_function(image.float(), text.float(), scale.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        if (step + 1) % 50 == 0:
            log.info(
                "clip %d/%d loss %.3f  %.0f s", step + 1, steps, loss.item(), time.time() - started
            )
        if (step + 1) % 120 == 0 or step + 1 == steps:
            progress.save(step + 1)


def load(work: Path) -> open_clip.CLIP:
    """The trained tiny CLIP with the full context of 77; positions beyond TRAIN_CONTEXT repeat the last one."""
    state = torch.load(work / "clip.pt", weights_only=True)["model"]
    model = build(CONTEXT)
    position = torch.zeros(CONTEXT, TEXT["width"])
    position[:TRAIN_CONTEXT] = state["positional_embedding"]
    position[TRAIN_CONTEXT:] = state["positional_embedding"][-1]
    mask = model.state_dict().get("attn_mask")
    state = {**state, "positional_embedding": position}
    if mask is not None:
        state["attn_mask"] = mask
    model.load_state_dict(state)
    return model.eval()
