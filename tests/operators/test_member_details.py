"""What single members with a resampler do differently in text: exclamation marks, rotary factors."""

import numpy as np
import pytest
import torch

from operators.generate import Generate, GenerateConfig
from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.prompt import PromptSettings
from operators.minicpmv.slicing import SliceConfig
from operators.minicpmv.tiny import write_tiny_model
from operators.prepare import PrepareConfig, PrepareImages
from tests.operators.random_packed_prompts import packed_prompts
from tests.operators.reference_resamplers import CLASSES, rotary_rates
from tests.operators.resampler_pair import CPU, Pair, changed_copy, difference, largest_difference
from tests.operators.rows46 import page_pictures, page_row, table_of
from tests.operators.test_merger_parity import MAX_NEW_TOKENS, our_answers

LARGEST_DIFFERENCE = 1e-4
QWENS = [family for family in CLASSES if family != "minicpmv4_0"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def make_exclamation_marks_likely(tensors):
    if "llm.lm_head.weight" in tensors:
        tensors["llm.lm_head.weight"][0] *= 3


@pytest.fixture(scope="module", params=QWENS)
def exclaiming(request, tmp_path_factory):
    """A checkpoint that writes the token 0, `!`, often."""
    base = tmp_path_factory.mktemp(request.param)
    (base / "plain").mkdir()
    write_tiny_model(base / "plain", request.param)
    folder = changed_copy(base / "plain", base / "exclaiming", change_tensors=make_exclamation_marks_likely)
    return Pair(folder, request.param)


def test_an_exclamation_mark_in_a_prompt_is_read(exclaiming):
    """Its id is 0 in the vocabularies of Qwen, and the released processors of 4.5 and 2.6 mask what is 0."""
    settings = PromptSettings(kind="image", use_image_id=True)
    ids = exclaiming.builder.build("Stop! Read this! !", [], settings)
    assert ids.count(0) == 3
    longer = exclaiming.builder.build("A neighbour in the batch, which is longer! And longer!", [], settings)
    [(_, found), _] = our_answers(exclaiming.model, [ids, longer], [None, None])
    embeddings = exclaiming.reference.text.get_input_embeddings()(torch.tensor([ids]))
    _, wanted = exclaiming.reference.answer(embeddings, exclaiming.model.stop_ids, max_new_tokens=1)
    assert difference(found[:1], wanted) < LARGEST_DIFFERENCE
    mask = (torch.tensor([ids]) != 0).long()
    masked = exclaiming.reference.text(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).logits[:, -1]
    assert difference(masked, wanted) > 0.1


def test_exclamation_marks_of_an_answer_stay_in_its_text(exclaiming):
    slicing = SliceConfig(slice_side_px=112, max_slices=4, query_count=64)
    pictures = page_pictures(4)
    prepare = PrepareImages(PrepareConfig(model_folder=str(exclaiming.folder), slicing=slicing))
    table = prepare(table_of(*(page_row(picture, record_key=str(row)) for row, picture in enumerate(pictures))))
    generate = Generate(
        GenerateConfig(model_folder=str(exclaiming.folder), device="cpu", dtype="fp32", max_new_tokens=MAX_NEW_TOKENS)
    )
    try:
        rows = generate(table).to_pylist()
    finally:
        generate.close()
    marks = 0
    for row, picture in zip(rows, pictures, strict=True):
        crops, _ = exclaiming.reference.crops(picture, slicing.max_slices, slicing.slice_side_px)
        features = exclaiming.reference.features([([crop], (-1,)) for crop in crops])
        embeddings = exclaiming.reference.embeddings(
            row["prompt_ids"], features, exclaiming.model.config.tokens.image_pad
        )
        stop_ids = exclaiming.model.stop_ids
        tokens, _ = exclaiming.reference.answer(embeddings, stop_ids, max_new_tokens=MAX_NEW_TOKENS)
        assert row["completion"] == exclaiming.reference.tokenizer.decode(tokens).strip()
        assert row["completion"].count("!") == tokens.count(0)
        marks += 0 < tokens.count(0) < len(tokens) - 1
    assert marks >= 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minicpmv4_0")
    write_tiny_model(folder, "minicpmv4_0")
    return folder


def with_factors(factors, **others):
    def change(config):
        config["rope_scaling"] |= {"long_factor": factors, "short_factor": factors} | others

    return change


def without_scaling(config):
    del config["rope_scaling"]


def text_logits(folder, ids):
    """Logits after one prompt of text."""
    model = MiniCPMV(folder, device=CPU, dtype=torch.float32, attention="sdpa")
    [(_, logits)] = our_answers(model, [ids], [None])
    return logits[0]


FACTORS = [round(1.0 + 0.37 * index + 0.05 * index**2, 3) for index in range(16)]


def test_rotary_factors_of_4_0_divide_the_rates(llama, tmp_path):
    changed = changed_copy(llama, tmp_path / "changed", with_factors(FACTORS))
    pair = Pair(changed, "minicpmv4_0")
    exact = 1 / (np.array(FACTORS) * 10000.0 ** (np.arange(0, 32, 2) / 32))
    rotary = pair.model.network.text.rotary_emb
    for count in (10, 32_000):
        positions = torch.tensor([[0, 1, count - 1]])
        cosines, sines = rotary(torch.zeros(1, 3, 256), positions)
        angles = positions[0, :, None].double().numpy() * np.concatenate([exact, exact])
        assert np.abs(cosines[0].numpy() - np.cos(angles)).max() < 3e-7 * count
        assert np.abs(sines[0].numpy() - np.sin(angles)).max() < 3e-7 * count
    np.testing.assert_allclose(rotary_rates(32, 10000.0, FACTORS), exact, rtol=5e-7)
    largest, answers = largest_difference(pair, packed_prompts("minicpmv4_0", 8, seed=11))
    assert largest < LARGEST_DIFFERENCE
    assert len(set(answers)) > 4


def test_a_factor_of_one_is_plain_rotation(llama, tmp_path):
    ids = np.random.default_rng(0).integers(3, 300, 400).tolist()
    ones = text_logits(changed_copy(llama, tmp_path / "ones", with_factors([1.0] * 16)), ids)
    plain = text_logits(changed_copy(llama, tmp_path / "plain", without_scaling), ids)
    assert difference(ones, plain) < 1e-5
    assert difference(text_logits(llama, ids), plain) > 0.1


def test_a_list_of_factors_is_enough(llama, tmp_path):
    """Without a factor of its own the length that the model was trained on says how attention is scaled: not at all."""
    ids = np.random.default_rng(1).integers(3, 300, 200).tolist()

    def change(config):
        del config["rope_scaling"]["factor"]

    assert torch.equal(text_logits(changed_copy(llama, tmp_path / "bare", change), ids), text_logits(llama, ids))
