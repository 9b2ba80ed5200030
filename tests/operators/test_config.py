import json

import pytest

from operators.minicpmv.config import quantization_method, read_model_config, system_text
from operators.minicpmv.family import FAMILIES, find_family, read_version
from operators.minicpmv.slicing import SliceConfig
from operators.minicpmv.weights import resolve_model
from schemas.errors import ConfigError
from tests.operators.members import (
    MEMBERS,
    MERGERS,
    RESAMPLERS,
    SYSTEM,
    THINKING,
    change_json,
    write_json,
    write_member,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_member(tmp_path_factory.mktemp(name), name) for name in MEMBERS}


def ids_of(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


def refusal(folder):
    """The message of the error, which is one line."""
    with pytest.raises(ConfigError) as caught:
        read_model_config(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_is_known_by_its_files(folders, name):
    config = read_model_config(folders[name])
    assert config.family_name == config.family.name == name
    assert config.max_positions == 4096
    assert config.use_image_id
    assert not config.is_demo
    assert config.quantization is None
    assert config.thinks == (name in THINKING)


def test_the_list_of_members_is_the_one_tested():
    assert set(MEMBERS) == set(FAMILIES)


@pytest.mark.parametrize("name", MEMBERS)
def test_tokens_are_found_by_the_texts_of_the_member(folders, name):
    ids, tokens = ids_of(folders[name]), read_model_config(folders[name]).tokens
    image_pad, video_pad = ("<|image_pad|>", "<|video_pad|>") if name in MERGERS else ("<unk>", "<unk>")
    assert (tokens.image_pad, tokens.video_pad) == (ids[image_pad], ids[video_pad])
    assert tokens.image_id_end == ids["</image_id>"]
    assert tokens.slice_start == ids["<slice>"]
    assert tokens.text_end == ids["</s>" if name == "minicpmv4_0" else "<|endoftext|>"]
    assert tokens.think_end == (ids["</think>"] if name in THINKING else None)
    assert (tokens.newline is not None) == (name == "minicpmv4_7")


@pytest.mark.parametrize("name", MEMBERS)
def test_slicing_is_that_of_the_member(folders, name):
    slicing = read_model_config(folders[name]).slicing
    if name in RESAMPLERS:
        assert slicing == SliceConfig(query_count=64)
        assert slicing.step_px == 14
    else:
        assert slicing == SliceConfig(downsample_mode="4x" if name == "minicpm_ocr" else "16x")


@pytest.mark.parametrize("name", MEMBERS)
def test_an_answer_ends_with_its_turn_or_its_text(folders, name):
    config = read_model_config(folders[name])
    assert config.stop_ids == tuple(sorted((config.tokens.turn_end, config.tokens.text_end)))


def test_more_ends_of_an_answer_are_taken_from_the_generation_file(tmp_path):
    folder = write_member(tmp_path, "minicpmv2_6")
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 5], "temperature": 0.6, "unknown": 1})
    config = read_model_config(folder)
    assert config.stop_ids == tuple(sorted((1, 5, config.tokens.turn_end, config.tokens.text_end)))
    assert config.generation.temperature == 0.6


def test_only_the_member_whose_template_says_so_has_a_system_turn(folders):
    texts = {name: read_model_config(folders[name]).system_text for name in MEMBERS}
    assert {name for name, text in texts.items() if text is not None} == {"minicpmv2_6"}
    assert texts["minicpmv2_6"] == SYSTEM


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if x %}{{ '<|im_start|>system\\nYou are Q.\\nHelp.<|im_end|>\\n' }}{% endif %}", "You are Q.\nHelp."),
        ("{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}", None),
        ("{{- '<|im_start|>system\\n' }}{{ tools }}{{- '<|im_end|>\\n' }}", None),
        ("{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}", None),
        ("", None),
    ],
)
def test_a_system_turn_is_found_in_a_template_that_spells_it(template, text):
    assert system_text(template) == text


def test_a_template_file_counts_more_than_the_tokenizers_settings(tmp_path):
    folder = write_member(tmp_path, "minicpmv2_6")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert read_model_config(folder).system_text is None


def test_a_release_without_thoughts_in_its_template_does_not_think(tmp_path):
    folder = write_member(tmp_path, "minicpm_ocr")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert not read_model_config(folder).thinks


def test_limits_on_slicing_are_read_from_any_of_the_files(tmp_path):
    folder = write_member(tmp_path, "minicpmv4_5", query_num=32, slice_config={"max_slice_nums": 4})
    (folder / "preprocessor_config.json").unlink()
    assert read_model_config(folder).slicing == SliceConfig(max_slices=4, query_count=32)
    write_json(folder / "preprocessor_config.json", {"max_slice_nums": 7, "scale_resolution": 224})
    assert read_model_config(folder).slicing == SliceConfig(max_slices=7, slice_side_px=224, query_count=32)
    write_json(folder / "processor_config.json", {"processor_class": "MiniCPMVProcessor"})
    assert read_model_config(folder).slicing.max_slices == 7
    write_json(folder / "processor_config.json", {"image_processor": {"max_slice_nums": 2, "use_image_id": False}})
    config = read_model_config(folder)
    assert config.slicing == SliceConfig(max_slices=2, query_count=32)
    assert not config.use_image_id


def test_the_mode_of_a_merger_is_the_models_then_the_processors(tmp_path):
    folder = write_member(tmp_path, "minicpmv4_6")
    change_json(folder / "preprocessor_config.json", downsample_mode="4x")
    assert read_model_config(folder).slicing.downsample_mode == "4x"
    change_json(folder / "config.json", downsample_mode="16x")
    assert read_model_config(folder).slicing.downsample_mode == "16x"


def test_how_small_images_are_enlarged_is_read_and_left_out_for_clips(tmp_path):
    folder = write_member(tmp_path, "minicpm_ocr")
    change_json(folder / "preprocessor_config.json", small_image_upsize="adaptive")
    config = read_model_config(folder)
    assert config.slicing.small_image_upsize == "adaptive"
    assert config.clip_slicing == SliceConfig(downsample_mode="4x")


def test_slicing_that_is_off_leaves_the_overview(tmp_path):
    folder = write_member(tmp_path, "minicpmv4_6")
    change_json(folder / "preprocessor_config.json", slice_mode=False)
    assert read_model_config(folder).slicing.max_slices == 1


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        (None, None),
        ({}, None),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"_load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "unnamed"),
    ],
)
def test_the_method_of_quantised_weights_is_read(settings, method):
    assert quantization_method({"quantization_config": settings}) == method


@pytest.mark.parametrize(
    ("value", "numbers"), [(4.5, (4, 5)), ("4.5", (4, 5)), (4, (4, 0)), ("2.6", (2, 6)), (None, ()), ("x", ())]
)
def test_versions_are_numbers_or_texts(value, numbers):
    assert read_version(value) == numbers


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava"}, r"'llava' is not supported; supported: MiniCPM-V 4.6, .*MiniCPM-o 2.6"),
        ({}, "None is not supported; supported: MiniCPM-V 4.6"),
        ({"model_type": "minicpmv", "version": 2.5}, "2.0 and 2.5 are not supported; supported: MiniCPM-V 4.6"),
        ({"model_type": "minicpmv", "version": "2.0"}, "2.0 and 2.5 are not supported"),
        ({"model_type": "minicpmv"}, "2.0 and 2.5 are not supported"),
        ({"model_type": "minicpmv", "version": 5.1}, "version 5.1 is not supported"),
        ({"model_type": "minicpmo", "version": 4.5}, "version 4.5 is not supported"),
    ],
)
def test_other_models_are_refused_with_a_list_of_what_runs(config, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        find_family(config)
    write_json(tmp_path / "config.json", config)
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_tower_without_its_last_layer_is_refused(name, tmp_path):
    assert "drop_vision_last_layer" in refusal(write_member(tmp_path, name, drop_vision_last_layer=True))


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("key", ["image_token_id", "video_token_id"])
def test_a_tokenizer_that_contradicts_the_config_is_refused(name, key, tmp_path):
    assert f"{key} 7, the tokenizer says" in refusal(write_member(tmp_path, name, **{key: 7}))


@pytest.mark.parametrize("key", ["image_start_id", "image_end_id", "slice_start_id", "slice_end_id"])
def test_markers_that_the_plane_needs_must_be_those_of_the_tokenizer(key, tmp_path):
    folder = write_member(tmp_path, "minicpmv4_7", **{key: 7})
    assert f"{key} 7, the tokenizer says" in refusal(folder)
    write_member(folder, "minicpmv4_7", **{key: None})
    assert f"{key} None, the tokenizer says" in refusal(folder)


def test_the_plane_needs_the_id_of_a_newline(tmp_path):
    assert "lacks newline_id" in refusal(write_member(tmp_path, "minicpmv4_7", newline_id=None))


@pytest.mark.parametrize(
    ("name", "text"), [("minicpmv4_6", "<think>"), ("minicpmv4_5", "</think>"), ("minicpmo2_6", "<unk>")]
)
def test_a_missing_token_is_named(name, text, tmp_path):
    folder = write_member(tmp_path, name)
    path = folder / "tokenizer.json"
    added = [token for token in json.loads(path.read_text())["added_tokens"] if token["content"] != text]
    change_json(path, added_tokens=added)
    message = refusal(folder)
    assert message.endswith(f"lacks tokens of {FAMILIES[name].title}: {text}")


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path):
    assert "beyond vocab_size 100" in refusal(write_member(tmp_path, "minicpmv2_6", vocab_size=100))


def test_a_missing_tokenizer_is_named_with_what_does_not_replace_it(tmp_path):
    folder = write_member(tmp_path, "minicpmv2_6")
    (folder / "tokenizer.json").unlink()
    assert "lacks tokenizer.json; copy it" in refusal(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}")
    assert "lacks tokenizer.json: vocab.json, merges.txt alone will not do" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("minicpmv4_6", {"text_config": None}, "text_config"),
        ("minicpmv4_6", {"text_config": 3}, "do not fit together"),
        ("minicpmv2_6", {"max_position_embeddings": None}, "max_position_embeddings"),
        ("minicpmv2_6", {"vocab_size": "many"}, "vocabulary_size"),
        ("minicpmv2_6", {"query_num": 0}, "query_count"),
    ],
)
def test_numbers_that_are_missing_or_malformed_are_named(name, changes, message, tmp_path):
    assert message in refusal(write_member(tmp_path, name, **changes))


def test_a_missing_or_broken_file_is_a_config_error(tmp_path):
    assert "config.json cannot be read" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "wanted an object" in refusal(tmp_path)


def test_gguf_weights_are_sent_to_who_reads_them(tmp_path):
    (tmp_path / "ggml-model-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert "llama.cpp" in refusal(tmp_path)
    for model in (tmp_path, tmp_path / "ggml-model-Q4_K_M.gguf", "openbmb/MiniCPM-V-4_5-gguf"):
        with pytest.raises(ConfigError, match=r"GGUF .*llama\.cpp.*endpoint engine"):
            resolve_model(str(model))


def test_gguf_beside_a_whole_model_does_no_harm(tmp_path):
    folder = write_member(tmp_path, "minicpmv4_6")
    (folder / "model-Q4.gguf").write_bytes(b"GGUF")
    assert read_model_config(folder).family_name == "minicpmv4_6"
