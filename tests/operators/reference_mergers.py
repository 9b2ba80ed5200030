"""The reference for MiniCPM-V 4.6, 4.7 and MiniCPM-OCR 1.0: transformers' image processor, text rules, chat template
and generate.

MiniCPM-OCR's own image processor needs torchvision; with its default of enlarging every small picture it follows the
rules of 4.6's, which stands in for it.
"""

import json
import re

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    MiniCPMOcrForConditionalGeneration,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_7ForConditionalGeneration,
)
from transformers.models.minicpm_ocr.processing_minicpm_ocr import MiniCPMOcrProcessor
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor
from transformers.models.minicpmv4_7.processing_minicpmv4_7 import MiniCPMV4_7Processor

CLASSES = {
    "minicpmv4_6": (MiniCPMV4_6ForConditionalGeneration, MiniCPMV4_6Processor),
    "minicpmv4_7": (MiniCPMV4_7ForConditionalGeneration, MiniCPMV4_7Processor),
    "minicpm_ocr": (MiniCPMOcrForConditionalGeneration, MiniCPMOcrProcessor),
}
MODALITIES = {"image": 1, "video": 2}
"""Numbers by which 4.7 knows which tokens are placeholders of what."""


class Reference:
    """Inputs, logits and greedy answers of one checkpoint, as transformers makes them."""

    def __init__(self, folder, with_weights=True):
        self.family = json.loads((folder / "config.json").read_text())["model_type"]
        network_class, processor_class = CLASSES[self.family]
        self.images = MiniCPMV4_6ImageProcessorPil.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.rules = text_rules(processor_class, self.tokenizer)
        self.pads = {"image": self.tokenizer.image_token, "video": self.tokenizer.video_token}
        if with_weights:
            self.network = network_class.from_pretrained(folder, dtype=torch.float32).eval()

    def process(self, pictures, slicing):
        """Processor output for (height, width, 3) uint8 arrays, each of its own size, as one batch."""
        return self.images(
            [Image.fromarray(picture) for picture in pictures],
            max_slice_nums=slicing.max_slices,
            scale_resolution=slicing.slice_side_px,
            downsample_mode=slicing.downsample_mode,
            return_tensors="pt",
        )

    def placeholders(self, processed, slicing, kind):
        """Texts that stand for the images, or the one text that stands for the clip."""
        divisor = 4 if slicing.downsample_mode == "4x" else 16
        if kind == "image":
            return [
                self.rules.replace_image_token(processed, image_idx=index, image_token_divisor=divisor)
                for index in range(len(processed["grids"]))
            ]
        as_video = {
            "target_sizes_videos": processed["target_sizes"],
            "num_frames_per_video": np.array([len(processed["grids"])]),
            "grids_videos": np.array(processed["grids"]),
        }
        return [self.rules.replace_video_token(as_video, video_idx=0, video_token_divisor=divisor)]

    def chat_ids(self, content, placeholders, *, use_image_id, thinking=False):
        """Prompt of a user's turn: the chat template, the placeholders of each kind put in by the processor's rules."""
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        queues = {}
        for kind, texts in placeholders.items():
            pad = self.pads[kind]
            queues[pad] = iter(self.rules._prepend_local_ids([chat], texts, pad) if use_image_id else texts)
        pattern = "|".join(map(re.escape, self.pads.values()))
        whole = re.sub(pattern, lambda found: next(queues[found[0]]), chat)
        assert all(next(queue, None) is None for queue in queues.values())
        return self.tokenizer(whole).input_ids

    def prompt_ids(self, text, processed, slicing, *, kind, use_image_id, thinking=False):
        """Prompt of one sample with images, or with a clip, before its text."""
        texts = self.placeholders(processed, slicing, kind)
        content = [{"type": kind}] * len(texts) + [{"type": "text", "text": text}]
        return self.chat_ids(content, {kind: texts}, use_image_id=use_image_id, thinking=thinking)

    def answer(self, prompt_ids, processed, slicing, *, max_new_tokens):
        """Generated ids of one sample alone, the end token included, and the logits that chose them, (ids, vocabulary).

        `processed` holds the processor's output of each kind of picture in the prompt.
        """
        pictures = {}
        for kind, output in processed.items():
            suffix = "" if kind == "image" else "_videos"
            pictures[f"pixel_values{suffix}"] = output["pixel_values"]
            pictures[f"target_sizes{suffix}"] = output["target_sizes"]
        ids = torch.tensor([prompt_ids])
        if self.family == "minicpmv4_7":
            pictures["mm_token_type_ids"] = self.modalities(ids)
            # Left from the sample before, it would shift a sample without pictures.
            self.network.model.rope_deltas = None
        with torch.inference_mode():
            output = self.network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                downsample_mode=slicing.downsample_mode,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                output_logits=True,
                **pictures,
            )
        return output.sequences[0, len(prompt_ids) :].tolist(), torch.cat(output.logits)

    def modalities(self, ids):
        """What each token is to 4.7: text, image or video."""
        result = torch.zeros_like(ids)
        for kind, number in MODALITIES.items():
            result[ids == self.tokenizer.convert_tokens_to_ids(self.pads[kind])] = number
        return result

    def greedy(self, prompt_ids, processed, slicing, *, kind, max_new_tokens):
        """Generated ids of one sample alone, the end token included."""
        return self.answer(prompt_ids, {kind: processed}, slicing, max_new_tokens=max_new_tokens)[0]


def text_rules(processor_class, tokenizer):
    """A processor that has only what its text rules need: the whole one wants a video processor and torchvision."""
    rules = object.__new__(processor_class)
    for name in ("image_token", "video_token", "image_start_token", "image_end_token", "slice_start_token",
                 "slice_end_token", "image_id_start_token", "image_id_end_token"):  # fmt: skip
        setattr(rules, name, getattr(tokenizer, name))
    rules.slice_mode = rules.video_slice_mode = True
    return rules
