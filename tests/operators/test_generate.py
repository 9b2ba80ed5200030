import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from operators.engine.scheduler import SchedulerConfig
from operators.generate import Generate, GenerateConfig
from operators.minicpmv.config import read_model_config
from operators.minicpmv.demo import write_demo_model
from operators.minicpmv.device import choose_device, choose_dtype
from operators.minicpmv.slicing import SliceConfig
from operators.minicpmv.tiny import write_tiny_model
from operators.prepare import PrepareClips, PrepareConfig, PrepareImages
from schemas.errors import ConfigError, ContractError
from schemas.generation import GENERATION, RECORD
from tests.operators.rows45 import clip_in_packs
from tests.operators.rows46 import clip_frames, clip_row, page_pictures, page_row, table_of

FAILED = {"stage": "render", "error_code": "render", "error_category": "backend_failure", "message": "no"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_demo_model(path)
    return str(path)


@pytest.fixture(scope="module")
def generate(folder):
    return Generate(GenerateConfig(model_folder=folder, device="cpu", max_new_tokens=24))


@pytest.fixture(scope="module")
def records(folder):
    images = PrepareImages(PrepareConfig(model_folder=folder))
    clips = PrepareClips(PrepareConfig(model_folder=folder, slicing=SliceConfig(max_slices=1)))
    pages = page_pictures(4, seed=2)
    rows = [page_row(picture) for picture in pages[:3]]
    rows += [page_row(pages[3], route="text_layer", image=None), page_row(pages[3], error=FAILED)]
    rows += [page_row(pages[3], route="cpu")]
    clip = clip_row(clip_frames(1), SliceConfig(max_slices=1))
    return pa.concat_tables([images(table_of(*rows)), clips(table_of(clip))])


MODEL_ROWS = (0, 1, 2, 6)


def answers(table):
    return [row["completion"] for row in table.to_pylist()]


def test_model_rows_get_answers_and_others_pass_untouched(generate, records):
    table = generate(records)
    assert table.schema.names == [*[n for n in RECORD.names if n not in generate.adds.names], *generate.adds.names]
    for index, row in enumerate(table.to_pylist()):
        if index in MODEL_ROWS:
            assert row["finish_reason"] in ("stop", "length")
            assert row["completion"] is not None
            assert row["prompt_tokens"] == len(row["prompt_ids"])
            assert 1 <= row["output_tokens"] <= 24
            assert row["mean_logprob"] < 0
            assert row["generate_ms"] > 0
            assert row["queue_ms"] >= 0
            assert row["engine"] == "torch"
            assert row["weights_kind"] == "demo_random"
            assert row["attempt"] == 1
            assert len(row["model_revision"]) == 64
            assert json.loads(row["decode_params"])["max_new_tokens"] == 24
            assert row["thought"] is None
        else:
            before = records.slice(index, 1).to_pylist()[0]
            assert {name: row[name] for name in before} == before
    assert table["error"].null_count == 6


def test_an_empty_batch_keeps_its_schema(generate):
    assert set(generate(RECORD.empty_table()).schema.names) == set(RECORD.names)


def test_a_missing_column_breaks_the_contract(generate, records):
    with pytest.raises(ContractError, match="prompt_ids"):
        generate(records.drop_columns(["prompt_ids"]))


def test_answers_do_not_depend_on_the_batch(folder, generate, records):
    whole = answers(generate(records))
    assert answers(pa.concat_tables([generate(records.slice(0, 2)), generate(records.slice(2))])) == whole
    small = Generate(
        GenerateConfig(model_folder=folder, device="cpu", max_new_tokens=24, scheduler=SchedulerConfig(slot_count=1))
    )
    assert answers(small(records)) == whole


def test_sampled_answers_do_not_depend_on_the_batch(folder, records):
    config = GenerateConfig(model_folder=folder, device="cpu", max_new_tokens=16, temperature=1.5)
    sampled = Generate(config)
    whole = answers(sampled(records))
    assert answers(pa.concat_tables([sampled(records.slice(0, 1)), sampled(records.slice(1))])) == whole
    assert answers(Generate(config.model_copy(update={"temperature": 0.0}))(records)) != whole


def test_one_bad_row_costs_one_row(generate, records):
    rows = records.to_pylist()
    rows[1]["pixels"] = b"\x00" * 10
    rows[2]["prompt_ids"] = [*rows[2]["prompt_ids"], read_model_config_of(generate).tokens.image_pad]
    found = generate(pa.Table.from_pylist(rows, schema=RECORD)).to_pylist()
    whole = generate(records).to_pylist()
    assert found[1]["error"]["stage"] == "preprocess"
    assert found[2]["error"]["error_code"] == "generation"
    assert found[2]["error"]["stage"] == "generate"
    assert found[1]["completion"] is None
    assert found[1]["model_id"] == whole[1]["model_id"]
    assert found[0]["completion"] == whole[0]["completion"]
    assert found[6]["completion"] == whole[6]["completion"]


def read_model_config_of(generate):
    return read_model_config(generate.model_ref.folder)


def test_a_thought_is_stored_apart_and_its_budget_holds(folder):
    prepare = PrepareImages(PrepareConfig(model_folder=folder, thinking=True))
    records = prepare(table_of(*[page_row(picture) for picture in page_pictures(2, seed=9)]))
    budget = Generate(GenerateConfig(model_folder=folder, device="cpu", max_new_tokens=40, max_thought_tokens=5))
    rows = budget(records).to_pylist()
    for row in rows:
        assert row["thought"]
        assert len(row["thought"].encode()) <= 5
        assert "<think>" not in row["completion"]
        assert "</think>" not in row["completion"]
    assert any(row["completion"] for row in rows)
    unbounded = Generate(GenerateConfig(model_folder=folder, device="cpu", max_new_tokens=8))
    for row in unbounded(records).to_pylist():
        assert row["thought"]
        assert row["completion"] == ""


QUERIES = SliceConfig(max_slices=1, query_count=64)


@pytest.fixture(scope="module")
def packing_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny45")
    write_tiny_model(path, "minicpmv4_5")
    return str(path)


@pytest.fixture(scope="module")
def packed_records(packing_folder):
    """Two clips of the same frames at other times, the first once more frame by frame, and a page."""
    clips = PrepareClips(PrepareConfig(model_folder=packing_folder, slicing=QUERIES))
    images = PrepareImages(PrepareConfig(model_folder=packing_folder, slicing=QUERIES))
    frames = [np.roll(clip_frames(3)[0], 40 * number, 1) for number in range(5)]
    ids = ([[0, 2, 4], [6, 8]], [[10, 40, 50], [51, 300]], [[0], [2], [4], [6], [8]])
    rows = [clips(table_of(clip_in_packs(frames, each, QUERIES))) for each in ids]
    return pa.concat_tables([*rows, images(table_of(page_row(page_pictures(1)[0])))])


def test_clips_in_packs_are_answered_and_seen_in_time(packing_folder, packed_records):
    generate = Generate(GenerateConfig(model_folder=packing_folder, device="cpu", max_new_tokens=8))
    rows = generate(packed_records).to_pylist()
    assert [row["error"] for row in rows] == [None] * 4
    assert all(row["completion"] is not None for row in rows)
    assert [row["image_tokens"] for row in rows] == [128, 128, 320, 64]
    first, later, alone, _ = (row["mean_logprob"] for row in rows)
    # The same pixels: what differs is what the model was told of their times.
    assert abs(first - later) > 1e-6
    assert abs(first - alone) > 1e-6


def test_answers_to_packed_clips_do_not_depend_on_the_batch(packing_folder, packed_records):
    generate = Generate(GenerateConfig(model_folder=packing_folder, device="cpu", max_new_tokens=8))
    alone = [generate(packed_records.slice(row, 1)).to_pylist()[0] for row in range(packed_records.num_rows)]
    together = generate(packed_records).to_pylist()
    assert [row["completion"] for row in alone] == [row["completion"] for row in together]
    for one, other in zip(alone, together, strict=True):
        assert one["mean_logprob"] == pytest.approx(other["mean_logprob"], abs=1e-4)


def test_a_clip_whose_times_do_not_fit_its_slices_costs_one_row(packing_folder, packed_records):
    rows = packed_records.to_pylist()
    rows[0]["temporal_ids"] = [[0, 2], [6, 8]]
    generate = Generate(GenerateConfig(model_folder=packing_folder, device="cpu", max_new_tokens=2))
    found = generate(pa.Table.from_pylist(rows, schema=RECORD)).to_pylist()
    assert "packs of 4 slices for 5 slices" in found[0]["error"]["message"]
    assert [row["error"] for row in found[1:]] == [None] * 3


def test_a_model_without_thoughts_answers_at_once(tmp_path):
    write_tiny_model(tmp_path, "minicpmv2_6")
    prepare = PrepareImages(PrepareConfig(model_folder=str(tmp_path), slicing=QUERIES))
    config = GenerateConfig(model_folder=str(tmp_path), device="cpu", max_new_tokens=8, max_thought_tokens=2)
    [row] = Generate(config)(prepare(table_of(page_row(page_pictures(1)[0])))).to_pylist()
    assert (row["error"], row["thought"]) == (None, None)
    assert row["output_tokens"] > 2


@pytest.mark.parametrize(("text", "may"), [("<td></td>", True), ("| 0.00 ", True), ("§ ", True), ("Words ", False)])
def test_tokens_of_fillers_may_repeat_wherever_they_are_cut(generate, text, may):
    ids = generate._text.encode(text)
    assert {generate._may_repeat(ids[cut:] + ids[:cut]) for cut in range(len(ids))} == {may}


def test_a_known_revision_and_kind_are_passed_on(folder, records):
    config = GenerateConfig(
        model_folder=folder, model_id="some/model", model_revision="abc", weights_kind="released", max_new_tokens=1
    )
    row = Generate(config)(records.slice(0, 1)).to_pylist()[0]
    assert (row["model_id"], row["model_revision"], row["weights_kind"]) == ("some/model", "abc", "released")
    assert row["finish_reason"] in ("length", "stop")


def test_the_models_own_length_is_the_default(folder):
    assert json.loads(Generate(GenerateConfig(model_folder=folder)).decode_params)["max_new_tokens"] == 192


def test_columns_of_the_answer_may_be_absent_before(generate, records):
    bare = records.drop_columns(GENERATION.names)
    assert answers(generate(bare)) == answers(generate(records))


def test_a_model_that_is_not_there_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        Generate(GenerateConfig(model_folder=str(tmp_path / "absent")))


def test_devices_and_types_follow_the_machine():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    if torch.cuda.is_available():
        assert choose_device("auto").type == "cuda"
    else:
        assert choose_device("auto").type == "cpu"
        with pytest.raises(ConfigError, match="cuda"):
            choose_device("cuda")
