"""One step of training: what it changes, what it refuses, and that it can be recorded."""

import copy

import pytest
import torch

from sanrt.model.san import SAN
from sanrt.model.soca import covariance
from sanrt.model.spec import Architecture
from training.learner import AVERAGE, OUTLIER, TEACHING, Learner, distance
from training.network import initialise, soca_gate, upscale
from training.recording import tape

TINY = Architecture(scale=2, groups=1, blocks=1, channels=16, reduction=4)
CPU = torch.device("cpu")


def network(seed=0):
    torch.manual_seed(seed)
    net = SAN(TINY)
    initialise(net)
    return net


@pytest.fixture
def learner():
    made = Learner(network(), CPU, half=False)
    made.rate.fill_(1e-3)
    return made


def batch(seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, 8, 8, generator=random) * 255, torch.rand(2, 3, 16, 16, generator=random) * 255


def test_steps_are_those_of_adam_on_the_parameters_one_by_one(learner):
    net = network()
    trained = [p for name, p in net.named_parameters() if not name.startswith("mean_")]
    adam = torch.optim.Adam(trained, 1e-3, (0.9, 0.99))
    for seed in range(3):
        low, high = batch(seed)
        loss, norm = learner.step(low, high)
        expected = distance(net(low), high) / 255
        adam.zero_grad()
        expected.backward()
        torch.testing.assert_close(norm, torch.stack([p.grad.norm() for p in trained]).norm(), rtol=1e-4, atol=0)
        adam.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    for name, tensor in learner.weights(averaged=False).items():
        torch.testing.assert_close(tensor, net.state_dict()[name], rtol=1e-3, atol=2e-5, msg=name)


def test_the_average_follows_slowly_and_the_mean_shifts_stay(learner):
    before = learner.weights(averaged=True)
    learner.step(*batch())
    raw, average = learner.weights(averaged=False), learner.weights(averaged=True)
    moved = raw["head.weight"] - before["head.weight"]
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(average["head.weight"] - before["head.weight"], (1 - AVERAGE) * moved, rtol=0.02, atol=1e-7)
    assert all(torch.equal(raw[n], before[n]) for n in raw if n.startswith("mean_"))


def test_a_gradient_that_is_not_finite_changes_no_weight(learner):
    learner.step(*batch())
    before = learner.flat.detach().clone()
    low, high = batch(1)
    low[0, 0, 0, 0] = torch.nan
    _, norm = learner.step(low, high)
    assert norm.isnan()
    assert torch.equal(learner.flat.detach(), before)
    assert learner.usual_norm.isfinite()
    learner.rate.fill_(1e-3)
    learner.step(*batch(2))
    assert learner.flat.isfinite().all()
    assert not torch.equal(learner.flat.detach(), before)


def test_only_outliers_are_clipped(learner):
    learner.usual_norm.zero_()  # a usual norm of 1

    def after(norm):
        learner.gradient.fill_(norm / len(learner.gradient) ** 0.5)
        learner.guard(torch.linalg.vector_norm(learner.gradient))
        return torch.linalg.vector_norm(learner.gradient).item()

    assert after(1) == pytest.approx(1, rel=1e-3)
    assert after(2.5) == pytest.approx(2.5, rel=1e-3)
    assert after(100) == pytest.approx(OUTLIER, rel=0.05)
    assert learner.usual_norm < 0.03, "one outlier moved the usual norm"


def test_a_teacher_is_half_of_the_target():
    low, high = batch()
    learner = Learner(network(), CPU, half=False, teacher=network(1))
    with torch.no_grad():
        output, taught = network()(low), network(1)(low)
    expected = (1 - TEACHING) * distance(output, high) + TEACHING * distance(output, taught)
    torch.testing.assert_close(learner.loss(low, high).detach(), expected / 255)


def test_an_offset_counts_twice_and_noise_hardly_more_than_once():
    target = torch.zeros(1, 3, 32, 32)
    assert distance(target + 0.5, target) == 1
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert 1 < distance(noise, target) / noise.abs().mean() < 1.15


def test_pictures_together_have_the_gates_of_the_picture_they_are_parts_of():
    features = torch.rand(3, 16, 8, 6, generator=torch.Generator().manual_seed(0))
    soca = network().groups[0].soca
    whole = torch.cat([features[1], features[2]], 2)[None]
    expected = torch.cat([soca.gate(covariance(features[:1])), *2 * [soca.gate(covariance(whole))]])
    torch.testing.assert_close(soca_gate(soca, features, together=2), expected)
    torch.testing.assert_close(soca_gate(soca, features, together=0), soca.gate(covariance(features)))


def test_bf16_leaves_statistics_and_last_layers_in_float32(monkeypatch):
    net, (low, _) = network(), batch()
    seen = {}
    net.groups[0].soca.down.register_forward_hook(lambda _, given, result: seen.update(gate=given[0].dtype))
    net.tail.register_forward_hook(lambda _, given, result: seen.update(tail=result.dtype))
    net.groups[0].conv.register_forward_hook(lambda _, given, result: seen.update(body=result.dtype))
    output = upscale(net, low, half=True)
    assert output.dtype == torch.float32
    assert seen == {"gate": torch.float32, "tail": torch.float32, "body": torch.bfloat16}
    torch.testing.assert_close(upscale(net, low, half=False), net(low))
    assert 0 < (output - net(low)).abs().max() < 2


def test_the_network_starts_as_a_bilinear_upscaler():
    net = network()
    low = torch.rand(1, 3, 12, 12) * 255
    smooth = torch.nn.functional.interpolate(low, scale_factor=2, mode="bilinear")
    inside = (..., slice(4, -4), slice(4, -4))
    assert (net(low) - smooth)[inside].abs().mean() < 0.05 * (smooth - smooth.mean()).abs().mean() + 5


def test_a_recorded_step_repeats_the_operations_not_the_python():
    total, step = torch.zeros(1), torch.ones(1)
    factor = [1.0]

    def once():
        total.add_(step * factor[0])

    run = tape(once, [total])
    assert total == 0, "recording changed the tensors"
    factor[0] = 100.0
    step.fill_(5)
    run()
    run()
    assert total == 10


def test_a_step_that_reads_a_value_cannot_be_recorded():
    total = torch.zeros(1)
    with pytest.raises(RuntimeError, match="reads values off a tensor"):
        tape(lambda: total.add_(total.sum().item()), [total])


def test_a_whole_step_can_be_recorded_and_gives_the_same_weights():
    plainly, recorded = (Learner(copy.deepcopy(network()), CPU, half=False) for _ in range(2))
    low, high = batch()
    changed = [*recorded.vectors().values(), *recorded.scalars().values(), recorded.rate]
    run = tape(lambda: recorded.step(low, high), changed)
    assert torch.equal(recorded.flat, plainly.flat)
    for seed in range(4):
        for target, value in zip((low, high), batch(seed), strict=True):
            target.copy_(value)
        for each in (plainly, recorded):
            each.rate.fill_(1e-3 * (seed + 1))
        plainly.step(low, high)
        run()
    assert torch.equal(recorded.flat, plainly.flat)
    assert torch.equal(recorded.moment2, plainly.moment2)
