"""The request by which a broken engine is known: every member answers it."""

import pytest

from operators.engine.request import Completion
from operators.generate import Generate, GenerateConfig
from operators.minicpmv.family import FAMILIES
from operators.minicpmv.tiny import write_tiny_model
from operators.prepare import PrepareConfig, PrepareImages
from schemas.errors import WorkerLostError
from tests.operators.rows46 import page_pictures, page_row, table_of


@pytest.mark.parametrize("name", FAMILIES)
def test_every_member_answers_the_known_request(tmp_path, name):
    write_tiny_model(tmp_path, name)
    generate = Generate(GenerateConfig(model_folder=str(tmp_path), device="cpu", max_new_tokens=4))
    known = generate.known_good()
    [outcome] = generate._engine.generate([known])
    assert isinstance(outcome, Completion)
    # Its picture goes through tower and connector too.
    assert known.prompt_ids.count(generate._model.config.tokens.image_pad) >= 1
    generate._engine.engine._health.require(ValueError("a bad record"), slots_are_free=True)


def test_a_tower_that_breaks_costs_the_worker_and_no_record(tmp_path, monkeypatch):
    write_tiny_model(tmp_path)
    generate = Generate(GenerateConfig(model_folder=str(tmp_path), device="cpu", max_new_tokens=4))
    prepare = PrepareImages(PrepareConfig(model_folder=str(tmp_path)))
    records = prepare(table_of(*[page_row(picture) for picture in page_pictures(2)]))
    assert generate(records)["error"].null_count == 2

    def broken(*_):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(generate._model.encoder, "encode_groups", broken)
    with pytest.raises(WorkerLostError, match="must be able to answer"):
        generate(records)
