"""Folders with the small files of each member of the family, no weights, and tokenizers of the two released kinds."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

MERGERS = ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")
RESAMPLERS = ("minicpmv4_5", "minicpmv4_0", "minicpmv2_6", "minicpmo2_6")
MEMBERS = (*MERGERS, *RESAMPLERS)
THINKING = (*MERGERS, "minicpmv4_5")

MARKERS = ("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
TURNS = ("<|im_start|>", "<|im_end|>")
THOUGHT = ("<think>", "</think>")
PADS = ("<|image_pad|>", "<|video_pad|>")
TRAINING_TEXT = ["user\nRead this page.\n\n\n Zahlen und assistant\n\n <table>\n\n system\nYou help. <unk> image"] * 50

SYSTEM = "You help."
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
) + TEMPLATE
THINKING_TEMPLATE = (
    TEMPLATE + "{% if enable_thinking %}{{ '<think>\n' }}{% else %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)


def qwen_tokenizer(special):
    """Byte level with merges, newlines among them, and texts split as Qwen models split them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    add_special(tokenizer, special)
    return tokenizer


def llama_tokenizer(special, prefix="prepend"):
    """Characters and bytes with a space before each text, and a token before each prompt, as in MiniCPM-V 4.0."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if prefix == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    controls = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, special_tokens=controls)
    tokenizer.train_from_iterator(TRAINING_TEXT[0].splitlines(), trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    add_special(tokenizer, special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def add_special(tokenizer, special):
    tokenizer.add_tokens([AddedToken(text, special=text not in THOUGHT, normalized=False) for text in special])


def member_tokenizer(name, prefix="prepend"):
    if name == "minicpmv4_0":
        return llama_tokenizer(("<unk>", "<s>", "</s>", *TURNS, *MARKERS), prefix)
    special = ["<|endoftext|>", *TURNS, *MARKERS]
    special += PADS if name in MERGERS else ["<unk>"]
    return qwen_tokenizer([*special, *(THOUGHT if name in THINKING else ())])


def member_config(name, tokenizer):
    """The keys of `config.json` that are read, in the layout of the release."""
    text = {"vocab_size": tokenizer.get_vocab_size() + 2, "max_position_embeddings": 4096}
    ids = {key: tokenizer.token_to_id(text) for key, text in (
        ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"), ("image_start_id", "<image>"),
        ("image_end_id", "</image>"), ("slice_start_id", "<slice>"), ("slice_end_id", "</slice>"), ("newline_id", "Ċ"),
    )}  # fmt: skip
    if name in MERGERS:
        kept = ids if name == "minicpmv4_7" else {key: ids[key] for key in ("image_token_id", "video_token_id")}
        return {"model_type": name, "text_config": text, "vision_config": {}, "drop_vision_last_layer": False, **kept}
    kind, version = {
        "minicpmv4_5": ("minicpmv", 4.5), "minicpmv4_0": ("minicpmv", "4.0"), "minicpmv2_6": ("minicpmv", 2.6),
        "minicpmo2_6": ("minicpmo", "2.6"),
    }[name]  # fmt: skip
    return {
        "model_type": kind,
        "version": version,
        "query_num": 64,
        "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
        "vision_config": {"patch_size": 14},
        "drop_vision_last_layer": False,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        **text,
    }


def member_template(name):
    if name == "minicpmv2_6":
        return SYSTEM_TEMPLATE
    return THINKING_TEMPLATE if name in THINKING else TEMPLATE


def write_member(folder, name, *, prefix="prepend", **changes):
    """Write the files of a member; `changes` go into its `config.json`, None removes a key."""
    tokenizer = member_tokenizer(name, prefix)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {key: value for key, value in (member_config(name, tokenizer) | changes).items() if value is not None}
    preprocessor = {"max_slice_nums": 9, "scale_resolution": 448, "patch_size": 14, "use_image_id": True}
    # The release of 4.5 says 2.6 here, that of 4.0 says 3.0.
    preprocessor |= {"version": 2.6, "image_feature_size": 64} if name in RESAMPLERS else {}
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", preprocessor)
    write_json(folder / "tokenizer_config.json", {"chat_template": member_template(name)})
    return folder


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def change_json(path, **changes):
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)
