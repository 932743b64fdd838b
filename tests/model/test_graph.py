"""The written ONNX graph against the reference network."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from sanrt.model.graph import san_model
from sanrt.model.spec import Attention, GraphOptions, ModelSpec


def session_of(net, options=None):
    weights = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    spec = ModelSpec(net.arch, "0" * 64, "seeded", net.arch.sqrt_iterations)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(san_model(spec, weights, options).SerializeToString(), settings)


VARIANTS = {
    "exported": GraphOptions(),
    "multi-head": GraphOptions(attention=Attention.MULTI_HEAD),
    "padded": GraphOptions(attention_width=16),
    "padded multi-head": GraphOptions(attention_width=16, attention=Attention.MULTI_HEAD),
    "9 regions": GraphOptions(regions=3),
    "1 region": GraphOptions(regions=1, attention=Attention.MULTI_HEAD),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_every_variant_computes_the_reference_network(live_network, scale, variant):
    net, options = live_network(scale), VARIANTS[variant]
    net.attention.regions = options.regions
    session = session_of(net, options)
    for batch, height, width in ((1, 6, 6), (2, 7, 9), (1, 17, 23)):
        picture = np.random.default_rng(0).uniform(0, 255, (batch, 3, height, width)).astype(np.float32)
        reference = net(torch.from_numpy(picture)).numpy()
        assert np.abs(session.run(None, {"input": picture})[0] - reference).max() < 1e-3


@pytest.mark.parametrize("iterations", [1, 2, 3, 9])
def test_the_graph_has_as_many_steps_as_the_spec_says(live_network, iterations):
    picture = np.random.default_rng(1).uniform(0, 255, (1, 3, 10, 12)).astype(np.float32)
    reference = live_network(sqrt_iterations=iterations)(torch.from_numpy(picture)).numpy()
    error = {
        n: np.abs(session_of(live_network(sqrt_iterations=n)).run(None, {"input": picture})[0] - reference).max()
        for n in (1, 2, 3, 9)
    }
    assert error[iterations] < 1e-3
    assert min(error, key=error.get) == iterations


@pytest.mark.parametrize(("value", "size"), [(0, (5, 7)), (255, (4, 4))])
def test_constant_pictures_are_finite_and_right(live_network, value, size):
    net, picture = live_network(), np.full((1, 3, *size), value, np.float32)
    output = session_of(net).run(None, {"input": picture})[0]
    assert np.abs(output - net(torch.from_numpy(picture)).numpy()).max() < 1e-3
