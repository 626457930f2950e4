"""LHSPG, the LoRA half-space projected gradient (LoRAShear, arXiv 2310.18356): training that brings whole prune units to zero."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..errors import PlanError, UsageError
from ..groups import Groups
from ..passes.selection import Selection, lanes_of, select
from ..plan import PrunePlan
from .adapters import factors_of, find_adapters, refuse_unknown
from .arguments import check_scores, check_settings, check_target, parameters_of, refuse_closures, refuse_sharded, trained_by
from .projection import Redundant, Slice
from .saliency import CRITERIA, by_parameter, check_weights, moments, saliency
from .units import Part, Structure, find_structures, without_adapters

STATE = "lhspg"
"""Where `LHSPG.state_dict` keeps what is not the wrapped optimizer's."""


class LHSPG(torch.optim.Optimizer):
    """An optimizer of LoRA variables under which the least salient prune units of the base model go to zero, period by period.

    Warm-up steps are the wrapped optimizer's alone. At the start of each of the periods that follow, every unit of every eligible
    group gets a saliency, and the least salient ones become redundant, so many that after period ``p`` of ``P`` the share ``p / P``
    of the target is reached. Redundant units are zero when the period ends and stay so; all others go on training. The base
    weights that shrink need no gradient: the update ``s B A`` of their adapters stands in for it. Weights that the wrapped
    optimizer trains itself have their own (training without adapters works).

    An eligible group is one whose units zeros can remove (no norm, softmax or router looks at all of them), with an adapter or a
    trained weight among its members; `left_out` has the others. It takes the wrapped optimizer's place everywhere: learning-rate
    schedulers, ``zero_grad``, ``state_dict``.

    Args:
        optimizer: Of the adapters, or of any parameters.
        gm: What `fxprune.trace` made of the model with its adapters; its parameters are the model's.
        groups: What `fxprune.find_groups` returned for ``gm``.
        ratio: Share of the base model's parameters to remove; adapters do not count.
        selection: Instead of ``ratio``, a target with constraints: of a share of all parameters with ``ranking="global"``, or of a
            share of units.
        protect: With ``ratio``: names or patterns of groups and blocks that stay whole.
        warmup: Steps before the first period.
        periods: How many.
        period_steps: Steps of each.
        projection: ``half-space``, or ``linear`` (see `fxprune.lorashear.projection`).
        penalty: The ``lambda`` of the half-space step.
        epsilon: The ``eps`` of the half-space test, in [0, 1).
        saliency: Weights of the criteria (see `fxprune.lorashear.saliency`).
        scores: In place of saliency: importance of every unit, as `fxprune.score` returns it. What matters least by parameter goes
            first.

    Attributes:
        inner: The wrapped optimizer.
        left_out: Why each group that is not eligible is left alone.
        bare: The groups without what adapters add, prunable only where eligible: what a selection sees.
        history: One entry for each period begun: ``step``, ``target`` (the share of the selection's target), ``units`` (how many
            became redundant), ``kinds`` (how many of each kind), ``saliency`` (of the least and of the most salient one of them,
            and the mean of all units that stay) and ``removed`` (the share of the base model's parameters in redundant units).

    Raises:
        UsageError: Arguments that make no sense, groups of another graph, parameters on the meta device or sharded (FSDP), an
            optimizer that trains nothing in the graph, adapters of an unknown kind, or no eligible group.
        PlanError: The target cannot be reached.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        gm: GraphModule,
        groups: Groups,
        *,
        ratio: float | None = None,
        selection: Selection | None = None,
        protect: Sequence[str] = (),
        warmup: int = 100,
        periods: int = 4,
        period_steps: int = 50,
        projection: str = "half-space",
        penalty: float = 1e-3,
        epsilon: float = 0.0,
        saliency: Mapping[str, float] | None = None,
        scores: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UsageError(f"expected a torch.optim.Optimizer to wrap, got {type(optimizer).__name__}")
        refuse_closures(optimizer)
        self._settings = check_settings(warmup, periods, period_steps, projection, penalty, epsilon)
        if scores is not None and saliency is not None:
            raise UsageError("scores= stand in place of saliency: leave saliency= out")
        self._weights = check_weights(dict.fromkeys(CRITERIA, 1.0) if saliency is None else saliency)
        self._selection = check_target(ratio, selection, protect)
        refuse_sharded(optimizer, gm)
        self._tensors = parameters_of(gm, groups)
        trained = trained_by(optimizer, self._tensors)
        adapters = find_adapters(gm)
        factors = factors_of(adapters)
        refuse_unknown(groups, factors, trained)
        self.groups = groups
        self._structures, self.left_out = find_structures(groups, adapters, trained)
        if not self._structures:
            raise UsageError(
                f"no prune group can be brought to zero; '{next(iter(self.left_out), '')}' for one: "
                f"{next(iter(self.left_out.values()), 'there is none')}"
            )
        self.bare = without_adapters(groups, self._structures, self.left_out, factors)
        compared = {name for names in lanes_of(self.bare, self._selection).values() for name in names}
        self._structures = {name: structure for name, structure in self._structures.items() if name in compared}
        self._scores = None if scores is None else check_scores(scores, {n: s.group.size for n, s in self._structures.items()})
        try:
            select(self.bare, {n: torch.ones(s.group.size) for n, s in self._structures.items()}, self._selection)
        except PlanError as error:
            out = [name for names in self.idle().values() for name in names]
            if not out:
                raise
            raise PlanError(f"{error}; LHSPG takes nothing of '{out[0]}' ({self.left_out[out[0]]})") from error
        self._step = 0
        self._gone: dict[str, Tensor] = {}
        self._active: dict[str, Redundant] = {}
        self._held: list[Slice] = []
        self.history: list[dict[str, Any]] = []
        self.inner = optimizer
        optimizer.register_load_state_dict_post_hook(lambda _: self._join())  # its groups are other ones then
        super().__init__([{"params": [p for group in optimizer.param_groups for p in group["params"]]}], optimizer.defaults)
        self._join()

    def idle(self) -> dict[str, list[str]]:
        """Groups of the kinds that are wanted, prunable but not eligible, by kind; `left_out` says why."""
        found: dict[str, list[str]] = {}
        for name in self.left_out:
            group = self.groups[name]
            if group.prunable and self._selection.pace.get(group.kind, 0) > 0:
                found.setdefault(group.kind, []).append(name)
        return found

    @property
    def done(self) -> bool:
        """True once all periods are over; further steps train what is left."""
        steps: int = self._settings["warmup"] + self._settings["periods"] * self._settings["period_steps"]
        return self._step >= steps

    @property
    def eligible(self) -> tuple[str, ...]:
        """Names of the groups that may lose units."""
        return tuple(self._structures)

    @property
    def redundant(self) -> dict[str, Tensor]:
        """The units of each group that are zero or on their way, rising LongTensors."""
        return _union(self._gone, {name: active.units for name, active in self._active.items()})

    @property
    def zero(self) -> dict[str, Tensor]:
        """The units of each group that are zero, rising LongTensors."""
        return _union(self._gone, {n: a.units[~a.alive.cpu()] for n, a in self._active.items() if not bool(a.alive.all())})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the wrapped optimizer, and one of the redundant units towards zero.

        Args:
            closure: Evaluates the model again and returns the loss; called once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = self._step - self._settings["warmup"]
        period, within = divmod(place, self._settings["period_steps"])
        working = place >= 0 and period < self._settings["periods"]
        if working and within == 0:
            self._begin(period)
        for active in self._active.values():
            active.remember()
        self.inner.step()
        with torch.no_grad():
            for own in self._held:
                own.clear()
        if working:
            self._shrink(self._settings["period_steps"] - within)
        self._step += 1
        return loss

    def plan(self) -> PrunePlan:
        """What to remove now: the units that are zero. The rewrite by it changes no output.

        Raises:
            UsageError: No unit is zero yet.
        """
        zero = self.zero
        if not zero:
            begin = self._settings["warmup"]
            raise UsageError(f"no unit is zero after step {self._step}: the first period begins after {begin} steps")
        recipe = {
            **self._selection.to_json(),
            "optimizer": "lhspg",
            **self._settings,
            "saliency": self._ranked(),
            "steps": self._step,
            "removed": round(self._removed(zero), 6),
        }
        return PrunePlan.from_removed(self.groups, zero, recipe=recipe)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Hand more parameters to the wrapped optimizer; weights of the graph among them would be no part of the method."""
        if not hasattr(self, "_joined"):  # the base class's constructor: they are the wrapped optimizer's
            super().add_param_group(param_group)
            return
        self.inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and, under ``"lhspg"``, the rest: tensors and plain data.

        Frozen weights that are shrinking are in it too, so that it and what is trained are all that a run needs to go on. Hooks
        that were registered on it are called, as `torch.optim.Optimizer.state_dict` does.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        active = {
            name: {
                "units": own.units.clone(),
                "alive": own.alive.cpu().clone(),
                "values": {s.part.key: s.values() for s in own.slices if not s.part.trained},
            }
            for name, own in self._active.items()
        }
        own = {
            "settings": {**self._settings, "selection": self._selection.to_json(), "saliency": self._ranked()},
            "fingerprint": self.groups.fingerprint(),
            "step": self._step,
            "zero": {name: units.clone() for name, units in self._gone.items()},
            "active": active,
            "history": [dict(entry) for entry in self.history],
        }
        made = {**self.inner.state_dict(), STATE: own}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, made)
            made = made if changed is None else changed
        return made

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken: also sets the base weights of redundant units. Calls the hooks registered on it.

        Args:
            state_dict: From an optimizer of the same model with the same settings.

        Raises:
            UsageError: It is another optimizer's, another model's, or was taken with other settings.
        """
        state_dict = state_dict.copy()  # a hook may change it
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        rest = {key: value for key, value in state_dict.items() if key != STATE}
        own = state_dict.get(STATE)
        if own is None:
            raise UsageError("this is no state of LHSPG: it has no entry 'lhspg'")
        if lacking := [name for name in ("settings", "fingerprint", "step", "zero", "active", "history") if name not in own]:
            raise UsageError(f"the state of LHSPG is not whole: it has no '{lacking[0]}'")
        if own["fingerprint"] != self.groups.fingerprint():
            raise UsageError(
                f"the state is of another model (fingerprint {own['fingerprint']}, this model has {self.groups.fingerprint()}): "
                "parameter names or shapes differ"
            )
        mine = {**self._settings, "selection": self._selection.to_json(), "saliency": self._ranked()}
        for name, value in own["settings"].items():
            if mine.get(name) != value:
                raise UsageError(f"the state was taken with {name}={value!r}, and this optimizer has {name}={mine.get(name)!r}")
        if foreign := [name for name in (*own["active"], *own["zero"]) if name not in self._structures]:
            raise UsageError(f"the state has units of '{foreign[0]}', which this optimizer takes none of")
        self.inner.load_state_dict(cast(Any, rest))
        self._join()
        self._step, self.history = own["step"], [dict(entry) for entry in own["history"]]
        self._gone, self._active = {}, {}
        for name, found in own["active"].items():
            active = Redundant(self._structures[name], found["units"].clone(), found["alive"].clone())
            for slice_ in active.slices:
                if slice_.part.key in found["values"]:
                    slice_.put(found["values"][slice_.part.key])
            self._active[name] = active
        self._retire({name: units.clone() for name, units in own["zero"].items()})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be copied or pickled.

        Raises:
            UsageError: Always: it belongs to its model's parameters.
        """
        raise UsageError("an LHSPG belongs to its model's parameters: keep its state_dict(), and load that into one made anew")

    def _join(self) -> None:
        """Share groups and state with the wrapped optimizer: who changes a learning rate there changes it here."""
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self._joined = True

    @torch.no_grad()
    def _begin(self, period: int) -> None:
        """Choose what becomes redundant in a period."""
        share = (period + 1) / self._settings["periods"]
        chosen, values = self._choose(share)
        kinds: dict[str, int] = {}
        for name, units in chosen.items():
            self._active[name] = Redundant(self._structures[name], units)
            kinds[self.groups[name].kind] = kinds.get(self.groups[name].kind, 0) + len(units)
        going = torch.cat([values[name][units] for name, units in chosen.items()]) if chosen else torch.zeros(1)
        every = torch.cat(list(values.values()))
        stay = (float(every[every >= 0].sum()) - float(going.sum())) / max(1, int((every >= 0).sum()) - sum(kinds.values()))
        entry = {"step": self._step, "target": share, "units": sum(kinds.values()), "kinds": kinds}
        entry["saliency"] = {"least": float(going.min()), "most": float(going.max()), "mean_of_the_rest": stay}
        self.history.append({**entry, "removed": self._removed(self.redundant)})

    def _choose(self, share: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(the units to go next, the saliency of all): the least salient that the selection takes, up to a share of its target."""
        per_unit = {name: self.bare[name].parameters_per_unit for name in self._structures}
        if self._scores is None:
            found = {name: moments(structure, self._tensors) for name, structure in self._structures.items()}
            values = saliency(found, self._weights, self._gone)
        else:
            values = by_parameter(self._scores, per_unit, self._gone)
        # A selection divides by the parameters that go with a unit: what ranks is the values.
        scores = {name: value * per_unit[name] for name, value in values.items()}
        chosen = select(self.bare, scores, self._selection).removed()
        fresh = [
            (value, name, unit)
            for name, units in chosen.items()
            for value, unit in zip(values[name][units].tolist(), units.tolist(), strict=True)
            if value >= 0  # the others are zero already
        ]
        fresh.sort(key=lambda entry: entry[0])
        low, high = (0, len(fresh)) if share < 1 else (len(fresh), len(fresh))
        target = share * self._removed(chosen)
        while low < high:  # the longest part of them that does not exceed the target
            middle = (low + high + 1) // 2
            if self._removed(_union(self._gone, _gathered(fresh[:middle]))) <= target + 1e-12:
                low = middle
            else:
                high = middle - 1
        return _gathered(fresh[:low]), values

    def _ranked(self) -> dict[str, float] | str:
        """What ranks units, as plain data: the weights of saliency, or which scores were given."""
        if self._scores is None:
            return dict(self._weights)
        digest = hashlib.sha256(b"".join(name.encode() + own.numpy().tobytes() for name, own in sorted(self._scores.items())))
        return f"scores {digest.hexdigest()[:16]}"

    def _removed(self, units: Mapping[str, Tensor]) -> float:
        """The share of the base model's parameters that goes with units."""
        counts = {name: self.groups[name].size - len(own) for name, own in units.items()}
        return 1 - self.bare.remaining(counts) / self.bare.total

    def _shrink(self, left: int) -> None:
        """The redundant units' step."""
        rates = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        common = float(self.param_groups[0]["lr"])

        def lr_of(part: Part) -> float:
            guide = self._tensors[part.adapters[0].b] if part.adapters and not part.trained else part.tensor
            return rates.get(id(guide), common)

        for active in self._active.values():
            active.hold()
        for active in self._active.values():
            if self._settings["projection"] == "linear":
                active.linear(left)
            else:
                active.half_space(left, self._settings["penalty"], self._settings["epsilon"], lr_of, self._tensors)
        if left == 1:
            units = {name: active.units for name, active in self._active.items()}
            self._active = {}
            self._retire(units)

    @torch.no_grad()
    def _retire(self, units: Mapping[str, Tensor]) -> None:
        """Units are zero from now on; whatever the wrapped optimizer may move of them is set to zero after each of its steps."""
        self._gone = _union(self._gone, units)
        whole = [s for name, own in self._gone.items() for s in _slices(self._structures[name], own)]
        for own in whole:
            own.clear()
        self._held = [own for own in whole if own.part.trained]


def _slices(structure: Structure, units: Tensor) -> Iterator[Slice]:
    for part in (*structure.parts, *structure.followers):
        yield Slice(part, units, structure.group.size)


def _gathered(entries: Sequence[tuple[float, str, int]]) -> dict[str, Tensor]:
    """Units by group, rising."""
    found: dict[str, list[int]] = {}
    for _, name, unit in entries:
        found.setdefault(name, []).append(unit)
    return {name: torch.tensor(sorted(units)) for name, units in found.items()}


def _union(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Units of each group that are in either."""
    none = torch.empty(0, dtype=torch.long)
    return {name: torch.unique(torch.cat([one.get(name, none), other.get(name, none)])) for name in {**one, **other}}
