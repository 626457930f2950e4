// The selected group's role in all layers: mean score and, with a plan, the share that stays.
function buildProfile(group) {
  const alike = GROUPS.filter((g) => g.row && g.column === group.column);
  const lines = [
    SCORED && alike.some((g) => g.mean > 0) ? ["mean score", (g) => Math.max(0, g.mean ?? 0), (g) => number(g.mean)] : null,
    alike.some((g) => g.keptCount < g.size) ? ["kept", (g) => g.keptCount / g.size, (g) => percent(g.keptCount / g.size, 0)] : null,
  ].filter(Boolean);
  const drawn = group.row && alike.length > 1 && lines.length;
  byId("profile").replaceChildren(...(drawn ? [el("h3", {}, `${group.column} in every layer`), ...lines.map((line) => profileLine(alike, group, ...line))] : []));
}

function profileLine(alike, group, name, value, text) {
  const most = name === "kept" ? 1 : Math.max(...alike.map(value));
  const [least, largest] = [Math.min, Math.max].map((pick) => alike.find((g) => value(g) === pick(...alike.map(value))));
  return el(
    "div", { class: "line" }, el("span", { class: "soft" }, name),
    el(
      "div", { class: "columns", role: "img", "aria-label": `${name} by layer: least ${text(least)} in layer ${layerOf(least)}, most ${text(largest)} in layer ${layerOf(largest)}` },
      ...alike.map((g) => el(
        "i", {
          class: g === group ? "here" : null, onclick: () => select(g.index), onpointerleave: () => tip(null),
          onpointermove: (e) => tip(e, `${g.name}\n${name} ${text(g)}`),
        },
        el("b", { style: `height:${Math.max(2, (100 * value(g)) / most)}%` }),
      )),
    ),
    el("span", { class: "soft n" }, name === "kept" ? "100 %" : number(most)),
  );
}
