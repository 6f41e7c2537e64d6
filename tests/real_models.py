"""Models that people train, at tiny size, in the stacks they train them in, beside the one-sample-at-a-time oracle.

Hugging Face models are made from their configs, so nothing is downloaded.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inrun
from inrun.layers import ForwardModeRule

B, T, VOCAB, WIDTH = 5, 6, 17, 16
LR = 0.3

SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2, "head_dim": 4}
TEXT = {"vocab_size": VOCAB, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DEEPSEEK = {"num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
DEEPSEEK |= {"moe_intermediate_size": 12, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 8}
DEEPSEEK |= {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
DEEPSEEK |= {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


def hf(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**settings)
        made.use_cache = False
        return getattr(transformers, model)(made)

    return make


def decoder(name: str, config: str | None = None, **settings: Any) -> Callable[[], nn.Module]:
    """A causal language model of the Llama family."""
    known = {"intermediate_size": 24} | SHAPE | GROUPED | TEXT | settings
    return hf(f"{name}ForCausalLM", config or f"{name}Config", **known)


def lora() -> nn.Module:
    import peft

    # init_lora_weights would leave B at zero, and A without a gradient.
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(decoder("Llama")(), config)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(WIDTH, 4, batch_first=True), nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Recurrent(nn.Module):
    """An LSTM, time first as torch's default has it, whose last states are used too."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(WIDTH, 8, 2, bidirectional=True), nn.Linear(16, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        out, (_, cell) = self.lstm(x.transpose(0, 1))
        return self.head(out.transpose(0, 1) + cell[-1].repeat(1, 2).unsqueeze(1))


class Borrowed(nn.Module):
    """The output layer is another module's weight, used without calling that module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.norm = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(self.hidden(self.embed(x))), self.embed.weight)


class Norms(nn.Module):
    """Torch's norms, one of them frozen, before weights that are used past their modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.frozen, self.norm = nn.LayerNorm(WIDTH).requires_grad_(False), nn.GroupNorm(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(self.embed(x))
        x = F.layer_norm(x, (WIDTH,), bias=self.frozen.bias, weight=self.frozen.weight)
        x = F.linear(x, self.hidden.weight).unflatten(-1, (4, -1)).flatten(-2)
        return F.linear(self.norm(x.mT).mT, self.embed.weight)


class Routed(nn.Module):
    """A mixture of experts that calls each expert with the tokens routed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)) for _ in "abc"
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = self.gate(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            out = out.index_add(0, token, (expert(rows[token]) * weights[token, place, None]).to(out.dtype))
        return out.view_as(x)


def tokens(batch: int, g: torch.Generator) -> tuple[Any, Tensor]:
    ids = torch.randint(3, VOCAB, (batch, T + 1), generator=g)
    return {"input_ids": ids[:, :-1]}, ids[:, 1:]


def pairs(batch: int, g: torch.Generator) -> tuple[Any, Tensor]:
    x, y = tokens(batch, g)
    return x | {"decoder_input_ids": torch.randint(3, VOCAB, (batch, T - 1), generator=g)}, y[:, 1:]


def images(size: int) -> Callable[[int, torch.Generator], tuple[Any, Tensor]]:
    def make(batch: int, g: torch.Generator) -> tuple[Any, Tensor]:
        x = torch.randn(batch, 3, size, size, generator=g)
        return {"pixel_values": x}, torch.randint(VOCAB, (batch,), generator=g)

    return make


def vectors(batch: int, g: torch.Generator) -> tuple[Any, Tensor]:
    return torch.randn(batch, T, WIDTH, generator=g), torch.randint(VOCAB, (batch, T), generator=g)


def plain_tokens(batch: int, g: torch.Generator) -> tuple[Any, Tensor]:
    x, y = tokens(batch, g)
    return x["input_ids"], y


@dataclass
class Case:
    """A model, its data, and how it is tracked."""

    make: Callable[[], nn.Module]
    data: Callable[[int, torch.Generator], tuple[Any, Tensor]] = tokens
    frozen_statistics: bool = False  # run in eval mode
    through: dict[str, str] = field(default_factory=dict)

    def built(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make()
        for p in model.parameters():  # no norm at its initial ones, no bias at zero
            if p.dim() == 1 and p.requires_grad:
                p.data += 0.1 * torch.randn_like(p)
        return model.eval() if self.frozen_statistics else model.train()

    def batch(self, size: int, seed: int) -> tuple[Any, Tensor]:
        return self.data(size, torch.Generator().manual_seed(seed))


def with_one_block(case: Case) -> Case:
    """The case with no more than the first of equal blocks, which is less to compile."""

    def make() -> nn.Module:
        model = case.make()
        for blocks in model.modules():
            if isinstance(blocks, nn.ModuleList) and len({type(block) for block in blocks}) == 1:
                del blocks[1:]
        return model

    return replace(case, make=make)


T5 = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
T5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": VOCAB}
VIT = {"image_size": 8, "patch_size": 4, "num_labels": VOCAB, "intermediate_size": 24} | SHAPE | NO_DROPOUT
GPT2 = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {"intermediate_size": 24, "vocab_size": VOCAB, "max_position_embeddings": 32} | SHAPE | NO_DROPOUT

CASES = {
    "GPT-2": Case(hf("GPT2LMHeadModel", "GPT2Config", **GPT2)),
    "Llama": Case(decoder("Llama")),
    "Qwen2": Case(decoder("Qwen2")),
    "Qwen3": Case(decoder("Qwen3")),
    "Gemma": Case(decoder("Gemma")),
    "Gemma 3": Case(decoder("Gemma3", "Gemma3TextConfig", sliding_window=4)),
    "Llama + PEFT LoRA": Case(lora),
    "BERT": Case(hf("BertForMaskedLM", "BertConfig", **BERT)),
    "T5": Case(hf("T5ForConditionalGeneration", "T5Config", **T5), pairs),
    "ViT": Case(hf("ViTForImageClassification", "ViTConfig", **VIT), images(8)),
    "Mixtral": Case(decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2)),
    "Qwen2-MoE": Case(decoder("Qwen2Moe", shared_expert_intermediate_size=20, **EXPERTS)),
    "Qwen3-MoE": Case(decoder("Qwen3Moe", **EXPERTS)),
    "DeepSeek-V3": Case(decoder("DeepseekV3", **DEEPSEEK)),
    "ResNet, eval mode": Case(hf("ResNetForImageClassification", "ResNetConfig", **RESNET), images(16), True),
    "nn.MultiheadAttention": Case(Attention, vectors),
    "nn.TransformerEncoder": Case(Encoder, vectors),
    "nn.LSTM": Case(Recurrent, vectors),
    "experts as modules": Case(lambda: nn.Sequential(Routed(), nn.Linear(WIDTH, VOCAB)), vectors),
    "F.linear(x, other.weight)": Case(Borrowed, plain_tokens, through={"embed.weight": ""}),
}


def small(name: str, config: str | None = None, **settings: Any) -> Case:
    """A causal language model whose heads have the width that is left to them."""
    known = {"intermediate_size": 24, "num_key_value_heads": 2} | SHAPE | TEXT | settings
    return Case(hf(f"{name}ForCausalLM", config or f"{name}Config", **known))


def adapted(config: str, base: Callable[[], nn.Module] | None = None, **settings: Any) -> Case:
    """A Llama, or another, with an adapter of PEFT's, none of whose parameters is left at zero."""

    def make() -> nn.Module:
        import peft

        model = peft.get_peft_model((base or decoder("Llama"))(), getattr(peft, config)(**settings))
        g = torch.Generator().manual_seed(1)
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn(p.shape, generator=g)
        return model

    return Case(make)


def sound(batch: int, g: torch.Generator) -> tuple[Any, Tensor]:
    mask = torch.ones(batch, 120, dtype=torch.long)
    mask[0, 90:] = 0
    x = {"input_values": torch.randn(batch, 120, generator=g), "attention_mask": mask}
    return x, torch.randint(VOCAB, (batch, 13), generator=g)


IMAGE = VOCAB - 1  # the token in whose place a part of an image comes


def spectra(batch: int, g: torch.Generator) -> tuple[Any, Tensor]:
    x, y = pairs(batch, g)
    return {"input_features": torch.randn(batch, 8, 20, generator=g)} | {k: x[k] for k in ["decoder_input_ids"]}, y


def seen(parts: int, *size: int, **more: int) -> Callable[[int, torch.Generator], tuple[Any, Tensor]]:
    """An image, of so many parts, between the tokens of each sample."""

    def make(batch: int, g: torch.Generator) -> tuple[Any, Tensor]:
        ids = torch.randint(3, VOCAB - 3, (batch, T), generator=g)
        ids = torch.cat([ids[:, :1], torch.full((batch, parts), IMAGE), ids[:, 1:]], 1)
        x = {"input_ids": ids, "pixel_values": torch.randn(batch, *size, generator=g)}
        x |= {name: (ids == IMAGE).long() * value for name, value in more.items()}
        return x, torch.randint(VOCAB, ids.shape, generator=g)

    return make


class Patches(nn.Module):
    """A model that is given all samples' patches of images in one row, and how many each has of them, `[B, 3]`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, **x: Tensor) -> Any:
        grid = torch.tensor([[1, 4, 4]] * len(pixel_values))
        return self.model(pixel_values=pixel_values.flatten(0, 1), image_grid_thw=grid, **x)


MAMBA = {"num_hidden_layers": 2, "hidden_size": WIDTH, "state_size": 4, "vocab_size": VOCAB}
LINEAR = {"linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
NEXT = EXPERTS | LINEAR | GROUPED | {"shared_expert_intermediate_size": 12}
JAMBA = {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
JAMBA |= {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False}
W2V = {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
W2V |= {"intermediate_size": 24, "vocab_size": VOCAB} | SHAPE
W2V |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0}
W2V |= {
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
OPT = {"ffn_dim": 24, "word_embed_proj_dim": WIDTH, "dropout": 0.0} | SHAPE | TEXT
BART = {"d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0, "forced_eos_token_id": 2} | TEXT
NEO = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
VISION = {"image_size": 8, "patch_size": 4, "intermediate_size": 24} | SHAPE
CLIP = {"vision_config": VISION, "num_labels": VOCAB}
WHISPER = {k: v for k, v in BART.items() if k not in ("max_position_embeddings", "forced_eos_token_id")}
WHISPER |= {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16, "decoder_start_token_id": 1}
WRITER = {"intermediate_size": 24, "num_key_value_heads": 2} | SHAPE | TEXT
SEES = {"vision_config": VISION, "image_token_index": IMAGE}
LLAVA = SEES | {"text_config": {"model_type": "llama"} | WRITER, "vision_feature_layer": -1}
LLAVA |= {"vision_config": {"model_type": "clip_vision_model"} | VISION}
GEMMA = SEES | {"text_config": {"head_dim": 4, "sliding_window": 4} | WRITER, "mm_tokens_per_image": 4}
GEMMA |= {"image_token_id": IMAGE, "boi_token_index": VOCAB - 2, "eoi_token_index": VOCAB - 3}
TOWER = {"depth": 2, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 24, "num_heads": 2}
TOWER |= {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 16}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
QWEN = {"text_config": WRITER | {"rope_parameters": ROPE}, "vision_config": TOWER | {"fullatt_block_indexes": [1]}}
QWEN |= {"image_token_id": IMAGE, "vision_start_token_id": VOCAB - 2, "vision_end_token_id": VOCAB - 3}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False} | BERT
DEBERTA |= {"position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True}
PLACES = {"deberta.encoder.LayerNorm.*": "deberta.encoder"}  # as the errors propose
PLACES |= {f"deberta.encoder.layer.{i}.attention.self.{name}_proj.*": f"deberta.encoder.layer.{i}.attention.self"
           for i in range(2) for name in ("query", "key")}  # fmt: skip
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
SWIN |= {"num_labels": VOCAB, "drop_path_rate": 0.0}
# What the error in the first step proposes.
WINDOWS = {f"swin.encoder.layers.{i}.blocks.{j}.attention.*": f"swin.encoder.layers.{i}.blocks.{j}"
           for i, j in [(0, 0), (1, 0), (1, 1)]}  # fmt: skip
ALL = {"target_modules": ["q_proj", "v_proj", "down_proj"]}

# Compared with the oracle in float32 only, by methods "first" and "path".
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MORE = {
    "Mistral": small("Mistral", sliding_window=4),
    "Phi": Case(decoder("Phi", num_key_value_heads=4, resid_pdrop=0.0)),
    "Phi-3": small("Phi3"),
    "Gemma 2": Case(decoder("Gemma2", sliding_window=4, query_pre_attn_scalar=8)),
    "OLMo 2": small("Olmo2"),
    "OLMoE": small("Olmoe", num_experts=4, num_experts_per_tok=2),
    "Cohere": small("Cohere"),
    "Granite": small("Granite", residual_multiplier=0.5, logits_scaling=2.0),
    "SmolLM3": small("SmolLM3"),
    "GLM-4": Case(decoder("Glm4")),
    "StableLM": small("StableLm"),
    "gpt-oss": Case(decoder("GptOss", num_local_experts=4, num_experts_per_tok=2, sliding_window=4)),
    "Pythia": small("GPTNeoX", **NEO),
    "Falcon": Case(hf("FalconForCausalLM", "FalconConfig", **SHAPE, **TEXT)),
    "BLOOM": Case(hf("BloomForCausalLM", "BloomConfig", n_layer=2, n_head=4, hidden_size=WIDTH, vocab_size=VOCAB)),
    "OPT": Case(hf("OPTForCausalLM", "OPTConfig", **OPT)),
    "Mamba": Case(hf("MambaForCausalLM", "MambaConfig", **MAMBA)),
    "Falcon Mamba": Case(hf("FalconMambaForCausalLM", "FalconMambaConfig", **MAMBA)),
    "Mamba 2": Case(hf("Mamba2ForCausalLM", "Mamba2Config", num_heads=8, head_dim=4, chunk_size=4, **MAMBA)),
    "Jamba": small("Jamba", **JAMBA),
    "Qwen3-Next": small("Qwen3Next", layer_types=["linear_attention", "full_attention"], **NEXT),
    "LFM2": small("Lfm2", layer_types=["conv", "full_attention"]),
    "RoBERTa": Case(hf("RobertaForMaskedLM", "RobertaConfig", **BERT)),
    "DistilBERT": Case(hf("DistilBertForMaskedLM", "DistilBertConfig", dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=24,
                          vocab_size=VOCAB, dropout=0.0, attention_dropout=0.0)),
    "ALBERT": Case(hf("AlbertForMaskedLM", "AlbertConfig", embedding_size=8, **BERT)),
    "ModernBERT": Case(hf("ModernBertForMaskedLM", "ModernBertConfig", local_attention=4, cls_token_id=1,
                          sep_token_id=2, intermediate_size=24, **SHAPE, **TEXT)),
    "BART": Case(hf("BartForConditionalGeneration", "BartConfig", **BART), pairs),
    "CLIP": Case(hf("CLIPForImageClassification", "CLIPConfig", **CLIP), images(8)),
    "SigLIP": Case(hf("SiglipForImageClassification", "SiglipConfig", **CLIP), images(8)),
    "Wav2Vec2": Case(hf("Wav2Vec2ForCTC", "Wav2Vec2Config", **W2V), sound),
    "LongT5": Case(hf("LongT5ForConditionalGeneration", "LongT5Config", local_radius=3, **T5), pairs),
    "Swin": Case(hf("SwinForImageClassification", "SwinConfig", **SWIN), images(16), through=WINDOWS),
    "mBART": Case(hf("MBartForConditionalGeneration", "MBartConfig", **BART), pairs),
    "DeBERTa-v2": Case(hf("DebertaV2ForMaskedLM", "DebertaV2Config", **DEBERTA), through=PLACES),
    "Whisper": Case(hf("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER), spectra),
    "LLaVA": Case(hf("LlavaForConditionalGeneration", "LlavaConfig", **LLAVA), seen(4, 3, 8, 8)),
    "Gemma 3 with images": Case(hf("Gemma3ForConditionalGeneration", "Gemma3Config", **GEMMA),
                                seen(4, 3, 8, 8, token_type_ids=1)),
    "Qwen2.5-VL": Case(lambda: Patches(hf("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", **QWEN)()),
                       seen(4, 16, 3 * 2 * 16, mm_token_type_ids=1), through={"model.model.visual.*": ""}),
    "DoRA": adapted("LoraConfig", r=4, use_dora=True, **ALL),
    "LoRA of embeddings": adapted("LoraConfig", r=4, target_modules=["embed_tokens", "q_proj"]),
    "LoRA of experts": adapted("LoraConfig", decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2), r=4,
                               target_modules=["q_proj"], target_parameters=FUSED),
    "IA3": adapted("IA3Config", feedforward_modules=["down_proj"], **ALL),
    "VeRA": adapted("VeraConfig", r=4, target_modules=["q_proj", "up_proj"]),
    "AdaLoRA": adapted("AdaLoraConfig", init_r=6, target_r=4, tinit=1, tfinal=2, total_step=20, **ALL),
    "LoKr": adapted("LoKrConfig", r=4, **ALL),
    "BOFT": adapted("BOFTConfig", boft_block_size=4, **ALL),
    "prefix tuning": adapted("PrefixTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=3),
}  # fmt: skip


@dataclass
class Stack:
    """How a model is run."""

    autocast: torch.dtype | None = None
    scaled: bool = False
    reentrant: bool | None = None  # of activation checkpointing
    parts: int = 1  # of gradient accumulation
    compiled: str | None = None  # "whole" or "blocks"
    attention: str | None = None
    adam: dict[str, bool] | None = None

    def context(self) -> Any:
        return nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)


STACKS = {
    "float32": Stack(),
    "bf16": Stack(torch.bfloat16),
    "fp16 + GradScaler": Stack(torch.float16, scaled=True),
    "checkpointing": Stack(reentrant=False),
    "reentrant": Stack(reentrant=True),
    "accumulation": Stack(parts=2),
    "SDPA": Stack(attention="sdpa"),
    "eager attention": Stack(attention="eager"),
    "fused AdamW": Stack(adam={"fused": True}),
    "foreach AdamW": Stack(adam={"foreach": True}),
    "compiled": Stack(compiled="whole"),
    "compiled blocks": Stack(compiled="blocks"),
}


class NotOffered(Exception):
    """The model has no such stack of its own."""


def logits(model: nn.Module, x: Any) -> Tensor:
    return model(**x).logits if isinstance(x, dict) else model(x)


def part(x: Any, rows: slice) -> Any:
    return {k: v[rows] for k, v in x.items()} if isinstance(x, dict) else x[rows]


def double(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: double(v) for k, v in x.items()}
    return x.double() if x.is_floating_point() else x


def share(model: nn.Module, x: Any, y: Tensor, count: int) -> Tensor:
    """The part of a batch's mean loss that (x, y) are, the batch having `count` targets."""
    return F.cross_entropy(logits(model, x).flatten(0, -2).to(torch.promote_types(torch.float32, dtype(model))),
                           y.flatten(), reduction="sum") / count  # fmt: skip


def dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def sample_gradients(model: nn.Module, x: Any, y: Tensor, context: Any = None) -> list[dict[str, Tensor]]:
    """Each sample's gradient of its share of the loss, one sample at a time: in float64, or within `context`."""
    model = copy.deepcopy(model)
    if hasattr(model, "config") and hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # the grouped products have no float64
    if getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_disable()
    if context is None:
        model, x, context = model.double(), double(x), nullcontext()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = []
    for b in range(len(y)):
        one = slice(b, b + 1)
        with context:
            loss = share(model, part(x, one), y[one], y.numel())
        found = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
        rows.append({n: g.double() for n, g in zip(params, found, strict=True)})
    return rows


def oracle(model: nn.Module, train: Any, validation: Any, stack: Stack | None = None) -> Tensor:
    """The values of a first step; `stack` computes them in its precision instead of float64."""
    context = None if stack is None else stack.context()
    rows = sample_gradients(model, *validation, context)
    direction = {n: sum(row[n] for row in rows) for n in rows[0]}
    if stack is not None and stack.adam is not None:
        direction = {n: g / (g.abs() + 1e-3) for n, g in direction.items()}
    rows = sample_gradients(model, *train, context)
    return torch.stack([sum((LR * direction[n] * row[n]).sum() for n in direction) for row in rows])


def prepare(case: Case, stack: Stack, backend: Any = "aot_eager", fullgraph: bool = True, **options: Any) -> Any:
    """A model in its stack, its optimizer, its tracker, and the model as it is to be called."""
    model: Any = case.built()
    if stack.attention is not None:
        if not getattr(model, "_supports_sdpa", False):
            raise NotOffered
        model.set_attn_implementation(stack.attention)
    if stack.reentrant is not None:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise NotOffered
        model.gradient_checkpointing_enable({"use_reentrant": stack.reentrant})
        if hasattr(model, "peft_config"):  # a frozen embedding's output must ask for gradients
            model.enable_input_require_grads()
    params = [p for p in model.parameters() if p.requires_grad]
    if stack.adam is None:
        optimizer: Any = torch.optim.SGD(params, lr=LR)
    else:
        optimizer = torch.optim.AdamW(params, lr=LR, eps=1e-3, **stack.adam)
    tracker = inrun.track(model, optimizer, through=case.through, **options)
    called = model
    if stack.compiled is not None:
        torch._dynamo.reset()
    if stack.compiled == "whole":
        called = torch.compile(model, backend=backend, fullgraph=fullgraph)
    if stack.compiled == "blocks":
        groups = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        blocks = [m for group in groups for m in group if not isinstance(m, nn.Sequential)]
        if not blocks:
            raise NotOffered
        for block in blocks:
            block.compile(backend=backend, fullgraph=fullgraph)
    return called, optimizer, tracker


def step(called: Any, optimizer: Any, tracker: Any, stack: Stack, train: Any, validation: Any) -> Tensor:
    """One tracked training step in its stack; its values."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=stack.scaled)

    def backward(x: Any, y: Tensor, count: int) -> None:
        with stack.context():
            loss = share(called, x, y, count)
        scaler.scale(loss).backward()

    with tracker.validation(scale=scaler.get_scale()):
        backward(*validation, validation[1].numel())
    x, y = train
    edges = torch.linspace(0, len(y), stack.parts + 1).long().tolist()
    with tracker.step() as one:
        for start, end in itertools.pairwise(edges):
            one.batch(range(start, end))
            backward(part(x, slice(start, end)), y[start:end], y.numel())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return one.values


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def compare(case: Case, stack: Stack, fullgraph: bool = True, method: str = "first") -> tuple[float, float, list[str]]:
    """Two steps of a model in a stack: the larger error of the values, what it may be, and the modules that fell back.

    In half precision the plain computation's own error, doubled, is what it may be. Of the methods, "first" and (with
    SGD) "path" have the oracle's values.
    """
    called, optimizer, tracker = prepare(case, stack, fullgraph=fullgraph, method=method)
    model, errors, allowed = tracker.model, [], 2e-4
    for number in range(2 if stack.adam is None else 1):  # the first step's sums are checked, the second's not
        train, validation = case.batch(B, 10 + number), case.batch(4, 20 + number)
        plain = copy.deepcopy(model)
        expected = oracle(plain, train, validation, None if stack.autocast or not stack.adam else stack)
        if stack.autocast is not None:
            rounding = torch.finfo(stack.autocast).eps
            allowed = max(allowed, rounding + 2 * error(oracle(plain, train, validation, stack), expected))
        with torch._dynamo.config.patch(recompile_limit=32):  # T5's blocks are of four kinds, and share one forward
            values = step(called, optimizer, tracker, stack, train, validation)
        errors.append(error(values, expected))
    assert not tracker.coverage["excluded"] and set(tracker.coverage["tracked"]) == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    slow = {type(m)._inrun_class.__name__ for m in model.modules() if type(m).__mro__[1] is ForwardModeRule}
    tracker.close()
    return max(errors), allowed, sorted(slow)
