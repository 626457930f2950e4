"""Why two parameters go together: paths, directions and the texts of refusals."""

from __future__ import annotations

from itertools import pairwise

import pytest

from fxprune import coupling
from fxprune.coupling import Step, coupling_graph, shared_groups, triggers, why
from fxprune.errors import UsageError
from fxprune.groups import Groups

from .coupled import L0, L1, conv_groups, gpt2_groups, llama_groups, mlp_groups


@pytest.fixture(scope="module")
def zoo() -> dict[str, Groups]:
    return {"llama": llama_groups(2), "gpt2": gpt2_groups(), "mlp": mlp_groups(), "conv": conv_groups()}


@pytest.fixture(scope="module")
def llama(zoo: dict[str, Groups]) -> Groups:
    return zoo["llama"]


@pytest.fixture(scope="module")
def mlp(zoo: dict[str, Groups]) -> Groups:
    return zoo["mlp"]


def follows(steps: list[Step]) -> bool:
    """True if each step begins where the last one ended, and all are of one group."""
    joined = all(a.target == b.source for a, b in pairwise(steps))
    return joined and len({s.group for s in steps}) == 1


def test_gate_and_down_are_tied_by_the_product_of_gate_and_up(llama: Groups) -> None:
    steps = why(llama, L0 + "mlp.gate_proj.weight", L0 + "mlp.down_proj.weight")
    assert follows(steps)
    assert {s.group for s in steps} == {"model.layers.0.mlp.ffn"}
    assert [s.rule for s in steps] == ["linear", "pointwise", "pointwise", "linear"]
    assert [s.module.removeprefix(L0) for s in steps] == ["mlp.gate_proj", "mlp.act_fn", "mlp", "mlp.down_proj"]
    assert {s.direction for s in steps} == {"forward"}
    assert steps[0].source == L0 + "mlp.gate_proj.weight[0]"
    assert steps[-1].target == L0 + "mlp.down_proj.weight[1]"


def test_gate_and_up_go_forward_to_where_they_meet_and_back(llama: Groups) -> None:
    steps = why(llama, L0 + "mlp.gate_proj.weight", L0 + "mlp.up_proj.weight", group=L0 + "mlp.ffn")
    assert [s.direction for s in steps] == ["forward"] * 3 + ["backward"] * 2
    assert steps[2].operator == steps[3].operator == steps[2].target
    assert steps[2].target.startswith("mul")


def test_the_way_back_is_the_way_there_turned_around(llama: Groups) -> None:
    there = why(llama, L0 + "mlp.gate_proj.weight", L0 + "mlp.down_proj.weight")
    back = why(llama, L0 + "mlp.down_proj.weight", L0 + "mlp.gate_proj.weight")
    assert [(s.source, s.target) for s in there] == [(s.target, s.source) for s in reversed(back)]
    assert {s.direction for s in back} == {"backward"}


@pytest.mark.parametrize("kind", ["kv_heads", "query_groups"])
def test_queries_and_output_are_tied_through_attention(llama: Groups, kind: str) -> None:
    steps = why(llama, L0 + "self_attn.q_proj.weight", L0 + "self_attn.o_proj.weight", group=f"{L0}self_attn.{kind}")
    assert follows(steps)
    assert steps[0].source == L0 + "self_attn.q_proj.weight[0]"
    assert steps[-1].target == L0 + "self_attn.o_proj.weight[1]"
    assert {s.direction for s in steps} == {"forward"}
    assert {"linear", "view", "transpose", "attention"} <= {s.rule for s in steps}


def test_keys_and_values_meet_in_attention(llama: Groups) -> None:
    steps = why(llama, L0 + "self_attn.k_proj.weight", L0 + "self_attn.v_proj.weight", group=L0 + "self_attn.kv_heads")
    turn = next(i for i, s in enumerate(steps) if s.direction == "backward")
    assert steps[turn - 1].operator == steps[turn].operator
    assert steps[turn].rule == "attention"
    assert "query_groups" not in {s.group for s in steps}


def test_query_groups_do_not_reach_keys(llama: Groups) -> None:
    with pytest.raises(UsageError, match="does not run through both"):
        why(llama, L0 + "self_attn.q_proj.weight", L0 + "self_attn.k_proj.weight", group=L0 + "self_attn.query_groups")


def test_contracted_activations_couple_with_each_other(llama: Groups) -> None:
    graph = coupling_graph(llama)
    attention = next(n for n in graph if n.startswith("scaled_dot_product_attention"))
    across = [(a, b, d) for a, b, d in graph.edges(data=True) if d["operator"] == attention and attention not in (a, b)]
    assert {d["group"] for _, _, d in across} == {"model.layers.head_dim"}  # the rotary pairs, contracted in q k^T
    assert sorted(d["direction"] for _, _, d in across) == ["backward", "forward"]


def test_the_hidden_size_ties_the_embedding_to_every_norm(llama: Groups) -> None:
    norms = [n for n in llama.parameters if "norm" in n]
    assert len(norms) == 5
    for norm in norms:
        assert shared_groups(llama, "model.embed_tokens.weight", norm) == ["model.hidden"]
        steps = why(llama, "model.embed_tokens.weight", norm)
        assert follows(steps)
        assert steps[0].rule == ("linear" if norm == "model.norm.weight" else "embedding")  # the tied head is nearer to the last
        assert steps[-1].target == norm + "[0]"
        assert steps[-1].direction == "backward"


def test_layers_are_tied_by_the_hidden_size_alone(llama: Groups) -> None:
    one, other = L0 + "mlp.gate_proj.weight", L1 + "mlp.gate_proj.weight"
    assert shared_groups(llama, one, other) == ["model.hidden"]
    steps = why(llama, one, other)
    assert follows(steps)
    assert (steps[0].source, steps[-1].target) == (one + "[1]", other + "[1]")
    assert any(s.rule == "pointwise" and s.operator.startswith("add") for s in steps)  # over the residual stream
    assert not any("down_proj" in s.module for s in steps)  # and not through a matrix, which has another axis inside


def test_rotary_pairs_tie_layers_through_a_buffer(llama: Groups) -> None:
    one, other = L0 + "self_attn.q_proj.weight", L1 + "self_attn.k_proj.weight"
    assert shared_groups(llama, one, other) == ["model.hidden", "model.layers.head_dim"]
    steps = why(llama, one, other, group="model.layers.head_dim")
    assert follows(steps)
    buffer = next(m.name for m in llama["model.layers.head_dim"].members if not m.trainable)
    assert why(llama, one, buffer)[-1].target == buffer + "[0]"


def test_a_tie_is_a_step_of_its_own(llama: Groups) -> None:
    (tie,) = why(llama, "lm_head.weight", "model.embed_tokens.weight")
    assert tie.rule == "tied"
    first, *rest = why(llama, "lm_head.weight", "model.norm.weight")
    assert str(first) == "lm_head.weight[1] is model.embed_tokens.weight[1] (tied weights; group model.hidden)"
    assert follows([first, *rest])
    *rest, last = why(llama, "model.norm.weight", "lm_head.weight")
    assert last.target == "lm_head.weight[1]"
    assert follows([*rest, last])


def test_fused_projections_are_followed_through_split(zoo: dict[str, Groups]) -> None:
    attn = "transformer.h.0.attn."
    steps = why(zoo["gpt2"], attn + "c_attn.weight", attn + "c_proj.weight", group=attn + "kv_heads")
    rules = [s.rule for s in steps]
    assert follows(steps)
    assert rules.index("split") + 1 == rules.index("getitem")
    assert (steps[0].source, steps[-1].target) == (attn + "c_attn.weight[1]", attn + "c_proj.weight[0]")
    mlp = "transformer.h.1.mlp."
    assert {s.group for s in why(zoo["gpt2"], mlp + "c_fc.weight", mlp + "c_proj.weight")} == {mlp + "ffn"}


def test_plain_modules(mlp: Groups) -> None:
    steps = why(mlp, "1.body.0.weight", "1.body.2.weight")
    assert list(map(str, steps)) == [
        "1.body.0.weight[0] -> linear_1 (forward, rule linear at linear_1 in 1.body.0; group 1.body.ffn)",
        "linear_1 -> relu (forward, rule pointwise at relu in 1.body.1; group 1.body.ffn)",
        "relu -> 1.body.2.weight[1] (forward, rule linear at linear_2 in 1.body.2; group 1.body.ffn)",
    ]
    (bias,) = {s.group for s in why(mlp, "1.body.0.bias", "1.body.2.weight")}
    assert bias == "1.body.ffn"
    assert {s.group for s in why(mlp, "0.weight", "3.weight")} == {"hidden"}


# Errors


def test_unknown_parameters(mlp: Groups, llama: Groups) -> None:
    known = "0.bias, 0.weight, 1.body.0.bias, 1.body.0.weight, 1.body.2.bias, 1.body.2.weight, "
    known += "2.body.0.bias, 2.body.0.weight, 3.bias, 3.weight"
    with pytest.raises(UsageError) as error:
        why(mlp, "0.weight", "1.body.0.weigth")
    assert (
        str(error.value)
        == f"the traced model has no parameter '1.body.0.weigth'; did you mean '1.body.0.weight'? Choose from: {known}"
    )
    with pytest.raises(UsageError, match=r"no parameter 'lm_head.wight'; did you mean 'lm_head.weight'"):
        why(llama, "lm_head.wight", "model.norm.weight")


def test_nothing_shared(mlp: Groups) -> None:
    with pytest.raises(UsageError) as error:
        why(mlp, "1.body.0.bias", "2.body.0.bias")
    assert str(error.value) == (
        "'1.body.0.bias' and '2.body.0.bias' share no prune group, so neither forces the other to be pruned: "
        "through the first run 1.body.ffn; through the second hidden"
    )


def test_the_same_parameter_twice(mlp: Groups) -> None:
    with pytest.raises(UsageError, match=r"'0.weight' is named twice"):
        why(mlp, "0.weight", "0.weight")


def test_groups_that_do_not_fit(mlp: Groups) -> None:
    with pytest.raises(UsageError, match=r"there is no prune group 'hiden'; did you mean 'hidden'\?"):
        why(mlp, "0.weight", "3.weight", group="hiden")
    with pytest.raises(UsageError) as error:
        why(mlp, "0.weight", "3.weight", group="1.body.ffn")
    assert str(error.value) == "group '1.body.ffn' does not run through both '0.weight' and '3.weight'; choose from: hidden"
    with pytest.raises(UsageError, match=r"there is no prune group 'body.ffn'; did you mean '1.body.ffn'\?"):
        triggers(mlp, "body.ffn")
    with pytest.raises(UsageError, match=r"group '1.body.ffn' does not run through '3.weight'; did you mean "):
        triggers(mlp, "1.body.ffn", "3.weight")


def test_a_rule_that_went_away_leaves_no_path(monkeypatch: pytest.MonkeyPatch, mlp: Groups) -> None:
    monkeypatch.setattr(coupling, "rule_for", lambda target: None)
    with pytest.raises(
        UsageError, match=r"no coupling was recorded between '0.weight' and '3.weight', though hidden runs through both"
    ):
        why(mlp, "0.weight", "3.weight")
