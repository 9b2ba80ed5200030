"""Layers over several devices, and the devices there are."""

import json

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from operators.minicpmv.device import choose_device, choose_devices
from operators.minicpmv.family import find_family
from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.network import network_class, network_config, parts_of
from operators.minicpmv.spread import split_layers, spread_network
from schemas.errors import ConfigError
from tests.operators.loading import CPU, META, features_of, logits_of
from tests.operators.members import MERGERS, RESAMPLERS


def test_the_layers_of_a_model_are_split_by_bytes():
    assert split_layers([10] * 6, 0, 0, 2) == [0, 0, 0, 1, 1, 1]
    assert split_layers([10] * 6, 0, 0, 3) == [0, 0, 1, 1, 2, 2]
    # What the first and the last hold anyway counts: 40 + 20 against 40 + 20.
    assert split_layers([10] * 6, 40, 20, 2) == [0, 0, 1, 1, 1, 1]
    assert split_layers([10] * 6, 500, 20, 2) == [1] * 6
    # MiniCPM-V 4.5 in bf16, in MB: 2.2 GB of tower, resampler and embeddings, 36 layers of 386, a head of 1243.
    assert split_layers([386] * 36, 2230, 1243, 2) == [0] * 17 + [1] * 19
    assert split_layers([386] * 36, 2230, 1243, 4) == [0] * 5 + [1] * 12 + [2] * 11 + [3] * 8


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_layer_has_one_device_and_they_ascend(count):
    sizes = [7, 1, 9, 3, 3, 8, 2, 6]
    places = split_layers(sizes, 5, 4, count)
    assert places == sorted(places)
    assert set(places) <= set(range(count))
    held = [sum(size for size, place in zip(sizes, places, strict=True) if place == own) for own in range(count)]
    held[0] += 5
    held[-1] += 4
    assert max(held) <= sum(held) / count + 2 * max(sizes)


def deeper(made, name, layer_count=6):
    """Return a network of random weights whose text model is large beside its tower."""
    settings = json.loads((made[name] / "config.json").read_text())
    text = settings["text_config"] if name in MERGERS else settings
    text |= {"num_hidden_layers": layer_count, "intermediate_size": 2048}
    text.pop("layer_types", None)
    family = find_family(settings)
    torch.manual_seed(0)
    whole = network_class(family)(network_config(family, settings)).eval()
    whole.tie_weights()
    return parts_of(whole, family)


def owners(value):
    """Yield the device of every tensor in the arguments of a call."""
    if isinstance(value, torch.Tensor):
        yield value.device
    elif isinstance(value, tuple):
        for part in value:
            yield from owners(part)


@pytest.mark.parametrize("name", ["minicpmv4_5", "minicpmv4_0", "minicpmv2_6", "minicpmv4_6"])
def test_tensors_follow_the_layers_to_another_device(made, name):
    """The second device is one that only knows shapes: nothing here has two that compute."""
    network = deeper(made, name)
    spread_network(network, (CPU, META))
    places = [next(layer.parameters()).device for layer in network.text.layers]
    assert places == sorted(places, key=str)
    assert set(places) == {CPU, META}
    held = {key: value.device for key, value in network.whole.named_parameters()}
    assert {device for key, device in held.items() if ".layers." not in key.partition("language_model")[2]} <= {
        CPU,
        META,
    }
    seen = []

    def check(module: nn.Module, args, named):
        own = {parameter.device for parameter in module.parameters()}
        found = {device for value in (*args, *named.values()) for device in owners(value)}
        seen.append(found)
        assert not own or found <= own, f"{type(module).__name__} on {own} is called with tensors on {found}"

    for part in (*network.text.layers.modules(), network.text.norm):
        part.register_forward_pre_hook(check, with_kwargs=True)
    ids = torch.zeros(2, 10, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = DynamicCache(config=network.text.config)
    with torch.inference_mode():
        for step in (ids, ids[:, :1]):
            hidden = network.text(
                inputs_embeds=network.embed(step),
                attention_mask=mask,
                position_ids=mask.cumsum(1)[:, -step.shape[1] :] - 1,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            mask = torch.cat([mask, torch.ones_like(ids[:, :1])], dim=1)
    assert hidden.device == META
    assert {META} in seen
    assert {CPU} in seen
    with torch.inference_mode():
        if name in RESAMPLERS:
            assert network.logits(hidden).device == META
            return
        # A tied head stays where the embeddings are, and asks for what this device does not have.
        assert network.head.weight.device == CPU
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            network.logits(hidden)


@pytest.mark.parametrize("name", ["minicpmv4_5", "minicpmv4_6"])
def test_a_spread_model_answers_as_one_in_one_piece(made, name):
    whole, parts = (
        MiniCPMV(made[name], device=CPU, dtype=torch.float32, attention="sdpa", more_devices=more)
        for more in ((), (CPU, CPU))
    )
    assert torch.equal(logits_of(whole.network), logits_of(parts.network))
    assert torch.equal(features_of(whole.network, name), features_of(parts.network, name))


def test_a_last_device_without_layers_gets_what_the_others_made(made):
    network = deeper(made, "minicpmv4_5", layer_count=1)
    spread_network(network, (CPU, CPU, META))
    assert {parameter.device for parameter in network.text.layers.parameters()} == {CPU}
    with torch.inference_mode():
        hidden = network.text(inputs_embeds=network.embed(torch.zeros(1, 5, dtype=torch.int64))).last_hidden_state
    assert hidden.device == META


def test_nothing_that_crossed_is_kept_after_a_pass(made):
    network = deeper(made, "minicpmv4_5")
    spread_network(network, (CPU, META))
    brought = [
        hook.brought
        for layer in network.text.layers
        for hook in layer._forward_pre_hooks.values()
        if hasattr(hook, "brought")
    ]
    assert len(brought) == len(network.text.layers)
    counts = []

    def run():
        with torch.inference_mode():
            network.text(inputs_embeds=network.embed(torch.zeros(1, 5, dtype=torch.int64)))

    def break_off(*_):
        counts.append(len(brought[-1]))
        raise MemoryError

    handle = network.text.layers[-1].register_forward_pre_hook(break_off)
    for _ in range(2):
        with pytest.raises(MemoryError):
            run()
    # Hidden states, positions, cosines and sines: what the first pass left behind is gone in the second.
    assert counts == [4, 4]
    handle.remove()
    run()
    assert all(kept == {} for kept in brought)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_cpu_is_one_device_and_a_gpu_that_is_not_here_is_refused():
    assert choose_devices("auto", 4) == (CPU,)
    assert choose_devices("cpu", 1) == (choose_device("cpu"),)
    with pytest.raises(ConfigError, match="finds none"):
        choose_devices("cuda", 2)
