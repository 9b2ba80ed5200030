"""The reference for MiniCPM-V 4.5, 4.0, 2.6 and MiniCPM-o 2.6: one sample, and one slice, after the other.

Nothing of the modelling code under test runs here. Slices come from the image processor of MiniCPM-V 4.6; the tower is
the one of Idefics2, which is the same SigLIP with patches of any grid; the resampler is put together from
`torch.nn.MultiheadAttention` and tables of its own; the text model is transformers' own class under its own
configuration, given only the tensors whose names begin with `llm.`.

Letters: `N` patches of a slice, `V` width of the tower, `D` width of the text model, `Q` queries.
"""

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    Idefics2VisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

CLASSES = {
    "minicpmv4_5": (Qwen3Config, Qwen3ForCausalLM),
    "minicpmv4_0": (LlamaConfig, LlamaForCausalLM),
    "minicpmv2_6": (Qwen2Config, Qwen2ForCausalLM),
    "minicpmo2_6": (Qwen2Config, Qwen2ForCausalLM),
}
TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "mlp_bias",
    "tie_word_embeddings",
)  # fmt: skip
"""Keys of `config.json` that the text models take over; rotary numbers are given apart."""

PATCH_PX = 14
TABLE_SIDE = 70
HEAD_WIDTH = 128


class Reference:
    """Slices, features, prompts, logits and greedy answers of one checkpoint in float32."""

    def __init__(self, folder, family):
        self.family = family
        self.settings = json.loads((folder / "config.json").read_text())
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= {name: value.float() for name, value in load_file(path).items()}
        self.tower = tower_of(self.settings["vision_config"], stripped(tensors, "vpm."))
        self.resampler = resampler_of(stripped(tensors, "resampler."))
        self.text = text_of(family, self.settings, stripped(tensors, "llm."))
        self.chat = PreTrainedTokenizerFast.from_pretrained(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # Two by two half patches merge into one token there, so that sides are aligned to a whole patch.
        self.images = MiniCPMV4_6ImageProcessorPil(patch_size=PATCH_PX // 2)

    def crops(self, picture, max_slices, slice_side_px):
        """Slices of one (height, width, 3) uint8 picture, overview first, each (3, height, width) in [-1, 1], and its
        rows and columns of slices."""
        produced = self.images(
            [Image.fromarray(picture)],
            max_slice_nums=max_slices,
            scale_resolution=slice_side_px,
            downsample_mode="4x",
            return_tensors="pt",
        )
        half = PATCH_PX // 2
        sizes = produced["target_sizes"].tolist()
        parts = produced["pixel_values"][0].split([rows * cols * half for rows, cols in sizes], dim=-1)
        crops = [
            part.reshape(3, half, rows, cols, half).permute(0, 2, 1, 3, 4).reshape(3, rows * half, cols * half)
            for part, (rows, cols) in zip(parts, sizes, strict=True)
        ]
        return crops, tuple(produced["grids"][0])

    def encode(self, crop):
        """What the tower makes of one slice, (N, V), positions as the released code finds them."""
        rows, cols = (side // PATCH_PX for side in crop.shape[1:])
        ids = released_buckets(rows)[:, None] * TABLE_SIDE + released_buckets(cols)[None, :]
        patches = self.tower.embeddings.patch_embedding(crop[None]).flatten(2).transpose(1, 2)
        embedded = patches + self.tower.embeddings.position_embedding(torch.from_numpy(ids).flatten())
        return self.tower.post_layernorm(self.tower.encoder(inputs_embeds=embedded).last_hidden_state)[0]

    def encode_as_idefics2(self, crop):
        """The same with the positions of Idefics2, its forward pass as it is."""
        return self.tower(pixel_values=crop[None]).last_hidden_state[0]

    def features(self, groups):
        """Visual tokens of groups of slices with their temporal ids, (groups, Q, D)."""
        return torch.stack(
            [self.resample([self.encode(crop) for crop in crops], grids_of(crops), times) for crops, times in groups]
        )

    def resample(self, encoded, grids, times):
        """Visual tokens of one pack: (N, V) of each slice, its rows and columns, its temporal id or -1."""
        own = self.resampler
        patches = own.ln_kv(own.kv_proj(torch.cat(encoded)))
        width = patches.shape[1]
        places = torch.cat(
            [
                place_table(rows, cols, width) + (time_table(time, width) if time >= 0 else 0)
                for (rows, cols), time in zip(grids, times, strict=True)
            ]
        )
        queries = own.ln_q(own.query)
        attended, _ = own.attn(queries, patches + places, patches, need_weights=True)
        return own.ln_post(attended) @ own.proj

    def placeholder(self, grid, number=None):
        """Text that stands for an image: 64 tokens for the overview and for each slice."""
        pads = "<unk>" * self.resampler.query.shape[0]
        rows = ["".join(f"<slice>{pads}</slice>" for _ in range(grid[1])) for _ in range(grid[0])]
        prefix = "" if number is None else f"<image_id>{number}</image_id>"
        return f"{prefix}<image>{pads}</image>" + "\n".join(rows)

    def prompt_ids(self, content, *, thinking=None):
        """Ids of a user's turn: the chat template around the text, placeholders spelled out, and the tokenizer."""
        chat = self.chat.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            **({} if thinking is None else {"enable_thinking": thinking}),
        )
        return self.tokenizer.encode(chat).ids

    def embeddings(self, prompt_ids, features, pad):
        """Embeddings of a prompt with its visual tokens in the places of the placeholders, (1, T, D)."""
        embedded = self.text.get_input_embeddings()(torch.tensor([prompt_ids]))
        places = [place for place, token in enumerate(prompt_ids) if token == pad]
        rows = features.flatten(0, 1)
        assert len(places) == len(rows)
        for place, row in zip(places, rows, strict=True):
            embedded[0, place] = row
        return embedded

    def answer(self, embeddings, stop_ids, *, max_new_tokens):
        """Generated ids of one sample, the end token included, and the logits that chose them, (ids, vocabulary)."""
        output = self.text.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
            return_dict_in_generate=True,
            output_logits=True,
        )
        return output.sequences[0].tolist(), torch.cat(output.logits)


def stripped(tensors, prefix):
    """Tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def tower_of(settings, tensors):
    """The tower with these weights."""
    names = ("hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size")
    tower = Idefics2VisionTransformer(
        Idefics2VisionConfig(**{name: settings[name] for name in names}, attn_implementation="eager")
    )
    tower.load_state_dict(tensors, strict=True)
    return tower.eval()


def resampler_of(tensors):
    """The parts of a resampler with these weights."""
    width, vision_width = tensors["kv_proj.weight"].shape
    parts = nn.ModuleDict(
        {
            "kv_proj": nn.Linear(vision_width, width, bias=False),
            "attn": nn.MultiheadAttention(width, width // HEAD_WIDTH, batch_first=True),
        }
        | {name: nn.LayerNorm(width, eps=1e-6) for name in ("ln_q", "ln_kv", "ln_post")}
    )
    parts.load_state_dict({name: value for name, value in tensors.items() if name not in ("query", "proj")})
    return SimpleNamespace(query=tensors["query"], proj=tensors["proj"], **dict(parts.eval().items()))


def text_of(family, settings, tensors):
    """The text model with these weights; where its rotary rates have factors, plain ones with the factors put in."""
    config_class, network_class = CLASSES[family]
    config = config_class(
        **{name: settings[name] for name in TEXT_KEYS if name in settings},
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
        attn_implementation="eager",
    )
    text = network_class(config)
    text.load_state_dict(tensors, strict=True)
    scaling = settings.get("rope_scaling")
    if scaling:
        assert scaling["long_factor"] == scaling["short_factor"]
        rates = rotary_rates(settings["head_dim"], settings["rope_theta"], scaling["long_factor"])
        text.model.rotary_emb.inv_freq = torch.from_numpy(rates)
    return text.eval()


def rotary_rates(width, theta, factors):
    """Angle of each pair of channels a position, divided by the factor of the pair, float32."""
    powers = np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    return 1 / (np.array(factors, np.float32) * powers)


def released_buckets(count):
    """Place in the position table of each of `count` neighbours: a float32 step is added up, and the result compared
    with the borders of the table."""
    steps = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(count)).numpy()
    borders = (np.arange(1, TABLE_SIDE) / TABLE_SIDE).astype(np.float32)
    return np.searchsorted(borders, steps, side="right")


def grids_of(crops):
    """Rows and columns of patches of each slice."""
    return [(crop.shape[1] // PATCH_PX, crop.shape[2] // PATCH_PX) for crop in crops]


@cache
def place_table(rows, cols, width):
    """Encoding of each patch of a grid, (N, D): the column in the first half of the channels, the row in the second."""
    table = np.zeros((rows, cols, width))
    for row in range(rows):
        for col in range(cols):
            table[row, col] = [*waves(col, width // 2), *waves(row, width // 2)]
    return torch.from_numpy(table.reshape(rows * cols, width)).float()


def time_table(time, width):
    """Encoding of a temporal id, (D,)."""
    return torch.from_numpy(waves(time, width)).float()


def waves(position, width):
    """Sines, then cosines, of a position at falling rates, (width,) float64.

    Rates and angles are float32, as they are in the released tables: at a large position their rounding is all that
    counts. Everything else is float64.
    """
    rates = 1 / np.float32(10000) ** (np.arange(width // 2, dtype=np.float32) / np.float32(width / 2))
    angles = (np.float32(position) * rates).astype(np.float64)
    return np.concatenate([np.sin(angles), np.cos(angles)])
