"""LHSPG in a training loop: its state goes on bit for bit, and it is an optimizer like any other to what is around it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import fxprune
from fxprune import LHSPG
from fxprune.errors import UsageError

from .shearing import ALL, IDS, batch, fresh, named, train, trained
from .zoo import build

SETTINGS: dict[str, Any] = {"ratio": 0.2, "warmup": 3, "periods": 3, "period_steps": 4}
STEPS = 18


def made(targets: tuple[str, ...] | None = ALL, **more: Any) -> tuple[Any, LHSPG]:
    model, gm, groups = fresh(targets=targets)
    inner = torch.optim.AdamW(trained(model), lr=5e-3)
    return model, LHSPG(inner, gm, groups, **{**SETTINGS, **more})


def parameters(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("stop", [0, 2, 3, 5, 7, 9, 14, 15, 17])
@pytest.mark.parametrize("projection", ["half-space", "linear"])
def test_an_interrupted_run_goes_on_bit_for_bit(stop: int, projection: str) -> None:
    """What is kept is the optimizer's state and what is trained: the frozen weights begin as they were."""
    options: dict[str, Any] = {"projection": projection, "penalty": 40.0}
    model, whole = made(**options)
    losses = train(model, whole, STEPS)
    expected, history, zero = parameters(model), whole.history, whole.zero
    model, first = made(**options)
    train(model, first, stop)
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "trained": {n: p for n, p in model.named_parameters() if p.requires_grad}}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    model, second = made(**options)
    with torch.no_grad():
        for name, values in state["trained"].items():
            model.get_parameter(name).copy_(values)
    second.load_state_dict(state["optimizer"])
    assert train(model, second, STEPS - stop, start=stop) == losses[stop:]
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
    assert second.history == history
    assert {n: u.tolist() for n, u in second.zero.items()} == {n: u.tolist() for n, u in zero.items()}
    assert second.done


@pytest.mark.parametrize("stop", [5, 7, 14])
def test_frozen_factors_that_shrink_are_kept(stop: int) -> None:
    """A second adapter that is active and not trained."""

    def begun() -> tuple[Any, LHSPG]:
        model = copy.deepcopy(two)
        gm = fxprune.trace(model, IDS)
        return model, LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, fxprune.find_groups(gm), **SETTINGS)

    two: Any = get_peft_model(build("llama"), LoraConfig(r=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")).eval()
    two.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    two.base_model.set_adapter(["default", "second"])
    for name, parameter in two.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05)
        parameter.requires_grad_("lora_" in name and ".second" not in name)
    model, whole = begun()
    train(model, whole, STEPS)
    expected = parameters(model)
    model, first = begun()
    train(model, first, stop)
    state, kept = (
        copy.deepcopy(first.state_dict()),
        {n: p for n, p in parameters(model).items() if model.get_parameter(n).requires_grad},
    )
    model, second = begun()
    model.load_state_dict(kept, strict=False)
    second.load_state_dict(state)
    train(model, second, STEPS - stop, start=stop)
    assert [n for n, p in model.named_parameters() if not torch.equal(p, expected[n])] == []


def test_training_without_adapters_goes_on_bit_for_bit() -> None:
    model, whole = made(None)
    train(model, whole, STEPS)
    expected = parameters(model)
    model, first = made(None)
    train(model, first, 9)
    state, weights = first.state_dict(), parameters(model)
    state = {**state, "state": {k: {n: t.clone() for n, t in v.items()} for k, v in state["state"].items()}}
    model, second = made(None)
    model.load_state_dict(weights, strict=False)
    second.load_state_dict(state)
    train(model, second, STEPS - 9, start=9)
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())


def test_loading_its_own_state_changes_nothing() -> None:
    """Libraries that move an optimizer to another device do this."""
    model, optimizer = made()
    train(model, optimizer, 9)
    before = parameters(model)
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    losses = train(model, optimizer, STEPS - 9, start=9)
    again, straight = made()
    assert train(again, straight, STEPS)[9:] == losses


def test_a_state_that_does_not_fit_is_refused() -> None:
    _, optimizer = made()
    state = optimizer.state_dict()
    with pytest.raises(UsageError, match="this is no state of LHSPG: it has no entry 'lhspg'"):
        optimizer.load_state_dict(optimizer.inner.state_dict())
    _, other = made(periods=2)
    with pytest.raises(UsageError, match="the state was taken with periods=3, and this optimizer has periods=2"):
        other.load_state_dict(state)
    _, weighed = made(scores={name: torch.ones(group.size) for name, group in optimizer.groups.items()})
    with pytest.raises(
        UsageError, match=r"the state was taken with saliency=\{.*\}, and this optimizer has saliency='scores \w{16}'"
    ):
        weighed.load_state_dict(state)
    for lacking in ("step", "active"):
        with pytest.raises(UsageError, match=f"the state of LHSPG is not whole: it has no '{lacking}'"):
            optimizer.load_state_dict({**state, "lhspg": {n: v for n, v in state["lhspg"].items() if n != lacking}})
    with pytest.raises(UsageError, match="the state has units of 'elsewhere', which this optimizer takes none of"):
        optimizer.load_state_dict({**state, "lhspg": {**state["lhspg"], "zero": {"elsewhere": torch.tensor([0])}}})
    _, bare = made(None)
    with pytest.raises(UsageError, match=r"the state is of another model \(fingerprint \w+, this model has \w+\)"):
        bare.load_state_dict(state)


@pytest.mark.parametrize("around", ["outer", "inner"])
def test_learning_rate_schedulers(around: str) -> None:
    model, optimizer = made()
    wrapped = optimizer if around == "outer" else optimizer.inner
    scheduler = torch.optim.lr_scheduler.LambdaLR(wrapped, lambda step: 1 / (1 + step))
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        def after(step: int) -> None:
            rates.append(optimizer.inner.param_groups[0]["lr"])
            scheduler.step()

        train(model, optimizer, 4, after=after)
    assert rates == pytest.approx([5e-3, 5e-3 / 2, 5e-3 / 3, 5e-3 / 4])
    assert optimizer.param_groups is optimizer.inner.param_groups


def test_a_state_that_the_wrapped_optimizer_loads_itself() -> None:
    """It has other groups then: a scheduler of either still changes the rate that trains."""
    model, optimizer = made()
    train(model, optimizer, 2)
    optimizer.inner.load_state_dict(copy.deepcopy(optimizer.inner.state_dict()))
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert optimizer.state is optimizer.inner.state
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, 2, start=2, after=lambda _: scheduler.step())
    assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(5e-3 / 3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_it_is_not_copied(duplicate: Any) -> None:
    _, optimizer = made()
    with pytest.raises(UsageError, match=r"an LHSPG belongs to its model's parameters: keep its state_dict\(\), and load that"):
        duplicate(optimizer)


def test_a_part_of_the_trial_goes_at_the_rate_of_its_adapter() -> None:
    """With a huge penalty every redundant unit leaves the half-space at once, unless its learning rate is zero."""
    for rate in (0.0, 0.1):
        model, gm, groups = fresh()
        mlp = [p for n, p in model.named_parameters() if p.requires_grad and ".mlp." in n]
        rest = [p for n, p in model.named_parameters() if p.requires_grad and ".mlp." not in n]
        inner = torch.optim.SGD([{"params": rest, "lr": 0.1}, {"params": mlp, "lr": rate}])
        optimizer = LHSPG(inner, gm, groups, penalty=1e9, **SETTINGS)
        train(model, optimizer, 4)
        assert named(groups, "ffn", 0) in optimizer.redundant
        assert (named(groups, "ffn", 0) in optimizer.zero) == (rate > 0)


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    model, optimizer = made()
    calls = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        calls.append(float(loss.detach()))
        return calls[-1]

    found = [optimizer.step(closure) for _ in range(5)]
    assert found == calls
    assert len(calls) == 5
    assert optimizer.redundant


def test_it_is_an_optimizer_with_the_parameters_of_the_other() -> None:
    model, optimizer = made()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in trained(model)]
    train(model, optimizer, 1)
    assert optimizer.state is optimizer.inner.state
    assert len(optimizer.state) == len(trained(model))
    more = torch.nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [more], "lr": 0.5})
    assert optimizer.inner.param_groups[-1]["lr"] == optimizer.param_groups[-1]["lr"] == 0.5
    model(**batch()).loss.backward()
    more.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    assert more.grad is None
    assert bool((more < 0).all())


def test_hooks_of_a_state_are_called_as_torch_calls_them() -> None:
    _, first = made()
    _, second = made()
    called: list[str] = []

    def note(of: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        called.append("saved")
        return {**state, "note": "mine"}

    def drop(of: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        called.append(f"found {state.pop('note')}")

    first.register_state_dict_pre_hook(lambda of: called.append("saving"))
    first.register_state_dict_post_hook(note)
    second.register_load_state_dict_pre_hook(drop)
    second.register_load_state_dict_post_hook(lambda of: called.append(f"loaded by {type(of).__name__}"))
    state = first.state_dict()
    second.load_state_dict(state)
    assert called == ["saving", "saved", "found mine", "loaded by LHSPG"]
    assert state["note"] == "mine"  # a hook changes a copy
