"""The network's end as one convolution, against its layers one after the other."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sanrt.kernels.cpu.tail import EDGES, TAIL_HALO, Edge, Side, Tail, edges  # noqa: E402


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(7, 9), (4, 4), (2, 3), (3, 2)])
def test_the_composed_convolution_and_its_edges_give_what_the_layers_give(live_network, scale, height, width):
    net = live_network(scale=scale)
    tail = Tail({name: tensor.numpy() for name, tensor in net.state_dict().items()}, 16)
    x = torch.randn(1, 16, height, width)
    layers = torch.nn.Sequential(*net.upsampler, net.tail, net.mean_out).double()
    want = layers(x.double())[0].reshape(3, height, scale, width, scale).permute(1, 3, 0, 2, 4).numpy()
    weight, bias = map(torch.from_numpy, tail.composed())
    done = torch.nn.functional.conv2d(x, weight, bias, padding=TAIL_HALO)[0].permute(1, 2, 0).numpy().copy()
    padded = np.pad(x[0].permute(1, 2, 0).numpy(), [(TAIL_HALO, TAIL_HALO), (TAIL_HALO, TAIL_HALO), (0, 0)])
    for edge in edges(tail):
        edge.compute(padded, done)
    np.testing.assert_allclose(done.reshape(want.shape), want, atol=2e-4, rtol=1e-5)


def test_the_edges_are_the_outermost_pixels_each_once():
    counts = np.zeros((5, 7), int)
    for rows, columns in EDGES:
        counts[rows.slice(5), columns.slice(7)] += 1
    inner = np.zeros((5, 7), bool)
    inner[Side.INNER.slice(5), Side.INNER.slice(7)] = True
    np.testing.assert_array_equal(counts, ~inner)


def test_without_their_own_weights_the_outermost_pixels_would_be_wrong(live_network):
    net = live_network(scale=4)
    tail = Tail({name: tensor.numpy() for name, tensor in net.state_dict().items()}, 16)
    inner, corner = tail.composed()[0], tail.composed(Side.FIRST, Side.FIRST)[0]
    assert np.abs(inner - corner).max() > 0.01 * np.abs(inner).max()
    assert Edge(tail, Side.FIRST, Side.INNER).weight.shape == (25 * 16, 48)


def test_the_order_in_which_a_file_holds_the_weights_does_not_matter(live_network):
    weights = {name: tensor.numpy() for name, tensor in live_network(scale=8).state_dict().items()}
    for one, other in zip(Tail(weights, 16).composed(), Tail(dict(reversed(weights.items())), 16).composed(), strict=True):
        np.testing.assert_array_equal(one, other)
