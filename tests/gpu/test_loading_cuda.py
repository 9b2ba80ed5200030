"""Quantised weights on a GPU, and one model over two of them."""

import numpy as np
import pytest
import torch

from operators.minicpmv.encoder import VisionEncoder
from operators.minicpmv.family import FAMILIES
from operators.minicpmv.load import load_network
from operators.minicpmv.slicing import Size
from operators.minicpmv.tiny import write_tiny_model
from operators.minicpmv.visual import Visual

pytestmark = pytest.mark.needs_gpu
CPU = torch.device("cpu")


def outputs(network, name):
    """Return logits of a text and features of a picture, on the CPU."""
    first = network.embed.weight.device
    ids = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(0)).to(first)
    pixels = np.random.default_rng(0).integers(0, 256, 448 * 560 * 3, dtype=np.uint8)
    levels = 2 if FAMILIES[name].connector == "merger" else 0
    with torch.inference_mode():
        hidden = network.text(inputs_embeds=network.embed(ids)).last_hidden_state
        features = VisionEncoder(network, FAMILIES[name], 14, first).encode(
            [Visual(pixels, (Size(448, 560),))], [levels]
        )
        return network.logits(hidden).float().cpu(), features[0].float().cpu()


@pytest.mark.parametrize("name", ["minicpmv4_6", "minicpmv4_5"])
def test_four_bits_on_a_gpu_answer_as_the_numbers_they_stand_for(tmp_path, name):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from tests.operators.four_bits import write_four_bits

    source, packed, plain = (tmp_path / kind for kind in ("source", "packed", "plain"))
    for folder in (source, packed, plain):
        folder.mkdir()
    write_tiny_model(source, name, shards=1)
    write_four_bits(source, packed, plain)
    device = torch.device("cuda")
    found = outputs(load_network(packed, torch.float32, "sdpa", (device,)), name)
    wanted = outputs(load_network(plain, torch.float32, "sdpa", (device,)), name)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["minicpmv4_6", "minicpmv4_5"])
def test_a_model_over_two_gpus_answers_as_on_one(tmp_path, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    write_tiny_model(tmp_path, name)
    devices = tuple(torch.device("cuda", index) for index in range(2))
    spread = load_network(tmp_path, torch.float32, "sdpa", devices)
    assert {parameter.device for parameter in spread.whole.parameters()} == set(devices)
    whole = load_network(tmp_path, torch.float32, "sdpa", devices[:1])
    for mine, theirs in zip(outputs(spread, name), outputs(whole, name), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
