"""What is experimental is asked for by name, and held against the measured kernels before it is used."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sanrt.errors import BackendError, UsageError
from sanrt.kernels.cuda import selfcheck
from sanrt.kernels.cuda.experimental import VARIABLE, Experiment, requested


def test_nothing_is_experimental_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert requested() == frozenset()
    monkeypatch.setenv(VARIABLE, "soca, attention")
    assert requested() == {Experiment.SOCA, Experiment.ATTENTION}
    assert requested("all") == set(Experiment)
    with pytest.raises(UsageError, match="no experiment 'winograd'; expected cudnn, soca, attention, or all"):
        requested("soca,winograd")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_experiments_that_compute_what_the_measured_kernels_compute_pass(dtype: torch.dtype) -> None:
    errors = selfcheck.check_experiments(set(Experiment), 16, torch.device("cpu"), dtype)
    assert errors.keys() == set(Experiment)


def test_what_is_for_16_bits_is_refused_in_fp32() -> None:
    with pytest.raises(BackendError, match=rf"{VARIABLE}=attention: not in fp32; expected fp16 or bf16"):
        selfcheck.check_experiments({Experiment.SOCA, Experiment.ATTENTION}, 16, torch.device("cpu"), torch.float32)
    assert selfcheck.check_experiments({Experiment.SOCA}, 16, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("wrong", [lambda y: y * 1.01, lambda y: y * float("nan")], ids=["off", "not finite"])
def test_an_experiment_that_computes_something_else_is_refused(
    wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = selfcheck.region_attention

    def experimental_is_wrong(maps: Tensor, regions: int, experimental: bool = False) -> Tensor:
        y: Tensor = attend(maps, regions, experimental)
        return wrong(y) if experimental else y

    monkeypatch.setattr(selfcheck, "region_attention", experimental_is_wrong)
    with pytest.raises(
        BackendError, match=rf"{VARIABLE}=attention: on this GPU its result is (0\.01|nan) from .*leave it out"
    ):
        selfcheck.check_experiments({Experiment.ATTENTION}, 16, torch.device("cpu"), torch.float16)
