import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MiniCPMV4_6ForConditionalGeneration
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from operators.engine.engine import Engine
from operators.engine.request import Request, SamplingParams
from operators.engine.scheduler import SchedulerConfig
from operators.minicpmv.demo import write_demo_model
from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.patches import PackedPatches, merge_order, pack_patches
from operators.minicpmv.prompt import PromptBuilder, PromptSettings, image_tokens
from operators.minicpmv.slicing import Size, SliceConfig, slice_image
from operators.minicpmv.visual import Visual
from schemas.errors import ConfigError, ContractError, GenerationError
from tests.operators.slot_driver import SlotDriver

SIZES = ((700, 1000), (300, 220), (120, 900), (448, 448), (900, 640))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_demo_model(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return MiniCPMV(folder, device=torch.device("cpu"), dtype=torch.float32, attention="sdpa")


@pytest.fixture(scope="module")
def builder(model):
    return PromptBuilder(model.config)


def picture(height_px, width_px, seed=0):
    cells = np.random.default_rng(seed).integers(0, 256, (height_px // 16 + 1, width_px // 16 + 1, 3), dtype=np.uint8)
    return np.ascontiguousarray(cells.repeat(16, 0).repeat(16, 1)[:height_px, :width_px])


def visual_of(images, slicing):
    sliced = [slice_image(image, slicing) for image in images]
    pieces = [piece for one in sliced for piece in one.slices]
    shapes = tuple(Size(*piece.shape[:2]) for piece in pieces)
    pixels = np.concatenate([piece.reshape(-1) for piece in pieces])
    return Visual(pixels, shapes), image_tokens(shapes, [one.grid for one in sliced], slicing)


def request_of(builder, images, slicing, kind="image", max_new_tokens=40, text="Read this page."):
    visual, tokens = visual_of(images, slicing)
    ids = builder.build(text, tokens, PromptSettings(kind=kind, use_image_id=kind == "image"))
    return Request(tuple(ids), SamplingParams(max_new_tokens=max_new_tokens), visual)


def mixed_requests(builder):
    requests = [
        request_of(builder, [picture(*size, seed)], SliceConfig(downsample_mode=mode), text="word " * seed)
        for seed, size in enumerate(SIZES)
        for mode in ("16x", "4x")
    ]
    clip = [picture(240, 320, seed) for seed in range(4)]
    requests.append(request_of(builder, clip, SliceConfig(max_slices=1), kind="video"))
    text_only = builder.build("Say something.", [], PromptSettings(kind="image", use_image_id=True))
    requests.append(Request(tuple(text_only), SamplingParams(max_new_tokens=40)))
    return requests


def answers_of(model, requests, slot_count=8, **options):
    return Engine(model, SchedulerConfig(slot_count=slot_count, **options)).generate(requests)


def parts_of(requests):
    return [request.prompt_ids for request in requests], [request.visual for request in requests]


def processed(folder, images, mode):
    """Return what the released processor makes of `images`."""
    processor = MiniCPMV4_6ImageProcessorPil.from_pretrained(folder)
    return processor([Image.fromarray(image) for image in images], downsample_mode=mode, return_tensors="pt")


@pytest.mark.parametrize(("mode", "levels"), [("16x", 2), ("4x", 1)])
def test_packed_patches_equal_the_released_processor(folder, mode, levels):
    slicing = SliceConfig(downsample_mode=mode)
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    wanted = processed(folder, images, mode)
    slices = [piece for image in images for piece in slice_image(image, slicing).slices]
    packed = pack_patches(slices, 14, levels, torch.device("cpu"))
    sizes = [tuple(size) for size in wanted["target_sizes"].tolist()]
    assert [packed.grids[packed.places.index(number)] for number in range(len(slices))] == sizes
    released = wanted["pixel_values"][0].reshape(3, 14, -1, 14).permute(2, 1, 3, 0).flatten(1)
    starts = np.cumsum([0, *(rows * cols for rows, cols in sizes)])
    start = 0
    for (rows, cols), place in zip(packed.grids, packed.places, strict=True):
        own = released[starts[place] : starts[place + 1]].reshape(1, rows, cols, -1)
        assert torch.equal(packed.pixel_values[start : start + rows * cols], merge_order(own, levels)[0])
        start += rows * cols


def test_merge_order_brings_the_four_of_each_square_together():
    numbers = torch.arange(16).reshape(1, 4, 4, 1)
    assert merge_order(numbers, 0).flatten().tolist() == list(range(16))
    assert merge_order(numbers, 1).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    wide = torch.arange(32).reshape(1, 4, 8, 1)
    assert merge_order(wide, 2).flatten().tolist()[:8] == [0, 1, 8, 9, 2, 3, 10, 11]
    assert merge_order(wide, 2).flatten().tolist()[16:20] == [4, 5, 12, 13]


def test_packed_patches_check_their_size():
    with pytest.raises(ContractError, match="patches for grids"):
        PackedPatches(torch.zeros(3, 588), ((2, 2),), (0,), 1)


def test_pixels_that_are_too_few_are_refused():
    with pytest.raises(GenerationError, match="bytes of pixels"):
        Visual(np.zeros(10, np.uint8), (Size(14, 14),))


def test_greedy_answers_do_not_depend_on_the_batch(model, builder):
    requests = mixed_requests(builder)
    alone = answers_of(model, requests, slot_count=1)
    for slot_count, chunk_tokens in ((2, 2048), (5, 100), (32, 65)):
        batched = answers_of(model, requests, slot_count, chunk_tokens=chunk_tokens)
        assert [answer.token_ids for answer in batched] == [answer.token_ids for answer in alone]
        for one, other in zip(batched, alone, strict=True):
            assert one.finish_reason == other.finish_reason
            assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-4)
    assert len({answer.token_ids for answer in alone}) > 3


def test_answers_end_early_and_at_varied_lengths(model, builder):
    answers = answers_of(model, mixed_requests(builder))
    assert {answer.finish_reason for answer in answers} >= {"stop"}
    assert len({answer.output_tokens for answer in answers}) > 3


def test_logits_equal_those_of_the_whole_network(folder, model, builder):
    requests = mixed_requests(builder)[:5]
    logits, _ = SlotDriver(model).prefill(*parts_of(requests))
    whole_network = MiniCPMV4_6ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for row, request in enumerate(requests):
        mode = "16x" if row % 2 == 0 else "4x"
        inputs = processed(folder, [picture(*SIZES[row // 2], row // 2)], mode)
        with torch.inference_mode():
            whole = whole_network(
                input_ids=torch.tensor([request.prompt_ids]),
                pixel_values=inputs["pixel_values"],
                target_sizes=inputs["target_sizes"],
                downsample_mode=mode,
            ).logits[0, -1]
        torch.testing.assert_close(logits[row], whole, atol=2e-5, rtol=1e-4)


def test_encoding_in_chunks_changes_nothing(model, builder, monkeypatch):
    prompts, visuals = parts_of(mixed_requests(builder))
    at_once, _ = SlotDriver(model).prefill(prompts, visuals)
    monkeypatch.setattr(model.encoder, "patches_per_call", 1500)
    in_chunks, _ = SlotDriver(model).prefill(prompts, visuals)
    torch.testing.assert_close(in_chunks, at_once, atol=2e-5, rtol=1e-4)


def test_eager_attention_gives_the_same_answers(folder, model, builder):
    eager = MiniCPMV(folder, device=torch.device("cpu"), dtype=torch.float32, attention="eager")
    requests = mixed_requests(builder)[:4]
    answers = [answers_of(one, requests, slot_count=4) for one in (model, eager)]
    assert [a.token_ids for a in answers[0]] == [a.token_ids for a in answers[1]]


def test_dropping_sequences_keeps_the_others(model, builder):
    prompts, visuals = parts_of(mixed_requests(builder)[:4])
    driver = SlotDriver(model)
    _, whole = driver.prefill(prompts, visuals)
    _, part = driver.prefill(prompts, visuals)
    driver.keep(part, [1, 3])
    for token in (65, 66, 67):
        all_logits = driver.decode(whole, [token] * 4)
        some_logits = driver.decode(part, [token] * 2)
        torch.testing.assert_close(some_logits, all_logits[[1, 3]], atol=2e-5, rtol=1e-4)


def test_bfloat16_runs_close_to_float32(folder, model, builder):
    half = MiniCPMV(folder, device=torch.device("cpu"), dtype=torch.bfloat16, attention="sdpa")
    prompts, visuals = parts_of(mixed_requests(builder)[:4])
    wanted, _ = SlotDriver(model).prefill(prompts, visuals)
    found, _ = SlotDriver(half).prefill(prompts, visuals)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().max() < 0.15 * wanted.abs().max()


def test_placeholders_that_fit_no_mode_fail_their_request_alone(model, builder):
    good = request_of(builder, [picture(300, 220)], SliceConfig())
    bad = Request((*good.prompt_ids, model.config.tokens.image_pad), good.sampling, good.visual)
    lost = Request(good.prompt_ids, good.sampling, None)
    answers = answers_of(model, [good, bad, lost, good])
    assert answers[0] == answers[3]
    assert isinstance(answers[1], GenerationError)
    assert isinstance(answers[2], GenerationError)
    assert "placeholders" in str(answers[1])


def test_a_folder_without_a_model_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError):
        MiniCPMV(tmp_path, device=torch.device("cpu"), dtype=torch.float32, attention="sdpa")
