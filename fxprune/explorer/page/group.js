// The selected group: what it is, why it is pinned, and what its units own.
function buildGroup(group) {
  const planned = DATA.plan && group.keptCount < group.size;
  const facts = [
    ["units", count(group.size)],
    ["parameters a unit", count(group.perUnit)],
    ["share of the model", percent(Math.min(1, (group.size * group.perUnit) / DATA.summary.parameters))],
    planned ? ["kept", `${count(group.keptCount)} (${percent(group.keptCount / group.size, 0)})`] : null,
    group.scores ? ["mean score", number(group.mean)] : null,
    group.least > 1 ? ["must stay at least", count(group.least)] : null,
    group.multiple > 1 ? ["kept in multiples of", count(group.multiple)] : null,
  ].filter(Boolean);
  byId("group-head").replaceChildren(
    el("div", { class: "title" },
      el("h2", { id: "group-title", class: "path" }, group.name),
      el("span", { class: "chip" }, el("i", { class: "swatch", style: kindColour(group.kind) }), group.kind)),
    el("p", { class: "hint" }, `A unit is ${KINDS[group.kind] ?? KINDS.other}.${group.normalised ? " A norm, softmax or top-k runs over the units: the proof takes its statistics over those kept." : ""}`),
    ROWS.get(group.row)?.dropped ? el("div", { class: "pinned" }, el("strong", {}, "Dropped"), ` with the whole block ${group.row}.`) : "",
    group.prunable ? "" : el("div", { class: "pinned" }, el("strong", {}, "Pinned: no unit may be removed."),
      el("ul", {}, ...group.reasons.map((r) => el("li", {}, r)))),
    el("dl", { class: "facts" }, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
  );
  buildMembers(group);
  buildUnits(group);
  buildProfile(group);
}

function buildMembers(group) {
  byId("members").replaceChildren(
    el("h3", {}, `What a unit owns: ${count(group.members.length)} dimension${group.members.length > 1 ? "s" : ""}`),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Dimensions that the units own" }, el(
      "table", { class: "list" },
      el("thead", {}, el("tr", {}, ...["dimension", "its layout"].map((t) => el("th", { scope: "col" }, t)), el("th", { scope: "col", class: "owned" }, "indices of the unit"))),
      el("tbody", {}, ...group.members.map((member, i) => {
        const [name, shape, trained, aliases] = DATA.parameters[member[0]];
        return el(
          "tr", {},
          el("td", {}, el("span", { class: "path" }, ...breakable(name)), el("div", { class: "soft" }, [`dim ${member[1]} of ${shape.map(count).join(" \u00d7 ")}`, trained ? "" : "buffer", aliases.length ? `tied: ${aliases.join(", ")}` : ""].filter(Boolean).join("; "))),
          el("td", { style: kindColour(group.kind) }, ...spelled(DATA.layouts[member[2]], group.kind)),
          el("td", { class: "owned", "data-member": i }),
        );
      })),
    )),
  );
}

// "3 kv_heads x [32 + 32]", the group's own axis marked.
function spelled(tree, kind) {
  const [sort, ...rest] = tree;
  if (sort === "own") return [el("span", { class: "own" }, `${count(rest[0])}\u00a0${kind}`)];
  if (sort === "axis") return [`${count(rest[0])}${rest[1] ? `\u00a0${rest[1]}` : ""}`];
  const inner = rest.flatMap((t, i) => [...(i ? [sort === "x" ? " \u00d7 " : " + "] : []), ...spelled(t, kind)]);
  return sort === "+" ? ["[", ...inner, "]"] : inner;
}

function showOwned(group, unit) {
  const memo = new Map();
  for (const cell of byId("members").querySelectorAll("[data-member]")) {
    const member = group.members[cell.dataset.member];
    if (!memo.has(member[2])) memo.set(member[2], ranges(positions(group, member, unit)));
    cell.textContent = memo.get(member[2]);
  }
}

// A path that a line may break at its dots.
function breakable(path) { return path.split(/(?<=\.)/).flatMap((part, i) => (i ? [el("wbr"), part] : [part])); }
