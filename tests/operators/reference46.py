"""The reference for MiniCPM-V 4.6: transformers' image processor, processor text rules, chat template and generate."""

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, MiniCPMV4_6ForConditionalGeneration
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor


class Reference:
    """Inputs and greedy answers of one checkpoint, as transformers makes them."""

    def __init__(self, folder, with_weights=True):
        self.images = MiniCPMV4_6ImageProcessorPil.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.rules = text_rules(self.tokenizer)
        if with_weights:
            network = MiniCPMV4_6ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            self.network = network.eval()

    def process(self, pictures, slicing):
        """Processor output for (height, width, 3) uint8 arrays, each of its own size, as one batch."""
        return self.images(
            [Image.fromarray(picture) for picture in pictures],
            max_slice_nums=slicing.max_slices,
            downsample_mode=slicing.downsample_mode,
            return_tensors="pt",
        )

    def prompt_ids(self, text, processed, slicing, *, kind, use_image_id, thinking=False):
        """Prompt of one sample: the chat template, its placeholders replaced by the processor's rules."""
        divisor = 4 if slicing.downsample_mode == "4x" else 16
        if kind == "image":
            count = len(processed["grids"])
            expanded = [
                self.rules.replace_image_token(processed, image_idx=index, image_token_divisor=divisor)
                for index in range(count)
            ]
        else:
            count = 1
            as_video = {
                "target_sizes_videos": processed["target_sizes"],
                "num_frames_per_video": np.array([len(processed["grids"])]),
                "grids_videos": np.array(processed["grids"]),
            }
            expanded = [self.rules.replace_video_token(as_video, video_idx=0, video_token_divisor=divisor)]
        content = [{"type": kind}] * count + [{"type": "text", "text": text}]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        pad = self.tokenizer.image_token if kind == "image" else self.tokenizer.video_token
        if use_image_id:
            expanded = self.rules._prepend_local_ids([chat], expanded, pad)
        pieces = chat.split(pad)
        assert len(pieces) == count + 1
        whole = pieces[0] + "".join(one + piece for one, piece in zip(expanded, pieces[1:], strict=True))
        return self.tokenizer(whole).input_ids

    def greedy(self, prompt_ids, processed, slicing, *, kind, max_new_tokens):
        """Generated ids of one sample alone, the end token included."""
        suffix = "" if kind == "image" else "_videos"
        pictures = {
            f"pixel_values{suffix}": processed["pixel_values"],
            f"target_sizes{suffix}": processed["target_sizes"],
        }
        ids = torch.tensor([prompt_ids])
        with torch.inference_mode():
            output = self.network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                downsample_mode=slicing.downsample_mode,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                **pictures,
            )
        return output[0, len(prompt_ids) :].tolist()


def text_rules(tokenizer):
    """A processor that has only what its text rules need: the whole one wants a video processor and torchvision."""
    rules = object.__new__(MiniCPMV4_6Processor)
    for name in ("image_token", "video_token", "image_start_token", "image_end_token", "slice_start_token",
                 "slice_end_token", "image_id_start_token", "image_id_end_token"):  # fmt: skip
        setattr(rules, name, getattr(tokenizer, name))
    rules.slice_mode = rules.video_slice_mode = True
    return rules
